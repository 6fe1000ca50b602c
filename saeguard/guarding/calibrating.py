"""From scores of harmless rows to a threshold, with what it promises and how surely.

A row fires when its score is above the threshold. With s_(1) <= ... <= s_(n) the calibration scores,

    percentile   numpy's percentile with linear interpolation, as DSG has it (arXiv 2504.08192): promises nothing
    conformal    s_(r) with r = ceil((n + 1)(1 - level)): a new row of the same kind fires with probability <= level
                 (split conformal prediction, Vovk et al. 2005; Angelopoulos and Bates 2021, section 1)
    certain      s_(r) with the least r for which P[Binomial(n, level) <= n - r] <= 1 - confidence: with that confidence
                 over calibration sets, the share of new rows that fire is at most level (tolerance limits, Wilks 1941)

and a level that n rows cannot support is refused, with the n that could.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from saeguard.errors import CalibrationRefused

Method = Literal["percentile", "conformal", "certain"]


@dataclass(frozen=True)
class Threshold:
    """``value`` is what a gate's score has to be above; ``n`` rows were harmless, ``above`` of them lie above it.

    ``low`` and ``high`` bound the false-positive rate at ``confidence`` (Clopper and Pearson), as if the threshold had
    been fixed beforehand: read them on rows that it was not chosen on.
    """

    value: float
    method: Method
    level: float
    n: int
    above: int
    low: float
    high: float
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """For a policy's calibration."""
        return asdict(self)


def threshold(
    scores: Sequence[float], *, level: float = 0.01, method: Method = "certain", confidence: float = 0.95
) -> Threshold:
    """A threshold that at most a share ``level`` of harmless rows is above. Raises `CalibrationRefused`."""
    given = np.asarray(list(scores), dtype=np.float64)
    _check(given, level, confidence)
    n, ordered = len(given), np.sort(given)
    if method == "percentile":
        value = float(np.percentile(given, 100 * (1 - level)))
    else:
        rank = _conformal_rank(n, level) if method == "conformal" else _certain_rank(n, level, confidence)
        value = float(ordered[rank - 1])
    if not math.isfinite(value):
        raise CalibrationRefused(
            f"a threshold from {n} harmless rows", "the row at that rank has no score", "Give rows that the gate reads."
        )
    above = int((given > value).sum())
    low, high = interval(above, n, confidence)
    return Threshold(value, method, level, n, above, low, high, confidence)


def rate(scores: Sequence[float], value: float, *, confidence: float = 0.95) -> dict[str, float]:
    """Share of rows above ``value``, with its interval: on other rows than those that ``value`` was chosen on."""
    given = np.asarray(list(scores), dtype=np.float64)
    above, n = int((given > value).sum()), len(given)
    low, high = interval(above, n, confidence)
    return {"share": above / n if n else math.nan, "n": n, "above": above, "low": low, "high": high}


def interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's interval for a share of which ``k`` of ``n`` were seen (Biometrika 1934)."""
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else _solve(lambda p: 1 - _binomial(k - 1, n, p) - tail, rising=True)
    high = 1.0 if k == n else _solve(lambda p: _binomial(k, n, p) - tail, rising=False)
    return low, high


def _conformal_rank(n: int, level: float) -> int:
    rank = math.ceil((n + 1) * (1 - level) - 1e-9)
    if rank > n:
        raise _too_few(n, math.ceil(1 / level - 1 - 1e-9), f"a false-positive rate of {level:.2%}")
    return rank


def _certain_rank(n: int, level: float, confidence: float) -> int:
    """The least r; P falls as r rises."""
    if _binomial(0, n, level) > 1 - confidence:
        least = math.ceil(math.log(1 - confidence) / math.log1p(-level))
        raise _too_few(n, least, f"a false-positive rate of {level:.2%} with {confidence:.0%} confidence")
    above = 0
    while _binomial(above + 1, n, level) <= 1 - confidence:
        above += 1
    return n - above


def _binomial(k: int, n: int, p: float) -> float:
    """P[Binomial(n, p) <= k]."""
    if p <= 0 or p >= 1:
        return 1.0 if p <= 0 or k >= n else 0.0
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(k + 1)
    ]
    return min(1.0, math.fsum(math.exp(one) for one in logs))


def _solve(function: Any, *, rising: bool) -> float:
    """Where a monotone function of a share is 0, by halving."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if (function(middle) > 0) == rising else (middle, high)
    return (low + high) / 2


def _check(scores: np.ndarray, level: float, confidence: float) -> None:
    if not 0 < level < 1 or not 0 < confidence < 1:
        raise CalibrationRefused(
            f"a level of {level} with confidence {confidence}", "both are shares between 0 and 1", "Give such as 0.01."
        )
    if not len(scores) or np.isnan(scores).any() or np.isposinf(scores).any():
        found = "there are none" if not len(scores) else "some are NaN or infinite"
        raise CalibrationRefused("a threshold from scores", found, "Give the finite scores of harmless rows.")


def _too_few(n: int, least: int, what: str) -> CalibrationRefused:
    return CalibrationRefused(
        f"{what} from {n} harmless rows", "so few rows cannot support it", f"Give at least {least}, or a higher level."
    )
