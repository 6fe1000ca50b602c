"""The method that stands for ``model.generate`` inside a block, so that a request is read before its first pass."""

from collections.abc import Callable
from types import MethodType
from typing import Any

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
