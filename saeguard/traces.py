"""A plan in the code of an nnsight trace: the edits of `steer`, for whoever writes their traces themselves.

    edits = plan_in_trace(plan, model, saes)
    with model.trace(prompt):
        edits()
        logits = model.output.logits.save()
    with model.generate(prompt, max_new_tokens=8) as tracer:
        for _ in tracer.iter[:]:
            edits()

A call edits one pass: it reads the token ids and the mask where the model gets them, waits for site after site in the
order in which the model comes to them, and writes the edited streams back. What the trace reads after it is edited;
what lies before the last site has to be read in another ``tracer.invoke()``. In an invoke its rows are the invoke's.
`steer` has no such limits, needs no ``prompt_tokens`` to know where a prompt ends, and checks that every edit ran.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from saeguard.engines.base import Engine, Model, Pass, Place
from saeguard.errors import UnsupportedMode, UnsupportedModel
from saeguard.loaders.live import SAEs
from saeguard.passes import OnePass
from saeguard.reports import Report
from saeguard.sites import Site
from saeguard.steering import Plans, Run, start

_IN_TURN = (
    "resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_normed", "mlp_in", "mlp_post", "mlp_out", "resid_post",
)  # fmt: skip
"""The order in which a block comes to its streams."""


def plan_in_trace(
    plan: Plans,
    model: Model,
    saes: SAEs = (),
    *,
    tokenizer: Any = None,
    special_ids: Iterable[int] | None = None,
    prompt_tokens: int | Sequence[int] | None = None,
) -> "TraceEdits":
    """What edits a pass when it is called in a trace of ``model``, as `steer` would.

    ``plan`` may be a list with one plan per row of what calls it, of an invoke or of the whole batch. Rules for a phase
    need ``prompt_tokens``, the number of real prompt tokens, in all or per row. Raises `BindError` and `BadRule` as
    `steer` does, and `UnsupportedModel` for models that are not nnsight's.
    """
    run, ready = start(
        model, plan, saes=saes, tokenizer=tokenizer, special_ids=special_ids, prompt_tokens=prompt_tokens
    )
    if not hasattr(model, "interleaver"):
        raise UnsupportedModel(
            f"edits in a trace of {type(model).__name__}",
            f"its engine is {ready.engine.name}, and it has no traces",
            "Give nnsight's model, or use steer(model, plan).",
        )
    return TraceEdits(model, ready.engine, ready.places, run)


class TraceEdits:
    """The edits of a plan for the code of a trace. Made by `plan_in_trace`."""

    def __init__(self, model: Any, engine: Engine, places: Mapping[Site, Place], run: Run):
        self._model, self._engine, self._run = model, engine, run
        self._places = sorted(places.items(), key=lambda item: (item[0].layer, _IN_TURN.index(item[0].stream)))
        self._remembers = any(bound.gate is not None for bound in run.rules)

    @property
    def report(self) -> Report:
        """What was edited so far, per rule; each pass is a call of its own."""
        return self._run.report

    def __call__(self) -> None:
        """Edit the pass that runs, up to the last site. Raises `UnsupportedMode`, `GuardError`."""
        if not self._model.interleaver.interleaving:
            raise UnsupportedMode(
                "edits outside of a pass",
                "no pass of the model runs that this code is a part of",
                "Call them in a trace with an input, or in one of its invokes.",
            )
        args, kwargs = self._model.inputs
        seen = self._engine.read_pass(args, kwargs)
        self._check_rows(seen)
        if self._remembers and seen.column:
            raise UnsupportedMode(
                "a rule with a gate in a trace of a pass with a cache",
                f"its gate remembers tokens, and of the {seen.column} in the cache this code knows nothing",
                "Use steer(model, plan) around the trace.",
            )
        editing = OnePass(self._run, dict(self._places), seen)
        for site, place in self._places:
            self._edit(editing, site, place, self._model.interleaver.envoys[id(place.module)])

    def _check_rows(self, seen: Pass) -> None:
        from saeguard.engines.nnsight import rows_of_invoke  # an extra: whoever is in a trace has it installed

        rows = rows_of_invoke(self._model)
        if rows is not None and seen.rows != rows:
            raise UnsupportedMode(
                f"edits in an invoke of {rows} rows",
                f"the pass shows it {seen.rows}, those of the other invokes among them",
                "Generate one sequence per row, or use steer(model, plan) around the trace.",
            )

    def _edit(self, editing: OnePass, site: Site, place: Place, envoy: Any) -> None:
        """Wait for a site, and write its edited stream."""
        change = partial(editing.change, site)
        if place.side == "output":
            envoy.output = place.changed(envoy.output, change)
            return
        args, kwargs = envoy.inputs
        if args:
            envoy.inputs = (change(args[0]), *args[1:]), kwargs
        else:
            envoy.inputs = args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}
