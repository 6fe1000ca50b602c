"""Policies as one participant of a session: each call says which policy every row is under, and no call goes without.

Hooks are placed once. A call fills the row table of its thread or task and empties it again; a pass that finds none is
refused, so `model.generate` called around the guardrail emits nothing. Stops are rules that change nothing and have a
gate.
"""

import contextvars
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
from jaxtyping import Bool
from torch import Tensor

from saeguard.axes import Stream
from saeguard.editor import Edit
from saeguard.engines.base import Request
from saeguard.engines.calls import View
from saeguard.errors import GuardNotApplied, RowsMismatch, UnguardedCall, UnsupportedMode
from saeguard.gating import BoundGate, History
from saeguard.guarding.policy import Policy
from saeguard.guarding.stops import Halt, Refuse
from saeguard.ledger import CallRecord
from saeguard.ops import Ablate
from saeguard.plans import Plan, Rule
from saeguard.sites import Site
from saeguard.steering import Ready, Run

Stop = Refuse | Halt


@dataclass(frozen=True)
class Ended:
    """A row that a stop ended: why, and the column and the absolute position at which its gate was open first."""

    reason: str
    column: int
    at: int


@dataclass(frozen=True)
class Lent:
    """That others call the model: whether with batches of any size under one policy, and whether its stops may open."""

    any_rows: bool
    measuring: bool


@dataclass(eq=False)
class Table:
    """The call that runs now: the number of each row's policy, and what is recorded of it."""

    of: "Attached"
    owners: tuple[int, ...]
    prompt_tokens: int | tuple[int, ...] | None
    is_request: bool
    """Whether it is one generate call, rather than passes one by one."""
    lent: Lent | None = None
    calls: list[CallRecord] = field(default_factory=list)
    ended: dict[int, Ended] = field(default_factory=dict)
    looked: int = 0
    """The column up to which the stops were asked."""
    is_over: bool = False
    """For whoever has a copy of the context: a thread or task that was started inside and lives on."""


_TABLES: contextvars.ContextVar[tuple[Table, ...]] = contextvars.ContextVar("saeguard_tables", default=())
"""Of the calls that the caller is inside of, innermost last. Not of the thread: tasks take turns in one."""


