"""JSON documents changed by what JSON can say and Python's own reader and writer would smooth over.

A document is a tree of `Obj`, lists and values, in which keys may stand twice and `Raw` is a text that goes out as it
is: a number in any spelling, or none. `mutated` changes the tree, `spelled` writes it in one of many layouts, and
`damaged` spoils the bytes.
"""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from random import Random
from typing import Any


class Obj(list):
    """The pairs of an object, in their order."""


class Raw(str):
    """A text that stands in the document as it is."""


def tree(text: str) -> Any:
    """A document as pairs."""
    return json.loads(text, object_pairs_hook=lambda pairs: Obj([key, value] for key, value in pairs))


NUMBERS = tuple(map(Raw, (
    "NaN", "nan", "Infinity", "-Infinity", "inf", "1e999", "-1e999", "1e-999", "1E400", "-0", "-0.0", "0.0", "1.0",
    "1e0", "100e-2", "01", "+1", "1.", ".5", "0x10", "1_000", "1e", "--1", "9007199254740993", "-9007199254740993",
    "18446744073709551616", "1" + "0" * 308, "1" + "0" * 309, "9" * 4000, "9" * 5000, "0." + "1" * 5000,
    "0.1000000000000000055511151231257827", "5e-324", "2e-324", "1.7976931348623159e308", "1e00000000000000000000001",
)))  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53, 2**53 + 1, 2**63, 0.5, 1.0, -2.0, 1e308, "", "0", "1", "null", "a",
    "tiny", "resid_post.1", "blocks.1.hook_resid_post", "latched", "refuse", "0" * 64, "F" * 64, "\ud800", "\udfff",
    "\0", "\x1b[31m", "\u202e", "\u200b", "é", "é", "𝔞" * 60, "x" * 5000, [], [[]], [None], [1, 1], [0] * 400,
    ["tiny"], Obj(), Obj([["kind", "always"]]), Obj([["kind", "halt"]]), Obj([["", Obj()]]),
)  # fmt: skip
TWINS = {"e": "е", "a": "а", "o": "ο", "i": "і", "s": "ѕ"}  # Cyrillic and Greek
DEPTHS = (3, 9, 14, 40, 900, 60_000)


def mutated(random: Random, found: Any) -> Any:
    """The tree with one change; it may be changed in place."""
    places = list(_places(found))
    if not places:
        return deepcopy(random.choice(VALUES))
    owner, at = random.choice(places)
    random.choices(list(CHANGES), list(CHANGES.values()))[0](random, owner, at, places)
    return found


def _places(found: Any) -> Iterator[tuple[Any, int]]:
    """Every value of the tree, as its owner and its number there."""
    level = [found]
    while level:
        here = [(node, at) for node in level if isinstance(node, list) for at in range(len(node))]
        yield from here
        level = [_get(node, at) for node, at in here]


def _get(owner: Any, at: int) -> Any:
    return owner[at][1] if isinstance(owner, Obj) else owner[at]


def _set(owner: Any, at: int, value: Any) -> None:
    if isinstance(owner, Obj):
        owner[at] = [owner[at][0], value]
    else:
        owner[at] = value


def _to_other(random: Random, owner: Any, at: int, places: Any) -> None:
    _set(owner, at, deepcopy(random.choice(VALUES)))


def _to_number(random: Random, owner: Any, at: int, places: Any) -> None:
    _set(owner, at, random.choice(NUMBERS))


def _tweak(random: Random, owner: Any, at: int, places: Any) -> None:
    """A neighbour of what is there."""
    value = _get(owner, at)
    if isinstance(value, bool) or value is None:
        _set(owner, at, not value)
    elif isinstance(value, int):
        _set(
            owner,
            at,
            random.choice((value + 1, -value, float(value), Raw(f"{value}.0"), Raw(f"{value}e0"), str(value))),
        )
    elif isinstance(value, float):
        _set(owner, at, random.choice((-value, value + 0.5, int(value), Raw(f"{value!r}0"), Raw(f"{value:.60e}"))))
    elif isinstance(value, str):
        _set(owner, at, random.choice((value + " ", value.upper(), value[:-1], value + "\n", _twin(value), [value])))
    elif value:
        value.reverse()


