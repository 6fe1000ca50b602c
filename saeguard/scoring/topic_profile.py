"""What every latent is about, as one vector each, so that topics are searched without any corpus at hand.

    z_ij <- z_ij / sum_j z_ij                                   as in `saeguard.scoring.topic`
    m_j  =  sum_i z_ij E_i / sum_i z_ij                         the profile: 384 numbers per latent
    s_j  =  sum_i z_ij |E_i - E_a|^2 / sum_i z_ij  =  2 - 2 m_j . E_a          as E are unit vectors

IBM's topic similarity (arXiv 2506.12576, section 3) for one text a is therefore exact from the profile and E_a alone,
up to the float16 that profiles are kept in. For several texts the paper takes the closest one per reference text; here
it is the closest one per latent, s_j = min_a (2 - 2 m_j . E_a), which is never below the published number.

    centred    max_a (m_j - mean_j m) . u_a     u_a the direction of E_a - mean_i E
    cosine     max_a cos(m_j - mean_j m, u_a)

All texts have something in common, and so do a query and all of them. The centred column takes that out: it says how
much nearer to the topic a latent's texts are than texts in general. The cosine asks for the direction alone, and so
also finds latents that are only a little about anything. A latent that fires on one or two reference texts has their
topic by luck: ``topic_texts`` counts them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from saeguard import strict_json
from saeguard.archives import open_archive
from saeguard.errors import BrokenFile, ScoreMismatch, UnsupportedFormat
from saeguard.loaders import shipped
from saeguard.sae import SAE
from saeguard.scoring.cache import Cache
from saeguard.scoring.sentences import Embedder, embed, fingerprint, name_of
from saeguard.scoring.statistics import Statistics
from saeguard.scoring.table import Meaning, ScoreTable
from saeguard.scoring.topic import SOURCE, coverage, normalised, passages, stretched

FILE = "topics.safetensors"
SCHEMA = 1
FLOOR = 3
"""Reference texts on which a latent has to fire for a search to trust its profile."""
CENTRED = "similarity above that of texts in general"
SHORTEST = 8
"""Words of a reference passage, at least."""


@dataclass(frozen=True, eq=False)
class TopicProfile:
    """``mean`` has m_j, zeros for latents that fire on no reference text; ``texts`` on how many each fires;
    ``reference`` the mean embedding of all reference texts. ``provenance`` says in plain JSON values what it is of."""

    sae: str
    sae_fingerprint: str
    embedder: str
    mean: Float[Tensor, "d_sae width"]
    texts: Int[Tensor, " d_sae"]
    reference: Float[Tensor, " width"]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        found = tuple(tuple(part.shape) for part in (self.mean, self.texts, self.reference))
        rows, width = self.mean.shape
        if found != ((rows, width), (rows,), (width,)) or not bool(torch.isfinite(self.mean).all()):
            raise ScoreMismatch(
                f"the topic profile of {self.sae}", f"its parts are shaped {found}, or are not finite",
                "Give a finite vector and a count per latent, and one vector of the reference texts.",
            )  # fmt: skip

    def check(self, sae: SAE) -> None:
        """Raise `ScoreMismatch` unless this is a profile of ``sae``."""
        if sae.fingerprint() != self.sae_fingerprint:
            raise ScoreMismatch(
                f"the topic profile of {self.sae} for {sae.name}",
                "the weights differ, so latent numbers do not mean the same",
                "Make one with `saeguard latents profile`.",
            )

    def scores(self, texts: Sequence[str], *, embedder: Embedder, name: str = "topic", dead: float = 0.0) -> ScoreTable:
        """The columns ``name``, its s as ``name``_distance, ``name``_centred, ``name``_cosine, and ``name``_texts.

        ``dead`` is the score of latents that fire on no reference text; their other columns are NaN. Raises
        `ScoreMismatch` for an embedder other than the one that the profile was made with.
        """
        if name_of(embedder) != self.embedder:
            raise ScoreMismatch(
                f"topics of {self.sae} by the embedder {name_of(embedder)}",
                f"its profile was made with {self.embedder}", "Use that one, or make another profile.",
            )  # fmt: skip
        queries, mean, fires = embed(embedder, texts).double(), self.mean.double(), self.texts > 0
        silent = torch.where(fires, 0.0, float("nan")).double()
        s = (2 - 2 * mean @ queries.T).amin(1) + silent
        centred, cosine = self._centred(queries)
        columns = {
            name: (stretched(s, dead=dead), Meaning("similarity, 0 to 1 within the SAE", SOURCE)),
            f"{name}_distance": (s, Meaning("squared distance of unit vectors", SOURCE, higher=False)),
            f"{name}_centred": (centred + silent, Meaning(CENTRED, "after " + SOURCE)),
            f"{name}_cosine": (cosine + silent, Meaning("cosine", "after " + SOURCE)),
            f"{name}_texts": (self.texts, Meaning("reference texts on which it fires", SOURCE)),
        }
        made = {**self.provenance, "score": "topic_profile", "embedder": self.embedder, "aligned": fingerprint(texts)}
        return ScoreTable(
            self.sae, self.sae_fingerprint, len(self.mean),
            {name: column.float() for name, (column, _) in columns.items()},
            {name: meaning for name, (_, meaning) in columns.items()}, dict.fromkeys(columns, made),
        )  # fmt: skip

    def _centred(self, queries: Float[Tensor, "text width"]) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
        """The best product of a latent and a query once what all have in common is taken out, and the best cosine."""
        mean, unit = self.mean.double(), lambda x: torch.nn.functional.normalize(x, dim=-1)
        apart, directions = mean - mean[self.texts > 0].mean(0), unit(queries - self.reference.double())
        return (apart @ directions.T).amax(1), (unit(apart) @ directions.T).amax(1)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, vectors as float16, whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        meta = {"schema": SCHEMA, "sae": self.sae, "sae_fingerprint": self.sae_fingerprint, "embedder": self.embedder,
                "provenance": dict(self.provenance)}  # fmt: skip
        tensors = {"mean": self.mean.half(), "texts": self.texts.int(), "reference": self.reference.float()}
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        try:
            save_file({name: part.contiguous() for name, part in tensors.items()}, partial,
                      metadata={"saeguard_topics": json.dumps(meta, sort_keys=True)})  # fmt: skip
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    @classmethod
    def load(cls, source: str | Path, *, sae: SAE | None = None) -> "TopicProfile":
        """Read the profile beside a shipped SAE, in a folder, or from a file.

        Raises `UnsupportedFormat` when there is none, `BrokenFile`, and `ScoreMismatch` when it is not of ``sae``.
        """
        path = _find(source)
        archive = open_archive(path)
        try:
            meta = strict_json.parse(archive.values["saeguard_topics"])
            if meta["schema"] != SCHEMA:
                raise ValueError(f"schema {meta['schema']!r}")
            parts = {name: archive.read(name).clone() for name in ("mean", "texts", "reference")}
            found = cls(meta["sae"], meta["sae_fingerprint"], meta["embedder"], **parts, provenance=meta["provenance"])
        except (KeyError, TypeError, ValueError, ScoreMismatch) as error:
            raise BrokenFile(
                f"topic profile {path.name}", f"{type(error).__name__}: {error}", "Fetch or make it again."
            ) from error
        if sae is not None:
            found.check(sae)
        return found


def topic_profile(
    statistics: Statistics,
    reference: Sequence[str],
    *,
    embedder: Embedder,
    corpus: str = "reference",
    cache: Cache | None = None,
    **provenance: Any,
) -> TopicProfile:
    """The profile of every latent from ``reference``: the texts of ``corpus``, which was gathered with per_text=True.

    Raises `ScoreMismatch` when there is another number of texts, or when no latent fires on them.
    """
    z = statistics.per_text(corpus).matrix("sum", statistics.d_sae)
    if len(reference) != z.shape[0]:
        raise ScoreMismatch(
            f"a topic profile by the text {corpus!r}",
            f"there are {len(reference)} reference texts, and activations of {z.shape[0]} documents",
            "Give the texts that the statistics were gathered over, one document each.",
        )
    weights = normalised(z)
    (_, latent), weight = weights.indices(), weights.values()
    below = torch.bincount(latent, weight, minlength=statistics.d_sae).double()
    if not bool((below > 0).any()):
        raise ScoreMismatch(f"a topic profile by the text {corpus!r}", "no latent fires on it", "Give other texts.")
    vectors = embed(embedder, reference, cache=cache).double()
    mean = torch.sparse.mm(weights.T.coalesce(), vectors) / torch.where(below > 0, below, 1.0)[:, None]
    made = {
        "model": statistics.model, **statistics.settings, "n_texts": len(reference), "texts": fingerprint(reference),
        "n_tokens": statistics.of(corpus).n_tokens, "coverage": coverage(z), **provenance,
    }  # fmt: skip
    return TopicProfile(
        statistics.sae, statistics.sae_fingerprint, name_of(embedder), mean.half(),
        torch.bincount(latent[weight > 0], minlength=statistics.d_sae), vectors.mean(0).float(), made,
    )  # fmt: skip


def draw_passages(documents: Sequence[Sequence[str]], n: int, *, words: int = 60, seed: int = 0) -> list[str]:
    """At most ``n`` passages of at most ``words`` words, drawn evenly from several lists of documents.

    A list that has fewer than its share leaves the rest to the others; passages of fewer than `SHORTEST` words are not
    drawn. Raises `ScoreMismatch` when there is none.
    """
    generator = torch.Generator().manual_seed(seed)
    pools = []
    for texts in documents:
        pool = [passage for passage in passages(texts, words=words) if len(passage.split()) >= SHORTEST]
        order = torch.randperm(len(pool), generator=generator).tolist()
        pools.append([pool[i] for i in order])
    drawn: list[str] = []
    for place, pool in enumerate(sorted(pools, key=len)):
        drawn += pool[: (n - len(drawn)) // (len(pools) - place)]
    if not drawn:
        raise ScoreMismatch(
            f"{n} passages from {len(documents)} files", f"no document has {SHORTEST} words", "Give longer texts."
        )
    return drawn


def _find(source: str | Path) -> Path:
    place = shipped().get(str(source), Path(source))
    path = place / FILE if place.is_dir() else place
    if not path.is_file():
        raise UnsupportedFormat(
            f"the topic profile of {str(source)!r}", f"there is no {FILE} there",
            "Make one with `saeguard latents profile`, or search by words.",
        )  # fmt: skip
    return path
