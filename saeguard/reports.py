"""What a run did, per rule: numbers for people and JSON for programs."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from saeguard.editor import BoundRule
from saeguard.gating import BoundGate
from saeguard.ledger import CallRecord, positions

LONGEST = 120
"""Characters of a gate that are shown."""


@dataclass(frozen=True)
class RuleReport:
    """One rule, over all calls of the run.

    ``tokens_seen`` are the real tokens of rows that have the rule, ``tokens_selected`` those that it is about,
    ``tokens_edited`` those where it changed an activation, or x for a dense op. ``mean_delta`` is the mean norm of its
    change of x over edited tokens, in the units of the stream; ``mean_share`` the mean ratio of that norm to the norm
    of x before. ``edited_positions[call][row]`` are absolute positions.
    """

    rule: str
    site: str
    tokens_seen: int
    tokens_selected: int
    tokens_edited: int
    mean_delta: float
    mean_share: float
    edited_positions: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class GateReport:
    """One gate, over all calls of the run: ``[call][row]``, with rows as the model saw them (each beam is one).

    ``first`` is the absolute position at which the gate first was open, None where it stayed closed; ``peak`` its
    largest score, None in a row without one.
    """

    gate: str
    first: tuple[tuple[int | None, ...], ...]
    peak: tuple[tuple[float | None, ...], ...]

    @property
    def fired(self) -> int:
        """Rows of all calls in which it was open at some token."""
        return sum(place is not None for call in self.first for place in call)


@dataclass(frozen=True)
class Report:
    """One entry per rule, in the order of the plans, and per gate; ``calls`` is the number of calls of the model."""

    rules: tuple[RuleReport, ...]
    calls: int
    gates: tuple[GateReport, ...] = ()

    def to_json(self) -> str:
        document = {"calls": self.calls, "rules": [asdict(rule) for rule in self.rules]}
        return json.dumps(document | {"gates": [asdict(gate) for gate in self.gates]}, indent=2)

    def __str__(self) -> str:
        lines = [f"{'seen':>7} {'selected':>8} {'edited':>7} {'|delta|':>9} {'of |x|':>7}  rule ({self.calls} calls)"]
        for r in self.rules:
            lines.append(
                f"{r.tokens_seen:7d} {r.tokens_selected:8d} {r.tokens_edited:7d} {r.mean_delta:9.3f} "
                f"{r.mean_share:7.1%}  {r.rule} @ {r.site}"
            )
        for gate in self.gates:
            rows = sum(len(call) for call in gate.first)
            lines.append(f"open in {gate.fired} of {rows} rows: {gate.gate}")
        return "\n".join(lines)


def report(rules: Sequence[BoundRule], calls: Sequence[CallRecord]) -> Report:
    """Sum up the ledger."""
    gates = dict.fromkeys(bound.gate for bound in rules if bound.gate is not None)
    return Report(
        tuple(_sum_up(number, bound, calls) for number, bound in enumerate(rules)), len(calls),
        tuple(_of_gate(gate, calls) for gate in gates),
    )  # fmt: skip


def _short(gate: BoundGate) -> str:
    """The gate in a line; weights are many numbers that nobody reads."""
    text = repr(gate.gate)
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def _of_gate(gate: BoundGate, calls: Sequence[CallRecord]) -> GateReport:
    first, peak = [], []
    for call in calls:
        trace = call.trace(gate)
        if trace is None:
            first.append(())
            peak.append(())
            continue
        first.append(tuple(None if place < 0 else place for place in trace.first.tolist()))
        peak.append(tuple(score if math.isfinite(score) else None for score in trace.peak.tolist()))
    return GateReport(_short(gate), tuple(first), tuple(peak))


def _sum_up(number: int, bound: BoundRule, calls: Sequence[CallRecord]) -> RuleReport:
    seen = selected = edited = 0
    delta = share = 0.0
    where = []
    for call in calls:
        table = call.table(bound.site)
        if table is None:
            where.append(())
            continue
        mine = table.edited[..., number]
        seen += int(table.covered[..., number].sum())
        selected += int(table.selected[..., number].sum())
        edited += int(mine.sum())
        norms = table.delta[..., number][mine].double()
        delta += float(norms.sum())
        share += float((norms / table.x_norm[mine].double()).sum())
        where.append(positions(mine, table.absolute, call.per_request))
    n = max(edited, 1)
    return RuleReport(str(bound.rule), str(bound.site), seen, selected, edited, delta / n, share / n, tuple(where))
