"""A log that is rotated is one chain over its segments: whoever writes, whoever dies, and whatever is done to them."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard.errors import AuditError, AuditFailed, AuditTampered, AuditUnavailable, BadAuditKey, BadRecord, BadRule
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.chain import START, Head, seal
from saeguard.guarding.segments import CONTINUED, ROTATED, SEAMS, segments_beside
from saeguard.guarding.summary import summarise
from saeguard.guarding.verify import Verification, judge, read, verify
from tests.audits import KEY, OTHER_KEY, TS, chain, record, written
from tests.counts import cases
from tests.test_audit import run

ROOT = Path(__file__).resolve().parent.parent


def rotated(folder: Path, sizes: tuple[int, ...] = (3, 2, 4, 2), key: Any = KEY, first: int = 1) -> Path:
    """A log with so many records in each of its files, the last being the one that is written to."""
    path = folder / "a.jsonl"
    log = AuditLog(path, key=key, fsync=False, head_file=folder / "head")
    numbers = iter(range(first, first + sum(sizes)))
    for number, size in enumerate(sizes):
        for _ in range(size):
            log.write(record(next(numbers)))
        if number < len(sizes) - 1:
            log.rotate()
    return path


def segments(path: Path) -> list[Path]:
    return [segment for _, segment in segments_beside(path)]


def requests(path: Any, key: Any = KEY) -> list[str]:
    """Of the records that are no seams."""
    return [entry.record.request_id for entry in read(path, key=key) if entry.record not in SEAMS]


# What rotation does


def test_segments_and_the_log_hold_every_record_once_in_its_order(tmp_path):
    path = rotated(tmp_path)
    found = verify(path, key=KEY, head=Head.load(tmp_path / "head"))

    assert found.ok
    assert (found.records, found.files, found.ended) == (11 + 6, 4, False)
    assert requests(path) == [f"r{number}" for number in range(1, 12)]
    assert [one.name[-12:] for one in segments(path)] == ["000000000004", "000000000008", "000000000014"]


def test_every_file_begins_with_number_and_hash_of_the_head_before_it(tmp_path):
    path = rotated(tmp_path)
    for before, after in zip(segments(path), [*segments(path)[1:], path], strict=True):
        last, first = before.read_bytes().splitlines()[-1], json.loads(after.read_bytes().splitlines()[0])

        assert json.loads(last)["reason_code"] == "log.rotated"
        assert (first["reason_code"], first["seq"]) == ("log.continued", json.loads(last)["seq"] + 1)
        assert first["prev"] == hashlib.sha256(last).hexdigest()
        assert "mac" in first


def test_rotation_gives_the_segment_and_a_log_without_new_records_stays(tmp_path):
    log = AuditLog(tmp_path / "a.jsonl", key=KEY)
    assert log.rotate() is None
    log.write(record(1))
    assert log.rotate() == tmp_path / "a.jsonl.000000000002"
    assert log.rotate() is None
    assert AuditLog(log.path, key=KEY).rotate() is None

    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.000000000002"]
    assert log.head.seq == 3


@pytest.mark.parametrize("key", [None, KEY], ids=["no key", "key"])
def test_file_never_has_more_bytes_than_it_may(key, tmp_path):
    log = AuditLog(tmp_path / "a.jsonl", key=key, fsync=False, most_bytes=4096)
    for number in range(30):
        log.write(record(number))
        assert log.path.stat().st_size <= 4096

    assert len(segments(log.path)) > 5
    assert all(2048 < one.stat().st_size <= 4096 for one in segments(log.path))
    assert requests(log.path, key) == [f"r{number}" for number in range(30)]


def test_record_that_alone_is_too_long_has_a_file_of_its_own(tmp_path):
    log = AuditLog(tmp_path / "a.jsonl", key=KEY, fsync=False, most_bytes=4096)
    long = record(1, gates={f"gate.{number:060}": 0.5 for number in range(60)})
    for one in (record(0), long, record(2)):
        log.write(one)

    assert [size > 4096 for size in (one.stat().st_size for one in segments(log.path))] == [False, True]
    assert requests(log.path) == ["r0", "r1", "r2"]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("most", [0, -1, 4095, 4096.0, True, "4096"])
def test_size_that_is_none_is_refused(most, tmp_path):
    with pytest.raises(BadRule, match="Give 4096 or more"):
        AuditLog(tmp_path / "a.jsonl", most_bytes=most)

    assert not (tmp_path / "a.jsonl").exists()


def test_records_of_seams_are_written_by_rotation_alone_and_counted_by_nobody(tmp_path):
    path = rotated(tmp_path)
    for seam in SEAMS:
        with pytest.raises(BadRecord, match="Call rotate"):
            AuditLog(path, key=KEY).write(seam)
    (found,) = summarise(read(path, key=KEY), by="month").values()

    assert (found.requests, found.steer, found.refuse, found.not_run) == (11, 11, 0, 0)


OLD = {
    KEY: "97b059ec628f5ba126c25ab9ce15bb42df97deabfd4b1efef3ae43854d54ef93",
    None: "0bd401e3c60ccfe246a40390619f4275903bc3bd2bdbf84a92e11c27a35abe7e",
}


def test_log_of_before_rotation_has_the_same_bytes_and_still_verifies_and_goes_on(tmp_path):
    path = tmp_path / "a.jsonl"
    for key, digest in OLD.items():
        whole = b"".join(chain(3, key))
        assert hashlib.sha256(whole).hexdigest() == digest
        path.write_bytes(whole)
        path.chmod(0o600)
        assert verify(path, key=key).records == 3
        assert AuditLog(path, key=key).write(record(4)).seq == 4
        assert verify(path, key=key).ok


# Writers


def test_writers_that_are_open_go_on_over_rotations_of_others(tmp_path):
    path = tmp_path / "a.jsonl"
    idle, busy, other = (AuditLog(path, key=KEY, fsync=False, head_file=tmp_path / "head") for _ in range(3))
    idle.write(record(0))
    for number in range(1, 9):
        busy.write(record(number))
        if number % 3 == 0:
            other.rotate()
    assert idle.write(record(9)) == idle.head

    assert requests(path) == [f"r{number}" for number in range(10)]
    assert verify(path, key=KEY, head=Head.load(tmp_path / "head")).head == idle.head


@settings(max_examples=cases(600))
@given(seed=st.integers(0, 1 << 32))
def test_any_writes_and_rotations_are_the_chain_without_rotations(seed):
    random = Random(seed)
    key, lines, head = random.choice((KEY, None)), 0, START
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        logs = [AuditLog(path, key=key, fsync=False, head_file=Path(folder) / "head", most_bytes=most)
                for most in (None, 4096, 6000)]  # fmt: skip
        for _ in range(random.randint(0, 30)):
            one = random.randrange(3)
            if random.random() < 0.15:
                logs[one] = AuditLog(path, key=key, fsync=False, head_file=Path(folder) / "head")
            elif random.random() < 0.2:
                logs[one].rotate()
            else:
                logs[one].write(record(lines))
                lines += 1
        found = verify(path, key=key, head=Head.load(Path(folder) / "head") if lines else None)
        entries = list(read(path, key=key))

        assert found.ok
        assert [entry.seq for entry in entries] == list(range(1, found.records + 1))
        unrotated = []
        for entry in entries:  # the very lines, in one file without names
            line, head = seal(entry.record, head, ts=entry.ts, key=key)
            unrotated.append(line)
        assert b"".join(unrotated) == b"".join(one.read_bytes() for one in [*segments(path), path])
        assert requests(path, key) == [f"r{number}" for number in range(lines)]


def test_threads_that_write_and_rotate_make_one_chain(tmp_path):
    path = tmp_path / "a.jsonl"
    logs = [AuditLog(path, key=KEY, fsync=False, most_bytes=4096), AuditLog(path, key=KEY, fsync=False)]
    seen: list[int] = []

    def work(log: AuditLog, rotates: bool) -> None:
        for number in range(20):
            seen.append(log.write(record(number)).seq)
            if rotates and number % 5 == 0:
                log.rotate()

    threads = [threading.Thread(target=work, args=(logs[number % 2], number > 3)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(seen)) == len(seen) == 120
    assert verify(path, key=KEY).ok
    assert len(requests(path)) == 120


# Who takes files away


MOVES: dict[str, Callable[[Path], Any]] = {
    "moved, and made anew": lambda path: (os.rename(path, f"{path}.1"), path.touch(0o600)),
    "copied, and cut": lambda path: (shutil.copy(path, f"{path}.1"), os.truncate(path, 0)),
    "an old segment in its place": lambda path: os.replace(segments(path)[0], path),
    "an old segment as a second name": lambda path: (path.unlink(), os.link(segments(path)[1], path)),
    "a copy of itself": lambda path: (shutil.copy2(path, f"{path}.1"), os.replace(f"{path}.1", path)),
    "the segment it is now is gone": lambda path: (AuditLog(path, key=KEY).rotate(), segments(path)[-1].unlink()),
    "a segment in between is gone": lambda path: (more(path, 2), segments(path)[-1].unlink()),
    "its segment was cut": lambda path: (more(path, 1), cut(segments(path)[-1], 1)),
    "its segment was edited": lambda path: (more(path, 1), edit(segments(path)[-1], b'"r12"', b'"rxx"')),
}


def more(path: Path, times: int) -> None:
    """Somebody else writes and rotates."""
    log = AuditLog(path, key=KEY, fsync=False)
    for _ in range(times):
        log.write(record(12))
        log.rotate()
    log.write(record(13))


def cut(path: Path, lines: int) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-lines]))


def edit(path: Path, old: bytes, new: bytes) -> None:
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))


@pytest.mark.parametrize("move", MOVES)
def test_writer_refuses_a_log_that_something_else_rotated(move, tmp_path):
    path = rotated(tmp_path)
    log = AuditLog(path, key=KEY)
    MOVES[move](path)
    with pytest.raises(AuditTampered):
        log.write(record(20))

    with pytest.raises(AuditError):
        log.write(record(20))
    assert not any("r20" in one.read_text() for one in tmp_path.iterdir())


def test_writer_says_how_logs_are_rotated_where_one_was_moved(tmp_path):
    log = written(tmp_path / "a.jsonl", 2)
    MOVES["moved, and made anew"](log.path)

    with pytest.raises(AuditTampered, match="another file stands in its place.*saeguard audit rotate"):
        log.write(record(3))


def test_log_that_is_gone_or_old_is_not_begun_anew_beside_its_segments(tmp_path):
    path = rotated(tmp_path)
    whole, old = path.read_bytes(), segments(path)[0].read_bytes()
    for left in (None, b"", old, b"".join(old.splitlines(keepends=True)[:2]), b"".join(chain(2))):
        path.unlink(missing_ok=True)
        if left is not None:
            path.write_bytes(left)
            path.chmod(0o600)
        with pytest.raises(AuditTampered):
            AuditLog(path, key=KEY)
        assert not verify(path, key=KEY).ok
    path.write_bytes(whole)

    assert AuditLog(path, key=KEY).write(record(12)).seq == 18


def test_name_of_a_segment_that_something_else_has_stops_the_rotation_and_loses_nothing(tmp_path):
    log = AuditLog(rotated(tmp_path), key=KEY)
    (tmp_path / "a.jsonl.000000000018").write_bytes(b"")
    with pytest.raises(AuditTampered, match="another file has its name"):
        log.rotate()
    (tmp_path / "a.jsonl.000000000018").unlink()
    assert AuditLog(log.path, key=KEY).write(record(12)).seq == 20

    assert requests(log.path) == [f"r{number}" for number in range(1, 13)]


def test_head_of_before_the_log_is_looked_for_in_the_segments(tmp_path):
    path, head_file = rotated(tmp_path), tmp_path / "old head"
    heads = [head for head, _ in heads_of(path)]
    for head in heads:
        head_file.write_text(f"{head}\n")
        AuditLog(path, key=KEY, head_file=head_file)
        head_file.write_text(f"{head.seq}:{'0' * 64}\n")
        with pytest.raises(AuditTampered):
            AuditLog(path, key=KEY, head_file=head_file)
    segments(path)[1].unlink()
    head_file.write_text(f"{heads[1]}\n")

    with pytest.raises(AuditTampered):
        AuditLog(path, key=KEY, head_file=head_file)


def heads_of(path: Path) -> list[tuple[Head, bytes]]:
    lines = b"".join(one.read_bytes() for one in [*segments(path), path]).splitlines()
    return [(Head(number, hashlib.sha256(line).hexdigest()), line) for number, line in enumerate(lines, 1)]


def test_key_has_to_be_that_of_the_log_to_rotate_it(tmp_path):
    path = rotated(tmp_path)
    for key, error in ((None, BadAuditKey), (OTHER_KEY, AuditTampered)):
        with pytest.raises(error):
            AuditLog(path, key=key)

    assert verify(path, key=KEY).ok


# Edits


def whole_of(path: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in [*segments(path), path]}


def swapped(files: dict[str, bytes], one: int, other: int) -> dict[str, bytes]:
    names, data = list(files), list(files.values())
    data[one], data[other] = data[other], data[one]
    return dict(zip(names, data, strict=True))


def without(files: dict[str, bytes], number: int) -> dict[str, bytes]:
    return {name: data for at, (name, data) in enumerate(files.items()) if at != number}


def lines_of(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


def changed(files: dict[str, bytes], number: int, change: Callable[[list[bytes]], list[bytes]]) -> dict[str, bytes]:
    name = list(files)[number]
    return files | {name: b"".join(change(lines_of(files[name])))}


def reforged(data: list[bytes], prev: str) -> list[bytes]:
    """The first line with another hash in it, sealed by nobody."""
    first = json.loads(data[0])
    text = json.dumps(first | {"prev": prev}, sort_keys=True, separators=(",", ":"))
    return [text.encode() + b"\n", *data[1:]]


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for one in folder.iterdir():
        one.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o600)
    return folder / "a.jsonl"


EDITS: dict[str, tuple[Callable[[dict[str, bytes], dict[str, bytes]], dict[str, bytes]], str]] = {
    "the first segment dropped": (lambda files, _: without(files, 0), "lines 1 to 4 are missing"),
    "one in the middle dropped": (lambda files, _: without(files, 1), "lines 5 to 8 are missing"),
    "the last segment dropped": (lambda files, _: without(files, 2), "lines 9 to 14 are missing"),
    "two swapped": (lambda files, _: swapped(files, 0, 1), "lines 1 to 4 are missing, or not in their place"),
    "two others swapped": (lambda files, _: swapped(files, 1, 2), "lines 5 to 8 are missing, or not in"),
    "an old one replayed": (lambda files, _: swapped(files, 0, 2) | {"a.jsonl": files["a.jsonl"]}, "are missing"),
    "one given twice": (
        lambda files, _: dict(sorted((files | {"a.jsonl.000000000009": list(files.values())[1]}).items())),
        "continues line 4: a segment stands twice",
    ),
    "an old one as the log": (lambda files, _: files | {"a.jsonl": list(files.values())[1]}, "a segment stands twice"),
    "the carried hash": (
        lambda files, _: changed(files, 2, lambda lines: reforged(lines, "ab" * 32)), "it is of another chain"),
    "the last line of one cut": (
        lambda files, _: changed(files, 1, lambda lines: lines[:-1]), "before the record that"),
    "a part of its last line cut": (
        lambda files, _: changed(files, 1, lambda lines: [*lines[:-1], lines[-1][:-9]]), "before the record that"),
    "all of one cut": (lambda files, _: changed(files, 1, lambda lines: []), "its file is empty"),
    "all of the log cut": (lambda files, _: changed(files, 3, lambda lines: []), "its file is empty"),
    "a line behind its end": (lambda files, _: changed(files, 1, lambda lines: [*lines, lines[1]]), "it stands behind"),
    "half a line behind its end": (
        lambda files, _: changed(files, 1, lambda lines: [*lines, b'{"decision":"st']), "it stands behind"),
    "the seam cut out": (lambda files, _: files | {"a.jsonl.000000000008": b"".join(
        lines_of(files["a.jsonl.000000000008"])[:-1] + lines_of(files["a.jsonl.000000000014"])[1:])}, "its number is"),
    "two joined": (lambda files, _: without(files | {"a.jsonl.000000000014": files["a.jsonl.000000000008"]
                   + files["a.jsonl.000000000014"]}, 1), "it stands behind"),
    "one of another chain": (
        lambda files, other: files | {"a.jsonl.000000000008": other["a.jsonl.000000000008"]}, "it is of another chain"),
    "the log of another chain": (lambda files, other: files | {"a.jsonl": other["a.jsonl"]}, "it is of another chain"),
    "the first of another chain": (
        lambda files, other: files | {"a.jsonl.000000000004": other["a.jsonl.000000000004"]}, "it is of another chain"),
    "a chain of its own as the log": (
        lambda files, _: files | {"a.jsonl": b"".join(chain(2))}, "begins a chain of its own"),
    "the last line of the log": (lambda files, _: changed(files, 3, lambda lines: lines[:-1]), "is known to have been"),
}  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> tuple[dict[str, bytes], dict[str, bytes], Head]:
    """The files of a log, of another one of the same key and sizes, and the head of the first."""
    paths = [rotated(tmp_path_factory.mktemp("log"), first=first) for first in (1, 50)]
    return whole_of(paths[0]), whole_of(paths[1]), Head.load(paths[0].parent / "head")


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("key", [KEY, None], ids=["key", "no key"])
def test_what_is_done_to_segments_is_found_and_named(name, key, originals, tmp_path):
    files, other, head = originals
    make, why = EDITS[name]
    found = verify(put(tmp_path, make(files, other)), key=key, head=head)

    assert not found.ok
    assert why in (found.why or "")
    assert found.bad_file is not None
    assert found.bad_line == found.records + 1
    assert verify(put(tmp_path, files), key=key, head=head).ok


@pytest.mark.usefixtures("without_type_checks")
def test_random_edits_of_the_files_are_all_found_with_the_key_and_the_head(originals, tmp_path):
    files, _, head = originals
    random, tried = Random(0), 0
    while tried < 600:
        name = random.choice(list(files))
        data, at = files[name], random.randrange(len(files[name]))
        flipped = data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        new = random.choice((
            flipped, data[:at], data[:at] + data[at + random.randint(1, 900) :],
            data[:at] + random.randbytes(2) + data[at:],
            random.choice(list(files.values())), data + random.choice(list(files.values())),
        ))  # fmt: skip
        if new == data:
            continue
        tried += 1

        assert not verify(put(tmp_path, files | {name: new}), key=KEY, head=head).ok, (name, at)


def test_files_are_verified_in_the_order_in_which_they_are_given(tmp_path):
    path = rotated(tmp_path)
    files = [*segments(path), path]
    assert verify(files, key=KEY) == verify(path, key=KEY)
    assert requests(files) == requests(path)
    for wrong in (files[::-1], files[1:], [files[0], *files], files[:1] + files[2:]):
        assert not verify(wrong, key=KEY).ok

    archived = verify(files[:2], key=KEY)
    assert (archived.ok, archived.ended, archived.records) == (True, True, 8)
    assert not verify(files[:2], key=KEY, head=Head.load(tmp_path / "head")).ok
    with pytest.raises(AuditUnavailable):
        verify([])
    with pytest.raises(AuditUnavailable):
        verify([*files, tmp_path / "none"])


def test_segments_that_are_no_longer_kept_have_a_head_that_the_rest_continues(tmp_path):
    path = rotated(tmp_path)
    behind = verify(segments(path)[:2], key=KEY).head
    for segment in segments(path)[:2]:
        segment.unlink()
    found = verify(path, key=KEY, behind=behind)

    assert (found.ok, found.records, found.head.seq) == (True, 17 - 8, 17)
    assert not verify(path, key=KEY).ok
    assert not verify(path, key=KEY, behind=Head(8, "a" * 64)).ok
    assert [entry.seq for entry in read(path, key=KEY, behind=behind)] == list(range(9, 18))


def judged(data: bytes) -> Verification:
    return judge(BytesIO(data), len(data), key=KEY)


@pytest.mark.usefixtures("without_type_checks")
def test_seams_stand_at_the_ends_of_files_and_continue_something():
    line, head = seal(CONTINUED, START, ts=TS, key=KEY)
    inside, _ = seal(CONTINUED, Head(3, hashlib.sha256(chain(3)[-1][:-1]).hexdigest()), ts=TS, key=KEY)
    ended, after = seal(ROTATED, START, ts=TS, key=KEY)
    behind, _ = seal(record(2), after, ts=TS, key=KEY)

    assert "continued by the first record" in (judged(line).why or "")
    assert "continued by the first record" in (judged(b"".join(chain(3)) + inside).why or "")
    assert "stands behind the record" in (judged(ended + behind).why or "")
    assert head.seq == 1


# Deaths

KILLS = """
import json, os, random, signal, sys, time
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.chain import Head
from saeguard.guarding.segments import SEAMS
from saeguard.guarding.verify import read, verify
from tests.audits import KEY, record

