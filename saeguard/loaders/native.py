"""saeguard's own format: one safetensors file, whose header says what the weights mean.

    sae.safetensors    W_enc b_enc W_dec b_dec [threshold] [maximum] [skip] [rank_by], header key "saeguard" = JSON:
                       {"schema": 1, "name", "activation", "top_k", "pursuit", "norm", "eps", "site", "site_out",
                        "model", "n_base", "manifest"}, where what an SAE does not have may be left out

The header is read and checked (size, names, dtypes, shapes) before any tensor is allocated.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as short
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from saeguard import strict_json
from saeguard.activations import KINDS, Pursuit
from saeguard.archives import Archive
from saeguard.errors import SaeguardError, UnsupportedFormat
from saeguard.loaders.source import MAX_DEPTH, Hints, Source, broken, depth
from saeguard.loaders.stored import Piece, Stored, check_specs, matrix
from saeguard.norms import NORMS
from saeguard.sae import SAE, TENSORS
from saeguard.sites import Site

FILE = "sae.safetensors"
SCHEMA = 1
_AXES = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "b_dec": None, "threshold": 0, "maximum": 0, "skip": None, "rank_by": 0}
_REQUIRED = {"W_enc", "b_enc", "W_dec", "b_dec"}
_TEXT, _NUMBER = (str, type(None)), (int, type(None))
_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,), "activation": (str,), "top_k": _NUMBER, "pursuit": (dict, type(None)), "norm": (str,),
    "eps": (float,), "site": _TEXT, "site_out": _TEXT, "model": _TEXT, "n_base": _NUMBER, "manifest": (dict,),
}  # fmt: skip
_MODE = 0o644
_MAX_ROUNDS, _MAX_RESIDUAL = 1 << 16, 1e30


def recognises(source: Source) -> bool:
    """Whether the file, or ``sae.safetensors`` in the folder, has a saeguard header."""
    name = source.main or FILE
    return name.endswith(".safetensors") and source.has(name) and "saeguard" in source.archive(name).values


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`."""
    archive = source.archive(source.main or FILE)
    meta = _meta(archive)
    names = set(archive.specs)
    if not _REQUIRED <= names <= set(TENSORS):
        raise broken(archive.path, f"tensors {sorted(names)}, not {sorted(_REQUIRED)} with {sorted(TENSORS)} allowed")
    (d_in, d_sae), (_, d_out) = matrix(archive, "W_enc"), matrix(archive, "W_dec")
    expected = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "skip": (d_in, d_out)}
    check_specs(archive, {name: expected.get(name, (d_sae,)) for name in names})
    try:
        site, site_out = (Site.parse(meta[key]) if meta.get(key) else None for key in ("site", "site_out"))
        pursuit = _pursuit(meta["pursuit"]) if meta.get("pursuit") else None
    except (SaeguardError, TypeError) as error:
        raise broken(archive.path, f"its header: {error}") from error
    return Stored(
        family="saeguard", name=meta["name"], d_in=d_in, d_sae=d_sae, d_out=d_out, activation=meta["activation"],
        pieces={name: Piece(archive, name, _AXES[name]) for name in sorted(names)},
        top_k=meta.get("top_k"), pursuit=pursuit, norm=meta.get("norm", "none"), eps=meta.get("eps", 1e-5),
        site=hints.site or site, site_out=hints.site_out or site_out, model=hints.model or meta.get("model"),
        n_base=meta.get("n_base"), manifest=meta.get("manifest", {}),
    )  # fmt: skip


