"""A policy says the same after a round trip, is for one model only, and no file is half read.

Documents are read as a program would hand them over, so values of wrong types reach the package's own checks: while
they are, the test suite's type checker stands aside.
"""

import copy
import hashlib
import json
import pickle
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from saeguard import Ablate, Plan, Rule, SaeguardError, Site, gates, load_model, load_sae
from saeguard.cli import app
from saeguard.dense import DENSE_OPS
from saeguard.errors import AmbiguousSAE, BadPolicy, BadPolicyFile, BadRule, MetaDevice, PolicyMismatch, StalePolicy
from saeguard.fingerprints import config_fingerprint, model_fingerprint, tokenizer_fingerprint
from saeguard.gates import Always, Hits, Not, Peak, Watch
from saeguard.guarding import figures, policy_file
from saeguard.guarding.policy import Policy
from saeguard.guarding.stops import MAX_TEXT, Halt, Refuse
from saeguard.loaders import shipped
from saeguard.ops import OPS
from tests import policies as made
from tests import tiny
from tests.counts import cases
from tests.policies import GATE, TEXT, example, shifted_sae
from tests.words import save_described_sae, save_model, word_tokenizer

EXAMPLE = example()
DOCUMENT = json.loads(EXAMPLE.to_json())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
SEEN: dict[str, str] = {}


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


def changed(*path: Any, to: Any) -> str:
    """The example's text with another value at one place."""
    document = copy.deepcopy(DOCUMENT)
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = to
    return json.dumps(document)


def changed_model(key: str, value: Any) -> Any:
    model = tiny.fresh_model()
    setattr(model.config, key, value)
    return model


# Round trips


@pytest.mark.usefixtures("without_type_checks")
@settings(max_examples=cases(5_000))
@given(made.policies(), st.integers(0, 2**30))
def test_policy_comes_back_from_its_text_and_no_two_have_one_fingerprint(policy, seed):
    text, rng = policy.to_json(), random.Random(seed)
    turned = json.loads(text, object_pairs_hook=lambda pairs: dict(rng.sample(pairs, len(pairs))))
    relaid = json.dumps(turned, indent=rng.choice((None, 1, 3)), ensure_ascii=False)

    assert text.isascii()
    assert Policy.from_json(text).to_json() == text
    assert Policy.from_json(relaid) == policy
    assert Policy.from_json(relaid).fingerprint() == policy.fingerprint() == hashlib.sha256(text.encode()).hexdigest()
    assert SEEN.setdefault(policy.fingerprint(), text) == text


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("kind", gates.GATES)
@settings(max_examples=cases(400))
@given(st.data())
def test_every_kind_of_gate_comes_back_from_a_rule_and_from_a_stop(kind, data):
    gate = data.draw(made.GATES[kind])
    read = Policy.from_json(made.with_gate(gate).to_json())

    assert repr(read.plan.rules[0].gate) == repr(gate)  # repr tells -0.0 from 0.0
    assert repr(read.refusals[0].gate) == repr(gate)


def test_every_kind_of_evidence_pool_and_op_is_among_the_random_ones():
    """A kind that is added has to be added to the strategies as well, or nobody would try it."""
    assert set(made.GATES) == set(gates.GATES)
    assert set(made.EVIDENCE) == set(gates.EVIDENCE)
    assert set(made.POOLS) == set(gates.POOLS)
    assert set(OPS) == {"clamp", "clamp_above", "scale", "add", "reduce", "ablate", "at_least", "at_most"}
    assert set(DENSE_OPS) == {"splice", "reweight", "misdirect", "project"}


@pytest.mark.usefixtures("without_type_checks")
def test_every_change_of_meaning_changes_the_fingerprint():
    other: dict[type, Any] = {str: lambda v: v + "x", int: lambda v: v + 1, float: lambda v: v + 0.5,
                              bool: lambda v: not v, type(None): lambda _: 1}  # fmt: skip
    found, n = {EXAMPLE.fingerprint()}, 1
    for path in places(DOCUMENT):
        value = DOCUMENT
        for key in path:
            value = value[key]
        if isinstance(value, dict | list):
            continue
        try:
            policy = Policy.from_json(changed(*path, to=other[type(value)](value)))
        except SaeguardError:
            continue
        found.add(policy.fingerprint())
        n += 1

    assert len(found) == n > 15


