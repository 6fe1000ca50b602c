"""Gates as the equations of their docstrings have them: from the whole row again for every token, in plain numbers.

No state and no tensors: what a gate says at token t is computed from the row's tokens up to t alone. So whatever is
remembered wrongly between passes, counted at padding or taken from another row differs from what is said here.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from saeguard.gates import (
    Always,
    And,
    Blend,
    Cosine,
    Count,
    Cusum,
    Hits,
    Latched,
    LogOdds,
    Not,
    Or,
    Peak,
    PooledHead,
    Probe,
    Rate,
    TopKMean,
    Watch,
    Window,
    Words,
    WordsCusum,
)

NONE = -math.inf
"""The score where there is none."""


class Token(NamedTuple):
    """What one leaf sees of one token."""

    f: Sequence[float]
    x: Sequence[float]
    counts: bool
    prompt: bool
    ready: bool
    id: int = 0


class Said(NamedTuple):
    """A gate at one token; without a score it is neither open nor closed."""

    opened: bool
    score: float

    @property
    def closed(self) -> bool:
        return not self.opened and self.score != NONE


def say(gate: Any, leaves: Sequence[Sequence[Token]]) -> Said:
    """What a gate says at the last token of a row, of which every leaf has seen all tokens."""
    match gate:
        case Always():
            return Said(True, 1.0)
        case Watch():
            return _above(_pooled(gate.pool, gate.evidence, leaves[0]), gate.threshold)
        case PooledHead():
            return _above(_head(gate, leaves[0]), gate.threshold)
        case Cosine():
            return _above(_cosine(gate, leaves[0]), gate.threshold)
        case Words():
            return _above(_words(gate, leaves[0]), gate.threshold)
        case WordsCusum():
            return _above(_words_cusum(gate, leaves[0]), gate.threshold)
        case Blend():
            several = [say(one, mine) for one, mine in zip(gate.gates, _shared(gate.gates, leaves), strict=True)]
            known = all(one.score != NONE for one in several)
            total = sum(w * one.score for w, one in zip(gate.weights, several, strict=True)) if known else NONE
            return _above(total, gate.threshold)
        case Not():
            inner = say(gate.gate, leaves)
            return Said(inner.closed, inner.score)
        case Latched():
            said = [say(gate.gate, [leaf[: t + 1] for leaf in leaves]) for t in range(len(leaves[0]))]
            return Said(any(one.opened for one in said), said[-1].score)
        case And() | Or():
            several = [say(one, mine) for one, mine in zip(gate.gates, _shared(gate.gates, leaves), strict=True)]
            every, some = (all, any) if isinstance(gate, And) else (any, all)
            opened, closed = every(one.opened for one in several), some(one.closed for one in several)
            return Said(opened, 1.0 if opened else 0.0 if closed else NONE)
    raise AssertionError(gate)


def _shared(gates: Sequence[Any], leaves: Sequence[Any]) -> list[Sequence[Any]]:
    found, used = [], 0
    for gate in gates:
        found.append(leaves[used : used + len(gate.leaves)])
        used += len(gate.leaves)
    return found


def _above(score: float, threshold: float) -> Said:
    return Said(score > threshold, score)


def _evidence(evidence: Any, token: Token) -> float:
    match evidence:
        case Hits():
            return 1.0 if any(f > evidence.level for f in token.f) else 0.0
        case LogOdds():
            caps = evidence.caps or [math.inf] * len(token.f)
            f = [min(value, cap) for value, cap in zip(token.f, caps, strict=True)]
            return sum(w * value for w, value in zip(evidence.weights, f, strict=True)) + evidence.bias
        case Probe():
            return sum(w * x for w, x in zip(evidence.weights, token.x, strict=True)) + evidence.bias
    raise AssertionError(evidence)


def _pooled(pool: Any, evidence: Any, row: Sequence[Token]) -> float:
    if pool == Rate("prompt"):
        e = [_evidence(evidence, token) for token in row if token.counts and token.prompt]
        return sum(e) / len(e) if e and row[-1].ready else NONE
    e = [_evidence(evidence, token) for token in row if token.counts]
    return POOLS[type(pool)](pool, e) if e else NONE


def _cusum(pool: Cusum, e: list[float]) -> float:
    found = 0.0
    for one in e:
        found = max(0.0, found + one - pool.drift)
    return found


def _top(pool: TopKMean, e: list[float]) -> float:
    if pool.width is not None:
        e = ([pool.floor] * pool.width + e)[-pool.width :]
    return sum(sorted(e, reverse=True)[: pool.k] + [pool.floor] * (pool.k - len(e))) / pool.k


POOLS: dict[type, Callable[[Any, list[float]], float]] = {
    Rate: lambda pool, e: sum(e) / len(e),
    Window: lambda pool, e: sum(e[-pool.width :]) / pool.width,
    Cusum: _cusum,
    Count: lambda pool, e: sum(e),
    Peak: lambda pool, e: max(e),
    TopKMean: _top,
}


def _head(gate: PooledHead, row: Sequence[Token]) -> float:
    f = [token.f for token in row if token.counts]
    if not f:
        return NONE
    columns = [[token[j] for token in f] for j in range(len(gate.latents))]
    ways: dict[str, Callable[[list[float]], float]] = {
        "count": lambda one: sum(value > 0 for value in one),
        "binary": lambda one: float(any(value > 0 for value in one)),
        "frequency": lambda one: sum(value > 0 for value in one) / len(one),
        "max": max,
        "mean": lambda one: sum(one) / len(one),
    }
    g = [ways[how](column) for how in gate.pooling for column in columns]
    return sum(w * value for w, value in zip(gate.weights, g, strict=True)) + gate.bias


def _words(gate: Words, row: Sequence[Token]) -> float:
    ids = [token.id for token in row if token.counts]
    if not ids:
        return NONE
    single = dict(zip(gate.tokens, zip(gate.weights, gate.squares, strict=True), strict=True))
    pairs = list(zip(gate.pairs[::2], gate.pairs[1::2], strict=True))
    double = dict(zip(pairs, zip(gate.pair_weights, gate.pair_squares, strict=True), strict=True))
    none = (0.0, 0.0)
    found = [
        (single.get(token, none), double.get((ids[place - 1], token), none) if place else none)
        for place, token in enumerate(ids)
    ][-gate.last :]
    q, e = (sum(one[part] + two[part] for one, two in found) for part in (0, 1))
    return q / math.sqrt(max(e, gate.floor))


def _words_cusum(gate: WordsCusum, row: Sequence[Token]) -> float:
    """The largest sum of a run that ends at the last counted token, the empty run included."""
    ids = [token.id for token in row if token.counts]
    if not ids:
        return NONE
    single = dict(zip(gate.tokens, gate.weights, strict=True))
    double = dict(zip(zip(gate.pairs[::2], gate.pairs[1::2], strict=True), gate.pair_weights, strict=True))
    e = [single.get(token, 0.0) + (double.get((ids[place - 1], token), 0.0) if place else 0.0) - gate.drift
         for place, token in enumerate(ids)]  # fmt: skip
    return max(sum(e[start:]) for start in range(len(e) + 1))


def _cosine(gate: Cosine, row: Sequence[Token]) -> float:
    x = [token.x for token in row if token.counts and token.prompt]
    if not x or not row[-1].ready:
        return NONE
    c, m = gate.direction, [sum(column) / len(x) for column in zip(*x, strict=True)]
    share = _dot(c, m) / _dot(c, c)
    along = [math.tanh(one * share) for one in c]
    lengths = math.sqrt(_dot(m, m)) * math.sqrt(_dot(along, along))
    return _dot(m, along) / lengths if lengths else 0.0


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True))
