"""Whatever a policy file holds: it is read as it says, or refused by an error of ours, soon and in little memory."""

import json
import time
import tracemalloc
from decimal import Decimal
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard import Ablate, Plan, Rule, SaeguardError, Site
from saeguard.errors import BadPolicy, BadPolicyFile
from saeguard.guarding import policy_file, shipped
from saeguard.guarding.policy import Policy
from tests import policies as made
from tests.counts import cases
from tests.fuzz.documents import NUMBERS, Obj, Raw, damaged, mutated, spelled, tree

EXAMPLE = made.example()
TEXT = EXAMPLE.to_json()
MAX_SECONDS = 5.0
MAX_MESSAGE = 4_000

pytestmark = pytest.mark.usefixtures("without_type_checks")


@cache
def shipped_text() -> str:
    return next(iter(shipped.shipped_policies().values())).read_text(encoding="utf-8")


def read(path: Path) -> Policy | None:
    """The policy in a file, None where it is refused; neither may take long or say much."""
    before = time.process_time()
    policy, said = None, "read"
    try:
        policy = Policy.load(path)
    except SaeguardError as error:
        said = str(error)
    assert 0 < len(said) < MAX_MESSAGE
    assert time.process_time() - before < MAX_SECONDS
    return policy


def holds(data: bytes, path: Path) -> Policy | None:
    """What is read of these bytes, which has to be what they say, and to stay it."""
    path.write_bytes(data)
    policy = read(path)
    if policy is None:
        return None
    text = policy.to_json()
    again = Policy.from_json(text)
    assert (again.to_json(), again.fingerprint()) == (text, policy.fingerprint())
    policy.save(path)
    assert Policy.load(path).fingerprint() == policy.fingerprint()
    assert path.read_bytes() == f'{{"policy":{text}}}\n'.encode()
    check_says(_distinct(json.loads(data, object_pairs_hook=Obj, parse_float=Decimal))["policy"], json.loads(text))
    return policy


def _distinct(found: Any) -> Any:
    """The pairs as objects, by a reader of its own; a key that stands twice may not have come so far."""
    if isinstance(found, Obj):
        assert len({key for key, _ in found}) == len(found), "a key stands twice, and one of its values was taken"
        return {key: _distinct(value) for key, value in found}
    return [_distinct(one) for one in found] if isinstance(found, list) else found


def check_says(given: Any, found: Any, where: str = "policy") -> None:
    """Fail unless all that was given is what was found: no value of another kind, size, or place."""
    if isinstance(given, dict):
        assert isinstance(found, dict), where
        for key, value in given.items():
            assert key in found, f"{where}.{key} is gone"
            check_says(value, found[key], f"{where}.{key}")
    elif isinstance(given, list):
        assert isinstance(found, list), where
        assert len(given) == len(found), where
        for number, (one, other) in enumerate(zip(given, found, strict=True)):
            check_says(one, other, f"{where}.{number}")
    elif where.endswith("site") and isinstance(given, str):
        assert str(Site.parse(given)) == found, where
    elif isinstance(given, Decimal):
        assert float(given) == found, f"{where}: {given} was read as {found}"
    else:
        assert type(given) is type(found) or (type(given) is int and type(found) is float), where
        assert given == found, f"{where}: {given} was read as {found}"


# Random files


def fuzzed(text: str, seed: int) -> bytes:
    random = Random(seed)
    policy: Any = tree(text)
    envelope = Obj([["policy", policy]])
    if random.random() < 0.1:
        envelope.append(["signature", random.choice((None, Obj(), Obj([["algorithm", "ed25519"]])))])
    for _ in range(random.choice((0, 1, 1, 1, 2, 3, 6))):
        inside = random.random() < 0.9 and isinstance(envelope, Obj) and envelope and isinstance(envelope[0], list)
        if inside:
            envelope[0] = [envelope[0][0], mutated(random, envelope[0][1])]
        else:
            envelope = mutated(random, envelope)
    return damaged(random, spelled(random, envelope))


