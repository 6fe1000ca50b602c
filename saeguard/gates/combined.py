"""Gates of gates: and, or, not, and once open, open for good.

Scores of different gates share no scale, so that of And and Or is 1 where they are open, 0 where they are closed, and
-inf where that depends on a gate that has no score yet; Not and Latched report the score of the gate inside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saeguard.axes import Mask
from saeguard.errors import BadRule
from saeguard.gates.base import Gate, Leaf, Seen, State, Verdict, carried, latest


class _Several:
    """What And and Or have in common."""

    gates: tuple[Gate, ...]

    def __post_init__(self):
        given: Any = self.gates
        gates = tuple(given) if isinstance(given, list | tuple) else (given,)
        object.__setattr__(self, "gates", gates)
        if not gates:
            raise BadRule(f"{type(self).__name__}(())", "it has no gates", "Give one gate or more.")
        for gate in gates:
            _check_gate(type(self).__name__, gate)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(leaf for gate in self.gates for leaf in gate.leaves)

    @property
    def monotone(self) -> bool:
        return all(gate.monotone for gate in self.gates)

    def begin(self, rows: int, device: torch.device) -> State:
        return tuple(gate.begin(rows, device) for gate in self.gates)

    def _steps(self, state: State, seen: Sequence[Seen]) -> tuple[State, list[Verdict]]:
        after, verdicts, used = [], [], 0
        for gate, before in zip(self.gates, state, strict=True):
            mine = seen[used : used + len(gate.leaves)]
            used += len(mine)
            next_state, verdict = gate.step(before, mine)
            after.append(next_state)
            verdicts.append(verdict)
        return tuple(after), verdicts


@dataclass(frozen=True)
class And(_Several):
    """Open where all of its gates are."""

    gates: tuple[Gate, ...]

    def step(self, state: State, seen: Sequence[Seen]) -> tuple[State, Verdict]:
        after, verdicts = self._steps(state, seen)
        opened, closed = _stacked(verdicts)
        return after, _joined(opened.all(0), closed.any(0), verdicts)


@dataclass(frozen=True)
class Or(_Several):
    """Open where any of its gates is."""

    gates: tuple[Gate, ...]

    def step(self, state: State, seen: Sequence[Seen]) -> tuple[State, Verdict]:
        after, verdicts = self._steps(state, seen)
        opened, closed = _stacked(verdicts)
        return after, _joined(opened.any(0), closed.all(0), verdicts)


@dataclass(frozen=True)
class Not:
    """Open where its gate has a score and is closed."""

    gate: Gate

    def __post_init__(self):
        _check_gate("Not", self.gate)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return self.gate.leaves

    @property
    def monotone(self) -> bool:
        return False

    def begin(self, rows: int, device: torch.device) -> State:
        return self.gate.begin(rows, device)

    def step(self, state: State, seen: Sequence[Seen]) -> tuple[State, Verdict]:
        after, verdict = self.gate.step(state, seen)
        return after, Verdict(verdict.closed, verdict.score)


@dataclass(frozen=True)
class Latched:
    """Open from the first token on at which its gate is, for the rest of the row."""

    gate: Gate

    def __post_init__(self):
        _check_gate("Latched", self.gate)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return self.gate.leaves

    @property
    def monotone(self) -> bool:
        return True

    def begin(self, rows: int, device: torch.device) -> State:
        return (self.gate.begin(rows, device), torch.zeros(rows, dtype=torch.bool, device=device))

    def step(self, state: State, seen: Sequence[Seen]) -> tuple[State, Verdict]:
        inner, before = state
        after, verdict = self.gate.step(inner, seen)
        opened = latest(verdict.opened, before)
        return (after, carried(opened, before)), Verdict(opened, verdict.score)


def _stacked(verdicts: Sequence[Verdict]) -> tuple[Tensor, Tensor]:
    """Where each is open and where each is closed, ``gate batch pos``."""
    return torch.stack([verdict.opened for verdict in verdicts]), torch.stack([v.closed for v in verdicts])


def _joined(opened: Mask, closed: Mask, verdicts: Sequence[Verdict]) -> Verdict:
    """1, 0 or -inf; NaN where any part's score is, so that it is noticed."""
    score = opened.double().masked_fill(~opened & ~closed, -torch.inf)
    broken = torch.stack([verdict.score.isnan() for verdict in verdicts]).any(0)
    return Verdict(opened, score.masked_fill(broken, torch.nan))


def _check_gate(what: str, gate: Any) -> None:
    if isinstance(gate, type) or not isinstance(gate, Gate):  # a class has a gate's attributes too
        raise BadRule(f"{what}({gate!r:.60})", "that is not a gate", "Give a gate, such as Watch(...).")