def save_sae(sae: SAE, path: str | Path) -> Path:
    """Write ``sae`` to a file (or ``sae.safetensors`` in a folder), whole or not at all; the dtypes are kept."""
    target = Path(path)
    if target.suffix != ".safetensors":
        target = target / FILE
    if sae.held is not None:
        raise UnsupportedFormat(
            f"writing SAE {sae.name}", f"only {len(sae.held)} of its {sae.d_sae} latents were read",
            "Load it without latents=....",
        )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(sae, name) for name in TENSORS if getattr(sae, name) is not None}
    temporary = target.with_suffix(".partial")
    try:
        text = json.dumps(_header(sae), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UnsupportedFormat(
            f"writing SAE {sae.name}", f"its manifest does not go into JSON ({error})",
            "Put plain values into the manifest: str, int, float, bool, None, lists and dicts of them.",
        ) from error  # fmt: skip
    save_file(_apart(tensors), temporary, metadata={"saeguard": text})
    temporary.chmod(_MODE)  # safetensors writes files that only their owner can read
    os.replace(temporary, target)
    return target


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, which safetensors refuses."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        shared = any(whole.untyped_storage().data_ptr() == one.untyped_storage().data_ptr() for one in found.values())
        found[name] = whole.clone() if shared else whole
    return found


def _header(sae: SAE) -> Mapping[str, Any]:
    manifest = dict(sae.manifest)
    if "sha256" in manifest:  # of the files that it was read from; those of this file are taken when it is read
        manifest["source_sha256"] = manifest.pop("sha256")
    meta: dict[str, Any] = {
        "schema": SCHEMA, "name": sae.name, "activation": sae.activation, "top_k": sae.top_k,
        "site": str(sae.site) if sae.site else None, "model": sae.model, "manifest": manifest,
    }  # fmt: skip
    if sae.site_out is not None:
        meta["site_out"] = str(sae.site_out)
    if sae.n_base is not None:
        meta["n_base"] = sae.n_base
    if sae.norm != "none":
        meta |= {"norm": sae.norm, "eps": float(sae.eps)}
    return meta if sae.pursuit is None else meta | {"pursuit": asdict(sae.pursuit)}


def _pursuit(said: Mapping[str, Any]) -> Pursuit:
    found = Pursuit(**said)
    flags = type(found.signed) is bool and type(found.stops_on_repeat) is bool
    if type(found.rounds) is not int or not 0 < found.rounds <= _MAX_ROUNDS or not flags:
        raise TypeError(f"pursuit {short(said)}")
    if type(found.residual) not in (int, float) or not abs(found.residual) < _MAX_RESIDUAL:
        raise TypeError(f"pursuit {short(said)}")
    return found


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """What steering looks at has to be of its kind."""
    special, shape = manifest.get("special_ids", []), manifest.get("model_shape", {})
    if not isinstance(special, list) or not all(type(number) is int for number in special):
        raise broken(path, f"special_ids {short(special)}")
    if not isinstance(shape, dict) or not isinstance(manifest.get("processing", {}), dict):
        raise broken(path, f"model_shape {short(shape)}, processing {short(manifest.get('processing'))}")


def _meta(archive: Archive) -> dict[str, Any]:
    path = archive.path
    try:
        meta = strict_json.parse(archive.values["saeguard"])
        schema, _, _ = meta["schema"], meta["name"], meta["activation"]
    except (KeyError, TypeError, ValueError) as error:
        raise broken(path, f"the saeguard header lacks {error}") from error
    if schema != SCHEMA:
        raise UnsupportedFormat(
            f"SAE file {path.name}", f"its schema is {schema!r}, this version reads {SCHEMA}", "Update saeguard."
        )
    for key, kinds in _FIELDS.items():
        if key in meta and not isinstance(meta[key], kinds) or isinstance(meta.get(key), bool):
            raise broken(path, f"{key} {meta[key]!r}")
    if depth(meta) > MAX_DEPTH or not 0 <= meta.get("eps", 0) < math.inf:
        raise broken(path, f"it nests deeper than {MAX_DEPTH} levels, or eps {meta.get('eps')!r} is no small number")
    _check_manifest(path, meta.get("manifest", {}))
    if meta["activation"] not in KINDS or meta.get("norm", "none") not in NORMS:
        raise broken(path, f"activation {meta['activation']!r}, norm {meta.get('norm')!r}")
    return meta
