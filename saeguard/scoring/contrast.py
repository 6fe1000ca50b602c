"""Latents that tell two texts apart, or some tokens of a text from the others.

    STA (arXiv 2505.20322)          a = mean over documents of m_d(+) - m_d(-);   q = #{d: m_d > 0}(+) - (-)
                                    chosen: a and q of one sign, both |a| and |q| among the largest;   v = a @ W_dec
    ReasonScore (2503.18878)        u = mean f in the windows of any group of tokens, v = mean f outside of all
                                    p_g = mean f in group g, over its sum over g;   H = -sum_g p_g ln p_g / ln G
                                    s = u / sum_j u * H^alpha - v / sum_j v
    conditional difference          over the pairs of texts behind whose prompt latent i fires:
    (after DSPA, 2603.21461)        mean of m_d(chosen) - m_d(rejected)

The sums over j run over all latents. DSPA's equations are not public: the last one is our reading of its abstract.
"""

import math

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from saeguard.errors import ScoreMismatch
from saeguard.sae import SAE
from saeguard.scoring.statistics import PerText, Statistics
from saeguard.scoring.table import Meaning, ScoreTable

TRIM = 0.65
"""STA's share of latents that each of its two masks drops."""


def sta(
    statistics: Statistics, *, positive: str = "positive", negative: str = "negative", trim: float = TRIM
) -> ScoreTable:
    """STA's differences in activation and in frequency; ``sta`` is the former where both masks pass, NaN elsewhere.

    A mask keeps what is at least as large as entry int((1 - trim) * d_sae), counted from 0, of the sorted sizes.
    """
    p, n = statistics.of(positive), statistics.of(negative)
    act = p.document_sum / p.n_documents - n.document_sum / n.n_documents
    freq = p.document_active / p.n_documents - n.document_active / n.n_documents
    norm = _signed_min_max(freq)
    norm = torch.where(norm.sign() * _signed_min_max(act).sign() > 0, norm, 0.0)
    mask = _largest(norm.abs(), trim) & _largest(act.abs(), trim)
    source = "STA, arXiv 2505.20322"
    nan = torch.tensor(float("nan"), dtype=torch.float64)
    columns = {
        "sta_activation": (act, Meaning("activation units", source)),
        "sta_frequency": (freq, Meaning("share of documents", source)),
        "sta": (torch.where(mask, act, nan), Meaning("activation units", source)),
    }
    return statistics.table("sta", columns, {"positive": positive, "negative": negative}, trim=trim)


def sta_vector(sae: SAE, table: ScoreTable, *, norm: float | None = None) -> Float[Tensor, " d_out"]:
    """The direction that `sta`'s column stands for, rescaled to a length of ``norm`` when one is given.

    The paper takes the length of the difference of mean streams. Raises `ScoreMismatch` for another SAE's table.
    """
    if table.sae_fingerprint != sae.fingerprint():
        raise ScoreMismatch(
            f"the STA vector of {sae.name}", f"the scores are of {table.sae}, whose weights differ", "Score this SAE."
        )
    v = table.column("sta").nan_to_num(0.0) @ sae.W_dec.float().cpu()
    return v if norm is None else v * (norm / torch.linalg.vector_norm(v).clamp(min=1e-30))


def reason(statistics: Statistics, corpus: str = "text", *, alpha: float = 1.0) -> ScoreTable:
    """ReasonScore over the groups of tokens of a text made by `Texts.with_groups`. Raises `ScoreMismatch` without.

    Groups of which the text has no token are left out of G.
    """
    found = statistics.of(corpus)
    there = found.group_tokens > 0
    outside = found.n_tokens - found.grouped_tokens
    if int(there.sum()) < 2 or outside == 0:
        raise ScoreMismatch(
            f"ReasonScore over the text {corpus!r}",
            f"it has tokens of {int(there.sum())} groups, and {outside} outside of all groups",
            "Use texts.with_groups({name: token ids}) with two groups or more that occur in it.",
        )
    entropy = _entropy(found.group_sum[there] / found.group_tokens[there][:, None])
    inside, others = found.grouped_sum / found.grouped_tokens, (found.sum - found.grouped_sum) / outside
    source = "ReasonScore, arXiv 2503.18878"
    columns = {
        "reason": (_share(inside) * entropy**alpha - _share(others), Meaning("difference of shares", source)),
        "reason_entropy": (entropy, Meaning("share of ln G", source)),
    }
    return statistics.table("reason", columns, {"corpus": corpus}, alpha=alpha, groups=list(found.groups))


