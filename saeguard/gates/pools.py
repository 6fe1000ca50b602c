"""Pools: one score per token from the evidence of all tokens up to it.

With e_t the evidence at the row's t-th counted token, all sums over counted tokens,

    Rate()         (e_1 + ... + e_t) / t                        DSG's rho, as far as it is known at t
    Rate("prompt") the same over the prompt, where all of it has been seen
    Window(w)      (sum of the last w e) / w                    missing tokens count 0
    Cusum(k)       S_t = max(0, S_{t-1} + e_t - k)              Page's test: benign text never lowers what follows
    Count()        e_1 + ... + e_t
    Peak()         max of e_1 ... e_t
    TopKMean(k)    mean of the k largest of e_1 ... e_t         missing tokens count ``floor``
    TopKMean(k, w) the same over the last w

There is no score (-inf) before the first counted token. Count (of evidence that is never negative), Peak and TopKMean
(likewise) never fall; the others are made to stay with `Latched`. All is summed in float64, so that the cut of a prompt
into passes decides nothing.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from saeguard.errors import BadRule, PhaseUnknown
from saeguard.gates.base import Seen, State, carried, running
from saeguard.gates.checks import one_number, whole


@runtime_checkable
class Pool(Protocol):
    """Frozen data with a pure step. Evidence at tokens that do not count has to be left out by the pool."""

    def begin(self, rows: int, device: torch.device) -> State: ...

    def step(self, state: State, e: Float[Tensor, "batch pos"], seen: Seen) -> tuple[State, Float[Tensor, "batch pos"]]:
        """The next state, and the score at every token; at tokens that do not count it is that of the one before.

        Before the first token that counts it may be anything: `Watch` knows that there is none.
        """
        ...


def _zeros(device: torch.device, *shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64, device=device)


def counted(e: Tensor, seen: Seen) -> Tensor:
    """The evidence, 0 at tokens that do not count."""
    return e.masked_fill(~seen.counts, 0.0)


@dataclass(frozen=True)
class Rate:
    """The mean over the row's tokens so far, or over its prompt. Benign text dilutes it: see Cusum and Window."""

    scope: Literal["running", "prompt"] = "running"

    def __post_init__(self):
        if self.scope not in get_args(Rate.__annotations__["scope"]):
            raise BadRule(f"Rate over {self.scope!r}", "there is no such scope", 'Use "running" or "prompt".')

    def begin(self, rows: int, device: torch.device) -> State:
        """The sum of the evidence and the number of tokens, so far and at the prompt's end."""
        return (_zeros(device, rows, 2), _zeros(device, rows, 2))

    def step(self, state: State, e: Float[Tensor, "batch pos"], seen: Seen) -> tuple[State, Float[Tensor, "batch pos"]]:
        so_far, before = state
        total = running(torch.stack([counted(e, seen), seen.counts.double()], -1), so_far)
        after = carried(total, so_far)
        if self.scope == "running":
            return (after, before), total[..., 0] / total[..., 1].clamp_min(1.0)
        total, ready = at_prompt_end(total, before, seen)
        score = (total[..., 0] / total[..., 1]).masked_fill(~ready | (total[..., 1] == 0), -torch.inf)
        return (after, carried(total, before)), score


@dataclass(frozen=True)
class Window:
    """The mean over the last ``width`` tokens."""

    width: int

    def __post_init__(self):
        whole("Window", self.width)

    def begin(self, rows: int, device: torch.device) -> State:
        return (_zeros(device, rows, self.width),)

    def step(self, state: State, e: Float[Tensor, "batch pos"], seen: Seen) -> tuple[State, Float[Tensor, "batch pos"]]:
        (last,) = state
        scores = []
        for column in range(e.shape[1]):
            moved = torch.cat([last[:, 1:], e[:, column, None]], dim=1)
            last = torch.where(seen.counts[:, column, None], moved, last)
            scores.append(last.sum(1) / self.width)
        return (last,), torch.stack(scores, 1) if scores else e.double()


