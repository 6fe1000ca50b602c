"""One pass over one file of an audit log, line by line, each checked against the one before it."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from saeguard.errors import AuditTampered
from saeguard.guarding.chain import MAX_LINE, RESTORE, START, Entry, Head, is_sealed, tampered, unseal
from saeguard.guarding.keys import AuditKey
from saeguard.guarding.segments import CONTINUED, ROTATED, misplaced, stands_behind

BEGINNING = b'{"decision":"'
"""How every line begins: what is left of a writer that died begins like that too."""


class Walk:
    """One pass over the lines behind ``head``, which end at byte ``offset``, to byte ``stop``.

    A file that continues a segment has to continue ``head``; None takes whatever it says. Another file has to follow
    one that is not the last: it has to end with "log.rotated". Iterating gives entries and raises `AuditTampered` at
    the first bad line; `head`, `offset`, `seals`, `ended` and `torn_bytes` then say how far it came, `behind` what the
    file continues.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        stop: int,
        head: Head | None = START,
        offset: int = 0,
        key: AuditKey | None = None,
        known: Head | None = None,
        seals: bool | None = None,
        ended: bool = False,
        is_last: bool = True,
    ):
        self.behind = head if head is not None else START
        self.head, self.offset = self.behind, offset
        self.torn_bytes = 0
        self.seals, self.ended = seals, ended
        self.saw_known = False
        """Whether the line that is known was there."""
        self._file, self._stop, self._key, self._known = file, stop, key, known
        self._takes_any, self._is_last = head is None, is_last

    def __iter__(self) -> Iterator[Entry]:
        self._file.seek(self.offset)
        if not self.offset and not self._stop and self.head != START:
            raise tampered(self.head, "its file is empty, and should continue the line before it")
        while self.offset < self._stop:
            line = self._file.readline(min(MAX_LINE, self._stop - self.offset))
            if self.ended:
                raise tampered(self.head, "it stands behind the record that ends its segment")
            if not line.endswith(b"\n"):
                self._check_unfinished(line)
                self.torn_bytes = len(line)
                break
            if not self.offset:
                self._begin(line)
            entry, head = unseal(line[:-1], self.head, key=self._key)
            self._check_kin(line, head)
            self._check_seam(entry)
            self.head, self.offset = head, self.offset + len(line)
            yield entry
        self._check_end()

    def _begin(self, line: bytes) -> None:
        """Refuse a first line that continues anything else than the head."""
        said = stands_behind(line)
        if not self._takes_any and said != self.head:
            raise tampered(self.head, misplaced(said, self.head))
        self.behind = self.head = said
        self._compare(said, self.head)

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
        self._compare(head, self.head)

    def _compare(self, head: Head, before: Head) -> None:
        if self._known is None or self._known.seq != head.seq:
            return
        if self._known != head:
            raise tampered(before, "its hash is not the one that is known")
        self.saw_known = True

    def _check_seam(self, entry: Entry) -> None:
        """Refuse a file that continues another without saying so as logs do, and a seam inside of one."""
        if (entry.record == CONTINUED) != (not self.offset and self.head != START):
            raise tampered(self.head, "segments are continued by the first record of a file, and by no other")
        self.ended = entry.record == ROTATED

    def _check_end(self) -> None:
        if not self._is_last and not self.ended:
            raise tampered(self.head, "its segment ends before the record that ends one")
        if self._is_last and self._known is not None and self._known.seq > self.head.seq:
            raise tampered(self.head, f"the log ends before it, and line {self._known.seq} is known to have been there")


def _opened(segment: Path) -> BinaryIO:
    """A segment to read. Raises OSError, and `AuditTampered` for what is no file: a pipe would make us wait."""
    fd = os.open(segment, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    raise AuditTampered(f"the segment {str(segment)!r}", "it is not a regular file", RESTORE)


def head_behind(
    segments: Sequence[Path], *, head: Head | None, offset: int = 0, ended: bool = False, key: AuditKey | None = None,
    known: Head | None = None,
) -> Head:  # fmt: skip
    """The head behind the last of these segments, each read to its end, the first from ``head`` and ``offset`` on.

    Raises OSError, and `AuditTampered`, also where ``known`` is not among the lines.
    """
    saw_known = False
    for segment in segments:
        with _opened(segment) as file:
            size = os.fstat(file.fileno()).st_size
            walk = Walk(file, stop=size, head=head, offset=offset, key=key, known=known, ended=ended, is_last=False)
            for _ in walk:
                pass
        head, offset, ended, saw_known = walk.head, 0, False, saw_known or walk.saw_known
    if head is None or (known is not None and not saw_known):
        raise AuditTampered("the segments of an audit log", "a line that is known is in none of them", RESTORE)
    return head
