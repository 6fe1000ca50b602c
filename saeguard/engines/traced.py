"""Which module classes torch.compile has traced into a graph of their callers.

Such a graph was made without our hooks, and torch does not guard on hooks: it would go on running without them. A
graph of a module's own ``forward`` is harmless, since hooks lie around ``forward``, in the call. What a graph contains
is read from the guards that torch keeps with it, as TYPE_MATCH of every module that it went through.
"""

import re
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from saeguard.errors import CompiledModel

_TYPE_MATCH = re.compile(r"___check_type_id\((.+?), (\d+)\)")
_READ: "weakref.WeakKeyDictionary[Any, frozenset[int]]" = weakref.WeakKeyDictionary()


def is_traced(module: nn.Module) -> bool:
    """Whether a compiled graph that is still alive calls a module of this class."""
    return any(id(type(module)) in _types_in(guards) for guards in _live_guards())


def _live_guards() -> Iterator[Any]:
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    if dynamo is None:  # nothing was ever compiled
        return
    try:
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        codes = [code for reference in list(dynamo.input_codes.seen) if (code := reference()) is not None]
        found = [entry.guard_manager for code in codes for entry in _debug_get_cache_entry_list(code)]
    except (ImportError, AttributeError) as error:
        raise CompiledModel(
            "steering in a process that has torch.compile at work",
            f"torch {torch.__version__} keeps its graphs where saeguard cannot look ({error})",
            "Steer in a process that compiles nothing, or use torch 2.13.",
        ) from error
    yield from found


def _types_in(guards: Any) -> frozenset[int]:
    """Addresses of the classes of all objects that a graph was guarded on, but for the ``self`` of its own frame."""
    if guards not in _READ:
        found = _TYPE_MATCH.findall(str(guards))
        _READ[guards] = frozenset(int(address) for source, address in found if source != "L['self']")
    return _READ[guards]
