"""Whatever happens to the disk, the file or the process: no record is lost unnoticed, and what stands verifies."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from saeguard.errors import AuditError, AuditFailed, AuditTampered, AuditUnavailable
from saeguard.guarding import audit, locking
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.verify import read, verify
from tests.audits import KEY, chain, record, written

ROOT = Path(__file__).resolve().parent.parent
CALLS = (
    "open",
    "fstat",
    "fdopen",
    "write",
    "pwrite",
    "fsync",
    "ftruncate",
    "replace",
    "fcntl",
    "flock",
    "link",
    "unlink",
)


class Killed(BaseException):
    """The process is no more: nothing behind this happens."""


class Faults:
    """Stands in for `os` and `fcntl` in the modules of the log, and does something else at the n-th call."""

    def __init__(self, real: Any, state: dict[str, Any]):
        self._real, self._state = real, state

    def __getattr__(self, name: str) -> Any:
        real, state = getattr(self._real, name), self._state
        if name not in CALLS:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            state["calls"] += 1
            if state["dead"] and name != "flock":
                raise Killed
            if state["calls"] == state["at"]:
                state["hit"] = True
                return state["fault"](name, real, arguments)
            return real(*arguments, **options)

        return call


@pytest.fixture
def faults(monkeypatch) -> dict[str, Any]:
    """Which call fails, counted from here, and how."""
    state: dict[str, Any] = {"calls": 0, "at": 0, "hit": False, "dead": False}
    monkeypatch.setattr(audit, "os", Faults(os, state))
    monkeypatch.setattr(audit, "fcntl", Faults(fcntl, state))
    monkeypatch.setattr(locking, "fcntl", Faults(fcntl, state))
    return state


def fails(number: int, name: str, real: Any, arguments: Any) -> Any:
    """The call does not happen, and says why; a lock is only asked for again where it is busy."""
    raise OSError(number, os.strerror(number))


def half(name: str, real: Any, arguments: Any) -> Any:
    """A disk that fills up in the middle of a line."""
    if name not in ("write", "pwrite"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return real(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])


def at_every_call(faults: dict[str, Any], fault: Any) -> Iterator[None]:
    """1, 2, 3, ... until a round never gets to the call that would fail."""
    for at in range(1, 200):
        faults.update(calls=0, at=at, fault=fault, hit=False, dead=False)
        yield
        if not faults["hit"]:
            faults["at"] = 0
            return
    raise AssertionError("no end")


# Disks


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "EMFILE", "half"])
def test_write_whose_nth_call_fails_refuses_and_so_do_all_that_follow(fault, tmp_path, faults):
    kind = half if fault == "half" else lambda *call: fails(getattr(errno, fault), *call)
    failures = rounds = 0
    log = written(tmp_path / "a.jsonl", 2, fsync=True, head_file=tmp_path / "head")
    for _ in at_every_call(faults, kind):
        rounds += 1
        before = log.head.seq
        try:
            assert log.write(record(7)).seq == before + 1
        except AuditFailed:
            failures += 1
            with pytest.raises(AuditFailed, match="failed before"):
                log.write(record(8))
        faults["at"] = 0
        found = verify(log.path, key=KEY)

        assert found.bad_line is None
        assert found.records >= log.head.seq
        log = AuditLog(log.path, key=KEY, head_file=tmp_path / "head")
        assert verify(log.path, key=KEY).ok
    lost = sum(entry.record.lost_bytes > 0 for entry in read(log.path, key=KEY))

    assert failures == rounds - 1 > 8, "every call of the system counts"
    assert lost == 0, "what was half written was taken back"


@pytest.mark.parametrize("fault", ["ENOSPC", "EACCES", "EROFS"])
def test_log_whose_nth_call_fails_while_it_is_opened_does_not_open(fault, tmp_path, faults):
    path, refused = tmp_path / "a.jsonl", 0
    for _ in at_every_call(faults, lambda *call: fails(getattr(errno, fault), *call)):
        path.unlink(missing_ok=True)
        try:
            AuditLog(path, key=KEY)
        except AuditUnavailable:
            refused += 1

    assert refused >= 5


def test_disk_that_also_fails_to_take_a_half_line_back_leaves_an_unfinished_line(tmp_path, monkeypatch):
    log = written(tmp_path / "a.jsonl", 2)
    real = os.write
    with monkeypatch.context() as patched:
        patched.setattr(audit.os, "write", lambda fd, data: real(fd, data[:100]))
        patched.setattr(audit.os, "ftruncate", lambda *call: fails(errno.EIO, "ftruncate", None, call))
        with pytest.raises(AuditFailed):
            log.write(record(3))

    assert verify(log.path, key=KEY).torn_bytes == 100
    AuditLog(log.path, key=KEY)
    assert [entry.record.lost_bytes for entry in read(log.path, key=KEY)] == [0, 0, 100]


# Places


@pytest.fixture
def nobody() -> Iterator[None]:
    """Not the superuser, who may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def read_only() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        written(path / "old.jsonl", 1)
        (path / "old.jsonl").chmod(0o444)
        path.chmod(0o555)
        yield path
        path.chmod(0o755)


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("name", ["new.jsonl", "old.jsonl", "no/folder.jsonl"])
def test_place_where_nothing_can_be_written_is_refused_at_the_start(read_only, name):
    with pytest.raises(AuditUnavailable, match="cannot be written"):
        AuditLog(read_only / name, key=KEY)


