"""Several policies for one model as one: the edits and the stops of all, each behind the gate that it came with.

    joined([A, B]) does to a row what A does where A's gates are open, and what B does where B's are

Nothing is fitted or calibrated anew, and no gate knows of another. Where two policies set one latent to the same thing,
the one that comes first acts and the other leaves it alone; where they set it to different things they are refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import combinations
from typing import Any

from saeguard.errors import BadPolicy, OverlappingRules, PolicyMismatch
from saeguard.guarding.pins import SAEPin
from saeguard.guarding.policy import Policy
from saeguard.plans import Plan, Rule

PARTS = "joined from"
"""The calibration figure of a joined policy that says what it was made of."""


def joined(policies: Sequence[Policy], *, name: str | None = None, serial: int | None = None) -> Policy:
    """One policy with the rules of all, then the stops of all, in the order given.

    Its calibration holds that of each part by its name, and their fingerprints. It goes by on errors only where all of
    them do; its name is theirs and its serial the largest of theirs, unless given. Signatures are not carried over.
    Raises `PolicyMismatch` for policies of different models, tokenizers or SAEs, `OverlappingRules` for edits that
    contradict each other, `BadPolicy` for fewer than two policies, for a name given twice, and for what is too large.
    """
    listed = list(policies)
    if len(listed) < 2:
        raise BadPolicy("policies to join", f"{len(listed)} of them were given", "Give two or more.")
    for other in listed[1:]:
        _check_same(listed[0], other)
    rules = _rules(listed)
    return Policy(
        name=name or " + ".join(policy.name for policy in listed), model=listed[0].model,
        tokenizer=listed[0].tokenizer, saes=tuple(_pins(listed).values()), plan=Plan(rules) if rules else None,
        refusals=tuple(dict.fromkeys(stop for policy in listed for stop in policy.refusals)),
        on_error="bypass" if all(policy.on_error == "bypass" for policy in listed) else "refuse",
        calibration=_calibration(listed), serial=max(p.serial for p in listed) if serial is None else serial,
    )  # fmt: skip


def _check_same(one: Policy, other: Policy) -> None:
    """Raise `PolicyMismatch` unless both were made for the same model, tokenizer and SAEs."""
    own = {pin.name: pin for pin in one.saes}
    differing = [
        f"their {what}s are not the same"
        for what, a, b in (
            ("model's weight", one.model.weights, other.model.weights),
            ("model's configuration", one.model.config, other.model.config),
            ("tokenizer", one.tokenizer, other.tokenizer),
        )
        if a != b
    ]
    differing += [f"SAE {pin.name} is another one" for pin in other.saes if not _agree(own.get(pin.name), pin)]
    if differing:
        raise PolicyMismatch(
            f"policies {one.name} and {other.name} as one", "; ".join(differing),
            "Fit both for one model, with one set of SAEs.",
        )  # fmt: skip


def _agree(own: SAEPin | None, pin: SAEPin) -> bool:
    return own is None or (own.fingerprint, own.site) == (pin.fingerprint, pin.site)


def _pins(policies: Sequence[Policy]) -> Mapping[str, SAEPin]:
    """The SAEs by name; where two policies have one from different sources, the first one's."""
    return {pin.name: pin for policy in reversed(policies) for pin in policy.saes}


def _rules(policies: Sequence[Policy]) -> tuple[Rule, ...]:
    """All rules; with priorities in the order of the policies where two of them share latents."""
    by_policy = [policy.plan.rules if policy.plan is not None else () for policy in policies]
    if not list(_shared(policies, by_policy)):
        return tuple(rule for rules in by_policy for rule in rules)
    own = [rule.priority or 0 for rules in by_policy for rule in rules]
    span = max(own) - min(own) + 1
    return tuple(
        rule if rule.is_dense else replace(rule, priority=(len(by_policy) - number) * span + (rule.priority or 0))
        for number, rules in enumerate(by_policy) for rule in rules
    )  # fmt: skip


def _shared(policies: Sequence[Policy], by_policy: Sequence[Sequence[Rule]]) -> Iterator[tuple[Rule, Rule]]:
    """Rules of different policies that set a latent to the same thing. Raises `OverlappingRules` for others."""
    pins = _pins(policies)
    for (one, mine), (other, theirs) in combinations(zip(policies, by_policy, strict=True), 2):
        for a, b in ((a, b) for a in mine for b in theirs if not (a.is_dense or b.is_dense)):
            common = sorted(set(a.latents) & set(b.latents)) if _place(a, pins) == _place(b, pins) else []
            if any(_of(a, latent) != _of(b, latent) for latent in common):
                raise OverlappingRules(
                    f"policies {one.name} and {other.name} as one",
                    f"both set latent {common[0]} of {a.sae}, to different things: {a.op} and {b.op}",
                    "Fit one of them with the other's op and amount, or with other latents.",
                )
            if common:
                yield a, b


def _place(rule: Rule, pins: Mapping[str, SAEPin]) -> tuple[Any, ...]:
    """What a rule reads and where, whatever the SAE is called."""
    pin = pins[rule.sae]
    return pin.fingerprint, rule.site or pin.site, rule.site_out


def _of(rule: Rule, latent: int) -> tuple[Any, ...]:
    """What the rule does to one of its latents: the numbers of its op, those of this latent where there are many."""
    at = rule.latents.index(latent)
    numbers = (getattr(rule.lowered, entry.name) for entry in fields(rule.lowered))
    return tuple(number[at] if isinstance(number, tuple) else number for number in numbers)


def _calibration(policies: Sequence[Policy]) -> dict[str, Any]:
    """What is known of each part, and which it was; parts that were joined before stand for themselves."""
    found: dict[str, Any] = {}
    parts: list[Any] = []
    for policy in policies:
        own = dict(policy.calibration)
        parts += own.pop(PARTS, ({"name": policy.name, "serial": policy.serial, "fingerprint": policy.fingerprint()},))
        for name, figures in (own if PARTS in policy.calibration else {policy.name: own}).items():
            if name in found or name == PARTS:
                raise BadPolicy(
                    f"policies that are joined, two called {name}", "their figures could not be told apart",
                    "Give each a name of its own.",
                )  # fmt: skip
            found[name] = figures
    return found | {PARTS: parts}
