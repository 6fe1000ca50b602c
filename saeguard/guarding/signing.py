"""Who made a policy: Ed25519 signatures, and the keys that make and check them.

    message = "saeguard policy v1" | 0x00 | canonical text of the policy        (Ed25519 is RFC 8032)

The words in front keep uses apart: what was signed as a policy is worth nothing anywhere else. Which keys are trusted
is said by who loads a policy, never by its file, so a file from which the signature was stripped gains nothing.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from saeguard.errors import BadSignature, BadSigningKey, MissingExtra

ALGORITHM = "ed25519"
PURPOSE = b"saeguard policy v1\0"
PRIVATE, PUBLIC = "saeguard-ed25519-private:", "saeguard-ed25519-public:"
"""What key files begin with, so that none can be taken for the other."""
MAX_KEY_BYTES = 256
OTHERS_MAY_READ = 0o077
_HEX_KEY = re.compile(r"[0-9a-f]{64}")
_HEX_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_MAKE_ONE = "Make one with: saeguard policy keygen FILE."


@dataclass(frozen=True)
class Signature:
    """``value`` by the public key ``signer``, both in lower-case hexadecimal. Raises `BadSignature`."""

    signer: str
    value: str
    algorithm: str = ALGORITHM

    def __post_init__(self):
        if self.algorithm != ALGORITHM:
            raise _bad(f"its algorithm is not {ALGORITHM}", "There is no other; sign it again.")
        if not _is(_HEX_KEY, self.signer) or not _is(_HEX_SIGNATURE, self.value):
            raise _bad("signer and value are not 64 and 128 hexadecimal digits", "Sign the policy again.")

    def to_dict(self) -> dict[str, str]:
        """The fields as they stand in a file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: Any) -> "Signature":
        """Read what `to_dict` wrote. Raises `BadSignature`."""
        if not isinstance(entry, dict) or set(entry) != {"algorithm", "signer", "value"}:
            raise _bad("it is no object of algorithm, signer and value", "Sign the policy again.")
        return cls(**entry)


@dataclass(frozen=True)
class PublicKey:
    """What anybody may know: 32 bytes in lower-case hexadecimal. Raises `BadSigningKey`."""

    hex: str

    def __post_init__(self):
        if not _is(_HEX_KEY, self.hex):
            raise BadSigningKey("a public key", "it is not 64 lower-case hexadecimal digits", _MAKE_ONE)

    def __str__(self) -> str:
        return self.hex

    @classmethod
    def from_file(cls, path: str | Path) -> "PublicKey":
        """The key that `save` wrote. Raises `BadSigningKey`, also for a private key."""
        digits = _read(path, PUBLIC, "public", owner_only=False)
        return cls(digits.decode())

    def save(self, path: str | Path) -> None:
        """Write a new file. Raises `BadSigningKey` when there is one already."""
        with _new_file(path, 0o644) as file:
            file.write(f"{PUBLIC}{self.hex}\n".encode())

    def verifies(self, text: str, signature: Signature) -> bool:
        """Whether ``signature`` is this key's, of the policy whose canonical text this is. Raises `MissingExtra`."""
        ed25519, wrong = _ed25519()
        if signature.signer != self.hex:
            return False
        try:
            key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.hex))
            key.verify(bytes.fromhex(signature.value), _message(text))
        except (wrong, ValueError):
            return False
        return True


class SigningKey:
    """A private key, which no repr, pickle or traceback shows. Raises `MissingExtra` without cryptography."""

    __slots__ = ("_key",)

    def __init__(self, key: Any):
        self._key = key

    @classmethod
    def generate(cls) -> "SigningKey":
        """A new one, of the system's randomness."""
        ed25519, _ = _ed25519()
        return cls(ed25519.Ed25519PrivateKey.generate())

    @classmethod
    def from_file(cls, path: str | Path) -> "SigningKey":
        """The key that `save` wrote, in a file that its owner alone may read. Raises `BadSigningKey`."""
        ed25519, _ = _ed25519()
        digits = _read(path, PRIVATE, "private", owner_only=True)
        return cls(ed25519.Ed25519PrivateKey.from_private_bytes(bytes.fromhex(digits.decode())))

    def save(self, path: str | Path) -> None:
        """Write a new file of mode 0600. Raises `BadSigningKey` when there is one already."""
        with _new_file(path, 0o600) as file:
            file.write(f"{PRIVATE}{self._key.private_bytes_raw().hex()}\n".encode())

    @property
    def public(self) -> PublicKey:
        """The key by which others check what this one signs."""
        return PublicKey(self._key.public_key().public_bytes_raw().hex())

    def sign(self, text: str) -> Signature:
        """Sign the canonical text of a policy; one text has one signature."""
        return Signature(self.public.hex, self._key.sign(_message(text)).hex())

    def __repr__(self) -> str:
        return "SigningKey(hidden)"

    def __reduce__(self) -> Any:
        raise BadSigningKey("a copy of a private key", "keys are not pickled", "Read it where it is needed.")


