"""Steering vectors from elsewhere as rules: `Add` on an SAE that has a decoder and nothing else.

    happy = vectors({Site("resid_post", 12): v}, name="happy")          tensors, or an object with .directions
    happy = load_vectors("control.gguf")                                every site of a file

    with steer(model, happy.plan(1.5), saes=happy.saes): ...

x moves by ``strength * v`` where the rule applies, special tokens only on request; phases, gates and plans per row are
those of any rule. Which site a number of a file or an object means is said in `saeguard.loaders.vectors`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saeguard.errors import SiteNotFound, UnsupportedFormat
from saeguard.gates.base import Gate
from saeguard.loaders import load_sae
from saeguard.loaders.places import resolve
from saeguard.loaders.source import Source
from saeguard.loaders.stored import all_finite
from saeguard.loaders.vectors import sites, spelled
from saeguard.ops import Add, Unit
from saeguard.plans import Plan, Rule
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.tokens import Phase


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors at one or more sites; ``saes`` has, under the name by which rules know it, an SAE for each site."""

    name: str
    saes: Mapping[str, SAE]

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where they are added."""
        return tuple(sae.site for sae in self.saes.values() if sae.site is not None)

    def plan(
        self,
        strength: float = 1.0,
        *,
        at: Sequence[Site] | None = None,
        index: int = 0,
        unit: Unit = "activation",
        phase: Phase = "all",
        special: bool = False,
        gate: Gate | None = None,
    ) -> Plan:
        """Add ``strength`` times the vector at each site, or those of ``at``; ``index`` says which where there are
        several.

        With ``unit="norm"`` the strength is a multiple of the norm of x. Raises `SiteNotFound`.
        """
        wanted = self.sites if at is None else tuple(at)
        if missing := [str(site) for site in wanted if site not in self.sites]:
            raise SiteNotFound(
                f"vectors {self.name} at {', '.join(missing)}", f"they are at {', '.join(map(str, self.sites))}",
                "A rule can put one elsewhere: Rule(name, (0,), Add(1.0), site=...).",
            )  # fmt: skip
        op = Add(float(strength), unit=unit)
        rules = [
            Rule(name, (index,), op, phase=phase, special=special, gate=gate)
            for name, sae in self.saes.items()
            if sae.site in wanted
        ]
        return Plan(tuple(rules), self.name)


def vectors(given: Any, *, name: str, model: str | None = None) -> Vectors:
    """Vectors that are in memory: a mapping from sites to tensors, or an object whose ``directions`` is one.

    A site is a `Site`, its text, or a number N that stands for resid_post.N, as in repeng's ``ControlVector``; a tensor
    or array is one vector, or a matrix of one per row. ``model`` is the name of the model that they are for, if rules
    on others are to be refused. Raises `UnsupportedFormat`, `SiteNotFound`.
    """
    directions = getattr(given, "directions", given)
    if not isinstance(directions, Mapping) or not directions:
        raise UnsupportedFormat(
            f"vectors {name!r} of {type(given).__name__}", "it is no mapping from sites to vectors, or an empty one",
            'Give {Site("resid_post", 12): tensor}, or a ControlVector.',
        )  # fmt: skip
    saes: dict[str, SAE] = {}
    for where, value in directions.items():
        site = Site("resid_post", int(where)) if isinstance(where, int | np.integer) else Site.parse(where)
        matrix = _matrix(value, f"vectors {name!r} at {site}")
        known_as = f"{name}@{spelled(site)}"
        if known_as in saes:
            raise UnsupportedFormat(f"vectors {name!r}", f"two are at {site}", "Name each site once.")
        saes[known_as] = _sae(known_as, matrix, site, model)
    return Vectors(name, saes)


def load_vectors(path: str | Path, site: Site | str | None = None) -> Vectors:
    """Every site of a file of vectors; ``site`` is for a file that does not say where they belong.

    A plan that is made of them finds the file again by its path. Raises what `load_sae` raises.
    """
    place = resolve(str(path))
    found = sites(Source(place.path))
    if site is not None or not found:
        sae = load_sae(str(path), site)
        return Vectors(Path(path).stem, {f"{path}@{spelled(sae.site)}" if sae.site else str(path): sae})
    names = [f"{path}@{spelled(one)}" for one in found]
    return Vectors(Path(path).stem, {known_as: load_sae(known_as) for known_as in names})


def _sae(name: str, matrix: Float[Tensor, "n d"], site: Site, model: str | None) -> SAE:
    n, d = matrix.shape
    return SAE(
        name=name, W_enc=torch.zeros(d, n), b_enc=torch.zeros(n), W_dec=matrix, b_dec=torch.zeros(d), site=site,
        model=model, manifest={"format": "vectors", "architecture": "vectors", "vectors": True},
    )  # fmt: skip


def _matrix(value: Any, what: str) -> Float[Tensor, "n d"]:
    """A copy on the CPU, in float32, with one vector per row."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))  # a file's are read-only
        found = tensor.detach().to("cpu", torch.float32, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedFormat(what, f"{short(value)} is no tensor ({error})", "Give a tensor or an array.") from error
    if found.ndim not in (1, 2) or 0 in found.shape or not all_finite(found):
        raise UnsupportedFormat(
            what, f"its shape is {tuple(found.shape)}" + ("" if all_finite(found) else ", with NaN or infinity"),
            "Give a vector, or a matrix of one per row, of finite numbers.",
        )  # fmt: skip
    return found if found.ndim == 2 else found[None]
