"""What a review of rotation found: each was let by, or broke the log, and must never be so again."""

import errno
import os
import signal

import pytest

from saeguard.errors import AuditError, AuditFailed, AuditTampered
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.chain import Head
from saeguard.guarding.verify import verify
from tests.audits import KEY, record, written
from tests.test_rotation import requests, rotated, segments


def test_writer_notices_that_the_file_of_another_ones_rotation_was_emptied(tmp_path):
    one, idle = (AuditLog(tmp_path / "a.jsonl", key=KEY, fsync=False) for _ in range(2))
    one.write(record(1))
    idle.write(record(2))
    one.rotate()
    one.write(record(3))
    os.truncate(one.path, 0)

    for log in (idle, one):
        with pytest.raises(AuditTampered):
            log.write(record(4))
    assert not one.path.read_bytes()


def test_log_stays_as_it_was_where_files_cannot_have_two_names(tmp_path, monkeypatch):
    log = written(tmp_path / "a.jsonl", 3)
    before = log.path.read_bytes()

    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", no_links)
        with pytest.raises(AuditFailed):
            log.rotate()

    assert log.path.read_bytes() == before
    again = AuditLog(log.path, key=KEY)
    again.write(record(4))
    assert again.rotate() is not None


def test_head_of_before_the_first_file_is_not_called_checked(tmp_path):
    path = rotated(tmp_path)
    first = segments(path)[0]
    behind = verify([first], key=KEY).head
    rest = [*segments(path)[1:], path]

    assert verify(rest, key=KEY, behind=behind, head=behind).ok
    assert not verify(rest, key=KEY, behind=behind, head=Head(2, "ab" * 32)).ok


def test_pipe_with_the_name_of_a_segment_is_refused_at_once(tmp_path):
    path = rotated(tmp_path)
    first, *_ = segments(path)
    head = verify([first], key=KEY).head
    (tmp_path / "head").write_text(f"{head}\n")
    first.unlink()
    os.mkfifo(first)
    signal.alarm(20)
    try:
        with pytest.raises(AuditError):
            AuditLog(path, key=KEY, head_file=tmp_path / "head")
    finally:
        signal.alarm(0)


def test_copy_whose_name_looks_like_a_segment_is_named_in_the_refusal(tmp_path):
    log = written(tmp_path / "a.jsonl", 2)
    copy = tmp_path / "a.jsonl.202611231200"
    copy.write_bytes(log.path.read_bytes())

    with pytest.raises(AuditTampered, match="202611231200 beside it.*12 to 16 digits"):
        AuditLog(log.path, key=KEY)


@pytest.mark.parametrize("most", range(4096, 6400, 211))
def test_file_never_has_one_byte_more_than_it_may(most, tmp_path):
    log = AuditLog(tmp_path / "a.jsonl", fsync=False, most_bytes=most)
    for number in range(40):
        log.write(record(number))

    assert all(one.stat().st_size <= most for one in [*segments(log.path), log.path])
    assert requests(log.path, None) == [f"r{number}" for number in range(40)]
