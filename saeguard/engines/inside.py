"""Which sessions the caller is inside of: a context variable, so that threads and tasks of others are not."""

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager

_INSIDE: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar("saeguard_sessions", default=frozenset())


def is_inside(number: int) -> bool:
    """Whether the caller is inside of the session of that number."""
    return number in _INSIDE.get()


def enter(number: int) -> None:
    """From here on the caller is."""
    _INSIDE.set(_INSIDE.get() | {number})


def leave(number: int) -> None:
    """From here on the caller is not."""
    _INSIDE.set(_INSIDE.get() - {number})


@contextmanager
def inside(number: int) -> Iterator[None]:
    """The caller is, for the block, whoever it is."""
    before = _INSIDE.set(_INSIDE.get() | {number})
    try:
        yield
    finally:
        _INSIDE.reset(before)
