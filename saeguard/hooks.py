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

from jaxtyping import Int
from torch import Tensor, nn

from saeguard.engines.base import Pass, Place
from saeguard.errors import GuardNotApplied, UnsupportedMode, UnsupportedModel
from saeguard.loaders.live import SAEs
from saeguard.passes import OnePass
from saeguard.sites import Site
from saeguard.steering import Plans, Run, start

Hook = tuple[str, Callable[..., Tensor]]
"""The name of a hook point, and what is called there as ``fn(tensor, hook=point)``."""

_IDS = "embed.hook_in"


def plan_as_hooks(
    plan: Plans,
    bridge: nn.Module,
    saes: SAEs = (),
    *,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    tokenizer: Any = None,
    special_ids: Iterable[int] | None = None,
    prompt_tokens: int | Sequence[int] | None = None,
) -> list[Hook]:
    """Hook functions that edit every whole pass of ``bridge`` as `steer` would; give all of them, in this order.

    ``plan`` may be a list with one plan per row. ``attention_mask`` has to be that of the passes, None for texts
    without padding. The functions raise `GuardError` where they cannot be exact. Raises `BindError` and `BadRule` as
    `steer` does, and `UnsupportedModel` for anything but a bridge.
    """
    run, ready = start(
        bridge, plan, saes=saes, tokenizer=tokenizer, special_ids=special_ids, prompt_tokens=prompt_tokens
    )
    if ready.engine.name != "TransformerLens":
        raise UnsupportedModel(
            f"hook functions for {type(bridge).__name__}",
            f"its engine is {ready.engine.name}, and they are for bridges of TransformerLens",
            "Use steer(model, plan), or make a bridge with TransformerBridge.boot_transformers.",
        )
    passing = _Passing(run, ready.places, ready.engine.model, attention_mask)
    in_turn = sorted(ready.places, key=lambda site: sum(ready.places[site].follows(p) for p in ready.places.values()))
    return [(_IDS, passing.begin), *((ready.places[site].path, passing.change_at(site)) for site in in_turn)]


class _Passing:
    """The pass that runs now, between the functions of one plan."""

    def __init__(self, run: Run, places: Mapping[Site, Place], model: nn.Module, mask: Tensor | None):
        self._run, self._places, self._model, self._mask = run, places, model, mask
        self._editing: OnePass | None = None

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
        self._editing = OnePass(self._run, self._places, Pass(rows, width, 0, None, ids, self._mask, ids.device))
        return ids

    def change_at(self, site: Site) -> Callable[..., Tensor]:
        """The function for ``site``."""

        def change(carried: Tensor, hook: Any) -> Tensor:
            if self._editing is None:
                raise GuardNotApplied(
                    f"an edit at {site} by a hook function",
                    f"{_IDS} was not passed before",
                    "Give all functions that plan_as_hooks made, to one call of the whole bridge.",
                )
            return self._editing.change(site, carried.flatten(2)).view_as(carried)  # attn.hook_z shows heads apart

        return change


def _columns_before(model: nn.Module) -> int:
    """How many columns the cache of the pass of ``model`` holds that calls this function."""
    frame = sys._getframe(1)
    while frame is not None:
        cache = frame.f_locals.get("past_key_values")
        if cache is not None and frame.f_locals.get("self") is model:
            return int(cache.get_seq_length())
        frame = frame.f_back
    return 0
