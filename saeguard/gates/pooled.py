"""A logistic head on latents pooled over the row so far, as MOSAIC and ARIA have it.

With f_j(u) the activations at the row's counted tokens u = 1 ... t,

    count      number of tokens with f_j > 0          MOSAIC's counts (arXiv 2502.11367), here without its top-n
    binary     1 if there was any                     the same, binarised
    frequency  count / t                              ARIA (arXiv 2609.16229), at every step of generation
    max        largest f_j                            both
    mean       mean of f_j                            both

and the score is w . g + b with g the pooled numbers, kind by kind, all latents of the first kind first.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from saeguard.errors import BadRule
from saeguard.gates.base import Leaf, Seen, State, Verdict, carried, running
from saeguard.gates.checks import as_weights, check_source, one_number
from saeguard.gates.pools import largest
from saeguard.sites import Site
from saeguard.triggers import as_latents

Pooling = Literal["count", "binary", "frequency", "max", "mean"]


@dataclass(frozen=True)
class PooledHead:
    """Open where the head's log-odds are above ``threshold``; ``weights`` has one per kind and latent."""

    latents: tuple[int, ...]
    pooling: tuple[Pooling, ...]
    weights: tuple[float, ...]
    bias: float
    threshold: float = 0.0
    _: KW_ONLY
    sae: str | None = None
    site: Site | None = None
    special: bool = False

    def __post_init__(self):
        object.__setattr__(self, "latents", as_latents("PooledHead", self.latents))
        given: Any = self.pooling
        pooling = tuple(given) if isinstance(given, list | tuple) else (given,)
        unknown = [how for how in pooling if how not in get_args(Pooling)]
        if unknown or not pooling:
            raise BadRule(
                f"PooledHead with pooling={self.pooling!r}", f"{unknown or 'nothing'} is no way to pool",
                f"Ways: {', '.join(get_args(Pooling))}.",
            )  # fmt: skip
        object.__setattr__(self, "pooling", pooling)
        weights = as_weights("PooledHead", self.weights, len(self.latents) * len(pooling))
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "bias", one_number("PooledHead bias", self.bias))
        object.__setattr__(self, "threshold", one_number("PooledHead threshold", self.threshold))
        check_source(self)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return (self,)

    @property
    def width(self) -> int | None:
        return None

    @property
    def monotone(self) -> bool:
        """Whether no weight can lower the score of a row that goes on."""
        never_falls = set(self.pooling) <= {"count", "binary", "max"}
        return never_falls and min(self.weights, default=0.0) >= 0

    def begin(self, rows: int, device: torch.device) -> State:
        zeros = torch.zeros(rows, len(self.latents), dtype=torch.float64, device=device)
        return (zeros, zeros, zeros - torch.inf, torch.zeros(rows, dtype=torch.float64, device=device))

    def step(self, state: State, seen: Sequence[Seen]) -> tuple[State, Verdict]:
        f, counts = seen[0].f.double(), seen[0].counts
        kept = f.masked_fill(~counts[..., None], 0.0)
        fired = running((kept > 0).double().masked_fill(kept.isnan(), torch.nan), state[0])
        total = running(kept, state[1])
        peak = largest(f.masked_fill(~counts[..., None], -torch.inf), state[2])
        n = running(counts.double(), state[3])
        pooled = self._pooled(fired, total, peak, n)
        weights = torch.tensor(self.weights, dtype=torch.float64, device=f.device)
        score = (pooled @ weights + self.bias).masked_fill(n == 0, -torch.inf)
        after = tuple(carried(now, before) for now, before in zip((fired, total, peak, n), state, strict=True))
        return after, Verdict(score > self.threshold, score)

    def _pooled(self, fired: Tensor, total: Tensor, peak: Tensor, n: Tensor) -> Tensor:
        each = n.clamp_min(1.0)[..., None]
        found = {
            "count": fired, "binary": fired.clamp_max(1.0), "frequency": fired / each, "max": peak,
            "mean": total / each,
        }  # fmt: skip
        return torch.cat([found[how] for how in self.pooling], dim=-1)