def conditional_difference(
    statistics: Statistics,
    *,
    chosen: str = "chosen",
    rejected: str = "rejected",
    prompts: str | None = None,
    given: int | None = None,
) -> ScoreTable:
    """Mean difference of per-document means over pairs of texts, those whose prompt makes latent ``given`` fire.

    Document i of the two texts, and of ``prompts``, belong together. Needs ``per_text=True``; raises `ScoreMismatch`.
    """
    plus, minus = statistics.per_text(chosen), statistics.per_text(rejected)
    pairs = (plus.n_tokens > 0) & (minus.n_tokens > 0) if len(plus.n_tokens) == len(minus.n_tokens) else None
    if pairs is not None and prompts is not None and given is not None:
        fires = _fires(statistics.per_text(prompts), given)
        pairs = pairs & fires if len(fires) == len(pairs) else None
    if pairs is None or not bool(pairs.any()):
        raise ScoreMismatch(
            f"differences between {chosen!r} and {rejected!r} where latent {given} fires",
            "they do not have the same number of documents" if pairs is None else "there is no such pair of documents",
            "Give one chosen and one rejected text per prompt.",
        )
    weight = pairs.double() / pairs.sum()
    difference = _weighted(plus, weight, statistics.d_sae) - _weighted(minus, weight, statistics.d_sae)
    corpora = {"chosen": chosen, "rejected": rejected} | ({"prompts": prompts} if prompts is not None else {})
    meaning = Meaning("activation units", "after DSPA, arXiv 2603.21461; the equation is saeguard's")
    return statistics.table(
        "conditional_difference", {"conditional_difference": (difference, meaning)}, corpora, given=given,
        n_pairs=int(pairs.sum()),
    )  # fmt: skip


def _signed_min_max(values: Float64[Tensor, " d_sae"]) -> Float64[Tensor, " d_sae"]:
    """Sizes stretched onto 0..1, with their signs; the smallest becomes 0."""
    size = values.abs()
    return values.sign() * (size - size.min()) / (size.max() - size.min()).clamp(min=1e-300)


def _largest(size: Float64[Tensor, " d_sae"], trim: float) -> Bool[Tensor, " d_sae"]:
    entry = min(int((1 - trim) * len(size)), len(size) - 1)
    return (size >= size.sort(descending=True).values[entry]) & (size > 0)


def _share(values: Float64[Tensor, " d_sae"]) -> Float64[Tensor, " d_sae"]:
    total = values.sum()
    return values / total if float(total) else torch.zeros_like(values)


def _entropy(means: Float64[Tensor, "group d_sae"]) -> Float64[Tensor, " d_sae"]:
    """Of each latent's means over the groups, 1 when they are equal, 0 when it is in one group or in none."""
    total = means.sum(0)
    p = means / torch.where(total > 0, total, 1.0)
    return -torch.special.xlogy(p, p).sum(0) / math.log(len(means))


def _fires(texts: PerText, latent: int) -> Bool[Tensor, " document"]:
    fires = torch.zeros(len(texts.n_tokens), dtype=torch.bool)
    fires[texts.document[(texts.latent == latent) & (texts.sum > 0)]] = True
    return fires


def _weighted(texts: PerText, weight: Float64[Tensor, " document"], d_sae: int) -> Float64[Tensor, " d_sae"]:
    """The sum over documents of weight times mean activation."""
    per_token = (weight / texts.n_tokens.clamp(min=1))[texts.document]
    return torch.bincount(texts.latent, texts.sum.double() * per_token, minlength=d_sae)
