"""Any family's files into saeguard's own format, read by a process of its own with limits on memory and time.

    parent   finds or fetches the source, starts the worker, and turns what it reports into the same error here
    worker   limits itself, loads, folds, and writes the target whole or not at all

The worker reads pickles of before torch 1.6 too: whatever a file makes it do, it cannot take more than its limits.
"""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from saeguard import errors
from saeguard.errors import ConversionStopped, LoadError, SaeguardError, UnsupportedFormat
from saeguard.loaders import open_source
from saeguard.loaders.native import FILE, save_sae
from saeguard.loaders.places import resolve
from saeguard.loaders.source import Hints, Source
from saeguard.sites import Site

MEMORY_FACTOR, MEMORY_FLOOR = 4, 1 << 30
"""The limit of memory by default: so many times the source's size, and this much on top, in bytes."""
SECONDS = 1800.0


def convert(
    source: str | Path | tuple[str, str],
    target: str | Path,
    site: Site | str | None = None,
    *,
    site_out: Site | str | None = None,
    model: str | None = None,
    top_k: int | None = None,
    input_scale: float | None = None,
    memory_bytes: int | None = None,
    seconds: float = SECONDS,
    overwrite: bool = False,
) -> Path:
    """Write ``source`` to ``target`` (a folder, or a .safetensors file) in saeguard's format; returns the file.

    The arguments before the limits are those of `load_sae`. A target that exists is refused without ``overwrite``,
    and one among the source's own files always. Raises what `load_sae` raises, and `ConversionStopped` when the
    worker needs more than ``memory_bytes`` of data or more than ``seconds``, or dies.
    """
    place = resolve(source)
    written = Path(target) if Path(target).suffix == ".safetensors" else Path(target) / FILE
    _check_target(place.path, written, overwrite)
    site = site or place.site
    request = {
        "source": str(place.path), "memory_bytes": memory_bytes or _memory(place.path), "seconds": seconds,
        "hints": {"site": str(site) if site else None, "site_out": str(site_out) if site_out else None,
                  "model": model or place.model, "top_k": top_k, "input_scale": input_scale or place.input_scale,
                  "overrides": dict(place.overrides), "origin": dict(place.origin)},
    }  # fmt: skip
    with _beside(written) as made:
        os.replace(_run(place.path, request | {"target": str(made / FILE)}), written)
    return written


@contextmanager
def _beside(written: Path) -> Iterator[Path]:
    """A folder to write into, on the same disk as the target; whatever a dying worker leaves in it goes with it."""
    missing = [folder for folder in (written.parent, *written.parent.parents) if not folder.exists()]
    written.parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=written.parent, prefix=".converting-") as folder:
            yield Path(folder)
    except BaseException:
        for folder in missing:
            folder.rmdir()
        raise


def _run(source: Path, request: Mapping[str, Any]) -> Path:
    command, seconds = [sys.executable, "-P", "-m", "saeguard.loaders.convert"], request["seconds"]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=seconds, env=_environment()
        )
    except subprocess.TimeoutExpired as error:
        raise _stopped(source, f"it took more than {seconds:g} seconds", "Allow more with seconds=...") from error
    return _result(source, done, request["memory_bytes"])


def _environment() -> dict[str, str]:
    """Where the worker finds modules: never the current folder, which may be the one that was downloaded."""
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if Path(entry).is_absolute()]
    package = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([*given, package])}


def _check_target(source: Path, written: Path, overwrite: bool) -> None:
    inside = source if source.is_dir() else source.parent
    if written.exists() and (not overwrite or written.resolve().parent == inside.resolve()):
        raise UnsupportedFormat(
            f"converting {source.name} to {written}",
            "a file is there already" + (", beside the source's own" if written.parent == inside else ""),
            "Name another target" + ("." if overwrite else ", or pass overwrite=True if it is none of the source's."),
        )


def _memory(path: Path) -> int:
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return MEMORY_FACTOR * sum(entry.stat().st_size for entry in files) + MEMORY_FLOOR


def _result(path: Path, done: "subprocess.CompletedProcess[str]", memory_bytes: int) -> Path:
    try:
        report = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        if done.returncode < 0:  # torch's threads end the process where memory is refused
            raise _too_large(path, memory_bytes, f", or broke (signal {-done.returncode})") from None
        last = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        raise _stopped(path, f"it died with status {done.returncode} ({last:.200})", "Report it.") from None
    if "written" in report:
        return Path(report["written"])
    if report["error"] == "MemoryError":
        raise _too_large(path, memory_bytes)
    kind = getattr(errors, report["error"], LoadError)
    raise kind(*report["parts"])


def _too_large(path: Path, memory_bytes: int, more: str = "") -> ConversionStopped:
    return _stopped(path, f"it needs more than {memory_bytes / 1e9:.1f} GB{more}", "Allow more with memory_bytes=...")


def _stopped(path: Path, found: str, proceed: str) -> ConversionStopped:
    return ConversionStopped(f"converting {path.name}", found, proceed)


def _limit(memory_bytes: int, seconds: float) -> None:
    """Take the right to more memory and time away from this process; where the system has no such right, nothing."""
    try:
        import resource
    except ImportError:  # Windows: the parent's clock is the only limit
        return
    used = 0
    status = Path("/proc/self/status")
    if status.exists():
        used = next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmData"))
    for what, most in ((resource.RLIMIT_DATA, used + memory_bytes), (resource.RLIMIT_CPU, int(seconds * 64) + 1)):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _work(request: dict[str, Any]) -> dict[str, Any]:
    given = request["hints"]
    hints = Hints(
        Site.parse(given["site"]) if given["site"] else None,
        Site.parse(given["site_out"]) if given["site_out"] else None,
        given["model"], given["top_k"], given["input_scale"], given["overrides"], given["origin"],
    )  # fmt: skip
    _limit(request["memory_bytes"], request["seconds"])
    try:
        stored = open_source(Source(Path(request["source"]), legacy=True), hints)
        return {"written": str(save_sae(stored.sae(), request["target"]))}
    except (SaeguardError, MemoryError, RuntimeError) as error:
        if _is_out_of_memory(error):
            return {"error": "MemoryError", "parts": []}
        if not isinstance(error, SaeguardError):
            raise
        return {"error": type(error).__name__, "parts": [error.asked, error.found, error.proceed]}


def _is_out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # torch has no class of its own for it
            return True
        error = error.__cause__
    return False


if __name__ == "__main__":
    print(json.dumps(_work(json.load(sys.stdin))))  # noqa: T201  the report to the parent
