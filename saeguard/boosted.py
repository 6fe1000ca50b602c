"""A boosted SAE is a base with the latents of other SAEs behind its own, which were trained on what it leaves over.

    x_hat = base(x) + sum over boosts of a * f_r @ W_r        f_r = jumprelu(xn @ E_r + b_r), threshold of its own

xn is x as the base reads it and a undoes the base's norm. A boost reads x, not the error, and has no b_dec: where none
of its latents fires, the base stands as it was ("Teach Old SAEs New Domain Tricks", arXiv 2507.12990). The
sum is one SAE whose latents are those of the base followed by those of each boost, so whatever takes an SAE takes it.

A boost is an SAE record whose manifest says {"boost": {"base": fingerprint of its base, "domain": name, ...}}.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saeguard.errors import BoostMismatch, NotSliceable, WidthMismatch
from saeguard.sae import SAE

_PER_LATENT = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0, "maximum": 0, "rank_by": 0}
"""Tensors with an axis of latents, and which it is."""
_DTYPES = ("float64", "float32", "float16", "bfloat16")
_FILLED = {"threshold": 0.0, "maximum": 0.0, "rank_by": 1.0}
"""What stands for a tensor that some of the SAEs do not have: no latent looks at its own then."""


def Boosted(base: SAE, boosts: Sequence[SAE], *, name: str | None = None) -> SAE:
    """``base`` with ``boosts`` behind it, as one SAE; without any latents in them, ``base`` itself.

    Latents 0 .. d_sae-1 are the base's, bit for bit; then come those of the boosts, in the order given, which is of no
    consequence for the sum. On a base that is boosted already they are added to its boosts. Boosts do not know each
    other: where two explain the same part of the error it is added twice, so measure a stack before using it. The
    default name is what `load_sae` finds it by: ``base+domain+domain``.

    Raises `WidthMismatch`, `NotSliceable` when only some latents were read, and `BoostMismatch` for a boost of another
    base, site, norm or model, for one given twice, and for an SAE that is no boost.
    """
    if base.n_base is not None and boosts:
        base, boosts = base_of(base), [*boosts_of(base), *boosts]
    if "boost" in base.manifest and boosts:
        raise _mismatch(base.name, "as the base of boosts", "it is a boost itself", "Give the base that it belongs to.")
    fingerprint, seen = base.fingerprint(), {}
    for boost in boosts:
        _check(base, fingerprint, boost)
        key = boost.fingerprint()
        if key in seen:
            raise _mismatch(boost.name, f"twice on {base.name}", f"it is {seen[key].name} too", "Give each boost once.")
        if boost.d_sae:
            seen[key] = boost
    boosts = list(seen.values())
    if not boosts:
        return base
    kept = [_identity(boost, key) | {"manifest": dict(boost.manifest)} for key, boost in seen.items()]
    return replace(
        base, name=name or "+".join([base.name, *map(domain_of, boosts)]), n_base=base.d_sae,
        manifest={**base.manifest, "boosted": {"base": _identity(base, fingerprint), "boosts": kept}},
        **{key: _joined([base, *boosts], key) for key in _PER_LATENT},
    )  # fmt: skip


def base_of(boosted: SAE) -> SAE:
    """The base of a boosted SAE, as it was given. Raises `BoostMismatch`, `NotSliceable`."""
    parts = _parts(boosted)
    manifest = {key: value for key, value in boosted.manifest.items() if key != "boosted"}
    cut = _cut(boosted, slice(0, boosted.n_base), parts["base"]["dtypes"])
    return replace(boosted, name=parts["base"]["name"], n_base=None, manifest=manifest, **cut)


def boosts_of(boosted: SAE) -> list[SAE]:
    """The boosts of a boosted SAE, as they were given. Raises `BoostMismatch`, `NotSliceable`."""
    parts, found, start = _parts(boosted), [], boosted.n_base or 0
    for part in parts["boosts"]:
        stop = start + part["d_sae"]
        cut = _cut(boosted, slice(start, stop), part["dtypes"])
        cut["b_dec"] = torch.zeros_like(boosted.b_dec, dtype=getattr(torch, part["dtypes"]["b_dec"]))
        found.append(replace(
            boosted, name=part["name"], n_base=None, manifest=part["manifest"], activation="jumprelu", top_k=None,
            pursuit=None, skip=None, **cut,
        ))  # fmt: skip
        start = stop
    return found


def domain_of(boost: SAE) -> str:
    """What a boost was trained for, in one word."""
    return str(boost.manifest.get("boost", {}).get("domain") or boost.name.rpartition("/")[2])


def _check(base: SAE, fingerprint: str, boost: SAE) -> None:
    for sae in (base, boost):
        if sae.held is not None:
            raise NotSliceable(
                f"boosting {base.name} with {boost.name}", f"only {len(sae.held)} latents of {sae.name} were read",
                "Load both without latents=...; a boosted SAE can be narrowed afterwards.",
            )  # fmt: skip
    if (base.d_in, base.d_out) != (boost.d_in, boost.d_out):
        raise WidthMismatch(
            f"boosting {base.name} with {boost.name}",
            f"one reads {base.d_in} numbers and writes {base.d_out}, the other {boost.d_in} and {boost.d_out}",
            "A boost belongs to the base that it was trained on.",
        )
    for what in ("site", "site_out", "model", "norm", "eps"):
        mine, other = getattr(base, what), getattr(boost, what)
        if mine != other and (what != "eps" or base.norm != "none"):
            raise _mismatch(
                boost.name, f"on {base.name}", f"its {what} is {other}, the base's {mine}", "Give a boost of this base."
            )
    said = boost.manifest.get("boost")
    if not isinstance(said, Mapping) or boost.activation != "jumprelu" or boost.skip is not None or boost.b_dec.any():
        raise _mismatch(
            boost.name, f"on {base.name}",
            "it is no boost: one has a manifest with boost, is a JumpReLU, and has neither b_dec nor skip",
            "Train one with `saeguard boost`.",
        )  # fmt: skip
    if said.get("base") != fingerprint:
        raise _mismatch(
            boost.name, f"on {base.name}",
            f"it was trained on another base: the fingerprint of its own is {str(said.get('base'))[:12]}, "
            f"of this one {fingerprint[:12]}",
            "Load the base as it was then, in the dtype of its file, or train a boost of this one.",
        )  # fmt: skip


def _mismatch(boost: str, asked: str, found: str, proceed: str) -> BoostMismatch:
    return BoostMismatch(f"{boost} {asked}", found, proceed)


def _identity(sae: SAE, fingerprint: str) -> dict[str, Any]:
    """What is needed to cut this SAE out again, in plain JSON values."""
    tensors = {name: getattr(sae, name) for name in (*_PER_LATENT, "b_dec")}
    dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items() if t is not None}
    return {"name": sae.name, "fingerprint": fingerprint, "d_sae": sae.d_sae, "dtypes": dtypes}


def _joined(saes: Sequence[SAE], name: str) -> Tensor | None:
    """One tensor of all latents. In memory it lies as the base's does: the bits of products depend on it."""
    given = [getattr(sae, name) for sae in saes]
    if all(tensor is None for tensor in given) or name == "rank_by" and given[0] is None:
        return None
    filled = [
        torch.full((sae.d_sae,), _FILLED[name]) if tensor is None else tensor
        for sae, tensor in zip(saes, given, strict=True)
    ]
    moved = [tensor.to(saes[0].W_enc.device) for tensor in filled]
    if _PER_LATENT[name] == 1 and not moved[0].is_contiguous():
        return torch.cat([tensor.T for tensor in moved]).T
    return torch.cat(moved, dim=_PER_LATENT[name])


