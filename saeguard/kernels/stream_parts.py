"""What a stream kernel works on: the rules at one site that change x as a whole and need no activation for it.

    Misdirect   x' = length * u          u fixed; length is c, or c times the norm of x
    Project     x' = x - s (x Q) Q^T     the columns of Q: an orthonormal basis of the span of W_dec[latents]

Only what triggers watch is ever encoded, so of an SAE with a million latents a few rows and columns are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saeguard.dense import Misdirect, Project
from saeguard.plans import Rule
from saeguard.sae import SAE

SAME = 1e-6
"""Of a decoder row's length: what is left of it outside of the other rows' span, below which it lies in that span."""


@dataclass(frozen=True, eq=False)
class StreamPart:
    """The rules on one SAE at one site; ``rules`` below counts this part's rules only."""

    sae: SAE
    """Narrowed to the latents that the rules name or watch."""
    rules: tuple[Rule, ...]
    watched: tuple[Int[Tensor, " _"] | None, ...]
    """Per rule, the places of the latents that its trigger watches among those that the SAE holds."""
    basis: tuple[Float[Tensor, "d_out _"], ...]
    """Per rule: u in one column, or the columns of Q."""

    def to(self, device: torch.device) -> "StreamPart":
        """A copy on another device."""
        watched = tuple(None if places is None else places.to(device) for places in self.watched)
        basis = tuple(columns.to(device) for columns in self.basis)
        return replace(self, sae=self.sae.to(device=device), watched=watched, basis=basis)


def lay_out_stream(sae: SAE, rules: Sequence[Rule]) -> StreamPart:
    """Build the part for ``rules``, which all name ``sae`` and one site. Raises `LatentOutOfRange`."""
    named = [rule.latents + (rule.trigger.latents if rule.trigger else ()) for rule in rules]
    for latents in named:
        sae.check_latents(latents)
    distinct = list(dict.fromkeys(latent for latents in named for latent in latents))
    place = {latent: index for index, latent in enumerate(distinct)}
    narrowed = sae.narrow(distinct).to(device="cpu")
    if not sae.ranks:  # a few latents; a ranking encoder is whole, and is made float32 a chunk at a time
        narrowed = narrowed.to(dtype=torch.float32)
    places = lambda latents: torch.tensor([place[latent] for latent in latents], dtype=torch.long)
    return StreamPart(
        sae=narrowed,
        rules=tuple(rules),
        watched=tuple(None if rule.trigger is None else places(rule.trigger.latents) for rule in rules),
        basis=tuple(_basis(rule, narrowed.W_dec[places(rule.latents)]) for rule in rules),
    )


def _basis(rule: Rule, W_dec: Float[Tensor, "k d_out"]) -> Float[Tensor, "d_out _"]:
    if isinstance(rule.op, Misdirect):
        return torch.tensor(rule.op.direction(W_dec.shape[1]), dtype=torch.float32)[:, None]
    assert isinstance(rule.op, Project)
    return orthonormal(W_dec)


def orthonormal(rows: Float[Tensor, "k d"]) -> Float[Tensor, "d rank"]:
    """Orthonormal columns that span what the rows span; rows of zeros and those that depend on others add nothing."""
    unit = rows.double()
    unit = unit / torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    _, sizes, right = torch.linalg.svd(unit, full_matrices=False)
    return right[sizes > SAME].T.float().contiguous()
