"""Plans: what to do, as data that can be written down, compared, signed and sent.

A `Rule` names latents of an SAE, an op, and which tokens it is about; a `Plan` is a tuple of rules. All rules of a
plan are joint: every activation is read from the same x, and the order of declaration never matters. An op is one line
of the table in `saeguard.ops`, or one of `saeguard.dense`, which change x as a whole.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import KW_ONLY, asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

from saeguard import strict_json
from saeguard.dense import DENSE_OPS, AnyDense, Misdirect, Project, Reweight, Splice
from saeguard.errors import BadPlanFile, BadRule, EmptyPlan, OverlappingRules, UnknownOp, UnknownSchema
from saeguard.gates.base import Gate
from saeguard.gates.written import check_gate, gate_from_dict, gate_to_dict
from saeguard.ops import OPS, AnyOp, Lowered
from saeguard.sites import Site
from saeguard.tokens import Phase, Where
from saeguard.triggers import TRIGGERS, AnyActive, as_latents

SCHEMA = 1
MAX_BYTES = 16_000_000
MAX_DEPTH = 24
_ALL_OPS = OPS | DENSE_OPS
_WHOLE = (Splice, Misdirect, Project)
"""Ops of which a stream can be under one only: what each makes of x is no longer so when another is added."""


@dataclass(frozen=True)
class Rule:
    """One op on some latents of one SAE.

    ``sae`` is the SAE's name, or a source that `load_sae` reads. ``site`` is where it reads and ``site_out`` where it
    writes; both default to the SAE's own, and only a transcoder's differ. ``phase``, ``first``, ``start``, ``stop``
    and ``special`` are those of `saeguard.tokens.Where`. ``priority`` settles two rules that set the same latent of
    the same row: where both apply the higher one acts; without it they are refused. An empty tuple of latents
    changes nothing, but for the dense ops, which have no priority. Raises `BadRule`.
    """

    sae: str
    latents: tuple[int, ...]
    op: AnyOp | AnyDense
    _: KW_ONLY
    site: Site | None = None
    site_out: Site | None = None
    trigger: AnyActive | None = None
    gate: Gate | None = None
    phase: Phase = "all"
    first: int | None = None
    start: int = 0
    stop: int | None = None
    special: bool = False
    priority: int | None = None

    def __post_init__(self):
        if not isinstance(self.sae, str) or not self.sae:
            raise BadRule(f"rule with sae={self.sae!r}", "a rule names its SAE by a string", "Use sae.name.")
        object.__setattr__(self, "latents", as_latents("rule", self.latents))
        for name in ("site", "site_out"):
            site = getattr(self, name)
            if isinstance(site, str):
                object.__setattr__(self, name, Site.parse(site))
            elif site is not None and not isinstance(site, Site):
                raise BadRule(f"rule with {name}={site!r}", "that is not a site", "Use Site('resid_post', 12).")
        if self.trigger is not None and type(self.trigger) not in TRIGGERS.values():
            raise BadRule(f"rule with trigger={self.trigger!r}", "that is not a trigger", "Use AnyActive(latents).")
        if self.gate is not None:
            check_gate(self.gate)
        if type(self.op) not in _ALL_OPS.values():
            raise BadRule(f"rule with op={self.op!r}", "that is not an op", f"Ops: {', '.join(_ALL_OPS)}.")
        if self.priority is not None and (isinstance(self.priority, bool) or not isinstance(self.priority, int)):
            raise BadRule(f"priority {self.priority!r}", "that is not an integer", "Give an int, or None.")
        self._check_amounts()
        object.__setattr__(self, "_where", Where(self.phase, self.first, self.start, self.stop, self.special))

    @property
    def where(self) -> Where:
        """The tokens that the rule is about."""
        return self._where  # type: ignore[attr-defined]

    @property
    def is_dense(self) -> bool:
        """Whether the op changes x as a whole, rather than some activations."""
        return isinstance(self.op, AnyDense)

    @property
    def needs_all(self) -> bool:
        """Whether the op needs all latents of the SAE."""
        return isinstance(self.op, AnyDense) and self.op.needs_all

    @property
    def lowered(self) -> Lowered:
        """The op as numbers. Raises `BadRule` for a dense op, which is no line of the table."""
        if isinstance(self.op, AnyDense):
            raise BadRule(f"the numbers of {self.op}", "it is a dense op", "Lay it out with saeguard.kernels.")
        return self.op.lower()

    def _check_amounts(self) -> None:
        if isinstance(self.op, AnyDense):
            self.op.check(self.latents)
            if self.priority is not None:
                raise BadRule(
                    f"{self.op} with priority {self.priority}",
                    "a dense op changes all of the stream, and none can yield",
                    "Leave the priority out.",
                )
            return
        lowered = self.lowered
        for amount in (lowered.scale, lowered.shift, lowered.floor, lowered.lo, lowered.hi):
            if isinstance(amount, tuple) and len(amount) != len(self.latents):
                raise BadRule(
                    f"one amount per latent for {len(self.latents)} latents",
                    f"{len(amount)} amounts were given",
                    "Give as many, in the order of latents, or one number for all.",
                )

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.latents[:6])) + (", ..." if len(self.latents) > 6 else "")
        site = f" at {self.site}" if self.site else ""
        site += f" to {self.site_out}" if self.site_out else ""
        latents = "" if isinstance(self.op, Splice | Misdirect) else f"[{shown}]"
        op = re.sub(r"(\([-+.\de]+, [-+.\de]+), [-+.\de, ]+\)", r"\1, ...)", str(self.op))  # one amount per latent
        return f"{op} on {self.sae}{latents}{site}"


@dataclass(frozen=True)
class Plan:
    """One or more rules; ``name`` is for people. Raises `EmptyPlan`, `OverlappingRules`."""

    rules: tuple[Rule, ...]
    name: str = ""

    def __post_init__(self):
        rules = (self.rules,) if isinstance(self.rules, Rule) else tuple(self.rules)
        object.__setattr__(self, "rules", rules)
        if not rules:
            raise EmptyPlan("a plan", "it has no rules", "Leave a row alone with None in the list of plans.")
        for rule in rules:
            if not isinstance(rule, Rule):
                raise BadRule("a plan", f"{rule!r} is not a Rule", "Give Rule objects.")
        check_overlaps((rule, (rule.sae, rule.site, rule.site_out)) for rule in rules)

    def to_json(self) -> str:
        """The canonical text: keys sorted, no spaces, ASCII; equal plans give equal texts."""
        rules = [_rule_to_dict(rule) for rule in self.rules]
        document = {"saeguard": "plan", "schema": SCHEMA, "name": self.name, "rules": rules}
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Plan":
        """Read what `to_json` wrote. Raises `BadPlanFile`, `UnknownSchema`, `UnknownOp` and what `Rule` raises."""
        document = parse_json(text)
        if not isinstance(document, dict) or document.get("saeguard") != "plan":
            raise BadPlanFile("a plan file", 'the key "saeguard": "plan" is missing', "Write it with Plan.to_json.")
        schema = document.get("schema")
        if schema != SCHEMA or type(schema) is not int:  # True and 1.0 equal 1
            raise UnknownSchema(
                f"a plan of schema {schema!r}",
                f"this version of saeguard reads schema {SCHEMA}",
                "Update saeguard, or write the plan again with this version.",
            )
        _check_keys("plan", document, {"saeguard", "schema", "name", "rules"}, {"rules"})
        if not isinstance(document["rules"], list) or not isinstance(document.get("name", ""), str):
            raise BadPlanFile("a plan file", "rules is not a list, or name not a string", "Write it with to_json.")
        return cls(tuple(_rule_from_dict(entry) for entry in document["rules"]), document.get("name", ""))

    def save(self, path: str | Path) -> None:
        """Write the canonical text to a file."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a file that `save` wrote; at most ``MAX_BYTES`` are read."""
        with Path(path).open("rb") as file:
            return cls.from_json(file.read(MAX_BYTES + 1))

    def fingerprint(self) -> str:
        """SHA-256 of what the plan does: its canonical text with rules sorted and the name left out."""
        rules = sorted(json.dumps(_rule_to_dict(rule), sort_keys=True) for rule in self.rules)
        return hashlib.sha256(json.dumps([SCHEMA, rules]).encode()).hexdigest()


