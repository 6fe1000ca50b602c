"""saeguard's own format: one safetensors file, whose header says what the weights mean.

    sae.safetensors    W_enc b_enc W_dec b_dec [threshold] [maximum], header key "saeguard" = a JSON object
                       {"schema": 1, "name", "activation", "top_k", "site", "model", "manifest"}

The header is read and checked (size, names, dtypes, shapes) before any tensor is allocated.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from saeguard.errors import BrokenFile, UnsupportedFormat
from saeguard.sae import SAE
from saeguard.sites import Site

SCHEMA = 1
MAX_HEADER_BYTES = 4_000_000
_DTYPES = {"F64", "F32", "F16", "BF16"}
_REQUIRED = {"W_enc", "b_enc", "W_dec", "b_dec"}
_OPTIONAL = {"threshold", "maximum"}
_TEXT, _NUMBER = (str, type(None)), (int, type(None))
_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,), "top_k": _NUMBER, "site": _TEXT, "model": _TEXT, "manifest": (dict,),
}  # fmt: skip
_MODE = 0o644


def recognises(source: Path) -> bool:
    """Whether the file, or ``sae.safetensors`` in the folder, has a saeguard header."""
    path = _file(source)
    return path.is_file() and path.suffix == ".safetensors" and "saeguard" in _header(path).get("__metadata__", {})


def load(source: Path) -> SAE:
    """Read a file or folder in saeguard's format. Raises `BrokenFile`, `UnsupportedFormat`."""
    path = _file(source)
    header = _header(path)
    meta = _meta(path, header)
    _check_tensors(path, header)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise _broken(path, str(error)) from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise _broken(path, f"{name} holds NaN or infinity")
    return SAE(
        name=meta["name"],
        activation=meta["activation"],
        top_k=meta.get("top_k"),
        site=Site.parse(meta["site"]) if meta.get("site") else None,
        model=meta.get("model"),
        manifest=meta.get("manifest", {}),
        **tensors,
    )


def save_sae(sae: SAE, path: str | Path) -> Path:
    """Write ``sae`` to a file (or ``sae.safetensors`` in a folder), whole or not at all; the dtypes are kept."""
    target = Path(path)
    if target.suffix != ".safetensors":
        target = target / "sae.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    meta = {
        "schema": SCHEMA,
        "name": sae.name,
        "activation": sae.activation,
        "top_k": sae.top_k,
        "site": str(sae.site) if sae.site else None,
        "model": sae.model,
        "manifest": dict(sae.manifest),
    }
    tensors = {name: getattr(sae, name) for name in sorted(_REQUIRED | _OPTIONAL) if getattr(sae, name) is not None}
    temporary = target.with_suffix(".partial")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary,
              metadata={"saeguard": json.dumps(meta, sort_keys=True)})  # fmt: skip
    temporary.chmod(_MODE)  # safetensors writes files that only their owner can read
    os.replace(temporary, target)
    return target


def _file(source: Path) -> Path:
    return source / "sae.safetensors" if source.is_dir() else source


def _broken(path: Path, found: str) -> BrokenFile:
    return BrokenFile(f"SAE file {path.name}", found, "Fetch or export the file again.")


def _header(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _broken(path, f"a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise _broken(path, f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(path, "the header is not a JSON object")
    return header


def _meta(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    try:
        meta = json.loads(header["__metadata__"]["saeguard"])
        schema, activation, _ = meta["schema"], meta["activation"], meta["name"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _broken(path, f"the saeguard header lacks {error}") from error
    if schema != SCHEMA:
        raise UnsupportedFormat(
            f"SAE file {path.name}", f"its schema is {schema!r}, this version reads {SCHEMA}", "Update saeguard."
        )
    if activation not in ("relu", "jumprelu", "topk"):
        raise _broken(path, f"activation {activation!r}")
    for key, kinds in _FIELDS.items():
        if key in meta and not isinstance(meta[key], kinds) or isinstance(meta.get(key), bool):
            raise _broken(path, f"{key} {meta[key]!r}")
    return meta


def _check_tensors(path: Path, header: dict[str, Any]) -> None:
    names = set(header) - {"__metadata__"}
    if not _REQUIRED <= names <= _REQUIRED | _OPTIONAL:
        raise _broken(path, f"tensors {sorted(names)}, not {sorted(_REQUIRED)} with {sorted(_OPTIONAL)} optional")
    size = path.stat().st_size
    for name in names:
        entry = header[name] if isinstance(header[name], dict) else {}
        dtype, shape = entry.get("dtype"), entry.get("shape")
        lengths: list[Any] = shape if isinstance(shape, list) else [None]
        numbers = all(type(length) is int and length >= 0 for length in lengths)
        if dtype not in _DTYPES or not numbers or len(lengths) > 2 or math.prod(lengths) > size:
            raise _broken(path, f"tensor {name} is {dtype} {shape} in a file of {size} bytes")
