"""A gate on words that piles up: the table of words, trained as `WordsCusum` reads it, with a score for every row.

    q_g = idf_g / 6 w_g,  w >= 0 for pairs       S_t = max(0, S_{t-1} + q_t - drift)
    loss = mean over texts of weight * BCE(s max_t S_t + a, label) + decay |w|^2

Which run of a text is about the topic is left to the maximum: multiple-instance learning, as for the head on latents.
It starts from the table that `fit_table` finds for whole texts. One table per fold, which has not seen the fold's rows;
the deployed gate has the mean of all. Pairs that begin with a token of a format are left out, so that what is said of a
question does not hang on whether it stands behind the format or behind other text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from saeguard.gates import WordsCusum
from saeguard.training.gate_words import SPAN, Table, rounded


@dataclass(frozen=True)
class PiledConfig:
    """``longest`` is the longest run of tokens that one label is about; longer texts are cut.

    ``batch`` is the largest, of few texts sixteenths are taken; ``steps`` the least, few texts are seen more often.
    """

    epochs: int = 4
    steps: int = 300
    batch: int = 2048
    lr: float = 0.02
    decay: float = 1e-5
    longest: int = 64
    drift: float = 0.1
    start: float = 1 / 30
    """What the first table's weights are multiplied by: texts of some 25 tokens have a root of about 30."""


@dataclass(frozen=True, eq=False)
class Piled:
    """``keys`` in rising order as in `Table`; ``weights`` are q per fold, and ``drift`` is theirs."""

    keys: Int[Tensor, " gram"]
    weights: Float[Tensor, "gram fold"]
    drift: Float[Tensor, " fold"]

    def gate(self, fold: int | None = None, *, scale: float = 1.0) -> WordsCusum:
        """The gate of one fold's table, or of the mean of all; its score times ``scale``, four digits, threshold 0."""
        q = scale * (self.weights.mean(1) if fold is None else self.weights[:, fold])
        drift = scale * (self.drift.mean() if fold is None else self.drift[fold])
        single, used = self.keys < SPAN, q.abs() > 1e-4
        ones, twos = single & used, ~single & used
        pairs = torch.stack([self.keys[twos] // SPAN - 1, self.keys[twos] % SPAN], 1)
        return WordsCusum(
            tuple(self.keys[ones].tolist()), rounded(q[ones]), tuple(pairs.flatten().tolist()), rounded(q[twos]),
            *rounded(drift[None]),
        )  # fmt: skip


def fit_piled(
    table: Table,
    texts: Sequence[Sequence[int]],
    labels: Sequence[bool],
    weights: Sequence[float],
    folds: Sequence[int],
    *,
    formats: Sequence[int] = (),
    seed: int = 0,
    config: PiledConfig = PiledConfig(),
) -> Piled:
    """Train ``table`` for runs. ``folds`` are -1 for texts that every fold may see; ``formats`` are token ids.

    ``texts`` are token ids without special ones. The same arguments give the same tables.
    """
    keys = table.keys
    kept = ~((keys >= SPAN) & torch.isin(keys // SPAN - 1, torch.tensor(list(formats), dtype=torch.long)))
    keys, idf, start = keys[kept], table.squares[kept].sqrt(), table.weights[kept]
    pieces = _Pieces.of(texts, labels, weights, folds, keys, config.longest)
    w, drift = _train(pieces, start * config.start * 6 / idf[:, None], idf, keys >= SPAN, seed, config)
    return Piled(keys, w * idf[:, None] / 6, drift)


@dataclass(frozen=True, eq=False)
class _Pieces:
    """Texts in pieces of one width: places of their tokens and pairs in the table, one up, 0 for those not in it."""

    single: Int[Tensor, "piece place"]
    double: Int[Tensor, "piece place"]
    real: Bool[Tensor, "piece place"]
    label: Float[Tensor, " piece"]
    weight: Float[Tensor, " piece"]
    fold: Int[Tensor, " piece"]

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], labels: Sequence[bool], weights: Sequence[float],
           folds: Sequence[int], keys: Tensor, width: int) -> "_Pieces":  # fmt: skip
        cuts = [(i, low) for i, text in enumerate(texts) for low in range(0, len(text), width)]
        single, double = (np.zeros((len(cuts), width), dtype=np.int64) for _ in range(2))
        real = np.zeros((len(cuts), width), dtype=bool)
        known = keys.numpy()
        for row, (i, low) in enumerate(cuts):
            ids = np.asarray(texts[i][low : low + width], dtype=np.int64)
            real[row, : len(ids)] = True
            single[row, : len(ids)] = ids
            double[row, 1 : len(ids)] = (ids[:-1] + 1) * SPAN + ids[1:]
        number = torch.tensor([i for i, _ in cuts])
        each = lambda given, kind: torch.tensor(list(given), dtype=kind)[number]
        return cls(
            torch.from_numpy(_places(single, known) * real), torch.from_numpy(_places(double, known) * (double > 0)),
            torch.from_numpy(real), each(labels, torch.float32), each(weights, torch.float32), each(folds, torch.long),
        )  # fmt: skip


def _places(wanted: np.ndarray, keys: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place + 1, 0)


def _train(
    pieces: _Pieces, start: Tensor, idf: Tensor, is_pair: Tensor, seed: int, config: PiledConfig
) -> tuple[Tensor, Tensor]:
    """Adam with a warm start and a cosine to its end, all folds at once."""
    n = start.shape[1]
    w = torch.where(is_pair[:, None], start.relu(), start).requires_grad_(True)
    drift, s, a = (torch.full((n,), value, requires_grad=True) for value in (config.drift, 2.0, -3.0))
    optimiser = torch.optim.Adam([w, drift, s, a], lr=config.lr, betas=(0.9, 0.98))
    share = pieces.weight[:, None] * (pieces.fold[:, None] != torch.arange(n))
    generator = torch.Generator().manual_seed(seed)
    batch = max(1, min(config.batch, len(share) // 16))
    each = -(-len(share) // batch)
    epochs = max(config.epochs, -(-config.steps // each))
    total = epochs * each
    pace = lambda i: min(1.0, (i + 1) / 20) * (0.02 + 0.5 * (1 + float(np.cos(np.pi * i / total))))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, pace)
    for _ in range(epochs):
        for part in torch.randperm(len(share), generator=generator).split(batch):
            q = w * (idf / 6)[:, None]
            best = _largest_run(pieces, part, torch.where(is_pair[:, None], q.relu(), q), drift.abs())
            labels = pieces.label[part][:, None].expand(-1, n)
            losses = F.binary_cross_entropy_with_logits(s.abs() * best + a, labels, reduction="none")
            loss = (losses * share[part]).sum() / share[part].sum(0).clamp_min(1e-9).mean()
            loss = loss + config.decay * w.square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return torch.where(is_pair[:, None], w.relu(), w).detach(), drift.abs().detach()


def _largest_run(pieces: _Pieces, part: Tensor, q: Tensor, drift: Tensor) -> Float[Tensor, "piece fold"]:
    table = torch.cat([torch.zeros(1, q.shape[1]), q])
    real = pieces.real[part]
    width = int(real.sum(1).max())
    e = F.embedding(pieces.single[part, :width], table) + F.embedding(pieces.double[part, :width], table) - drift
    piled = best = torch.zeros(len(part), q.shape[1])
    for place in range(width):
        piled = torch.where(real[:, place, None], (piled + e[:, place]).relu(), piled)
        best = torch.maximum(best, piled)
    return best