def check_overlaps(rules: Iterable[tuple[Rule, tuple[Any, ...]]]) -> None:
    """Raise `OverlappingRules` if two rules set one latent and no priority settles it, or dense ops contradict rules.

    Each rule comes with its place: what identifies its SAE and sites, of which the last entry is the site that it
    writes, or None where that is not settled yet. The rules are those of one row.
    """
    listed = list(rules)
    for (a, here), (b, there) in combinations(listed, 2) if any(rule.is_dense for rule, _ in listed) else ():
        one_site = here == there or here[-1] is not None and here[-1] == there[-1]
        check_dense(a, b, one_place=here == there, one_site=one_site)
    owners: dict[Any, dict[int, list[Rule]]] = {}
    for rule, place in listed:
        for latent in () if rule.needs_all else rule.latents:
            others = owners.setdefault(place, {}).setdefault(latent, [])
            for other in others:
                if other.priority is None or rule.priority is None or other.priority == rule.priority:
                    raise OverlappingRules(
                        f"latent {latent} of {rule.sae} set by two rules of one row, {other.op} and {rule.op}",
                        "nothing says which of them acts",
                        "Keep one of them."
                        if rule.is_dense or other.is_dense
                        else "Merge them, or give both rules different priorities.",
                    )
            others.append(rule)


