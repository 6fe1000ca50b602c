"""Topic similarity: a latent is about a topic when the prompts that excite it mean much the same as the topic's texts.

IBM's score (arXiv 2506.12576, section 3), with z_ij the summed activation of latent j on reference prompt i:

    z_i <- z_i / sum_j z_ij                         every prompt weighs the same
    d_i = min over aligned texts a of |E(ref_i) - E(a)|
    s_j = sum_i d_i^2 z_ij / sum_i z_ij             mean squared distance, weighted by activation
    score_j = 1 - (s_j - min s) / (max s - min s)   over the latents that fired; the others get 0, or NaN
    coverage = share of the latents that fired on a reference prompt

E are unit vectors (`saeguard.scoring.sentences`). The paper also takes the largest activation or the number of firing
tokens for z. With opposed texts there is a contrast: the score for the aligned texts less that for the opposed ones.
Where explanations are at hand, `label_similarity` compares them with a query instead: the cosine of E.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from saeguard.engines.layouts import Layout
from saeguard.errors import NotSliceable, ScoreMismatch
from saeguard.sae import SAE
from saeguard.scoring.accumulators import LATENTS, TOKENS, fired, pieces
from saeguard.scoring.cache import Cache
from saeguard.scoring.labels import Label
from saeguard.scoring.reading import SiteReader
from saeguard.scoring.sentences import Embedder, embed, fingerprint, name_of
from saeguard.scoring.statistics import BATCH, Progress, Statistics
from saeguard.scoring.table import Meaning, ScoreTable
from saeguard.scoring.texts import Texts
from saeguard.tokens import is_special

SOURCE = "Topic alignment, arXiv 2506.12576"
PASSAGE = 150
"""Words; about what an embedder with 256 word pieces reads of a text."""

Weighing = Literal["sum", "maximum", "count"]


def topic(
    statistics: Statistics,
    reference: Sequence[str],
    aligned: Sequence[str],
    *,
    embedder: Embedder,
    opposed: Sequence[str] = (),
    corpus: str = "reference",
    z: Tensor | None = None,
    dead: float = 0.0,
    cache: Cache | None = None,
    name: str = "topic",
) -> ScoreTable:
    """The score of every latent for the topic of ``aligned``: column ``name``, its s as ``name``_distance, and
    as ``name``_texts on how many reference texts it fires: a score that rests on one or two of them is mostly luck.

    ``reference`` are the texts of ``corpus``, which was gathered with ``per_text=True``; ``z`` takes the place of its
    sums (see `weigh`). ``opposed`` texts add the columns ``name``_opposed and ``name``_contrast. ``dead`` is the score
    of latents that did not fire, which have no distance. Raises `ScoreMismatch`.
    """
    d_sae = statistics.d_sae
    z = statistics.per_text(corpus).matrix("sum", d_sae) if z is None else z
    if tuple(z.shape) != (len(reference), d_sae):
        raise ScoreMismatch(
            f"topic similarity by the text {corpus!r}",
            f"there are {len(reference)} reference texts, and activations of shape {tuple(z.shape)}",
            "Give the texts that the statistics were gathered over, one document each.",
        )
    references = embed(embedder, reference, cache=cache)
    d = distances(references, embed(embedder, aligned, cache=cache))
    s, score = mean_distance(z, d), topic_score(z, d, dead=dead)
    columns = {
        name: (score, Meaning("similarity, 0 to 1 within the SAE", SOURCE)),
        f"{name}_distance": (s, Meaning("squared distance of unit vectors", SOURCE, higher=False)),
    }
    entries = z if z.is_sparse else z.to_sparse()
    fires = torch.bincount(entries.coalesce().indices()[1, entries.coalesce().values() > 0], minlength=d_sae)
    columns[f"{name}_texts"] = (fires, Meaning("reference texts on which it fires", SOURCE))
    if opposed:
        other = topic_score(z, distances(references, embed(embedder, opposed, cache=cache)), dead=dead)
        columns[f"{name}_opposed"] = (other, Meaning("similarity, 0 to 1 within the SAE", SOURCE, higher=False))
        columns[f"{name}_contrast"] = (score - other, Meaning("difference of similarities", SOURCE))
    given = {"reference": reference, "aligned": aligned, "opposed": opposed}
    return statistics.table(
        "topic", columns, {"reference": corpus}, embedder=name_of(embedder), coverage=coverage(z), dead=repr(dead),
        topic_texts={role: {"n": len(texts), "fingerprint": fingerprint(texts)} for role, texts in given.items()},
    )  # fmt: skip


def topic_score(
    z: Float[Tensor, "text d_sae"], d: Float[Tensor, " text"], *, dead: float = 0.0
) -> Float64[Tensor, " d_sae"]:
    """The score for activations ``z``, dense or sparse, and distances ``d``; ``dead`` where ``z`` is zero throughout.

    Raises `ScoreMismatch` when all of them are equally far, so that there is nothing to tell apart.
    """
    return stretched(mean_distance(z, d), dead=dead)


def stretched(s: Float64[Tensor, " d_sae"], *, dead: float = 0.0) -> Float64[Tensor, " d_sae"]:
    """1 for the smallest s and 0 for the largest, ``dead`` for NaN.

    The smallest and largest s are taken over the latents that fired: one NaN among them would make every score NaN.
    Raises `ScoreMismatch` when all of them are equally far.
    """
    live = s[~s.isnan()]
    if len(live) == 0 or float(live.max() - live.min()) <= 1e-12 * float(live.max()):
        raise ScoreMismatch(
            "topic similarity by reference texts",
            "no latent fires on them" if len(live) == 0 else f"all {len(live)} latents that fire are equally far",
            "Give more, and more different, reference texts.",
        )
    score = 1 - (s - live.min()) / (live.max() - live.min())
    return torch.where(s.isnan(), dead, score)


def mean_distance(z: Float[Tensor, "text d_sae"], d: Float[Tensor, " text"]) -> Float64[Tensor, " d_sae"]:
    """s, the weighted mean of squared distances; NaN for latents that fired on no text.

    Activations below zero, which some kinds have, count as none. A text on which nothing fires has no weight.
    """
    if tuple(d.shape) != (z.shape[0],):
        raise ScoreMismatch(
            "topic similarity", f"there are {z.shape[0]} texts and distances of shape {tuple(d.shape)}",
            "Give one distance per text.",
        )  # fmt: skip
    entries = normalised(z)
    (text, latent), weight = entries.indices(), entries.values()
    above = torch.bincount(latent, weight * d.double().square()[text], minlength=z.shape[1])
    below = torch.bincount(latent, weight, minlength=z.shape[1])
    return (above / torch.where(below > 0, below, float("nan"))).double()  # bincount of nothing is float32


def normalised(z: Float[Tensor, "text d_sae"]) -> Float64[Tensor, "text d_sae"]:
    """z as a sparse matrix in which every text on which something fires has the same weight, nothing below zero."""
    entries = (z if z.is_sparse else z.to_sparse()).coalesce()
    weight = entries.values().double().clamp(min=0)
    text = entries.indices()[0]
    total = torch.bincount(text, weight, minlength=z.shape[0])
    weight = weight / torch.where(total > 0, total, 1.0)[text]
    return torch.sparse_coo_tensor(entries.indices(), weight, z.shape, is_coalesced=True, check_invariants=True)


def coverage(z: Float[Tensor, "text d_sae"]) -> float:
    """The share of latents that fired on some text; the paper's measure of how sure the score is."""
    entries = (z if z.is_sparse else z.to_sparse()).coalesce()
    return len(entries.indices()[1, entries.values() > 0].unique()) / z.shape[1]


