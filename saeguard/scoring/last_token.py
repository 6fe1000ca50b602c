"""Run only the blocks above a site, for many variants of the last token of one prefix.

    row i adds dx_i to the stream of the last token at one site, and nothing else differs between rows

So what the blocks below the site computed for the last token is the same in every row, and so is everything that was
computed for the tokens before it: both are computed once. A pass over the rows then goes over the blocks below, which
give back the stream that was kept, and attends to one cache that all rows share. Which blocks may be passed over is
tried out on the model itself: a row without an edit has to have the plain model's logits, or else every block runs.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saeguard.engines.base import Engine, Place
from saeguard.engines.session import participants
from saeguard.errors import GuardNotApplied, ModelBusy, UnsupportedMode
from saeguard.sites import Site

EXACT = {torch.float32: 1e-5, torch.float64: 1e-9}
"""How far logits may be off, relative to the largest; other dtypes are compared to 2%."""


@dataclass(frozen=True, eq=False)
class LastToken:
    """A prefix that was read up to its last token; made by `read_up_to`."""

    model: nn.Module
    place: Place
    """Where rows are edited."""
    ids: Int[Tensor, "1 1"]
    cache: Any
    """Of the tokens before the last one, or None where there are none."""
    passed: tuple[tuple[nn.Module, tuple[Any, ...] | None], ...]
    """Blocks to go over, and what they give beside the stream (None: they give the stream alone)."""
    stream: Float[Tensor, "1 1 d_model"] | None
    """What the last of them gave."""
    clean: Float[Tensor, " vocab"]
    """Logits of the plain model, in float32."""

    def logits(self, dx: Float[Tensor, "rows d_out"]) -> Float[Tensor, "rows vocab"]:
        """Next-token logits behind the prefix, in float32, with ``dx`` added at the site: one row each.

        Raises `GuardNotApplied` unless the edit ran exactly once.
        """
        check_free(self.model)
        rows, ran, mine = len(dx), [], threading.get_ident()

        def edit(carried: Tensor) -> Tensor:
            if threading.get_ident() != mine:
                return carried
            ran.append(carried.shape)
            return self.place.add(carried, dx[:, None].to(carried.device))

        handle = None
        with torch.no_grad(), _passed_over(self.passed, self.stream, rows):
            try:
                handle = self.place.attach(edit)
                output: Any = self.model(
                    input_ids=self.ids.expand(rows, 1), past_key_values=_shared(self.cache, rows),
                    use_cache=self.cache is not None,
                )  # fmt: skip
            finally:
                if handle is not None:
                    handle.remove()
        if [tuple(shape[:2]) for shape in ran] != [(rows, 1)]:
            raise GuardNotApplied(
                f"{rows} edits of one token at {self.place.site}", f"they ran on {[tuple(shape) for shape in ran]}",
                "Report the model class: its site table is wrong.",
            )  # fmt: skip
        return output.logits[:, -1].float()


def read_up_to(
    model: nn.Module, engine: Engine, place: Place, ids: Int[Tensor, "1 n"], *, skip: bool = True
) -> LastToken:
    """Read a prefix, and keep what rows that differ at ``place`` have in common.

    ``skip=False`` runs every block for every row. Raises `UnsupportedMode` for a model in training mode, and
    `GuardNotApplied` for one whose logits differ from pass to pass.
    """
    if model.training:
        raise UnsupportedMode(
            f"scores of latents on {type(model).__name__}", "the model is in training mode, so dropout is on",
            "Call model.eval() first.",
        )  # fmt: skip
    ids = ids.to(next(model.parameters()).device)
    blocks = [engine.resolve(Site("resid_pre", layer)).module for layer in range(_first_to_run(place.site))]
    with torch.no_grad():
        cache = None
        if ids.shape[1] > 1:
            before: Any = model(input_ids=ids[:, :-1], use_cache=True)
            cache = before.past_key_values
        seen: dict[nn.Module, Any] = {}
        handles = [block.register_forward_hook(lambda block, _, out: seen.update({block: out})) for block in blocks]
        try:
            output: Any = model(
                input_ids=ids[:, -1:], past_key_values=_shared(cache, 1), use_cache=cache is not None
            )  # fmt: skip
        finally:
            for handle in handles:
                handle.remove()
    full = LastToken(model, place, ids[:, -1:], cache, (), None, output.logits[0, -1].float())
    if skip and blocks:
        stream = seen[blocks[-1]]
        short = replace(
            full,
            passed=tuple((b, seen[b][1:] if isinstance(seen[b], tuple) else None) for b in blocks),
            stream=stream[0] if isinstance(stream, tuple) else stream,
        )
        if _is_exact(short):
            return short
    if not _is_exact(full):
        raise GuardNotApplied(
            f"scores of latents on {type(model).__name__}",
            "a row without an edit does not have the logits of the plain model",
            "Is the model deterministic? Try attn_implementation='eager', and report the model class.",
        )
    return full


def check_free(model: nn.Module) -> None:
    """Raise `ModelBusy` while a steer or capture block is open on ``model``: its edits would be passed over."""
    if participants(model):
        raise ModelBusy(
            f"scores of latents on {type(model).__name__}", "a steer or capture block is open on it",
            "End the block first.",
        )  # fmt: skip


def _first_to_run(site: Site) -> int:
    """The first block that has to run when ``site`` is edited."""
    return site.layer + 1 if site.stream == "resid_post" else site.layer


def _is_exact(last: LastToken) -> bool:
    try:
        found = last.logits(torch.zeros(2, last.place.width, device=last.place.device))
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False  # blocks that take more than the stream from those below, such as shared keys
    allowed = EXACT.get(next(last.model.parameters()).dtype, 2e-2) * float(last.clean.abs().max())
    return bool(((found - last.clean).abs() <= allowed).all())


def _shared(cache: Any, rows: int) -> Any:
    """A cache for ``rows`` rows that looks at the same keys and values; what a pass appends goes to the copy."""
    copied = copy.deepcopy(cache)
    for layer in copied.layers if copied is not None else ():
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == 4:
            layer.keys, layer.values = (kept.expand(rows, *kept.shape[1:]) for kept in (keys, values))
        else:
            layer.batch_repeat_interleave(rows)
    return copied


@contextmanager
def _passed_over(
    blocks: Sequence[tuple[nn.Module, tuple[Any, ...] | None]], stream: Tensor | None, rows: int
) -> Iterator[None]:
    """Let ``blocks`` give back ``stream``, in this thread only, and put everything back afterwards."""
    mine = threading.get_ident()
    kept: list[tuple[nn.Module, Any]] = []

    def stand_in(original: Any, rest: tuple[Any, ...] | None) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != mine or stream is None:
                return original(*args, **kwargs)
            given = stream.expand(rows, *stream.shape[1:])
            return given if rest is None else (given, *rest)

        return forward

    try:
        for block, rest in blocks:
            kept.append((block, block.__dict__.get("forward")))  # somebody else's, such as accelerate's
            block.__dict__["forward"] = stand_in(block.forward, rest)
        yield
    finally:
        for block, before in reversed(kept):
            block.__dict__.pop("forward", None)
            if before is not None:
                block.__dict__["forward"] = before