def test_policy_comes_back_from_its_file_copy_and_pickle(tmp_path):
    EXAMPLE.save(tmp_path / "p.json")

    assert Policy.load(tmp_path / "p.json") == EXAMPLE
    assert copy.deepcopy(EXAMPLE) == pickle.loads(pickle.dumps(EXAMPLE)) == EXAMPLE
    assert len({EXAMPLE, copy.copy(EXAMPLE)}) == 1
    assert example(serial=8) != EXAMPLE
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_file_laid_out_by_hand_is_read_and_says_the_same(tmp_path):
    by_hand = {"policy": {key: DOCUMENT[key] for key in reversed(DOCUMENT)}}
    del by_hand["policy"]["on_error"]
    (tmp_path / "p.json").write_text(json.dumps(by_hand, indent=4))

    assert Policy.load(tmp_path / "p.json").fingerprint() == EXAMPLE.fingerprint()
    assert EXAMPLE.on_error == "refuse"


def test_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    EXAMPLE.save(tmp_path / "p.json")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))

    with pytest.raises(OSError, match="No space"):
        example(serial=8).save(tmp_path / "p.json")
    assert Policy.load(tmp_path / "p.json") == EXAMPLE
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_older_serial_than_demanded_is_refused(tmp_path):
    EXAMPLE.save(tmp_path / "p.json")

    assert Policy.load(tmp_path / "p.json", at_least=7) == EXAMPLE
    with pytest.raises(StalePolicy, match="of serial 7: at least 8 is demanded"):
        Policy.load(tmp_path / "p.json", at_least=8)


# Fields


REFUSED = {
    "no name": ({"name": ""}, "the name of a policy: it is 0 characters"),
    "a name with a bell": ({"name": "a\x07"}, "it holds a control character"),
    "a way to fail that is none": ({"on_error": "allow"}, 'Use "refuse" or "bypass"'),
    "a negative serial": ({"serial": -1}, "it is not a whole number from 0"),
    "a serial of true": ({"serial": True}, "it is not a whole number from 0"),
    "a tokenizer that is no hash": ({"tokenizer": "f" * 63}, "the tokenizer of a policy: it is not a SHA-256"),
    "nothing to do": ({"plan": None, "refusals": ()}, "it has neither a plan nor a refusal"),
    "an SAE that is not there": ({"saes": ()}, "it names tiny, which is none of its SAEs. Its SAEs: none"),
    "an SAE twice": ({"saes": EXAMPLE.saes * 2}, "it has two SAEs of one name"),
    "one reason twice": ({"refusals": EXAMPLE.refusals * 2}, "two refusals have one reason"),
    "an SAE of a leaf that is not there": (
        {"refusals": (Halt(Watch(Hits((1,), sae="b"), Peak(), 0.0), "tiny", None, "r"),)}, "it names b, which is none",
    ),
    "an SAE of a rule's gate that is not there": (
        {"plan": Plan((Rule("tiny", (), Ablate(), gate=Not(Watch(Hits((1,), sae="b"), Peak(), 0.0))),))}, "it names b",
    ),
    "calibration with NaN": ({"calibration": {"x": [float("nan")]}}, "it holds nan"),
    "calibration with infinity": ({"calibration": {"x": float("-inf")}}, "it holds -inf"),
    "calibration with bytes": ({"calibration": {"x": b"1"}}, "it holds bytes"),
    "calibration with a tensor": ({"calibration": {"x": torch.ones(1)}}, "it holds Tensor"),
    "calibration with a name that is none": ({"calibration": {1: 2}}, "a name in a policy's calibration: it is int"),
    "calibration with a long text": ({"calibration": {"x": "x" * 2001}}, "it is 2,001 characters"),
    "calibration with a huge number": ({"calibration": {"x": 2**53 + 1}}, "whole ones up to 2^53"),
    "calibration that is deep": ({"calibration": {"x": [[[[[[1]]]]]]}}, "it nests deeper than 6 levels"),
    "calibration that is long": ({"calibration": {"x": [0] * 10_000}}, "it has more than 10,000 values"),
    "calibration that is a list": ({"calibration": [1]}, "it is list, not a mapping"),
    "a plan that is none": ({"plan": "steer"}, "its plan no Plan"),
    "a refusal that is none": ({"refusals": ("no",)}, "they are not a tuple of Refuse or Halt"),
}  # fmt: skip


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", REFUSED)
def test_field_out_of_its_domain_is_refused(name):
    changes, message = REFUSED[name]

    with pytest.raises(BadPolicy) as caught:
        example(**changes)
    assert message in str(caught.value)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text": ""}, BadPolicy, "Give a string of 1 to 2,000 characters"),
        ({"text": "x" * (MAX_TEXT + 1)}, BadPolicy, "it is 2,001 characters"),
        ({"text": "\x1b[2J"}, BadPolicy, "it holds a control character"),
        ({"text": "\ud800"}, BadPolicy, "it holds half of a surrogate pair"),
        ({"text": None}, BadPolicy, "it is NoneType"),
        ({"reason": "no reason"}, BadPolicy, "it is not 1 to 128 letters"),
        ({"sae": None}, BadPolicy, "that names no SAE"),
        ({"site": 3}, BadPolicy, "that is not a site"),
        ({"gate": "always"}, BadRule, "that is not a gate"),
        ({"gate": None}, BadRule, "that is not a gate"),
    ],
)
def test_refusal_out_of_its_domain_is_refused(changes, error, message):
    with pytest.raises(error) as caught:
        Refuse(**({"gate": GATE, "sae": "tiny", "site": None, "text": TEXT, "reason": "r"} | changes))
    assert message in str(caught.value)


