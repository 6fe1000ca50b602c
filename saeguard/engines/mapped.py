"""A place of a site map: any axes, in a tensor, a tuple or an output with names, whole or as an update."""

import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from saeguard.axes import Stream
from saeguard.engines.base import Place, outside_graphs
from saeguard.engines.carried import Item, from_stream, rewrap, to_stream, unwrap
from saeguard.engines.sitemaps import At
from saeguard.errors import GuardNotApplied, WidthMismatch


@dataclass(frozen=True, eq=False)
class MappedPlace(Place):
    """The place that ``at`` says. Of a delta the stream is what the module gives minus what it was given, in float32;
    edits are added to what it gives.
    """

    at: At = field(default_factory=lambda: At(""))
    _given: threading.local = field(default_factory=threading.local)
    """``stream``: what the module was given in this thread's call, where the place is a delta."""

    def value(self, carried: Stream, base: Tensor | None) -> Stream:
        return carried.float() - self._given.stream.float() if self.at.delta else carried

    def follows(self, other: Place) -> bool:
        return self.module is other.module and self.rank > other.rank

    @property
    def rank(self) -> int:
        """What goes in, then the update, in which that is subtracted as it was edited, then the whole with both."""
        return 0 if self.side == "input" else 1 if self.at.delta else 2

    def changed(self, output: Any, change: Callable[[Stream], Stream]) -> Any:
        return self._changed(output, self.at.item, change)

    def attach(self, change: Callable[[Stream], Stream]) -> "Handle":
        hooks = ExitStack()
        if self.side == "input" or self.at.delta:
            before = outside_graphs(self._on_input(change))
            hooks.callback(self.module.register_forward_pre_hook(before, with_kwargs=True).remove)
        if self.side == "output":
            after = outside_graphs(lambda module, args, output: self.changed(output, change))
            hooks.callback(self.module.register_forward_hook(after).remove)
        return Handle(hooks)

    def _on_input(self, change: Callable[[Stream], Stream]) -> Callable[..., Any]:
        """Change what the module is given, or keep it in mind where the place is a delta."""

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            item = _argument(module, None if self.at.delta else self.at.item, len(args))
            carried = args if isinstance(item, int) else kwargs
            if self.at.delta:  # a copy, as a block may add its update in place to what it was given
                self._given.stream = to_stream(self._tensor(carried, item), self.at.axes).clone()
                return None
            after = self._changed(carried, item, change)
            return (after, kwargs) if isinstance(item, int) else (args, after)

        return on_input

    def _changed(self, carried: Any, item: Item, change: Callable[[Stream], Stream]) -> Any:
        tensor = self._tensor(carried, item)
        stream = to_stream(tensor, self.at.axes)
        if self.at.delta and self._given.stream.shape != stream.shape:
            raise GuardNotApplied(
                f"an edit at {self.site}",
                f"{self.path} is given {tuple(self._given.stream.shape)} and gives {tuple(stream.shape)} (batch pos d)",
                "The difference of the two is no update: leave out delta=True.",
            )
        after = change(stream)
        if self.at.delta:
            del self._given.stream
        return carried if after is stream else rewrap(carried, item, from_stream(after, self.at.axes, tensor))

    def _tensor(self, carried: Any, item: Item) -> Tensor:
        found, axes = unwrap(carried, item), self.at.axes.split()
        if not isinstance(found, Tensor) or found.ndim != len(axes):
            kind = type(carried if found is None else found).__name__
            shape = f" of {tuple(found.shape)}" if isinstance(found, Tensor) else ""
            raise GuardNotApplied(
                f"an edit at {self.site}",
                f"{self.path} carries a {kind}{shape} there, and its site map says {self.at.axes}",
                "Say what is there: At(path, axes=..., item=...).",
            )
        if (width := found.shape[axes.index("d")]) != self.width:
            raise WidthMismatch(
                f"an edit at {self.site}",
                f"{self.path} carries width {width} there, and its site map says {self.width}",
                "Say what is there: At(path, axes=..., width=...).",
            )
        return found


@dataclass(frozen=True, eq=False)
class Handle:
    """Hooks that are removed as one."""

    hooks: ExitStack

    def remove(self) -> None:
        """Remove them."""
        self.hooks.close()


def _argument(module: nn.Module, item: Item, n_positional: int) -> int | str:
    """Which argument of ``forward`` an item is, by default the first: its place among the positional, or its name."""
    names = list(inspect.signature(module.forward).parameters)
    index = names.index(item) if isinstance(item, str) and item in names else item or 0
    if isinstance(index, int) and index < n_positional:
        return index
    return index if isinstance(index, str) else names[index] if index < len(names) else ""
