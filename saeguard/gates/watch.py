"""The gates that most rules need: open always, and open where a score of one kind of evidence is above a threshold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from saeguard.errors import BadRule
from saeguard.gates.base import Gate, Leaf, Seen, State, Verdict, carried, latest
from saeguard.gates.checks import one_number
from saeguard.gates.combined import Latched
from saeguard.gates.evidence import Hits, LogOdds, Probe
from saeguard.gates.pools import Count, Cusum, Peak, Rate, TopKMean, Window
from saeguard.sites import Site

KINDS = (Hits, LogOdds, Probe)
POOLED = (Rate, Window, Cusum, Count, Peak, TopKMean)


@dataclass(frozen=True)
class Always:
    """Open at every token; a rule without a gate is the same."""

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """It reads nothing, but is seen once so that it knows the tokens."""
        return (Hits(()),)

    @property
    def monotone(self) -> bool:
        return True

    def begin(self, rows: int, device: torch.device) -> State:
        return ()

    def step(self, state: State, seen: Sequence[Seen]) -> tuple[State, Verdict]:
        everywhere = torch.ones_like(seen[0].counts)
        return state, Verdict(everywhere, everywhere.double())


@dataclass(frozen=True)
class Watch:
    """Open at tokens where ``pool`` of ``evidence`` is above ``threshold``, strictly."""

    evidence: Hits | LogOdds | Probe
    pool: Rate | Window | Cusum | Count | Peak | TopKMean
    threshold: float

    def __post_init__(self):
        if type(self.evidence) not in KINDS or type(self.pool) not in POOLED:
            raise BadRule(
                f"Watch({self.evidence!r:.60}, {self.pool!r:.60})", "that is not evidence and a pool",
                f"Evidence: {', '.join(k.__name__ for k in KINDS)}; pools: {', '.join(p.__name__ for p in POOLED)}.",
            )  # fmt: skip
        object.__setattr__(self, "threshold", one_number("Watch threshold", self.threshold))

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return (self.evidence,)

    @property
    def monotone(self) -> bool:
        """Whether its score never falls."""
        if isinstance(self.pool, TopKMean):
            return isinstance(self.evidence, Hits) and self.pool.width is None and self.pool.floor <= 0
        return isinstance(self.pool, Peak) or isinstance(self.evidence, Hits) and isinstance(self.pool, Count)

    def begin(self, rows: int, device: torch.device) -> State:
        """The pool's state, and whether any token has counted."""
        return (self.pool.begin(rows, device), torch.zeros(rows, dtype=torch.bool, device=device))

    def step(self, state: State, seen: Sequence[Seen]) -> tuple[State, Verdict]:
        pooled, before = state
        after, score = self.pool.step(pooled, self.evidence.of(seen[0]), seen[0])
        any_counted = latest(seen[0].counts, before)
        score = score.masked_fill(~any_counted, -torch.inf)
        return (after, carried(any_counted, before)), Verdict(score > self.threshold, score)


def token_rate(
    latents: Sequence[int],
    threshold: float,
    scope: Literal["prompt", "running"] | Window | Cusum = "running",
    *,
    level: float = 0.0,
    latched: bool = False,
    sae: str | None = None,
    site: Site | None = None,
) -> Gate:
    """DSG's gate: the share of tokens at which any of ``latents`` fires is above ``threshold``.

    ``scope`` is over which tokens: the prompt, all so far, the last few (``Window(w)``), or piled up above a drift
    (``Cusum(k)``, whose threshold is in tokens). See `Hits` for ``level``, ``sae`` and ``site``.
    """
    pool = Rate(scope) if isinstance(scope, str) else scope
    gate = Watch(Hits(tuple(latents), level, sae=sae, site=site), pool, threshold)
    return Latched(gate) if latched else gate
