"""A sparse logistic head on single tokens, trained on labels of whole rows: multiple-instance learning.

    l_t = sum_j w_j min(f_tj, cap_j) + b          log-odds of a token
    S   = mean of the k largest l_t of the row    (a special token counts as ``floor``, as one that is missing does)
    loss = mean over rows of weight * BCE(s S + a, label) + l2/2 |w|^2

Nobody says which tokens of a row give its topic away; the k largest do. Latents are scaled to 0.3 at their root mean
square and cut off at 4.5, which is where ``cap`` comes from. One head per fold learns from the other folds alone, so
that every row has a score from a head that has not seen it. Long rows are cut into segments, each a row of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saeguard.errors import TrainError
from saeguard.training.gate_latents import TokenLatents
from saeguard.training.sparse_rows import SparseRows


@dataclass(frozen=True)
class HeadConfig:
    """``rarest`` is the share of tokens that a latent has to fire on to be looked at."""

    k: int = 4
    steps: int = 70
    lr: float = 0.015
    l2: float = 1e-3
    scale: float = 0.3
    cut: float = 4.5
    floor: float = -8.0
    rarest: float = 2e-5


@dataclass(frozen=True, eq=False)
class Bags:
    """Runs of tokens that have one label: ``start`` and ``length`` in the matrix, and the row that each is from."""

    start: Int[Tensor, " bag"]
    length: Int[Tensor, " bag"]
    row: Int[Tensor, " bag"]


@dataclass(frozen=True, eq=False)
class Heads:
    """One head per fold, in activation units: ``weights`` of ``min(f, caps)``, and ``bias``."""

    weights: Float[Tensor, "d_sae fold"]
    bias: Float[Tensor, " fold"]
    caps: Float[Tensor, " d_sae"]
    floor: float

    def log_odds(self, tokens: TokenLatents) -> Float[Tensor, "token fold"]:
        """What each head says of every token."""
        capped = torch.minimum(tokens.value, self.caps[tokens.column])
        return SparseRows(tokens.crow, tokens.column, capped, tokens.d_sae) @ self.weights + self.bias


def segments(starts: Int[Tensor, " rows_and_one"], longest: int) -> Bags:
    """Rows as they are, and those of more than ``longest`` tokens in pieces of so many."""
    start, length, row = [], [], []
    for number, (low, high) in enumerate(zip(starts.tolist(), starts.tolist()[1:], strict=False)):
        for place in range(low, high, longest):
            start.append(place)
            length.append(min(longest, high - place))
            row.append(number)
    return Bags(torch.tensor(start), torch.tensor(length), torch.tensor(row))


def fit_heads(
    tokens: TokenLatents,
    counts: Bool[Tensor, " token"],
    bags: Bags,
    labels: Bool[Tensor, " row"],
    weights: Float[Tensor, " row"],
    folds: Sequence[int],
    config: HeadConfig = HeadConfig(),
) -> Heads:
    """Head i learns from the rows of all folds but i. There is no chance in it. Raises `TrainError`.

    ``counts`` are the tokens that are not special; ``labels`` and ``weights`` are per row.
    """
    n_folds, fold = max(folds) + 1, torch.tensor(list(folds))
    for number in range(n_folds):
        others = labels[fold != number]
        if not bool(others.any()) or bool(others.all()):
            raise TrainError(
                f"a gate's head on {len(labels)} rows in {n_folds} folds",
                f"outside fold {number} all {len(others)} rows have one label",
                "Give more rows of what is to be forgotten and of what is not.",
            )
    scale = _scale(tokens, counts, config)
    scaled = (tokens.value * scale[tokens.column]).clamp_max(config.cut)
    x = SparseRows(tokens.crow, tokens.column, scaled, tokens.d_sae)
    share = weights[bags.row][:, None] * (fold[bags.row][:, None] != torch.arange(n_folds))
    w, b = _descend(x, Pooling.of(bags, counts, config), labels[bags.row].float(), share / share.sum(0), config)
    caps = torch.where(scale > 0, config.cut / scale.clamp_min(1e-12), torch.inf)
    return Heads(w * scale[:, None], b, caps, config.floor)


def _scale(tokens: TokenLatents, counts: Tensor, config: HeadConfig) -> Tensor:
    """0 for latents that hardly ever fire."""
    _, column, value = tokens.of_tokens(counts)
    n = max(1, int(counts.sum()))
    square = torch.zeros(tokens.d_sae, dtype=torch.float64).index_add_(0, column.long(), value.double().square())
    often = torch.bincount(column.long(), minlength=tokens.d_sae) / n > config.rarest
    return (config.scale / ((square / n).sqrt() + 1e-2) * often).float()


def _descend(
    x: SparseRows, pool: "Pooling", labels: Tensor, share: Tensor, config: HeadConfig
) -> tuple[Tensor, Tensor]:
    """Adam with a warm start and a cosine to its end, all heads at once."""
    n = share.shape[1]
    w, b = torch.zeros(x.shape[1], n, requires_grad=True), torch.full((n,), -0.5, requires_grad=True)
    s, a = torch.ones(n, requires_grad=True), torch.zeros(n, requires_grad=True)
    optimiser = torch.optim.Adam([{"params": [w], "lr": config.lr}, {"params": [b, s, a], "lr": 2 * config.lr}],
                                 betas=(0.9, 0.98))  # fmt: skip
    pace = lambda step: (
        min(1.0, (step + 1) / 10) * (0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * step / config.steps))) + 0.02)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, pace)
    for _ in range(config.steps):
        z = pool.top(x @ w + b) * s.abs() + a
        each = torch.nn.functional.binary_cross_entropy_with_logits(z, labels[:, None].expand_as(z), reduction="none")
        loss = (each * share).sum() + 0.5 * config.l2 * w.square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return w.detach(), b.detach()


@dataclass(frozen=True, eq=False)
class Pooling:
    """Bags of about one length side by side, so that the k largest are found without a loop over bags."""

    k: int
    floor: float
    parts: tuple[tuple[Tensor, Tensor, Tensor], ...]
    """Numbers of the bags, ``bag place`` of their tokens, and which of those places count."""

    @classmethod
    def of(cls, bags: Bags, counts: Tensor, config: HeadConfig) -> "Pooling":
        parts, order, start = [], bags.length.argsort(stable=True), 0
        while start < len(order):
            shortest = int(bags.length[order[start]])
            stop = int(torch.searchsorted(bags.length[order], max(shortest + 6, shortest * 5 // 4), right=True))
            number, places = order[start:stop], torch.arange(max(config.k, int(bags.length[order[stop - 1]])))
            inside = places < bags.length[number][:, None]
            place = torch.where(inside, bags.start[number][:, None] + places, 0)
            parts.append((number, place, inside & counts[place]))
            start = stop
        return cls(config.k, config.floor, tuple(parts))

    def top(self, log_odds: Float[Tensor, "token head"]) -> Float[Tensor, "bag head"]:
        """The mean of the k largest of each bag."""
        found, numbers = [], []
        for number, place, kept in self.parts:
            values = log_odds[place].masked_fill(~kept[..., None], self.floor)
            found.append(values.topk(self.k, 1).values.mean(1))
            numbers.append(number)
        return torch.cat(found)[torch.cat(numbers).argsort()]
