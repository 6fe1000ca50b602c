"""Triggers: frozen data that decides, token by token, whether a rule applies there."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from saeguard.errors import BadRule
from saeguard.ops import as_amount


@runtime_checkable
class Trigger(Protocol):
    """A pure function of the activations of the latents that it watches, all at one token."""

    @property
    def latents(self) -> tuple[int, ...]:
        """The latents of the rule's SAE that it has to see."""
        ...

    def fires(self, f: Float[Tensor, "*tokens k"]) -> Bool[Tensor, "*tokens"]: ...


@dataclass(frozen=True)
class AnyActive:
    """Fires at tokens where any watched latent is above ``threshold``, in activation units, strictly.

    ``AnyActive(S)`` with ``Clamp(-c, when="always")`` on S is the dense hot-token clamp of DSG; watching harmful
    latents and setting a refusal latent is the refusal clamp. Over no latents it never fires.
    """

    latents: tuple[int, ...]
    threshold: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "latents", as_latents("AnyActive", self.latents))
        object.__setattr__(self, "threshold", as_amount("AnyActive threshold", self.threshold))
        if not isinstance(self.threshold, float):
            raise BadRule(
                f"AnyActive with threshold={self.threshold}", "that is not one number", "Give one threshold for all."
            )

    def fires(self, f: Float[Tensor, "*tokens k"]) -> Bool[Tensor, "*tokens"]:
        return (f > self.threshold).any(-1)


TRIGGERS: dict[str, Any] = {"any_active": AnyActive}
"""Names of the triggers in a plan file."""


def as_latents(what: str, latents: Any) -> tuple[int, ...]:
    """``latents`` as a tuple of distinct non-negative ints. Raises `BadRule`."""
    found = tuple(latents) if isinstance(latents, Iterable) else (latents,)
    wrong = [latent for latent in found if isinstance(latent, bool) or not isinstance(latent, int) or latent < 0]
    if wrong:
        raise BadRule(f"{what} latents", f"{wrong[0]!r} is not a latent", "Latents are integers from 0 upwards.")
    if len(set(found)) != len(found):
        twice = sorted({latent for latent in found if found.count(latent) > 1})
        raise BadRule(f"{what} latents", f"{twice} are there more than once", "Name each latent once.")
    return found