folder, random = sys.argv[1], random.Random(0)

def forked(work):
    here, there = os.pipe()
    child = os.fork()
    if not child:
        os.close(here)
        work(lambda seq: os.write(there, b"%d\\n" % seq))
        os._exit(0)
    os.close(there)
    return child, os.fdopen(here)

path = folder + "/many.jsonl"
def many(tell):
    log = AuditLog(path, key=KEY, fsync=False, most_bytes=random.choice((None, 4096, 5000)), lock_seconds=60.0)
    for number in range(40):
        tell(log.write(record(number)).seq)
        if number % 9 == 0:
            log.rotate()

AuditLog(path, key=KEY)
children = [forked(many) for _ in range(4)]
acknowledged = sorted(int(line) for _, pipe in children for line in pipe)
statuses = [os.waitpid(child, 0)[1] for child, _ in children]
kept = [entry.seq for entry in read(path, key=KEY) if entry.record not in SEAMS]

def endless(tell):
    log = AuditLog(path, key=KEY, fsync=False, head_file=path + ".head")
    for number in range(10**9):
        tell(log.write(record(number)).seq)
        log.rotate()

kills, states = [], set()
for turn in range(40):
    path = folder + f"/kill{turn // 10}.jsonl"
    child, pipe = forked(endless)
    first = pipe.readline()
    time.sleep(random.uniform(0, 0.01))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    last = ([first] + pipe.readlines())[-1]
    found = verify(path, key=KEY)
    states.add((found.ended, os.path.exists(path + ".next")))
    log = AuditLog(path, key=KEY, head_file=path + ".head")
    head = log.write(record(0))
    after = verify(path, key=KEY, head=Head.load(path + ".head"))
    kills.append([found.why, int(last), found.records, after.ok and after.head == head, status])