@pytest.mark.usefixtures("without_type_checks")
def test_longest_refusal_and_line_ends_pass():
    assert Refuse(GATE, "tiny", None, "\n\t" + "é" * (MAX_TEXT - 2), "r").text.startswith("\n")
    assert Refuse(GATE, "tiny", "blocks.3.hook_resid_post", TEXT, "r").site == Site("resid_post", 3)  # type: ignore


def test_calibration_is_a_copy_that_cannot_be_changed():
    given = {"levels": [0.01], "data": {"n": 3}}
    policy = example(calibration=given)
    given["levels"].append(0.5)

    assert figures.thawed(policy.calibration) == {"data": {"n": 3}, "levels": [0.01]}
    with pytest.raises(TypeError):
        policy.calibration["x"] = 1  # type: ignore[index]
    with pytest.raises(TypeError):
        policy.calibration["data"]["n"] = 4


# Hostile files


@pytest.mark.usefixtures("without_type_checks")
@settings(max_examples=cases(20_000))
@given(st.sampled_from(list(places(DOCUMENT))), JSON)
def test_any_value_in_any_place_gives_a_policy_or_the_documented_error(path, value):
    try:
        policy = Policy.from_json(changed(*path, to=value))
    except BadPolicyFile:
        return
    assert Policy.from_json(policy.to_json()) == policy


@pytest.mark.usefixtures("without_type_checks")
@settings(max_examples=cases(20_000))
@given(st.text(max_size=40) | JSON.map(json.dumps))
def test_any_text_gives_the_documented_error(text):
    with pytest.raises(BadPolicyFile):
        Policy.from_json(text)


