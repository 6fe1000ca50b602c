"""Whether an audit log is the chain that was written: read once, line by line, in little memory.

What is found without a key: every edit, deletion, swap or repetition that leaves the rest of the chain as it was.
What takes the key: a chain that somebody wrote anew from an edit on. What takes a known head: lines missing at the end.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from saeguard.errors import AuditTampered, AuditUnavailable
from saeguard.guarding.chain import MAX_LINE, START, Entry, Head, is_sealed, tampered, unseal
from saeguard.guarding.keys import AuditKey
from saeguard.guarding.locking import locked

BEGINNING = b'{"decision":"'
"""How every line begins: what is left of a writer that died begins like that too."""
TELL_EVERY = 20_000
Progress = Callable[[int, int], None]
"""Bytes that were read, bytes there are."""


@dataclass(frozen=True)
class Verification:
    """What a log turned out to be; ``head`` is that of its last good line, ``seals`` whether its lines have any."""

    records: int
    head: Head
    bad_line: int | None
    why: str | None
    torn_bytes: int
    """Bytes of an unfinished last line, whose writer died; the lines before it stand."""
    seals: bool
    keyed: bool
    """Whether the seals were checked."""

    @property
    def ok(self) -> bool:
        """Whether every byte of the file belongs to a line that stands."""
        return self.bad_line is None and not self.torn_bytes


def verify(
    path: str | Path, *, key: AuditKey | None = None, head: Head | None = None, progress: Progress | None = None
) -> Verification:
    """Read a log to its first bad line, or to its end.

    ``head`` is the end of the chain as it was known at some time: that line has to be there. Raises
    `AuditUnavailable` when there is no such file.
    """
    with opened(path) as (file, size):
        return judge(file, size, key=key, head=head, progress=progress)


def judge(
    file: BinaryIO,
    size: int,
    *,
    key: AuditKey | None = None,
    head: Head | None = None,
    progress: Progress | None = None,
) -> Verification:
    """The same for the first ``size`` bytes of a file that is open."""
    walk, bad_line, why = Walk(file, stop=size, key=key, known=head), None, None
    try:
        for entry in walk:
            if progress is not None and entry.seq % TELL_EVERY == 0:
                progress(walk.offset, size)
    except AuditTampered as error:
        bad_line, why = walk.head.seq + 1, error.found
    return Verification(walk.head.seq, walk.head, bad_line, why, walk.torn_bytes, bool(walk.seals), key is not None)


def read(path: str | Path, *, key: AuditKey | None = None, head: Head | None = None) -> Iterator[Entry]:
    """The entries of a log, each verified before it is given. Raises `AuditTampered` at the first that is not."""
    with opened(path) as (file, size):
        yield from Walk(file, stop=size, key=key, known=head)


class Walk:
    """One pass over the lines behind ``head``, which end at byte ``offset``, to byte ``stop``.

    Iterating gives entries and raises `AuditTampered` at the first bad line; `head`, `offset`, `seals` and
    `torn_bytes` then say how far it came.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        stop: int,
        head: Head = START,
        offset: int = 0,
        key: AuditKey | None = None,
        known: Head | None = None,
    ):
        self.head, self.offset = head, offset
        self.torn_bytes = 0
        self.seals: bool | None = None
        self._file, self._stop, self._key, self._known = file, stop, key, known

    def __iter__(self) -> Iterator[Entry]:
        self._file.seek(self.offset)
        while self.offset < self._stop:
            line = self._file.readline(min(MAX_LINE, self._stop - self.offset))
            if not line.endswith(b"\n"):
                self._check_unfinished(line)
                self.torn_bytes = len(line)
                break
            entry, head = unseal(line[:-1], self.head, key=self._key)
            self._check_kin(line, head)
            self.head, self.offset = head, self.offset + len(line)
            yield entry
        if self._known is not None and self._known.seq > self.head.seq:
            raise tampered(self.head, f"the log ends before it, and line {self._known.seq} is known to have been there")

    def _check_unfinished(self, line: bytes) -> None:
        """Refuse an end without a line's end that no writer of this log left behind."""
        if self.offset + len(line) < self._stop:
            raise tampered(self.head, f"it is longer than {MAX_LINE} bytes" if line else "the file is being shortened")
        begins = line.startswith(BEGINNING) or BEGINNING.startswith(line)
        if len(line) >= MAX_LINE or not begins or not all(32 <= byte < 127 for byte in line):
            raise tampered(self.head, "it is not the beginning of a record")

    def _check_kin(self, line: bytes, head: Head) -> None:
        """Refuse a line that differs from its neighbours in having a seal, or is not the one that is known."""
        if self.seals is not None and self.seals != is_sealed(line):
            raise tampered(self.head, f"it has {'no' if self.seals else 'a'} seal, unlike the line before it")
        self.seals = is_sealed(line)
        if self._known is not None and self._known.seq == head.seq and self._known != head:
            raise tampered(self.head, "its hash is not the one that is known")


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[BinaryIO, int]]:
    """A log to read, and its size at a time when nobody was writing. Raises `AuditUnavailable`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not make us wait for its writer
    except (OSError, ValueError) as error:
        raise unavailable(path, f"it cannot be opened ({getattr(error, 'strerror', error)})") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise unavailable(path, "it is not a regular file")
    try:
        with os.fdopen(fd, "rb") as file:
            with locked(fd, shared=True):
                size = os.fstat(fd).st_size
            yield file, size
    except OSError as error:
        raise unavailable(path, f"it cannot be read ({error.strerror})") from error


def unavailable(path: str | Path, found: str) -> AuditUnavailable:
    """The error for a file that cannot be used as a log."""
    return AuditUnavailable(f"the audit log {os.fspath(path)!r}", found, "Name a file of the log's own.")
