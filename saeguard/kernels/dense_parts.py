"""What a dense kernel works on: one whole SAE, and the rules at one site whose ops need all of its latents."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saeguard.dense import Reweight, Splice
from saeguard.errors import NotSliceable, OpMismatch
from saeguard.plans import Rule
from saeguard.sae import SAE

KEPT_FLOAT32 = 1 << 28
"""Numbers in an encoder up to which it is kept in float32; a larger one is made float32 a chunk at a time."""


@dataclass(frozen=True, eq=False)
class DensePart:
    """The dense rules on one SAE at one site. ``weights`` has, for each `Reweight`, a weight for every latent."""

    sae: SAE
    rules: tuple[Rule, ...]
    weights: tuple[Float[Tensor, " d_sae"] | None, ...]

    def to(self, device: torch.device) -> "DensePart":
        """A copy on another device."""
        weights = tuple(None if w is None else w.to(device) for w in self.weights)
        return replace(self, sae=self.sae.to(device=device), weights=weights)


def lay_out_dense(sae: SAE, rules: Sequence[Rule]) -> DensePart:
    """Build the part for ``rules``, which all name ``sae`` and one site.

    Raises `NotSliceable` for an SAE that was read in part, `LatentOutOfRange`, and `OpMismatch` where an op asks for
    what the SAE does not have.
    """
    if sae.held is not None:
        raise NotSliceable(
            f"{rules[0].op} on {sae.name}", f"only {len(sae.held)} of its {sae.d_sae} latents were read",
            "A dense op needs all latents: load the SAE without latents=...",
        )  # fmt: skip
    for rule in rules:
        sae.check_latents(rule.latents + (rule.trigger.latents if rule.trigger else ()))
        _check(sae, rule)
    whole = sae.to(device="cpu", dtype=torch.float32 if sae.W_enc.numel() <= KEPT_FLOAT32 else None)
    return DensePart(whole, tuple(rules), tuple(_weights(sae, rule) for rule in rules))


def _check(sae: SAE, rule: Rule) -> None:
    op, kind = rule.op, sae.activation
    if isinstance(op, Splice) and op.error == "boosted" and sae.n_base is None:
        raise OpMismatch(
            f"{op} on {sae.name}", "this SAE has no boosts",
            'Boost it first (saeguard.Boosted), or say error="dropped".',
        )  # fmt: skip
    if not isinstance(op, Reweight):
        return
    if kind == "pursuit":
        raise OpMismatch(
            f"{op} on {sae.name}", "matching pursuit takes atoms out one after another and has no pre-activations",
            "Use Scale or Clamp on some latents, or an SAE of another kind.",
        )  # fmt: skip
    if op.top_k is not None and kind == "groupmax":
        raise OpMismatch(
            f"{op} on {sae.name}", f"the largest of each of {sae.top_k} groups fires there, not the largest of all",
            "Leave top_k out.",
        )  # fmt: skip
    if op.top_k is not None and op.top_k > sae.d_sae:
        raise OpMismatch(f"{op} on {sae.name}", f"it has {sae.d_sae} latents", f"Give top_k from 1 to {sae.d_sae}.")


def _weights(sae: SAE, rule: Rule) -> Float[Tensor, " d_sae"] | None:
    if not isinstance(rule.op, Reweight):
        return None
    weights = torch.full((sae.d_sae,), rule.op.others)
    weights[list(rule.latents)] = torch.tensor(rule.op.weights, dtype=torch.float32)
    return weights
