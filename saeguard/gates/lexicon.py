"""Evidence from the words alone: log-odds of single tokens and of pairs, as a naive-Bayes classifier learns them.

    Lexicon   q_t = u[id_t] + v[id_{t-1}, id_t]      0 for what is not listed

It reads no stream, so neither context nor edits move it: the most stable evidence there is, and the easiest to
misspell. The token before is the last one that counted, whatever padding lies between; special tokens are none.
"""

from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saeguard.errors import BadRule, TokensUnknown
from saeguard.gates.base import Seen
from saeguard.gates.checks import as_weights
from saeguard.sites import Site

NONE = -1
"""Stands for the token before the first."""
_SPAN = 1 << 31
"""More than any token id."""


@dataclass(frozen=True)
class Lexicon:
    """``tokens`` are ids and ``pairs`` two ids each, one behind the other in one flat tuple; a weight for each."""

    tokens: tuple[int, ...]
    token_weights: tuple[float, ...]
    pairs: tuple[int, ...] = ()
    pair_weights: tuple[float, ...] = ()
    _: KW_ONLY
    special: bool = field(default=False, init=False)

    def __post_init__(self):
        for name in ("tokens", "pairs"):
            ids = tuple(getattr(self, name))
            wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < _SPAN]
            if wrong:
                raise BadRule(f"a Lexicon's {name}", f"{wrong[0]!r:.40} is no token id", "Ids are integers from 0 on.")
            object.__setattr__(self, name, ids)
        if len(self.pairs) % 2:
            raise BadRule("a Lexicon's pairs", f"{len(self.pairs)} ids are no pairs", "Give two ids per pair.")
        object.__setattr__(self, "token_weights", as_weights("Lexicon", self.token_weights))
        object.__setattr__(self, "pair_weights", as_weights("Lexicon", self.pair_weights))
        if len(self.token_weights) != len(self.tokens) or 2 * len(self.pair_weights) != len(self.pairs):
            raise BadRule("a Lexicon", "it has not one weight per token and per pair", "Give as many.")
        if len(set(self.tokens)) != len(self.tokens) or len(set(self._pairs)) != len(self._pairs):
            raise BadRule("a Lexicon", "a token or a pair is listed twice", "List each once.")

    @property
    def latents(self) -> tuple[int, ...]:
        """None: it reads no stream."""
        return ()

    @property
    def sae(self) -> str | None:
        """None, likewise."""
        return None

    @property
    def site(self) -> Site | None:
        """None: it is asked wherever the rule reads."""
        return None

    @property
    def width(self) -> int | None:
        """None: the stream does not matter."""
        return None

    def of(self, seen: Seen) -> Float[Tensor, "batch pos"]:
        """One number per token, in float64. Raises `TokensUnknown`."""
        if seen.ids is None or seen.previous is None:
            raise TokensUnknown(
                "a gate with a Lexicon", "this forward pass was given embeddings, so its token ids are unknown",
                "Pass input_ids, or use a gate that reads a stream.",
            )  # fmt: skip
        ids, previous = seen.ids.cpu(), seen.previous.cpu()
        found = self._look(ids.long(), self._table(pairs=False))
        found = found + self._look(previous.long() * _SPAN + ids.long(), self._table(pairs=True))
        return found.to(seen.counts.device)

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        return list(zip(self.pairs[::2], self.pairs[1::2], strict=True))

    def _table(self, *, pairs: bool) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        return self._tables[1 if pairs else 0]

    @cached_property
    def _tables(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Keys in rising order, and their weights."""
        keys = [list(self.tokens), [first * _SPAN + second for first, second in self._pairs]]
        made = []
        for these, weights in zip(keys, (self.token_weights, self.pair_weights), strict=True):
            ordered, order = torch.tensor(these, dtype=torch.long).sort()
            made.append((ordered, torch.tensor(weights, dtype=torch.float64)[order]))
        return made[0], made[1]

    def _look(self, wanted: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        keys, weights = table
        if not len(keys):
            return torch.zeros(wanted.shape, dtype=torch.float64)
        place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        return torch.where(keys[place] == wanted, weights[place], 0.0)
