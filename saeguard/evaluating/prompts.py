"""Prompts as they are deployed: the chat template around what a user says, as token ids, one row or padded rows.

A tokenizer without a chat template gets the text itself, behind its BOS if it has one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

Side = Literal["left", "right"]
GO_ON = "Go on."
"""What the model is taken to have said between two turns of a user."""
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


def chat_ids(tokenizer: Any, turns: Sequence[str]) -> list[int]:
    """A conversation in which the model is to speak next; ``turns`` are the user's."""
    if not getattr(tokenizer, "chat_template", None):
        return bare_ids(tokenizer, "\n".join(turns))
    said: list[dict[str, str]] = []
    for turn in turns:
        said += [{"role": "assistant", "content": GO_ON}] if said else []
        said.append({"role": "user", "content": turn})
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return token_ids(tokenizer, text)


def bare_ids(tokenizer: Any, text: str) -> list[int]:
    """A text as it is, behind BOS if there is one."""
    return [*([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), *token_ids(tokenizer, text)]


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text and nothing else."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Frame:
    """The template's ids before and after what a user says, for messages that are put together from ids."""

    head: tuple[int, ...]
    tail: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> "Frame":
        """The frame of one message."""
        if not getattr(tokenizer, "chat_template", None):
            return cls(tuple(bare_ids(tokenizer, "")), ())
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
        )
        head, _, tail = text.partition(_MARK)
        return cls(tuple(token_ids(tokenizer, head)), tuple(token_ids(tokenizer, tail)))

    def around(self, ids: Sequence[int]) -> list[int]:
        """One row."""
        return [*self.head, *ids, *self.tail]


def padded(
    rows: Sequence[Sequence[int]], side: Side, device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "row column"], Int[Tensor, "row column"]]:
    """Rows as one tensor, and its mask: 1 where a token is. The ids of padding are 0, which the mask hides."""
    width = max(map(len, rows), default=0)
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, place] = torch.tensor(list(row), dtype=torch.long)
        mask[number, place] = 1
    return ids.to(device), mask.to(device)


def places(mask: Int[Tensor, "row column"]) -> Int[Tensor, "row column"]:
    """Each token's position among the real tokens of its row, as generate counts them."""
    return (mask.cumsum(1) - 1).clamp(min=0)
