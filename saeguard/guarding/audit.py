"""The audit log: one line per request, on the disk before its request's last byte goes out.

    log = AuditLog("audit.jsonl", key=AuditKey.from_file("audit.key"))
    head = log.write(AuditRecord(...))      when this returns, the record stands; when it raises, refuse the request

A write opens the file, locks it, checks whatever others have written since, puts one line behind it with one call of
the system, and waits until it is on the disk. Nothing stays open in between: threads, processes and forks share a log
through its file alone, and one that was deleted, replaced or shortened is noticed at the next write.

A writer that is killed leaves an unfinished last line, whose request was never answered. Whoever comes next puts the
record "log.recovered" in its place, which counts the bytes. Every other fault is refused by name.

A log that has grown is rotated, by `rotate` or at ``most_bytes``, and by nothing else: the file is closed by a last
record and named as a segment, and the next one continues its chain (see `saeguard.guarding.segments`). At every
moment of that some file has the log's name; what a killed rotation left to do is done by whoever writes next. The
folder has to be one in which a file can have two names (hard links), or the log is not rotated.
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from saeguard.errors import AuditFailed, AuditTampered, AuditUnavailable, BadAuditKey, BadRecord, BadRule
from saeguard.guarding.chain import RESTORE, START, Head, now, seal
from saeguard.guarding.keys import AuditKey
from saeguard.guarding.locking import locked
from saeguard.guarding.records import AuditRecord
from saeguard.guarding.segments import CONTINUED, ROTATED, SEAMS, Inode, inode, segment_name, segments_beside
from saeguard.guarding.verify import unavailable
from saeguard.guarding.walking import Walk, head_behind

FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
OTHERS_MAY_WRITE = 0o022
REOPEN = "Refuse the request, mend the cause, and open the log anew."
LEAST_BYTES = 4096
NOT_MOVED = (
    "Put it back. Logs are rotated by saeguard audit rotate, their segments stay until all writers have written, and "
    "no other file beside a log has its name with 12 to 16 digits behind it."
)


class AuditLog:
    """A log at ``path``, made with mode 0600 where there is none, and verified from its first line where there is.

    With a ``key`` every line is sealed. ``head_file``, best on another machine's or user's disk, always holds the
    head of the log, so that lines missing at the end are noticed. Without ``fsync`` a record survives the death of
    the process, and not that of the machine. A lock is waited for ``lock_seconds``. The file is rotated before it
    would have more than ``most_bytes``, unless it holds a single record. Earlier segments are not read.

    Raises `AuditUnavailable` when nothing can be written there, `AuditTampered` when what is there does not verify,
    `BadAuditKey` when its lines are sealed and no key is given, `BadRecord` when the head file holds no head,
    `AuditFailed` when another process keeps the lock, `BadRule` when ``most_bytes`` is no count of 4,096 or more.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        key: AuditKey | None = None,
        head_file: str | Path | None = None,
        fsync: bool = True,
        lock_seconds: float = 10.0,
        most_bytes: int | None = None,
    ):
        if most_bytes is not None and (type(most_bytes) is not int or most_bytes < LEAST_BYTES):
            raise BadRule(f"most_bytes={most_bytes!r:.60}", "that is no size for a log", f"Give {LEAST_BYTES} or more.")
        self.path = Path(path).absolute()
        self.head = START
        """Number and hash of the last line, as far as this object has seen the log."""
        self._next = self.path.with_name(f"{self.path.name}.next")
        self._behind: Head | None = None
        """What the file continues."""
        self._offset, self._ended = 0, False
        self._key, self._fsync, self._lock_seconds, self._most_bytes = key, fsync, lock_seconds, most_bytes
        self._head_file = None if head_file is None else Path(head_file).absolute()
        self._inode: Inode | None = None
        self._failure: str | None = None
        try:
            with ExitStack() as held:
                fd = held.enter_context(self._held(os.O_CREAT))
                known = self._known_head(os.fstat(fd).st_size)
                self._catch_up(fd, known)
                self._check_segments(fd, known)
                with suppress(FileNotFoundError):
                    os.unlink(self._next)  # of a rotation that was killed
                if self._ended:
                    self._begin_next(fd, held)
                if self._fsync:
                    _sync_folder(self.path.parent)  # else a new file may be gone after a power failure
        except (OSError, ValueError) as error:
            raise unavailable(self.path, f"it cannot be written ({_cause(error)})") from error

    def write(self, record: AuditRecord) -> Head:
        """Put a record behind the log's last and return the new head, when the record is on the disk.

        Raises `BadRecord` when ``record`` is none, `AuditFailed` when it cannot be written, `AuditTampered` or
        `AuditUnavailable` when the file is no longer what it was. Each means that the record does not stand and its
        request must be refused. But for a bad record, and a lock that another process held for too long, so is every
        further write of this object.
        """
        if not isinstance(record, AuditRecord):
            raise BadRecord("an audit record", f"it is {type(record).__name__}", "Give an AuditRecord.")
        if record in SEAMS:
            raise BadRecord("an audit record", f"it says {record.reason_code}", "Call rotate, which says so itself.")
        with self._turn(f"a record of {record.request_id}") as (fd, held):
            if self._is_full(record):
                fd, _ = self._rotate(fd, held)
            self._append(fd, record)
            return self.head

    def rotate(self) -> Path | None:
        """Close the file with a last record, name it as a segment, and begin the next; the segment, when all is done.

        None for a log that holds no record since the last time. Raises as `write` does.
        """
        with self._turn("the rotation of a log") as (fd, held):
            return self._rotate(fd, held)[1] if self._n_records else None

    @property
    def _n_records(self) -> int:
        """Of the file, without the one that continues a segment."""
        behind = self._behind or START
        return self.head.seq - behind.seq - (behind != START)

    @contextmanager
    def _turn(self, what: str) -> Iterator[tuple[int, ExitStack]]:
        """The file, locked and read to its end, until ``held`` is closed; a fault here ends the use of this object."""
        if self._failure is not None:
            raise AuditFailed(what, f"the log failed before: {self._failure}", REOPEN)
        try:
            with ExitStack() as held:
                fd = held.enter_context(self._held())
                self._catch_up(fd)
                yield self._begin_next(fd, held) if self._ended else fd, held
        except OSError as error:
            self._failure = _cause(error)
            raise AuditFailed(what, f"it could not be written ({self._failure})", REOPEN) from error
        except (AuditTampered, AuditUnavailable, BadAuditKey) as error:
            self._failure = error.found
            raise

    @contextmanager
    def _held(self, create: int = 0) -> Iterator[int]:
        """The file, open and locked. Raises OSError, and an `AuditError` when it is not the one it was."""
        end = time.monotonic() + self._lock_seconds
        while True:
            fd = os.open(self.path, FLAGS | create, 0o600)
            try:
                with locked(fd, seconds=self._lock_seconds):
                    if inode(os.stat(self.path)) == inode(os.fstat(fd)):
                        self._check_file(fd)
                        yield fd
                        return
            finally:
                os.close(fd)
            if time.monotonic() > end:
                raise AuditFailed("a turn at the audit log", "other files stand in its place all the time", REOPEN)

    def _check_file(self, fd: int) -> None:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise unavailable(self.path, "it is not a regular file")
        if found.st_mode & OTHERS_MAY_WRITE:
            raise unavailable(self.path, "others than its owner may write it")
        self._inode = self._inode or inode(found)
        if self._inode != inode(found):
            self._follow(inode(found))

    def _follow(self, new: Inode) -> None:
        """Go on in the file that somebody else began, over all that was written since into what are segments now."""
        beside = [path for _, path in segments_beside(self.path, but=new)]
        mine = [number for number, path in enumerate(beside) if inode(os.lstat(path)) == self._inode]
        if not mine:
            raise AuditTampered(f"the audit log {str(self.path)!r}", "another file stands in its place", NOT_MOVED)
        head, first = self._behind if not self._offset else self.head, mine[0]
        self.head = head_behind(beside[first:], head=head, offset=self._offset, ended=self._ended, key=self._key)
        self._inode, self._behind, self._offset, self._ended = new, self.head, 0, False

    def _check_segments(self, fd: int, known: Head | None) -> None:
        """Refuse a file that is older than a segment beside it, and a head that is in none of them."""
        behind = self._behind or START
        beside = segments_beside(self.path, but=inode(os.fstat(fd)))
        if beside and beside[-1][0] > behind.seq:
            found = f"it continues line {behind.seq}, and {beside[-1][1].name} beside it ends with line {beside[-1][0]}"
            raise AuditTampered(f"the audit log {str(self.path)!r}", found, NOT_MOVED)
        if known is None or known.seq >= behind.seq:
            return
        since = [path for last, path in beside if last >= known.seq]
        if not since or head_behind(since, head=None, key=self._key, known=known) != behind:
            found = f"line {known.seq} is known, the log continues line {behind.seq}, and no segments lead there"
            raise AuditTampered(f"the audit log {str(self.path)!r}", found, "Put the segments beside it.")

    def _known_head(self, size: int) -> Head | None:
        """What the head file says. Raises `AuditTampered` when it is gone, `BadRecord` when it says something else."""
        if self._head_file is None:
            return None
        try:
            return Head.load(self._head_file)
        except FileNotFoundError as error:
            if not size:
                return None
            proceed = "Restore it, or write the head into it that `saeguard audit verify` shows."
            raise AuditTampered(
                f"the head file {str(self._head_file)!r}", "it is not there, and the log is not empty", proceed
            ) from error

    def _catch_up(self, fd: int, known: Head | None = None) -> None:
        """Verify what is in the file and was not seen before, and set aside what a dead writer left unfinished."""
        size = os.fstat(fd).st_size
        if size < self._offset:
            found = f"it had {self._offset} bytes and has {size}"
            raise AuditTampered(f"the audit log {str(self.path)!r}", found, RESTORE)
        if 0 < size == self._offset and known is None and self._behind is not None:
            return
        head = self.head if self._offset else self._behind
        with os.fdopen(fd, "rb", closefd=False) as file:
            walk = Walk(file, stop=size, head=head, offset=self._offset, key=self._key, known=known, ended=self._ended)
            for _ in walk:
                pass
        if walk.seals and self._key is None:
            raise BadAuditKey("the audit log's key", "its lines are sealed and there is no key", "Give key=.")
        if not self._offset:
            self._behind = walk.behind
        self.head, self._offset, self._ended = walk.head, walk.offset, walk.ended
        if walk.torn_bytes:
            self._recover(fd, walk.torn_bytes)

    def _is_full(self, record: AuditRecord) -> bool:
        """Whether the file would have too many bytes with this record and the one that ends it."""
        if self._most_bytes is None or not self._n_records:
            return False
        line, head = seal(record, self.head, ts=now(), key=self._key)
        last, _ = seal(ROTATED, head, ts=now(), key=self._key)
        return self._offset + len(line) + len(last) > self._most_bytes

    def _rotate(self, fd: int, held: ExitStack) -> tuple[int, Path]:
        """The file of the next record, and the segment of those before it."""
        self._check_links()
        self._append(fd, ROTATED)
        self._ended, segment = True, segment_name(self.path, self.head.seq)
        return self._begin_next(fd, held), segment

    def _check_links(self) -> None:
        """Raise OSError where a file cannot have two names, while the log is still as it was."""
        with suppress(FileNotFoundError):
            os.unlink(self._next)
        os.link(self.path, self._next)
        os.unlink(self._next)

    def _begin_next(self, fd: int, held: ExitStack) -> int:
        """Let another file with the record that continues this one take the log's name, and this one a segment's.

        Until then this one has both names. Both are locked until ``held`` is closed. Raises OSError.
        """
        partial, segment = self._next, segment_name(self.path, self.head.seq)
        line, head = seal(CONTINUED, self.head, ts=now(), key=self._key)
        with suppress(FileNotFoundError):
            os.unlink(partial)  # of a rotation that was killed
        there = os.open(partial, FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
        held.callback(os.close, there)
        held.enter_context(locked(there, seconds=self._lock_seconds))
        _put(there, line, fsync=self._fsync)
        with suppress(FileExistsError):
            os.link(self.path, segment)
        if inode(os.lstat(segment)) != inode(os.fstat(fd)):
            raise AuditTampered(f"the segment {str(segment)!r}", "another file has its name", RESTORE)
        os.replace(partial, self.path)
        if self._fsync:
            _sync_folder(self.path.parent)
        if self._head_file is not None:
            self._save_head(self._head_file, head)
        self._inode, self._behind, self._ended = inode(os.fstat(there)), self.head, False
        self.head, self._offset = head, len(line)
        return there

    def _append(self, fd: int, record: AuditRecord) -> None:
        line, head = seal(record, self.head, ts=now(), key=self._key)
        try:
            self._settle(fd, os.write(fd, line), line, head)
        except OSError:
            with suppress(OSError):  # what cannot be taken back is an unfinished line, or a record too many
                os.ftruncate(fd, self._offset)
            raise

    def _recover(self, fd: int, torn_bytes: int) -> None:
        """Write "log.recovered" over an unfinished line, so that at no time its loss goes uncounted."""
        line, head = seal(_recovered(torn_bytes), self.head, ts=now(), key=self._key)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_APPEND)
        os.ftruncate(fd, self._offset + min(torn_bytes, len(line) - 1))
        self._settle(fd, os.pwrite(fd, line, self._offset), line, head)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_APPEND)

    def _settle(self, fd: int, written: int, line: bytes, head: Head) -> None:
        """Wait until a line is on the disk; only then does it count. Raises OSError."""
        if written != len(line):
            raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes were written")
        if self._fsync:
            os.fsync(fd)
        if self._head_file is not None:
            self._save_head(self._head_file, head)
        self.head, self._offset = head, self._offset + len(line)

    def _save_head(self, target: Path, head: Head) -> None:
        partial = target.with_name(target.name + ".partial")
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            text = f"{head}\n".encode()
            if os.write(fd, text) != len(text):
                raise OSError(errno.ENOSPC, "the head file could not be written")
            if self._fsync:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(partial, target)


def _put(fd: int, line: bytes, *, fsync: bool) -> None:
    written = os.write(fd, line)
    if written != len(line):
        raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes were written")
    if fsync:
        os.fsync(fd)


def _recovered(lost_bytes: int) -> AuditRecord:
    return AuditRecord(
        request_id="log", decision="error", guard_status="not_run", reason_code="log.recovered",
        err="UnfinishedRecord", lost_bytes=lost_bytes,
    )  # fmt: skip


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _cause(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
