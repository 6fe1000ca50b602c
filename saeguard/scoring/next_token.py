"""What a model says next behind a fixed prefix, with one latent moved at its last token: all latents, row by row.

    x' = x + amount_j W_dec[j]        at the last token, error kept (Arad, Mueller & Belinkov 2025, section 3)
    p' = softmax(logits behind x')

One row is one latent. Logits are reduced where they are made: no distribution is kept.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saeguard.capturing import capture
from saeguard.engines import engine_for
from saeguard.errors import MissingMaximum, ScoreMismatch
from saeguard.ops import Add
from saeguard.plans import Plan, Rule
from saeguard.sae import SAE
from saeguard.scoring.last_token import LastToken, check_free, read_up_to
from saeguard.scoring.sweep import LOGITS, chosen
from saeguard.steering import steer

PREFIX = "From my experience,"
"""The published one."""

MaxOf = Literal["batch", "prefix", "recorded"]
"""What amounts are multiples of: the largest activation of any latent at the last token of any of the prefixes
(published: one number for the whole batch), the same of each prefix alone, or each latent's own recorded maximum."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """A text that the model has read; made by `read_prefix`."""

    text: str
    ids: Int[Tensor, "1 n"]
    sae: SAE
    """On the model's plain weights."""
    x: Float[Tensor, "1 d_in"]
    """What the SAE reads at the last token."""
    y: Float[Tensor, "1 d_out"]
    """What it writes to, which is the same unless it is a transcoder."""
    last: LastToken

    @property
    def clean(self) -> Float[Tensor, " vocab"]:
        """Log-probabilities of the plain model."""
        return self.last.clean.log_softmax(-1)

    @cached_property
    def f(self) -> Float[Tensor, " d_sae"]:
        """Activations at the last token. Raises `NotSliceable` when only some latents were read."""
        return self.sae.encode(self.x)[0]

    def directions(self, latents: Sequence[int]) -> Float[Tensor, "n d_out"]:
        """By what the stream moves per unit of each latent's activation."""
        held = {latent: i for i, latent in enumerate(self.sae.held)} if self.sae.held is not None else None
        rows = torch.tensor([latent if held is None else held[latent] for latent in latents], dtype=torch.long)
        W, scale = self.sae.W_dec[rows.to(self.sae.W_dec.device)].float(), self.sae.read(self.x).scale
        return W if scale is None else W * scale

    def log_p(self, dx: Float[Tensor, "rows d_out"]) -> Float[Tensor, "rows vocab"]:
        """Next-token log-probabilities with ``dx`` added at the last token."""
        return self.last.logits(dx).log_softmax(-1)


def read_prefix(model: nn.Module, tokenizer: Any, sae: SAE, text: str = PREFIX, *, skip: bool = True) -> Prefix:
    """Read ``text`` behind a BOS, if the tokenizer has one, and keep what all latents share.

    ``skip=False`` runs every block for every latent. Raises `BindError` where the SAE does not fit the model, and
    `ScoreMismatch` for a text that ends in a special token, whose activations say nothing.
    """
    check_free(model)
    ids = prefix_ids(tokenizer, text)
    if not ids or ids[-1] in tokenizer.all_special_ids:
        raise ScoreMismatch(
            f"scores behind the prefix {text!r}", "its last token is a special one, or there is none",
            "End it with a word.",
        )  # fmt: skip
    rows, fits = torch.tensor([ids]), Plan((Rule(sae.name, (), Add(0.0)),))  # no latent: it only has to fit
    rows = rows.to(next(model.parameters()).device)
    with torch.no_grad(), steer(model, fits, saes={sae.name: sae}, tokenizer=tokenizer) as run:
        bound = run.rules[0]
        with capture(model, {bound.reads, bound.site}) as tape:
            model(input_ids=rows, use_cache=False)
    engine = engine_for(model)
    place, sae = engine.resolve(bound.site), run.saes[sae.name].to(device=engine.resolve(bound.reads).device)
    x, y = (tape[site][:, -1].float().to(place.device) for site in (bound.reads, bound.site))
    return Prefix(text, rows, sae, x, y, read_up_to(model, engine, place, rows, skip=skip))


