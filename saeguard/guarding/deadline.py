"""A deadline for a guarded call: what has not come back and gone on record by then is refused, and never goes out.

The call runs in a thread of its own, for nothing can stop a forward pass that hangs. When time is up the caller gets
`GuardTimeout`, and the thread, should it ever end, finds that its answer is no longer wanted.
"""

import contextvars
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from saeguard.errors import GuardTimeout

T = TypeVar("T")
PATIENCE = 0.1
"""Seconds beyond the deadline that a record which is just being written gets."""


class Deadline:
    """``seconds`` from now on; None is never."""

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self._deciding = threading.Lock()
        self._over = False
        self._told: Callable[[GuardTimeout], object] = lambda error: None
        """What puts on record that time was up; unless the call, not knowing yet whose request it is, will do so."""

    def tell(self, function: Callable[[GuardTimeout], object]) -> None:
        """Have ``function`` put on record that time was up, or, if it is, do so now. Raises `GuardTimeout`."""
        with self._deciding:
            if self._over:
                error = self._error()
                function(error)
                raise error
            self._told = function

    def commit(self, function: Callable[[], T]) -> T:
        """Call ``function``, after which the answer goes out, unless time is up. Raises `GuardTimeout`."""
        with self._deciding:
            if self._over:
                raise self._error()
            return function()

    def run(self, function: Callable[[], T]) -> T:
        """``function``'s result or exception, or `GuardTimeout`."""
        if self._seconds is None:
            return function()
        found: dict[str, Any] = {}
        context = contextvars.copy_context()

        def work() -> None:
            try:
                found["result"] = context.run(function)
            except BaseException as error:  # whatever it is, it belongs to the caller
                found["error"] = error

        thread = threading.Thread(target=work, daemon=True, name="saeguard-deadline")
        thread.start()
        thread.join(self._seconds)
        if thread.is_alive() and not self._expire():
            thread.join(PATIENCE)
        if "result" in found and not self._over:
            return found["result"]
        if "error" in found and not self._over:
            raise found["error"]
        error = self._error()
        self._told(error)
        raise error

    def _expire(self) -> bool:
        """Whether time is up for good: not while the record is being written."""
        if not self._deciding.acquire(blocking=False):
            return False
        try:
            self._over = True
        finally:
            self._deciding.release()
        return True

    def _error(self) -> GuardTimeout:
        return GuardTimeout(
            f"a guarded call within {self._seconds} seconds", "it had not come back and gone on record by then",
            "Ask for fewer tokens, or allow more time; find out what hangs if that does not help.",
        )  # fmt: skip
