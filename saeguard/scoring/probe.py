"""How much a latent's count tells one kind of text from another (MOSAIC, arXiv 2502.11367).

    counts c_ij     on how many tokens of text i latent j is among the n largest; a latent that is 0 is not
    mosaic_count    sum_i c_ij over the positive texts, per token
    mosaic_mean     (mean of z over the positive texts - over the negative ones) / standard deviation over all
    mosaic_probe    w_j of p(positive | z) = sigmoid(w z / deviation + b) where log losses + |w|^2 / (2 c) are least

z is c_ij over the text's tokens, or with ``binary`` 1[c_ij > 0]. A latent that no text has, or that is the same in all,
is NaN. A probe says what texts have in common, not what their topic is: try it on other texts before a gate uses it.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from saeguard.errors import ScoreMismatch
from saeguard.scoring.statistics import PerText, Statistics
from saeguard.scoring.table import Meaning, ScoreTable

STEPS = 200
"""Most steps of the optimiser; the loss is convex and small ones need a few dozen."""
SOURCE = "MOSAIC, arXiv 2502.11367"


def mosaic(
    statistics: Statistics,
    *,
    positive: str = "positive",
    negative: str = "negative",
    binary: bool = False,
    c: float = 1.0,
) -> ScoreTable:
    """Counts among the top n, standardised difference of means, and weights of a logistic probe.

    Needs ``per_text=True``. Raises `ScoreMismatch` when either text has no document with tokens.
    """
    pair = [statistics.per_text(positive), statistics.per_text(negative)]
    if any(not bool((texts.n_tokens > 0).any()) for texts in pair):
        raise ScoreMismatch("a probe of two kinds of text", "one of them has no document with tokens", "Give some.")
    z, label = _counts(pair, statistics.d_sae, binary)
    document, latent = z.indices()
    n = len(label)
    total, square, held = (
        torch.bincount(latent, value, minlength=statistics.d_sae)
        for value in (z.values(), z.values().square(), z.values() * label[document])
    )
    deviation = (square / n - (total / n).square()).clamp(min=0).sqrt()
    nan = torch.full((statistics.d_sae,), float("nan"), dtype=torch.float64)
    deviation = torch.where(deviation > 1e-6 * (square / n).sqrt(), deviation, nan)  # the same in all, but for rounding
    difference = held / label.sum() - (total - held) / (n - label.sum())
    used = deviation.isfinite().nonzero()[:, 0]
    weights = _logistic(z.index_select(1, used), deviation[used], label, c)
    found, unit = statistics.of(positive), "standard deviations"
    columns = {
        "mosaic_count": (found.top / found.n_tokens, Meaning("share of tokens", SOURCE)),
        "mosaic_mean": (difference / deviation, Meaning(unit, SOURCE)),
        "mosaic_probe": (nan.index_put((used,), weights), Meaning("log odds per standard deviation", SOURCE)),
    }
    return statistics.table("mosaic", columns, {"positive": positive, "negative": negative}, binary=binary, c=c)


def _counts(pair: list[PerText], d_sae: int, binary: bool) -> tuple[Tensor, Float64[Tensor, " document"]]:
    """z as a sparse matrix, documents without tokens left out, and the label of every document."""
    documents, latents, values, labels, offset = [], [], [], [], 0
    for label, texts in zip((1.0, 0.0), pair, strict=True):
        there = texts.n_tokens > 0
        number = there.cumsum(0) - 1 + offset
        counted = texts.top > 0
        document = texts.document[counted]
        share = texts.top[counted].double() / texts.n_tokens[document]
        documents.append(number[document])
        latents.append(texts.latent[counted])
        values.append(torch.ones_like(share) if binary else share)
        labels.append(torch.full((int(there.sum()),), label, dtype=torch.float64))
        offset += int(there.sum())
    places = torch.stack([torch.cat(documents), torch.cat(latents)])
    z = torch.sparse_coo_tensor(places, torch.cat(values), (offset, d_sae), check_invariants=True)
    return z.coalesce(), torch.cat(labels)


def _logistic(
    z: Tensor, deviation: Float64[Tensor, " latent"], label: Float64[Tensor, " document"], c: float
) -> Float64[Tensor, " latent"]:
    """The weights at which the penalised log loss is least; the intercept is free."""
    w = torch.zeros(len(deviation), dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    steps = torch.optim.LBFGS([w, b], max_iter=STEPS, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> float:
        steps.zero_grad()
        logits = torch.sparse.mm(z, (w / deviation)[:, None])[:, 0] + b
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, label, reduction="sum")
        value = value + w.square().sum() / (2 * c)
        value.backward()
        return float(value.detach())

    with torch.enable_grad():
        steps.step(loss)
    return w.detach()
