"""Tensors that lie in a file as plain numbers: read as a whole, or by position where only parts are wanted.

    address of x[i, j] = offset + (i * strides[0] + j * strides[1]) * itemsize

Nothing is mapped: every page that is touched would count as memory, and would follow its file. `Place.take` sorts the
addresses, reads what lies close together at once, and puts the numbers where they belong.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from saeguard.archives.base import Spec, broken, check_index

GAP_BYTES = 4096  # what lies closer than a page is read through
WINDOW_BYTES = 1 << 20  # no read through gaps is longer, and no more is held besides the result
_BLOCK = 1 << 18  # addresses at a time

Array = np.ndarray[Any, np.dtype[Any]]


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor whose last axis runs fastest."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def column_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a tensor whose first axis runs fastest (Fortran's order)."""
    return tuple(math.prod(shape[:axis]) for axis in range(len(shape)))


@dataclass(frozen=True)
class Place:
    """One tensor in a file; ``offset`` counts bytes, ``strides`` elements."""

    path: Path
    offset: int
    spec: Spec
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.offset + self._span * self.spec.dtype.itemsize

    @property
    def _span(self) -> int:
        """Elements from the first to the last, both included."""
        last = sum((length - 1) * stride for length, stride in zip(self.spec.shape, self.strides, strict=True))
        return 0 if 0 in self.spec.shape else last + 1

    def read(self) -> Tensor:
        """In own memory: a mapped tensor would change, or end the process, when its file does."""
        if not self._span:
            return torch.empty(self.spec.shape, dtype=self.spec.dtype)
        try:
            if self.path.stat().st_size < self.end:
                raise broken(self.path, f"it ends before byte {self.end}")
            numbers = np.fromfile(self.path, _bits(self.spec.dtype), self._span, offset=self.offset)
            if len(numbers) != self._span:
                raise EOFError(f"it ends before byte {self.end}")
        except (OSError, ValueError, EOFError, MemoryError) as error:
            raise broken(self.path, str(error)) from error
        return torch.from_numpy(numbers).view(self.spec.dtype).as_strided(self.spec.shape, self.strides)

    def take(self, index: Sequence[int], axis: int) -> Tensor:
        """Few small reads instead of the whole tensor."""
        check_index(self.spec, index, axis)
        try:
            file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise broken(self.path, str(error)) from error
        try:
            if hasattr(os, "posix_fadvise"):  # or the system reads 32 pages for each number
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            return self._gathered(file, index, axis)
        except (OSError, EOFError) as error:
            raise broken(self.path, str(error)) from error
        finally:
            os.close(file)

    def bytes_for(self, count: int | None, axis: int | None) -> int:
        """Bytes of the numbers themselves."""
        if count is None or axis is None or not self._span:
            return self.spec.n_bytes
        return self.spec.n_bytes // self.spec.shape[axis] * count

    def _gathered(self, file: int, index: Sequence[int], axis: int) -> Tensor:
        """The result, filled in the order in which its numbers lie in the file, then turned to its own axes."""
        loose, inner = self._split(axis)
        shape = [*self.spec.shape[:axis], len(index), *self.spec.shape[axis + 1 :]]
        if 0 in shape:
            return torch.empty(shape, dtype=self.spec.dtype)
        axes = [*loose, axis, *inner]
        run = math.prod(shape[a] for a in inner)
        rows = np.zeros(1, np.int64)
        for a in loose:
            rows = np.add.outer(rows, np.arange(shape[a], dtype=np.int64) * self.strides[a]).ravel()
        columns = np.asarray(index, dtype=np.int64) * self.strides[axis]
        found = np.empty((len(rows) * len(columns), run), _bits(self.spec.dtype))
        step = max(_BLOCK // len(columns), 1)
        for first in range(0, len(rows), step):
            starts = np.add.outer(rows[first : first + step], columns).ravel()
            begin = first * len(columns)
            _fill(file, self.offset, starts, found[begin : begin + len(starts)])
        turned = torch.from_numpy(found).view(self.spec.dtype).view([shape[a] for a in axes])
        return turned.permute([axes.index(a) for a in range(len(axes))]).contiguous()

    def _split(self, axis: int) -> tuple[list[int], list[int]]:
        """The other axes, slowest first: those that are walked, and those whose numbers form one run in the file."""
        loose: list[int] = []
        inner: list[int] = []
        run = 1
        lengths = self.spec.shape
        for a in sorted((a for a in range(len(lengths)) if a != axis), key=lambda a: (self.strides[a], -a)):
            if lengths[a] == 1 or self.strides[a] == run:
                run *= lengths[a]
                inner.insert(0, a)
            else:
                loose.insert(0, a)
        return loose, inner


def _bits(dtype: torch.dtype) -> str:
    """numpy's integers of that size: numpy has no bfloat16, and bytes are only moved here."""
    return f"i{dtype.itemsize}"


def _fill(file: int, offset: int, starts: Array, found: Array) -> None:
    """Put into row i of ``found`` the run of elements that begins at element ``starts[i]`` behind ``offset``."""
    run, size = found.shape[1], found.itemsize
    order = np.argsort(starts, kind="stable")
    held: list[bytes] = []
    done, waiting = 0, 0
    for count, piece in _pieces(file, offset, starts[order], run, size):
        held.append(piece)
        waiting += count
        if waiting * run * size >= WINDOW_BYTES:
            found[order[done : done + waiting]] = np.frombuffer(b"".join(held), found.dtype).reshape(waiting, run)
            done, waiting = done + waiting, 0
            held.clear()
    if waiting:
        found[order[done:]] = np.frombuffer(b"".join(held), found.dtype).reshape(waiting, run)


def _pieces(file: int, offset: int, starts: Array, run: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Sorted runs in order: how many of them, and their bytes without what lies between."""
    window = max(WINDOW_BYTES // size, 1)
    near = (starts[1:] - starts[:-1] - run) * size <= GAP_BYTES
    cuts = np.flatnonzero(~(near & (starts[1:] // window == starts[:-1] // window))) + 1
    bounds = [0, *cuts.tolist(), len(starts)]
    begins = (offset + starts * size).tolist()
    for first, last in pairwise(bounds):
        data = _exactly(file, begins[last - 1] - begins[first] + run * size, begins[first])
        if last - first > 1:
            elements = np.frombuffer(data, f"i{size}")
            data = sliding_window_view(elements, run)[starts[first:last] - starts[first]].tobytes()
        yield last - first, data


def _exactly(file: int, n_bytes: int, at: int) -> bytes:
    data = os.pread(file, n_bytes, at)
    while len(data) < n_bytes:  # one call gives 2 GB at most
        more = os.pread(file, n_bytes - len(data), at + len(data))
        if not more:
            raise EOFError(f"it ends before byte {at + n_bytes}")
        data += more
    return data
