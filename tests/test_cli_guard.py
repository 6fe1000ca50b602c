"""``saeguard guard fit`` makes a policy that fires on the topic and keeps its promise on rows that it never saw."""

import json
import random

import pytest
import torch
from typer.testing import CliRunner

from saeguard.cli import app
from saeguard.guarding.calibrating import interval
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy
from saeguard.loaders import load_sae
from saeguard.models import load_model
from saeguard.training.gate_rows import question_rows
from tests import words
from tests.test_cli import flat, run
from tests.test_gate_training import planted, text_about

TOPICS = ("planted", "other0", "other1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, an SAE, text of three topics and questions about them."""
    folder = tmp_path_factory.mktemp("guard")
    words.save_model(folder / "model")
    words.save_described_sae(folder / "sae")
    draw = random.Random(0)
    for topic in TOPICS:
        rows = [{"text": "\n\n".join(text_about(topic, draw) + "." for _ in range(12))} for _ in range(8)]
        (folder / f"{topic}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"question": one.text, "topic": one.topic} for one in planted(360, seed=5)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    return folder


def arguments(place, target, *more):
    texts = [f"{topic}={place / topic}.jsonl" for topic in TOPICS]
    return (
        "guard", "fit", "--forget", texts[0], "--retain", texts[1], "--retain", texts[2],
        "--questions", place / "q.jsonl", "--forget-topic", "planted", "--sae", place / "sae",
        "--model", place / "model", "--passages", 3, "--level", 0.03, "--top", 2, "--out", target, *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    target = tmp_path_factory.mktemp("made") / "planted.policy.json"
    return target, run(*arguments(place, target))


def test_policy_holds_the_gate_the_latents_and_what_was_measured(place, made):
    target, said = made
    policy, document = Policy.load(target), json.loads(target.with_name("planted.fit.json").read_text())

    (rule,) = policy.plan.rules
    assert (rule.op.value, rule.op.unit, len(rule.latents)) == (-1.0, "norm", 2)
    assert list(rule.latents) == document["latents"]
    assert policy.calibration["method"] == "certain"
    assert len(policy.calibration["data"]) == 64
    assert policy.calibration["fit"]["topic"] == "planted"
    assert policy.calibration["questions"]["forget"]["share"] > 0.7
    assert policy.calibration["questions"]["retain"]["share"] <= 0.03
    assert document["policy"] == {
        "file": str(target), "fingerprint": policy.fingerprint(), "bytes": target.stat().st_size
    }  # fmt: skip
    recall = [one["recall"] for one in document["frontier"]]
    assert recall == sorted(recall)
    assert document["cost"]["peak_memory_mb"] > 0
    shown = flat(said.output)
    assert "planted forget plain 120" in shown
    assert "What other thresholds would do" in shown


def test_promised_rate_holds_on_rows_that_it_never_saw(place, made):
    """Through the guardrail, in one batch with others: what was calibrated is what is deployed."""
    model, tokenizer = load_model(str(place / "model"))
    fresh = planted(300, seed=77)
    rows = question_rows(fresh, tokenizer)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row.ids) for row in rows])[:, None]
    sae = load_sae(str(place / "sae"))

    with Guardrail.attach(model, Policy.load(made[0]), tokenizer=tokenizer, saes=sae) as guard, torch.no_grad():
        with guard.rows(n=len(rows), measuring=True) as table:
            model(input_ids=ids, attention_mask=mask.long())
        fired = [one.gate for one in guard.opened(table)]

    on = [hit for hit, question in zip(fired, fresh, strict=True) if question.topic == "planted"]
    off = [hit for hit, question in zip(fired, fresh, strict=True) if question.topic != "planted"]
    assert sum(on) / len(on) > 0.7
    assert interval(sum(off), len(off))[0] <= 0.03


def test_command_that_was_interrupted_makes_the_same_policy(place, tmp_path):
    target, both = tmp_path / "planted.policy.json", ("--evidence", "both", "--checkpoint", tmp_path / "work")
    run(*arguments(place, target, *both))
    first = target.read_bytes()
    target.unlink()
    (sorted((tmp_path / "work" / "latents").glob("*.safetensors"))[-1]).unlink()

    run(*arguments(place, target, *both))

    assert target.read_bytes() == first


def test_same_command_makes_the_same_policy_of_words(place, made, tmp_path):
    run(*arguments(place, tmp_path / "planted.policy.json"))

    assert (tmp_path / "planted.policy.json").read_bytes() == made[0].read_bytes()


def test_json_is_the_document_that_is_written(place, tmp_path):
    target = tmp_path / "p.json"

    said = run(*arguments(place, target, "--json", "--floor", 0, "--neighbour", "other1", "--weigh",
                          "other1=2", "--method", "conformal", "--name", "mine"))  # fmt: skip

    document = json.loads(said.stdout)
    assert document == json.loads((tmp_path / "p.fit.json").read_text())
    assert document["calibration"]["topics"]["other1"]["role"] == "neighbour"
    assert document["calibration"]["n"] == 120
    assert Policy.load(target).name == "mine"


def test_policy_can_refuse_instead_of_edit(place, tmp_path):
    said = run(*arguments(place, tmp_path / "p.json", "--refuse", "I do not know."))

    policy = Policy.load(tmp_path / "p.json")
    (stop,) = policy.refusals
    assert (policy.plan, stop.text, stop.reason) == (None, "I do not know.", "planted.gate")
    assert "Refuses" in flat(said.output)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--forget-topic", "botany"), "--forget has nothing about botany"),
        (("--neighbour", "chemistry"), "the texts has nothing about chemistry"),
        (("--level", "0.001"), "Give at least 2995, or a higher level"),
        (("--weigh", "chemistry=2"), "the weight of chemistry"),
        (("--weigh", "other1"), "write TOPIC=NUMBER"),
        (("--retain", "file.jsonl"), "write TOPIC=FILE"),
        (("--op", "multiply"), "--op multiply"),
        (("--select", "farrell"), "by farrell: the rule rejects all of them"),
        (("--questions", "nothing.jsonl"), "no file is there"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_words(place, tmp_path, more, message):
    result = CliRunner().invoke(app, [str(part) for part in arguments(place, tmp_path / "p.json", *more)])

    assert result.exit_code != 0
    assert message in flat(result.output + (str(result.exception) if result.exception else ""))
    assert not (tmp_path / "p.json").exists()


def test_policy_is_shown_by_guard_show_too(made):
    assert run("guard", "show", made[0]).output == run("policy", "show", made[0]).output
