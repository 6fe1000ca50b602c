"""What a guarded call gives back: the sequences, and per row what was decided and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from saeguard.editor import BoundRule
from saeguard.errors import GuardNotApplied
from saeguard.guarding.records import Fired
from saeguard.ledger import CallRecord


@dataclass(frozen=True)
class Decision:
    """What became of one row of a request.

    ``scores`` is the peak of every gate of its policy by ``gate.0``, ``gate.1``, ...; ``fired`` what was edited per
    site; ``at`` the absolute position at which the stop's gate opened.
    """

    decision: Literal["allow", "steer", "refuse"]
    reason: str
    policy: str
    scores: Mapping[str, float]
    fired: Mapping[str, Fired]
    max_delta_ratio: float | None
    at: int | None = None


@dataclass(frozen=True)
class Opened:
    """Whether any gate of a row's policy opened, a rule without one counting as open, and whether a stop's did."""

    gate: bool
    stop: bool


@dataclass(frozen=True, eq=False)
class Guarded:
    """``sequences`` as generate returns them, rows that were refused with the refusal in place of the answer.

    ``prompt_columns`` is where the answers begin, ``decisions`` has one entry per row of the request.
    """

    sequences: Int[Tensor, "row column"]
    prompt_columns: int
    decisions: tuple[Decision, ...]

    def texts(self, tokenizer: Any) -> list[str]:
        """The answers as text."""
        return tokenizer.batch_decode(self.sequences[:, self.prompt_columns :], skip_special_tokens=True)


def fired_at(
    rules: Sequence[BoundRule], owner: int, rows: slice, calls: Sequence[CallRecord]
) -> tuple[dict[str, Fired], float | None]:
    """Per site what was edited in the forward rows of one row of the request, and the largest share of |x|."""
    found: dict[str, list[int]] = {}
    largest: float | None = None
    for number, bound in enumerate(rules):
        if bound.plans is None or owner not in bound.plans or not (bound.rule.latents or bound.rule.is_dense):
            continue
        for call in calls:
            if (table := call.table(bound.site)) is None:
                raise GuardNotApplied(
                    f"the edits at {bound.site}", "there is no record of them in this call",
                    "The answer must not be used.",
                )  # fmt: skip
            edited, delta, norm = table.edited[rows, :, number], table.delta[rows, :, number], table.x_norm[rows]
            due = table.selected[rows, :, number] & (delta > norm * _EPSILON)
            counts = found.setdefault(str(bound.site), [0, 0, 0])
            counts[0] |= int(edited.any())
            counts[1] += int((edited & due).sum())
            counts[2] += int(due.sum())
            if edited.any():
                share = float((delta / norm.clamp_min(1e-12))[edited].max())
                largest = share if largest is None else max(largest, share)
    return {site: Fired(*counts) for site, counts in found.items()}, largest


_EPSILON = 2.0**-6
"""Changes below the last bit of bfloat16, as a share of x, may leave x as it was."""


def replaced(
    sequences: Int[Tensor, "row column"], answers: Mapping[int, Sequence[int]], start: int, pad: int
) -> Int[Tensor, "row wider"]:
    """``sequences`` with the columns from ``start`` on of some rows replaced, and all padded to one width."""
    width = max([sequences.shape[1], *(start + len(answer) for answer in answers.values())])
    out = torch.full((sequences.shape[0], width), pad, dtype=sequences.dtype, device=sequences.device)
    out[:, : sequences.shape[1]] = sequences
    for row, answer in answers.items():
        out[row, start:] = pad
        out[row, start : start + len(answer)] = torch.tensor(list(answer), dtype=out.dtype, device=out.device)
    return out
