"""The laws of steering, each computed in two ways on this model: identity, rows, padding, phase, kernel, residue."""

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from saeguard.checking.claims import Claim, Found, claim
from saeguard.checking.subject import Saw, Subject, edits_of, of_row, state_of
from saeguard.ops import Scale
from saeguard.plans import Plan, Rule

WRITTEN = 6
"""Tokens that are generated."""
DIFFERENT = 0.02
"""Share of a row's edits that may differ between two computations in half precision, where activations round."""


def claims_of_laws(subject: Subject, plan: Plan, prefix: str = "") -> tuple[Claim, ...]:
    """Every law under ``plan``."""
    laws: dict[str, tuple[str, Callable[[Subject, Plan], Found]]] = {
        "identity": ("an edit that changes nothing leaves every bit", _identity),
        "unplanned rows": ("rows without a plan have the plain model's bits", _unplanned),
        "rows": ("a row in a batch is edited as the row alone", _rows),
        "padding": ("padding on the left or right changes nothing", _padding),
        "phase": ("cached decoding is one pass without a cache", _phase),
        "kernel": ("the fast kernel edits what the float64 reference edits", _kernel),
        "residue": ("nothing is left on the model, also after an exception", _residue),
    }
    if prefix:
        laws.pop("identity")  # the probe's business: it is about an edit that changes nothing
    return tuple(
        claim(prefix + name, promise, lambda law=law: law(subject, plan)) for name, (promise, law) in laws.items()
    )


def _identity(subject: Subject, plan: Plan) -> Found:
    plain, again = subject.plain(subject.prompts), subject.run(subject.prompts)
    if not torch.equal(plain, again):
        return False, "the plain model itself gives other bits the second time: is it in training mode?", {}
    still = Plan((Rule(subject.own.name, subject.latents, Scale(1.0)),))
    steered = subject.saw(still, subject.prompts).logits
    return _equal(plain, steered)


def _unplanned(subject: Subject, plan: Plan) -> Found:
    plain = subject.plain(subject.prompts)
    steered = subject.saw([plan if row % 2 == 0 else None for row in range(len(plain))], subject.prompts).logits
    return _equal(plain[1::2], steered[1::2])


def _rows(subject: Subject, plan: Plan) -> Found:
    def alone(plans: Any) -> Saw:
        solo = [subject.saw(plans, row[None]) for row in subject.prompts]
        edits = tuple(tuple(of_row(one.edits, 0)[rule] for one in solo) for rule in range(len(solo[0].edits)))
        return Saw(torch.cat([one.logits for one in solo]), edits)

    return _agree(subject, plan, lambda plans: subject.saw(plans, subject.prompts), alone)


def _padding(subject: Subject, plan: Plan) -> Found:
    row, (left, right) = subject.prompts[:1], (5, 3)
    filling = row[:, -1:]
    ids = torch.cat([filling.expand(-1, left), row, filling.expand(-1, right)], 1)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, left : left + row.shape[1]] = True

    def inside(plans: Any) -> Saw:
        saw = subject.saw(plans, ids, mask)
        return Saw(saw.logits[:, left : left + row.shape[1]], saw.edits)

    return _agree(subject, plan, lambda plans: subject.saw(plans, row), inside)


def _phase(subject: Subject, plan: Plan) -> Found:
    if not hasattr(subject.model, "generate"):
        return None, f"{type(subject.model).__name__} cannot generate", {}
    prompts = subject.prompts[:2]
    written: list[Tensor] = []

    def cached(plans: Any) -> Saw:
        with nullcontext() if plans is None else subject.steer(plans) as run:
            out = subject.generate(prompts, WRITTEN, output_logits=True, return_dict_in_generate=True)
        written.append(out.sequences.cpu())
        return Saw(torch.stack(out.logits, 1).float().cpu(), () if run is None else edits_of(run))

    def whole(plans: Any) -> Saw:
        saw = subject.saw(plans, written[-1][:, :-1], prompt_tokens=prompts.shape[1])
        return Saw(saw.logits[:, prompts.shape[1] - 1 :], saw.edits)

    return _agree(subject, plan, cached, whole)


def _kernel(subject: Subject, plan: Plan) -> Found:
    def by(kernel: str) -> Callable[[Any], Saw]:
        return lambda plans: subject.saw(plans, subject.prompts[:1], kernel=kernel)

    return _agree(subject, plan, by("sliced"), by("reference"))


def _residue(subject: Subject, plan: Plan) -> Found:
    model = subject.model
    plain = subject.plain(subject.prompts[:1])
    with subject.steer(plan, prompt_tokens=1):
        subject.run(subject.prompts[:1])
    ended = state_of(model) == subject.state
    with suppress(_Interrupt), subject.steer(plan, prompt_tokens=1):
        subject.run(subject.prompts[:1])
        raise _Interrupt
    broken = state_of(model) == subject.state
    same = torch.equal(plain, subject.run(subject.prompts[:1]))
    found = f"hooks and modes {_word(ended)} after a block, {_word(broken)} after an exception; logits {_word(same)}"
    return ended and broken and same, found, {}


class _Interrupt(Exception):
    """What ends a block early."""


def _equal(plain: Tensor, steered: Tensor) -> Found:
    same = torch.equal(plain, steered)
    off = float((plain - steered).abs().max())
    return same, f"{plain.numel():,} logits {'equal' if same else f'differ by up to {off:.2g}'}", {"difference": off}


def _agree(subject: Subject, plan: Plan, one: Callable[[Any], Saw], other: Callable[[Any], Saw]) -> Found:
    """Two ways to compute steered logits lie no further apart than for the plain model, and edit the same tokens."""
    plain, plain_also = one(None), other(None)
    noise = float((plain.logits - plain_also.logits).abs().max())
    first, second = one(plan), other(plan)
    off = float((first.logits - second.logits).abs().max())
    effect = float((first.logits - plain.logits).abs().max())
    limit = subject.limit(noise, first.logits)
    n, differ = _compare(first, second)
    alike = differ == 0 or not subject.exact and differ <= DIFFERENT * n
    numbers = {"difference": off, "limit": limit, "effect": effect, "edits": n, "edits_that_differ": differ}
    found = f"{n} edits{'' if differ == 0 else f', {differ} DIFFER'}; logits within {off:.1e} (limit {limit:.1e})"
    if not n:
        return (None if off <= limit else False), f"nothing to edit in this text; {found}", numbers
    holds = alike and off <= limit
    if holds and effect <= limit:
        return None, f"{found}; the edits move them no further, so this shows nothing", numbers
    return holds, f"{found}, moved by up to {effect:.2g}", numbers


def _compare(first: Saw, second: Saw) -> tuple[int, int]:
    """Edits of the first, and how many only one of the two has."""

    def listed(saw: Saw) -> set[tuple[int, int, int]]:
        return {
            (rule, row, place)
            for rule, rows in enumerate(saw.edits)
            for row, places in enumerate(rows)
            for place in places
        }

    ours, theirs = listed(first), listed(second)
    return len(ours), len(ours ^ theirs)


def _word(same: bool) -> str:
    return "as before" if same else "CHANGED"
