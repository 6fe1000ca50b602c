"""A model's passes for one SAE: the stream at its site over some texts, and the loss with other vectors put there.

    loss = sum of -log p(t | what stands before t)      over the counted tokens t
    x    -> x'                                          at the counted tokens of one site, by the engine's own hooks

Rows are pushed to the left, so padding stands behind everything that it could change. A pass that only reads ends at
the site: the blocks above never run.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from saeguard.axes import Stream
from saeguard.engines import engine_for
from saeguard.engines.base import Place, places_of
from saeguard.engines.corrections import on_plain_weights
from saeguard.engines.fit import check_model
from saeguard.engines.layouts import Layout
from saeguard.engines.session import participants
from saeguard.errors import (
    GuardNotApplied,
    ModelBusy,
    NotSliceable,
    ScoreMismatch,
    UnstableEdit,
    UnsupportedFormat,
    UnsupportedMode,
)
from saeguard.evaluating.fits import MASSIVE
from saeguard.evaluating.places import own_pair
from saeguard.sae import SAE
from saeguard.sites import Site

SAMPLED = 2048
"""Tokens whose norms say which norm is typical."""

MOST_ACTIVATIONS = 2**25
"""Activations that are held at a time."""

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, rows done and rows in all."""
Replace = Callable[[Float[Tensor, "tokens d_in"]], Float[Tensor, "tokens d_in"]]
"""From the stream at counted tokens, in float32, to what takes its place."""


@dataclass(frozen=True, eq=False)
class Text:
    """Token rows of one domain: ``real`` says which columns are tokens, ``counted`` which of those are measured."""

    name: str
    ids: Int[Tensor, "row column"]
    real: Bool[Tensor, "row column"]
    counted: Bool[Tensor, "row column"]

    @property
    def n_tokens(self) -> int:
        """Counted tokens."""
        return int(self.counted.sum())

    def rows(self, part: slice) -> "Text":
        """Some of the rows, pushed to the left and cut to the longest of them."""
        real = self.real[part]
        width = int(real.sum(1).max()) if real.numel() else 0
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        real = real.gather(1, order)
        ids = torch.where(real, self.ids[part].gather(1, order), 0)
        return Text(self.name, ids, real, self.counted[part].gather(1, order) & real)

    def split(self, share: float) -> tuple["Text", "Text"]:
        """The first ``share`` of the rows, and the others. Raises `ScoreMismatch` unless both have counted tokens."""
        cut = min(max(round(share * len(self.ids)), 1), len(self.ids) - 1)
        halves = self.rows(slice(cut)), self.rows(slice(cut, None))
        if not all(half.n_tokens for half in halves):
            raise ScoreMismatch(
                f"two shares of the text {self.name!r}",
                f"it has {len(self.ids)} rows, and in one share there is no token to count",
                "Give more text: one share is fitted to, the other is measured on.",
            )
        return halves


class Read(NamedTuple):
    """The counted tokens of some rows: the number of their text, their ids, and the stream there in float32."""

    text: int
    ids: Int[Tensor, " tokens"]
    x: Float[Tensor, "tokens d_in"]


