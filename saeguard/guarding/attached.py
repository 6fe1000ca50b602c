"""Policies as one participant of a session: each call says which policy every row is under, and no call goes without.

Hooks are placed once. A call fills this thread's row table and empties it again; a pass that finds no table is refused,
so `model.generate` called around the guardrail emits nothing. Stops are rules that change nothing and have a gate.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from saeguard.engines.base import Request
from saeguard.errors import RowsMismatch, UnguardedCall
from saeguard.gating import BoundGate
from saeguard.guarding.policy import Policy
from saeguard.guarding.stops import Halt, Refuse
from saeguard.ledger import CallRecord
from saeguard.ops import Ablate
from saeguard.plans import Plan, Rule
from saeguard.steering import Ready, Run

Stop = Refuse | Halt


@dataclass(eq=False)
class Table:
    """The call that this thread makes: the number of each row's policy, and what is recorded of it."""

    owners: tuple[int, ...]
    prompt_tokens: int | tuple[int, ...] | None
    calls: list[CallRecord] = field(default_factory=list)
    looked: int = 0
    """The column up to which the stops were asked."""


class Attached(Run):
    """What is applied to a guarded model; ``policies`` by number, None for rows that are let through as they are."""

    def __init__(self, policies: Sequence[Policy | None], ready: Ready):
        self._now = threading.local()
        super().__init__([plan_of(policy) for policy in policies], ready, every_row=False, prompt_tokens=None)
        self.policies = tuple(policies)
        self._stops = [self._bound(stops_of(policy)) for policy in policies]

    @property
    def prompt_tokens(self) -> int | tuple[int, ...] | None:
        """What the running call says of its prompts."""
        table = self.table
        return None if table is None else table.prompt_tokens

    @prompt_tokens.setter
    def prompt_tokens(self, value: int | tuple[int, ...] | None) -> None:
        assert value is None

    @property
    def table(self) -> Table | None:
        """The call that this thread makes, if it makes one."""
        return getattr(self._now, "table", None)

    @contextmanager
    def rows(self, owners: Sequence[int], prompt_tokens: int | tuple[int, ...] | None = None) -> Iterator[Table]:
        """Passes of this thread, inside the block, are of these rows."""
        before, self._now.table = self.table, Table(tuple(owners), prompt_tokens)
        try:
            yield self._now.table
        finally:
            self._now.table = before

    def cover(self, rows: int, request: Request | None) -> Bool[Tensor, "batch rules"]:
        """Which rules each forward row is under. Raises `UnguardedCall`, `RowsMismatch`."""
        if (table := self.table) is None:
            raise UnguardedCall(
                "a call of a guarded model", "nothing says which policy its rows are under",
                "Call guard.generate(...), or model(...) inside `with guard.rows(...)`.",
            )  # fmt: skip
        copies = request.copies if request is not None else 1
        if rows != len(table.owners) * copies:
            raise RowsMismatch(
                f"policies for {len(table.owners)} rows", f"the batch has {rows} rows of {copies} each",
                "Name one policy per row of the batch, or one for all.",
            )  # fmt: skip
        owner = torch.tensor(table.owners).repeat_interleave(copies)
        columns = [torch.isin(owner, torch.tensor(sorted(bound.plans or ()))) for bound in self.rules]
        return torch.stack(columns, 1) if columns else torch.zeros(rows, 0, dtype=torch.bool)

    def open_record(self, request: Request | None) -> CallRecord:
        """A fresh record, which lives as long as the call."""
        record = CallRecord(request.copies if request is not None and request.reorders else 1)
        table = self.table
        if table is not None:
            table.calls.append(record)
        return record

    def stops(self, number: int) -> Sequence[tuple[Stop, BoundGate]]:
        """The stops of a policy, and their gates as they stand on the model."""
        return self._stops[number]

    def stopped(self, copies: int) -> Bool[Tensor, " batch"]:
        """Forward rows that a stop ended since this was asked last; where one of several copies is, all are."""
        table = self.table
        assert table is not None
        memory, end = table.calls[-1].memory, table.looked
        found = torch.zeros(len(table.owners), copies, dtype=torch.bool)
        for row, owner in enumerate(table.owners):
            for _, bound in self._stops[owner]:
                for step in reversed(memory.histories[bound].steps):
                    if step.tokens.column < table.looked:
                        break
                    own = slice(row * copies, (row + 1) * copies)
                    found[row] |= (step.verdict.opened[own] & step.tokens.real[own]).any()
                    end = max(end, step.end)
        table.looked = end
        return found.flatten()

    def _bound(self, stops: Sequence[Stop]) -> list[tuple[Stop, BoundGate]]:
        gates: Mapping[Rule, BoundGate | None] = {bound.rule: bound.gate for bound in self.rules}
        return [(stop, gate) for stop in stops if (gate := gates[rule_of(stop)]) is not None]


def rule_of(stop: Stop) -> Rule:
    """A rule that changes nothing, and that the stop's gate can be read from."""
    return Rule(stop.sae, (), Ablate(), site=stop.site, gate=stop.gate)


def stops_of(policy: Policy | None) -> tuple[Stop, ...]:
    """The stops of a policy, in its order."""
    return () if policy is None else tuple(policy.refusals)


def plan_of(policy: Policy | None) -> Plan | None:
    """The edits and the stops of a policy as one plan; None where it has neither."""
    if policy is None:
        return None
    rules = (policy.plan.rules if policy.plan is not None else ()) + tuple(map(rule_of, stops_of(policy)))
    return Plan(tuple(dict.fromkeys(rules))) if rules else None
