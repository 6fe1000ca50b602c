"""What a call of ``generate`` brings: the names of its requests, and its prompts without their padding."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saeguard.engines.base import Request
from saeguard.errors import BadRule, UnsupportedMode
from saeguard.guarding.records import CODE


def request_ids(given: Sequence[str] | None, n: int) -> tuple[str, ...]:
    """One code per row: those that were given, or new ones. Raises `BadRule`."""
    if given is None:
        return tuple(uuid.uuid4().hex for _ in range(n))
    if isinstance(given, str) or len(given) != n:
        raise BadRule(f"request_ids for {n} rows", f"{given!r:.60} is not {n} of them", "Give one code per row.")
    if not all(isinstance(one, str) and CODE.fullmatch(one) for one in given):
        raise BadRule(
            "request_ids", "one is not 1 to 128 letters, digits and . _ : -", "Give codes, or AuditKey.of_text of them."
        )
    return tuple(given)


def prompts_of(args: Any, kwargs: Mapping[str, Any], request: Request) -> list[list[int]]:
    """Token ids of each row's prompt without its padding, as far as they are known."""
    ids = _ids(args, kwargs)
    if ids is None:
        return []
    real = _real(ids, kwargs.get("attention_mask"), request)[:, -ids.shape[1] :]
    real = real if real.shape == ids.shape else torch.ones_like(ids).bool()
    return [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]


def _ids(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    given = (args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"))
    return next((value for value in given if isinstance(value, Tensor)), None)


def _real(ids: Tensor, mask: Any, request: Request) -> Tensor:
    """Which columns generate will take for tokens: without a mask, those that do not hold padding."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.bool()
    if mask is None and request.pad and not set(request.pad) & set(request.eos):
        return ids != request.pad[0]
    return torch.ones_like(ids).bool()


def check_last(args: Any, kwargs: Mapping[str, Any], request: Request, guarded: Sequence[bool]) -> None:
    """Raise `UnsupportedMode` for a prompt that ends in padding, whose answer would begin where no policy looks."""
    ids = _ids(args, kwargs)
    mask = kwargs.get("attention_mask")
    shown = ids if ids is not None else mask if isinstance(mask, Tensor) else None
    if shown is None or not shown.shape[-1]:
        return
    last = _real(shown, mask, request)[:, -1].tolist()
    if any(matters and not real for matters, real in zip(guarded, last, strict=True)):
        raise UnsupportedMode(
            "a prompt that ends in padding", "its answer begins at a token that edits and gates leave alone",
            "Pad on the left, and let the attention mask be 1 at the last token.",
        )  # fmt: skip
