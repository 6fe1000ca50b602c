"""Prove on this machine that steering a model through an SAE does what it says: every claim computed both ways.

What is refused (a site that the model does not have, a compiled model, an SAE of another width) raises before anything
is computed; what is computed and does not hold is a failed claim.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from saeguard.canary import canary
from saeguard.checking.arrival import claims_of_arrival
from saeguard.checking.claims import Checked, Claim, Found, claim
from saeguard.checking.costs import claim_of_cost
from saeguard.checking.direction import claims_of_direction
from saeguard.checking.laws import claims_of_laws
from saeguard.checking.subject import Subject, subject
from saeguard.engines.base import places_of
from saeguard.engines.layouts import Layout
from saeguard.evaluating.self_check import self_check
from saeguard.plans import Plan
from saeguard.sae import SAE

COMPUTE = torch.float32
"""Activations and edits, whatever the model's dtype is: see `saeguard.sae`."""


def check_steering(
    model: nn.Module,
    sae: SAE,
    tokenizer: Any = None,
    *,
    plan: Plan | None = None,
    ids: Any = None,
    layout: Layout | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Checked:
    """Check ``sae`` on ``model`` with a probe of our own, and the laws again under ``plan``.

    The text is the one that comes with saeguard, or token ``ids`` (a few hundred). ``progress`` is told what is being
    checked. Raises `BindError` where model, SAE or plan do not fit together, `TokensUnknown`, and `SelfCheckFailed`
    for too little text.
    """
    start = time.perf_counter()
    progress("binding")
    found = subject(model, sae, tokenizer, ids=ids, layout=layout)
    if plan is not None:
        found.saw(plan, found.prompts[:1])  # what does not fit is refused now
    progress("the SAE's fit")
    claims = [_fit(found, ids)]
    progress("where edits arrive")
    claims += claims_of_arrival(found)
    progress("what they do to the logits")
    claims += claims_of_direction(found)
    progress("the laws")
    claims += claims_of_laws(found, found.probe)
    if plan is not None:
        progress("the laws under your plan")
        claims += claims_of_laws(found, plan, "plan: ")
    progress("the canary and costs")
    claims.append(claim("canary", "entering a block tries an edit of its own first", lambda: _canary(found)))
    claims.append(claim_of_cost(found, found.probe if plan is None else plan))
    return Checked(
        model=next(iter(found.engine.model_names()), type(model).__name__), engine=found.engine.name, sae=sae.name,
        site=str(found.pair), module=found.engine.resolve(found.pair.write).path,
        dtype=_name(found.dtype), stream_dtype=_name(found.stream_dtype), compute_dtype=_name(COMPUTE),
        plan="" if plan is None else plan.name or plan.fingerprint(),
        claims=tuple(claims), seconds=time.perf_counter() - start,
    )  # fmt: skip


def _canary(found: Subject) -> Found:
    places, start = places_of(found.engine, found.pair), time.perf_counter()
    said = canary(found.engine, places, again=True)
    took = (time.perf_counter() - start) * 1000
    return (True if said == "passed" else None), f"{said}, {took:.0f} ms", {"canary_ms": took}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fit(found: Subject, ids: Any) -> Claim:
    def check() -> Found:
        fit = self_check(found.model, found.own, found.tokenizer, ids=ids, layout=found.layout)
        said = "; ".join(reason.found for reason in fit.reasons)
        numbers = {"fvu": fit.fvu, "l0": fit.l0, "tokens": fit.n_tokens}
        text = f"FVU {fit.fvu:.4f}, L0 {fit.l0:.1f} over {fit.n_tokens} tokens"
        return fit.passed, text + (f"; {said}" if said else ""), numbers

    return claim("fit", "the SAE explains this site, as it was read, better than others", check)
