"""A pickle read as data: its steps are followed by a small machine that can build containers and nothing else.

    }            a dict                          ctorch FloatStorage      a name, looked up in a table of ours
    X...  K..    text, number                    R                        what the table says, never a call into Python

Python's and torch's own unpicklers run whatever the names stand for, or have to be trusted not to. Here a name that the
table lacks is collected, and when the pickle is through, all of them are in the error; nothing is ever imported.
"""

from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from pickletools import genops
from reprlib import repr as short
from typing import Any

from saeguard.archives.base import broken
from saeguard.errors import UnsafePickle

MAX_STEPS = 250_000  # 4096 tensors take 50 each
MAX_ARGUMENTS = 16
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ARGUMENTS = {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SILENT = {"PROTO", "FRAME"}
_DAMAGE = (
    ValueError, TypeError, LookupError, OverflowError, RecursionError, AttributeError,
    Warning,  # old text opcodes may hold escapes that warn, and a caller may have made warnings errors
)  # fmt: skip


class Foreign:
    """Stands for everything that an unknown name would have made."""

    def __repr__(self) -> str:
        return "something that only code could build"


FOREIGN = Foreign()


def load(path: Path, stream: BytesIO, table: Mapping[str, Any], stored: Callable[[Any], Any]) -> Any:
    """The value of the next pickle in ``stream``.

    ``table`` gives for a dotted name a value, or a function for the arguments that the pickle would call it with;
    ``stored`` does so for what the pickle says is kept outside of it. Raises `UnsafePickle`, `BrokenFile`.
    """
    machine = _Machine(table, stored)
    damage: Exception | None = None
    value: Any = None
    try:
        value = machine.run(stream)
    except _DAMAGE as error:
        damage = error
    if machine.unknown:
        raise UnsafePickle(
            f"weights file {path.name}",
            f"its pickle names {_some(machine.unknown)}, which is code and was not run",
            "Save its state_dict of plain tensors again, or convert it to safetensors where it came from.",
        ) from damage
    if damage is not None:
        raise broken(path, f"its pickle does not read as plain data ({type(damage).__name__}: {damage})") from damage
    return value


def _some(names: set[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(name if len(name) < 80 else short(name) for name in sorted(names)[:8]) + more


def _call(function: Callable[..., Any], arguments: Any) -> Any:
    if type(arguments) is not tuple or len(arguments) > MAX_ARGUMENTS:  # one long tuple, handed over many times
        raise ValueError(f"it calls with {short(arguments)}")
    return function(*arguments)


class _Machine:
    """The stack, the marks and the memo of a pickle, with inert values on them."""

    def __init__(self, table: Mapping[str, Any], stored: Callable[[Any], Any]):
        self.table, self.stored = table, stored
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.unknown: set[str] = set()

    def run(self, stream: BytesIO) -> Any:
        for step, (opcode, argument, _) in enumerate(genops(stream)):
            if step > MAX_STEPS:
                raise ValueError(f"it has more than {MAX_STEPS} steps")
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _ARGUMENTS:
                self.stack.append(argument)
            elif name in _TUPLES:
                self.stack.append(tuple(self._top(_TUPLES[name])))
            elif name not in _SILENT:
                self._step(name, argument)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "SETITEM":
                self._set(self._top(2))
            case "SETITEMS":
                self._set(self._marked())
            case "APPEND":
                self._extend(self._top(1))
            case "APPENDS":
                self._extend(self._marked())
            case "GLOBAL" | "INST":
                if name == "INST":
                    self._marked()
                self._name(".".join(argument.split(" ", 1)))
            case "STACK_GLOBAL":
                self._name(".".join(self._top(2)))
            case "BINPERSID":
                stack.append(self.stored(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._top(2)
                called = callable(function) and name == "REDUCE"
                stack.append(_call(function, arguments) if called else self._foreign(function))
            case "BUILD":  # a state dict keeps the versions of its modules as an attribute
                owner, _ = self._top(2)
                stack.append(owner if type(owner) is dict else self._foreign(owner))
            case "BINBYTES" | "SHORT_BINBYTES" | "EMPTY_SET":
                stack.append(FOREIGN)
            case _:
                raise ValueError(f"step {name} is not needed for data")

    def _top(self, count: int) -> list[Any]:
        """Take off the last ``count`` values; those below the last mark are not for taking."""
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - count < floor:
            raise ValueError("it takes more from its stack than there is")
        cut = len(self.stack) - count
        taken = self.stack[cut:]
        del self.stack[cut:]
        return taken

    def _marked(self) -> list[Any]:
        cut = self.marks.pop()
        taken = self.stack[cut:]
        del self.stack[cut:]
        return taken

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if target is FOREIGN:
            return
        if type(target) is not dict or len(items) % 2:
            raise ValueError("it sets items of what is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):  # others may take forever to hash
                raise ValueError(f"a key is {short(key)}")
            target[key] = value

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if target is FOREIGN:
            return
        if type(target) is not list:
            raise ValueError("it appends to what is not a list")
        target.extend(items)

    def _name(self, name: str) -> None:
        if name not in self.table:
            self.unknown.add(name)
        self.stack.append(self.table.get(name, FOREIGN))

    def _foreign(self, owner: Any) -> Foreign:
        if owner is not FOREIGN:
            raise ValueError(f"it builds upon {short(owner)}")
        return FOREIGN
