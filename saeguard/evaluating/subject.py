"""Who is asked: a model as it is, or behind something that may step in and says of each row whether it did.

Measures of this folder take a `Subject`, so that the same code asks the plain model, a plan and a guardrail.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Verdict:
    """Of one row: whether something stepped in, and whether it ended the row instead of editing it."""

    opened: bool = False
    stopped: bool = False


@runtime_checkable
class Subject(Protocol):
    """A model, its tokenizer, and what stands between them and who asks."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def tokenizer(self) -> Any: ...

    def passes(self, prompt_tokens: Sequence[int]) -> AbstractContextManager[Callable[[], Sequence[Verdict]]]:
        """A block for forward passes of so many rows, whose prompts have so many real tokens.

        The value says, when it is called, what has become of each row so far, earlier passes of its cache included.
        """
        ...

    def write(
        self, ids: Int[Tensor, "row column"], mask: Int[Tensor, "row column"], **options: Any
    ) -> tuple[Int[Tensor, "row columns"], Sequence[Verdict]]:
        """What ``generate`` returns for prompts padded on the left, and what became of each row."""
        ...


@dataclass(frozen=True, eq=False)
class Plain:
    """The model as it is now, with whatever steers it; nothing tells of the rows."""

    model: nn.Module
    tokenizer: Any

    @contextmanager
    def passes(self, prompt_tokens: Sequence[int]) -> Iterator[Callable[[], Sequence[Verdict]]]:
        """See `Subject`."""
        yield lambda: (Verdict(),) * len(prompt_tokens)

    def write(
        self, ids: Int[Tensor, "row column"], mask: Int[Tensor, "row column"], **options: Any
    ) -> tuple[Int[Tensor, "row columns"], Sequence[Verdict]]:
        """See `Subject`."""
        generate: Any = self.model.generate
        return generate(input_ids=ids, attention_mask=mask, **options), (Verdict(),) * len(ids)


def device_of(subject: Subject) -> torch.device:
    """Where ids have to be."""
    return next(subject.model.parameters()).device


def special_id(subject: Subject, name: str) -> int | None:
    """``bos``, ``pad`` or ``eos`` of the tokenizer."""
    return getattr(subject.tokenizer, f"{name}_token_id", None)
