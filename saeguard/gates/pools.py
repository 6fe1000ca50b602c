"""Pools: one score per token from the evidence of all tokens up to it.

With e_t the evidence at the row's t-th counted token, all sums over counted tokens,

    Rate()         (e_1 + ... + e_t) / t                        DSG's rho, as far as it is known at t
    Rate("prompt") the same over the prompt, once all of it has been seen
    Window(w)      (sum of the last w e) / w                    missing tokens count 0
    Cusum(k)       S_t = max(0, S_{t-1} + e_t - k)              Page's test: benign text never lowers what follows
    Count()        e_1 + ... + e_t
    Peak()         max of e_1 ... e_t
    TopKMean(k)    mean of the k largest of e_1 ... e_t         missing tokens count 0

Count (of evidence that is never negative), Peak and TopKMean (likewise) never fall; the others are made to stay with
`Latched`. All is summed in float64, so that the cut of a prompt into passes decides nothing.
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

    @property
    def needs_phase(self) -> bool: ...

    def begin(self, rows: int, device: torch.device) -> State: ...

    def step(self, state: State, e: Float[Tensor, "batch pos"], seen: Seen) -> tuple[State, Float[Tensor, "batch pos"]]:
        """The next state, and the score at every token; at tokens that do not count it is that of the one before."""
        ...


def _zeros(device: torch.device, *shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64, device=device)


def counted(e: Tensor, seen: Seen) -> Tensor:
    """The evidence, 0 at tokens that do not count."""
    return e.masked_fill(~seen.counts, 0.0)


class _OfAll:
    """A pool that need not know where the prompt ends."""

    @property
    def needs_phase(self) -> bool:
        """Never."""
        return False


@dataclass(frozen=True)
class Rate:
    """The mean over the row's tokens so far, or over its prompt. Benign text dilutes it: see Cusum and Window."""

    scope: Literal["running", "prompt"] = "running"

    def __post_init__(self):
        if self.scope not in get_args(Rate.__annotations__["scope"]):
            raise BadRule(f"Rate over {self.scope!r}", "there is no such scope", 'Use "running" or "prompt".')

    @property
    def needs_phase(self) -> bool:
        return self.scope == "prompt"

    def begin(self, rows: int, device: torch.device) -> State:
        return (_zeros(device, rows), _zeros(device, rows))

    def step(self, state: State, e: Float[Tensor, "batch pos"], seen: Seen) -> tuple[State, Float[Tensor, "batch pos"]]:
        counts = seen.counts
        if self.scope == "prompt":
            counts = counts & prompt_of(seen)
        total = running(e.masked_fill(~counts, 0.0), state[0])
        n = running(counts.double(), state[1])
        score = total / n.clamp_min(1.0)
        if seen.ready is not None and self.scope == "prompt":
            score = score.masked_fill(~seen.ready, 0.0)
        return (carried(total, state[0]), carried(n, state[1])), score


@dataclass(frozen=True)
class Window(_OfAll):
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
class Cusum(_OfAll):
    """What evidence above ``drift`` per token has piled up since it last was at 0."""

    drift: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "drift", one_number("Cusum drift", self.drift))

    def begin(self, rows: int, device: torch.device) -> State:
        return (_zeros(device, rows),)

    def step(self, state: State, e: Float[Tensor, "batch pos"], seen: Seen) -> tuple[State, Float[Tensor, "batch pos"]]:
        """With C_t = S_0 + sum of (e - k), S_t = C_t - min(0, min_{j<=t} C_j)."""
        if not e.shape[1]:
            return state, e.double()
        total = running((e - self.drift).masked_fill(~seen.counts, 0.0), state[0])
        score = total - total.cummin(1).values.clamp_max(0.0)
        return (score[:, -1],), score


@dataclass(frozen=True)
class Count(_OfAll):
    """The sum over all tokens so far."""

    def begin(self, rows: int, device: torch.device) -> State:
        return (_zeros(device, rows),)

    def step(self, state: State, e: Float[Tensor, "batch pos"], seen: Seen) -> tuple[State, Float[Tensor, "batch pos"]]:
        score = running(counted(e, seen), state[0])
        return (carried(score, state[0]),), score


@dataclass(frozen=True)
class Peak(_OfAll):
    """The largest so far; before the first counted token there is none, and it is -inf."""

    def begin(self, rows: int, device: torch.device) -> State:
        return (_zeros(device, rows) - torch.inf,)

    def step(self, state: State, e: Float[Tensor, "batch pos"], seen: Seen) -> tuple[State, Float[Tensor, "batch pos"]]:
        if not e.shape[1]:
            return state, e.double()
        score = torch.maximum(e.masked_fill(~seen.counts, -torch.inf).cummax(1).values, state[0][:, None])
        return (score[:, -1],), score


@dataclass(frozen=True)
class TopKMean(_OfAll):
    """The mean of the ``k`` largest so far."""

    k: int

    def __post_init__(self):
        whole("TopKMean", self.k)

    def begin(self, rows: int, device: torch.device) -> State:
        return (_zeros(device, rows, self.k),)

    def step(self, state: State, e: Float[Tensor, "batch pos"], seen: Seen) -> tuple[State, Float[Tensor, "batch pos"]]:
        (best,) = state
        scores = []
        for column in range(e.shape[1]):
            moved = torch.cat([best, e[:, column, None]], dim=1).topk(self.k, dim=1).values
            best = torch.where(seen.counts[:, column, None], moved, best)
            scores.append(best.mean(1))
        return (best,), torch.stack(scores, 1) if scores else e.double()


def prompt_of(seen: Seen) -> Tensor:
    """The tokens of the prompt. Raises `PhaseUnknown`."""
    if seen.prompt is None:
        raise PhaseUnknown(
            "a gate over the prompt",
            "the model was called outside generate(), so where the prompt ends is unknown",
            "Say steer(model, plan, prompt_tokens=n), or use a gate over all tokens so far.",
        )
    return seen.prompt