@dataclass(frozen=True)
class Cusum:
    """What evidence above ``drift`` per token has piled up since it last was at 0."""

    drift: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "drift", one_number("Cusum drift", self.drift))

    def begin(self, rows: int, device: torch.device) -> State:
        return (_zeros(device, rows),)

    def step(self, state: State, e: Float[Tensor, "batch pos"], seen: Seen) -> tuple[State, Float[Tensor, "batch pos"]]:
        """With C_t = S_0 + sum of (e - k), S_t = C_t - min(0, min_{j<=t} C_j)."""
        total = running((e - self.drift).masked_fill(~seen.counts, 0.0), state[0])
        score = total - total.cummin(1).values.clamp_max(0.0)
        return (carried(score, state[0]),), score


@dataclass(frozen=True)
class Count:
    """The sum over all tokens so far."""

    def begin(self, rows: int, device: torch.device) -> State:
        return (_zeros(device, rows),)

    def step(self, state: State, e: Float[Tensor, "batch pos"], seen: Seen) -> tuple[State, Float[Tensor, "batch pos"]]:
        score = running(counted(e, seen), state[0])
        return (carried(score, state[0]),), score


@dataclass(frozen=True)
class Peak:
    """The largest so far."""

    def begin(self, rows: int, device: torch.device) -> State:
        return (_zeros(device, rows) - torch.inf,)

    def step(self, state: State, e: Float[Tensor, "batch pos"], seen: Seen) -> tuple[State, Float[Tensor, "batch pos"]]:
        score = largest(e.masked_fill(~seen.counts, -torch.inf), state[0])
        return (carried(score, state[0]),), score


@dataclass(frozen=True)
class TopKMean:
    """The mean of the ``k`` largest so far, or of the last ``width`` tokens."""

    k: int
    width: int | None = None
    floor: float = 0.0

    def __post_init__(self):
        whole("TopKMean", self.k)
        object.__setattr__(self, "floor", one_number("TopKMean floor", self.floor))
        if self.width is not None:
            whole("TopKMean width", self.width)
            if self.width < self.k:
                raise BadRule(
                    f"TopKMean of {self.k} in {self.width} tokens", "there are not so many", "Give width >= k."
                )

    def begin(self, rows: int, device: torch.device) -> State:
        if self.width is not None:
            return (torch.full((rows, self.width), self.floor, dtype=torch.float64, device=device),)
        return (_zeros(device, rows, self.k) - torch.inf,)

    def step(self, state: State, e: Float[Tensor, "batch pos"], seen: Seen) -> tuple[State, Float[Tensor, "batch pos"]]:
        (best,) = state
        scores = []
        for column in range(e.shape[1]):
            moved = torch.cat([best, e[:, column, None]], dim=1)
            moved = moved.topk(self.k, dim=1).values if self.width is None else moved[:, 1:]
            best = torch.where(seen.counts[:, column, None], moved, best)
            top = best if self.width is None else best.topk(self.k, dim=1).values
            scores.append(top.masked_fill(top.isneginf(), self.floor).sum(1) / self.k)
        return (best,), torch.stack(scores, 1) if scores else e.double()


def largest(values: Tensor, before: Tensor) -> Tensor:
    """The largest of the tokens up to each one, ``batch pos *rest``, and of ``before``."""
    return torch.cat([before[:, None], values], 1).cummax(1).values[:, 1:]


def at_prompt_end(totals: Tensor, before: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
    """``totals`` as they were at the prompt's last token so far, ``batch pos *rest``, and where the prompt is over.

    ``before`` is what they were before this pass. A call that goes on with a row has a longer prompt, of which tokens
    that were generated before are a part; so totals are kept of all tokens. Raises `PhaseUnknown`.
    """
    if seen.prompt is None or seen.ready is None:
        raise PhaseUnknown(
            "a gate over the prompt",
            "the model was called outside generate(), so where the prompt ends is unknown",
            "Say steer(model, plan, prompt_tokens=n), or use a gate over all tokens so far.",
        )
    places = torch.arange(1, totals.shape[1] + 1, device=totals.device)
    none = torch.zeros(totals.shape[0], dtype=places.dtype, device=places.device)
    last = largest(torch.where(seen.prompt, places, 0), none)  # 0: no token of this pass
    index = last.view(*last.shape, *[1] * (totals.ndim - 2)).expand_as(totals)
    return torch.cat([before[:, None], totals], 1).gather(1, index), seen.ready