class Attached(Run):
    """What is applied to a guarded model; ``policies`` by number, None for rows that are let through as they are."""

    def __init__(self, policies: Sequence[Policy | None], ready: Ready):
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
        """The call that the caller makes, if it makes one."""
        mine = (table for table in reversed(_TABLES.get()) if table.of is self and not table.is_over)
        return next(mine, None)

    @contextmanager
    def rows(
        self, owners: Sequence[int], prompt_tokens: int | tuple[int, ...] | None = None, *, is_request: bool = False,
        lent: Lent | None = None,
    ) -> Iterator[Table]:  # fmt: skip
        """Passes of this thread or task, inside the block, are of these rows."""
        mine = Table(self, tuple(owners), prompt_tokens, is_request, lent)
        _TABLES.set((*_TABLES.get(), mine))
        try:
            yield mine
        finally:
            mine.is_over = True
            _TABLES.set(tuple(table for table in _TABLES.get() if table is not mine))

    def cover(self, rows: int, request: Request | None) -> Bool[Tensor, "batch rules"]:
        """Which rules each forward row is under. Raises `UnguardedCall`, `UnsupportedMode`, `RowsMismatch`."""
        if (table := self.table) is None:
            raise _unnamed()
        if request is not None and not table.is_request and any(self._stops[owner] for owner in table.owners):
            raise UnguardedCall(
                "generate under a policy that stops rows, in a block of passes", "nothing there would stop the answer",
                "Call guard.generate(...), or generate inside `with guard(model, rows=[...])`.",
            )  # fmt: skip
        copies = request.copies if request is not None else 1
        owners = self._of_others(table, table.lent, rows, request) if table.lent is not None else table.owners
        if rows != len(owners) * copies:
            raise RowsMismatch(
                f"policies for {len(owners)} rows", f"the batch has {rows} rows of {copies} each",
                "Name one policy per row of the batch, or one for all.",
            )  # fmt: skip
        owner = torch.tensor(owners).repeat_interleave(copies)
        columns = [torch.isin(owner, torch.tensor(sorted(bound.plans or ()))) for bound in self.rules]
        return torch.stack(columns, 1) if columns else torch.zeros(rows, 0, dtype=torch.bool)

    def _of_others(self, table: Table, lent: Lent, rows: int, request: Request | None) -> tuple[int, ...]:
        """The policies of a pass that somebody else makes, as many as it has rows where one is for all."""
        if request is not None:
            raise UnguardedCall(
                "generate of the model inside a guarded one", "its answer would be neither stopped nor on record",
                "Call generate of the model that the guardrail is attached to.",
            )  # fmt: skip
        if not lent.measuring and any(self._stops[owner] for owner in table.owners):
            raise passes_cannot_stop()
        return table.owners * rows if lent.any_rows else table.owners

    def open_record(self, request: Request | None) -> CallRecord:
        """A fresh record, which lives as long as the call. Raises `UnsupportedMode` for a call inside a request."""
        record = CallRecord(request.copies if request is not None and request.reorders else 1)
        table = self.table
        if table is not None:
            if table.is_request and table.calls:
                raise UnsupportedMode(
                    "a call of a guarded model inside of guard.generate", "one request is one generate call",
                    "Draft with another model, or with prompt_lookup_num_tokens.",
                )  # fmt: skip
            if table.lent is None:  # a block of others' calls may last as long as a server, and nobody reads them there
                table.calls.append(record)
        return record

    def see(self, site: Site, before: Stream, after: Stream, view: View, edit: Edit | None) -> None:
        """Write a pass into the ledger; one that goes on with the cache of an earlier block belongs to this one too."""
        table = self.table
        if table is None:  # the pass began in a block that an interrupt ended
            raise _unnamed()
        if table.lent is None and view.record not in table.calls:
            table.calls.append(view.record)
        super().see(site, before, after, view, edit)

    def stops(self, number: int) -> Sequence[tuple[Stop, BoundGate]]:
        """The stops of a policy, and their gates as they stand on the model."""
        return self._stops[number]

    def stopped(self, copies: int, column: int, *, drafts: bool) -> Bool[Tensor, " batch"]:
        """Forward rows that a stop ends before ``column``; where one of several copies is, all are.

        With ``drafts`` passes hold tokens behind ``column`` too, which may yet be thrown away. Raises
        `GuardNotApplied` where tokens that the gates have not seen stand before it, or, without drafts, behind it.
        """
        table = self.table
        assert table is not None
        ended = torch.zeros(len(table.owners), dtype=torch.bool)
        if table.calls:
            self._look(table, copies, column, drafts=drafts)
            ended[[row for row, end in table.ended.items() if end.column < column]] = True
        elif not drafts:  # an assistant asks before the first pass; what it drafts is checked
            raise _unlooked(0, column)
        return ended.repeat_interleave(copies)

    def _look(self, table: Table, copies: int, column: int, *, drafts: bool) -> None:
        """Bring ``table.ended`` up to ``column``: what was computed again, without a cache or behind drafts, anew."""
        memory, told = table.calls[-1].memory, {}
        for bound in dict.fromkeys(bound for owner in table.owners for _, bound in self._stops[owner]):
            history = memory.histories[bound]
            latest = history.steps[-1]
            if latest.end != column and not drafts:
                raise _unlooked(latest.end, column)
            since = min(table.looked, latest.tokens.column)
            table.ended = {row: end for row, end in table.ended.items() if end.column < since}
            told[bound] = _first_open(history, since, column)
        for row, owner in enumerate(table.owners):
            own = range(row * copies, (row + 1) * copies)
            ends = [
                Ended(stop.reason, *told[bound][one])
                for stop, bound in self._stops[owner] for one in own if one in told[bound]
            ]  # fmt: skip
            if ends and row not in table.ended:
                table.ended[row] = min(ends, key=lambda end: end.column)
        table.looked = column

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


def _first_open(history: History, since: int, until: int) -> dict[int, tuple[int, int]]:
    """Forward rows in which a gate was open at a real token of the columns from ``since`` to ``until``: where first."""
    found: dict[int, tuple[int, int]] = {}
    for trace in chain((step.trace for step in reversed(history.steps)), reversed(history.past)):
        width = trace.real.shape[1]
        if trace.start + width <= since:
            break
        here = slice(max(since - trace.start, 0), max(until - trace.start, 0))
        opened = (trace.opened & trace.real)[:, here].cpu()
        for row in opened.any(1).nonzero()[:, 0].tolist():
            place = here.start + int(opened[row].int().argmax())
            found[row] = (trace.start + place, int(trace.absolute[row, place]))
    return found


def passes_cannot_stop() -> UnsupportedMode:
    """For passes one by one, which only ever edit."""
    return UnsupportedMode(
        "passes under a policy that stops rows", "there is no answer that could be stopped",
        "Call guard.generate(...), or use a policy of edits only.",
    )  # fmt: skip


def _unnamed() -> UnguardedCall:
    return UnguardedCall(
        "a call of a guarded model", "nothing says which policy its rows are under",
        "Call guard.generate(...), or the model inside `with guard(model, rows=[...])` or `guard.calls(...)`.",
    )  # fmt: skip


def _unlooked(end: int, column: int) -> GuardNotApplied:
    return GuardNotApplied(
        f"stops before column {column}", f"the gates have seen the tokens before column {end}",
        "Give generate all token ids of the prompt, or an attention mask of all its columns.",
    )  # fmt: skip