def make_keys(path: str | Path) -> tuple[PublicKey, Path]:
    """Write a new private key to ``path`` and its public key beside it, as ``path`` with .pub behind it.

    Returns the public key and its file. Raises `BadSigningKey` when there is one of the files already.
    """
    private, place = Path(path), Path(f"{path}.pub")
    if place.exists():
        raise _exists(place)
    key = SigningKey.generate()
    key.save(private)
    key.public.save(place)
    return key.public, place


def demand(text: str, signature: Signature | None, signed_by: Sequence[PublicKey]) -> None:
    """Raise `BadSignature` unless one of the trusted keys has signed the policy of this canonical text.

    No key trusted means that nothing passes. Raises `BadSigningKey` for what is no `PublicKey`, and `MissingExtra`
    without cryptography.
    """
    if not isinstance(signed_by, list | tuple) or not all(isinstance(key, PublicKey) for key in signed_by):
        raise BadSigningKey("who may sign a policy", "that is no list of PublicKey", "Use [PublicKey.from_file(...)].")
    trusted = ", ".join(f"{key.hex[:16]}..." for key in signed_by) or "nobody"
    if signature is None:
        raise _bad(f"it has none, and has to be signed by {trusted}", "Have it signed: saeguard policy sign.")
    if signature.signer not in {key.hex for key in signed_by}:
        found = f"it is by {signature.signer[:16]}..., and {trusted} is trusted"
        raise _bad(found, "Have it signed by a key that is trusted, or trust this one if you know whose it is.")
    if not any(key.verifies(text, signature) for key in signed_by):
        raise _bad("the policy is not what was signed", "Restore the file that its signer published.")


def _message(text: str) -> bytes:
    return PURPOSE + text.encode()


def _read(path: str | Path, begin: str, kind: str, *, owner_only: bool) -> bytes:
    """The 64 hexadecimal digits of a key file. What was read is never in a frame that raises."""
    asked = f"the {kind} key in {path}"
    try:
        with Path(path).open("rb") as file:
            if owner_only and os.fstat(file.fileno()).st_mode & OTHERS_MAY_READ:
                found = "others than its owner may read or write it"
                raise BadSigningKey(asked, found, f"Set its mode: chmod 600 {path}. If it was read, make a new one.")
            digits = _digits(file, begin)
    except OSError as error:
        raise BadSigningKey(asked, f"it cannot be read ({error.strerror})", _MAKE_ONE) from error
    if digits is None:
        raise BadSigningKey(asked, f"it is not {begin}<64 hexadecimal digits>", _MAKE_ONE)
    return digits


def _digits(file: Any, begin: str) -> bytes | None:
    match = re.fullmatch(begin.encode() + rb"([0-9a-f]{64})\r?\n?", file.read(MAX_KEY_BYTES))
    return None if match is None else match[1]


@contextmanager
def _new_file(path: str | Path, mode: int) -> Iterator[BinaryIO]:
    """A file that was not there before, and is not there after a failure."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    except FileExistsError as error:
        raise _exists(path) from error
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise


def _exists(path: str | Path) -> BadSigningKey:
    return BadSigningKey(f"a new key in {path}", "there is a file already", "Give another name; keys are not replaced.")


def _ed25519() -> tuple[Any, type[Exception]]:
    """The module that signs, and what it raises for a wrong signature."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise MissingExtra(
            "the signature of a policy",
            f"signatures need cryptography, which cannot be imported here ({error})",
            "Run pip install 'saeguard[serve]'.",
        ) from error
    return ed25519, InvalidSignature


def _is(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _bad(found: str, proceed: str) -> BadSignature:
    return BadSignature("the signature of a policy", found, proceed)
