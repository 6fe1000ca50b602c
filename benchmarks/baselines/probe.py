"""The control that papers forget: a linear probe on the raw stream, trained as the gate on latents is.

    l_t = w . (x_t - mean) / sd + b              log-odds of a token
    S   = mean of the k largest l_t of the row
    loss = mean over rows of weight * BCE(S, label) + l2/2 |w|^2

Nobody says which tokens give a row's topic away. Rows of either label weigh the same together. Scores of rows are out
of fold: from the probe of the folds that have not seen the row; the deployed probe has seen all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from benchmarks.baselines.streams import Streams
from saeguard import Site
from saeguard.gates import Latched, Probe, TopKMean, Watch


@dataclass(frozen=True)
class ProbeConfig:
    """``l2`` is chosen among its values by the area under the curve of the scores out of fold."""

    k: int = 4
    window: int = 16
    steps: int = 150
    lr: float = 0.02
    l2: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    folds: int = 3
    floor: float = -8.0


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """``gate`` has threshold 0; ``scores`` are each row's, out of fold."""

    gate: Latched
    scores: Float[Tensor, " row"]
    l2: float


def fit_probe(
    streams: Streams, labels: Bool[Tensor, " row"], special: Sequence[int], site: Site, config: ProbeConfig
) -> FittedProbe:
    """The same rows give the same probe."""
    odd = torch.tensor(sorted(special))
    ids = torch.tensor([token for row in streams.ids for token in row])
    counts = ~torch.isin(ids, odd)
    mean, sd = streams.x[counts].mean(0), streams.x[counts].std(0).clamp_min(1e-6)
    bags = _Bags.of(Streams(streams.ids, streams.starts, (streams.x - mean) / sd), counts, config)
    fold = torch.arange(len(labels)) % config.folds
    best: tuple[float, float, Tensor] | None = None
    for l2 in config.l2:
        found = torch.zeros(len(labels))
        for number in range(config.folds):
            w, b = _descend(bags, labels, fold != number, l2, config)
            found = torch.where(fold == number, bags.score(w, b), found)
        if best is None or area(found[labels], found[~labels]) > best[0]:
            best = (area(found[labels], found[~labels]), l2, found)
    assert best is not None
    w, b = _descend(bags, labels, torch.ones_like(labels), best[1], config)
    raw = w / sd
    evidence = Probe(tuple(raw.tolist()), float(b - raw @ mean), site=site)
    pool = TopKMean(config.k, width=config.window, floor=config.floor)
    return FittedProbe(Latched(Watch(evidence, pool, 0.0)), best[2].double(), best[1])


def area(above: Tensor, below: Tensor) -> float:
    """The share of pairs in which the first is larger, ties counting half: the area under the ROC curve."""
    ordered = below.sort().values.contiguous()
    above = above.contiguous()
    less, upto = (torch.searchsorted(ordered, above, right=right).double().mean() for right in (False, True))
    return float((less + upto) / 2 / len(below))


@dataclass(frozen=True, eq=False)
class _Bags:
    """Rows of about one length side by side: numbers, streams, and which tokens count."""

    parts: tuple[tuple[Tensor, Tensor, Tensor], ...]
    k: int
    floor: float

    @classmethod
    def of(cls, streams: Streams, counts: Tensor, config: ProbeConfig) -> "_Bags":
        kept = Streams(streams.ids, streams.starts, torch.cat([streams.x, counts[:, None].float()], 1))
        parts = []
        for numbers, ids, real, x in kept.batches():
            wide = torch.nn.functional.pad(x, (0, 0, 0, max(0, config.k - ids.shape[1])))
            inside = torch.nn.functional.pad(real, (0, wide.shape[1] - real.shape[1]))
            parts.append((torch.tensor(numbers), wide[..., :-1], inside & (wide[..., -1] > 0)))
        return cls(tuple(parts), config.k, config.floor)

    def score(self, w: Tensor, b: Tensor) -> Tensor:
        """S of every row."""
        numbers = torch.cat([part[0] for part in self.parts])
        found = [(x @ w + b).masked_fill(~kept, self.floor).topk(self.k, 1).values.mean(1) for _, x, kept in self.parts]
        return torch.cat(found)[numbers.argsort()]


def _descend(bags: _Bags, labels: Tensor, seen: Tensor, l2: float, config: ProbeConfig) -> tuple[Tensor, Tensor]:
    """Adam on all rows that may be seen, with a cosine to its end."""
    share = torch.where(labels, 0.5 / (labels & seen).sum(), 0.5 / (~labels & seen).sum()) * seen
    w, b = torch.zeros(bags.parts[0][1].shape[-1], requires_grad=True), torch.full((), -1.0, requires_grad=True)
    optimiser = torch.optim.Adam([w, b], lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    for _ in range(config.steps):
        z = bags.score(w, b)
        each = torch.nn.functional.binary_cross_entropy_with_logits(z, labels.float(), reduction="none")
        loss = (each * share).sum() + 0.5 * l2 * w.square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return w.detach(), b.detach()
