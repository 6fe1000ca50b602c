"""From scores to latents: bounds on some columns, a place among the first of others, and one column to rank by.

    select(table, "output_score", top=20, bounds=(Bound("frequency", least=1e-4),), within={"topic": 500})

A `Selection` carries what it was made from, and becomes a rule or a plan.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from saeguard.errors import ScoreMismatch
from saeguard.ops import Ablate, Add, AtLeast, AtMost, Clamp, Scale
from saeguard.plans import Plan, Rule
from saeguard.scoring.table import ScoreTable, as_json

_HUGE = 1e300
"""Stands for infinity where percentiles are taken; no float32 is as large."""


@dataclass(frozen=True)
class Bound:
    """Keep latents whose ``column`` is from ``least`` to ``most``; with ``percentile`` both are percentiles, 0 to 100,
    of the latents that have a number in it. A latent without one is dropped."""

    column: str
    least: float | int = -math.inf
    most: float | int = math.inf
    percentile: bool = False

    def __post_init__(self):
        if math.isnan(self.least) or math.isnan(self.most) or self.least > self.most:
            raise ScoreMismatch(
                f"a bound on {self.column!r} from {self.least} to {self.most}", "no number lies between", "Swap them."
            )
        if self.percentile and not (self.least <= 100 and self.most >= 0):
            raise ScoreMismatch(f"percentiles of {self.column!r}", "they are 0 to 100", "Give numbers from 0 to 100.")

    def keeps(self, table: ScoreTable) -> set[int]:
        """The latents inside."""
        column = table.column(self.column).double()
        least, most = self.least, self.most
        if self.percentile:
            column = column.clamp(-_HUGE, _HUGE)  # between two infinite numbers there is no quantile
        known = column[~column.isnan()]
        if self.percentile and len(known):
            least, most = (
                end if math.isinf(end) else float(torch.quantile(known, min(max(end, 0.0), 100.0) / 100))
                for end in (self.least, self.most)
            )
        return set(((column >= least) & (column <= most)).nonzero()[:, 0].tolist())


@dataclass(frozen=True)
class Selection:
    """Latents, best first, with the scores they had and how they were chosen, in plain JSON values."""

    sae: str
    latents: tuple[int, ...]
    scores: Mapping[str, tuple[float | None, ...]]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def rule(self, op: Clamp | Scale | Add | Ablate | AtLeast | AtMost, **where: Any) -> Rule:
        """A rule on these latents; ``where`` are `Rule`'s own fields."""
        return Rule(self.sae, self.latents, op, **where)

    def plan(self, op: Clamp | Scale | Add | Ablate | AtLeast | AtMost, *, name: str = "", **where: Any) -> Plan:
        """A plan of that one rule."""
        return Plan((self.rule(op, **where),), name)

    def to_json(self) -> str:
        """Latents, scores and provenance; NaN is null, and infinite scores are "inf" and "-inf"."""
        scores = {
            name: [None if value is None else as_json(value) for value in column]
            for name, column in self.scores.items()
        }
        return json.dumps({**asdict(self), "scores": scores}, indent=2, allow_nan=False)


def select(
    table: ScoreTable,
    by: str,
    *,
    top: int,
    bounds: Sequence[Bound] = (),
    within: Mapping[str, int] | None = None,
) -> Selection:
    """The ``top`` latents by column ``by``, among those inside all ``bounds`` and, per column of ``within``, among its
    first so many (counted over all latents). Ties go to the lower number.

    Fewer are returned when fewer are left. Raises `ScoreMismatch` for a column that is not there, or when none is left.
    """
    if isinstance(top, bool) or top < 1:
        raise ScoreMismatch(f"the best {top} latents by {by!r}", "that is no count", "Give an int from 1 upwards.")
    left = set(range(table.d_sae))
    for bound in bounds:
        left &= bound.keeps(table)
    for column, first in (within or {}).items():
        left &= set(table.ranked(column)[:first])
    chosen = table.ranked(by, among=sorted(left))[:top]
    if not chosen:
        raise ScoreMismatch(
            f"the best {top} latents of {table.sae} by {by!r}",
            f"none is left of {table.d_sae}: {len(left)} are inside the bounds and none of them has that score",
            "Loosen the bounds, or score more latents.",
        )
    rows = [table.row(latent) for latent in chosen]
    scores = {name: tuple(None if math.isnan(row[name]) else row[name] for row in rows) for name in table.columns}
    return Selection(table.sae, tuple(chosen), scores, {
        "sae_fingerprint": table.sae_fingerprint, "by": by, "top": top, "n_left": len(left),
        "bounds": [{key: _plain(value) for key, value in asdict(bound).items()} for bound in bounds],
        "within": dict(within or {}), "scores": {name: dict(given) for name, given in table.provenance.items()},
    })  # fmt: skip


def spelled(bound: Bound) -> str:
    """The bound as it is written on a command line, with ``%`` behind percentiles."""
    percent = "%" if bound.percentile else ""
    ends = ((">=", bound.least), ("<=", bound.most))
    return " ".join(f"{bound.column}{sign}{end:g}{percent}" for sign, end in ends if not math.isinf(end))


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isinf(value) else value
