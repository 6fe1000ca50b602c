"""Figures: what a policy says of its own calibration, as JSON that is finite, bounded and cannot be changed.

Levels, bounds, numbers of texts, SHA-256 of data. Nothing here decides anything while a model runs.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from saeguard.errors import BadPolicy

MAX_DEPTH = 6
MAX_VALUES = 10_000
MAX_CHARACTERS = 2_000
MAX_WHOLE = 1 << 53
"""Whole numbers beyond this are not the same in every reader of JSON."""


def frozen(value: Any) -> Mapping[str, Any]:
    """A copy of nested mappings and lists whose parts cannot be replaced. Raises `BadPolicy`."""
    if not isinstance(value, Mapping):
        raise _bad(f"it is {type(value).__name__}, not a mapping", "Give names and values.")
    left = [MAX_VALUES]
    return _frozen(value, 1, left)


def thawed(value: Any) -> Any:
    """``value`` as `json.dumps` takes it."""
    if isinstance(value, Mapping):
        return {name: thawed(part) for name, part in value.items()}
    return [thawed(part) for part in value] if isinstance(value, tuple) else value


def check_text(asked: str, text: Any, *, most: int = MAX_CHARACTERS, least: int = 1) -> str:
    """Raise `BadPolicy` unless ``text`` is a string of so many characters that can be shown and sent.

    Control characters are refused but for line ends and tabs, and so is half of a surrogate pair.
    """
    if not isinstance(text, str) or not least <= len(text) <= most:
        found = f"it is {len(text):,} characters" if isinstance(text, str) else f"it is {type(text).__name__}"
        raise BadPolicy(asked, found, f"Give a string of {least} to {most:,} characters.")
    if any((ord(char) < 32 and char not in "\n\t") or 127 <= ord(char) < 160 for char in text):
        raise BadPolicy(asked, "it holds a control character", "Leave it out; line ends are written \\n.")
    if any(0xD800 <= ord(char) < 0xE000 for char in text):
        raise BadPolicy(asked, "it holds half of a surrogate pair", "Write the character itself.")
    return text


def _frozen(value: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0:
        raise _bad(f"it has more than {MAX_VALUES:,} values", "Keep the figures; data belongs into files of its own.")
    if isinstance(value, Mapping | list | tuple):
        if depth > MAX_DEPTH:
            raise _bad(f"it nests deeper than {MAX_DEPTH} levels", "Make it flatter.")
        if isinstance(value, Mapping):
            names = [check_text("a name in a policy's calibration", name, most=200) for name in value]
            parts = (_frozen(part, depth + 1, left) for part in value.values())
            return MappingProxyType(dict(sorted(zip(names, parts, strict=True))))
        return tuple(_frozen(part, depth + 1, left) for part in value)
    return _checked(value)


def _checked(value: Any) -> str | bool | int | float | None:
    if value is None or type(value) is bool:
        return value
    if type(value) is str:
        return check_text("a text in a policy's calibration", value, least=0)
    if type(value) is int and abs(value) <= MAX_WHOLE:
        return value
    if type(value) is float and math.isfinite(value):
        return value
    shown = f"{value!r:.40}" if isinstance(value, int | float) else type(value).__name__
    raise _bad(f"it holds {shown}", "Give finite numbers, whole ones up to 2^53, texts, true, false or null.")


def _bad(found: str, proceed: str) -> BadPolicy:
    return BadPolicy("a policy's calibration", found, proceed)
