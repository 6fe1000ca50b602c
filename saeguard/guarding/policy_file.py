"""A policy's file: the canonical JSON of {policy, signature}, read with limits and written whole or not at all.

    {"policy": {...}, "signature": {"algorithm": "ed25519", "signer": HEX, "value": HEX}}

An unsigned file may be laid out by hand. A signed one has one spelling, keys sorted, without spaces, one line end: any
other bytes are refused, even where they would say the same.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeguard import plans, strict_json
from saeguard.errors import BadPolicyFile
from saeguard.guarding.signing import Signature

MAX_BYTES = 20_000_000
MAX_DEPTH = plans.MAX_DEPTH + 2
"""Levels: the policy stands in an object, and its plan in it."""
ROUNDED = "it holds a whole number beyond 2^53 that no double is equal to"
RESTORE = "Restore the file that its maker published."


@dataclass(frozen=True)
class Envelope:
    """The canonical text of what a file holds as its policy, which nobody has looked at yet, and its signature."""

    text: str
    signature: Signature | None


def canonical(document: Any) -> str:
    """The one spelling of a document: keys sorted, no spaces, ASCII. Raises ValueError for what is not finite."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse(text: str) -> Any:
    """JSON with limits: at most `MAX_BYTES`, `MAX_DEPTH` levels, no NaN, no key twice, no number that would be rounded.

    Raises `BadPolicyFile`.
    """
    if len(text) > MAX_BYTES:
        raise bad(f"it is larger than {MAX_BYTES:,} bytes", "Make its plan smaller.")
    try:
        document = strict_json.parse(text)
    except ValueError as error:
        raise bad(f"it is not JSON ({error})", RESTORE) from error
    if strict_json.depth(document) > MAX_DEPTH:
        raise bad(f"it nests deeper than {MAX_DEPTH} levels", "Combine fewer gates of gates.")
    if strict_json.rounded(document) is not None:
        raise bad(ROUNDED, "Write another number, or one with a fraction.")
    return document


def read(path: str | Path) -> Envelope:
    """What a file holds. Raises `BadPolicyFile`, `BadSignature` for one that has not the form of a signature, OSError.

    That a signature has the form of one proves nothing: see `saeguard.guarding.signing.demand`.
    """
    with Path(path).open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        document = parse(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise bad("it is not UTF-8", RESTORE) from error
    check_keys("a policy file", document, {"policy", "signature"}, {"policy"})
    signature = Signature.from_dict(document["signature"]) if "signature" in document else None
    try:
        text = canonical(document["policy"])
    except ValueError as error:
        raise bad(f"a number in it is not finite ({error})", RESTORE) from error
    if signature is not None and content != spelled(Envelope(text, signature)):
        raise bad("it is signed, and not spelled as signed files are", "Restore the file, or sign it again.")
    return Envelope(text, signature)


def write(path: str | Path, envelope: Envelope) -> None:
    """Put the file in place of what was there, which stays until all of it is on the disk. Raises OSError."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(spelled(envelope))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def spelled(envelope: Envelope) -> bytes:
    """The bytes of a file. ``envelope.text`` is canonical, and sorts before the signature."""
    signed = "" if envelope.signature is None else f',"signature":{canonical(envelope.signature.to_dict())}'
    return f'{{"policy":{envelope.text}{signed}}}\n'.encode()


def check_keys(what: str, entry: Any, allowed: set[str], required: set[str]) -> None:
    """Raise `BadPolicyFile` unless ``entry`` is an object with these keys."""
    if not isinstance(entry, dict):
        raise BadPolicyFile(what, "it is not a JSON object", "Write it with Policy.save.")
    unknown, missing = sorted(set(entry) - allowed), sorted(required - set(entry))
    if unknown or missing:
        found = f"unknown keys {unknown!r:.200}, missing keys {missing}"
        raise BadPolicyFile(what, found, f"Keys: {sorted(allowed)}.")


def bad(found: str, proceed: str) -> BadPolicyFile:
    """The error for a file that is no policy."""
    return BadPolicyFile("a policy file", found, proceed)
