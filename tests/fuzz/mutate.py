"""One changed input from a sound or hostile one: bytes anywhere, or what a format's own words say.

any bytes       flips, cuts, repeats, splices of two seeds, tokens that formats have, integers at their limits
JSON, YAML      a value becomes one of another kind, a key is gone, there twice, or renamed
safetensors     the same in the header, whose length is then put right
zip             the same in one member, whose checksum and place are then put right
"""

import json
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from io import BytesIO
from random import Random
from typing import Any

MAX_BYTES = 1 << 16
INTEGERS = (0, 1, -1, 2, 127, 128, 255, 256, 65535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40,
            (1 << 62) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63))  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e308, 10**9, 1 << 62, 1 << 64, 10**400, -(10**400), float("inf"),
    float("nan"), "", "a", "0", "relu", "topk", "resid_post.3", "blocks.999999999.hook_resid_post", "../../etc/passwd",
    "\ud800", "é" * 40, "a" * 5000, [], {}, [[]], [1], [None], [1, 2, 3], {"a": 1}, {"": {"": []}}, [0] * 300,
)  # fmt: skip
TOKENS = (
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"\n", b"\0", b"\xff\xff\xff\xff", b"\xff" * 8, b"NaN", b"1e999", b"null",
    b"true", b"-", b"9" * 400, b"\\ud800", b"\xed\xa0\x80", b"!!int ", b"!!python/object:os.system ", b"&a ", b"*a",
    b"? ", b"<<: ", b"---\n", b"PK\1\2", b"PK\3\4", b"PK\5\6",
    b"PK\6\6", b"\x93NUMPY", b"cos\nsystem\n", b"(", b"t", b"R",
    b"Q", b"s", b"u", b"a", b"e", b"h\0", b"q\0", b"\x94", b"\x93", b"\x85", b"\x86", b"\x87", b"b", b"N", b"\x88",
    b"J\xff\xff\xff\xff", b"\x8a\x08\0\0\0\0\0\1\0\0", b".",
    b"ctorch\nSize\n", b"ctorch\ndevice\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
)  # fmt: skip


def mutate(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """``data`` with one to four changes."""
    for _ in range(random.choice((1, 1, 2, 4))):
        data = _change(random, data, others)[:MAX_BYTES]
    return data


def _change(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    if random.random() < 0.75:
        for inside in (_zip, _safetensors, _json, _yaml):
            changed = inside(random, data, others)
            if changed is not None:
                return changed
    return random.choice(_BYTES)(random, data, others)


# Bytes


def _span(random: Random, data: bytes) -> tuple[int, int]:
    first = random.randint(0, len(data))
    return first, min(first + random.choice((1, 1, 2, 4, 8, 32, 200)), len(data))


def _flip(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 3))):
        if found:
            found[random.randrange(len(found))] ^= 1 << random.randrange(8)
    return bytes(found)


