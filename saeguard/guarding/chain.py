"""One line of an audit log: a record in canonical JSON, chained to the line before it and sealed with the key.

    line n  =  canonical JSON {v, seq = n, prev, ts, the record's fields, mac}, in ASCII
    prev    =  SHA-256(line n-1), 64 zeros where n is 1
    mac     =  HMAC-SHA256(key, line n without its mac), where the log has a key

The hash makes every edit disagree with the lines behind it; the seal makes it disagree with itself, so that nobody
without the key can write the rest of the chain anew. What neither shows is that lines are missing at the end: who
knows a `Head` of later than that sees it.
"""

import hmac
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from saeguard import strict_json
from saeguard.errors import AuditTampered, BadRecord
from saeguard.guarding.keys import AuditKey
from saeguard.guarding.records import DIGEST, AuditRecord

VERSION = 1
HEAD_BYTES = 128
MAX_LINE = 64 << 10
"""Bytes of a line, its end included; no record that is valid can be longer."""
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)
RESTORE = "Keep the file as evidence, and start a new log under another name."


@dataclass(frozen=True)
class Head:
    """The end of a chain: how many lines it has and the SHA-256 of the last."""

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> "Head":
        """What `str` wrote. Raises `BadRecord`."""
        seq, colon, digest = text.strip().partition(":")
        if not colon or not re.fullmatch(r"[0-9]{1,16}", seq) or not DIGEST.fullmatch(digest):
            raise BadRecord("the head of an audit log", "it is not NUMBER:SHA256", "Give it as audit verify shows it.")
        return cls(int(seq), digest)

    @classmethod
    def load(cls, path: str | Path) -> "Head":
        """The head in a file. Raises `BadRecord` when it holds anything else, and OSError when it cannot be read."""
        with Path(path).open("rb") as file:
            return cls.parse(file.read(HEAD_BYTES).decode("ascii", "replace"))


START = Head(0, "0" * 64)


@dataclass(frozen=True)
class Entry:
    """A line that verified: its number, its time in UTC, and the record."""

    seq: int
    ts: str
    record: AuditRecord


def now() -> str:
    """The time as a line gives it, in UTC and microseconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def seal(record: AuditRecord, head: Head, *, ts: str, key: AuditKey | None) -> tuple[bytes, Head]:
    """The line behind ``head``, its end included, and the new head."""
    content = {"v": VERSION, "seq": head.seq + 1, "prev": head.hash, "ts": ts, **record.to_dict()}
    if key is not None:
        content["mac"] = _mac(content, key)
    line = _canonical(content)
    return line + b"\n", _after(line, head)


def unseal(line: bytes, head: Head, *, key: AuditKey | None) -> tuple[Entry, Head]:
    """The entry of a line, without its end, that stands behind ``head``, and the new head.

    Without a key seals are not looked at. Raises `AuditTampered`.
    """
    content = _parse(line, head)
    v, seq, prev, ts, mac = (content.pop(name, None) for name in ("v", "seq", "prev", "ts", "mac"))
    if type(v) is not int or v != VERSION:
        raise tampered(head, f"it is not of version {VERSION}")
    if type(seq) is not int or seq != head.seq + 1:
        raise tampered(head, f"its number is not {head.seq + 1}")
    if prev != head.hash:
        raise tampered(head, "its prev is not the hash of the line before it")
    if not isinstance(ts, str) or not TIME.fullmatch(ts):
        raise tampered(head, "its time is not one")
    try:
        record = AuditRecord.from_dict(content)
    except BadRecord as error:
        raise tampered(head, f"{error.asked}: {error.found}") from error
    content |= {"v": v, "seq": seq, "prev": prev, "ts": ts, **record.to_dict()}
    _check_seal(line, content, mac, head, key)
    return Entry(seq, ts, record), _after(line, head)


def is_sealed(line: bytes) -> bool:
    """Whether a line that verified has a seal."""
    return b'"mac":' in line


def tampered(head: Head, found: str) -> AuditTampered:
    """The error for the line behind ``head``."""
    return AuditTampered(f"line {head.seq + 1} of an audit log", found, RESTORE)


def _parse(line: bytes, head: Head) -> dict[str, Any]:
    try:
        content = strict_json.parse(line)
    except ValueError as error:
        raise tampered(head, "it is not JSON") from error
    if not isinstance(content, dict):
        raise tampered(head, "it is not a JSON object")
    return content


def _check_seal(line: bytes, content: dict[str, Any], mac: Any, head: Head, key: AuditKey | None) -> None:
    """Refuse a line in another spelling than `seal` gives it, for one record has one line, and a wrong seal."""
    if mac is not None and not (isinstance(mac, str) and DIGEST.fullmatch(mac)):
        raise tampered(head, "its seal is not 64 hexadecimal digits")
    if _canonical(content if mac is None else {**content, "mac": mac}) != line:
        raise tampered(head, "it is not in canonical form")
    if key is None:
        return
    if mac is None:
        raise tampered(head, "it has no seal")
    if not hmac.compare_digest(mac, _mac(content, key)):
        raise tampered(head, "its seal is not that of this key")


def _mac(content: dict[str, Any], key: AuditKey) -> str:
    return key.mac("audit line", _canonical(content))


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _after(line: bytes, head: Head) -> Head:
    return Head(head.seq + 1, sha256(line).hexdigest())
