"""CAST's condition (arXiv 2409.05907): how much of the prompt's mean activation lies along a direction.

    score = cos(m, tanh(c (c . m) / (c . c)))

with m the mean of x over the prompt's counted tokens and c the direction. It is decided where the prompt ends; on the
way there is no score.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch

from saeguard.errors import BadRule
from saeguard.gates.base import Leaf, Seen, State, Verdict, carried, running
from saeguard.gates.checks import as_weights, check_source, one_number
from saeguard.gates.pools import at_prompt_end
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
        check_source(self)
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
    def monotone(self) -> bool:
        """False: a call that goes on with a row has a longer prompt, and decides anew."""
        return False

    def begin(self, rows: int, device: torch.device) -> State:
        """The sum of x and the number of tokens, so far and at the prompt's end."""
        zeros = torch.zeros(rows, len(self.direction) + 1, dtype=torch.float64, device=device)
        return (zeros, zeros)

    def step(self, state: State, seen: Sequence[Seen]) -> tuple[State, Verdict]:
        """The direction of the sum is that of the mean, but tanh needs its length, so tokens are counted in it."""
        x, counts = seen[0].x.double(), seen[0].counts
        sums = running(torch.cat([x, torch.ones_like(x[..., :1])], -1).masked_fill(~counts[..., None], 0.0), state[0])
        total, ready = at_prompt_end(sums, state[1], seen[0])
        mean, n = total[..., :-1] / total[..., -1:].clamp_min(1.0), total[..., -1]
        c = torch.tensor(self.direction, dtype=torch.float64, device=x.device)
        along = torch.tanh((mean @ c)[..., None] * c / (c @ c))
        score = torch.nn.functional.cosine_similarity(mean, along, dim=-1)
        score = score.masked_fill(~ready | (n == 0), -torch.inf)
        return (carried(sums, state[0]), carried(total, state[1])), Verdict(score > self.threshold, score)