class Passes:
    """One SAE on one model. ``sae`` is the SAE on the model's device, corrected for its plain weights.

    Raises `SiteNotFound`, `WidthMismatch`, `WrongModel`, `UnsupportedModel`, `UnsupportedMode` in training mode,
    `UnsupportedFormat` for a transcoder, whose output belongs at another site, and `NotSliceable` for an SAE that was
    read in part.
    """

    def __init__(self, model: nn.Module, sae: SAE, *, layout: Layout | None = None):
        if sae.is_transcoder:
            raise UnsupportedFormat(
                f"the error of {sae.name}",
                f"it is a transcoder: it reads {sae.site} and writes {sae.site_out}",
                "Give an SAE, which reconstructs what it reads and so leaves an error of it.",
            )
        if sae.held is not None:
            raise NotSliceable(
                f"the error of {sae.name}", f"only {len(sae.held)} of its {sae.d_sae} latents were read",
                "Load it without latents=...",
            )  # fmt: skip
        engine = engine_for(model, layout)
        self.site: Site = own_pair(sae, engine).read
        check_model(sae, self.site, engine)
        self.model = model
        self.model_name: str = next(iter(engine.model_names()), type(model).__name__)
        self._places = places_of(engine, [self.site])
        self.sae = on_plain_weights(sae, engine).to(device=self._places[self.site].device)
        if model.training:
            raise UnsupportedMode(
                f"the error of {sae.name} on {type(model).__name__}",
                "the model is in training mode, whose dropout makes every pass another one", "Call model.eval() first.",
            )  # fmt: skip

    def read(self, ids: Int[Tensor, "batch pos"]) -> Stream:
        """The stream at the site, from a pass that ends there. Raises `ModelBusy`, `GuardNotApplied`."""
        seen: list[Tensor] = []

        def keep(x: Stream) -> None:
            seen.append(x.detach())
            raise _Reached

        with suppress(_Reached):
            self._run(ids, keep)
        return self._once(seen)[0]

    def loss(self, text: Text, replace: Replace | None = None) -> float:
        """Summed loss of the counted tokens that have a token before them, in nats; see `n_predicted`.

        Raises `ModelBusy`, `GuardNotApplied` when the site was not passed exactly once, `UnstableEdit`.
        """
        rows, seen = text.rows(slice(None)), []

        def change(x: Stream) -> Stream | None:
            seen.append(x)
            if replace is None:
                return None
            counted = rows.counted.to(x.device)
            old = x[counted].float()
            dx = torch.zeros(x.shape, device=x.device)
            dx[counted] = replace(old) - old
            return dx

        logits = self._run(rows.ids, change).logits
        self._once(seen)
        wanted = rows.counted[:, 1:].to(logits.device)
        targets = rows.ids[:, 1:].to(logits.device)[wanted]
        found = F.cross_entropy(logits[:, :-1][wanted].float(), targets, reduction="none").double().sum()
        if not bool(torch.isfinite(found)):
            raise UnstableEdit(
                f"the loss with other vectors at {self.site}", "it is NaN or infinite",
                "Run the model in float32 or bfloat16, and check the SAE with saeguard inspect --model.",
            )  # fmt: skip
        return float(found)

    def stream(
        self, texts: Sequence[Text], *, batch_rows: int = 8, stage: str = "reading", progress: Progress | None = None
    ) -> Iterator[Read]:
        """The counted tokens of all texts, ``batch_rows`` rows at a time, on the CPU."""
        done, total = 0, sum(len(text.ids) for text in texts)
        for number, text in enumerate(texts):
            for start in range(0, len(text.ids), batch_rows):
                rows = text.rows(slice(start, start + batch_rows))
                x = self.read(rows.ids).float().cpu()
                if not bool(torch.isfinite(x).all()):
                    raise UnstableEdit(
                        f"the stream at {self.site} over the text {text.name!r}", "it holds NaN or infinity",
                        "Run the model in float32 or bfloat16.",
                    )  # fmt: skip
                yield Read(number, rows.ids[rows.counted], x[rows.counted])
                done += len(rows.ids)
                if progress is not None:
                    progress(stage, done, total)

    def sample(
        self, texts: Sequence[Text], n_tokens: int, *, longest: float = math.inf
    ) -> Float[Tensor, "tokens d_in"]:
        """The first counted tokens of each text, an even share of ``n_tokens`` each, of a norm up to ``longest``."""
        share, parts = -(-n_tokens // max(len(texts), 1)), []
        for text in texts:
            left = share
            for read in self.stream([text], batch_rows=1):
                parts.append(read.x[torch.linalg.vector_norm(read.x, dim=-1) <= longest][:left])
                left -= len(parts[-1])
                if left <= 0:
                    break
        return torch.cat(parts) if parts else torch.zeros(0, self.sae.d_in)

    def massive_from(self, texts: Sequence[Text]) -> float:
        """The norm beyond which a token is massive: `MASSIVE` times the median of a sample.

        Raises `ScoreMismatch` for a text without a token to count, and for none at all.
        """
        empty = [repr(text.name) for text in texts if not text.n_tokens]
        if empty or not texts:
            raise ScoreMismatch(
                f"what {self.sae.name} does on {', '.join(empty) or 'no text'}", "there is no token to count in it",
                "Give text that is not only special tokens.",
            )  # fmt: skip
        return MASSIVE * float(torch.linalg.vector_norm(self.sample(texts, SAMPLED), dim=-1).median())

    def _run(self, ids: Tensor, change: Callable[[Stream], Stream | None]) -> Any:
        """One pass; ``change`` gets the stream at the site and gives what is added to it."""
        if participants(self.model):
            raise ModelBusy(
                f"what {self.sae.name} does on {type(self.model).__name__}",
                "a steer or capture block is open on it, and this is about the model without edits",
                "Measure before or after that block.",
            )
        streams: dict[Site, Tensor] = {}
        with ExitStack() as hooks, torch.no_grad():
            for place in self._places.values():
                hooks.callback(place.attach(self._hook(place, streams, change)).remove)
            return self.model(input_ids=ids.to(next(self.model.parameters()).device), use_cache=False)

    def _hook(
        self, place: Place, streams: dict[Site, Tensor], change: Callable[[Stream], Stream | None]
    ) -> Callable[[Stream], Stream]:
        caller = threading.get_ident()

        def at(carried: Stream) -> Stream:
            if threading.get_ident() != caller:  # another thread uses the model at the same time
                return carried
            x = place.value(carried, None if place.base is None else streams[place.base])
            streams[place.site] = x
            dx = change(x) if place.site == self.site else None
            return carried if dx is None else place.add(carried, dx)

        return at

    def _once(self, seen: list[Tensor]) -> list[Tensor]:
        if len(seen) != 1:
            raise GuardNotApplied(
                f"a pass of {type(self.model).__name__} by {self.site}", f"it came by {len(seen)} times",
                "Report the model class: its site table is wrong.",
            )  # fmt: skip
        return seen


class Coded(NamedTuple):
    """What an SAE makes of tokens: x_hat, latents active per token, and on how many tokens each latent fires."""

    x_hat: Float[Tensor, "tokens d_in"]
    active: Int[Tensor, " tokens"]
    fired: Int[Tensor, " d_sae"]


def code(sae: SAE, x: Float[Tensor, "tokens d_in"]) -> Coded:
    """``x`` through ``sae``, some tokens at a time so that a wide dictionary's activations stay small."""
    x_hat, active = [], []
    fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    for part in x.split(max(MOST_ACTIVATIONS // sae.d_sae, 1)):
        part = part.to(sae.W_dec.device)
        f = sae.encode(part)
        x_hat.append(sae.decode(f, part).to(x.device))
        active.append((f != 0).sum(-1).to(x.device))
        fired += (f != 0).sum(0).cpu()
    if not x_hat:
        return Coded(x, torch.zeros(0, dtype=torch.int64), fired)
    return Coded(torch.cat(x_hat), torch.cat(active), fired)


class _Reached(Exception):
    """Ends a forward pass whose rest nobody needs."""


def n_predicted(text: Text) -> int:
    """Counted tokens that have a token before them in their row."""
    return int(text.rows(slice(None)).counted[:, 1:].sum())


def cross_entropies(
    passes: Passes,
    texts: Sequence[Text],
    variants: Mapping[str, Replace | None],
    *,
    batch_rows: int = 4,
    progress: Progress | None = None,
) -> list[dict[str, float] | None]:
    """Per text, the mean loss in nats per token with each of ``variants`` in the place of x; None leaves x alone.

    None also stands for a text of which no token can be predicted.
    """
    found: list[dict[str, float] | None] = []
    done, total = 0, sum(len(text.ids) for text in texts)
    for text in texts:
        sums = dict.fromkeys(variants, 0.0)
        for start in range(0, len(text.ids), batch_rows):
            rows = text.rows(slice(start, start + batch_rows))
            for name, replace in variants.items():
                sums[name] += passes.loss(rows, replace)
            done += len(rows.ids)
            if progress is not None:
                progress("cross-entropy", done, total)
        n = n_predicted(text)
        found.append({name: value / n for name, value in sums.items()} if n else None)
    return found