print(json.dumps({
    "acknowledged": acknowledged, "statuses": statuses, "kept": kept, "ok": verify(folder + "/many.jsonl").ok,
    "kills": kills, "states": sorted(states),
}))
"""


def test_processes_rotate_under_each_other_and_forty_killed_ones_leave_what_the_next_one_completes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True, check=False, timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)

    assert said["statuses"] == [0] * 4
    assert said["acknowledged"] == said["kept"]
    assert len(said["kept"]) == 160
    assert said["ok"]
    assert len(said["kills"]) == 40
    for why, acknowledged, records, good_after, status in said["kills"]:
        assert why is None
        assert acknowledged <= records <= acknowledged + 3
        assert good_after
        assert status == 9


# The command


@pytest.fixture
def key_file(tmp_path) -> Path:
    (tmp_path / "keys").mkdir()
    path = tmp_path / "keys" / "key"
    path.write_bytes(b"the key of this test's deployment\n")
    path.chmod(0o600)
    return path


def test_command_rotates_and_writers_go_on(tmp_path, key_file):
    log = written(tmp_path / "a.jsonl", 2, head_file=tmp_path / "head")
    options = ("--key-file", key_file, "--head-file", tmp_path / "head")
    said = json.loads(run("rotate", log.path, *options, "--json"))
    assert said["segment"] == str(tmp_path / "a.jsonl.000000000003")
    assert said["head"] == (tmp_path / "head").read_text().strip()
    assert json.loads(run("rotate", log.path, *options, "--json"))["segment"] is None
    assert "no new records" in run("rotate", log.path, *options)
    assert log.write(record(3)).seq == 5

    assert "ends with line 6" in run("rotate", log.path, *options)
    run("rotate", log.path, status=2)
    run("rotate", tmp_path / "nothing", status=2)
    run("verify", log.path, *options)


def test_command_verifies_and_counts_over_the_segments(tmp_path, key_file):
    path = rotated(tmp_path)
    said = json.loads(run("verify", path, "--key-file", key_file, "--json"))
    assert (said["ok"], said["records"], said["files"]) == (True, 17, 4)
    assert "17 records stand in 4 files" in run("verify", path)
    assert json.loads(run("verify", *segments(path), path, "--json"))["head"] == said["head"]
    assert json.loads(run("show", path, "--json"))["total"]["requests"] == 11
    assert "goes on in another file" in run("verify", segments(path)[0])

    first = verify(segments(path)[0]).head
    segments(path)[0].unlink()
    assert "lines 1 to 4 are missing" in run("verify", path, status=1)
    assert json.loads(run("verify", path, "--json", status=1))["bad_file"].endswith("000000000008")
    assert "13 records stand in 3 files" in run("verify", path, "--behind", first)
    assert json.loads(run("show", path, "--behind", first, "--json"))["total"]["requests"] == 8
    run("show", path, status=2)


def test_refusal_of_a_write_leaves_the_log_as_it_was(tmp_path):
    """A lock that somebody holds while the log is full: nothing is rotated, and the next write does it."""
    import fcntl

    log = AuditLog(tmp_path / "a.jsonl", key=KEY, fsync=False, most_bytes=4096, lock_seconds=0.1)
    for number in range(4):
        log.write(record(number))
    with log.path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(AuditFailed, match="held its lock"):
            log.write(record(4))
        with pytest.raises(AuditFailed, match="held its lock"):
            log.rotate()
    log.write(record(4))

    assert len(segments(log.path)) == 1
    assert requests(log.path) == [f"r{number}" for number in range(5)]
