"""Generation success: how often a steered model writes the tokens that the latent promotes.

    GenSuccess@k(j) = mean over prefixes of #{ generated tokens in the top-k ids of the logit lens }

The latent is raised by ``factor * M`` at the last token of the prefix and at every token that follows; sampling at
temperature 0.7, at most 20 tokens, up to the first full stop: Arad, Mueller & Belinkov 2025 (arXiv 2505.20063),
section 4. There M is measured again at every step; here it is measured once, at the last token of the prefix, so that a
row's edit is a plan that can be written down.

A row is one latent, factor and prefix, with its own plan and its own random numbers, so which rows share a batch
changes nothing that is written.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saeguard.capturing import capture
from saeguard.engines import engine_for
from saeguard.engines.corrections import on_plain_weights
from saeguard.errors import ScoreMismatch, SiteNotFound
from saeguard.ops import Add
from saeguard.plans import Plan, Rule
from saeguard.sae import SAE
from saeguard.scoring.logit_lens import top_tokens
from saeguard.scoring.next_token import MaxOf, prefix_ids, units
from saeguard.scoring.prefixes import NEUTRAL
from saeguard.scoring.sweep import Progress, chosen, digest_of, spread, sweep, weights_of
from saeguard.scoring.table import Meaning, ScoreTable
from saeguard.steering import steer

FACTORS = (0.2, 0.4, 0.8, 1.2, 1.6, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 20.0)
"""As published."""
ROWS = 64
"""Rows per generate call."""
Row = tuple[int, float, int]
"""A latent, a factor, and the number of a prefix."""


@dataclass(frozen=True)
class Writing:
    """How rows are steered and sampled, and what is counted; the defaults are the published ones.

    A factor of 0 is the plain model. ``of`` says what factors multiply, as in `next_token.units`; ``ks`` how many of
    the latent's own tokens count; ``tokens`` is the most that are written.
    """

    factors: tuple[float, ...] = FACTORS
    of: MaxOf = "prefix"
    ks: tuple[int, ...] = (1, 5, 20)
    temperature: float = 0.7
    tokens: int = 20
    seed: int = 0


def successes(
    model: nn.Module,
    tokenizer: Any,
    sae: SAE,
    latents: Sequence[int],
    *,
    how: Writing = Writing(),  # noqa: B008  frozen
    own: Int[Tensor, "d_sae top"] | None = None,
    prefixes: Sequence[str] = NEUTRAL,
    batch: int = ROWS,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Float[Tensor, "latents factors prefixes ks"]:
    """How many of the generated tokens are among the latent's top k, per latent, factor, prefix and k.

    Raises `BindError`, `ScoreMismatch`.
    """
    wanted = chosen(sae, latents)
    own = top_tokens(model, sae, k=max(how.ks)) if own is None else own
    if len(own) != sae.d_sae or own.shape[1] < max(how.ks) or bool((own[wanted] < 0).any()):
        raise ScoreMismatch(
            f"generation success of {sae.name}", f"own tokens are {tuple(own.shape)}, or some are negative",
            f"Give at least {max(how.ks)} token ids for every latent: logit_lens.top_tokens(model, sae).",
        )  # fmt: skip
    texts = [prefix_ids(tokenizer, prefix) for prefix in prefixes]
    unit = units(sae, prefixes, lambda: _largest(model, tokenizer, sae, texts), how.of)
    stops = _stops(tokenizer)

    def step(some: list[int]) -> dict[str, Tensor]:
        found, rows = [], list(product(some, how.factors, range(len(texts))))
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            written = _write(model, tokenizer, sae, part, texts, unit, stops, how)
            mine = own[[latent for latent, *_ in part]]
            found.append(_count(written, mine, stops, tokenizer.all_special_ids, how.ks))
        return {"counts": torch.cat(found).view(len(some), len(how.factors), len(texts), len(how.ks))}

    per_latent = max(1, len(how.factors) * len(texts))
    asked = {**_provenance(model, texts, how), **weights_of(model, sae, checkpoint), "own": digest_of(own)}
    return sweep(
        wanted, step, batch=max(1, batch // per_latent), asked=asked, checkpoint=checkpoint, progress=progress
    )["counts"]  # fmt: skip


def generation_success(
    model: nn.Module,
    tokenizer: Any,
    sae: SAE,
    latents: Sequence[int],
    *,
    how: Writing = Writing(),  # noqa: B008  frozen
    own: Int[Tensor, "d_sae top"] | None = None,
    prefixes: Sequence[str] = NEUTRAL,
    batch: int = ROWS,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> ScoreTable:
    """Columns ``generation_success_<k>`` at each latent's best factor, and ``steering_factor``, which is that factor.

    The best factor has the largest success at the largest k, the smaller one of two; as it is chosen on the prefixes
    that it is scored on, compare latents, or take `successes` of other prefixes at that factor. Raises as `successes`.
    """
    wanted = chosen(sae, latents)
    counts = successes(
        model, tokenizer, sae, wanted, how=how, own=own, prefixes=prefixes, batch=batch, checkpoint=checkpoint,
        progress=progress,
    )  # fmt: skip
    texts = [prefix_ids(tokenizer, prefix) for prefix in prefixes]
    return _table(sae, wanted, counts, how, _provenance(model, texts, how))


def _table(sae: SAE, latents: Sequence[int], counts: Tensor, how: Writing, asked: dict[str, Any]) -> ScoreTable:
    mean, source = counts.mean(2), "Arad et al. 2025, section 4"
    order = sorted(range(len(how.factors)), key=lambda i: how.factors[i])
    best = torch.tensor(order)[mean[:, order, how.ks.index(max(how.ks))].argmax(1)]
    at_best = mean[torch.arange(len(latents)), best]
    columns = {
        f"generation_success_{k}": (
            spread(sae, latents, at_best[:, i]),
            Meaning(f"generated tokens among its top {k}, mean over prefixes", source),
        )
        for i, k in enumerate(how.ks)
    }
    factor = spread(sae, latents, torch.tensor(how.factors)[best])
    columns["steering_factor"] = (factor, Meaning(f"best factor, in multiples of {how.of}", source, higher=False))
    return ScoreTable.of(sae, columns, **asked)


def _provenance(model: nn.Module, texts: Sequence[Sequence[int]], how: Writing) -> dict[str, Any]:
    names = engine_for(model).model_names()
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(how).items()}
    return {
        "model": names[0] if names else type(model).__name__, "score": "generation_success",
        "data": hashlib.sha256(repr([list(text) for text in texts]).encode()).hexdigest(), **plain,
    }  # fmt: skip


def _largest(
    model: nn.Module, tokenizer: Any, sae: SAE, texts: Sequence[Sequence[int]]
) -> Float[Tensor, " prefixes"]:  # fmt: skip
    """The largest activation of any latent at the last token of each text."""
    if sae.site is None:
        raise SiteNotFound(f"steering with {sae.name}", "it does not say at which site it reads", "Give it a site.")
    plain, largest = on_plain_weights(sae, engine_for(model)), []
    for start in range(0, len(texts), ROWS):
        some = texts[start : start + ROWS]
        ids, _ = _padded(some, tokenizer, model, side="right")  # on the left, GPT-2 would count padding as positions
        with torch.no_grad(), capture(model, sae.site) as tape:
            model(input_ids=ids, use_cache=False)
        x = tape[sae.site][torch.arange(len(some)), torch.tensor([len(text) - 1 for text in some])]
        largest.append(plain.encode(x.to(plain.W_dec.device)).amax(-1).cpu())
    return torch.cat(largest)


def _write(
    model: Any, tokenizer: Any, sae: SAE, rows: Sequence[Row], texts: Sequence[Sequence[int]], unit: Tensor,
    stops: list[int], how: Writing,
) -> Int[Tensor, "rows new"]:  # fmt: skip
    """What the model writes behind each row's prefix, under each row's plan."""
    prompts = [texts[number] for _, _, number in rows]
    ids, mask = _padded(prompts, tokenizer, model)
    plans = [
        Plan((Rule(sae.name, (latent,), Add(factor * float(unit[number, latent])), start=len(texts[number]) - 1),))
        if factor
        else None
        for latent, factor, number in rows
    ]
    options: dict[str, Any] = {
        "max_new_tokens": how.tokens, "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0,
        "eos_token_id": stops, "pad_token_id": _pad(tokenizer),
        "logits_processor": [_Sampler(rows, texts, how.temperature, how.seed)],
    }  # fmt: skip
    if not any(plans):
        written = model.generate(ids, attention_mask=mask, **options)
    else:
        with steer(model, plans, saes={sae.name: sae}, tokenizer=tokenizer):
            written = model.generate(ids, attention_mask=mask, **options)
    return written[:, ids.shape[1] :].cpu()


class _Sampler:
    """Sampling as the largest of logits / temperature plus Gumbel noise, each row's noise from its own generator."""

    def __init__(self, rows: Sequence[Row], texts: Sequence[Sequence[int]], temperature: float, seed: int):
        self._temperature = temperature
        self._generators = []
        for latent, factor, number in rows:
            name = repr((seed, latent, float(factor), list(texts[number])))
            low = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            self._generators.append(torch.Generator().manual_seed(low >> 1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty(scores.shape)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self._temperature - noise.log().to(scores.device)


def _count(
    written: Int[Tensor, "rows new"], own: Int[Tensor, "rows top"], stops: list[int], special: Sequence[int],
    ks: Sequence[int],
) -> Float[Tensor, "rows ks"]:  # fmt: skip
    """Per row and k, the generated tokens among the top k: up to the first stop, which counts, and no special token."""
    ended = torch.isin(written, torch.tensor(stops))
    counts = (ended.cumsum(1) - ended.long() == 0) & ~torch.isin(written, torch.tensor(sorted(special)))
    hits = [((written[:, :, None] == own[:, None, :k]).any(-1) & counts).sum(1) for k in ks]
    return torch.stack(hits, dim=1).float()


def _stops(tokenizer: Any) -> list[int]:
    """Tokens with a full stop in them, and the end of text."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    ends = {i for i, name in enumerate(names) if name is not None and "." in name}
    return sorted(ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()))


def _pad(tokenizer: Any) -> int:
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
    return next(number for number in known if number is not None)


def _padded(
    texts: Sequence[Sequence[int]], tokenizer: Any, model: nn.Module, *, side: Literal["left", "right"] = "left"
) -> tuple[Int[Tensor, "rows columns"], Int[Tensor, "rows columns"]]:
    """Ids and mask; on the left, as generate wants it, the last column is the last token of each."""
    width, device, ids, mask = max(map(len, texts)), next(model.parameters()).device, [], []
    for text in texts:
        fill = width - len(text)
        front, back = (fill, 0) if side == "left" else (0, fill)
        ids.append([_pad(tokenizer)] * front + list(text) + [_pad(tokenizer)] * back)
        mask.append([0] * front + [1] * len(text) + [0] * back)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
