"""End a row from inside generate: after the pass in which a stop's gate opened, only an end token can follow."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from saeguard.errors import UnsupportedMode
from saeguard.guarding.attached import Attached


class EndStopped(LogitsProcessor):
    """Runs last, so that no other processor lifts it. ``copies`` are forward rows per row of the request."""

    def __init__(self, attached: Attached, ends: Sequence[int], copies: int):
        self._attached, self._copies = attached, copies
        self._ends = list(ends)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        stopped = self._attached.stopped(self._copies)
        if stopped.any():
            scores = scores.clone()
            rows = stopped.to(scores.device)
            scores[rows] = -torch.inf
            scores[rows[:, None] & self._allowed(scores)[None]] = 0.0
        return scores

    def _allowed(self, scores: Tensor) -> Tensor:
        allowed = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        allowed[self._ends] = True
        return allowed


def check_ends(ends: Sequence[int]) -> None:
    """Raise `UnsupportedMode` where a row cannot be ended."""
    if not ends:
        raise UnsupportedMode(
            "a policy that stops rows", "this call has no end token with which a row could be ended",
            "Give eos_token_id, to generate or in the model's generation config.",
        )  # fmt: skip