def _parts(boosted: SAE) -> Mapping[str, Any]:
    """What the manifest says of the base and the boosts."""
    if boosted.held is not None:
        raise NotSliceable(
            f"the parts of {boosted.name}", f"only {len(boosted.held)} of its {boosted.d_sae} latents were read",
            "Load it without latents=....",
        )  # fmt: skip
    parts = boosted.manifest.get("boosted")
    if boosted.n_base is None or not isinstance(parts, Mapping) or not _are_parts(parts, boosted.n_base, boosted.d_sae):
        raise _mismatch(
            boosted.name, "taken apart into base and boosts", "its manifest does not say which they are",
            "Build it by Boosted.",
        )  # fmt: skip
    return parts


def _are_parts(parts: Mapping[str, Any], n_base: int, d_sae: int) -> bool:
    """Whether a manifest, which anybody may have written, describes a base and boosts of these sizes."""
    listed = [parts.get("base"), *(parts["boosts"] if isinstance(parts.get("boosts"), list) else [])]
    for part in listed:
        dtypes = part.get("dtypes") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or not isinstance(dtypes, Mapping) or type(part.get("d_sae")) is not int:
            return False
        if not isinstance(part.get("name"), str) or not isinstance(part.get("manifest", {}), Mapping):
            return False
        if not {"W_enc", "b_enc", "W_dec", "b_dec"} <= set(dtypes) <= {*_PER_LATENT, "b_dec"}:
            return False
        if not all(isinstance(dtype, str) and dtype in _DTYPES for dtype in dtypes.values()):
            return False
    sizes = [part["d_sae"] for part in listed]
    return min(sizes) > 0 and sizes[0] == n_base and sum(sizes) == d_sae and all("manifest" in p for p in listed[1:])


def _cut(sae: SAE, latents: slice, dtypes: Mapping[str, str]) -> dict[str, Any]:
    """The tensors of some latents; those that their SAE did not have are None again."""
    found: dict[str, Any] = {}
    for name, axis in _PER_LATENT.items():
        tensor = getattr(sae, name)
        if tensor is None or name not in dtypes:
            found[name] = None
            continue
        part = tensor[:, latents] if axis else tensor[latents]
        if axis and not part.T.is_contiguous():
            part = part.contiguous()
        found[name] = part.to(getattr(torch, dtypes[name]))
    return found