def _set(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at = random.randint(0, len(data))
    return data[:at] + random.randbytes(1) + data[at + 1 :]


def _cut(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data[: random.randint(0, len(data))]


def _remove(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    first, last = _span(random, data)
    return data[:first] + data[last:]


def _repeat(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    first, last = _span(random, data)
    return data[:last] + data[first:last] * random.choice((1, 1, 2, 100)) + data[last:]


def _insert(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at = random.randint(0, len(data))
    return data[:at] + random.choice(TOKENS) + data[at:]


def _overwrite(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    at, token = random.randint(0, len(data)), random.choice(TOKENS)
    return data[:at] + token + data[at + len(token) :]


def _splice(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = random.choice(others)
    return data[: random.randint(0, len(data))] + other[random.randint(0, len(other)) :]


def _integer(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Little-endian numbers of 1 to 8 bytes, as headers have them."""
    size, number = random.choice((1, 2, 4, 8)), random.choice(INTEGERS)
    at = random.randint(0, max(len(data) - size, 0))
    return data[:at] + (number % (1 << 8 * size)).to_bytes(size, "little") + data[at + size :]


def _digits(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Numbers written in decimal."""
    found = list(re.finditer(rb"-?\d+", data[:4096]))
    if not found:
        return data
    match = random.choice(found)
    return data[: match.start()] + str(random.choice(INTEGERS)).encode() + data[match.end() :]


_BYTES: tuple[Callable[[Random, bytes, Sequence[bytes]], bytes], ...] = (
    _flip, _set, _cut, _remove, _repeat, _insert, _overwrite, _splice, _integer, _digits,
)  # fmt: skip


# Words


def _json(random: Random, data: bytes, others: Sequence[bytes]) -> bytes | None:
    if data[:1] not in (b"{", b"["):
        return None
    try:
        found = json.loads(data)
        return _twice(random, _swap(random, found)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return None


def _swap(random: Random, found: Any) -> Any:
    """Change one value, or one key, somewhere in it."""
    places = list(_places(found))
    if not places:
        return random.choice(VALUES)
    owner, key = random.choice(places)
    how = random.random()
    if how < 0.1:
        del owner[key]
    elif how < 0.2 and isinstance(owner, dict):
        owner[random.choice([other for _, other in places if isinstance(other, str)])] = owner.pop(key)
    elif how < 0.3:
        owner[key] = [owner[key]] if random.random() < 0.5 else {"a": owner[key]}
    elif how < 0.5:
        other, name = random.choice(places)
        owner[key] = other[name] if not isinstance(other[name], dict | list) else len(places)
    elif how < 0.65 and type(owner[key]) is int:
        owner[key] = random.choice((owner[key] + 1, owner[key] - 1, -owner[key], owner[key] * 2, *INTEGERS))
    else:
        owner[key] = random.choice(VALUES)
    return found


def _places(found: Any) -> list[tuple[Any, Any]]:
    level, places = [found], []
    while level:
        here = [(node, key) for node in level for key in (node if isinstance(node, dict) else range(len(node)))]
        places += here
        level = [owner[key] for owner, key in here if isinstance(owner[key], dict | list)]
    return places


def _twice(random: Random, found: Any) -> str:
    text = json.dumps(found, ensure_ascii=random.random() < 0.5)
    if random.random() < 0.05 and text.startswith('{"'):
        return text[0] + text[1:-1] + ("," + text[1:] if len(text) > 2 else "}")
    return text


def _yaml(random: Random, data: bytes, others: Sequence[bytes]) -> bytes | None:
    lines = data.split(b"\n")
    found = [number for number, line in enumerate(lines) if re.match(rb"[\w \-]+:", line)]
    if not found or b"{" in data[:1]:
        return None
    number = random.choice(found)
    key = lines[number].split(b":")[0]
    if random.random() < 0.15:
        lines.insert(number, lines[number])
    elif random.random() < 0.15:
        lines[number] = b"  " + lines[number]
    else:
        said = json.dumps(random.choice(VALUES)).encode()
        odd = random.choice((b"&a [*a]", b"!!int ''", b"2024-13-45", b".inf", b"0x_", b"|"))
        lines[number] = key + b": " + random.choice((said, odd))
    return b"\n".join(lines)


# Formats


def _safetensors(random: Random, data: bytes, others: Sequence[bytes]) -> bytes | None:
    if data[8:9] != b"{":
        return None
    length = struct.unpack("<Q", data[:8])[0]
    header = _json(random, data[8 : 8 + length], others) if length < MAX_BYTES else None
    return None if header is None else struct.pack("<Q", len(header)) + header + data[8 + length :]


def _zip(random: Random, data: bytes, others: Sequence[bytes]) -> bytes | None:
    if data[:2] != b"PK":
        return None
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info), info.compress_type) for info in archive.infolist()]
        number = random.choice([n for n, (name, _, _) in enumerate(members) if name.endswith((".pkl", ".npy"))] or [0])
        name, inside, how = members[number]
        if random.random() < 0.1:
            renamed = random.choice(("../" + name, name + "/", "", "a" * 300, name.swapcase(), "archive/data/7"))
            name = name if renamed in archive.namelist() else renamed
        inside = _npy(random, inside) or random.choice(_BYTES)(random, inside, [inside])
        members[number] = (name, inside, how)
        stream = BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name, inside, how in members:
                archive.writestr(zipfile.ZipInfo(name), inside, how)
        return stream.getvalue()
    except Exception:  # a hostile seed: its bytes are changed as they are
        return None


def _npy(random: Random, data: bytes) -> bytes | None:
    """A number in the header of an array, whose length is then put right."""
    if data[:6] != b"\x93NUMPY" or random.random() < 0.4:
        return None
    length = int.from_bytes(data[8:10], "little")
    header = _digits(random, data[10 : 10 + length], [])
    return data[:8] + len(header).to_bytes(2, "little") + header + data[10 + length :]
