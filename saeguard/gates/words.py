"""A gate that reads the words alone: log-odds of single tokens and of pairs, over the last few tokens.

    q_t = u[id_t] + v[id_p, id_t]      with p the counted token before t; 0 for what is not listed
    e_t = idf^2 of the same two        0 likewise
    score = (q_{t-last+1} + ... + q_t) / sqrt(max(e_{t-last+1} + ... + e_t, floor))

which is a logistic classifier of tf-idf weighted n-grams, read through a window. It reads no stream, so neither context
nor edits move it: the most stable gate there is, and the easiest to misspell. Padding and special tokens do not count,
and a pair may reach over them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saeguard.errors import BadRule, TokensUnknown
from saeguard.gates.base import Leaf, Seen, State, Verdict, carried, latest
from saeguard.gates.checks import as_weights, one_number, whole
from saeguard.gates.evidence import Hits

NONE = -1
"""Stands for the token before the first."""
SPAN = 1 << 31
"""More than any token id."""


@dataclass(frozen=True)
class Words:
    """``tokens`` are ids, and ``pairs`` two ids each, one behind the other in one flat tuple.

    Each has a weight, and a square, which is what it adds under the root. ``last`` is in counted tokens.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    squares: tuple[float, ...]
    pairs: tuple[int, ...] = ()
    pair_weights: tuple[float, ...] = ()
    pair_squares: tuple[float, ...] = ()
    last: int = 24
    floor: float = 1.0
    threshold: float = 0.0

    def __post_init__(self):
        for name in ("tokens", "pairs"):
            object.__setattr__(self, name, as_ids(name, getattr(self, name)))
        for name in ("weights", "squares", "pair_weights", "pair_squares"):
            object.__setattr__(self, name, as_weights(f"Words {name}", getattr(self, name)))
        for name in ("floor", "threshold"):
            object.__setattr__(self, name, one_number(f"Words {name}", getattr(self, name)))
        whole("Words last", self.last)
        if self.floor <= 0 or min(self.squares + self.pair_squares, default=0.0) < 0:
            raise BadRule("Words", "a root of what may be 0 or less is no number", "Give floor > 0 and squares >= 0.")
        self._check_tables()

    def _check_tables(self) -> None:
        n, n_pairs = len(self.tokens), len(self.pairs)
        single, double = (len(self.weights), len(self.squares)), (len(self.pair_weights), len(self.pair_squares))
        if single != (n, n) or n_pairs % 2 or double != (n_pairs // 2, n_pairs // 2):
            found = f"{n} tokens have {single} of them, and {n_pairs} ids of pairs {double}"
            raise BadRule("Words", found, "Give two ids per pair, and one weight and one square for each.")
        check_once("Words", self.tokens, self.pairs)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """It reads no stream, but is seen once so that it knows the tokens."""
        return (Hits(()),)

    @property
    def monotone(self) -> bool:
        """False: what lies behind the window is forgotten."""
        return False

    def begin(self, rows: int, device: torch.device) -> State:
        """q and e of the last tokens, the id of the last one, and whether there was any."""
        window = torch.zeros(rows, self.last, dtype=torch.float64, device=device)
        before = torch.full((rows,), NONE, dtype=torch.long, device=device)
        return (window, window, before, torch.zeros(rows, dtype=torch.bool, device=device))

    def step(self, state: State, seen: Sequence[Seen]) -> tuple[State, Verdict]:
        """Raises `TokensUnknown`."""
        q, e, before, any_before = state
        one = seen[0]
        ids = known_ids(one)
        found = torch.stack(self._look(ids.cpu(), one.counts.cpu(), before.cpu()), -1).to(q.device)
        scores, both = [], torch.stack([q, e], -1)
        for column in range(found.shape[1]):
            moved = torch.cat([both[:, 1:], found[:, column, None]], dim=1)
            both = torch.where(one.counts[:, column, None, None], moved, both)
            total = both.sum(1)
            scores.append(total[:, 0] / total[:, 1].clamp_min(self.floor).sqrt())
        any_counted = latest(one.counts, any_before)
        score = torch.stack(scores, 1) if scores else torch.zeros(one.counts.shape, dtype=torch.float64)
        score = score.to(any_counted.device).masked_fill(~any_counted, -torch.inf)
        now = carried(counted_before(ids, one.counts, before)[1], before)
        after = (both[..., 0].clone(), both[..., 1].clone(), now, carried(any_counted, any_before))
        return after, Verdict(score > self.threshold, score)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Of a part of the tables: a memory is looked up by its gate at every pass."""
        return hash((self.tokens[:64], self.weights[:64], self.pairs[:64], self.last, self.floor, self.threshold))

    def _look(self, ids: Tensor, counts: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """q and e of every token, 0 where it does not count."""
        q, e = self._singles.of(ids), self._doubles.of(pairs_at(ids, counts, before))
        return tuple(part.masked_fill(~counts, 0.0) for part in (q[0] + e[0], q[1] + e[1]))  # type: ignore[return-value]

    @cached_property
    def _singles(self) -> "Table":
        return Table.of_keys(list(self.tokens), self.weights, self.squares)

    @cached_property
    def _doubles(self) -> "Table":
        return Table.of_keys(pair_keys(self.pairs), self.pair_weights, self.pair_squares)


@dataclass(frozen=True, eq=False)
class Table:
    """Keys in rising order, and some numbers of each."""

    keys: Int[Tensor, " n"]
    numbers: Float[Tensor, "number n"]

    @classmethod
    def of_keys(cls, keys: list[int], *numbers: Sequence[float]) -> "Table":
        ordered, order = torch.tensor(keys, dtype=torch.long).sort()
        return cls(ordered, torch.tensor(numbers, dtype=torch.float64)[:, order])

    def of(self, wanted: Int[Tensor, "batch pos"]) -> Float[Tensor, "number batch pos"]:
        """0 for keys that are not there."""
        if not len(self.keys):
            return torch.zeros(len(self.numbers), *wanted.shape, dtype=torch.float64)
        place = torch.searchsorted(self.keys, wanted.contiguous()).clamp_max(len(self.keys) - 1)
        return torch.where(self.keys[place] == wanted, self.numbers[:, place], 0.0)


def known_ids(seen: Seen) -> Int[Tensor, "batch pos"]:
    """The token ids of a pass. Raises `TokensUnknown`."""
    if seen.ids is None:
        raise TokensUnknown(
            "a gate on words", "this forward pass was given embeddings, so its token ids are unknown",
            "Pass input_ids, or use a gate that reads a stream.",
        )  # fmt: skip
    return seen.ids.long()


def counted_before(
    ids: Int[Tensor, "batch pos"], counts: Tensor, before: Int[Tensor, " batch"]
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """The id of the last counted token in front of each one, and up to each one; ``before`` is from earlier passes."""
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    up_to = torch.where(counts, places, 0).cummax(1).values if ids.shape[1] else torch.zeros_like(ids)
    known = torch.cat([before[:, None], ids], 1)
    now = known.gather(1, up_to)
    return torch.cat([before[:, None], now], 1)[:, :-1], now


def pairs_at(ids: Int[Tensor, "batch pos"], counts: Tensor, before: Int[Tensor, " batch"]) -> Int[Tensor, "batch pos"]:
    """The key of the pair that ends at each token, -1 where there is no token before it."""
    previous, _ = counted_before(ids, counts, before)
    return torch.where(previous == NONE, -1, previous * SPAN + ids)


def pair_keys(pairs: Sequence[int]) -> list[int]:
    """One number for each two ids."""
    return [first * SPAN + second for first, second in zip(pairs[::2], pairs[1::2], strict=True)]


def check_once(what: str, tokens: Sequence[int], pairs: Sequence[int]) -> None:
    """Raise `BadRule` where a token or a pair is listed twice."""
    if len(set(tokens)) != len(tokens) or len(set(pair_keys(pairs))) != len(pairs) // 2:
        raise BadRule(what, "a token or a pair is listed twice", "List each once.")


def as_ids(name: str, given: Any) -> tuple[int, ...]:
    ids = tuple(given)
    wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < SPAN]
    if wrong:
        raise BadRule(f"Words {name}", f"{wrong[0]!r:.40} is no token id", "Ids are integers from 0 on.")
    return ids
