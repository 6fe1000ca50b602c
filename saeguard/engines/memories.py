"""Whose tokens a gate remembers: its memory belongs to the rows of a cache, and goes where they go.

A cache that is cut, copied or goes on in another call takes the memory along; where its rows trade places or are
multiplied, by its own methods, those of the memory do too. A cache that was filled elsewhere has none.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from saeguard.engines.base import Pass, Request
from saeguard.errors import GateFailed
from saeguard.gating import Memory

_MOVES: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "reorder_cache": lambda rows: lambda old: old[rows.cpu()],
    "batch_select_indices": lambda rows: lambda old: old[rows.cpu() if isinstance(rows, Tensor) else rows],
    "batch_repeat_interleave": lambda repeats: lambda old: old.repeat_interleave(repeats),
}
"""A cache's methods that change its rows: from their argument to what they take of the old rows."""


class Memories:
    """The gates' memories of one session, by the cache that holds their tokens."""

    def __init__(self):
        self._left: weakref.WeakKeyDictionary[Any, Mapping[Any, Memory]] = weakref.WeakKeyDictionary()
        self._moved: weakref.WeakSet[Any] = weakref.WeakSet()
        """Caches whose rows have changed since their last pass."""

    def resume(self, participant: Any, record: Any, seen: Pass) -> None:
        """Before a pass: what is remembered of its cache, also where another call of the block left it."""
        if seen.column > 0 and seen.cache is not None:
            left = self._left.get(seen.cache, {}).get(participant)
            if left is not None and left is not record.memory:
                record.memory = left.copy()

    def check(self, records: Mapping[Any, Any], request: Request | None, seen: Pass) -> None:
        """Refuse a pass before which beams should have traded places and nobody was told. Raises `GateFailed`."""
        if request is None or not request.reorders or seen.column < max(request.prompt_columns, 1):
            return
        if any(record.memory.histories for record in records.values()) and seen.cache not in self._moved:
            raise GateFailed(
                "a gate during a beam search", "the rows of the cache were not reordered where saeguard could see it",
                "Use greedy decoding or sampling with gates.",
            )  # fmt: skip
        self._moved.discard(seen.cache)

    def keep(self, records: Mapping[Any, Any], cache: Any) -> None:
        """After a pass: what was seen belongs to ``cache``."""
        memories = {who: record.memory for who, record in records.items() if record.memory.histories}
        if memories and cache is not None:
            if cache not in self._left:
                self._follow(cache)
            self._left[cache] = memories

    def close(self) -> None:
        """Give the caches their own methods back."""
        for cache in list(self._left):
            for name in _MOVES:
                if isinstance(follower := cache.__dict__.get(name), _Follower):
                    follower.close()
        self._left.clear()

    def copied(self, cache: Any, copy: Any) -> None:
        """``copy`` holds what ``cache`` holds, and goes its own way from here."""
        self._left[copy] = {who: memory.copy() for who, memory in self._left.get(cache, {}).items()}

    def moved(self, cache: Any, choose: Callable[[Tensor], Tensor]) -> None:
        """The rows of ``cache`` are those that ``choose`` took."""
        self._moved.add(cache)
        for memory in self._left.get(cache, {}).values():
            memory.reorder(choose)

    def _follow(self, cache: Any) -> None:
        for name in _MOVES:
            if hasattr(cache, name):
                cache.__dict__[name] = _Follower(self, cache, name, cache.__dict__.get(name))


class _Follower:
    """Stands in the place of a cache's method and tells the memories what it did."""

    def __init__(self, memories: Memories, cache: Any, name: str, own: Any):
        self._memories, self._cache, self._name, self._own = memories, weakref.ref(cache), name, own

    def __call__(self, rows: Any) -> Any:
        cache = self._cache()
        assert cache is not None
        done = self._own(rows) if self._own is not None else getattr(type(cache), self._name)(cache, rows)
        self._memories.moved(cache, _MOVES[self._name](rows))
        return done

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied cache gets a follower of its own, and the memory with it."""
        cache = self._cache()
        copy = memo.get(id(cache))
        if cache is None or copy is None:
            return self
        self._memories.copied(cache, copy)
        return _Follower(self._memories, copy, self._name, None)

    def close(self) -> None:
        """Give the cache its own method back."""
        cache = self._cache()
        if cache is None:
            return
        del cache.__dict__[self._name]
        if self._own is not None:
            cache.__dict__[self._name] = self._own
