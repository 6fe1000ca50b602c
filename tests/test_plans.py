"""A plan file says the same after a round trip, equal plans have one text, and a broken file gives a named error.

A case is one plan, or one broken text. Files are read as a program would hand them over, so values of wrong types reach
the package's own checks: while such a text is read, the test suite's type checker stands aside.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard import (
    Ablate,
    Add,
    AnyActive,
    AtLeast,
    Clamp,
    ClampAbove,
    Misdirect,
    Plan,
    Project,
    Reduce,
    Rule,
    SaeguardError,
    Scale,
    Site,
)
from saeguard.errors import BadPlanFile, BadRule, EmptyPlan, SiteNotFound, UnknownOp, UnknownSchema
from saeguard.plans import MAX_BYTES, MAX_DEPTH, parse_json
from tests import laws, tiny
from tests.counts import cases

SAES = [tiny.tiny_sae(name=name, d_sae=100_000, d_in=1) for name in ("a", "ä/ö.1", 'quote " and \\ and \n')]
SITES = st.none() | st.builds(Site, st.sampled_from(("resid_pre", "resid_post", "attn_z")), st.integers(0, 99))
FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)

EXAMPLE = Plan(
    (
        Rule("a", (3, 1), Clamp((2.0, -0.5), when="active", unit="max"), site=Site("resid_post", 12), priority=2),
        Rule("a", (7,), Add(1e-9, unit="norm"), trigger=AnyActive((3, 4), 0.25), phase="generated", first=5, stop=9),
        Rule("b", (), Ablate(), start=1, special=True),
        Rule("c", (1,), ClampAbove(-3.0, above=(0.5,), unit="norm"), phase="last"),
        Rule("c", (2, 4), Reduce((1.0, 0.0)), phase="newest", first=3),
        Rule("c", (), Misdirect(0.5, seed=3, unit="norm"), trigger=AnyActive((9,))),
        Rule("d", (5, 6), Project(0.25)),
    ),
    "naïve \u2028 name",
)


@pytest.fixture
def untyped() -> Iterator[None]:
    """As in production, where nothing looks at the annotations."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@st.composite
def plans(draw: Any) -> Plan:
    rule = st.one_of(*(laws.rules(sae, most=8, where=laws.wheres(longest=10**6)) for sae in SAES))
    sited = st.builds(lambda rule, site: replace(rule, site=site), rule, SITES)
    return Plan(laws.compatible(draw(st.lists(sited, min_size=1, max_size=5))), draw(st.text(max_size=8)))


@settings(max_examples=cases(2_000))
@given(plans())
def test_plan_comes_back_from_its_text(plan):
    text = plan.to_json()

    assert Plan.from_json(text) == plan
    assert Plan.from_json(text.encode()) == plan
    assert Plan.from_json(text).to_json() == text
    assert text.isascii()
    assert "\n" not in text


@settings(max_examples=cases(2_000))
@given(FINITE, st.lists(FINITE, min_size=1, max_size=3))
def test_amounts_come_back_to_the_last_bit(one, several):
    ops = (Scale(one), AtLeast(tuple(several)), Clamp(-one, when="always"))
    rules = tuple(Rule(f"sae{i}", tuple(range(len(several))), op) for i, op in enumerate(ops))

    read = Plan.from_json(Plan(rules).to_json())

    assert [repr(rule.op) for rule in read.rules] == [repr(op) for op in ops]  # repr tells -0.0 from 0.0


def test_plan_comes_back_from_its_file(tmp_path):
    EXAMPLE.save(tmp_path / "plan.json")

    assert Plan.load(tmp_path / "plan.json") == EXAMPLE


@pytest.mark.usefixtures("untyped")
def test_equal_plans_have_one_text_however_they_were_written():
    a = Plan([Rule("a", [1, 2], Clamp(2, when="always"), site="blocks.3.hook_resid_post")])  # type: ignore[arg-type]
    b = Plan((Rule("a", (1, 2), Clamp(2.0, when="always"), site=Site("resid_post", 3)),))

    assert a == b
    assert a.to_json() == b.to_json()
    assert a.fingerprint() == b.fingerprint()


