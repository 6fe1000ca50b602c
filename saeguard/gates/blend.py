"""A weighted sum of the scores of several gates: several views of a row, one threshold.

    score = sum_i weight_i score_i

A gate that has no score yet (-inf) makes the sum -inf, whatever its weight: there is none of the whole either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from saeguard.errors import BadRule
from saeguard.gates.base import Leaf, Seen, State, Verdict
from saeguard.gates.checks import as_weights, one_number
from saeguard.gates.watch import Watch
from saeguard.gates.words import Words
from saeguard.gates.words_cusum import WordsCusum

PARTS = (Watch, Words, WordsCusum)


@dataclass(frozen=True)
class Blend:
    """``gates`` are those of `PARTS`, whose scores are summed; their own thresholds play no part."""

    gates: tuple[Watch | Words | WordsCusum, ...]
    weights: tuple[float, ...]
    threshold: float

    def __post_init__(self):
        given: Any = self.gates
        gates = tuple(given) if isinstance(given, list | tuple) else (given,)
        if not gates or not all(type(gate) in PARTS for gate in gates):
            raise BadRule(
                f"Blend({given!r:.60})", "these are not Watch, Words or WordsCusum gates", "Give one of them or more."
            )
        object.__setattr__(self, "gates", gates)
        object.__setattr__(self, "weights", as_weights("Blend", self.weights))
        object.__setattr__(self, "threshold", one_number("Blend threshold", self.threshold))
        if len(self.weights) != len(gates):
            raise BadRule(f"Blend of {len(gates)} gates", f"it has {len(self.weights)} weights", "Give one per gate.")

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(leaf for gate in self.gates for leaf in gate.leaves)

    @property
    def monotone(self) -> bool:
        """Whether every part never falls and none counts against the sum."""
        return all(gate.monotone for gate in self.gates) and min(self.weights) >= 0

    def begin(self, rows: int, device: torch.device) -> State:
        return tuple(gate.begin(rows, device) for gate in self.gates)

    def step(self, state: State, seen: Sequence[Seen]) -> tuple[State, Verdict]:
        after, parts = [], []
        for gate, before, mine in zip(self.gates, state, seen, strict=True):
            next_state, verdict = gate.step(before, [mine])
            after.append(next_state)
            parts.append(verdict.score)
        scores = torch.stack(parts, -1)
        none = scores.isneginf()
        weights = torch.tensor(self.weights, dtype=torch.float64, device=scores.device)
        score = (scores.double().masked_fill(none, 0.0) * weights).sum(-1).masked_fill(none.any(-1), -torch.inf)
        return tuple(after), Verdict(score > self.threshold, score)