def _wrap(random: Random, owner: Any, at: int, places: Any) -> None:
    """Nested, in lists, objects, or gates of gates, as deep as it comes."""
    depth, inner = random.choice(DEPTHS), Raw(spelled(Random(0), _get(owner, at), plain=True))
    opening, closing = random.choice((("[", "]"), ('{"a":', "}"), ('{"kind":"not","gate":', "}")))
    _set(owner, at, Raw(opening * depth + inner + closing * depth))


def _drop(random: Random, owner: Any, at: int, places: Any) -> None:
    del owner[at]


def _double(random: Random, owner: Any, at: int, places: Any) -> None:
    """A key stands twice, with the same value or another, before it or behind."""
    if isinstance(owner, Obj):
        key, value = owner[at]
        owner.insert(random.randint(0, len(owner)), [key, deepcopy(random.choice((value, *VALUES, *NUMBERS)))])
    else:
        owner.insert(random.randint(0, len(owner)), deepcopy(owner[at]))


def _rename(random: Random, owner: Any, at: int, places: Any) -> None:
    if isinstance(owner, Obj):
        key = owner[at][0]
        others = [node[n][0] for node, n in places if isinstance(node, Obj)]
        new = random.choice((key + " ", key + "\0", key.upper(), _twin(key), "", "__class__", *others))
        owner[at] = [new, owner[at][1]]


def _add(random: Random, owner: Any, at: int, places: Any) -> None:
    """A key or item from elsewhere."""
    other, number = random.choice(places)
    if isinstance(owner, Obj):
        key = other[number][0] if isinstance(other, Obj) else "extra"
        owner.insert(at, [key, deepcopy(_get(other, number))])
    else:
        owner.insert(at, deepcopy(_get(other, number)))


def _graft(random: Random, owner: Any, at: int, places: Any) -> None:
    """What stands elsewhere in its place."""
    other, number = random.choice(places)
    _set(owner, at, Raw(spelled(Random(0), _get(other, number), plain=True)))


def _reorder(random: Random, owner: Any, at: int, places: Any) -> None:
    random.shuffle(owner)


def _twin(text: str) -> str:
    """The same to the eye."""
    return "".join(TWINS.get(char, char) for char in text) if set(text) & set(TWINS) else text + "\u200b"


CHANGES: dict[Callable[[Random, Any, int, Any], None], int] = {
    _to_other: 4, _to_number: 4, _tweak: 6, _wrap: 1, _drop: 2, _double: 4, _rename: 2, _add: 2, _graft: 2, _reorder: 2,
}  # fmt: skip
"""Each with its weight."""


def spelled(random: Random, found: Any, *, plain: bool = False) -> str:
    """The text of a tree, in some layout; ``plain`` is without any of its own."""
    space = "" if plain else random.choice(("", "", " ", "\n", "\r\n\t"))
    escapes = 0.0 if plain else random.choice((0.0, 0.0, 0.1))

    def text(value: str) -> str:
        said = json.dumps(value, ensure_ascii=plain or random.random() < 0.5)
        if random.random() < escapes:
            said = '"' + "".join(f"\\u{ord(char):04x}" if ord(char) < 0x10000 else char for char in value) + '"'
        return said

    def write(value: Any) -> str:
        if isinstance(value, Raw):
            return str(value)
        if isinstance(value, Obj):
            return "{" + ",".join(f"{space}{text(key)}:{space}{write(part)}" for key, part in value) + space + "}"
        if isinstance(value, list):
            return "[" + f",{space}".join(map(write, value)) + "]"
        return text(value) if isinstance(value, str) else json.dumps(value)

    return write(found)


def damaged(random: Random, text: str) -> bytes:
    """The bytes of a file, which are mostly those of the text."""
    data = text.encode("utf-8", "surrogatepass")
    at = random.randint(0, len(data))
    whole = (
        data,
        data + b"\n",
        b"\xef\xbb\xbf" + data,
        data + data,
        data[:at],
        data + b"\0",
        b" " * 9 + data,
        data + b",",
    )
    parts = (
        data[:at] + bytes([random.randrange(256)]) + data[at + 1 :], data[:at] + b"\xff" + data[at:],
        data[:at] + b"/* */" + data[at:], data[:at] + b",}" + data[at:], text.encode("utf-16", "surrogatepass"),
        text.encode("utf-32", "surrogatepass"), data.replace(b"[", b"{", 1), data.replace(b'"', b"'"),
    )  # fmt: skip
    return data if random.random() < 0.8 else random.choice(whole + parts)
