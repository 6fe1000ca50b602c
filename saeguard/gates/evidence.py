"""Evidence: one number per token, from the activations of a few latents or from the stream itself.

Hits      1 where any watched latent is above the level, else 0       (DSG, arXiv 2504.08192: a token is hit)
LogOdds   sum_j w_j min(f_j, cap_j) + b                                a sparse logistic head on one token's latents
Probe     sum_i w_i x_i + b                                            the control: a linear probe on the raw stream
"""

from dataclasses import KW_ONLY, dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from saeguard.errors import BadRule
from saeguard.gates.base import Seen
from saeguard.gates.checks import as_weights, check_source, one_number
from saeguard.sites import Site
from saeguard.triggers import as_latents


@runtime_checkable
class Evidence(Protocol):
    """Frozen data with a pure function of what is seen of each token; see `saeguard.gates.base.Leaf` for the rest."""

    @property
    def latents(self) -> tuple[int, ...]: ...
    @property
    def sae(self) -> str | None: ...
    @property
    def site(self) -> Site | None: ...
    @property
    def special(self) -> bool: ...

    @property
    def width(self) -> int | None: ...

    def of(self, seen: Seen) -> Float[Tensor, "batch pos"]:
        """One number per token, in float64."""
        ...


class _OfLatents:
    """Evidence that reads an SAE."""

    @property
    def width(self) -> int | None:
        """None: any stream that its SAE reads."""
        return None


@dataclass(frozen=True)
class Hits(_OfLatents):
    """1.0 at tokens where any of ``latents`` is above ``level``, in activation units, strictly; else 0.0."""

    latents: tuple[int, ...]
    level: float = 0.0
    _: KW_ONLY
    sae: str | None = None
    site: Site | None = None
    special: bool = False

    def __post_init__(self):
        object.__setattr__(self, "latents", as_latents("Hits", self.latents))
        object.__setattr__(self, "level", one_number("Hits level", self.level))
        check_source(self)

    def of(self, seen: Seen) -> Float[Tensor, "batch pos"]:
        hit = (seen.f > self.level).any(-1).double()
        return hit.masked_fill(seen.f.isnan().any(-1), torch.nan)  # a NaN is no hit, and must not pass for none


@dataclass(frozen=True)
class LogOdds(_OfLatents):
    """``sum_j weights_j f_j + bias``: what a logistic head that was fitted to single tokens says of this one.

    With ``caps``, in activation units, what lies above its latent's cap counts as the cap.
    """

    latents: tuple[int, ...]
    weights: tuple[float, ...]
    bias: float = 0.0
    _: KW_ONLY
    caps: tuple[float, ...] | None = None
    sae: str | None = None
    site: Site | None = None
    special: bool = False

    def __post_init__(self):
        object.__setattr__(self, "latents", as_latents("LogOdds", self.latents))
        object.__setattr__(self, "weights", as_weights("LogOdds", self.weights, len(self.latents)))
        object.__setattr__(self, "bias", one_number("LogOdds bias", self.bias))
        if self.caps is not None:
            object.__setattr__(self, "caps", as_weights("LogOdds caps", self.caps, len(self.latents)))
        check_source(self)

    def of(self, seen: Seen) -> Float[Tensor, "batch pos"]:
        f = seen.f.double()
        if self.caps is not None:
            f = torch.minimum(f, _column(self.caps, f))
        return f @ _column(self.weights, f) + self.bias


@dataclass(frozen=True)
class Probe:
    """``sum_i weights_i x_i + bias`` of the raw stream at ``site``: what any SAE gate has to be compared with."""

    weights: tuple[float, ...]
    bias: float = 0.0
    _: KW_ONLY
    site: Site | None = None
    special: bool = False

    def __post_init__(self):
        object.__setattr__(self, "weights", as_weights("Probe", self.weights))
        object.__setattr__(self, "bias", one_number("Probe bias", self.bias))
        check_source(self)
        if not self.weights:
            raise BadRule("a Probe", "it has no weights", "Give one per dimension of the stream.")

    @property
    def latents(self) -> tuple[int, ...]:
        """None: it reads the stream as it is."""
        return ()

    @property
    def sae(self) -> str | None:
        """None, likewise."""
        return None

    @property
    def width(self) -> int | None:
        return len(self.weights)

    def of(self, seen: Seen) -> Float[Tensor, "batch pos"]:
        return seen.x.double() @ _column(self.weights, seen.x) + self.bias


def _column(weights: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64, device=like.device)