def test_canonical_text_has_sorted_keys_and_no_spaces():
    """Written out, because signatures of saved plans depend on every byte of it."""
    assert Plan((Rule("a", (3, 1), Add(2.0)),), "n").to_json() == (
        '{"name":"n","rules":[{"first":null,"latents":[3,1],"op":{"amount":2.0,"kind":"add","unit":"activation"},'
        '"phase":"all","priority":null,"sae":"a","site":null,"special":false,"start":0,"stop":null,"trigger":null}],'
        '"saeguard":"plan","schema":1}'
    )


@pytest.mark.usefixtures("untyped")
def test_text_by_hand_may_leave_out_defaults_and_write_whole_numbers():
    rule = '{"sae": "a", "latents": [1], "op": {"kind": "scale", "factor": 2}}'
    text = f'{{"saeguard": "plan", "schema": 1, "rules": [{rule}]}}'

    assert Plan.from_json(text) == Plan((Rule("a", (1,), Scale(2.0)),))


@settings(max_examples=cases(2_000))
@given(plans(), st.integers(0, 2**30))
def test_fingerprint_forgets_order_name_and_layout_and_nothing_else(plan, seed):
    rng = random.Random(seed)
    shuffled = Plan(tuple(rng.sample(plan.rules, len(plan.rules))), "another name")
    spaced = Plan.from_json(json.dumps(json.loads(plan.to_json()), indent=3, ensure_ascii=False))
    rule = plan.rules[0]
    others = (
        replace(rule, sae=rule.sae + "x"), replace(rule, special=not rule.special),
        replace(rule, start=rule.start + 1, stop=None),
        replace(rule, site=Site("mlp_in", 3)),
        rule if rule.is_dense else replace(rule, priority=(rule.priority or 0) + 100),
        replace(rule, trigger=AnyActive((100_001,))), replace(rule, first=(rule.first or 0) + 1),
    )  # fmt: skip

    assert plan.fingerprint() == shuffled.fingerprint() == spaced.fingerprint()
    for other in (other for other in others if other != rule):
        assert Plan((other, *laws.compatible(plan.rules[1:]))).fingerprint() != plan.fingerprint()


def test_text_cut_off_at_every_byte_is_refused():
    """Also inside a character of several bytes."""
    text = json.dumps(json.loads(EXAMPLE.to_json()), ensure_ascii=False).encode()

    for end in range(len(text)):
        with pytest.raises(BadPlanFile, match="it is not JSON"):
            Plan.from_json(text[:end])


@pytest.mark.usefixtures("untyped")
@settings(max_examples=cases(20_000))
@given(st.data())
def test_any_value_in_any_place_gives_a_plan_or_a_documented_error(data):
    document = json.loads(EXAMPLE.to_json())
    where = data.draw(st.sampled_from(list(places(document))))
    node = document
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = data.draw(JSON)
    text = json.dumps(document)

    try:
        plan = Plan.from_json(text)
    except SaeguardError:
        return
    assert Plan.from_json(plan.to_json()) == plan


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


@pytest.mark.usefixtures("untyped")
@settings(max_examples=cases(20_000))
@given(st.binary(max_size=40) | st.text(max_size=40) | JSON.map(json.dumps))
def test_any_text_gives_a_documented_error(text):
    with pytest.raises(SaeguardError):
        Plan.from_json(text)


@pytest.mark.usefixtures("untyped")
@settings(max_examples=cases(10_000))
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_any_changed_byte_gives_a_plan_or_a_documented_error(place, byte):
    text = bytearray(EXAMPLE.to_json().encode())
    text[place % len(text)] = byte

    try:
        plan = Plan.from_json(bytes(text))
    except SaeguardError:
        return
    assert Plan.from_json(plan.to_json()) == plan


def changed(**values: Any) -> str:
    document = json.loads(Plan((Rule("a", (1,), Scale(2.0)),)).to_json())
    return json.dumps(document | values)


