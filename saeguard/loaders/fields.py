"""One value of a config at a time, of the kind that it has to be, or None where it is not there.

What a file says is believed only in its own type: true is not 1, "8" is not 8, and a number is finite.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from saeguard.loaders.source import broken


def text(path: Path, config: Mapping[str, Any], key: str) -> str | None:
    """Raises `BrokenFile`."""
    return _of(path, config, key, (str,), "text")


def flag(path: Path, config: Mapping[str, Any], key: str) -> bool | None:
    """Raises `BrokenFile`."""
    return _of(path, config, key, (bool,), "true or false")


def whole(path: Path, config: Mapping[str, Any], key: str, low: int = 0, high: int = 2**62) -> int | None:
    """A whole number between the two, both included. Raises `BrokenFile`."""
    value = _of(path, config, key, (int,), "a whole number")
    if value is not None and not low <= value <= high:
        raise broken(path, f"{key} is {short(value)}, not between {low} and {high}")
    return value


def number(path: Path, config: Mapping[str, Any], key: str) -> float | None:
    """Raises `BrokenFile`."""
    value = _of(path, config, key, (int, float), "a number")
    if value is not None and not (abs(value) < 2**62 and math.isfinite(value)):
        raise broken(path, f"{key} is {short(value)}, not a finite number")
    return None if value is None else float(value)


def table(path: Path, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Empty where it is not there. Raises `BrokenFile`."""
    return _of(path, config, key, (dict,), "a mapping") or {}


def widths(path: Path, config: Mapping[str, Any], **expected: int) -> None:
    """Raise `BrokenFile` where the config gives one of these numbers and it is another than the weights have."""
    for key, width in expected.items():
        found = whole(path, config, key)
        if found not in (None, width):
            raise broken(path, f"{key} is {found}, and the weights have {width}")


def _of(path: Path, config: Mapping[str, Any], key: str, kinds: tuple[type, ...], what: str) -> Any:
    value = config.get(key)
    if value is not None and type(value) not in kinds:
        raise broken(path, f"{key} is {short(value)}, not {what}")
    return value
