"""Random gates and what they see: numbers in eighths, so that sums are the same in whatever order they are taken."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from hypothesis import strategies as st
from torch import Tensor

from saeguard.gates import (
    Always,
    And,
    Blend,
    Cosine,
    Count,
    Cusum,
    Gate,
    Hits,
    Latched,
    LogOdds,
    Not,
    Or,
    Peak,
    PooledHead,
    Probe,
    Rate,
    Seen,
    State,
    TopKMean,
    Verdict,
    Watch,
    Window,
    Words,
    WordsCusum,
)
from saeguard.gates.pooled import Pooling
from tests import slow_gates

D = 3
"""Width of the stream."""
LATENTS = 40
VOCAB = 6

eighths = st.integers(-16, 24).map(lambda n: n / 8)
off_grid = eighths.map(lambda n: n + 0.0137)
"""Thresholds that no score in eighths, or mean of such, is equal to."""
latents = st.lists(st.integers(0, LATENTS - 1), max_size=3, unique=True).map(tuple)


@st.composite
def log_odds(draw: Any, **where: Any) -> LogOdds:
    watched = draw(latents)
    caps = draw(st.none() | st.tuples(*(eighths for _ in watched)))
    return LogOdds(watched, tuple(draw(eighths) for _ in watched), draw(eighths), caps=caps, **where)


@st.composite
def pooled_heads(draw: Any, **where: Any) -> PooledHead:
    watched = draw(latents)
    ways = tuple(draw(st.lists(st.sampled_from(get_args(Pooling)), min_size=1, max_size=3, unique=True)))
    weights = tuple(draw(eighths) for _ in range(len(watched) * len(ways)))
    return PooledHead(watched, ways, weights, draw(eighths), draw(off_grid), **where)


def probes(width: int = D, **where: Any) -> st.SearchStrategy[Probe]:
    weights = st.lists(eighths, min_size=width, max_size=width).map(tuple)
    return st.builds(Probe, weights, eighths, **{name: st.just(value) for name, value in where.items()})


def cosines(width: int = D, **where: Any) -> st.SearchStrategy[Cosine]:
    direction = st.lists(eighths, min_size=width, max_size=width).filter(any).map(tuple)
    threshold = st.sampled_from((-0.5137, -0.0137, 0.1137, 0.6137))
    return st.builds(Cosine, direction, threshold, **{name: st.just(value) for name, value in where.items()})


pools = st.one_of(
    st.just(Rate()), st.just(Rate("prompt")), st.builds(Window, st.integers(1, 6)), st.builds(Cusum, eighths),
    st.just(Count()), st.just(Peak()), st.builds(TopKMean, st.integers(1, 5), floor=eighths),
    st.builds(TopKMean, st.integers(1, 3), st.integers(3, 6), eighths),
)  # fmt: skip


@st.composite
def watches(draw: Any, **where: Any) -> Watch:
    evidence = draw(
        st.one_of(st.builds(Hits, latents, eighths, **{k: st.just(v) for k, v in where.items()}), log_odds(**where),
                  probes(**{k: v for k, v in where.items() if k != "sae"}))
    )  # fmt: skip
    return Watch(evidence, draw(pools), draw(eighths | off_grid))


@st.composite
def words(draw: Any) -> Words:
    tokens = tuple(draw(st.lists(st.integers(0, VOCAB - 1), max_size=4, unique=True)))
    ids = st.tuples(st.integers(0, VOCAB - 1), st.integers(0, VOCAB - 1))
    pairs = draw(st.lists(ids, max_size=5, unique=True))
    several = lambda n, one: tuple(draw(one) for _ in range(n))
    squares = st.integers(0, 16).map(lambda n: n / 8)
    return Words(
        tokens, several(len(tokens), eighths), several(len(tokens), squares), tuple(i for pair in pairs for i in pair),
        several(len(pairs), eighths), several(len(pairs), squares), last=draw(st.integers(1, 6)),
        floor=draw(st.integers(1, 16)) / 8, threshold=draw(off_grid),
    )  # fmt: skip


@st.composite
def words_cusum(draw: Any) -> WordsCusum:
    one = draw(words())
    pair_weights = tuple(abs(weight) for weight in one.pair_weights)
    return WordsCusum(one.tokens, one.weights, one.pairs, pair_weights, draw(eighths), one.threshold)


@st.composite
def blends(draw: Any) -> Blend:
    parts = tuple(draw(st.lists(watches() | words() | words_cusum(), min_size=1, max_size=3)))
    return Blend(parts, tuple(draw(eighths) for _ in parts), draw(off_grid))


def gates() -> st.SearchStrategy[Gate]:
    """Any gate, up to a few levels of gates in gates."""
    leaves = st.one_of(
        watches(), watches(), watches(), words(), words_cusum(), blends(), pooled_heads(), cosines(), st.just(Always())
    )  # fmt: skip
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(And, st.lists(inner, min_size=1, max_size=3).map(tuple)),
            st.builds(Or, st.lists(inner, min_size=1, max_size=3).map(tuple)),
            st.builds(Not, inner),
            st.builds(Latched, inner),
        ),
        max_leaves=4,
    )


@dataclass(frozen=True)
class Rows:
    """What each leaf of a gate sees of some rows; ``real`` tokens are those that are no padding."""

    seen: tuple[Seen, ...]
    real: Tensor

    def rows(self, rows: Sequence[int]) -> "Rows":
        index = torch.tensor(rows, dtype=torch.long)
        return Rows(tuple(one.of_rows(index) for one in self.seen), self.real[index])

    def columns(self, columns: slice) -> tuple[Seen, ...]:
        return tuple(one[columns] for one in self.seen)

    def with_padding(self, value: float) -> "Rows":
        """The same with ``value`` in all that does not count."""
        return Rows(
            tuple(
                replace(
                    one,
                    f=_filled(one.f, one.counts, value),
                    x=_filled(one.x, one.counts, value),
                    ids=None if one.ids is None else one.ids.masked_fill(~one.counts, 3),
                )
                for one in self.seen
            ),
            self.real,
        )


def _filled(values: Tensor, counts: Tensor, value: float) -> Tensor:
    return values.masked_fill(~counts[..., None], value)


@st.composite
def rows_for(draw: Any, gate: Gate, *, most: int = 3, least: int = 0, longest: int = 10) -> Rows:
    """Random tokens: padding anywhere, special ones that only some leaves count, a prompt of any length."""
    rows, width = draw(st.integers(1, most)), draw(st.integers(least, longest))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    chance = draw(st.sampled_from((0.0, 0.2, 0.6, 1.0)))
    real = torch.rand(rows, width, generator=generator) >= chance * 0.7
    special = torch.rand(rows, width, generator=generator) < chance
    prompt = torch.randint(0, width + 2, (rows, 1), generator=generator)
    places = torch.arange(width).expand(rows, width)
    ids = torch.randint(0, VOCAB, (rows, width), generator=generator)
    seen = []
    for leaf in gate.leaves:
        f = torch.randint(-4, 24, (rows, width, len(leaf.latents)), generator=generator) / 8
        x = torch.randint(-16, 17, (rows, width, D if leaf.width else 0), generator=generator) / 8
        counts = real if leaf.special or bool(torch.rand(1, generator=generator) < 0.3) else real & ~special
        seen.append(Seen(f, x, counts, (places < prompt) & real, places >= prompt - 1, ids))
    return Rows(tuple(seen), real)


def step(gate: Gate, rows: Rows, cuts: Sequence[int] = ()) -> Verdict:
    """The verdicts on all tokens, which come in passes that end at ``cuts``."""
    state: State = gate.begin(len(rows.real), torch.device("cpu"))
    verdicts = []
    edges = [0, *cuts, rows.real.shape[1]]
    for start, stop in zip(edges, edges[1:], strict=False):
        state, verdict = gate.step(state, rows.columns(slice(start, stop)))
        verdicts.append(verdict)
    return Verdict(torch.cat([v.opened for v in verdicts], 1), torch.cat([v.score for v in verdicts], 1))


def slowly(gate: Gate, rows: Rows) -> Verdict:
    """The same by the equations, token by token."""
    shape = rows.real.shape
    opened, score = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.float64)
    for row in range(shape[0]):
        tokens = [_tokens(one, row) for one in rows.seen]
        for t in range(shape[1]):
            said = slow_gates.say(gate, [leaf[: t + 1] for leaf in tokens])
            opened[row, t], score[row, t] = said.opened, said.score
    return Verdict(opened, score)


def _tokens(seen: Seen, row: int) -> list[slow_gates.Token]:
    prompt, ready = seen.prompt, seen.ready
    assert prompt is not None
    assert ready is not None
    ids = torch.zeros_like(ready).long() if seen.ids is None else seen.ids
    columns = (seen.f, seen.x, seen.counts, prompt, ready, ids)
    return [slow_gates.Token(*token) for token in zip(*(column[row].tolist() for column in columns), strict=True)]
