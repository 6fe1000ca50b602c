"""From what was recorded of a call to one decision per row: refused, steered or allowed, with the gates' scores."""

import math
from collections.abc import Sequence

from saeguard.engines.base import Request
from saeguard.errors import GuardNotApplied
from saeguard.gating import BoundGate, Trace
from saeguard.guarding.attached import Attached, Ended, Table
from saeguard.guarding.outcome import Decision, Opened, fired_at


def decide(attached: Attached, names: Sequence[str], table: Table, request: Request) -> tuple[Decision, ...]:
    """One per row of the request. The first of a policy's stops that opened is the reason of a refusal."""
    return tuple(_of_row(attached, names[owner], table, request, row, owner) for row, owner in enumerate(table.owners))


def opened(attached: Attached, table: Table) -> tuple[Opened, ...]:
    """One per row of passes that were called one by one, without a request."""

    def is_open(row: int, gate: BoundGate | None) -> bool:
        traces = [call.trace(gate) for call in table.calls] if gate is not None else []
        return gate is None or any(bool(trace.fired[row]) for trace in traces if trace is not None)

    return tuple(
        Opened(
            gate=any(is_open(row, rule.gate) for rule in attached.rules if owner in (rule.plans or ())),
            stop=any(is_open(row, gate) for _, gate in attached.stops(owner)),
        )
        for row, owner in enumerate(table.owners)
    )


def _of_row(attached: Attached, name: str, table: Table, request: Request, row: int, owner: int) -> Decision:
    rows = slice(row * request.copies, (row + 1) * request.copies)
    fired, largest = fired_at(attached.rules, owner, rows, table.calls)
    scores = _scores(attached, table, rows, owner)
    for stop, bound in attached.stops(owner):
        for trace in _traces(table, bound):
            if bool(trace.fired[rows].any()):
                at = int(trace.first[rows][trace.fired[rows]].min())
                return Decision("refuse", stop.reason, name, scores, fired, largest, at)
    if (end := _ended(table, request, row, rows)) is not None:
        return Decision("refuse", end.reason, name, scores, fired, largest, end.at)
    if any(counts.rows for counts in fired.values()):
        return Decision("steer", "edited", name, scores, fired, largest)
    return Decision("allow", "quiet" if attached.policies[owner] is not None else "open", name, scores, fired, largest)


def _ended(table: Table, request: Request, row: int, rows: slice) -> Ended | None:
    """How a stop ended the row, though nothing that is left of it opened the gate: a beam that was given up did.

    What was ended for a draft that was thrown away does not count.
    """
    end = table.ended.get(row)
    ends = [int(call.ends[rows].max()) for call in table.calls if call.ends is not None]
    return end if end is not None and (request.reorders or end.column < max(ends)) else None


def _scores(attached: Attached, table: Table, rows: slice, owner: int) -> dict[str, float]:
    """The peak of each gate of the policy."""
    gates = dict.fromkeys(
        bound.gate for bound in attached.rules
        if bound.gate is not None and bound.plans is not None and owner in bound.plans
    )  # fmt: skip
    found = {}
    for number, gate in enumerate(gates):
        peak = max(float(trace.peak[rows].max()) for trace in _traces(table, gate))
        if math.isfinite(peak):
            found[f"gate.{number}"] = peak
    return found


def _traces(table: Table, gate: BoundGate) -> list[Trace]:
    """What a gate said in the call. Raises `GuardNotApplied` where it said nothing."""
    found = [call.trace(gate) for call in table.calls]
    traces = [trace for trace in found if trace is not None]
    if not traces or len(traces) < len(found):
        raise GuardNotApplied(
            f"{type(gate.gate).__name__} of a policy", "there is no record of what it said in this call",
            "The answer must not be used.",
        )  # fmt: skip
    return traces
