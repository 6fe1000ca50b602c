"""Which SAE each name in a plan means: one that was given, or else a file that is read as far as it is needed."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn

from saeguard.errors import AmbiguousSAE
from saeguard.loaders import load_sae
from saeguard.loaders.live import SAEs, as_ours
from saeguard.plans import Plan
from saeguard.sae import SAE

_COMPARED = 8
"""Latents by which two SAEs that were read in part are told apart."""


def load_all(plans: Sequence[Plan | None], saes: SAEs) -> dict[str, SAE]:
    """The SAEs of all rules and gates, by the names in the plans: those given, and else as much as is needed of a file.

    Raises `AmbiguousSAE`, and what `load_sae` raises.
    """
    listed: Any = [saes] if isinstance(saes, SAE | nn.Module) else saes  # those of sae_lens can be iterated over
    if isinstance(saes, Mapping):
        given = {name: as_ours(sae) for name, sae in saes.items()}
    else:
        given = _by_name(map(as_ours, listed))
    wanted: dict[str, dict[int, None] | None] = {}  # None: a dense op needs all latents
    for rule in (rule for plan in plans if plan is not None for rule in plan.rules):
        for leaf in rule.gate.leaves if rule.gate else ():
            if leaf.latents and (mine := wanted.setdefault(leaf.sae or rule.sae, {})) is not None:
                mine.update(dict.fromkeys(leaf.latents))
        watched, found = rule.trigger.latents if rule.trigger else (), wanted.setdefault(rule.sae, {})
        if rule.needs_all:
            wanted[rule.sae] = None
        elif found is not None:
            found.update(dict.fromkeys(rule.latents + watched))
    loaded = {
        name: given[name] if name in given else load_sae(name, latents=None if latents is None else tuple(latents))
        for name, latents in wanted.items()
    }
    for (name, sae), (other, twin) in combinations(loaded.items(), 2):
        if sae.key != twin.key and _is_one_dictionary(sae, twin):
            raise AmbiguousSAE(
                f"rules on {name} and {other}",
                "both are one SAE, read twice, and latents that both set could be edited twice",
                "Name it in one way in all rules.",
            )
    return loaded


def are_one(a: SAE, b: SAE) -> bool:
    """Whether two SAEs are one, read alike or not."""
    return a.key == b.key or _is_one_dictionary(a, b)


def _is_one_dictionary(a: SAE, b: SAE) -> bool:
    """Whether two SAEs, read differently or with other boosts, have a latent in common, weights and all."""
    if a.is_vectors and b.is_vectors and a.site != b.site:  # one vector may be added at several layers
        return False
    n, also = (sae.n_base or sae.d_sae for sae in (a, b))
    if (n, a.d_in, a.d_out) != (also, b.d_in, b.d_out) or {a.held, b.held, a.n_base, b.n_base} == {None}:
        return False
    common = sorted(set(range(n)) & set(a.held or range(n)) & set(b.held or range(n)))[:_COMPARED]
    if not common:
        return False
    return torch.equal(a.narrow(common).W_dec.cpu().float(), b.narrow(common).W_dec.cpu().float())


def _by_name(saes: Iterable[SAE]) -> dict[str, SAE]:
    given: dict[str, SAE] = {}
    for sae in saes:
        if given.setdefault(sae.name, sae).key != sae.key:
            raise AmbiguousSAE(
                f"rules on {sae.name}",
                "two different SAEs of that name were given",
                "Give them as a mapping, saes={'a': first, 'b': second}, and name 'a' and 'b' in the rules.",
            )
    return given
