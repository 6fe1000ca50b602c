"""What a module is given or gives, as a stream: the one tensor in it, its axes put in order, and back again.

    carried          (hidden, weights), {"sample": hidden}, hidden          one tensor, or several with it
    hidden           batch d height width                                   any axes, ``batch`` and ``d`` among them
    stream           batch pos d                                            pos = height * width, row by row

What goes back lies in memory as what was taken out: the next convolution would otherwise choose another algorithm, and
rows that nobody edited would lose their last bits.
"""

import dataclasses
from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, empty_like

from saeguard.axes import Stream

Item = int | str | None


def unwrap(carried: Any, item: Item) -> Any:
    """The tensor in what a module carries, or what is there instead of one; by default the first."""
    if isinstance(carried, Tensor):
        return carried if item is None else None
    if isinstance(carried, Mapping):
        key = _key(carried, item)
        return carried.get(key)
    if isinstance(carried, tuple | list):
        index = 0 if item is None else item
        return carried[index] if isinstance(index, int) and -len(carried) <= index < len(carried) else None
    return None


def rewrap(carried: Any, item: Item, tensor: Tensor) -> Any:
    """``carried`` with another tensor in the place of the one that `unwrap` finds; ``carried`` stays as it is."""
    if isinstance(carried, Tensor):
        return tensor
    if isinstance(carried, Mapping):
        key = _key(carried, item)
        if dataclasses.is_dataclass(carried):  # the ModelOutput of transformers and diffusers
            return dataclasses.replace(carried, **{key: tensor})  # type: ignore[type-var]
        return type(carried)({**carried, key: tensor})  # type: ignore[call-arg]
    index = 0 if item is None else int(item)
    values = list(carried)
    values[index] = tensor
    return type(carried)(*values) if hasattr(carried, "_fields") else type(carried)(values)


def _key(carried: Mapping[Any, Any], item: Item) -> Any:
    """The key of an item; by default of the first tensor."""
    if isinstance(item, str):
        return item
    tensors = [key for key, value in carried.items() if isinstance(value, Tensor)]
    return tensors[item or 0] if len(tensors) > (item or 0) else None


def to_stream(x: Tensor, axes: str) -> Stream:
    """``batch pos d`` of a tensor with other axes."""
    names = axes.split()
    x = x.permute(_order(names))
    return x.reshape(x.shape[0], prod(x.shape[1:-1]), x.shape[-1])


def from_stream(stream: Stream, axes: str, like: Tensor) -> Tensor:
    """``stream`` with the axes of ``like``, and laid out in memory as it is."""
    order = _order(axes.split())
    back = [order.index(axis) for axis in range(len(order))]
    found = stream.reshape([like.shape[axis] for axis in order]).permute(back)
    if found.stride() == like.stride():
        return found
    return empty_like(like).copy_(found)


def _order(names: list[str]) -> list[int]:
    """Where the axes come from: batch first, d last, those between in the order in which they stand."""
    others = [axis for axis, name in enumerate(names) if name not in ("batch", "d")]
    return [names.index("batch"), *others, names.index("d")]