def test_link_folder_device_pipe_and_file_that_others_may_write_are_refused(tmp_path):
    written(tmp_path / "a.jsonl", 1)
    (tmp_path / "link").symlink_to(tmp_path / "a.jsonl")
    written(tmp_path / "open.jsonl", 1).path.chmod(0o620)
    os.mkfifo(tmp_path / "pipe")
    for place in ("link", "open.jsonl", "pipe", ".", "a\0b"):
        with pytest.raises(AuditUnavailable):
            AuditLog(tmp_path / place, key=KEY)
    with pytest.raises(AuditUnavailable):
        AuditLog("/dev/null", key=KEY)


@pytest.mark.parametrize(("change", "error"), [
    (lambda path: path.unlink(), AuditFailed),
    (lambda path: os.truncate(path, 100), AuditTampered),
    (lambda path: os.replace(path.with_name("other"), path), AuditTampered),
    (lambda path: path.write_bytes(path.read_bytes() + b"x" * 9), AuditTampered),
    (lambda path: path.write_bytes(path.read_bytes() + chain(1)[0]), AuditTampered),
    (lambda path: path.chmod(0o666), AuditUnavailable),
], ids=["deleted", "cut", "replaced", "garbage", "foreign line", "opened to others"])  # fmt: skip
def test_log_that_is_changed_while_it_is_in_use_is_noticed_at_the_next_write(change, error, tmp_path):
    log = written(tmp_path / "a.jsonl", 2)
    written(tmp_path / "other", 2)
    change(log.path)
    with pytest.raises(error):
        log.write(record(3))

    with pytest.raises(AuditError):
        log.write(record(3))


def test_lock_that_somebody_keeps_ends_in_a_refusal_and_not_for_good(tmp_path):
    log = written(tmp_path / "a.jsonl", 1, lock_seconds=0.2)
    with log.path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        begun = time.monotonic()
        with pytest.raises(AuditFailed, match="held its lock"):
            log.write(record(2))
        assert time.monotonic() - begun < 5

    assert log.write(record(2)).seq == 2


