"""What a loader believes of a file before it reads a tensor: sizes, names, dtypes and shapes, each checked.

    JSON            at most 4 MB, one object, no key twice, no NaN
    safetensors     8 bytes: length of the header | header, JSON {"W_enc": {"dtype", "shape", ...}, ...} | data

Whatever does not add up raises `BrokenFile`; a tensor is read only after its header passed, and must be finite.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saeguard import strict_json
from saeguard.errors import BrokenFile

MAX_JSON_BYTES = 4_000_000
_DTYPES = {"F64", "F32", "F16", "BF16"}

Shape = tuple[int, ...]


def broken(path: Path, found: str) -> BrokenFile:
    """The error for a file whose content cannot be trusted."""
    return BrokenFile(f"SAE file {path.name}", found, "Fetch or export the file again.")


def json_object(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """``text`` from ``path`` as a JSON object; ``what`` says in errors which part of the file it is."""
    try:
        found = strict_json.parse(text)
    except ValueError as error:
        raise broken(path, f"{what} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise broken(path, f"{what} is not a JSON object")
    return found


def json_file(path: Path) -> dict[str, Any]:
    """A whole file as a JSON object."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise broken(path, f"it has {size} bytes and {MAX_JSON_BYTES} are allowed")
        return json_object(path, path.read_bytes(), "it")
    except OSError as error:
        raise broken(path, str(error)) from error


def safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON at the beginning of a safetensors file; nothing behind it is read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_JSON_BYTES, size - 8):
            raise broken(path, f"a header of {length} bytes in a file of {size}")
        return json_object(path, file.read(length), "the header")


def safetensors_shapes(path: Path, header: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes of all tensors that the header names: floating point, at most two axes, no larger than the file."""
    size = path.stat().st_size
    shapes = {}
    for name in sorted(set(header) - {"__metadata__"}):
        entry = header[name] if isinstance(header[name], dict) else {}
        dtype, shape = entry.get("dtype"), entry.get("shape")
        lengths: list[Any] = shape if isinstance(shape, list) else [None]
        numbers = all(type(length) is int and length >= 0 for length in lengths)
        if dtype not in _DTYPES or not numbers or len(lengths) > 2 or math.prod(lengths) > size:
            raise broken(path, f"tensor {short(name)} is {short(dtype)} {short(shape)} in a file of {size} bytes")
        shapes[name] = tuple(lengths)
    return shapes


def safetensors_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by name, in their stored dtype."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise broken(path, str(error)) from error
    check_finite(path, tensors)
    return tensors


def check_shapes(path: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raise `BrokenFile` unless every expected tensor is there in its shape."""
    for name, shape in expected.items():
        if found.get(name) != shape:
            raise broken(path, f"{name} is {found.get(name, 'not there')}, not {shape}")


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `BrokenFile` when a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise broken(path, f"{name} holds NaN or infinity")
