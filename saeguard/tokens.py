"""The truth about the tokens of one forward pass: real or padding, special or not, where, and in which phase.

Nothing else in saeguard looks at attention masks, token ids or cache lengths, and nothing here looks at the number
of columns of a pass: a prompt may arrive whole, in chunks or one token at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from saeguard.axes import Mask, Places
from saeguard.errors import BadRule, PhaseUnknown, TokensUnknown

Phase = Literal["all", "prompt", "generated", "last", "newest"]
"""``last`` is the last token of the prompt; ``newest`` are the tokens at which the model chooses the next one: the last
one of the prompt and every generated one."""


@dataclass(frozen=True)
class Where:
    """Which tokens of a row a rule is about.

    The phases ``last`` and ``newest`` are the two readings of "the last position" in the literature: once, at the end
    of the prompt (SpARE, arXiv 2410.15999), or again at every token whose successor is chosen. ``first`` keeps the
    first so many tokens of the phase. ``start`` and ``stop`` bound the absolute position: the number of real tokens
    before this one in its row, so padding never counts. ``special`` includes BOS, EOS and the other special tokens,
    whose activations lie far outside what SAEs are trained on.
    """

    phase: Phase = "all"
    first: int | None = None
    start: int = 0
    stop: int | None = None
    special: bool = False

    def __post_init__(self):
        if self.phase not in get_args(Phase):
            raise BadRule(f"phase {self.phase!r}", "there is no such phase", f"Phases: {', '.join(get_args(Phase))}.")
        for name in ("first", "start", "stop"):
            number = getattr(self, name)
            if number is None and name != "start":
                continue
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**63:
                raise BadRule(
                    f"{name}={number!r}", "that is not a count of tokens", "Positions are integers from 0 upwards."
                )
        if not isinstance(self.special, bool):
            raise BadRule(f"special={self.special!r}", "that is neither True nor False", "Give a bool.")
        if self.stop is not None and self.stop < self.start:
            raise BadRule(f"positions {self.start} to {self.stop}", "the range is backwards", "Give start <= stop.")

    @property
    def needs_phase(self) -> bool:
        return self.phase != "all"


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Per token of one forward pass, all ``batch pos``.

    ``column`` is the column of the first token counted from the start of the row's cache, padding included;
    ``absolute`` counts real tokens only. ``since_prompt`` is negative in the prompt and 0 at the first generated
    token, or None where the call does not say where its prompt ends. ``special`` and ``ids`` are None where they
    are unknown. ``last`` says which token is its prompt's last, or is None where that cannot be told.
    """

    real: Mask
    absolute: Places
    special: Mask | None
    since_prompt: Places | None
    column: int
    ids: Int[Tensor, "batch pos"] | None = None
    last: Mask | None = None
    _selected: dict[Where, Mask] = field(default_factory=dict)

    def select(self, where: Where) -> Mask:
        """The tokens that ``where`` is about. Raises `PhaseUnknown`, `TokensUnknown`."""
        if where not in self._selected:
            self._selected[where] = self._select(where)
        return self._selected[where]

    def upto(self, column: int) -> "TokenBatch":
        """The tokens before ``column``."""
        n = column - self.column
        special, since, ids, last = self._optional(lambda known: known[:, :n])
        return TokenBatch(self.real[:, :n], self.absolute[:, :n], special, since, self.column, ids, last)

    def of_rows(self, rows: Int[Tensor, " row"]) -> "TokenBatch":
        """Row i is what row ``rows[i]`` was."""
        special, since, ids, last = self._optional(lambda known: known[rows])
        return TokenBatch(self.real[rows], self.absolute[rows], special, since, self.column, ids, last)

    def _optional(self, part: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        """``part`` of what may be unknown: special, since_prompt, ids and last."""
        known = (self.special, self.since_prompt, self.ids, self.last)
        return [None if one is None else part(one) for one in known]

    def _select(self, where: Where) -> Mask:
        selected = self.real
        if not where.special:
            selected = selected & ~self._known_special()
        if where.start:
            selected = selected & (self.absolute >= where.start)
        if where.stop is not None:
            selected = selected & (self.absolute < where.stop)
        if where.phase == "generated":
            since = self._known_phase(where)
            selected = selected & (since >= 0)
            return selected if where.first is None else selected & (since < where.first)
        if where.phase == "newest":
            since, last = self._known_phase(where), self._known_last(where)
            selected = selected & (last | (since >= 0))
            return selected if where.first is None else selected & (since < where.first - 1) & (where.first > 0)
        if where.phase == "last":
            selected = selected & self._known_last(where)
            return selected & (where.first != 0)
        if where.phase == "prompt":
            selected = selected & (self._known_phase(where) < 0)
        return selected if where.first is None else selected & (self.absolute < where.first)

    def _known_special(self) -> Mask:
        if self.special is None:
            raise TokensUnknown(
                "a rule that leaves special tokens alone",
                "this forward pass was given embeddings, so its token ids are unknown",
                "Pass input_ids, or write special=True in every rule to edit special tokens too.",
            )
        return self.special

    def _known_last(self, where: Where) -> Mask:
        self._known_phase(where)
        if self.last is None:
            raise PhaseUnknown(
                f"a rule for the {where.phase} tokens",
                "a row is padded on the right, and was read in pieces: its last token went by before that was known",
                "Pad on the left, or let generate read the prompt in one pass (prefill_chunk_size=None).",
            )
        return self.last

    def _known_phase(self, where: Where) -> Places:
        if self.since_prompt is None:
            raise PhaseUnknown(
                f"a rule for {where.phase} tokens",
                "the model was called outside generate(), so where the prompt ends is unknown",
                "Say steer(model, plan, prompt_tokens=n), with n real tokens or one number per row.",
            )
        return self.since_prompt


def last_of_prompt(real: Mask, column: int, prompt_columns: int) -> Mask | None:
    """Which token is the last real one of its prompt, where prompts take ``prompt_columns`` columns, padding included.

    None where a row has only padding in the pass that ends the prompt, and earlier passes did not know that it would.
    """
    n = prompt_columns - column
    if not 0 < n <= real.shape[1]:
        return torch.zeros_like(real)
    own = real & (torch.arange(real.shape[1], device=real.device) < n)
    if column > 0 and not bool(own.any(1).all()):
        return None
    return own & (own.flip(1).cumsum(1).flip(1) == 1)


def read_mask(mask: Tensor | None, rows: int, width: int, column: int) -> tuple[Mask, Places] | None:
    """Which tokens are real, and their absolute positions, from an attention mask.

    ``mask`` is None (no padding), ``batch keys`` with one entry per column up to the last token of this pass, or
    ``batch 1 pos keys`` as a static cache makes it (bool, or float with 0 where attention is allowed). Returns
    None when the shape is neither.
    """
    if mask is None:
        here = torch.arange(column, column + width).expand(rows, width)
        return torch.ones(rows, width, dtype=torch.bool), here
    if mask.ndim == 2 and mask.shape == (rows, column + width):
        real = mask.bool()
        return real[:, column:], (real.cumsum(1) - 1)[:, column:]
    if mask.ndim == 4 and mask.shape[0] == rows and mask.shape[2] == width and mask.shape[3] >= column + width:
        allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        own = torch.arange(column, column + width, device=mask.device).view(1, width, 1).expand(rows, width, 1)
        real = allowed.gather(2, own).squeeze(2)
        return real, torch.where(real, allowed.sum(2) - 1, 0)
    return None


def is_special(ids: Places, special_ids: Int[Tensor, " n"]) -> Mask:
    """Whether a token is one of the special ones, by its id and nothing else."""
    return (ids[..., None] == special_ids).any(-1)
