"""The audit log: one line per request, on the disk before its request's last byte goes out.

    log = AuditLog("audit.jsonl", key=AuditKey.from_file("audit.key"))
    head = log.write(AuditRecord(...))      when this returns, the record stands; when it raises, refuse the request

A write opens the file, locks it, checks whatever others have written since, puts one line behind it with one call of
the system, and waits until it is on the disk. Nothing stays open in between: threads, processes and forks share a log
through its file alone, and one that was deleted, replaced or shortened is noticed at the next write.

A writer that is killed leaves an unfinished last line, whose request was never answered. Whoever comes next puts the
record "log.recovered" in its place, which counts the bytes. Every other fault is refused by name.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saeguard.errors import AuditFailed, AuditTampered, AuditUnavailable, BadAuditKey, BadRecord
from saeguard.guarding.chain import RESTORE, START, Head, now, seal
from saeguard.guarding.keys import AuditKey
from saeguard.guarding.locking import locked
from saeguard.guarding.records import AuditRecord
from saeguard.guarding.verify import Walk, unavailable

FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
OTHERS_MAY_WRITE = 0o022
REOPEN = "Refuse the request, mend the cause, and open the log anew."


class AuditLog:
    """A log at ``path``, made with mode 0600 where there is none, and verified from its first line where there is.

    With a ``key`` every line is sealed. ``head_file``, best on another machine's or user's disk, always holds the
    head of the log, so that lines missing at the end are noticed. Without ``fsync`` a record survives the death of
    the process, and not that of the machine. A lock is waited for ``lock_seconds``.

    Raises `AuditUnavailable` when nothing can be written there, `AuditTampered` when what is there does not verify,
    `BadAuditKey` when its lines are sealed and no key is given, `BadRecord` when the head file holds no head,
    `AuditFailed` when another process keeps the lock.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        key: AuditKey | None = None,
        head_file: str | Path | None = None,
        fsync: bool = True,
        lock_seconds: float = 10.0,
    ):
        self.path = Path(path).absolute()
        self.head = START
        """Number and hash of the last line, as far as this object has seen the file."""
        self._offset = 0
        self._key, self._fsync, self._lock_seconds = key, fsync, lock_seconds
        self._head_file = None if head_file is None else Path(head_file).absolute()
        self._inode: tuple[int, int] | None = None
        self._failure: str | None = None
        try:
            with self._held(os.O_CREAT) as fd:
                self._catch_up(fd, self._known_head(os.fstat(fd).st_size))
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
        if self._failure is not None:
            raise AuditFailed(f"a record of {record.request_id}", f"the log failed before: {self._failure}", REOPEN)
        try:
            with self._held() as fd:
                self._catch_up(fd)
                self._append(fd, record)
                return self.head
        except OSError as error:
            self._failure = _cause(error)
            found = f"it could not be written ({self._failure})"
            raise AuditFailed(f"a record of {record.request_id}", found, REOPEN) from error
        except (AuditTampered, AuditUnavailable, BadAuditKey) as error:
            self._failure = error.found
            raise

    @contextmanager
    def _held(self, create: int = 0) -> Iterator[int]:
        """The file, open and locked. Raises OSError, and an `AuditError` when it is not the one it was."""
        fd = os.open(self.path, FLAGS | create, 0o600)
        try:
            with locked(fd, seconds=self._lock_seconds):
                self._check_file(fd)
                yield fd
        finally:
            os.close(fd)

    def _check_file(self, fd: int) -> None:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise unavailable(self.path, "it is not a regular file")
        if found.st_mode & OTHERS_MAY_WRITE:
            raise unavailable(self.path, "others than its owner may write it")
        self._inode = self._inode or (found.st_dev, found.st_ino)
        if self._inode != (found.st_dev, found.st_ino):
            raise AuditTampered(f"the audit log {str(self.path)!r}", "another file stands in its place", RESTORE)

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
        if size == self._offset and known is None:
            return
        with os.fdopen(fd, "rb", closefd=False) as file:
            walk = Walk(file, stop=size, head=self.head, offset=self._offset, key=self._key, known=known)
            for _ in walk:
                pass
        if walk.seals and self._key is None:
            raise BadAuditKey("the audit log's key", "its lines are sealed and there is no key", "Give key=.")
        self.head, self._offset = walk.head, walk.offset
        if walk.torn_bytes:
            self._recover(fd, walk.torn_bytes)

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
