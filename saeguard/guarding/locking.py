"""One writer at a time: a log is locked while its end is read and a line is put behind it, across processes.

The lock belongs to the opened file (flock), so the kernel lets go of it when its holder dies.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager

from saeguard.errors import AuditFailed

FIRST_WAIT_S, LONGEST_WAIT_S = 0.0002, 0.005


@contextmanager
def locked(fd: int, *, shared: bool = False, seconds: float = 10.0) -> Iterator[None]:
    """Hold the lock of an open file; ``shared`` with others who only read.

    Raises `AuditFailed` when somebody else holds it for so many ``seconds``, and OSError where there are no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    end, wait = time.monotonic() + seconds, FIRST_WAIT_S
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() >= end:
                found = f"another process has held its lock for {seconds:g} s"
                raise AuditFailed(
                    "a turn at the audit log", found, "Find the process that hangs, and end it."
                ) from error
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
