"""Whose tokens a gate remembers: its memory belongs to the rows of a cache, and goes where they go."""

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saeguard.engines.base import Pass
from saeguard.errors import GateFailed
from saeguard.gating import Memory


class Memories:
    """The gates' memories of one session, by the cache that holds their tokens."""

    def __init__(self):
        self._left: weakref.WeakKeyDictionary[Any, Mapping[Any, Memory]] = weakref.WeakKeyDictionary()

    def resume(self, participant: Any, record: Any, seen: Pass) -> None:
        """Let a new call that goes on with a cache remember what was seen of it."""
        if seen.column > 0 and seen.cache is not None:
            before = self._left.get(seen.cache, {}).get(participant)
            record.memory = before if before is not None else record.memory

    def keep(self, call: Any, cache: Any) -> "Beams | None":
        """After a pass: what was seen belongs to ``cache``. Where its rows trade places, the memory will too."""
        memories = {
            participant: record.memory for participant, record in call.records.items() if record.memory.histories
        }
        if not memories or cache is None:
            return None
        self._left[cache] = memories
        if call.request is None or not call.request.reorders:
            return None
        return call.beams or Beams(cache, tuple(memories.values()))


class Beams:
    """Watches ``cache.reorder_cache``, which a beam search calls between two passes."""

    def __init__(self, cache: Any, memories: tuple[Memory, ...]):
        self._cache, self._memories = cache, memories
        self._reorder, self._told = cache.reorder_cache, False
        cache.reorder_cache = self._watched

    def _watched(self, beam_idx: Tensor) -> Any:
        self._told = True
        for memory in self._memories:
            memory.reorder(beam_idx)
        return self._reorder(beam_idx)

    def check(self) -> None:
        """Once per pass: whether the rows' new places were told. Raises `GateFailed`."""
        if not self._told:
            raise GateFailed(
                "a gate during a beam search", "the rows of the cache were not reordered where saeguard could see it",
                "Use greedy decoding or sampling with gates.",
            )  # fmt: skip
        self._told = False

    def close(self) -> None:
        """Give the cache its own method back."""
        self._cache.__dict__.pop("reorder_cache", None)
