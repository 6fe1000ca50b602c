"""CAST's condition (arXiv 2409.05907): how much of the prompt's mean activation lies along a direction.

    score = cos(m, tanh(c (c . m) / (c . c)))

with m the mean of x over the prompt's counted tokens and c the direction. It is decided once, where the prompt ends; on
the way the gate is closed.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch

from saeguard.errors import BadRule
from saeguard.gates.base import Leaf, Seen, State, Verdict, carried, running
from saeguard.gates.checks import as_site, as_weights, one_number
from saeguard.gates.pools import prompt_of
from saeguard.sites import Site


@dataclass(frozen=True)
class Cosine:
    """Open after a prompt whose score is above ``threshold``; ``Not`` of it is the condition "below"."""

    direction: tuple[float, ...]
    threshold: float
    _: KW_ONLY
    site: Site | None = None
    special: bool = False

    def __post_init__(self):
        object.__setattr__(self, "direction", as_weights("Cosine", self.direction))
        object.__setattr__(self, "threshold", one_number("Cosine threshold", self.threshold))
        object.__setattr__(self, "site", as_site(self.site))
        if not any(self.direction):
            raise BadRule("Cosine with a direction of zeros", "it has no direction", "Give one that is not all 0.")

    @property
    def latents(self) -> tuple[int, ...]:
        """None: it reads the stream as it is."""
        return ()

    @property
    def sae(self) -> str | None:
        """None, likewise."""
        return None

    @property
    def width(self) -> int | None:
        return len(self.direction)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return (self,)

    @property
    def needs_phase(self) -> bool:
        return True

    @property
    def monotone(self) -> bool:
        return True

    def begin(self, rows: int, device: torch.device) -> State:
        width = len(self.direction) + 1  # and the number of tokens
        return (torch.zeros(rows, width, dtype=torch.float64, device=device),)

    def step(self, state: State, seen: Sequence[Seen]) -> tuple[State, Verdict]:
        """The direction of the sum is that of the mean, but tanh needs its length, so tokens are counted in it."""
        x, counts = seen[0].x.double(), seen[0].counts & prompt_of(seen[0])
        total = running(torch.cat([x, torch.ones_like(x[..., :1])], -1).masked_fill(~counts[..., None], 0.0), state[0])
        mean = total[..., :-1] / total[..., -1:].clamp_min(1.0)
        c = torch.tensor(self.direction, dtype=torch.float64, device=x.device)
        along = torch.tanh((mean @ c)[..., None] * c / (c @ c))
        score = torch.nn.functional.cosine_similarity(mean, along, dim=-1)
        assert seen[0].ready is not None
        opened = (score > self.threshold) & seen[0].ready
        return (carried(total, state[0]),), Verdict(opened, score.masked_fill(~seen[0].ready, 0.0))
