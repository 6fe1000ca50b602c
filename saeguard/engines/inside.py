"""Which sessions the caller is inside of: a context variable, so that threads and tasks of others are not.

Sessions are of whole models: one on a model and one on a part of it would not see each other.
"""

import contextvars
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from saeguard.errors import ModelBusy

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


def check_apart(model: nn.Module, others: Iterable[nn.Module]) -> None:
    """Refuse a session on a part of a model that has one, or on what that model is a part of. Raises `ModelBusy`."""
    for other in others:
        if other is model:
            continue
        is_part = any(part is model for part in other.modules())
        if is_part or any(part is other for part in model.modules()):
            raise ModelBusy(
                f"a block on {type(model).__name__}",
                f"a steer or capture block is open on a {type(other).__name__}, which "
                + ("it is a part of" if is_part else "is a part of it")
                + ", and the two would not see each other's edits",
                "Open both blocks on the same one of them.",
            )
