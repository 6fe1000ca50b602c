"""safetensors: a JSON header that says where each tensor lies, checked to the byte before anything is believed.

    8 bytes: length of the header | {"W_enc": {"dtype": "F32", "shape": [2304, 16384], "data_offsets": [0, 150994944]},
                                     "__metadata__": {"text": "text"}} | data, back to back

Headers above 1 MiB or 4096 tensors are refused: a hundred bytes per tensor is usual, and an SAE has ten tensors.
"""

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch

from saeguard import strict_json
from saeguard.archives.base import MAX_TENSORS, FileArchive, Spec, broken, is_shape, unsupported
from saeguard.archives.strided import Place, row_major

MAX_HEADER_BYTES = 1 << 20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Names that the format has and that nothing here can use.
_KNOWN_ELSEWHERE = {"U16", "U32", "U64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4", "C64"}


def open_safetensors(path: Path) -> FileArchive:
    """Read and check the header."""
    try:
        header, begin, size = _header(path)
    except OSError as error:
        raise broken(path, str(error)) from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise broken(path, f"__metadata__ is {short(metadata)}, not texts by name")
    if len(header) > MAX_TENSORS:
        raise broken(path, f"{len(header)} tensors, and {MAX_TENSORS} are allowed")
    places = {name: _place(path, name, entry, begin) for name, entry in header.items()}
    _check_back_to_back(path, places, begin, size)
    return FileArchive(path, places, metadata)


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON, the first byte of the data, and the size of the file."""
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise broken(path, f"a header of {length} bytes in a file of {size}, and {MAX_HEADER_BYTES} are allowed")
        text = file.read(length)
    try:
        header = strict_json.parse(text)
    except ValueError as error:
        raise broken(path, f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise broken(path, "the header is not a JSON object")
    return header, 8 + length, size


def _place(path: Path, name: str, entry: Any, begin: int) -> Place:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise broken(path, f"tensor {short(name)} is {short(entry)}, not a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (_counts(shape) and is_shape(shape) and _counts(offsets) and len(offsets) == 2):
        raise broken(path, f"tensor {short(name)} has shape {short(shape)} and data_offsets {short(offsets)}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        if isinstance(dtype, str) and dtype in _KNOWN_ELSEWHERE:
            raise unsupported(path, f"tensor {short(name)} is {dtype}", f"Convert it to one of {', '.join(DTYPES)}.")
        raise broken(path, f"tensor {short(name)} has dtype {short(dtype)}")
    spec = Spec(tuple(shape), DTYPES[dtype])
    if offsets[1] - offsets[0] != spec.n_bytes:
        raise broken(path, f"tensor {short(name)} of {short(shape)} {dtype} has data_offsets {short(offsets)}")
    return Place(path, begin + offsets[0], spec, row_major(spec.shape))


def _counts(found: Any) -> bool:
    """Whether it is a list of whole numbers from 0; true is no number."""
    return isinstance(found, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in found)


def _check_back_to_back(path: Path, places: Mapping[str, Place], begin: int, size: int) -> None:
    """The format's own rule: the tensors cover the data without a gap, and nothing twice."""
    at = begin
    for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].spec.n_bytes)):
        if place.offset != at:
            raise broken(path, f"tensor {short(name)} begins at byte {place.offset}, and {at} comes next")
        at = place.offset + place.spec.n_bytes
    if at != size:
        raise broken(path, f"its tensors end at byte {at} and the file has {size}")
