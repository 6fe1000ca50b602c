"""What was really edited: per call of the model, row, absolute position and rule.

During a forward pass only references to small tensors are kept. They are put together when somebody asks, or every
`COMPACT_EVERY` passes. A pass that starts at an earlier column than the last one ended (recomputation without a
cache, rejected draft tokens) takes the place of what was recorded from that column on.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saeguard.axes import Mask
from saeguard.editor import Edit
from saeguard.gating import BoundGate, Memory, Trace
from saeguard.sites import Site
from saeguard.tokens import TokenBatch

COMPACT_EVERY = 256


@dataclass(frozen=True, eq=False)
class Entry:
    """One forward pass at one site."""

    tokens: TokenBatch
    covers: Bool[Tensor, "batch rules"]
    edit: Edit
    x_norm: Float[Tensor, "batch pos"]
    moved: Mask
    """Tokens whose x really is another one: a change can be smaller than the stream's dtype can hold."""


@dataclass(eq=False)
class Table:
    """The tokens of one call at one site, ``row column`` and ``row column rule``."""

    start: int
    """The column of the first token: not 0 where the call began with a cache that held some."""
    absolute: Int[Tensor, "row column"]
    real: Bool[Tensor, "row column"]
    x_norm: Float[Tensor, "row column"]
    covered: Bool[Tensor, "row column rules"]
    selected: Bool[Tensor, "row column rules"]
    edited: Bool[Tensor, "row column rules"]
    delta: Float[Tensor, "row column rules"]
    """Norm of the rule's own change of x."""

    def extended(self, other: "Table", column: int) -> "Table":
        """This table up to ``column``, then ``other``."""
        kept = max(column - self.start, 0)
        names = [name for name in self.__dataclass_fields__ if name != "start"]
        parts = {name: torch.cat([getattr(self, name)[:, :kept], getattr(other, name)], dim=1) for name in names}
        return Table(start=min(self.start, other.start), **parts)


@dataclass(eq=False)
class Track:
    """The entries of one call at one site, oldest first, and the table of those already put together."""

    entries: list[Entry] = field(default_factory=list)
    base: Table | None = None

    def add(self, entry: Entry) -> None:
        while self.entries and self.entries[-1].tokens.column >= entry.tokens.column:
            self.entries.pop()
        self.entries.append(entry)
        if len(self.entries) > COMPACT_EVERY:
            self.table()

    def table(self) -> Table | None:
        """All that is known, put together."""
        for entry in self.entries:
            fresh = _tabulate(entry)
            self.base = fresh if self.base is None else self.base.extended(fresh, entry.tokens.column)
        self.entries.clear()
        return self.base


@dataclass(eq=False)
class CallRecord:
    """One request to the model: a generate call, or forward passes that share a cache.

    ``per_request`` forward rows belong to one row of the request when they are beams, whose order changes as the
    search goes on; what is reported is then the union over the beams. ``memory`` is that of the gates. ``ends`` are the
    columns from which on a row's tokens were thrown away (after its end, or never fed back); None while unknown.
    """

    per_request: int = 1
    memory: Memory = field(default_factory=Memory)
    ends: Int[Tensor, " row"] | None = None
    tracks: dict[Site, Track] = field(default_factory=dict)

    def trace(self, gate: BoundGate) -> Trace | None:
        """What a gate said of the tokens of this call that counted."""
        history = self.memory.histories.get(gate)
        trace = None if history is None else history.trace
        return None if trace is None else trace.upto(self.ends)

    def track(self, site: Site) -> Track:
        return self.tracks.setdefault(site, Track())

    def table(self, site: Site) -> Table | None:
        """The tokens of this call at ``site`` that counted."""
        table = self.tracks[site].table() if site in self.tracks else None
        if table is None or self.ends is None:
            return table
        kept = table.start + torch.arange(table.real.shape[1]) < self.ends[:, None]
        table.real = table.real & kept
        for name in ("covered", "selected", "edited"):
            setattr(table, name, getattr(table, name) & kept[..., None])
        return table


def _tabulate(entry: Entry) -> Table:
    rules = entry.covers.shape[1]
    real = entry.tokens.real.cpu()
    shape = (*real.shape, rules)
    selected, edited = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    delta, moved = torch.zeros(shape), entry.moved.cpu()
    for piece in entry.edit.parts:
        changed, norm = piece.sizes()
        for local, rule in enumerate(piece.rules):
            selected[..., rule] = piece.selected[..., local].cpu()
            edited[..., rule] = changed[..., local] & moved
            delta[..., rule] = norm[..., local]
    return Table(
        start=entry.tokens.column,
        absolute=entry.tokens.absolute.cpu(),
        real=real,
        x_norm=entry.x_norm.detach().float().cpu(),
        covered=real[..., None] & entry.covers.cpu()[:, None],
        selected=selected,
        edited=edited,
        delta=delta,
    )


def positions(mask: Mask, absolute: Int[Tensor, "row column"], per_request: int) -> tuple[tuple[int, ...], ...]:
    """The absolute positions set in ``mask``, ascending, per row of the request."""
    rows = [set(absolute[row][mask[row]].tolist()) for row in range(mask.shape[0])]
    merged = [set().union(*rows[i : i + per_request]) for i in range(0, len(rows), per_request)]
    return tuple(tuple(sorted(row)) for row in merged)
