"""A record says what happened without a word of text, and nobody changes a log unnoticed."""

import json
import pickle
import stat
import threading
import traceback
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from typer.testing import CliRunner

from saeguard.cli import app
from saeguard.errors import AuditError, AuditTampered, BadAuditKey, BadRecord
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.chain import MAX_LINE, START, Head, seal, unseal
from saeguard.guarding.keys import AuditKey
from saeguard.guarding.records import MAX_NAMES, AuditRecord, Fired, class_name
from saeguard.guarding.summary import summarise
from saeguard.guarding.verify import Verification, judge, read, verify
from tests.audits import KEY, OTHER_KEY, RECORDS, TS, chain, record, written
from tests.counts import cases

# Records


@pytest.mark.usefixtures("without_type_checks")
@settings(max_examples=cases(5_000))
@given(found=RECORDS)
def test_record_comes_back_from_its_line_which_is_one_line_of_ascii(found):
    line, head = seal(found, START, ts=TS, key=KEY)
    entry, after = unseal(line[:-1], START, key=KEY)

    assert entry.record == found
    assert after == head
    assert line.isascii()
    assert line.decode().splitlines() == [line[:-1].decode()]


def test_longest_record_there_can_be_fits_into_a_line():
    names = [f"{i:02}".ljust(128, "x") for i in range(MAX_NAMES)]
    number, count, code = -1.2345678901234567e-300, (1 << 53) - 1, "x" * 128
    longest = record(
        request_id=code, reason_code=code, tenant=code, policy_fp=code, model_fp=code, sae_fp=code, decision="refuse",
        guard_status="partial", fired={name: Fired(count, count, count) for name in names}, err=code,
        gates=dict.fromkeys(names, number), latency_ms=dict.fromkeys(names, number), max_delta_ratio=number,
        prompt_tokens=count, gen_tokens=count, lost_bytes=count,
    )  # fmt: skip

    assert len(seal(longest, Head(10**15, "0" * 64), ts=TS, key=KEY)[0]) < MAX_LINE


@pytest.mark.parametrize(
    "changes",
    [
        {"guard_status": "not_run"},
        {"guard_status": "partial"},
        {"err": "ValueError"},
        {"decision": "allow", "guard_status": "not_run"},
        {"decision": "error", "guard_status": "not_run"},
        {"decision": "error", "reason_code": "bypass.on_error"},
        {"fired": {"resid_post.12": Fired(rows=1, tokens=6, expected=7)}},
        {"decision": "refuse", "fired": {"resid_post.12": Fired(rows=1, tokens=8, expected=7)}},
    ],
)
def test_record_that_contradicts_itself_is_refused(changes):
    with pytest.raises(BadRecord):
        record(**changes)


def test_request_that_went_by_the_guard_says_so_and_is_counted():
    bypass = record(decision="allow", guard_status="not_run", err="OSError", reason_code="bypass.on_error")

    assert bypass.bypassed
    assert not record().bypassed
    assert not record(decision="refuse", reason_code="bypass.on_error").bypassed


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("changes", [
    {"gates": {"g": float("nan")}}, {"gates": {"g": float("inf")}}, {"gates": {"g": True}}, {"gates": {"g": "0.5"}},
    {"gates": {"g": 10**400}}, {"gates": [0.5]}, {"gates": dict.fromkeys(map(str, range(65)), 0.0)},
    {"max_delta_ratio": float("nan")}, {"latency_ms": {"total": None}}, {"prompt_tokens": -1}, {"prompt_tokens": 1.0},
    {"gen_tokens": True}, {"gen_tokens": 1 << 53}, {"lost_bytes": None}, {"fired": {"a": (1, 2, 2)}}, {"fired": None},
    {"decision": "allowed"}, {"decision": ["allow"]}, {"guard_status": None}, {"request_id": ""}, {"request_id": None},
    {"request_id": "a" * 129}, {"request_id": 7}, {"prompt_hmac": "A" * 64}, {"prompt_hmac": "a" * 63}, {"err": ""},
])  # fmt: skip
def test_field_out_of_its_domain_is_refused(changes):
    with pytest.raises(BadRecord):
        record(**changes)


# Never text

