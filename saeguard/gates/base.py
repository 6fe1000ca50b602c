"""What a gate is: a pure step from a row's state and the tokens of one pass to the next state and a verdict per token.

A gate is built of leaves, each of which reads one stream, through some latents of an SAE or as it is. Everything that a
gate remembers is in its state, a tree of tensors whose first axis is the row; so rows can be permuted, as beams are,
and a state can be kept and gone back to, as when draft tokens are thrown away.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saeguard.axes import Mask, Stream
from saeguard.sites import Site

State = tuple[Any, ...]
"""A tree of tensors, ``row ...`` each."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What one leaf sees of one pass. ``f`` holds its latents' activations in its order, ``x`` the stream itself.

    ``counts`` are the tokens that it may look at: real, and not special unless it asks for those. ``prompt`` are the
    prompt's real tokens, and ``ready`` says at which tokens the whole prompt has been seen: its last one and all that
    follow. Both are None where the call does not say where its prompt ends. ``ids`` are None where they are unknown.
    """

    f: Float[Tensor, "batch pos k"]
    x: Stream
    counts: Mask
    prompt: Mask | None
    ready: Mask | None
    ids: Int[Tensor, "batch pos"] | None = None

    def __getitem__(self, columns: slice) -> "Seen":
        return self._each(lambda tensor: tensor[:, columns])

    def of_rows(self, rows: Int[Tensor, " row"]) -> "Seen":
        """Row i is what row ``rows[i]`` was."""
        return self._each(lambda tensor: tensor[rows])

    def _each(self, part: Callable[[Tensor], Tensor]) -> "Seen":
        prompt, ready, ids = (None if one is None else part(one) for one in (self.prompt, self.ready, self.ids))
        return Seen(part(self.f), part(self.x), part(self.counts), prompt, ready, ids)


@dataclass(frozen=True, eq=False)
class Verdict:
    """Per token: whether the gate is open there, and the score that decided, for people and for calibration.

    A score of -inf stands for none: nothing has been counted in the row, or its prompt is not over. Such a gate is
    closed, and so is its `Not`, so that a row's padding and its special tokens open nothing.
    """

    opened: Mask
    score: Float[Tensor, "batch pos"]

    @property
    def closed(self) -> Mask:
        """Where a score says so; neither open nor closed is a gate without one."""
        return ~self.opened & ~self.score.isneginf()

    def of_rows(self, rows: Int[Tensor, " row"]) -> "Verdict":
        """Row i is what row ``rows[i]`` was."""
        return Verdict(self.opened[rows], self.score[rows])


@runtime_checkable
class Leaf(Protocol):
    """The part of a gate that reads: some latents of an SAE, or none and the stream itself, at one site.

    ``sae`` and ``site`` are None where they are those of the rule that the gate belongs to.
    """

    @property
    def latents(self) -> tuple[int, ...]: ...
    @property
    def sae(self) -> str | None: ...
    @property
    def site(self) -> Site | None: ...
    @property
    def special(self) -> bool:
        """Whether it looks at special tokens too."""
        ...

    @property
    def width(self) -> int | None:
        """Of the stream that it was fitted on, where it reads that as it is; None for latents."""
        ...


@runtime_checkable
class Gate(Protocol):
    """See the module's text. A gate that is latched stays open for the row once it has opened."""

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """What it reads, in the order in which `step` is given it."""
        ...

    @property
    def monotone(self) -> bool:
        """Whether it never closes again in a row, whatever follows."""
        ...

    def begin(self, rows: int, device: torch.device) -> State:
        """The state of rows of which nothing has been seen."""
        ...

    def step(self, state: State, seen: Sequence[Seen]) -> tuple[State, Verdict]:
        """The tokens of one pass, ``seen`` per leaf. Tokens that do not count leave the state as it was."""
        ...


def over_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """``function`` of every tensor of a state."""
    return tuple(over_state(function, part) if isinstance(part, tuple) else function(part) for part in state)


def carried(states: Tensor, before: Tensor) -> Tensor:
    """The last of the ``batch pos ...`` states of a pass; after a pass of no tokens, what was ``before``."""
    return states[:, -1].clone() if states.shape[1] else before  # a view would keep those of all tokens alive


def running(values: Tensor, before: Tensor) -> Tensor:
    """Sums over the tokens up to each one, ``batch pos *rest``, in one order however the tokens are cut into passes."""
    return torch.cat([before[:, None], values], 1).cumsum(1)[:, 1:]


def latest(opened: Bool[Tensor, "batch pos"], before: Bool[Tensor, " batch"]) -> Bool[Tensor, "batch pos"]:
    """Whether it was open at any token up to each one."""
    return (opened.cumsum(1) > 0) | before[:, None]
