"""What torch.save wrote: dicts of tensors and plain values, read without torch.load and without running anything.

    model.pt = zip of model/data.pkl             a pickle of nested dicts; a tensor is (storage, offset, shape, strides)
                      model/byteorder            little
                      model/data/0, data/1 ...   storages, stored and never compressed

    before torch 1.6: pickles of a magic number, a version, the machine | the pickle | [key, ...] | n, n numbers | ...

``{"state": {"W": tensor}, "cfg": {"k": 32}}`` has the tensor ``state.W`` and the value ``cfg.k``; dtypes and devices
are values too, as text. Tensors are read where their storages lie, in place or by position.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch

from saeguard.archives import plain_pickle
from saeguard.archives.base import MAX_AXES, MAX_TENSORS, FileArchive, Spec, broken, is_shape, unsupported
from saeguard.archives.strided import Place
from saeguard.archives.zip_directory import Member

MAX_PICKLE_BYTES = 4_000_000
MAX_DEPTH = 6
MAX_ITEMS = 65_536
MAX_NAME = 256
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # pickle of the number that torch began its files with
_LEGACY_VERSION = 1001
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_DTYPES = {str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)}

Leaf = Any


@dataclass(frozen=True)
class Kind:
    """The type of a storage, as a pickle names it."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """Numbers outside of the pickle; ``first`` and ``count`` in elements."""

    key: str
    dtype: torch.dtype
    first: int
    count: int
    total: int

    def __repr__(self) -> str:
        return f"storage {short(self.key)}"


@dataclass(frozen=True)
class View:
    """A tensor, as a pickle describes it; nothing in it is checked yet."""

    storage: Any
    first: Any
    shape: Any
    strides: Any

    def __repr__(self) -> str:  # a whole repr of what a pickle built may never end
        return f"a tensor of shape {short(self.shape)}"


def open_torch(path: Path, found: Sequence[Member]) -> FileArchive:
    """Check the pickle of a zip file with these members."""
    by_name = {member.name: member for member in found}
    pickles = [name for name in by_name if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise broken(path, f"it has {len(pickles)} pickles of tensors")
    if packed := [name for name, member in by_name.items() if member.packed]:
        raise broken(path, f"member {short(packed[0])} is compressed, which torch never does")
    root = pickles[0].removesuffix("data.pkl")
    if (order := by_name.get(root + "byteorder")) and _bytes(path, order, 16) != b"little":
        raise unsupported(path, "its numbers are big-endian", "Save it again on another machine.")
    tree = plain_pickle.load(path, BytesIO(_bytes(path, by_name[pickles[0]], MAX_PICKLE_BYTES)), _table(), _stored)
    storages = {
        name.removeprefix(root + "data/"): (member.offset, member.n_bytes)
        for name, member in by_name.items()
        if name.startswith(root + "data/")
    }
    return _archive(path, tree, storages)


def open_legacy(path: Path) -> FileArchive:
    """Check the pickles of a file from before torch 1.6, and the lengths before its numbers."""
    try:
        with path.open("rb") as file:
            stream = BytesIO(file.read(MAX_PICKLE_BYTES))
        size = path.stat().st_size
        stream.seek(len(MAGIC))
        seen: dict[str, Storage] = {}
        note = lambda found: seen.setdefault((storage := _stored(found)).key, storage) and storage
        version, system, tree, keys = (plain_pickle.load(path, stream, _table(), note) for _ in range(4))
        if version != _LEGACY_VERSION or not isinstance(system, dict) or not system.get("little_endian"):
            raise broken(path, f"its version is {short(version)}, of a machine {short(system)}")
        storages = _legacy_storages(path, stream.tell(), size, keys, seen)
    except OSError as error:
        raise broken(path, str(error)) from error
    return _archive(path, tree, storages)


def _bytes(path: Path, member: Member, limit: int) -> bytes:
    if member.n_bytes > limit:
        raise broken(path, f"member {short(member.name)} has {member.n_bytes} bytes, and {limit} are allowed")
    try:
        with path.open("rb") as file:
            file.seek(member.offset)
            return file.read(member.n_bytes)
    except OSError as error:
        raise broken(path, str(error)) from error


def _table() -> dict[str, Any]:
    """What the names in a pickle of plain tensors stand for."""
    table: dict[str, Any] = {
        "collections.OrderedDict": lambda: {},
        "torch._utils._rebuild_tensor": View,
        "torch._utils._rebuild_tensor_v2": _view,
        "torch._utils._rebuild_tensor_v3": lambda *parts: View(parts[6], *parts[1:4]),  # a dtype in place of a storage
        "torch.storage.UntypedStorage": Kind(torch.uint8),
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "torch.Size": _size,
        "torch.device": _device,
        "torch._tensor._rebuild_from_type_v2": lambda function, kind, arguments, state: function(*arguments),
        "torch.Tensor": None,  # the kind: attributes of a tensor, and which class it was, do not matter
        "torch.nn.parameter.Parameter": None,
    }
    return (
        table
        | {f"torch.{name}": Kind(dtype) for name, dtype in _STORAGES.items()}
        | {name: name for name in _DTYPES}  # a value, as text
    )


def _view(storage: Any, first: Any, shape: Any, strides: Any, grad: Any, hooks: Any, marks: Any = None) -> View:
    if marks:  # conjugate, negative
        raise ValueError(f"a tensor is marked {short(marks)}")
    return View(storage, first, shape, strides)


def _size(lengths: Any) -> tuple[Any, ...]:
    if len(lengths) > MAX_AXES:  # a copy of a long list, again and again, would fill the memory
        raise ValueError(f"a shape is {short(lengths)}")
    return tuple(lengths)


def _device(*parts: Any) -> str:
    if len(parts) > 2 or not all(type(part) is int or type(part) is str and len(part) < MAX_NAME for part in parts):
        raise ValueError(f"a device is {short(parts)}")
    return ":".join(str(part) for part in parts)


def _stored(found: Any) -> Storage:
    kind, key, _, total = found[1:5]
    view = found[5] if len(found) == 6 else None
    first, count = view[1:] if view is not None else (0, total)
    numbers = all(type(number) is int and number >= 0 for number in (first, count, total))
    if found[0] != "storage" or type(key) is not str or not isinstance(kind, Kind) or not numbers:
        raise ValueError(f"a storage is {short(found)}")
    if first + count > total:
        raise ValueError(f"part {first} to {first + count} of a storage of {total} numbers")
    return Storage(key, kind.dtype, first, count, total)


def _legacy_storages(
    path: Path, at: int, size: int, keys: Any, storages: Mapping[str, Storage]
) -> dict[str, tuple[int, int]]:
    """Where each storage lies: they follow one another, each behind its length."""
    found: dict[str, tuple[int, int]] = {}
    texts = isinstance(keys, list) and all(type(key) is str for key in keys)
    if not texts or sorted(keys) != sorted(storages):
        raise broken(path, f"it lists storages {short(keys)}, and its tensors need {short(list(storages))}")
    with path.open("rb") as file:
        for key in keys:
            total, itemsize = storages[key].total, storages[key].dtype.itemsize
            file.seek(at)
            if int.from_bytes(file.read(8), "little") != total or at + 8 + total * itemsize > size:
                raise broken(path, f"storage {short(key)} has not the {total} numbers that its tensors need")
            found[key] = (at + 8, total * itemsize)
            at += 8 + total * itemsize
    return found


def _archive(path: Path, tree: Any, storages: Mapping[str, tuple[int, int]]) -> FileArchive:
    if not isinstance(tree, dict | list | View):
        raise broken(path, f"it holds {short(tree)}, not tensors by name")
    places: dict[str, Place] = {}
    values: dict[str, Any] = {}
    for name, leaf in _walk(path, tree):
        if name in places or name in values:
            raise broken(path, f"two things are called {short(name)}")
        if isinstance(leaf, View):
            places[name] = _place(path, name, leaf, storages)
        elif leaf is None or type(leaf) in (str, int, float, bool):
            values[name] = leaf
        else:
            raise broken(path, f"{short(name)} is {short(leaf)}")
    if len(places) > MAX_TENSORS:
        raise broken(path, f"{len(places)} tensors, and {MAX_TENSORS} are allowed")
    return FileArchive(path, places, values)


def _walk(path: Path, tree: Any) -> Iterator[tuple[str, Leaf]]:
    """Names with what is no container. A container that holds another twice, or itself, ends at a limit."""
    waiting: list[tuple[str, Any, int]] = [("", tree, 0)]
    count = 0
    while waiting:
        name, node, depth = waiting.pop()
        count += 1
        if count > MAX_ITEMS or depth > MAX_DEPTH:
            raise broken(path, f"more than {MAX_ITEMS} items, or nested deeper than {MAX_DEPTH}")
        if isinstance(node, dict | list | tuple):
            if len(node) > MAX_ITEMS:
                raise broken(path, f"{len(node)} items, and {MAX_ITEMS} are allowed")
            items = list(node.items() if isinstance(node, dict) else enumerate(node))
            if any(isinstance(key, str) and len(key) > MAX_NAME for key, _ in items):  # each name inside repeats it
                raise broken(path, f"a name in it has more than {MAX_NAME} letters")
            waiting += [(f"{name}.{key}" if depth else str(key), item, depth + 1) for key, item in reversed(items)]
        else:
            yield name, node


def _place(path: Path, name: str, view: View, storages: Mapping[str, tuple[int, int]]) -> Place:
    storage, shape, strides = view.storage, view.shape, view.strides
    if isinstance(storage, str):
        raise unsupported(path, f"tensor {short(name)} is {short(storage)}", "Convert it to float32 and save it again.")
    if not isinstance(storage, Storage) or storage.key not in storages:
        raise broken(path, f"tensor {short(name)} has no numbers in the file")
    counts = all(_counts(numbers) for numbers in (shape, strides, (view.first,)))
    if not counts or len(shape) != len(strides) or not is_shape(shape):
        raise broken(path, f"tensor {short(name)} is {short(shape)} with strides {short(strides)}")
    if any(stride == 0 and length > 1 for length, stride in zip(shape, strides, strict=True)):
        raise broken(path, f"tensor {short(name)} of shape {short(shape)} repeats its numbers (stride 0)")
    spec = Spec(shape, storage.dtype)
    offset, n_bytes = storages[storage.key]
    itemsize = storage.dtype.itemsize
    place = Place(path, offset + (storage.first + view.first) * itemsize, spec, strides)
    end = offset + (storage.first + storage.count) * itemsize
    if storage.total * itemsize > n_bytes or place.end > end or spec.n_bytes > storage.count * itemsize:
        raise broken(path, f"tensor {short(name)} of shape {short(shape)} does not fit its {n_bytes} bytes")
    return place


def _counts(numbers: Any) -> bool:
    """Whether it is a tuple of few whole numbers from 0."""
    few = isinstance(numbers, tuple) and len(numbers) <= MAX_AXES
    return few and all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