def peak_bytes(path: Path) -> int:
    tracemalloc.start()
    verify(path, key=KEY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("data", [
    lambda: b"".join(chain(3_000)), lambda: b"x" * (20 << 20), lambda: b'{"decision":"' + b"a" * (20 << 20),
    lambda: chain(1)[0] + b"[" * (20 << 20) + b"\n",
], ids=["many lines", "one long line", "one long beginning", "one deep line"])  # fmt: skip
def test_log_is_read_in_little_memory_however_long_its_lines_are(data, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(data())
    verify(tmp_path / "a.jsonl", key=KEY)

    assert peak_bytes(tmp_path / "a.jsonl") < 1 << 20


# Deaths


def test_log_cut_at_1_000_random_bytes_verifies_up_to_there_and_goes_on(tmp_path):
    whole, random = b"".join(chain(5)), Random(0)
    path, torn = tmp_path / "a.jsonl", 0
    for at in [0, len(whole), *(random.randrange(len(whole)) for _ in range(1_000))]:
        path.write_bytes(whole[:at])
        path.chmod(0o600)
        stand, left = whole[:at].count(b"\n"), at - (whole.rfind(b"\n", 0, at) + 1)
        found = verify(path, key=KEY)
        assert (found.bad_line, found.records, found.torn_bytes) == (None, stand, left)
        assert found.ok == (left == 0)

        AuditLog(path, key=KEY, fsync=False).write(record(99))
        after, entries = verify(path, key=KEY), list(read(path, key=KEY))
        assert after.ok
        assert after.records == stand + bool(left) + 1
        assert [entry.record.lost_bytes for entry in entries[stand:]] == ([left, 0] if left else [0])
        torn += bool(left)

    assert torn > 900


@pytest.mark.parametrize(
    "tail", [b"\0" * 40, b'{"decision":"\x01', b"half a line of something else", b"\xff", b"{" * 20]
)
def test_end_that_no_writer_left_behind_is_refused_and_kept(tail, tmp_path):
    whole = b"".join(chain(3)) + tail
    (tmp_path / "a.jsonl").write_bytes(whole)
    with pytest.raises(AuditTampered, match="not the beginning of a record"):
        AuditLog(tmp_path / "a.jsonl", key=KEY)

    assert (tmp_path / "a.jsonl").read_bytes() == whole
    assert verify(tmp_path / "a.jsonl", key=KEY).bad_line == 4


@pytest.mark.parametrize("within", [False, True], ids=["before", "within"])
@pytest.mark.parametrize("torn", [1, 20, 400, 845])
def test_death_at_any_call_of_a_recovery_or_a_write_loses_nothing_uncounted(torn, within, tmp_path, faults):
    """Dies before the n-th call, or in the middle of it where it writes; the next to come counts what is left."""
    die_everywhere(torn, within, tmp_path, faults)


def test_mutant_that_cuts_an_unfinished_line_off_before_it_is_counted_is_caught(tmp_path, faults, monkeypatch):
    def recover(self: AuditLog, fd: int, torn_bytes: int) -> None:
        audit.os.ftruncate(fd, self._offset)
        self._append(fd, audit._recovered(torn_bytes))

    monkeypatch.setattr(AuditLog, "_recover", recover)
    with pytest.raises(IndexError):
        die_everywhere(400, False, tmp_path, faults)


def die_everywhere(torn: int, within: bool, tmp_path: Path, faults: dict[str, Any]) -> None:
    """Nobody acknowledges what is lost, and an unfinished line of ``torn`` bytes is counted, whoever dies when."""
    lines, path = chain(3), tmp_path / "a.jsonl"

    def dies(name: str, real: Any, arguments: Any) -> Any:
        if within and name in ("write", "pwrite"):
            half(name, real, arguments)
        faults["dead"] = True
        raise Killed

    rounds = 0
    for _ in at_every_call(faults, dies):
        path.write_bytes(b"".join(lines[:2]) + lines[2][:torn])
        path.chmod(0o600)
        acknowledged = 2
        try:
            acknowledged = AuditLog(path, key=KEY).write(record(9)).seq
        except Killed:
            rounds += 1
        faults.update(at=0, dead=False)
        assert verify(path, key=KEY).bad_line is None
        AuditLog(path, key=KEY)
        entries = list(read(path, key=KEY))

        assert verify(path, key=KEY).ok
        assert len(entries) >= acknowledged
        assert entries[2].record.lost_bytes > 0
    assert rounds > 12


PROCESSES = """
import json, os, random, signal, sys, time
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.verify import read, verify
from tests.audits import KEY, record

folder, random = sys.argv[1], random.Random(0)

def forked(work):
    here, there = os.pipe()
    child = os.fork()
    if not child:
        os.close(here)
        work(lambda head: os.write(there, b"%d\\n" % head.seq))
        os._exit(0)
    os.close(there)
    return child, os.fdopen(here)

shared = AuditLog(folder + "/many.jsonl", key=KEY, fsync=False)
def many(tell):
    for number in range(60):
        tell(shared.write(record(number)))

children = [forked(many) for _ in range(4)]
acknowledged = sorted(int(line) for _, pipe in children for line in pipe)
statuses = [os.waitpid(child, 0)[1] for child, _ in children]
many_ok = verify(folder + "/many.jsonl", key=KEY).ok

def endless(tell):
    log = AuditLog(path, key=KEY, fsync=False)
    for number in range(10**9):
        tell(log.write(record(number)))

kills = []
for turn in range(40):
    path = folder + f"/kill{turn // 5}.jsonl"
    child, pipe = forked(endless)
    first = pipe.readline()
    time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    last = ([first] + pipe.readlines())[-1]
    found = verify(path, key=KEY)
    AuditLog(path, key=KEY)
    after = verify(path, key=KEY)
    kills.append([found.bad_line, int(last), found.records, after.ok, status])
print(json.dumps({"acknowledged": acknowledged, "statuses": statuses, "many_ok": many_ok, "kills": kills}))
"""


def test_four_processes_write_one_chain_and_forty_killed_ones_lose_nothing_they_acknowledged(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES, str(tmp_path)], capture_output=True, text=True, check=False, timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)

    assert said["acknowledged"] == list(range(1, 241))
    assert said["statuses"] == [0] * 4
    assert said["many_ok"]
    assert len(said["kills"]) == 40
    for bad_line, acknowledged, records, whole_after, status in said["kills"]:
        assert bad_line is None
        assert acknowledged <= records <= acknowledged + 1
        assert whole_after
        assert status == 9
