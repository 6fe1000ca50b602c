"""From pre-activations to activations: what decides that a latent fires, one row per kind.

    relu      max(p, 0)            jumprelu     p where p > threshold     tanh_relu  tanh(max(p, 0))
    topk      max(p, 0) of the k   topk_norelu  the k largest p,          abstopk    p of the k
              largest p                         signs kept                           largest |p|
    groupmax  max(p, 0), the largest of each of k groups of neighbours
    pursuit   atoms taken out of x one after another, see `Pursuit`

The first three look at one latent at a time; the others rank, so that a latent depends on all of them. A rank is
found in chunks of latents: a running list of the k largest, and never an array of tokens times latents. Latents that
tie with the k-th largest are all kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Activation = Literal["relu", "jumprelu", "tanh_relu", "topk", "topk_norelu", "abstopk", "groupmax", "pursuit"]

CHUNK = 8192
"""Latents whose pre-activations are held at a time."""


@dataclass(frozen=True)
class Kind:
    """Which fields of an SAE a kind needs, and whether a latent depends on the others."""

    needs: frozenset[str] = frozenset()
    ranks: bool = False


KINDS: dict[str, Kind] = {
    "relu": Kind(),
    "tanh_relu": Kind(),
    "jumprelu": Kind(frozenset({"threshold"})),
    "topk": Kind(frozenset({"top_k"}), ranks=True),
    "topk_norelu": Kind(frozenset({"top_k"}), ranks=True),
    "abstopk": Kind(frozenset({"top_k"}), ranks=True),
    "groupmax": Kind(frozenset({"top_k"}), ranks=True),
    "pursuit": Kind(frozenset({"pursuit"}), ranks=True),
}


@dataclass(frozen=True)
class Pursuit:
    """Matching pursuit: in every round the atom that fits the rest of x best is taken out of it.

    ``rounds`` is the most there are. Unsigned, an atom fits by max(<rest, atom>, 0); signed, by |<rest, atom>|, and
    its coefficient keeps the sign. Atoms are taken as they are, and their repeats add up. A token ends when the norm
    of its rest has fallen below ``residual`` or, with ``stops_on_repeat``, after a round that took no new atom.
    """

    rounds: int
    signed: bool = False
    residual: float = 0.0
    stops_on_repeat: bool = False


def elementwise(kind: str, pre: Float[Tensor, "*tokens k"], threshold: Float[Tensor, " k"] | None) -> Tensor:
    """Activations of the kinds that look at one latent at a time."""
    if kind == "tanh_relu":
        return pre.relu().tanh()
    return pre.relu() if threshold is None else torch.where(pre > threshold.float(), pre, 0.0)


class Ranking:
    """The kinds that rank, over an encoder that is walked through in chunks, for some wanted latents."""

    def __init__(self, kind: str, top_k: int, d_sae: int, wanted: Sequence[int], device: torch.device):
        self.kind, self.top_k, self.d_sae = kind, top_k, d_sae
        step = d_sae // top_k if kind == "groupmax" else 1
        self.step = step
        size = max(CHUNK // step, 1) * step
        self.chunks = [(low, min(low + size, d_sae)) for low in range(0, d_sae, size)]
        index = torch.as_tensor(list(wanted), dtype=torch.long)
        self._wanted = []
        for low, high in self.chunks:
            places = ((index >= low) & (index < high)).nonzero()[:, 0]
            self._wanted.append((places, (index[places] - low).to(device)))
        self._order = torch.cat([places for places, _ in self._wanted]).argsort().to(device)

    def __call__(self, pres: Iterator[Tensor], rank_by: Float[Tensor, " d_sae"] | None) -> Tensor:
        """Activations of the wanted latents; ``pres`` gives one chunk's pre-activations after another."""
        return self._groups(pres) if self.kind == "groupmax" else self._largest(pres, rank_by)

    def _largest(self, pres: Iterator[Tensor], rank_by: Tensor | None) -> Tensor:
        best, held, rank = None, [], []
        for (low, high), (_, columns), pre in zip(self.chunks, self._wanted, pres, strict=True):
            by = pre if rank_by is None else pre * rank_by[low:high]
            by = by.abs() if self.kind == "abstopk" else by
            held.append(pre[..., columns])
            rank.append(by[..., columns])
            merged = by if best is None else torch.cat([best, by], dim=-1)
            best = merged.topk(min(self.top_k, merged.shape[-1]), dim=-1).values
        value = self._in_order(held)
        value = value.relu() if self.kind == "topk" else value
        # "where <" rather than "where >=": a NaN goes on to the output and is refused there
        return value if best is None else torch.where(self._in_order(rank) < best[..., -1:], 0.0, value)

    def _groups(self, pres: Iterator[Tensor]) -> Tensor:
        held = []
        for (_, columns), pre in zip(self._wanted, pres, strict=True):
            p = pre.relu()
            largest = p.unflatten(-1, (-1, self.step)).amax(-1)
            mine = p[..., columns]
            held.append(torch.where(mine < largest[..., columns // self.step], 0.0, mine))
        return self._in_order(held)

    def _in_order(self, held: list[Tensor]) -> Tensor:
        """What was found chunk by chunk, in the order in which it is wanted."""
        return torch.cat(held, dim=-1)[..., self._order]


def pursue(
    x: Float[Tensor, "*tokens d_in"], atoms: Float[Tensor, "d_in d_sae"], how: Pursuit
) -> tuple[Int[Tensor, "*tokens rounds"], Float[Tensor, "*tokens rounds"]]:
    """Which atoms are taken out of each token, and with which coefficients; a coefficient of 0 stands for none."""
    rest, running = x, torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    taken: list[Tensor] = []
    coefficients: list[Tensor] = []
    for _ in range(how.rounds):
        latent, coefficient = _best_atom(rest, atoms, how.signed)
        coefficient = torch.where(running, coefficient, 0.0)
        rest = rest - coefficient[..., None] * atoms.T[latent].float()
        if how.stops_on_repeat:
            running = running & ~_took_nothing_new(latent, coefficient, taken, coefficients)
        running = running & ~(torch.linalg.vector_norm(rest, dim=-1) < how.residual)
        taken.append(latent)
        coefficients.append(coefficient)
        if not bool(running.any()):
            break
    return torch.stack(taken, -1), torch.stack(coefficients, -1)


def _took_nothing_new(latent: Tensor, coefficient: Tensor, taken: list[Tensor], coefficients: list[Tensor]) -> Tensor:
    nothing = coefficient == 0
    for before, amount in zip(taken, coefficients, strict=True):
        nothing = nothing | ((before == latent) & (amount != 0))
    return nothing


def _best_atom(rest: Tensor, atoms: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The atom that fits each token's rest best, the first among equals, and its product with the rest."""
    fits, latents, products = [], [], []
    for low in range(0, atoms.shape[1], CHUNK):
        product = rest @ atoms[:, low : low + CHUNK].float()
        product = product if signed else product.relu()
        fit, latent = (product.abs() if signed else product).max(-1)
        fits.append(fit)
        latents.append(latent + low)
        products.append(product.gather(-1, latent[..., None])[..., 0])
    best = torch.stack(fits, -1).argmax(-1, keepdim=True)
    return torch.stack(latents, -1).gather(-1, best)[..., 0], torch.stack(products, -1).gather(-1, best)[..., 0]
