"""Log-odds of single tokens and of pairs, from many more sentences than a model could be run over.

    x_g = idf_g / |x|       for every n-gram g that occurs in a row, |x| over the row's n-grams
    idf_g = log(rows / (1 + rows with g)) + 1
    loss  = |w|^2 / 2 + C sum over rows of weight * BCE(w . x + b, label)

so that q_g = w_g idf_g over the root of the summed idf^2, which is what a `Words` gate sums, is the score that was
trained.
The n-grams are chosen on the sentences alone: the largest |q_g| of a first fit. Then one table per fold is fitted on
the sentences and the questions of the other folds. N-grams that a format brings with it are left out, so that they
neither open a gate nor thin out what stands beside them in its window.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saeguard.errors import TrainError
from saeguard.gates.words import Words
from saeguard.training.sparse_rows import SparseRows

SPAN = 1 << 31
"""More than any token id: the pair (a, b) has the key (a + 1) * SPAN + b, and the token b alone the key b."""


@dataclass(frozen=True)
class WordsConfig:
    """``most`` n-grams are kept, of those that occur ``least`` times or more; ``strength`` is C."""

    most: int = 60_000
    least: int = 3
    strength: float = 8.0
    steps: int = 200


@dataclass(frozen=True, eq=False)
class Table:
    """``keys`` in rising order; ``weights`` are q per fold, ``squares`` are idf^2."""

    keys: Int[Tensor, " gram"]
    weights: Float[Tensor, "gram fold"]
    squares: Float[Tensor, " gram"]

    def words(self, fold: int | None, *, last: int, floor: float, scale: float = 1.0) -> Words:
        """The gate of one fold's table, or of the mean of all; weights times ``scale``, to four digits."""
        q = self.weights.mean(1) if fold is None else self.weights[:, fold]
        single = self.keys < SPAN
        pairs = torch.stack([self.keys[~single] // SPAN - 1, self.keys[~single] % SPAN], 1)
        return Words(
            tuple(self.keys[single].tolist()), rounded(q[single] * scale), rounded(self.squares[single]),
            tuple(pairs.flatten().tolist()), rounded(q[~single] * scale), rounded(self.squares[~single]),
            last=last, floor=floor,
        )  # fmt: skip


def rounded(values: Tensor) -> tuple[float, ...]:
    """Four significant digits: a table of many numbers is a file to send."""
    return tuple(float(f"{value:.4g}") for value in values.tolist())


def sentences(documents: Sequence[str], most: int, seed: int) -> list[str]:
    """At most ``most`` sentences of 40 to 300 characters, drawn by ``seed``; every second one begins in lower case."""
    found = [
        sentence
        for document in documents
        for part in document.split("\n\n")
        for sentence in re.split(r"(?<=[.!?])\s+", part)
        if 40 <= len(sentence) <= 300
    ]
    order = np.random.default_rng(seed).permutation(len(found))[:most].tolist()
    return [f" {found[i][0].lower()}{found[i][1:]}" if n % 2 else found[i] for n, i in enumerate(order)]


def in_most(rows: Sequence[Sequence[int]]) -> list[int]:
    """Keys of the n-grams that at least half of the rows have: those of the format that all are written in."""
    keys, times = np.unique(np.concatenate([np.unique(_grams(row)) for row in rows]), return_counts=True)
    return keys[2 * times >= len(rows)].tolist()


def fit_table(
    texts: Sequence[Sequence[int]],
    text_labels: Sequence[bool],
    text_weights: Sequence[float],
    rows: Sequence[Sequence[int]],
    row_labels: Sequence[bool],
    row_weights: Sequence[float],
    folds: Sequence[int],
    config: WordsConfig = WordsConfig(),
    *,
    without: Sequence[int] = (),
) -> Table:
    """A table per fold. ``texts`` and ``rows`` are token ids without special ones; ``without`` are keys to leave out.

    Raises `TrainError`.
    """
    if len(set(text_labels)) < 2:
        raise TrainError(
            f"a table of words from {len(texts)} sentences", "all of them have one label",
            "Give text of what is to be forgotten and of what is not.",
        )  # fmt: skip
    text_keys, row_keys = [np.unique(_grams(ids)) for ids in texts], [np.unique(_grams(ids)) for ids in rows]
    keys, times = np.unique(np.concatenate(text_keys), return_counts=True)
    keys = np.setdiff1d(keys[times >= config.least], np.asarray(list(without), dtype=np.int64))
    labels, weights = torch.tensor(list(text_labels)).float(), torch.tensor(list(text_weights)).float()
    if len(keys) > config.most:
        rows_of, idf = _matrix(text_keys, keys)
        q = _logistic(rows_of, labels, weights[:, None], config)[:, 0].abs() * idf
        keys = keys[np.sort(q.topk(config.most).indices.numpy())]
    rows_of, idf = _matrix([*text_keys, *row_keys], keys)
    fold, n = torch.tensor(list(folds)), max(folds) + 1
    taken = torch.tensor(list(row_weights)).float()[:, None] * (fold[:, None] != torch.arange(n))
    share = torch.cat([weights[:, None].expand(-1, n), taken])
    w = _logistic(rows_of, torch.cat([labels, torch.tensor(list(row_labels)).float()]), share, config)
    return Table(torch.from_numpy(keys), w * idf[:, None], idf.square())


def _grams(ids: Sequence[int]) -> np.ndarray:
    """The keys of all tokens, and of all pairs of neighbours."""
    own = np.asarray(ids, dtype=np.int64)
    return np.concatenate([own, (own[:-1] + 1) * SPAN + own[1:]])


def _matrix(rows: Sequence[np.ndarray], keys: np.ndarray) -> tuple[SparseRows, Tensor]:
    """Rows of length 1 in idf, and idf."""
    flat = np.concatenate(rows)
    place = np.minimum(np.searchsorted(keys, flat), len(keys) - 1)
    known = keys[place] == flat
    number = np.repeat(np.arange(len(rows)), [len(row) for row in rows])[known]
    column = torch.from_numpy(place[known])
    idf = torch.log(len(rows) / (1.0 + torch.bincount(column, minlength=len(keys)).double())) + 1
    idf, of_row = idf.clamp_min(1e-3).float(), torch.from_numpy(number)
    length = torch.zeros(len(rows)).index_add_(0, of_row, idf[column].square()).sqrt().clamp_min(1e-6)
    sizes = torch.bincount(of_row, minlength=len(rows))
    crow = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    return SparseRows(crow, column, idf[column] / length[of_row], len(keys)), idf


def _logistic(x: SparseRows, labels: Tensor, weights: Tensor, config: WordsConfig) -> Tensor:
    """Weights per column and head, by L-BFGS; the bias is found too, and is of no use to a sum over a window."""
    n = weights.shape[1]
    w, b = torch.zeros(x.shape[1], n, requires_grad=True), torch.zeros(n, requires_grad=True)
    optimiser = torch.optim.LBFGS([w, b], max_iter=config.steps, history_size=10, line_search_fn="strong_wolfe")
    total = config.strength * weights.sum()

    def loss() -> Tensor:
        optimiser.zero_grad()
        z = x @ w + b
        each = torch.nn.functional.binary_cross_entropy_with_logits(z, labels[:, None].expand_as(z), reduction="none")
        found = (0.5 * w.square().sum() + config.strength * (each * weights).sum()) / total
        found.backward()
        return found

    optimiser.step(loss)  # type: ignore[arg-type]
    return w.detach()
