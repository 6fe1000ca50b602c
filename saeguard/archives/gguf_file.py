"""GGUF: keys with values, then where each tensor lies, all of it checked before anything is believed.

    "GGUF" | version | n tensors | n keys | keys: name, type, value | tensors: name, axes, type, offset | data, aligned

All numbers are little-endian; an axis list begins with the one that runs fastest. Only plain floating point and whole
numbers are read: quantised tensors are a model's, not a vector's. Keys whose value is a list are left out of `values`.
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch

from saeguard.archives.base import MAX_AXES, MAX_TENSORS, FileArchive, Spec, broken, is_shape, unsupported
from saeguard.archives.strided import Place, row_major

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 1 << 20
MAX_KEYS = 4096
ALIGNMENT = 32
VERSIONS = (2, 3)
DTYPES = {
    0: torch.float32, 1: torch.float16, 24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
    28: torch.float64, 30: torch.bfloat16,
}  # fmt: skip
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


def open_gguf(path: Path) -> FileArchive:
    """Read and check the header."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            cursor = _Cursor(path, file.read(MAX_HEADER_BYTES), size)
    except OSError as error:
        raise broken(path, str(error)) from error
    cursor.skip(len(MAGIC))
    if (version := cursor.number("I")) not in VERSIONS:
        raise unsupported(path, f"it is GGUF of version {version}", f"Read are versions {VERSIONS[0]} and later.")
    n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
    if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
        raise broken(path, f"{n_tensors} tensors and {n_keys} keys; {MAX_TENSORS} and {MAX_KEYS} are allowed")
    values: dict[str, Any] = {}
    for _ in range(n_keys):
        name, value = cursor.text(), cursor.value(cursor.number("I"))
        if name in values:
            raise broken(path, f"the key {short(name)} stands twice")
        values[name] = value
    entries = [_entry(cursor) for _ in range(n_tensors)]
    align = values.get("general.alignment", ALIGNMENT)
    if type(align) is not int or not 0 < align <= MAX_HEADER_BYTES:
        raise broken(path, f"its alignment is {short(align)}")
    begin = -(-cursor.at // align) * align
    places = {name: Place(path, begin + offset, spec, row_major(spec.shape)) for name, spec, offset in entries}
    if len(places) < len(entries):
        raise broken(path, "two tensors have one name")
    _check_inside(path, places, size)
    return FileArchive(path, places, {name: value for name, value in values.items() if value is not None})


def _entry(cursor: "_Cursor") -> tuple[str, Spec, int]:
    name, n_axes = cursor.text(), cursor.number("I")
    if n_axes > MAX_AXES:
        raise broken(cursor.path, f"tensor {short(name)} has {n_axes} axes")
    shape = tuple(cursor.number("Q") for _ in range(n_axes))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in DTYPES:
        raise unsupported(
            cursor.path, f"tensor {short(name)} is of GGUF's type {kind}, which is quantised or unknown",
            "Read are files of vectors in floating point, not models.",
        )  # fmt: skip
    if not is_shape(shape):
        raise broken(cursor.path, f"tensor {short(name)} has shape {short(shape)}")
    return name, Spec(shape, DTYPES[kind]), offset


def _check_inside(path: Path, places: Mapping[str, Place], size: int) -> None:
    """Each tensor lies in the file, and no two of them in one place."""
    at = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].offset, item[1].spec.n_bytes)):
        if place.offset < at or place.offset + place.spec.n_bytes > size:
            raise broken(path, f"tensor {short(name)} begins at byte {place.offset} of {size} and does not fit there")
        at = place.offset + place.spec.n_bytes


class _Cursor:
    """The header, read from its beginning. What it does raises `BrokenFile`, `UnsupportedFormat`."""

    def __init__(self, path: Path, header: bytes, size: int):
        self.path, self._header, self._size = path, header, size
        self.at = 0

    def skip(self, n: int) -> bytes:
        """The next ``n`` bytes."""
        found = self._header[self.at : self.at + n]
        if len(found) < n:
            if self._size > len(self._header):
                raise unsupported(
                    self.path, f"its header is longer than {MAX_HEADER_BYTES} bytes, as models' are",
                    "Name a file of steering vectors.",
                )  # fmt: skip
            raise broken(self.path, f"it ends in its header, before byte {self.at + n}")
        self.at += n
        return found

    def number(self, code: str) -> Any:
        """The next number; ``code`` is that of `struct`."""
        return struct.unpack("<" + code, self.skip(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        """The next text."""
        try:
            return self.skip(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise broken(self.path, f"a name or a text is not UTF-8 ({error})") from error

    def value(self, kind: int) -> Any:
        """The next value, None for a list."""
        if kind == _TEXT:
            return self.text()
        if kind != _LIST:
            if kind not in _SCALARS:
                raise broken(self.path, f"a value is of the unknown type {kind}")
            found = self.number(_SCALARS[kind])
            return found if not isinstance(found, float) or math.isfinite(found) else str(found)
        inner, n = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.skip(n * struct.calcsize("<" + _SCALARS[inner]))
        elif inner == _TEXT:
            for _ in range(n):
                self.skip(self.number("Q"))
        else:
            raise broken(self.path, f"a list holds values of the type {inner}")
        return None