HOSTILE: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "it is not JSON"),
    "not UTF-8": (b'{"\xff": 1}', "it is not UTF-8"),
    "UTF-16": (f'{{"policy":{EXAMPLE.to_json()}}}'.encode("utf-16"), "it is not UTF-8"),
    "a list": ("[]", "it is not a JSON object"),
    "no policy": ("{}", "missing keys ['policy']"),
    "another key": (f'{{"policy":{EXAMPLE.to_json()},"note":1}}', "unknown keys ['note']"),
    "two policies": (f'{{"policy":{EXAMPLE.to_json()},"policy":{EXAMPLE.to_json()}}}', "a key stands twice"),
    "two documents": (f'{{"policy":{EXAMPLE.to_json()}}}{{}}', "it is not JSON"),
    "a plan": (f'{{"policy":{Plan((Rule("a", (1,), Ablate()),)).to_json()}}}', 'the key "saeguard": "policy"'),
    "great depth": ('{"policy":' + "[" * 200_000, "it nests too deep"),
    "depth": ('{"policy":' + "[" * 30 + "]" * 30 + "}", "it nests deeper than"),
    "NaN": ('{"policy":{"serial":NaN}}', "NaN is not a number"),
    "overflow": ('{"policy":{"serial":1e999}}', "a number in it is not finite"),
    "long number": ('{"policy":{"serial":' + "1" * 5000 + "}}", "it is not JSON"),
    "newer schema": ('{"policy":{"saeguard":"policy","schema":2}}', "this version of saeguard reads 1"),
    "schema of true": ('{"policy":{"saeguard":"policy","schema":true}}', "its schema is True"),
    "fields missing": ('{"policy":{"saeguard":"policy","schema":1}}', "missing keys ['model', 'name', 'saes'"),
    "size": (b"[" * (policy_file.MAX_BYTES + 1), "it is larger than 20,000,000 bytes"),
}  # fmt: skip


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_by_name(name, tmp_path):
    content, message = HOSTILE[name]
    (tmp_path / "p.json").write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(BadPolicyFile) as caught:
        Policy.load(tmp_path / "p.json")
    assert message in str(caught.value)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("strength",), 1, "unknown keys ['strength']"),
        (("on_error",), "allow", 'Use "refuse" or "bypass"'),
        (("refusals", 0, "kind"), "warn", "a refusal is of the kind 'warn'. Kinds: refuse, halt"),
        (("refusals", 0, "gate", "kind"), "open", "gate 'open'"),
        (("refusals", 0, "note"), 1, "unknown keys ['note']"),
        (("plan", "rules", 0, "op", "kind"), "swap", "op 'swap'"),
        (("plan", "rules"), [], "it has no rules"),
        (("saes", "tiny", "site"), "resid.3", "'resid' is not a stream"),
        (("saes", "tiny", "path"), "/etc", "unknown keys ['path']"),
        (("saes",), [], "its saes are no object"),
        (("model", "weights"), "A" * 64, "it is not a SHA-256"),
        (("calibration",), None, "it is NoneType, not a mapping"),
        (("name",), None, "the name of a policy: it is NoneType"),
    ],
)
def test_bad_field_of_a_file_is_named(path, value, message):
    with pytest.raises(BadPolicyFile) as caught:
        Policy.from_json(changed(*path, to=value))
    assert message in str(caught.value)


def test_file_cut_off_at_every_byte_is_refused(tmp_path):
    EXAMPLE.save(tmp_path / "p.json")
    whole = (tmp_path / "p.json").read_bytes()
    for end in range(len(whole) - 1):  # the line end says nothing
        (tmp_path / "p.json").write_bytes(whole[:end])
        with pytest.raises(BadPolicyFile):
            Policy.load(tmp_path / "p.json")


# What it was made for


def test_policy_stands_on_what_it_was_made_with():
    EXAMPLE.check(tiny.fresh_model(), word_tokenizer(), tiny.tiny_sae())
    EXAMPLE.check(tiny.tiny_model(), word_tokenizer(), [tiny.tiny_sae(), tiny.tiny_sae(seed=1, name="another")])


def nudged(model: Any) -> Any:
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] += 2**-12
    return model


def with_word(word: str) -> Any:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([word])
    return tokenizer


def with_template(text: str) -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


MISMATCHES = {
    "one weight": ({"model": lambda: nudged(tiny.fresh_model())}, "the model's weights are not those of tiny"),
    "another seed": ({"model": lambda: tiny.fresh_model(seed=1)}, "the model's weights are not those of tiny"),
    "another dtype": ({"model": lambda: tiny.fresh_model(dtype=torch.bfloat16)}, "weights are not those of tiny"),
    "another epsilon": ({"model": lambda: changed_model("rms_norm_eps", 1e-5)}, "the model's configuration (heads,"),
    "another rotary base": (
        {"model": lambda: changed_model("rope_parameters", {"rope_theta": 5e5, "rope_type": "default"})},
        "the model's configuration (heads,",
    ),
    "another activation": ({"model": lambda: changed_model("hidden_act", "gelu")}, "the model's configuration (heads,"),
    "a word more": ({"tokenizer": lambda: with_word("new")}, "the tokenizer is another one"),
    "another chat template": ({"tokenizer": lambda: with_template("{{ messages }}")}, "the tokenizer is another one"),
    "no SAE": ({"saes": dict}, "SAE tiny is not there"),
    "one SAE weight": ({"saes": shifted_sae}, "SAE tiny is not the one that the policy was made with"),
    "SAE at another site": ({"saes": lambda: shifted_sae(site=Site("resid_post", 2))},
                            "SAE tiny is at resid_post.2, not at resid_post.1"),
    "SAE without a site": ({"saes": lambda: shifted_sae(site=None)}, "SAE tiny is at None, not at resid_post.1"),
    "SAE of another kind": ({"saes": lambda: tiny.tiny_sae(activation="relu")}, "SAE tiny is not the one"),
    "some latents of the SAE": ({"saes": lambda: tiny.tiny_sae().narrow([3, 5])},
                                "(only 2 of its 48 latents were read)"),
}  # fmt: skip


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", MISMATCHES)
def test_policy_is_refused_on_anything_else_and_says_what_differs(name):
    changes, message = MISMATCHES[name]
    live: dict[str, Any] = {"model": tiny.fresh_model, "tokenizer": word_tokenizer, "saes": tiny.tiny_sae}
    found = {what: build() for what, build in (live | changes).items()}

    with pytest.raises(PolicyMismatch) as caught:
        EXAMPLE.check(**found)
    assert message in str(caught.value)
    assert caught.value.found.count(";") == 0