CANARIES = [
    "canary word", "canary\n", "canary\r\nforged", "\x1b[31mcanary", "canary\u2028", "canary\u2029", "canary\0",
    "\ud800canary", "canary{}", "canary%s", "canary{0.__class__}", '","decision":"allow', "cänary", "canary\u0661",
    "ｃａｎａｒｙ", "canary" * 30, "canary\x85", "\u202ecanary", "canary\\n", "canary/../..", " canary", "canary\t",
]  # fmt: skip
TEXT_FIELDS: dict[str, Callable[[str], Any]] = {
    name: lambda text: text
    for name in ("request_id", "decision", "reason_code", "guard_status", "tenant", "policy_fp", "model_fp", "sae_fp",
                 "prompt_hmac", "err")
} | {
    "gates": lambda text: {text: 0.5},
    "latency_ms": lambda text: {text: 1.0},
    "fired": lambda text: {text: Fired(1, 1, 1)},
}  # fmt: skip


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", TEXT_FIELDS)
@pytest.mark.parametrize("text", CANARIES, ids=ascii)
def test_text_in_any_field_is_refused_without_being_repeated(name, text):
    with pytest.raises(BadRecord) as caught:
        record(**{name: TEXT_FIELDS[name](text)})

    assert text not in str(caught.value)
    assert "canary" not in "".join(traceback.format_exception(caught.value, chain=True)).split("\n")[-2]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("text", CANARIES, ids=ascii)
def test_text_that_is_hashed_leaves_one_line_that_verifies_and_no_trace(text, tmp_path):
    tenant, request_id = (KEY.of_text(text, purpose=purpose) for purpose in ("tenant", "request"))
    failed = record(tenant=tenant, request_id=request_id, decision="error", err=class_name(ValueError(text)))
    AuditLog(tmp_path / "a.jsonl", key=KEY, fsync=False).write(failed)

    whole = (tmp_path / "a.jsonl").read_text(encoding="ascii")
    assert [entry.record for entry in read(tmp_path / "a.jsonl", key=KEY)] == [failed]
    assert len(whole.splitlines()) == 1
    assert "canary" not in whole
    assert '"err":"ValueError"' in whole


def test_exception_whose_class_has_a_strange_name_is_recorded_under_another():
    assert class_name(type("Erreur étrange", (Exception,), {})()) == "UnnamedError"


# Keys


