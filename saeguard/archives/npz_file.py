"""numpy archives: the header of each member is matched by a pattern, and numpy's own parser never sees it.

    params.npz = zip of W_enc.npy, b_enc.npy, ...
    a member: b"\\x93NUMPY" 1 0 | length, 2 bytes | {'descr': '<f4', 'fortran_order': False, 'shape': (2304,), } | data

Stored members are read where they lie. Compressed ones are inflated as a whole each time, and only where the archive
does not grow by more than 64 times (and 16 MB): trained weights hardly shrink, so what shrinks more is not weights.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from zipfile import ZipFile

import torch
from torch import Tensor

from saeguard.archives.base import MAX_TENSORS, FileArchive, Part, Spec, broken, check_index, is_shape, unsupported
from saeguard.archives.strided import Place, column_major, row_major
from saeguard.archives.zip_directory import Member, damage_named

MAX_GROWTH = 64
FREE_GROWTH_BYTES = 1 << 24  # zero biases shrink a thousandfold
DTYPES = {
    "<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16, "<i8": torch.int64, "<i4": torch.int32,
    "<i2": torch.int16, "|i1": torch.int8, "|u1": torch.uint8, "|b1": torch.bool,
}  # fmt: skip
_MAX_HEADER_BYTES = 4096
_NPY = re.compile(r"\{'descr': (.{1,999}), 'fortran_order': (True|False), 'shape': \(([\d, ]{0,200})\), ?\} *\n")
_LENGTH = re.compile(r"\d{1,18}")


@dataclass(frozen=True)
class Header:
    """The first bytes of a member, and how many they are."""

    spec: Spec
    fortran: bool
    n_bytes: int


@dataclass(frozen=True)
class Packed:
    """A compressed member."""

    path: Path
    member: Member
    header: Header

    @property
    def spec(self) -> Spec:
        return self.header.spec

    def read(self) -> Tensor:
        """Inflate it into own memory."""
        shape, count = self.spec.shape, math.prod(self.spec.shape)
        with damage_named(self.path), ZipFile(self.path) as archive, archive.open(self.member.info) as file:
            file.read(self.header.n_bytes)
            data = bytearray(file.read(self.spec.n_bytes + 1))
        if len(data) != self.spec.n_bytes:
            raise broken(self.path, f"member {short(self.member.name)} inflates to {len(data)} bytes of numbers")
        if not count:
            return torch.empty(shape, dtype=self.spec.dtype)
        flat = torch.frombuffer(data, dtype=self.spec.dtype)
        return flat.as_strided(shape, column_major(shape) if self.header.fortran else row_major(shape))

    def take(self, index: Sequence[int], axis: int) -> Tensor:
        """Inflate all of it, and keep what is asked for."""
        check_index(self.spec, index, axis)
        return self.read().index_select(axis, torch.tensor(list(index), dtype=torch.int64)).contiguous()

    def bytes_for(self, count: int | None, axis: int | None) -> int:
        """All of them, however few are asked for."""
        return self.spec.n_bytes


def open_npz(path: Path, found: Sequence[Member]) -> FileArchive:
    """Check the header of each member of the archive."""
    if len(found) > MAX_TENSORS:
        raise broken(path, f"{len(found)} tensors, and {MAX_TENSORS} are allowed")
    total, packed = sum(member.n_bytes for member in found), sum(member.packed_bytes for member in found)
    if total > MAX_GROWTH * packed + FREE_GROWTH_BYTES:
        raise broken(path, f"{packed} bytes that would inflate to {total}")
    parts: dict[str, Part] = {}
    with damage_named(path), ZipFile(path) as archive:
        for member in found:
            if not member.name.endswith(".npy"):
                raise broken(path, f"member {short(member.name)} is not a numpy array")
            parts[member.name.removesuffix(".npy")] = _part(path, archive, member)
    return FileArchive(path, parts, {})


def _part(path: Path, archive: ZipFile, member: Member) -> Part:
    with archive.open(member.info) as file:
        header = _header(path, member, file.read(_MAX_HEADER_BYTES))
    if header.n_bytes + header.spec.n_bytes != member.n_bytes:
        raise broken(path, f"member {short(member.name)} of {member.n_bytes} bytes claims shape {header.spec.shape}")
    if member.packed:
        return Packed(path, member, header)
    strides = column_major(header.spec.shape) if header.fortran else row_major(header.spec.shape)
    return Place(path, member.offset + header.n_bytes, header.spec, strides)


def _header(path: Path, member: Member, begin: bytes) -> Header:
    version, width = begin[6:7], 2 if begin[6:7] == b"\1" else 4
    length = int.from_bytes(begin[8 : 8 + width], "little")
    end = 8 + width + length
    match = _NPY.fullmatch(begin[8 + width : end].decode("latin-1"))
    if begin[:6] != b"\x93NUMPY" or version not in (b"\1", b"\2", b"\3") or end > len(begin) or match is None:
        raise broken(path, f"member {short(member.name)} does not begin as a numpy array")
    dtype = match[1].strip("'")
    if dtype not in DTYPES:
        raise unsupported(
            path,
            f"member {short(member.name)} holds {short(dtype)}, not numbers of a known kind",
            f"Save it again as one of {', '.join(DTYPES)}; arrays of Python objects are never read.",
        )
    lengths = [text.strip() for text in match[3].split(",")]
    if lengths[-1] == "":  # (), (3,)
        lengths.pop()
    shape = tuple(int(text) for text in lengths if _LENGTH.fullmatch(text))
    if len(shape) < len(lengths) or not is_shape(shape):
        raise broken(path, f"member {short(member.name)} has shape {short(match[3])}")
    return Header(Spec(shape, DTYPES[dtype]), match[2] == "True", end)
