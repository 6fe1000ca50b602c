"""A gate that reads the words alone and piles up what they say, so that no text in front can take it away.

    q_t = u[id_t] + v[id_p, id_t]      with p the counted token before t; 0 for what is not listed, and v >= 0
    S_t = max(0, S_{t-1} + q_t - drift)                              the score; Page's test, as `Cusum`
    max_t S_t = the largest sum of q - drift over a run of tokens, wherever that run stands

S_t rises with S_{t-1}, and text in front leaves it at 0 or more: what opens the gate alone opens it behind any text, as
far as the pair across the seam goes, which is why pairs can only add. Nothing but the tokens is read, so neither
context nor edits move it. `Words` compares with the length of a window instead, which is surer and can be diluted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from saeguard.errors import BadRule
from saeguard.gates.base import Leaf, Seen, State, Verdict, carried, latest
from saeguard.gates.checks import as_weights, one_number
from saeguard.gates.evidence import Hits
from saeguard.gates.words import NONE, Table, as_ids, check_once, counted_before, known_ids, pair_keys, pairs_at


@dataclass(frozen=True)
class WordsCusum:
    """``tokens`` are ids, each with a weight, and ``pairs`` two ids each in one flat tuple, with a weight per pair."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    pairs: tuple[int, ...] = ()
    pair_weights: tuple[float, ...] = ()
    drift: float = 0.0
    threshold: float = 0.0

    def __post_init__(self):
        for name in ("tokens", "pairs"):
            object.__setattr__(self, name, as_ids(name, getattr(self, name)))
        for name in ("weights", "pair_weights"):
            object.__setattr__(self, name, as_weights(f"WordsCusum {name}", getattr(self, name)))
        for name in ("drift", "threshold"):
            object.__setattr__(self, name, one_number(f"WordsCusum {name}", getattr(self, name)))
        if len(self.weights) != len(self.tokens) or 2 * len(self.pair_weights) != len(self.pairs):
            found = f"{len(self.tokens)} tokens have {len(self.weights)} weights, {len(self.pairs)} ids of pairs "
            raise BadRule("WordsCusum", f"{found}{len(self.pair_weights)}", "Give one per token, one per two ids.")
        if min(self.pair_weights, default=0.0) < 0:
            raise BadRule(
                "WordsCusum", "a pair weighs less than 0, so text in front of it could close the gate",
                "Give pairs weights of 0 or more; tokens may have any.",
            )  # fmt: skip
        check_once("WordsCusum", self.tokens, self.pairs)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """It reads no stream, but is seen once so that it knows the tokens."""
        return (Hits(()),)

    @property
    def monotone(self) -> bool:
        """False: it falls where the words say the contrary."""
        return False

    def begin(self, rows: int, device: torch.device) -> State:
        """S, the id of the last counted token, and whether there was any."""
        none = torch.full((rows,), NONE, dtype=torch.long, device=device)
        zero = torch.zeros(rows, dtype=torch.float64, device=device)
        return (zero, none, torch.zeros(rows, dtype=torch.bool, device=device))

    def step(self, state: State, seen: Sequence[Seen]) -> tuple[State, Verdict]:
        """Raises `TokensUnknown`."""
        piled, before, any_before = state
        one = seen[0]
        ids = known_ids(one)
        q, scores = self._look(ids.cpu(), one.counts.cpu(), before.cpu()).to(piled.device), []
        for column in range(q.shape[1]):
            moved = (piled + (q[:, column] - self.drift)).clamp_min(0)
            piled = torch.where(one.counts[:, column], moved, piled)
            scores.append(piled)
        any_counted = latest(one.counts, any_before)
        score = torch.stack(scores, 1) if scores else torch.zeros(one.counts.shape, dtype=torch.float64)
        score = score.to(any_counted.device).masked_fill(~any_counted, -torch.inf)
        now = carried(counted_before(ids, one.counts, before)[1], before)
        return (piled, now, carried(any_counted, any_before)), Verdict(score > self.threshold, score)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Of a part of the tables: a memory is looked up by its gate at every pass."""
        return hash((self.tokens[:64], self.weights[:64], self.pairs[:64], self.drift, self.threshold))

    def _look(self, ids: Tensor, counts: Tensor, before: Tensor) -> Float[Tensor, "batch pos"]:
        """q of every token, 0 where it does not count."""
        found = self._singles.of(ids)[0] + self._doubles.of(pairs_at(ids, counts, before))[0]
        return found.masked_fill(~counts, 0.0)

    @cached_property
    def _singles(self) -> Table:
        return Table.of_keys(list(self.tokens), self.weights)

    @cached_property
    def _doubles(self) -> Table:
        return Table.of_keys(pair_keys(self.pairs), self.pair_weights)