def refused_with_locals(path: Path) -> list[str]:
    try:
        AuditKey.from_file(path)
    except BadAuditKey as error:
        return list(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    return []


def test_key_is_shown_by_no_repr_format_pickle_or_traceback_with_locals(tmp_path):
    secret = b"sixteen bytes and some more"
    path = tmp_path / "key"
    path.write_bytes(secret + b"\n")
    path.chmod(0o600)
    key = AuditKey.from_file(path)
    shown = [repr(key), f"{key}", str(vars(AuditLog(tmp_path / "a.jsonl", key=key)))]
    with pytest.raises(BadAuditKey):
        pickle.dumps(key)
    path.write_bytes(secret[:15])
    shown += refused_with_locals(path)

    assert any("hidden" in text for text in shown[3:])
    assert not any(secret[:8].decode() in text for text in shown)


def test_key_file_and_variable_of_one_content_are_one_key(tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIT_KEY", "0123456789abcdef")
    path = tmp_path / "key"
    path.write_bytes(b"0123456789abcdef\r\n")
    path.chmod(0o400)

    keys = AuditKey.from_environment("AUDIT_KEY"), AuditKey.from_file(path), AuditKey(b"0123456789abcdef")
    assert len({key.of_tokens([1, 2]) for key in keys}) == 1


def test_key_that_is_missing_short_huge_or_readable_by_others_is_refused(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"k" * 32)
    path.chmod(0o640)
    for bad in (
        lambda: AuditKey.from_file(path), lambda: AuditKey.from_file(tmp_path), lambda: AuditKey.from_file("/nowhere"),
        lambda: AuditKey.from_environment("NOT_SET_ANYWHERE"), lambda: AuditKey(b"k" * 15),
        lambda: AuditKey(b"k" * 5000),
    ):  # fmt: skip
        with pytest.raises(BadAuditKey):
            bad()


def test_hmac_depends_on_key_purpose_order_and_every_token():
    made = [
        KEY.of_tokens([1, 2]), KEY.of_tokens([2, 1]), KEY.of_tokens([1, 2, 0]), KEY.of_tokens([258]),
        OTHER_KEY.of_tokens([1, 2]), KEY.of_text("a", purpose="tenant"), KEY.of_text("a", purpose="request"),
    ]  # fmt: skip

    assert len(set(made)) == len(made)
    with pytest.raises(BadRecord):
        KEY.of_tokens([1 << 64])


# Edits of a log


def edited(random: Random, lines: list[bytes]) -> tuple[str, bytes]:
    """One random edit of a log, by its name, and what becomes of the file."""
    lines, whole = list(lines), b"".join(lines)
    at, i, j = random.randrange(len(whole)), random.randrange(len(lines)), random.randrange(len(lines))
    kind = random.choice(
        ("bit", "byte", "insert", "drop", "delete", "double", "swap", "replace", "foreign", "cut", "more")
    )
    if kind == "bit":
        return kind, whole[:at] + bytes([whole[at] ^ 1 << random.randrange(8)]) + whole[at + 1 :]
    if kind == "byte":
        return kind, whole[:at] + random.randbytes(1) + whole[at + 1 :]
    if kind == "insert":
        return kind, whole[:at] + random.randbytes(random.randint(1, 4)) + whole[at:]
    if kind == "drop":
        return kind, whole[:at] + whole[at + random.randint(1, 9) :]
    if kind == "cut":
        return kind, whole[:at]
    if kind == "delete":
        del lines[i]
    elif kind == "double":
        lines.insert(j, lines[i])
    elif kind == "swap":
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == "replace":
        lines[i] = lines[j]
    elif kind == "foreign":  # a line that its own chain, of the same key, has at that place
        lines[i] = chain(i + 1, first=random.randint(50, 99))[i]
    else:
        lines.append(random.choice(lines) if random.random() < 0.5 else random.randbytes(random.randint(1, 99)))
    return kind, b"".join(lines)


def judged(data: bytes, head: Head | None = None) -> Verification:
    return judge(BytesIO(data), len(data), key=KEY, head=head)


@pytest.mark.usefixtures("without_type_checks")
def test_10_000_random_edits_are_all_found_with_the_key_and_the_head():
    random, lines, tried = Random(0), chain(4), 0
    head = judged(b"".join(lines)).head
    while tried < 10_000:
        kind, changed = edited(random, lines)
        if changed == b"".join(lines):
            continue
        tried += 1

        assert not judged(changed, head).ok, (kind, changed)


@pytest.mark.usefixtures("without_type_checks")
def test_every_bit_of_a_sealed_log_counts():
    """Without a head; the last line's end is what `torn_bytes` is for."""
    whole, found = b"".join(chain(2)), []
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        found.append(judged(bytes(changed)).ok)

    assert len(found) > 10_000
    assert not any(found)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("known", [False, True], ids=["no head", "head"])
@pytest.mark.parametrize("key", [None, KEY], ids=["no key", "key"])
def test_what_takes_a_key_and_what_takes_a_head_is_what_the_readme_says(key, known, tmp_path):
    """A chain made anew, or another last line, shows with the key or a head; lines missing at the end with a head."""
    path, lines = tmp_path / "a.jsonl", chain(6, key)
    path.write_bytes(b"".join(lines))
    head = verify(path, key=key).head if known else None

    def passes(changed: list[bytes]) -> bool:
        path.write_bytes(b"".join(changed))
        return verify(path, key=key, head=head).ok

    forged = chain(6, OTHER_KEY if key else None, first=2)
    assert passes(lines)
    assert passes(forged) == (key is None and not known)
    assert passes([*lines[:-1], lines[-1].replace(b'"gen_tokens":64', b'"gen_tokens":63')]) == (
        key is None and not known
    )
    assert passes(lines[:4]) == (not known)
    assert passes([]) == (not known)
    assert not passes([*lines[:2], lines[2].replace(b"steer", b"allow"), *lines[3:]])
    assert not passes([*lines[:2], *lines[3:]])


def test_lines_behind_a_known_head_are_taken_and_a_log_that_grew_verifies(tmp_path):
    log = written(tmp_path / "a.jsonl", 3)
    head = log.head
    log.write(record(4))

    assert verify(log.path, key=KEY, head=head).ok
    assert verify(log.path, key=KEY).records == 4
    assert Head.parse(str(head)) == head


@pytest.mark.parametrize("mixed", [(KEY, None), (None, KEY)], ids=["seals stop", "seals begin"])
def test_sealed_and_unsealed_lines_in_one_log_are_found_without_the_key(mixed, tmp_path):
    first, head = seal(record(1), START, ts=TS, key=mixed[0])
    second, _ = seal(record(2), head, ts=TS, key=mixed[1])
    (tmp_path / "a.jsonl").write_bytes(first + second)

    assert verify(tmp_path / "a.jsonl").bad_line == 2


@pytest.mark.parametrize("spelling", [
    lambda line: line.replace(b'":', b'": ', 1), lambda line: line.replace(b'"v":1', b'"v":1.0'),
    lambda line: line.replace(b'"guard":3.0', b'"guard":3'), lambda line: line.replace(b"0.5", b"5e-1"),
    lambda line: line.replace(b'"err"', b'"\\u0065rr"'), lambda line: line[:-2] + b',"v":1}\n',
    lambda line: line.replace(b"\n", b"\r\n"), lambda line: line.replace(b"{", b"{ ", 1),
])  # fmt: skip
def test_other_spelling_of_the_same_record_is_no_line_of_the_log(spelling, tmp_path):
    line = chain(1, None)[0]
    (tmp_path / "a.jsonl").write_bytes(spelling(line))

    assert spelling(line) != line
    assert verify(tmp_path / "a.jsonl").bad_line == 1


# The log


def test_log_is_made_for_its_owner_alone_and_gives_back_what_was_written(tmp_path):
    log = AuditLog(tmp_path / "a.jsonl", key=KEY)
    heads = [log.write(record(number)) for number in (1, 2, 3)]

    entries = list(read(log.path, key=KEY))
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert [entry.record for entry in entries] == [record(1), record(2), record(3)]
    assert [head.seq for head in heads] == [entry.seq for entry in entries] == [1, 2, 3]
    assert verify(log.path, key=KEY).head == heads[-1] == log.head


def test_log_goes_on_where_it_was_when_opened_again(tmp_path):
    head = written(tmp_path / "a.jsonl", 3).head
    again = AuditLog(tmp_path / "a.jsonl", key=KEY)

    assert again.head == head
    assert again.write(record(4)).seq == 4
    assert verify(again.path, key=KEY).ok


def test_record_stands_in_the_file_when_write_returns(tmp_path):
    log = AuditLog(tmp_path / "a.jsonl", key=KEY)
    for number in range(1, 6):
        log.write(record(number))

        assert verify(log.path, key=KEY).records == number


@pytest.mark.parametrize(("before", "after", "error"), [
    (KEY, None, BadAuditKey), (None, KEY, AuditTampered), (KEY, OTHER_KEY, AuditTampered),
], ids=["key gone", "key new", "key changed"])  # fmt: skip
def test_log_is_opened_with_the_key_it_was_begun_with(before, after, error, tmp_path):
    written(tmp_path / "a.jsonl", 2, before)
    with pytest.raises(error):
        AuditLog(tmp_path / "a.jsonl", key=after)

    assert verify(tmp_path / "a.jsonl", key=before).records == 2


def test_log_with_a_head_file_notices_that_its_end_is_missing(tmp_path):
    path, head_file = tmp_path / "a.jsonl", tmp_path / "a.head"
    written(path, 5, head_file=head_file)
    whole = path.read_bytes()
    assert AuditLog(path, key=KEY, head_file=head_file).head.seq == 5

    for lines in (0, 3, 4):
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:lines]))
        AuditLog(path, key=KEY)  # nothing else knows better
        with pytest.raises(AuditTampered):
            AuditLog(path, key=KEY, head_file=head_file)
    path.write_bytes(whole)
    head_file.unlink()
    with pytest.raises(AuditTampered, match="head file"):
        AuditLog(path, key=KEY, head_file=head_file)


