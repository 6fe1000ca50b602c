"""JSON without its loopholes: no key twice in an object, no NaN or infinity, no bottomless nesting."""

import json
from typing import Any

EXACT = 1 << 53
"""Up to here every whole number is a double."""


def parse(text: str | bytes) -> Any:
    """What ``text`` says. Raises ValueError, also for nesting deeper than Python can follow."""
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error


def depth(document: Any) -> int:
    """How many levels of objects and lists ``document`` has, a bare value counting as one."""
    level, levels = [document], 0
    while level:
        levels += 1
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return levels


def rounded(document: Any) -> int | None:
    """A whole number in ``document`` that no double is equal to, which readers of JSON may round; None without."""
    left = [document]
    while left:
        node = left.pop()
        if isinstance(node, dict | list):
            left.extend(node.values() if isinstance(node, dict) else node)
        elif type(node) is int and abs(node) > EXACT and not _is_double(node):
            return node
    return None


def _is_double(number: int) -> bool:
    try:
        return float(number) == number
    except OverflowError:
        return False


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")
