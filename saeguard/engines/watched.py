"""What stands for methods of a model inside a block: for ``generate``, so that a request is read before its first pass,
and for ``forward``, where a framework runs that and so skips the hooks of the model."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from types import MethodType
from typing import Any, Protocol, runtime_checkable

from torch import nn


class Watched:
    """What stands for ``model.generate`` inside a block; a copy of the model made there gets its own method back."""

    def __init__(self, model: nn.Module, watched: Callable[..., Any]):
        self._model, self._watched = model, watched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._watched(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        kind: Any = type(self._model)
        return MethodType(kind.generate, memo.get(id(self._model), self._model))


def restore(model: nn.Module, watched: Any, before: Any) -> None:
    """Take ``watched`` off ``model`` and put back what stood there ``before``."""
    if model.__dict__.get("generate") is not watched:  # somebody else's by now: theirs stays, ours inside it is inert
        return
    del model.__dict__["generate"]
    if before is not None:
        model.__dict__["generate"] = before


@runtime_checkable
class Redirecting(Protocol):
    """An engine whose framework runs ``model.forward`` where a call of the model is meant."""

    def through_calls(self) -> AbstractContextManager[None]:
        """For the block, whoever runs ``model.forward`` has the model called, with its hooks."""
        ...


def redirected(engine: Any) -> AbstractContextManager[None]:
    """What `Redirecting.through_calls` gives, and nothing for other engines."""
    return engine.through_calls() if isinstance(engine, Redirecting) else nullcontext()


class Called:
    """Runs the model's own forward where the model was called, and calls the model where it was not."""

    def __init__(self, model: nn.Module):
        kind: Any = type(model)
        self._model, self._before = model, model.__dict__.get("forward")
        self._own = self._before or MethodType(kind.forward, model)
        self._thread = threading.local()
        self._is_placed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        was_called, self._thread.was_called = getattr(self._thread, "was_called", False), False
        if was_called or not self._is_placed:
            return self._own(*args, **kwargs)
        return self._model(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model made inside a block gets its own method back."""
        kind: Any = type(self._model)
        return MethodType(kind.forward, memo.get(id(self._model), self._model))

    def announced(self) -> Callable[[nn.Module, Any], None]:
        """The hook that tells of a call; it has to be the last one before forward."""

        def announce(module: nn.Module, args: Any) -> None:
            if module is self._model:  # a copy of the model has this hook too
                self._thread.was_called = True

        return announce

    def place(self) -> None:
        """Stand for the model's forward."""
        self._is_placed = True
        self._model.__dict__["forward"] = self

    def remove(self) -> None:
        """Put back what stood there before."""
        self._is_placed = False
        if self._model.__dict__.get("forward") is not self:  # somebody else's by now: theirs stays, this one is inert
            return
        del self._model.__dict__["forward"]
        if self._before is not None:
            self._model.__dict__["forward"] = self._before


@runtime_checkable
class Stopping(Protocol):
    """An engine whose framework ends passes early, by an exception that it catches itself."""

    def stop_errors(self) -> tuple[type[Exception], ...]:
        """The exceptions that do."""
        ...


class Stoppable(Called):
    """Runs the model's own forward, and ``check`` where that is ended early: hooks on the way out cannot raise."""

    def __init__(self, model: nn.Module, errors: tuple[type[Exception], ...], check: Callable[[], None]):
        super().__init__(model)
        self._errors, self._check = errors, check
        self.__signature__ = signature(self._own)  # generate of transformers reads it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._own(*args, **kwargs)
        except self._errors:
            if self._is_placed:
                self._check()
            raise


@contextmanager
def stops_watched(engine: Any, check: Callable[[], None]) -> Iterator[None]:
    """For the block, ``check`` is called where the framework ends a pass early; nothing for other engines."""
    if not isinstance(engine, Stopping):
        yield
        return
    stoppable = Stoppable(engine.model, engine.stop_errors(), check)  # type: ignore[attr-defined]
    stoppable.place()
    try:
        yield
    finally:
        stoppable.remove()
