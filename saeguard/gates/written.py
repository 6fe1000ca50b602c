"""Gates in a plan file: every part is an object with its kind and its fields, nested as the gate is."""

from dataclasses import MISSING, fields
from typing import Any

from saeguard.errors import BadPlanFile, BadRule, UnknownOp
from saeguard.gates import EVIDENCE, GATES, POOLS
from saeguard.gates.base import Gate
from saeguard.sites import Site

_NAMES: dict[str, Any] = GATES | EVIDENCE | POOLS
_ROLES = {"gate": GATES, "gates": GATES, "evidence": EVIDENCE, "pool": POOLS}
"""Fields that hold a part, and which parts they may hold."""
DEEPEST = 8
"""Gates inside of each other."""


def check_gate(gate: Any) -> None:
    """Raise `BadRule` unless ``gate``, and every gate inside, is of this package, and they nest ``DEEPEST`` deep."""
    level = [gate]
    for _ in range(DEEPEST):
        for one in level:
            if type(one) not in GATES.values():
                raise BadRule(f"a gate {one!r:.60}", "that is not a gate", f"Gates: {', '.join(GATES)}.")
        level = [inner for one in level for inner in (*getattr(one, "gates", ()), getattr(one, "gate", None))]
        level = [inner for inner in level if inner is not None]
        if not level:
            return
    raise BadRule("a gate of gates", f"they are more than {DEEPEST} deep", "And and Or take many gates at once.")


def gate_to_dict(gate: Any) -> dict[str, Any]:
    """The gate, or a part of one, for `gate_from_dict`."""
    kind = next(name for name, cls in _NAMES.items() if type(gate) is cls)
    return {"kind": kind} | {field.name: _written(getattr(gate, field.name)) for field in fields(gate)}


def _written(value: Any) -> Any:
    if type(value) in _NAMES.values():
        return gate_to_dict(value)
    if isinstance(value, Site):
        return str(value)
    if isinstance(value, tuple):
        is_table = {*map(type, value)} <= {int, float}
        return list(value) if is_table else [_written(one) for one in value]
    return value


def gate_from_dict(entry: Any) -> Gate:
    """Read what `gate_to_dict` wrote. Raises `BadPlanFile`, `UnknownOp` and what the gate raises."""
    return _read("gate", GATES, entry)


def _read(what: str, names: dict[str, Any], entry: Any) -> Any:
    kind = entry.get("kind") if isinstance(entry, dict) else entry
    if not isinstance(entry, dict) or not isinstance(kind, str) or kind not in names:
        raise UnknownOp(f"{what} {kind!r:.60}", "this version does not have it", f"Known: {', '.join(names)}.")
    cls = names[kind]
    known = {field.name: field for field in fields(cls)}
    given = {name: value for name, value in entry.items() if name != "kind"}
    unknown = sorted(set(given) - set(known))
    missing = sorted(name for name, field in known.items() if name not in given and field.default is MISSING)
    if unknown or missing:
        raise BadPlanFile(
            f"{what} {kind!r}", f"unknown keys {unknown}, missing keys {missing}", f"Keys: {sorted(known)}."
        )
    try:
        return cls(**{name: _value(name, value) for name, value in given.items()})
    except (TypeError, AttributeError) as error:
        raise BadPlanFile(f"{what} {kind!r}", str(error), "Write the plan with Plan.to_json.") from error


def _value(name: str, value: Any) -> Any:
    role = _ROLES.get(name)
    if name == "site" and isinstance(value, str):
        return Site.parse(value)
    if role is None:
        return tuple(value) if isinstance(value, list) else value
    if isinstance(value, list):
        return tuple(_read(name.rstrip("s"), role, one) for one in value)
    return _read(name, role, value)
