"""A plan as TransformerLens hook functions: the edits of `steer`, for whoever runs a bridge with hooks of their own.

    hooks = plan_as_hooks(plan, bridge, saes)
    logits = bridge.run_with_hooks(tokens, fwd_hooks=hooks)

The first function reads the token ids where they are embedded; from them the others know which tokens are special. All
of them are for passes over whole texts: no hook function is told what a cache holds, so passes with one are refused.
`steer` has no such limits, and checks besides that every edit ran.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saeguard.axes import Stream
from saeguard.engines.base import Pass, Place
from saeguard.engines.calls import Call, Forward, View, stream_at, tokens_of
from saeguard.errors import GuardNotApplied, UnstableEdit, UnsupportedMode, UnsupportedModel
from saeguard.plans import Plan
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.steering import Plans, Run, prepare

Hook = tuple[str, Callable[..., Tensor]]
"""The name of a hook point, and what is called there as ``fn(tensor, hook=point)``."""

_IDS = "embed.hook_in"


def plan_as_hooks(
    plan: Plans,
    bridge: nn.Module,
    saes: SAE | Iterable[SAE] | Mapping[str, SAE] = (),
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    tokenizer: Any = None,
    special_ids: Iterable[int] | None = None,
    prompt_tokens: int | tuple[int, ...] | None = None,
) -> list[Hook]:
    """Hook functions that edit every whole pass of ``bridge`` as `steer` would; give all of them, in this order.

    ``plan`` may be a list with one plan per row. ``attention_mask`` has to be that of the passes, None for texts
    without padding. The functions raise `GuardError` where they cannot be exact. Raises `BindError` as `steer` does,
    and `UnsupportedModel` for anything but a bridge.
    """
    every_row = plan is None or isinstance(plan, Plan)
    plans: Sequence[Plan | None] = [plan] if plan is None or isinstance(plan, Plan) else list(plan)
    ready = prepare(bridge, plans, every_row=every_row, saes=saes, tokenizer=tokenizer, special_ids=special_ids)
    if ready.engine.name != "TransformerLens":
        raise UnsupportedModel(
            f"hook functions for {type(bridge).__name__}",
            f"its engine is {ready.engine.name}, which has no hook points",
            "Use steer(model, plan), or make a bridge with TransformerBridge.boot_transformers.",
        )
    run = Run(plans, ready, every_row=every_row, prompt_tokens=prompt_tokens)
    passing = _Passing(run, ready.places, ready.engine.model, attention_mask)
    in_turn = sorted(ready.places, key=lambda site: sum(ready.places[site].follows(p) for p in ready.places.values()))
    return [(_IDS, passing.begin), *((ready.places[site].path, passing.change_at(site)) for site in in_turn)]


class _Passing:
    """The pass that runs now, between the functions of one plan."""

    def __init__(self, run: Run, places: Mapping[Site, Place], model: nn.Module, mask: Tensor | None):
        self._run, self._places, self._model, self._mask = run, places, model, mask
        self._forward: Forward | None = None

    def begin(self, ids: Tensor, hook: Any) -> Tensor:
        """Start a pass over ``ids``. Raises `UnsupportedMode`, `TokensUnknown`."""
        cached = _columns_before(self._model)
        if cached:
            raise UnsupportedMode(
                "hook functions of a plan in a pass with a cache",
                f"{cached} columns are in it already, of which the functions know nothing",
                "Run the whole text in one pass without a cache, or use steer(bridge, plan).",
            )
        rows, width = ids.shape
        call = Call(None)
        record = call.records[self._run] = self._run.open_record(None)
        seen = Pass(rows, width, 0, None, ids, self._mask, ids.device)
        view = View(tokens_of(seen, self._run, None), self._run.cover(rows, None).to(ids.device), record)
        self._forward = Forward(call, {self._run: view}, rows, width, frozenset(self._places))
        return ids

    def change_at(self, site: Site) -> Callable[..., Tensor]:
        """The function for ``site``."""

        def change(carried: Tensor, hook: Any) -> Tensor:
            return self._changed(site, carried.flatten(2)).view_as(carried)  # attn.hook_z shows heads side by side

        return change

    def _changed(self, site: Site, carried: Stream) -> Stream:
        forward, place = self._forward, self._places[site]
        if forward is None or site in forward.ran or carried.shape[:2] != (forward.rows, forward.width):
            raise GuardNotApplied(
                f"an edit at {site} by a hook function",
                f"{_IDS} was not passed before, or with other tokens",
                "Give all functions that plan_as_hooks made, to one call of the whole bridge.",
            )
        forward.ran.add(site)
        base = None if place.base is None else stream_at(forward, place.base, site)
        x, editor = place.value(carried, base), self._run.editors.get(site)
        forward.streams[site] = x
        if editor is None:
            return carried
        (view,) = forward.views.values()
        streams = {other: stream_at(forward, other, site) for other in editor.reads}
        edit = editor(x, view.tokens, view.covers, streams, view.record.memory)
        view.record.memory.check(view.tokens)
        after = torch.where(edit.changed[..., None], place.add(carried, edit.dx), carried)
        if bool((edit.changed & ~torch.isfinite(after).all(-1)).any()):
            raise UnstableEdit(
                f"an edit at {site}", "an edited vector holds NaN or infinity",
                "Use smaller amounts, or a dtype with more range.",
            )  # fmt: skip
        forward.streams[site] = place.value(after, base)
        return after


def _columns_before(model: nn.Module) -> int:
    """How many columns the cache of the pass of ``model`` holds that calls this function."""
    frame = sys._getframe(1)
    while frame is not None:
        cache = frame.f_locals.get("past_key_values")
        if cache is not None and frame.f_locals.get("self") is model:
            return int(cache.get_seq_length())
        frame = frame.f_back
    return 0