def check_dense(a: Rule, b: Rule, *, one_place: bool, one_site: bool) -> None:
    """Raise `OverlappingRules` if two rules of one row cannot stand beside each other because of a dense op.

    ``one_site`` says that they write one site, ``one_place`` that they have one SAE there too.
    """
    if isinstance(a.op, _WHOLE) and isinstance(b.op, _WHOLE) and one_site:
        raise OverlappingRules(
            f"{a} and {b} in one row",
            "the stream cannot become two reconstructions, and leaving out two errors is no sum"
            if {type(a.op), type(b.op)} == {Splice}
            else "each says what becomes of the whole stream, and the sum of both is neither",
            "Keep one of them; other ops can stand beside it.",
        )
    kinds = {type(a.op), type(b.op)}
    both_set = all(rule.needs_all or rule.latents for rule in (a, b))
    if Reweight in kinds and Splice not in kinds and one_place and both_set:
        raise OverlappingRules(
            f"{a} and {b} in one row",
            "Reweight sets every latent of its SAE, and priorities do not settle that",
            "Keep one of them, or put them into plans of different rows.",
        )


def parse_json(text: str | bytes) -> Any:
    """JSON with limits: at most ``MAX_BYTES``, ``MAX_DEPTH`` levels, no NaN, no key twice. Raises `BadPlanFile`."""
    if len(text) > MAX_BYTES:
        raise BadPlanFile("a plan file", f"it is larger than {MAX_BYTES} bytes", "Split the plan.")
    try:
        document = strict_json.parse(text)
    except ValueError as error:
        raise BadPlanFile("a plan file", f"it is not JSON ({error})", "Write it with Plan.to_json.") from error
    if strict_json.depth(document) > MAX_DEPTH:
        raise BadPlanFile("a plan file", f"it nests deeper than {MAX_DEPTH} levels", "Write it with Plan.to_json.")
    return document


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
    entry: dict[str, Any] = {f.name: getattr(rule, f.name) for f in fields(rule)}
    entry["site"] = str(rule.site) if rule.site else None
    entry["site_out"] = str(rule.site_out) if rule.site_out else None
    if rule.site_out is None:  # most rules have none, and files of before transcoders stay canonical
        del entry["site_out"]
    if rule.gate is None:  # likewise those of before gates
        del entry["gate"]
    else:
        entry["gate"] = gate_to_dict(rule.gate)
    entry["op"] = _tagged(_ALL_OPS, rule.op)
    entry["trigger"] = _tagged(TRIGGERS, rule.trigger) if rule.trigger else None
    return entry


def _tagged(names: dict[str, Any], thing: Any) -> dict[str, Any]:
    kind = next(name for name, cls in names.items() if type(thing) is cls)
    return {"kind": kind} | asdict(thing)


def _rule_from_dict(entry: Any) -> Rule:
    _check_keys("rule", entry, {f.name for f in fields(Rule)}, {"sae", "latents", "op"})
    values = dict(entry)
    if not isinstance(values["latents"], list):
        raise BadPlanFile("a rule", "latents is not a list", "Write the plan with Plan.to_json.")
    values["latents"] = tuple(values["latents"])
    for name in ("site", "site_out"):
        if values.get(name) is not None:
            values[name] = Site.parse(str(values[name]))
    values["op"] = _untagged("op", _ALL_OPS, values["op"])
    if values.get("trigger") is not None:
        values["trigger"] = _untagged("trigger", TRIGGERS, values["trigger"])
    if values.get("gate") is not None:
        values["gate"] = gate_from_dict(values["gate"])
    try:
        return Rule(**values)
    except TypeError as error:
        raise BadPlanFile("a rule", str(error), "Write the plan with Plan.to_json.") from error


def _untagged(what: str, names: dict[str, Any], entry: Any) -> Any:
    kind = entry.get("kind") if isinstance(entry, dict) else entry
    if not isinstance(entry, dict) or not isinstance(kind, str) or kind not in names:
        raise UnknownOp(f"{what} {kind!r}", "this version does not have it", f"Known: {', '.join(names)}.")
    cls = names[kind]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items() if key != "kind"}
    allowed = {f.name for f in fields(cls)}
    _check_keys(what, values, allowed, set())
    try:
        return cls(**values)
    except TypeError as error:
        raise BadPlanFile(f"{what} {kind!r}", str(error), "Write the plan with Plan.to_json.") from error


def _check_keys(what: str, entry: Any, allowed: set[str], required: set[str]) -> None:
    if not isinstance(entry, dict):
        raise BadPlanFile(f"a {what}", "it is not a JSON object", "Write the plan with Plan.to_json.")
    unknown, missing = sorted(set(entry) - allowed), sorted(required - set(entry))
    if unknown or missing:
        raise BadPlanFile(f"a {what}", f"unknown keys {unknown}, missing keys {missing}", f"Keys: {sorted(allowed)}.")