def test_all_that_differs_is_named_at_once():
    with pytest.raises(PolicyMismatch) as caught:
        EXAMPLE.check(tiny.fresh_model(seed=1), with_word("new"), shifted_sae())

    assert [part.split()[:2] for part in caught.value.found.split("; ")] == [
        ["the", "model's"], ["the", "tokenizer"], ["SAE", "tiny"],
    ]  # fmt: skip


def test_fingerprints_forget_names_places_and_what_a_call_may_change(tmp_path):
    model, tokenizer = tiny.fresh_model(), word_tokenizer()
    before = model_fingerprint(model), config_fingerprint(model), tokenizer_fingerprint(tokenizer)
    model.config._name_or_path, model.config.use_cache, model.config.attention_dropout = "elsewhere", False, 0.5
    model.config.note_of_somebody = "not known to the class"
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 10_000}
    model.requires_grad_(False)
    tokenizer(["w5", "w6 w7"], padding=True, truncation=True, max_length=3)
    save_model(tmp_path)
    loaded = load_model(str(tmp_path))

    assert (model_fingerprint(model), config_fingerprint(model), tokenizer_fingerprint(tokenizer)) == before
    assert (model_fingerprint(loaded[0]), config_fingerprint(loaded[0]), tokenizer_fingerprint(loaded[1])) == before


def test_special_token_that_becomes_another_changes_the_tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "w5"

    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(word_tokenizer())


def test_tokenizer_whose_code_decides_has_no_fingerprint():
    with pytest.raises(BadPolicy, match=r"it is not a fast tokenizer.*AutoTokenizer"):
        EXAMPLE.check(tiny.tiny_model(), SimpleNamespace(), tiny.tiny_sae())


def test_model_without_numbers_has_no_fingerprint():
    with pytest.raises(MetaDevice, match="has no numbers"):
        model_fingerprint(copy.deepcopy(tiny.tiny_model()).to("meta"))


def test_sae_without_a_site_cannot_be_pinned_and_two_of_a_name_are_refused():
    plan = Plan((Rule("tiny", (1,), Ablate()),))
    with pytest.raises(BadPolicy, match="it does not say which stream it reads"):
        Policy.of(tiny.tiny_model(), word_tokenizer(), shifted_sae(site=None), plan, name="x")
    with pytest.raises(AmbiguousSAE, match="two different ones"):
        Policy.of(tiny.tiny_model(), word_tokenizer(), [tiny.tiny_sae(), shifted_sae()], plan, name="x")


def test_policy_of_the_demo_model_stands_on_it_and_not_on_its_neighbour(tmp_path):
    model, tokenizer = load_model("smollm2-135m-instruct")
    names = [name for name in shipped() if name.startswith("smollm2-135m-instruct")]
    sae, other = (load_sae(name) for name in names[:2])
    policy = Policy.of(
        model, tokenizer, sae, Plan((Rule(sae.name, (1,), Ablate(), gate=Always()),)), name="demo",
        refusals=[Halt(Watch(Hits((1, 2)), Peak(), 1.0), sae.name, None, "demo.gate")],
    )  # fmt: skip
    policy.save(tmp_path / "p.json")
    read = Policy.load(tmp_path / "p.json")

    read.check(model, tokenizer, [sae, other])
    with pytest.raises(PolicyMismatch, match=f"SAE {sae.name} is at {other.site}, not at {sae.site}"):
        read.check(model, tokenizer, {sae.name: other})
    with torch.no_grad():
        weight = model.model.layers[7].self_attn.q_proj.weight
        old = weight[3, 3].clone()
        weight[3, 3] += 0.01
        try:
            with pytest.raises(PolicyMismatch, match="the model's weights are not those of smollm2-135m-instruct"):
                read.check(model, tokenizer, sae)
        finally:
            weight[3, 3] = old
    read.check(model, tokenizer, sae)


