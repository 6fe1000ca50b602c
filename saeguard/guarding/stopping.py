"""End a row from inside generate: after the pass in which a stop's gate opened, only an end token can follow."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from saeguard.engines.base import Request
from saeguard.errors import UnsupportedMode
from saeguard.guarding.attached import Attached


class EndStopped(LogitsProcessor):
    """Runs last, so that no other processor lifts it."""

    def __init__(self, attached: Attached, request: Request):
        self._attached, self._request = attached, request

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        request = self._request
        column = input_ids.shape[1] + request.prompt_columns - request.output_columns
        stopped = self._attached.stopped(request.copies, column, drafts=request.drafts)
        if stopped.any():
            scores = scores.clone()
            rows = stopped.to(scores.device)
            scores[rows] = -torch.inf
            scores[rows[:, None] & self._allowed(scores)[None]] = 0.0
        return scores

    def _allowed(self, scores: Tensor) -> Tensor:
        check_ends(self._request.eos, scores.shape[1])
        allowed = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
        allowed[list(self._request.eos)] = True
        return allowed


def check_ends(ends: Sequence[int], vocabulary: int | None = None) -> None:
    """Raise `UnsupportedMode` where a row cannot be ended; ``vocabulary`` is how many tokens the model knows."""
    outside = [end for end in ends if end < 0 or (vocabulary is not None and end >= vocabulary)]
    if not ends or outside:
        raise UnsupportedMode(
            "a policy that stops rows",
            f"this call's end token {outside[0]} is none of the model's" if outside
            else "this call has no end token with which a row could be ended",
            "Give eos_token_id, to generate or in the model's generation config.",
        )  # fmt: skip