def read_prefixes(model: nn.Module, tokenizer: Any, sae: SAE, texts: Sequence[str]) -> list[Prefix]:
    """`read_prefix` of each text. Raises `ScoreMismatch` for none."""
    if not texts:
        raise ScoreMismatch(f"scores of {sae.name}", "there is no prefix to score behind", "Give at least one.")
    return [read_prefix(model, tokenizer, sae, text) for text in texts]


def prefix_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of ``text`` behind a BOS, if the tokenizer has one."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [*bos, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def amounts(prefixes: Sequence[Prefix], factor: float, of: MaxOf) -> list[Float[Tensor, " d_sae"]]:
    """Per prefix, by how much each latent is moved: ``factor`` times `units`, in activation units."""
    texts = [prefix.text for prefix in prefixes]
    found = units(prefixes[0].sae, texts, lambda: torch.stack([prefix.f.amax() for prefix in prefixes]), of)
    return list(factor * found)


def units(
    sae: SAE, texts: Sequence[str], largest: Callable[[], Float[Tensor, " prefixes"]], of: MaxOf
) -> Float[Tensor, "prefixes d_sae"]:
    """Per text and latent the activation that ``of`` names; ``largest`` measures that of any latent at the last tokens.

    Raises `MissingMaximum`, and `ScoreMismatch` where nothing fires at the end of a text.
    """
    if of == "recorded":
        if sae.maximum is None:
            raise MissingMaximum(
                f"multiples of the recorded maxima of {sae.name}", "it records none", 'Use of="prefix".'
            )
        every = torch.full((sae.d_sae,), torch.nan, device=sae.maximum.device)
        every[chosen(sae, None)] = sae.maximum.float()
        return every.expand(len(texts), sae.d_sae)
    found = largest()
    found = found.amax().expand(len(texts)) if of == "batch" else found
    if float(found.min()) <= 0:
        raise ScoreMismatch(
            f"multiples of the largest activation of {sae.name} behind {texts[int(found.argmin())]!r}",
            "no latent fires at its last token",
            'Use another prefix, or of="recorded".',
        )
    return found[:, None].expand(len(texts), sae.d_sae)


def rows_at_once(prefix: Prefix, batch: int | None) -> int:
    """``batch``, or as many rows as keep the logits of a batch small."""
    return batch or max(1, LOGITS // len(prefix.last.clean))


def own_tokens(
    log_p: Float[Tensor, "rows vocab"], own: Int[Tensor, "rows k"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Of each row's own tokens, the largest probability, and the 0-based rank of the token that has it."""
    best = log_p.gather(1, own.to(log_p.device)).amax(1, keepdim=True)
    return best[:, 0].exp(), (log_p > best).sum(1).float()


def divergence(clean: Float[Tensor, " vocab"], log_p: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """KL(clean || row) in nats, as the sum of p (exp(-d) - 1 + d) = p' - p + p d with d = log p - log p'.

    The first form is for small d, in which nothing cancels, the second for those whose exp(-d) no float holds.
    """
    d, p, there = clean - log_p, clean.exp(), log_p.exp()
    far = torch.where(p > 0, there - p + p * d, there)
    return torch.where(d.abs() < 1, p * (torch.expm1(-d) + d), far).sum(-1)


def provenance(model: nn.Module, prefixes: Sequence[Prefix], **settings: Any) -> dict[str, Any]:
    """What a score behind prefixes was made from."""
    digest = hashlib.sha256()
    for prefix in prefixes:
        digest.update(prefix.ids.to(torch.int64).cpu().numpy().tobytes() + b"|")
    names = engine_for(model).model_names()
    return {
        "model": names[0] if names else type(model).__name__, "prefixes": [prefix.text for prefix in prefixes],
        "data": digest.hexdigest(), **settings,
    }  # fmt: skip
