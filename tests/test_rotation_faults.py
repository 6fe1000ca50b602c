"""Whatever call of the system fails in a rotation, or ends its process: what is there verifies, and goes on."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from saeguard.errors import AuditError, AuditFailed, AuditTampered
from saeguard.guarding import audit
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.chain import Head
from saeguard.guarding.segments import SEAMS, segments_beside
from saeguard.guarding.verify import read, verify
from tests.audits import KEY, record, written
from tests.test_audit_faults import Killed, at_every_call, fails, faults, half

assert faults


def requests(path: Path) -> list[str]:
    return [entry.record.request_id for entry in read(path, key=KEY) if entry.record not in SEAMS]


def anew(tmp_path: Path) -> AuditLog:
    """A log of two records and two heads, in an empty folder."""
    for one in tmp_path.iterdir():
        one.unlink()
    return written(tmp_path / "a.jsonl", 2, fsync=True, head_file=tmp_path / "head")


def completed(tmp_path: Path) -> list[str]:
    """What is on record when somebody else has come and written one record more."""
    before = verify(tmp_path / "a.jsonl", key=KEY)
    assert before.bad_line is None
    next_log = AuditLog(tmp_path / "a.jsonl", key=KEY, head_file=tmp_path / "head")
    head = next_log.write(record(99))
    found = verify(tmp_path / "a.jsonl", key=KEY, head=Head.load(tmp_path / "head"))
    assert (found.ok, found.ended, found.head) == (True, False, head)
    names = {one.name.partition(".jsonl")[2][:2] for one in tmp_path.iterdir()}
    assert names <= {"", ".0"}, "nothing unfinished is left"
    return requests(tmp_path / "a.jsonl")


@pytest.mark.parametrize("within", [False, True], ids=["before", "within"])
@pytest.mark.parametrize("way", ["rotate", "most_bytes"])
def test_rotation_that_dies_at_any_call_is_completed_by_the_next_writer(way, within, tmp_path, faults):
    """Dies before the n-th call, or in the middle of it where it writes, or right after it where it renames."""

    def dies(name: str, real: Any, arguments: Any) -> Any:
        if within and name in ("write", "pwrite"):
            half(name, real, arguments)
        elif within and name in ("link", "replace", "unlink"):
            real(*arguments)
        faults["dead"] = True
        raise Killed

    rounds, states = 0, set()
    log = anew(tmp_path)
    for _ in at_every_call(faults, dies):
        try:
            if way == "rotate":
                log.rotate()
            else:
                log._most_bytes = log.path.stat().st_size
                log.write(record(3))
        except Killed:
            rounds += 1
        faults.update(at=0, dead=False)
        states.add((len(segments_beside(tmp_path / "a.jsonl")), verify(tmp_path / "a.jsonl", key=KEY).ended))
        kept = completed(tmp_path)

        assert kept in (["r1", "r2", "r99"], ["r1", "r2", "r3", "r99"], ["r1", "r2", "log", "r99"])
        log = anew(tmp_path)
    assert rounds > 20
    assert states == {(0, False), (0, True), (1, True), (1, False)}, "every state there is was met"


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "EMFILE", "EPERM", "half"])
def test_rotation_whose_nth_call_fails_refuses_the_record_and_all_that_follow(fault, tmp_path, faults):
    kind = half if fault == "half" else lambda *call: fails(getattr(errno, fault), *call)
    failures = rounds = 0
    log = anew(tmp_path)
    for _ in at_every_call(faults, kind):
        rounds += 1
        log._most_bytes = log.path.stat().st_size
        acknowledged = ["r1", "r2"]
        try:
            log.write(record(3))
            acknowledged.append("r3")
        except (AuditFailed, AuditTampered):
            failures += 1
            for again in (lambda log=log: log.write(record(4)), lambda log=log: log.rotate()):
                with pytest.raises(AuditError, match="failed before"):
                    again()
        faults["at"] = 0
        kept = completed(tmp_path)

        assert kept[: len(acknowledged)] == acknowledged
        assert "r4" not in kept
        log = anew(tmp_path)

    assert failures == rounds - 1 > 20, "every call of the system counts"


def test_mutant_that_renames_the_log_away_before_there_is_another_is_caught(tmp_path, faults, monkeypatch):
    """Between its two renames no file would have the log's name, and the next writer would begin a chain anew."""
    real = os.replace

    def two_renames(self: AuditLog, fd: int, held: Any) -> int:
        audit.os.replace(self.path, audit.segment_name(self.path, self.head.seq))
        return begin(self, fd, held)

    begin = AuditLog._begin_next
    monkeypatch.setattr(AuditLog, "_begin_next", two_renames)
    with pytest.raises((AuditError, AssertionError, OSError)):
        test_rotation_that_dies_at_any_call_is_completed_by_the_next_writer("rotate", False, tmp_path, faults)
    assert os.replace is real


def test_next_file_is_locked_when_it_gets_the_name_of_the_log(tmp_path, monkeypatch):
    """Else who writes there at once would have its head overwritten by an older one."""
    log = anew(tmp_path)
    other = AuditLog(log.path, key=KEY, head_file=tmp_path / "head", lock_seconds=0.05)
    save, met = AuditLog._save_head, []

    def meets(self: AuditLog, target: Path, head: Head) -> None:
        if self is log and segments_beside(log.path) and not met:
            met.append(True)
            with pytest.raises(AuditFailed, match="held its lock"):
                other.write(record(3))
        save(self, target, head)

    monkeypatch.setattr(AuditLog, "_save_head", meets)
    log.rotate()
    other.write(record(3))

    assert met == [True]
    assert verify(log.path, key=KEY, head=Head.load(tmp_path / "head")).ok
    assert requests(log.path) == ["r1", "r2", "r3"]
