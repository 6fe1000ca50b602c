"""The gradient of a loss with respect to every latent's activation, from one backward pass per batch.

    x' = x + a (f' - f) @ W_dec      error kept; a undoes the SAE's norm at that token and is 1 without one
    dL/df = a g_x @ W_dec.T          g_x = dL/dx where the SAE writes; f is a free variable, whatever its encoder is

A hook adds zeros that want a gradient to the stream, so g_x is about exactly what a rule adds there. What lies below
the site is not recorded for the backward pass, and the model's parameters neither get gradients nor lose the right to.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saeguard.axes import Mask, Stream
from saeguard.engines.base import Place, places_of
from saeguard.engines.corrections import on_plain_weights
from saeguard.engines.layouts import Layout
from saeguard.errors import GuardNotApplied, NotSliceable, ScoreMismatch, WidthMismatch
from saeguard.fingerprints import model_fingerprint
from saeguard.sae import SAE
from saeguard.scoring.accumulators import MOST, TOKENS, pieces
from saeguard.scoring.cache import Cache, key_of
from saeguard.scoring.last_token import check_free
from saeguard.scoring.losses import Loss
from saeguard.scoring.reading import SiteReader, name_of
from saeguard.scoring.texts import Batch, Texts
from saeguard.sites import Site
from saeguard.tokens import is_special

SCHEMA = 1
BATCH = 4
"""Rows per backward pass: their logits and the gradients of these are held at once."""

State = dict[str, Tensor]
Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


class Slice(NamedTuple):
    """Some tokens and some latents: their activations, and the loss's gradient with respect to them."""

    tokens: slice
    latents: slice
    f: Float[Tensor, "token k"]
    g: Float[Tensor, "token k"]