def changed_rule(**values: Any) -> str:
    document = json.loads(Plan((Rule("a", (1,), Scale(2.0)),)).to_json())
    return json.dumps(document | {"rules": [document["rules"][0] | values]})


REFUSED = {
    "newer schema": (changed(schema=2), UnknownSchema, "a plan of schema 2"),
    "schema true": (changed(schema=True), UnknownSchema, "a plan of schema True"),
    "schema 1.0": (changed(schema=1.0), UnknownSchema, r"a plan of schema 1\.0"),
    "no schema": (changed(schema=None), UnknownSchema, "a plan of schema None"),
    "another document": (changed(saeguard="run"), BadPlanFile, "is missing"),
    "unknown key": (changed(author="me"), BadPlanFile, r"unknown keys \['author'\]"),
    "unknown key of a rule": (changed_rule(strength=1), BadPlanFile, r"unknown keys \['strength'\]"),
    "no rules": (changed(rules=[]), EmptyPlan, "it has no rules"),
    "unknown op": (changed_rule(op={"kind": "swap"}), UnknownOp, "op 'swap'"),
    "unknown trigger": (changed_rule(trigger={"kind": "rate"}), UnknownOp, "trigger 'rate'"),
    "op without its amount": (changed_rule(op={"kind": "add"}), BadPlanFile, "missing 1 required"),
    "op of another's fields": (changed_rule(op={"kind": "ablate", "value": 1.0}), BadPlanFile, "unknown keys .*value"),
    "NaN": (changed_rule(op={"kind": "add", "amount": float("nan")}), BadPlanFile, "NaN is not a number"),
    "infinity": (changed_rule(op={"kind": "add", "amount": float("inf")}), BadPlanFile, "Infinity is not a number"),
    "overflow": (changed_rule(op={"kind": "add", "amount": "X"}).replace('"X"', "1e999"), BadRule, "inf is not a"),
    "huge whole amount": (changed_rule(op={"kind": "add", "amount": 10**400}), BadRule, "0000 is not a finite number"),
    "huge position": (changed_rule(start=2**63), BadRule, "that is not a count of tokens"),
    "op of no name": (changed_rule(op={"kind": ["add"]}), UnknownOp, r"op \['add'\]"),
    "key twice": ('{"saeguard":"plan","saeguard":"plan","schema":1,"rules":[]}', BadPlanFile, "a key stands twice"),
    "negative latent": (changed_rule(latents=[-1]), BadRule, "-1 is not a latent"),
    "latent twice": (changed_rule(latents=[4, 4]), BadRule, r"\[4\] are there more than once"),
    "latents of floats": (changed_rule(latents=[1.0]), BadRule, r"1\.0 is not a latent"),
    "unknown stream": (changed_rule(site="resid.3"), SiteNotFound, "'resid' is not a stream"),
    "unknown phase": (changed_rule(phase="decode"), BadRule, "phase 'decode'"),
    "empty": ("", BadPlanFile, "it is not JSON"),
    "two documents": (changed() * 2, BadPlanFile, "it is not JSON"),
    "not UTF-8": (b'{"\xff": 1}', BadPlanFile, "it is not JSON"),
    "depth": ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), BadPlanFile, f"nests deeper than {MAX_DEPTH}"),
    "great depth": ("[" * 200_000, BadPlanFile, "it is not JSON"),
    "size": (" " * (MAX_BYTES + 1), BadPlanFile, f"it is larger than {MAX_BYTES} bytes"),
    "long number": (changed_rule(start="X").replace('"X"', "1" * 5000), BadPlanFile, "it is not JSON"),
}  # fmt: skip


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", REFUSED)
def test_bad_text_is_refused_by_name(name):
    text, error, message = REFUSED[name]

    with pytest.raises(error, match=message):
        Plan.from_json(text)


def test_limits_are_what_they_say():
    at_the_limit = "[" * MAX_DEPTH + "]" * MAX_DEPTH

    assert parse_json(at_the_limit) is not None
    assert parse_json("1" + " " * (MAX_BYTES - 1)) == 1
