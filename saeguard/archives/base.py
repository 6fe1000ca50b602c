"""What every reader of a file with named tensors offers: what is in it, checked, and single tensors or parts of them.

    open a file      names, shapes, dtypes and places are checked against the file; no tensor is allocated
    read, take       bytes are looked at: of one tensor, or of some indices along one of its axes

Whether the numbers are finite, and what they mean, is the caller's to check.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from saeguard.errors import BrokenFile, UnsupportedFormat

MAX_TENSORS = 4096
MAX_AXES = 8
MAX_NUMBERS = 1 << 60  # torch counts bytes in 63 bits, also those of a tensor with an axis of length 0


@dataclass(frozen=True)
class Spec:
    """What a tensor is, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """Bytes of all its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


@runtime_checkable
class Archive(Protocol):
    """A file of named tensors. What it does raises `BrokenFile`, `UnsafePickle` or `UnsupportedFormat`, whatever the
    file holds; a name or an index that is not there is a KeyError or an IndexError."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def specs(self) -> Mapping[str, Spec]:
        """All tensors by name; names of nested ones are joined by dots."""
        ...

    @property
    def values(self) -> Mapping[str, Any]:
        """What is there besides tensors: str, int, float, bool or None, by name."""
        ...

    def read(self, name: str) -> Tensor:
        """The whole tensor in its stored dtype, in its own memory."""
        ...

    def take(self, name: str, index: Sequence[int], axis: int) -> Tensor:
        """Only these indices along ``axis``, in the order given, in own memory and contiguous."""
        ...

    def bytes_for(self, name: str, count: int | None = None, axis: int | None = None) -> int:
        """Bytes that `read` (``count`` None), or `take` of ``count`` indices along ``axis``, has to look at."""
        ...

    def check_unchanged(self) -> None:
        """Raise `BrokenFile` when the file is not the one that was opened, or was written to since."""
        ...


@runtime_checkable
class Part(Protocol):
    """One tensor of a file."""

    @property
    def spec(self) -> Spec:
        """What it is."""
        ...

    def read(self) -> Tensor:
        """As `Archive.read`."""
        ...

    def take(self, index: Sequence[int], axis: int) -> Tensor:
        """As `Archive.take`."""
        ...

    def bytes_for(self, count: int | None, axis: int | None) -> int:
        """As `Archive.bytes_for`."""
        ...


@dataclass(frozen=True)
class FileArchive:
    """The `Archive` that all readers return: a table of parts."""

    path: Path
    parts: Mapping[str, Part]
    values: Mapping[str, Any]
    stamp: tuple[int, ...] = field(init=False)
    """The file's identity when it was opened."""

    def __post_init__(self):
        object.__setattr__(self, "stamp", _stamp(self.path))

    def check_unchanged(self) -> None:
        if _stamp(self.path) != self.stamp:
            raise broken(self.path, "it changed while it was read, so that its numbers and its header do not belong "
                         "together")  # fmt: skip

    @property
    def specs(self) -> Mapping[str, Spec]:
        return {name: part.spec for name, part in self.parts.items()}

    def read(self, name: str) -> Tensor:
        return self.parts[name].read()

    def take(self, name: str, index: Sequence[int], axis: int) -> Tensor:
        return self.parts[name].take(index, axis)

    def bytes_for(self, name: str, count: int | None = None, axis: int | None = None) -> int:
        return self.parts[name].bytes_for(count, axis)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise broken(path, str(error)) from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def broken(path: Path, found: str) -> BrokenFile:
    """The error for a file whose content cannot be trusted."""
    return BrokenFile(f"weights file {path.name}", found, "Fetch or export the file again.")


def unsupported(path: Path, found: str, proceed: str) -> UnsupportedFormat:
    """The error for a sound file that is of no use here."""
    return UnsupportedFormat(f"weights file {path.name}", found, proceed)


def is_shape(lengths: Sequence[int]) -> bool:
    """Whether torch can have a tensor of this shape, however empty it is."""
    return len(lengths) <= MAX_AXES and math.prod(max(length, 1) for length in lengths) <= MAX_NUMBERS


def check_index(spec: Spec, index: Sequence[int], axis: int) -> None:
    """Raise IndexError unless ``axis`` is one of the tensor's, and every index one of the axis."""
    if not 0 <= axis < len(spec.shape):
        raise IndexError(f"axis {axis} of a tensor with {len(spec.shape)} axes")
    if bad := [i for i in index if not 0 <= i < spec.shape[axis]]:
        raise IndexError(f"index {short(bad)} along an axis of length {spec.shape[axis]}")
