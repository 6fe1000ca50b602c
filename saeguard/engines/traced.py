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

from torch import nn

_TYPE_MATCH = re.compile(r"___check_type_id\((.+?), (\d+)\)")
_READ: "weakref.WeakKeyDictionary[Any, frozenset[int]]" = weakref.WeakKeyDictionary()


def is_traced(module: nn.Module) -> bool:
    """Whether a compiled graph that is still alive calls a module of this class."""
    return any(id(type(module)) in _types_in(guards) for guards in _live_guards())


def _live_guards() -> Iterator[Any]:
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    if dynamo is None:  # nothing was ever compiled
        return
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    for reference in list(dynamo.input_codes.seen):
        code = reference()
        for entry in _debug_get_cache_entry_list(code) if code is not None else ():
            yield entry.guard_manager


def _types_in(guards: Any) -> frozenset[int]:
    """Addresses of the classes of all objects that a graph was guarded on, but for the ``self`` of its own frame."""
    if guards not in _READ:
        found = _TYPE_MATCH.findall(str(guards))
        _READ[guards] = frozenset(int(address) for source, address in found if source != "L['self']")
    return _READ[guards]