@settings(max_examples=cases(20_000, per_example=10))
@given(seed=st.integers(0, 1 << 32))
def test_policy_file_says_what_is_read_of_it_or_is_refused(seed, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.policy.json"
    for turn in range(10):
        holds(fuzzed(TEXT, seed * 10 + turn), path)


@settings(max_examples=cases(3_000))
@given(policy=made.policies(), seed=st.integers(0, 1 << 32))
def test_any_policys_file_says_what_is_read_of_it_or_is_refused(policy, seed, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.policy.json"
    holds(fuzzed(policy.to_json(), seed), path)


@settings(max_examples=cases(40))
@given(seed=st.integers(0, 1 << 32))
def test_shipped_policys_file_says_what_is_read_of_it_or_is_refused(seed, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "shipped.policy.json"
    holds(fuzzed(json.dumps(json.loads(shipped_text())["policy"]), seed), path)


def test_mutations_reach_both_ends(tmp_path):
    """Else all would be refused at the first check, or none."""
    found = [holds(fuzzed(TEXT, seed), tmp_path / "p.json") for seed in range(600)]

    assert 60 < sum(policy is not None for policy in found) < 540
    assert len({policy.fingerprint() for policy in found if policy is not None}) > 15


# What is known to go wrong elsewhere


def places(found: Any, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """The way to every object of a tree."""
    inner = [(number, one[1] if isinstance(found, Obj) else one) for number, one in enumerate(found)]
    below = [way for number, one in inner if isinstance(one, list) for way in places(one, (*path, number))]
    return ([path] if isinstance(found, Obj) else []) + below


def at(found: Any, path: tuple[int, ...]) -> Any:
    for number in path:
        found = found[number][1] if isinstance(found, Obj) else found[number]
    return found


@pytest.mark.parametrize("escaped", [False, True], ids=["as it is", "escaped"])
@pytest.mark.parametrize("way", places(tree(TEXT)), ids=str)
def test_key_that_stands_twice_in_any_object_is_refused_whatever_it_says(way, escaped, tmp_path):
    """Readers that take the first, and those that take the last, would see two policies with one signature."""
    for number in range(len(at(tree(TEXT), way))):
        document = tree(TEXT)
        owner = at(document, way)
        key, value = owner[number]
        spell = "".join(f"\\u{ord(char):04x}" for char in key) if escaped else key
        text = spelled(Random(0), document, plain=True)
        for twice in (f'"{spell}":{spelled(Random(0), value, plain=True)}', f'"{spell}":null'):
            owner[number] = [key, Raw(f"{spelled(Random(0), value, plain=True)},{twice}")]
            doubled = spelled(Random(0), document, plain=True)
            assert len(doubled) > len(text)
            (tmp_path / "p.json").write_text(f'{{"policy":{doubled}}}')

            with pytest.raises(BadPolicyFile, match="a key stands twice"):
                Policy.load(tmp_path / "p.json")


def test_whole_number_that_a_reader_would_round_is_refused_when_it_is_read_and_when_it_is_made(tmp_path):
    """2^53 + 1 as a threshold was read as 2^53: the policy in force was not the one in the file."""
    text = TEXT.replace('"threshold":2.0', '"threshold":9007199254740993')
    (tmp_path / "p.json").write_text(f'{{"policy":{text}}}')

    with pytest.raises(BadPolicyFile, match="beyond 2\\^53 that no double is equal to"):
        Policy.load(tmp_path / "p.json")
    with pytest.raises(BadPolicy, match="beyond 2\\^53"):
        made.example(plan=Plan((Rule("tiny", (3, 5), Ablate(), start=2**53 + 1),)))
    for exact in (2**53, 2**53 + 2, -(2**60), 2**62):
        text = TEXT.replace('"threshold":2.0', f'"threshold":{exact}')
        (tmp_path / "p.json").write_text(f'{{"policy":{text}}}')
        Policy.load(tmp_path / "p.json")


def test_policy_or_signature_that_stands_twice_in_the_envelope_is_refused(tmp_path):
    for text in (f'{{"policy":{TEXT},"policy":{TEXT}}}', f'{{"policy":null,"policy":{TEXT}}}',
                 f'{{"policy":{TEXT},"signature":null,"signature":null}}'):  # fmt: skip
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(BadPolicyFile, match="a key stands twice"):
            Policy.load(tmp_path / "p.json")


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:24])
def test_number_in_any_spelling_is_read_exactly_or_refused(number, tmp_path):
    """In every place that holds a number; what no double holds exactly as a whole number is refused, not rounded."""
    ways = {
        "serial": '"serial":7', "level of a gate": '"level":0.5', "threshold": '"threshold":2.0',
        "drift": '"drift":0.125', "value of an op": '"value":-2.0',
        "start": '"start":0', "first": '"first":null', "priority": '"priority":null',
        "a latent": '"latents":[3,5]', "calibration": '"n":4000', "schema": '"schema":1', "version": '"version":',
    }  # fmt: skip
    for where, old in ways.items():
        assert old in TEXT, where
        key = old.partition(":")[0]
        new = f"{key}:[3,{number}]" if where == "a latent" else f"{key}:{number}"
        if where == "version":
            new = f'"version":{number},"x":'
        holds(f'{{"policy":{TEXT.replace(old, new)}}}'.encode(), tmp_path / "p.json")


NO_NAMES = (
    "", "..", "../biology", "biology/../biology", "/etc/passwd", "biology\0", "Biology", "b\u0456ology", "*", "%s",
    "biology.policy.json", "x" * 10_000, "\ud800",
)  # fmt: skip


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: ascii(name)[:24])
def test_name_of_no_shipped_policy_is_refused(name):
    with pytest.raises(BadPolicyFile) as caught:
        shipped.load_policy(name)

    assert len(str(caught.value)) < 400


def test_shipped_reader_refuses_what_the_other_one_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    for seed in range(100):
        data = fuzzed(TEXT, seed)
        path = tmp_path / "fuzzed.policy.json"
        expected = holds(data, path)
        path.write_bytes(data)
        try:
            assert shipped.load_policy("fuzzed") == expected
        except SaeguardError:
            assert expected is None


GROSS = {
    "a million brackets": lambda: b"[" * 1_000_000,
    "a million objects": lambda: b'{"a":' * 1_000_000,
    "deep and closed": lambda: b'{"policy":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "gates of gates": lambda: f'{{"policy":{TEXT.replace(GATE, NOT * 10_000 + GATE + "}" * 10_000)}}}'.encode(),
    "one byte too many": lambda: b" " * (policy_file.MAX_BYTES + 1),
    "a long text": lambda: b'{"policy":"' + b"a" * (policy_file.MAX_BYTES - 20) + b'"}',
    "many numbers": lambda: b'{"policy":[' + b"0," * 2_000_000 + b"0]}",
    "many small lists": lambda: b'{"policy":[' + b"[]," * 300_000 + b"0]}",
    "many keys": lambda: b'{"policy":{' + b",".join(b'"%d":0' % n for n in range(300_000)) + b"}}",
    "a long number": lambda: b'{"policy":' + b"9" * 10_000_000 + b"}",
    "a long fraction": lambda: b'{"policy":0.' + b"9" * 10_000_000 + b"}",
    "escapes": lambda: b'{"policy":"' + b"\\u0041" * 3_000_000 + b'"}',
    "a long name": lambda: f'{{"policy":{TEXT.replace("biology", "b" * 5_000_000, 1)}}}'.encode(),
}  # fmt: skip
GATE, NOT = '{"gate":{"evidence"', '{"kind":"not","gate":'


@pytest.mark.parametrize("name", GROSS)
def test_gross_file_is_refused_in_time_and_memory_that_its_size_allows(name, tmp_path):
    (tmp_path / "p.json").write_bytes(GROSS[name]())
    before = time.process_time()
    with pytest.raises(SaeguardError) as caught:
        Policy.load(tmp_path / "p.json")
    took = time.process_time() - before

    assert len(str(caught.value)) < MAX_MESSAGE
    assert took < 8.0


@pytest.mark.parametrize("inner", [b"0", b"[]", b'{"a":0}', b"[[0]]"], ids=bytes.decode)
def test_memory_for_a_gross_file_is_in_proportion_to_its_size(inner, tmp_path):
    (tmp_path / "p.json").write_bytes(b'{"policy":[' + (inner + b",") * 20_000 + b"0]}")
    tracemalloc.start()
    with pytest.raises(SaeguardError):
        Policy.load(tmp_path / "p.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    buffer = policy_file.MAX_BYTES  # that is read at once
    assert peak < buffer + 200 * (tmp_path / "p.json").stat().st_size


# The oracle itself


@pytest.mark.parametrize(("given_text", "found"), [
    ('{"a":1}', {"a": 2}), ('{"a":9007199254740993}', {"a": 9007199254740992.0}), ('{"a":true}', {"a": 1}),
    ('{"a":1}', {"a": True}), ('{"a":[1]}', {"a": [1, 2]}), ('{"a":1}', {}), ('{"a":"1"}', {"a": 1}),
    ('{"a":0.5}', {"a": 0.25}), ('{"a":null}', {"a": 0}), ('{"a":{"b":1}}', {"a": {"b": 3}}),
])  # fmt: skip
def test_oracle_sees_a_policy_that_is_not_what_its_file_says(given_text, found):
    with pytest.raises(AssertionError):
        check_says(json.loads(given_text, parse_float=Decimal), found)


def test_oracle_sees_a_reader_that_takes_the_last_of_two_values(tmp_path, monkeypatch):
    monkeypatch.setattr("saeguard.strict_json._distinct", dict)
    doubled = TEXT.replace('"serial":7', '"serial":7,"serial":8')

    with pytest.raises(AssertionError, match="a key stands twice"):
        holds(f'{{"policy":{doubled}}}'.encode(), tmp_path / "p.json")
