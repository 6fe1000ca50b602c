"""Latents that fire on what is to be forgotten and not on what is to be kept.

    DSG (arXiv 2504.08192)   I_F, I_R: importance on the forget and the retain text, in one of four readings
                             r = I_F / (I_R + eps);   chosen: r >= percentile(r, p), then the largest I_F
    Farrell (2410.19278)     s_F, s_R: share of tokens on which the latent fires
                             chosen: s_R < threshold and s_F > 0, then the largest s_F
    CRISP (2508.13650)       delta = c_F - c_R (tokens on which it fires);   rho = A_F / (A_R + 1) (sums of f)
                             chosen: among the largest delta those with rho >= 3, then the largest delta

The paper of DSG says mean square and its code squares the mean; both are here. A latent that never fires on the retain
text has a ratio of I_F / eps and passes any percentile, however rarely it fires: ``floor`` asks for a frequency.
Each chosen column is NaN for latents that a rule rejects, so that ``table.ranked(column)[:n]`` is the selection.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from saeguard.scoring.statistics import CorpusStatistics, Statistics
from saeguard.scoring.table import Meaning, ScoreTable

Importance = Literal["squared_mean", "mean_square", "document", "frequency"]
EPSILON = 1e-21
"""DSG's, in squared activation units."""


def importance(found: CorpusStatistics, reading: Importance) -> Float64[Tensor, " d_sae"]:
    """Importance of every latent on one text, in squared activation units; ``frequency`` is a share of tokens.

    ``squared_mean`` (sum f / T)^2, ``mean_square`` sum f^2 / T, ``document`` the mean over documents of m_d^2.
    """
    if reading == "frequency":
        return found.frequency
    if reading == "document":
        return found.document_sq / found.n_documents
    return found.mean.square() if reading == "squared_mean" else found.sum_sq / found.n_tokens


def dsg(
    statistics: Statistics,
    *,
    forget: str = "forget",
    retain: str = "retain",
    reading: Importance = "squared_mean",
    ratio_percentile: float = 95.0,
    forget_percentile: float = 5.0,
    floor: float = 0.0,
    epsilon: float = EPSILON,
) -> ScoreTable:
    """DSG's importance on both texts, their ratio, and the selection in the column ``dsg``.

    ``floor`` is the share of forget tokens that a latent must fire on to be chosen; it does not move the percentiles.
    """
    f, r = statistics.of(forget), statistics.of(retain)
    ours, theirs = importance(f, reading), importance(r, reading)
    ratio = ours / (theirs + epsilon)
    passes = _at_least(ratio, ratio_percentile) & _at_least(ours, forget_percentile) & (f.frequency >= floor)
    unit = "share of tokens" if reading == "frequency" else "squared activation units"
    source = f"DSG, arXiv 2504.08192, {reading}"
    columns = {
        "forget_importance": (ours, Meaning(unit, source)),
        "retain_importance": (theirs, Meaning(unit, source, higher=False)),
        "dsg_ratio": (ratio, Meaning("ratio", source)),
        "dsg": (_where(passes, ours), Meaning(f"{unit} on the forget text", source)),
    }
    return statistics.table(
        "dsg", columns, {"forget": forget, "retain": retain}, reading=reading, ratio_percentile=ratio_percentile,
        forget_percentile=forget_percentile, floor=floor, epsilon=epsilon,
    )  # fmt: skip


def farrell(
    statistics: Statistics, *, forget: str = "forget", retain: str = "retain", retain_threshold: float = 0.01
) -> ScoreTable:
    """Frequencies on both texts, and in the column ``farrell`` that of latents rare enough on the retain text."""
    ours, theirs = statistics.of(forget).frequency, statistics.of(retain).frequency
    unit, source = "share of tokens", "Farrell et al., arXiv 2410.19278"
    columns = {
        "forget_frequency": (ours, Meaning(unit, source)),
        "retain_frequency": (theirs, Meaning(unit, source, higher=False)),
        "farrell": (_where((theirs < retain_threshold) & (ours > 0), ours), Meaning(f"{unit} to forget", source)),
    }
    return statistics.table("farrell", columns, {"forget": forget, "retain": retain}, retain_threshold=retain_threshold)


def crisp(
    statistics: Statistics,
    *,
    target: str = "forget",
    benign: str = "retain",
    least_ratio: float = 3.0,
    candidates: int = 10_000,
) -> ScoreTable:
    """CRISP's two numbers, and the selection in the column ``crisp``. Give texts of about one length: delta counts."""
    t, b = statistics.of(target), statistics.of(benign)
    delta, rho = t.active - b.active, t.sum / (b.sum + 1)
    first = torch.zeros(statistics.d_sae, dtype=torch.bool)
    first[delta.argsort(descending=True, stable=True)[:candidates]] = True
    source = "CRISP, arXiv 2508.13650"
    columns = {
        "crisp_delta": (delta, Meaning("tokens", source)),
        "crisp_rho": (rho, Meaning("ratio", source)),
        "crisp": (_where(first & (rho >= least_ratio), delta), Meaning("tokens", source)),
    }
    return statistics.table(
        "crisp", columns, {"target": target, "benign": benign}, least_ratio=least_ratio, candidates=candidates
    )


def _at_least(values: Float64[Tensor, " d_sae"], percentile: float) -> Bool[Tensor, " d_sae"]:
    """Which values reach the percentile of all of them, interpolated between neighbours."""
    ordered = values.sort().values
    place = (len(ordered) - 1) * percentile / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return values >= ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _where(passes: Bool[Tensor, " d_sae"], values: Float64[Tensor, " d_sae"]) -> Float64[Tensor, " d_sae"]:
    return torch.where(passes, values, torch.tensor(float("nan"), dtype=torch.float64))
