"""What a process does while it reads files: no code may run, no name be imported, nothing be written or sent."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from encodings import cp437, raw_unicode_escape, unicode_escape, utf_8_sig, utf_16, utf_32  # noqa: F401  else imported when needed
from typing import Any

EVENTS = {
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "exec", "compile", "import",
    "pickle.find_class", "marshal.loads", "code.__new__", "ctypes.dlopen", "socket.connect", "socket.bind",
    "socket.getaddrinfo", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod",
    "os.truncate", "shutil.rmtree",
}  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Events of Python's audit, while `on`. A hook stays as long as its process: use one in a process of its own."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._on = False
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITES
        if self._on and (event in EVENTS or writes):
            self.seen.append(f"{event} {args!r}"[:200])

    @contextmanager
    def on(self) -> Iterator[list[str]]:
        """The events of this block."""
        self.seen.clear()
        self._on = True
        try:
            yield self.seen
        finally:
            self._on = False


def peak_bytes() -> int:
    """The most memory that this process has had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
