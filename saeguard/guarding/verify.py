"""Whether an audit log is the chain that was written: read once, line by line, in little memory, over all its segments.

What is found without a key: every edit, deletion, swap or repetition that leaves the rest of the chain as it was, and
segments that are missing, cut, given twice, in another order or of another chain. What takes the key: a chain that
somebody wrote anew from an edit on. What takes a known head: lines missing at the end.
"""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from saeguard.errors import AuditTampered, AuditUnavailable
from saeguard.guarding.chain import START, Entry, Head, tampered
from saeguard.guarding.keys import AuditKey
from saeguard.guarding.locking import locked
from saeguard.guarding.segments import inode, segments_beside
from saeguard.guarding.walking import Walk

TELL_EVERY = 20_000
MOST_TRIES = 100
Progress = Callable[[int, int], None]
"""Bytes that were read, bytes there are."""
Files = str | Path | Sequence[str | Path]
"""A log, whose segments are looked for beside it; or all files of one, in their order."""


@dataclass(frozen=True)
class Verification:
    """What a log turned out to be; ``head`` is that of its last good line, ``seals`` whether its lines have any.

    ``records`` stand, those at the seams of segments among them. ``bad_line`` is the number of a line in the chain,
    ``bad_file`` the file that it was expected in.
    """

    records: int
    head: Head
    bad_line: int | None
    why: str | None
    torn_bytes: int
    """Bytes of an unfinished last line, whose writer died; the lines before it stand."""
    seals: bool
    keyed: bool
    """Whether the seals were checked."""
    files: int = 1
    """How many were read, the one with the bad line among them."""
    bad_file: str | None = None
    ended: bool = False
    """Whether the last line says that the log goes on in another file, which is not there, or not yet."""

    @property
    def ok(self) -> bool:
        """Whether every byte of the files belongs to a line that stands."""
        return self.bad_line is None and not self.torn_bytes


def verify(
    path: Files,
    *,
    key: AuditKey | None = None,
    head: Head | None = None,
    behind: Head = START,
    progress: Progress | None = None,
) -> Verification:
    """Read a log to its first bad line, or to its end: one with the segments beside it, or the files that are given.

    ``head`` is the end of the chain as it was known at some time: that line has to be there. ``behind`` is the last
    line of what is no longer kept: the first file has to continue it. Raises `AuditUnavailable` when there is no such
    file.
    """
    with opened_all(path) as files:
        return _judged(Chain(files, key=key, known=head, behind=behind), progress)


def judge(
    file: BinaryIO,
    size: int,
    *,
    key: AuditKey | None = None,
    head: Head | None = None,
    progress: Progress | None = None,
) -> Verification:
    """The same for the first ``size`` bytes of a file that is open."""
    return _judged(Chain([Part(None, file, size)], key=key, known=head), progress)


def read(
    path: Files, *, key: AuditKey | None = None, head: Head | None = None, behind: Head = START
) -> Iterator[Entry]:
    """The entries of a log, each verified before it is given. Raises `AuditTampered` at the first that is not."""
    with opened_all(path) as files:
        yield from Chain(files, key=key, known=head, behind=behind)


@dataclass(frozen=True, eq=False)
class Part:
    """The first ``size`` bytes of one file of a log; ``file`` is None until it is opened."""

    path: Path | None
    file: BinaryIO | None
    size: int

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file, to read. Raises `AuditUnavailable`."""
        if self.file is not None:
            yield self.file
            return
        assert self.path is not None
        with opened(self.path) as (file, _):
            yield file


class Chain:
    """One pass over the files of a log, of which each continues the one before it.

    Iterating gives entries and raises `AuditTampered` at the first bad line; `head` and `number` then say how far it
    came.
    """

    def __init__(
        self, parts: Sequence[Part], *, key: AuditKey | None = None, known: Head | None = None, behind: Head = START
    ):
        self.parts = parts
        self.begun = self.head = behind
        self.number = 0
        """Of the file that is read."""
        self.torn_bytes, self.ended = 0, False
        self.seals: bool | None = None
        self.read_bytes = 0
        self._key, self._known = key, known

    def __iter__(self) -> Iterator[Entry]:
        if self._known is not None and self._known.seq < self.begun.seq:
            found = f"line {self._known.seq} is known, and the files begin behind line {self.begun.seq}"
            raise tampered(self.head, found)
        for number, part in enumerate(self.parts):
            self.number, is_last = number, number == len(self.parts) - 1
            with part.opened() as file:
                before = self.read_bytes
                walk = Walk(file, stop=part.size, head=self.head, key=self._key, known=self._known, seals=self.seals,
                            is_last=is_last)  # fmt: skip
                for entry in walk:
                    self.head, self.seals, self.read_bytes = walk.head, walk.seals, before + walk.offset
                    yield entry
            self.torn_bytes, self.ended = walk.torn_bytes, walk.ended

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(part.size for part in self.parts)


def _judged(chain: Chain, progress: Progress | None) -> Verification:
    bad_line, why, bad_file = None, None, None
    try:
        for entry in chain:
            if progress is not None and entry.seq % TELL_EVERY == 0:
                progress(chain.read_bytes, chain.bytes)
    except AuditTampered as error:
        bad_line, why = chain.head.seq + 1, error.found
        path = chain.parts[chain.number].path
        bad_file = None if path is None else str(path)
    return Verification(
        chain.head.seq - chain.begun.seq, chain.head, bad_line, why, chain.torn_bytes, bool(chain.seals),
        chain._key is not None, chain.number + 1, bad_file, chain.ended and bad_line is None,
    )  # fmt: skip


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[BinaryIO, int]]:
    """A log to read, and its size at a time when nobody was writing. Raises `AuditUnavailable`."""
    with _opened(path) as (file, size, _):
        yield file, size


@contextmanager
def opened_all(path: Files) -> Iterator[list[Part]]:
    """The files of a log in their order, as they were when nobody was writing. Raises `AuditUnavailable`."""
    if isinstance(path, str | Path):
        with _opened(path) as (file, size, beside):
            yield [*map(_part, beside), Part(Path(path), file, size)]
        return
    if not path:
        raise unavailable("", "no file is named")
    yield [_part(one) for one in path]


def _part(path: str | Path) -> Part:
    with opened(path) as (_, size):
        return Part(Path(path), None, size)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[BinaryIO, int, list[Path]]]:
    """A log, its size, and the segments beside it."""
    for _ in range(MOST_TRIES):
        with _open(path) as file:
            try:
                found = _look(Path(path), file)
                if found is None:  # rotated since it was opened
                    continue
                yield file, *found
                return
            except OSError as error:
                raise unavailable(path, f"it cannot be read ({error.strerror})") from error
    raise unavailable(path, "another file stands in its place all the time")


def _open(path: str | Path) -> BinaryIO:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not make us wait for its writer
    except (OSError, ValueError) as error:
        raise unavailable(path, f"it cannot be opened ({getattr(error, 'strerror', error)})") from error
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    raise unavailable(path, "it is not a regular file")


def _look(path: Path, file: BinaryIO) -> tuple[int, list[Path]] | None:
    """The size of a log and the segments beside it, when nobody writes; None where the path names another file."""
    with locked(file.fileno(), shared=True):
        status = os.fstat(file.fileno())
        if inode(os.stat(path)) != inode(status):
            return None
        return status.st_size, [segment for _, segment in segments_beside(path, but=inode(status))]


def unavailable(path: str | Path, found: str) -> AuditUnavailable:
    """The error for a file that cannot be used as a log."""
    return AuditUnavailable(f"the audit log {os.fspath(path)!r}", found, "Name a file of the log's own.")