def distances(
    references: Float[Tensor, "text width"], aligned: Float[Tensor, "others width"]
) -> Float64[Tensor, " text"]:
    """Per reference, the distance to the closest of the aligned texts."""
    far = torch.cdist(references.double(), aligned.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return far.min(dim=1).values


def passages(texts: Sequence[str], *, words: int = PASSAGE) -> list[str]:
    """Long texts cut into passages: an embedder reads only a text's beginning, and the closest passage decides."""
    split = [text.split() for text in texts]
    return [" ".join(found[low : low + words]) for found in split for low in range(0, len(found), words)]


def weigh(
    model: nn.Module, sae: SAE, texts: Texts, *, by: Weighing = "sum", batch_rows: int = BATCH,
    progress: Progress | None = None, layout: Layout | None = None,
) -> Float[Tensor, "document d_sae"]:  # fmt: skip
    """z as a sparse matrix: per document the sum of activations, the largest one, or on how many tokens it fires.

    The sums are those of `gather` with ``per_text=True``, which is what to use for them. Raises `NotSliceable`, and
    what `SiteReader` raises.
    """
    if sae.held is not None:
        raise NotSliceable(
            f"activations of all {sae.d_sae} latents of {sae.name}", f"only {len(sae.held)} of them were read",
            "Load it without latents=...",
        )  # fmt: skip
    reader = SiteReader(model, sae, layout=layout)
    parts = pieces(sae.to(device=reader.device), LATENTS)
    special = torch.tensor(sorted(reader.engine.special_ids() | set(sae.manifest.get("special_ids", ()))))
    keys, values = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.float64)]
    for batch in texts.batches(batch_rows):
        kept = batch.kept & ~is_special(batch.ids, special.long())
        x = reader.read(batch.ids)[kept.to(reader.device)]
        document = batch.document[kept.nonzero()[:, 0]]
        for low in range(0, len(x), TOKENS):
            for found in fired(parts, x[low : low + TOKENS]):
                found = found.keep(found.value > 0)
                key = document[low : low + TOKENS][found.token] * sae.d_sae + found.latent
                key, value = _fold(key, torch.ones_like(found.value) if by == "count" else found.value, by)
                keys.append(key)
                values.append(value)
        if progress is not None:
            progress(batch.rows.stop, len(texts.ids))
    key, value = _fold(torch.cat(keys), torch.cat(values), by)
    return torch.sparse_coo_tensor(
        torch.stack([key // sae.d_sae, key % sae.d_sae]), value.float(), (texts.n_documents, sae.d_sae),
        check_invariants=True,
    ).coalesce()  # fmt: skip


def label_similarity(
    sae: SAE,
    labels: Sequence[Label],
    query: str | Sequence[str],
    *,
    embedder: Embedder,
    cache: Cache | None = None,
    name: str = "label_similarity",
) -> ScoreTable:
    """Cosine of a query and a latent's label, the best pair where there are several; NaN for latents without a label.

    Raises `LatentOutOfRange` for a label of a latent that the SAE does not have, `ScoreMismatch` without labels.
    """
    queries = [query] if isinstance(query, str) else list(query)
    sae.check_range(sae.name, sae.d_sae, sorted({label.latent for label in labels}))
    vectors = embed(embedder, [label.text for label in labels], cache=cache)
    cosine = (vectors @ embed(embedder, queries).T).max(dim=1).values
    column = torch.full((sae.d_sae,), float("-inf"))
    column.scatter_reduce_(0, torch.tensor([label.latent for label in labels]), cosine, "amax")
    column = torch.where(column.isinf(), float("nan"), column)
    return ScoreTable.of(
        sae, {name: (column, Meaning("cosine", "Similarity of an explanation and a query"))},
        score="label_similarity", embedder=name_of(embedder), queries=queries, n_labels=len(labels),
        sources=sorted({label.source for label in labels}), labels=fingerprint([label.text for label in labels]),
    )  # fmt: skip


def _fold(key: Tensor, value: Float64[Tensor, " n"], by: Weighing) -> tuple[Tensor, Float64[Tensor, " m"]]:
    """Each key once, with the sum or the largest of its values."""
    distinct, place = key.unique(return_inverse=True)
    into = torch.zeros(len(distinct), dtype=torch.float64)
    return distinct, into.scatter_reduce_(0, place, value, "amax" if by == "maximum" else "sum")