@dataclass(frozen=True, eq=False)
class Gradients:
    """What one backward pass found; ``kept`` are the tokens that count, in row order wherever ``token`` is an axis."""

    sae: SAE
    """On the model's plain weights."""
    kept: Mask
    x: Float[Tensor, "token d_in"]
    """What the SAE reads, in float32."""
    g_x: Float[Tensor, "token d_out"]
    """dL/dx where it writes, in float32."""
    loss: Float[Tensor, " batch"]

    @cached_property
    def g(self) -> Float[Tensor, "token d_out"]:
        """a g_x: its product with W_dec[j] is dL/df_j."""
        scale = self.sae.read(self.x).scale
        return self.g_x if scale is None else self.g_x * scale

    def slices(self) -> Iterator[Slice]:
        """f and dL/df, a block of tokens and a slice of latents at a time; memory is bounded whatever the width."""
        size = max(MOST // self.sae.d_sae, 1) if self.sae.ranks else TOKENS
        parts = pieces(self.sae)
        for start in range(0, len(self.x), size):
            tokens = slice(start, min(start + size, len(self.x)))
            for piece in parts:
                f = piece.sae.activate(piece.sae.read(self.x[tokens]).x)
                latents = slice(piece.low, piece.low + f.shape[1])
                yield Slice(tokens, latents, f, self.g[tokens] @ piece.sae.W_dec.float().T)


def gradients(
    model: nn.Module, sae: SAE, batch: Batch, loss: Loss, *, layout: Layout | None = None
) -> tuple[Float[Tensor, "token d_sae"], Float[Tensor, "token d_out"]]:
    """Activations of all latents at the counted tokens of ``batch``, and a g_x, so that dL/df = g @ W_dec.T.

    For scores of many batches see `GradientReader`, which holds no array of tokens times latents. Raises what it does.
    """
    found = GradientReader(model, sae, layout=layout).read(batch, loss)
    return found.sae.encode(found.x), found.g


class GradientReader:
    """Reads what an SAE reads, and the gradient where it writes: elsewhere if it is a transcoder.

    Raises what `SiteReader` does, and `NotSliceable` for an SAE that was read in part.
    """

    def __init__(self, model: nn.Module, sae: SAE, *, layout: Layout | None = None):
        if sae.held is not None:
            raise NotSliceable(
                f"gradients of all {sae.d_sae} latents of {sae.name}", f"only {len(sae.held)} of them were read",
                "Load it without latents=...",
            )  # fmt: skip
        self.reader = SiteReader(model, sae, layout=layout)
        self.model, engine = model, self.reader.engine
        self.reads: Site = self.reader.site
        self.writes: Site = sae.site_out or self.reader.site
        self.places = places_of(engine, [self.reads, self.writes])
        if self.places[self.writes].width != sae.d_out:
            raise WidthMismatch(
                f"gradients of {sae.name} at {self.writes}",
                f"it writes vectors of width {sae.d_out}, and {self.writes} carries width "
                f"{self.places[self.writes].width}",
                "Was this SAE trained on another model or another stream?",
            )
        self.name = name_of(self.reader)
        self.special = torch.tensor(sorted(engine.special_ids() | set(sae.manifest.get("special_ids", ()))))
        self.fingerprint = sae.fingerprint()
        self.sae = on_plain_weights(sae, engine).to(device=self.reader.device)

    def read(self, batch: Batch, loss: Loss) -> Gradients:
        """One forward and one backward pass; rows are padded on the right, which changes nothing before.

        Raises `ModelBusy` inside a steer or capture block, and `ScoreMismatch` for numbers that are not finite.
        """
        check_free(self.model)
        kept = batch.kept & ~is_special(batch.ids, self.special.long())
        seen: dict[Site, Tensor] = {}
        zeros: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # until the stream passes the site, see _watch
            for place in self.places.values():
                stack.callback(place.attach(self._watch(place, seen, zeros)).remove)
            output: Any = self.model(input_ids=batch.ids.to(next(self.model.parameters()).device), use_cache=False)
            if len(zeros) != 1 or self.reads not in seen:
                raise GuardNotApplied(
                    f"gradients at {self.writes} of {type(self.model).__name__}",
                    f"the forward pass came by {len(zeros)} times",
                    "Report the model class: its site table is wrong.",
                )
            per_row = loss(getattr(output, "logits", output), replace(batch, kept=kept))
            (g_x,) = torch.autograd.grad(per_row.sum(), zeros)
        x, g_x = (t[kept.to(t.device)].float().to(self.reader.device) for t in (seen[self.reads], g_x))
        if not bool(torch.isfinite(x).all() and torch.isfinite(g_x).all()):
            raise ScoreMismatch(
                f"gradients at {self.writes} of {self.name}", "some of them are NaN or infinite",
                "Run the model in float32 or bfloat16.",
            )  # fmt: skip
        return Gradients(self.sae, kept, x, g_x, per_row.detach())

    def _watch(self, place: Place, seen: dict[Site, Tensor], zeros: list[Tensor]) -> Callable[[Stream], Stream]:
        caller = threading.get_ident()

        def watch(carried: Stream) -> Stream:
            if threading.get_ident() != caller:  # another thread uses the model at the same time
                return carried
            seen[place.site] = place.value(carried, None if place.base is None else seen[place.base]).detach()
            if place.site != self.writes:
                return carried
            torch.set_grad_enabled(True)  # from here on; the pass as a whole stands under no_grad
            zeros.append(torch.zeros_like(seen[place.site], dtype=torch.float32, requires_grad=True))
            return place.add(carried, zeros[-1])

        return watch


@dataclass(frozen=True, eq=False)
class Walk:
    """Backward passes over a text, whose gradients are added up; with a cache they go on where they were interrupted.

    ``batch_rows`` changes speed and memory only. The state is saved every ``save_every`` batches.
    """

    reader: GradientReader
    batch_rows: int = BATCH
    cache: Cache | None = None
    save_every: int = 50

    def over(
        self,
        text: Texts,
        loss: Loss,
        start: Mapping[str, Tensor],
        add: Callable[[State, Gradients], None],
        report: Callable[[int], None],
        **made_of: Any,
    ) -> State:
        """What ``start`` has become after ``add`` was given every batch; ``made_of`` says in JSON values what that is.

        ``add`` writes into the state; ``report`` is told of rows that are done.
        """
        cache, key = self.cache, ""
        state, first = {name: tensor.clone() for name, tensor in start.items()}, 0
        if cache is not None:
            key = self._key(text=text.fingerprint, **made_of)
            if (entry := cache.read(key)) is not None:
                report(len(text.ids))
                return entry.tensors
            if (entry := cache.read(f"{key}.unfinished")) is not None:
                state, first = entry.tensors, int(entry.meta["rows"])
        for number, batch in enumerate(text.batches(self.batch_rows, start=first), 1):
            if batch.ids.numel():
                add(state, self.reader.read(batch, loss))
            report(batch.rows.stop)
            if cache is not None and number % self.save_every == 0:
                cache.write(f"{key}.unfinished", state, {"rows": batch.rows.stop})
        if cache is not None:
            cache.write(key, state, {})
            cache.drop(f"{key}.unfinished")
        return state

    def _key(self, **parts: Any) -> str:
        return key_of(
            schema=SCHEMA, kind="gradients", model=model_fingerprint(self.reader.model), sae=self.reader.fingerprint,
            places=[f"{site} {place.path}" for site, place in self.reader.places.items()],
            special_ids=self.reader.special.tolist(),
            **parts,
        )  # fmt: skip


def rows_of(kept: Bool[Tensor, "batch pos"]) -> Iterator[tuple[int, slice]]:
    """Per row with counted tokens its number in the batch, and where these lie among those of all rows."""
    low = 0
    for row, count in enumerate(kept.sum(1).tolist()):
        if count:
            yield row, slice(low, low + count)
        low += count
