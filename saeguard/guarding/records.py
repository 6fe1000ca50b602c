"""One request as the audit log keeps it: what was decided, whether the guard ran, numbers and hashes, never text.

`decision` says what became of the request, `guard_status` whether the guard looked at it: two fields, since a guard
that could not look has allowed nothing. They may not contradict each other:

    allow, steer    need guard_status "ran" and no err, or a reason_code that begins with "bypass."
    error           needs the class name of what was raised
    ran             needs every site to have edited as many tokens as it had to

No field can hold a prompt, an output or a message: strings are codes of letters, digits and . _ : - only.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, get_args

from saeguard.errors import BadRecord

Decision = Literal["allow", "steer", "refuse", "error"]
GuardStatus = Literal["ran", "partial", "not_run"]

CODE = re.compile(r"[A-Za-z0-9._:-]{1,128}")
DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_NAMES = 64
"""Sites, gates or latencies of one record: together with the length of a code, what bounds a line."""
MAX_COUNT = 1 << 53
BYPASS = "bypass."


@dataclass(frozen=True)
class Fired:
    """What one site did: rows whose gate fired, tokens that were edited, tokens that had to be."""

    rows: int
    tokens: int
    expected: int

    def __post_init__(self) -> None:
        for entry in fields(self):
            _check_count(f"fired {entry.name}", getattr(self, entry.name))


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """What is known of one request when it ends. Raises `BadRecord`, whose text never repeats what it refuses.

    Fingerprints are those of the policy, the model and the SAE, None where the request did not get so far. `gates`
    has a score per gate, `latency_ms` milliseconds per stage. `prompt_hmac` is `AuditKey.of_tokens`, `tenant` and
    `request_id` are codes: hash what a client sent with `AuditKey.of_text`. `lost_bytes` counts what an unfinished
    line of a writer that died left behind, in the record "log.recovered" which takes that line's place.
    """

    request_id: str
    decision: Decision
    reason_code: str
    guard_status: GuardStatus
    tenant: str | None = None
    policy_fp: str | None = None
    model_fp: str | None = None
    sae_fp: str | None = None
    fired: Mapping[str, Fired] = field(default_factory=dict)
    gates: Mapping[str, float] = field(default_factory=dict)
    prompt_hmac: str | None = None
    prompt_tokens: int = 0
    gen_tokens: int = 0
    max_delta_ratio: float | None = None
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    err: str | None = None
    lost_bytes: int = 0

    def __post_init__(self) -> None:
        for name in ("request_id", "reason_code"):
            _check_code(name, getattr(self, name))
        for name in ("tenant", "policy_fp", "model_fp", "sae_fp", "err"):
            if getattr(self, name) is not None:
                _check_code(name, getattr(self, name))
        if self.prompt_hmac is not None and not _matches(DIGEST, self.prompt_hmac):
            raise _bad("prompt_hmac", "it is not 64 hexadecimal digits", "Make it with AuditKey.of_tokens.")
        _check_choice("decision", self.decision, get_args(Decision))
        _check_choice("guard_status", self.guard_status, get_args(GuardStatus))
        for name in ("prompt_tokens", "gen_tokens", "lost_bytes"):
            _check_count(name, getattr(self, name))
        for name in ("gates", "latency_ms"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        if self.max_delta_ratio is not None:
            object.__setattr__(self, "max_delta_ratio", _number("max_delta_ratio", self.max_delta_ratio))
        object.__setattr__(self, "fired", _fired(self.fired))
        _check_sense(self)

    @property
    def passed(self) -> bool:
        """Whether the model's output went out, changed or not."""
        return self.decision in ("allow", "steer")

    @property
    def bypassed(self) -> bool:
        """Whether it went out because somebody chose that a guard which fails lets requests by."""
        return self.passed and self.reason_code.startswith(BYPASS)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        fired = {site: asdict(counts) for site, counts in self.fired.items()}
        return values | {"fired": fired, "gates": dict(self.gates), "latency_ms": dict(self.latency_ms)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AuditRecord":
        """The record that `to_dict` was given. Raises `BadRecord` for any other mapping."""
        names = {entry.name for entry in fields(cls)}
        if set(values) != names:
            found = f"{len(set(values) - names)} unknown fields, {len(names - set(values))} missing"
            raise _bad("its fields", found, f"The fields are {', '.join(sorted(names))}.")
        sites = values["fired"]
        if not isinstance(sites, dict) or not all(
            isinstance(counts, dict) and set(counts) == {"rows", "tokens", "expected"} for counts in sites.values()
        ):
            raise _bad("fired", "it has not rows, tokens and expected per site", "Write it with AuditLog.")
        try:
            return cls(**{**values, "fired": {site: Fired(**counts) for site, counts in sites.items()}})
        except TypeError as error:
            raise _bad("its fields", "one is of another type", "Write it with AuditLog.") from error


def class_name(error: BaseException) -> str:
    """What a record says of an exception: its class, never its message, which may quote a prompt."""
    name = type(error).__name__
    return name if _matches(CODE, name) else "UnnamedError"


def _check_sense(record: AuditRecord) -> None:
    """Refuse a record whose decision, status and counts contradict each other."""
    guarded = record.guard_status == "ran" and record.err is None
    if record.passed and not guarded and not record.bypassed:
        raise _bad(
            f"the decision {record.decision}",
            f"guard_status is {record.guard_status} and err is {'null' if record.err is None else 'not null'}",
            f'Refuse the request, or say in reason_code that it went by the guard: "{BYPASS}" and why.',
        )
    if record.decision == "error" and record.err is None:
        raise _bad("the decision error", "err is null", "Give the class name of what was raised.")
    short = [site for site, counts in record.fired.items() if counts.tokens != counts.expected]
    if record.guard_status == "ran" and short:
        counts = record.fired[short[0]]
        found = f"{short[0]} edited {counts.tokens} tokens, {counts.expected} were expected"
        raise _bad('guard_status "ran"', found, 'Write guard_status "partial".')


def _check_code(name: str, value: Any) -> None:
    if not _matches(CODE, value):
        raise _bad(name, "it is not 1 to 128 letters, digits and . _ : -", "Give a code, or AuditKey.of_text of it.")


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise _bad(name, f"it is none of {', '.join(known)}", "Give one of these.")


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < MAX_COUNT:
        raise _bad(name, "it is not a whole number from 0 to 2^53", "Give a count.")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise _bad(name, "it is not a finite number", "Give a float; a score that is NaN is an error of the guard.")
    return float(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _numbers(name: str, values: Any) -> Mapping[str, float]:
    _check_names(name, values)
    return MappingProxyType({key: _number(f"a value of {name}", value) for key, value in values.items()})


def _fired(values: Any) -> Mapping[str, Fired]:
    _check_names("fired", values)
    if not all(isinstance(counts, Fired) for counts in values.values()):
        raise _bad("fired", "a site's value is not Fired", "Give Fired(rows=, tokens=, expected=) per site.")
    return MappingProxyType(dict(values))


def _check_names(name: str, values: Any) -> None:
    if not isinstance(values, Mapping) or len(values) > MAX_NAMES:
        raise _bad(name, f"it is not a mapping of at most {MAX_NAMES} names", "Give one value per name.")
    for key in values:
        _check_code(f"a name in {name}", key)


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _bad(what: str, found: str, proceed: str) -> BadRecord:
    return BadRecord(f"{what} of an audit record", found, proceed)
