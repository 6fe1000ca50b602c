"""Records and logs for the tests of the audit log."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from saeguard.guarding.audit import AuditLog
from saeguard.guarding.chain import START, seal
from saeguard.guarding.keys import AuditKey
from saeguard.guarding.records import AuditRecord, Fired

KEY = AuditKey(b"the key of this test's deployment")
OTHER_KEY = AuditKey(b"somebody else's key, just as long")
TS = "2026-11-23T10:15:00.000001Z"


def record(number: int = 1, **changes: Any) -> AuditRecord:
    """A request as a guard would put it on record."""
    values: dict[str, Any] = {
        "request_id": f"r{number}",
        "decision": "steer",
        "reason_code": "gate.fired",
        "guard_status": "ran",
        "tenant": KEY.of_text("a tenant", purpose="tenant"),
        "policy_fp": "sha256:" + "a1" * 32,
        "model_fp": "b2" * 32,
        "sae_fp": "c3" * 32,
        "fired": {"resid_post.12": Fired(rows=1, tokens=number, expected=number)},
        "gates": {"logistic": 0.25},
        "prompt_hmac": KEY.of_tokens([number, 2, 3]),
        "prompt_tokens": 31,
        "gen_tokens": 64,
        "max_delta_ratio": 0.5,
        "latency_ms": {"guard": 3.0, "total": 812.5},
    }
    return AuditRecord(**(values | changes))


def short_record(number: int) -> AuditRecord:
    """A request that ended early."""
    fired = {"resid_post.12": Fired(rows=1, tokens=0, expected=number)}
    return AuditRecord(
        request_id=f"r{number}", decision="refuse", reason_code="gate.fired", guard_status="partial", fired=fired,
        gates={"logistic": 0.25},
    )  # fmt: skip


def chain(
    n: int, key: AuditKey | None = KEY, *, first: int = 1, make: Callable[[int], AuditRecord] = record
) -> list[bytes]:
    """The lines of a log of ``n`` records, without a file."""
    lines, head = [], START
    for number in range(first, first + n):
        line, head = seal(make(number), head, ts=TS, key=key)
        lines.append(line)
    return lines


def written(path: Path, n: int, key: AuditKey | None = KEY, **options: Any) -> AuditLog:
    """A log of ``n`` records at ``path``."""
    log = AuditLog(path, key=key, **({"fsync": False} | options))
    for number in range(1, n + 1):
        log.write(record(number))
    return log


CODES = st.text("abcXYZ019._:-", min_size=1, max_size=128)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(0, (1 << 53) - 1)
SITES = st.builds(lambda rows, n: Fired(rows=rows, tokens=n, expected=n), COUNTS, COUNTS)


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


RECORDS = st.builds(
    AuditRecord,
    request_id=CODES,
    decision=st.sampled_from(["allow", "steer", "refuse", "error"]),
    reason_code=CODES.map(lambda code: f"bypass.{code}"[:128]),
    guard_status=st.sampled_from(["ran", "partial", "not_run"]),
    tenant=maybe(CODES),
    policy_fp=maybe(CODES),
    model_fp=maybe(CODES),
    sae_fp=maybe(CODES),
    fired=st.dictionaries(CODES, SITES, max_size=4),
    gates=st.dictionaries(CODES, NUMBERS, max_size=4),
    prompt_hmac=maybe(st.text("0123456789abcdef", min_size=64, max_size=64)),
    prompt_tokens=COUNTS,
    gen_tokens=COUNTS,
    max_delta_ratio=maybe(NUMBERS),
    latency_ms=st.dictionaries(CODES, NUMBERS, max_size=4),
    err=CODES,
    lost_bytes=COUNTS,
)
"""Records of every kind: all have an err and a bypass, so that no decision contradicts them."""
