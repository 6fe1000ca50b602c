"""A deployment's secret key: from a file or the environment, never shown, and used only through HMAC-SHA256.

    mac = HMAC-SHA256(key, purpose | 0x00 | message)

A bare hash of a short prompt can be guessed by hashing guesses; an HMAC can be by nobody without the key. The purpose
keeps uses apart: what stands for a prompt is worth nothing as the seal of a log's line.
"""

import hmac
import os
import struct
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from saeguard.errors import BadAuditKey, BadRecord

MIN_BYTES = 16
MAX_BYTES = 4096
OTHERS_MAY_READ = 0o077


class AuditKey:
    """At least `MIN_BYTES` secret bytes, which no repr, pickle or traceback shows. Raises `BadAuditKey`."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes):
        if not isinstance(secret, bytes | bytearray):
            raise BadAuditKey("an audit key", f"it is {type(secret).__name__}, not bytes", _WAY_OUT)
        secret = _Hidden(secret)  # from here on also a traceback with its locals shows no byte of it
        if not MIN_BYTES <= len(secret) <= MAX_BYTES:
            found = f"it has {len(secret)} bytes, and {MIN_BYTES} to {MAX_BYTES} are wanted"
            raise BadAuditKey("an audit key", found, _WAY_OUT)
        self._secret = secret

    @classmethod
    def from_file(cls, path: str | Path) -> "AuditKey":
        """The bytes of a file that its owner alone may read, without line ends behind them. Raises `BadAuditKey`."""
        try:
            with Path(path).open("rb") as file:
                if os.fstat(file.fileno()).st_mode & OTHERS_MAY_READ:
                    found = "others than its owner may read or write it"
                    raise BadAuditKey(f"the audit key in {path}", found, f"Set its mode: chmod 600 {path}.")
                return cls(_Hidden(file.read(MAX_BYTES + 3).rstrip(b"\r\n")))
        except OSError as error:
            found = f"it cannot be read ({error.strerror})"
            raise BadAuditKey(f"the audit key in {path}", found, _WAY_OUT) from error

    @classmethod
    def from_environment(cls, variable: str) -> "AuditKey":
        """The bytes of an environment variable, without line ends behind them. Raises `BadAuditKey`."""
        if variable not in os.environ:
            raise BadAuditKey(f"the audit key in the variable {variable}", "the variable is not set", _WAY_OUT)
        return cls(_Hidden(os.fsencode(os.environ[variable]).rstrip(b"\r\n")))

    def mac(self, purpose: str, message: bytes) -> str:
        """HMAC-SHA256 of the message for one purpose, as 64 hexadecimal digits."""
        return hmac.new(self._secret, purpose.encode() + b"\0" + message, sha256).hexdigest()

    def of_tokens(self, ids: Iterable[int]) -> str:
        """What stands for a prompt in its record: HMAC of the token ids, 8 bytes each. Raises `BadRecord`."""
        try:
            return self.mac("prompt", b"".join(struct.pack("<q", i) for i in ids))
        except (struct.error, TypeError) as error:
            raise BadRecord("the HMAC of a prompt", "a token id is no integer of 64 bits", "Give token ids.") from error

    def of_text(self, text: str, *, purpose: str) -> str:
        """What stands for a text that may not be written, such as a tenant's name; any string, surrogates included."""
        return self.mac(f"text.{purpose}", text.encode("utf-8", "surrogatepass"))

    def __repr__(self) -> str:
        return "AuditKey(hidden)"

    def __reduce__(self) -> str:
        raise BadAuditKey("a copy of an audit key on file", "keys are not pickled", "Read it where it is needed.")


class _Hidden(bytes):
    """Bytes that do not show themselves."""

    def __repr__(self) -> str:
        return "hidden"

    __str__ = __repr__


_WAY_OUT = f"Write {MIN_BYTES} random bytes or more into a file of mode 600, such as by: openssl rand -hex 32."
