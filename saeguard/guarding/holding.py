"""A streamer that keeps back the last piece of a stream until the request is on record."""

from typing import Any


class Held:
    """Stands for ``streamer`` during generate; `release` or `give_up` has to follow."""

    def __init__(self, streamer: Any):
        self._streamer = streamer
        self._last: list[Any] = []
        self._over = False

    def put(self, value: Any) -> None:
        """Pass on what was kept back, and keep this; after the end, a thread that hung may go on saying things."""
        if not self._over:
            self._flush()
            self._last.append(value)

    def end(self) -> None:
        """Generate has ended; the consumer hears of it later."""

    def release(self, *more: Any) -> None:
        """The request is on record: the rest goes out, then ``more``."""
        self._flush()
        for value in more:
            self._streamer.put(value)
        self._streamer.end()

    def give_up(self) -> None:
        """The request failed: what was kept back never goes out, and nobody has to wait for it."""
        self._over = True
        self._streamer.end()

    def _flush(self) -> None:
        while self._last:
            self._streamer.put(self._last.pop(0))