# On the command line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an SAE and a policy for both."""
    folder = tmp_path_factory.mktemp("policy")
    save_model(folder / "model")
    sae = replace(save_described_sae(folder / "sae"), name="tiny")
    model, tokenizer = load_model(str(folder / "model"))
    Policy.of(
        model, tokenizer, sae, EXAMPLE.plan, name="bio [red]logy[/]", refusals=EXAMPLE.refusals,
        sources={"tiny": str(folder / "sae")}, calibration={"level": 0.01},
    ).save(folder / "p.json")  # fmt: skip
    return folder


def run(*arguments: Any, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["policy", *map(str, arguments)], env={"COLUMNS": "300"})
    assert result.exit_code == status, result.output + result.stderr
    return result.stdout + result.stderr


def test_show_says_what_a_policy_does_and_for_what(place):
    text = run("show", place / "p.json")
    found = json.loads(run("show", place / "p.json", "--json"))

    assert "bio [red]logy[/], serial 0" in text
    assert TEXT in text
    assert "no signature" in text
    assert "When the guard fails: refuse." in text
    assert found["fingerprint"] == Policy.load(place / "p.json").fingerprint()
    assert found["signer"] is None
    assert found["policy"]["calibration"] == {"level": 0.01}


def test_show_of_what_is_no_policy_is_one_line_and_status_2(tmp_path):
    (tmp_path / "p.json").write_text("{")
    text = run("show", tmp_path / "p.json", status=2)

    assert text.startswith("error BadPolicyFile: a policy file: it is not JSON")
    assert "Traceback" not in text


def test_keys_are_made_a_policy_signed_and_verified_on_its_model(place, tmp_path):
    run("keygen", tmp_path / "release.key")
    signed = json.loads(
        run("sign", place / "p.json", "--key", tmp_path / "release.key", "--serial", 3, "--out", tmp_path / "s.json",
            "--json")
    )  # fmt: skip
    verify = ("verify", tmp_path / "s.json", "--signed-by", tmp_path / "release.key.pub")
    found = json.loads(run(*verify, "--model", place / "model", "--at-least", 3, "--json"))

    assert found == {"ok": True, "why": None, "model_checked": True, "name": "bio [red]logy[/]", "serial": 3,
                     "fingerprint": signed["fingerprint"]}  # fmt: skip
    assert "policy bio [red]logy[/] of serial 3 is what was signed" in run(*verify)
    assert f"signature by {signed['signer']}, not verified" in run("show", tmp_path / "s.json")
    assert "StalePolicy" in run(*verify, "--at-least", 4, status=1)
    assert "BadSignature" in run("verify", place / "p.json", *verify[2:], status=1)


def test_verify_on_another_model_is_status_1_and_says_what_differs(place, tmp_path):
    run("keygen", tmp_path / "k")
    run("sign", place / "p.json", "--key", tmp_path / "k", "--out", tmp_path / "s.json")
    tiny.fresh_model(seed=3).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    verify = ("verify", tmp_path / "s.json", "--signed-by", tmp_path / "k.pub", "--model", tmp_path / "model")

    assert "the model's weights are not those of model" in run(*verify, status=1)
    assert json.loads(run(*verify, "--json", status=1))["why"]["error"] == "PolicyMismatch"


def test_keys_are_not_replaced_and_a_wrong_key_is_status_2(place, tmp_path):
    run("keygen", tmp_path / "k")
    before = (tmp_path / "k").read_bytes()

    assert "there is a file already" in run("keygen", tmp_path / "k", status=2)
    assert (tmp_path / "k").read_bytes() == before
    assert "BadSigningKey" in run("verify", place / "p.json", "--signed-by", tmp_path / "k", status=2)
    assert "BadSigningKey" in run("sign", place / "p.json", "--key", tmp_path / "k.pub", status=2)
