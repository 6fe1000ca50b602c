"""Which latents a baseline edits and watches: chosen on training texts, on labels, or by chance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saeguard import SAE
from saeguard.cli.texts import within
from saeguard.latents import LatentTable
from saeguard.scoring.cache import Cache
from saeguard.scoring.forget_retain import dsg, farrell
from saeguard.scoring.labels import labels_of
from saeguard.scoring.sentences import Embedder
from saeguard.scoring.statistics import Statistics, gather
from saeguard.scoring.texts import Texts
from saeguard.scoring.topic import label_similarity

TOP = 20
"""Latents of every baseline, as many as DSG takes at least."""
FLOOR = 1e-3
"""Share of forget tokens on which a latent has to fire; without one DSG takes latents that hardly ever do."""


@dataclass(frozen=True)
class Chosen:
    """Latents by DSG from raw texts and from questions as they are asked, by Farrell's rule, and by their labels."""

    dsg_texts: tuple[int, ...]
    dsg_questions: tuple[int, ...]
    farrell: tuple[int, ...]
    labels: tuple[int, ...]


def statistics_of(
    model: Any, tokenizer: Any, sae: SAE, sides: Mapping[str, Sequence[str]], folder: Path, *, n_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:  # fmt: skip
    """Both sides' statistics, from at most ``n_tokens`` tokens of each; kept in ``folder``."""
    texts = {
        side: Texts.from_text(within({side: found}, tokenizer, n_tokens=n_tokens, seed=0), tokenizer, sae, name=side)
        for side, found in sides.items()
    }
    return gather(model, sae, texts, cache=Cache(folder), progress=progress)


def by_dsg(statistics: Statistics, top: int = TOP) -> tuple[int, ...]:
    """DSG's ratio filter and importance, with a floor."""
    return tuple(dsg(statistics, floor=FLOOR).ranked("dsg")[:top])


def by_farrell(statistics: Statistics, top: int = TOP, retain_threshold: float = 0.01) -> tuple[int, ...]:
    """The most frequent on the forget text among those that are rare on the retain text."""
    return tuple(farrell(statistics, retain_threshold=retain_threshold).ranked("farrell")[:top])


def by_labels(sae: SAE, table: LatentTable, words: str, embedder: Embedder, top: int = TOP) -> tuple[int, ...]:
    """Zero-shot: those whose labels mean the most similar thing to ``words``."""
    found = label_similarity(sae, labels_of(table), words, embedder=embedder)
    return tuple(found.ranked("label_similarity")[:top])


def at_random(table: LatentTable, n: int, *, without: Sequence[int], seed: int) -> tuple[int, ...]:
    """Latents that fire at all, drawn by ``seed`` from all others."""
    alive = [row.latent for row in table.rows if row.frequency > 0 and row.latent not in set(without)]
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))
    return tuple(alive[i] for i in order[:n].tolist())
