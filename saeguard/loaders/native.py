"""saeguard's own format: one safetensors file, whose header says what the weights mean.

    sae.safetensors    W_enc b_enc W_dec b_dec [threshold] [maximum], header key "saeguard" = a JSON object
                       {"schema": 1, "name", "activation", "top_k", "site", "model", "manifest"}

The header is read and checked (size, names, dtypes, shapes) before any tensor is allocated.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from saeguard.errors import UnsupportedFormat
from saeguard.loaders.headers import broken, safetensors_header, safetensors_shapes, safetensors_tensors
from saeguard.sae import SAE
from saeguard.sites import Site

SCHEMA = 1
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
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    metadata = safetensors_header(path).get("__metadata__")
    return isinstance(metadata, dict) and "saeguard" in metadata


def load(source: Path) -> SAE:
    """Read a file or folder in saeguard's format. Raises `BrokenFile`, `UnsupportedFormat`."""
    path = _file(source)
    header = safetensors_header(path)
    meta = _meta(path, header)
    names = set(safetensors_shapes(path, header))
    if not _REQUIRED <= names <= _REQUIRED | _OPTIONAL:
        raise broken(path, f"tensors {sorted(names)}, not {sorted(_REQUIRED)} with {sorted(_OPTIONAL)} optional")
    tensors = safetensors_tensors(path, sorted(names))
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


def _meta(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    try:
        meta = json.loads(header["__metadata__"]["saeguard"])
        schema, activation, _ = meta["schema"], meta["activation"], meta["name"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise broken(path, f"the saeguard header lacks {error}") from error
    if schema != SCHEMA:
        raise UnsupportedFormat(
            f"SAE file {path.name}", f"its schema is {schema!r}, this version reads {SCHEMA}", "Update saeguard."
        )
    if activation not in ("relu", "jumprelu", "topk"):
        raise broken(path, f"activation {activation!r}")
    for key, kinds in _FIELDS.items():
        if key in meta and not isinstance(meta[key], kinds) or isinstance(meta.get(key), bool):
            raise broken(path, f"{key} {meta[key]!r}")
    return meta