def test_threads_and_logs_of_one_file_write_one_chain(tmp_path):
    path = tmp_path / "a.jsonl"
    logs = [AuditLog(path, key=KEY, fsync=False) for _ in range(2)]
    seen: list[int] = []

    def work(log: AuditLog) -> None:
        seen.extend(log.write(record(number)).seq for number in range(20))

    threads = [threading.Thread(target=work, args=(logs[i % 2],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(seen) == list(range(1, 161))
    assert verify(path, key=KEY).records == 160
    assert verify(path, key=KEY).ok


def test_mutant_that_does_not_lock_is_caught(tmp_path, monkeypatch):
    """Two writers that read the same end, made to meet there."""
    logs = [AuditLog(tmp_path / "a.jsonl", key=KEY, fsync=False) for _ in range(2)]
    meet = threading.Barrier(2, timeout=10)
    monkeypatch.setattr("saeguard.guarding.locking.fcntl.flock", lambda fd, kind: None)
    append = AuditLog._append
    monkeypatch.setattr(AuditLog, "_append", lambda *a: (meet.wait(), append(*a)))
    threads = [threading.Thread(target=log.write, args=(record(),)) for log in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert verify(logs[0].path, key=KEY).bad_line == 2


def test_summary_counts_decisions_statuses_and_bypasses_per_period(tmp_path):
    log = written(tmp_path / "a.jsonl", 2)
    log.write(record(3, decision="allow", guard_status="not_run", err="OSError", reason_code="bypass.on_error"))
    log.write(record(4, decision="error", guard_status="partial", err="OSError"))
    log.write(record(5, decision="refuse", lost_bytes=3))
    (found,) = summarise(read(log.path, key=KEY), by="month").values()

    assert (found.allow, found.steer, found.refuse, found.error) == (1, 2, 1, 1)
    assert (found.ran, found.partial, found.not_run) == (3, 1, 1)
    assert (found.requests, found.bypassed, found.lost_bytes) == (5, 1, 3)


# The command


def run(*arguments: Any, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == status, result.output + result.stderr
    return result.stdout


@pytest.fixture
def key_file(tmp_path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(b"the key of this test's deployment\n")
    path.chmod(0o600)
    return path


def test_command_verifies_with_status_0_1_and_2(tmp_path, key_file):
    path = written(tmp_path / "a.jsonl", 3).path
    good = json.loads(run("verify", path, "--key-file", key_file, "--json"))
    assert (good["ok"], good["records"], good["keyed"]) == (True, 3, True)
    assert "3 records stand" in run("verify", path, "--head", good["head"])
    assert "seals were not checked" in run("verify", path)

    path.write_bytes(path.read_bytes().replace(b'"tokens":2', b'"tokens":3'))
    bad = json.loads(run("verify", path, "--key-file", key_file, "--json", status=1))
    assert (bad["ok"], bad["records"], bad["bad_line"]) == (False, 1, 2)
    assert "line 2 does not" in run("verify", path, status=1)
    key_file.chmod(0o644)
    run("verify", path, "--key-file", key_file, status=2)
    run("verify", tmp_path / "nothing", status=2)


def test_command_sees_the_missing_end_and_the_unfinished_line(tmp_path):
    log = written(tmp_path / "a.jsonl", 3, head_file=tmp_path / "head")
    whole = log.path.read_bytes()
    log.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    assert "line 3 is known" in run("verify", log.path, "--head-file", tmp_path / "head", status=1)

    log.path.write_bytes(whole[:-5])
    assert json.loads(run("verify", log.path, "--json", status=1))["torn_bytes"] > 100


def test_command_shows_counts_over_time_and_refuses_a_log_that_does_not_verify(tmp_path, key_file):
    path = written(tmp_path / "a.jsonl", 3).path
    found = json.loads(run("show", path, "--key-file", key_file, "--by", "hour", "--json"))
    assert found["total"]["steer"] == found["total"]["ran"] == found["total"]["requests"] == 3
    assert [period["requests"] for period in found["periods"]] == [3]
    assert "refuse" in run("show", path)

    path.write_bytes(path.read_bytes().replace(b"steer", b"allow"))
    run("show", path, status=2)


def test_reader_never_raises_anything_undocumented_for_odd_files(tmp_path):
    for data in (b"", b"\n", b"\0" * 100, b"{}\n", b"[]\n", b"null\n", b"[" * 5000 + b"\n", b"x" * (MAX_LINE + 1),
                 b'{"decision":"\n', b'{"v":1,"seq":1e999}\n', b"\xff\xfe\n", b'{"mac":"\\ud800"}\n'):  # fmt: skip
        (tmp_path / "a").write_bytes(data)
        assert verify(tmp_path / "a").ok == (data == b"")
        if data:
            with pytest.raises(AuditError):
                AuditLog(tmp_path / "a")
    for path in (tmp_path, "/dev/zero", "/dev/null", "a\0b", tmp_path / "none"):
        with pytest.raises(AuditError):
            verify(path)
    assert isinstance(record(), AuditRecord)
