"""The frontier of selections is measured behind one gate, said in a table and a picture, and never measured twice."""

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.baselines.edited import draw, frontier, show
from benchmarks.selections import Setting, append, finished, main, run
from benchmarks.selections import measured as measured_alone
from saeguard import Clamp, Plan, Rule, steer
from saeguard.cli.guarded import Deployment
from saeguard.evaluating.multiple_choice import answer
from saeguard.guarding.stops import Refuse
from saeguard.training import gate_rows
from tests.test_baselines import TOKENIZER, model, policy, questions, sae  # noqa: F401  the fixtures

CONFIGS = ("policy", "mean_square:6:-2", "random:3:-0.5", "attribution:2:kl1e9", "magic:2:-1")


@pytest.fixture(scope="module")
def setting(model, sae, policy, tmp_path_factory) -> Setting:  # noqa: F811
    asked: dict[str, Any] = {}
    for one in questions(8, start=200):
        asked.setdefault(one.topic, []).append(one)
    asked["left"] += [replace(one, topic="left") for one in asked["right"]]  # on which the gate stays closed
    train = [gate_rows.Question(one.question, one.topic) for one in questions(12)]
    return Setting(
        Deployment(policy, model, TOKENIZER, (sae,)), train, asked, "left", 2_000, tmp_path_factory.mktemp("work")
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(setting, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "frontier.jsonl"
    return out, run(setting, CONFIGS, out, tell=lambda stage: None)


def by_config(rows) -> dict[str, Any]:
    return {row["config"]: row for row in rows}


def test_topic_is_asked_behind_the_gate_and_others_without_one(setting, measured, model, sae):  # noqa: F811
    found = by_config(measured[1])
    plain = {topic: answer(model, TOKENIZER, some).right() for topic, some in setting.questions.items()}

    assert found["plain"]["right"] == plain
    rule = Rule(sae.name, tuple(found["mean_square:6:-2"]["latents"]), Clamp(-2.0, when="always", unit="norm"))
    with steer(model, Plan((rule,)), saes={sae.name: sae}, special_ids=(0, 1, 2)):
        edited = {topic: answer(model, TOKENIZER, some).right() for topic, some in setting.questions.items()}
    for topic in ("right", "near"):
        assert found["mean_square:6:-2"]["right"][topic] == edited[topic]
    assert any(edited[topic] != plain[topic] for topic in ("right", "near"))
    closed = [i for i, opened in enumerate(found["mean_square:6:-2"]["opened"]) if not opened]
    own = found["mean_square:6:-2"]["right"]["left"]
    assert 0 < len(closed) < len(own)
    assert all(own[i] == plain["left"][i] for i in closed)
    assert any(own[i] != edited["left"][i] for i in closed)


def test_configuration_has_its_latents_amount_and_the_policys_gate(setting, measured):
    found = by_config(measured[1])

    assert tuple(found["policy"]["latents"]) == setting.rule.latents
    assert found["random:3:-0.5"]["strength"]["op"] == {
        "kind": "clamp",
        "value": -0.5,
        "unit": "norm",
        "when": "always",
    }
    assert len(found["random:3:-0.5"]["latents"]) == 3
    assert set(found["mean_square:6:-2"]["latents"]) <= set(range(12))


def test_refusals_of_the_policy_are_left_out(setting, measured, policy):  # noqa: F811
    """Its edit is what is measured: a row that is refused says nothing of latents, and counts as wrong."""
    stop = Refuse(setting.rule.gate, setting.rule.sae, None, "No.", "left.gate")
    refusing = Deployment(
        replace(policy, refusals=(stop,)), setting.deployment.model, TOKENIZER, setting.deployment.saes
    )

    found = measured_alone(replace(setting, deployment=refusing), "random:3:-0.5")

    assert found["right"] == by_config(measured[1])["random:3:-0.5"]["right"]


def test_what_cannot_be_chosen_or_reached_is_a_result_too(measured):
    found = by_config(measured[1])

    assert found["attribution:2:kl1e9"]["refused"].startswith("StrengthUnreachable: a mean KL of 1e+09 nats")
    assert found["magic:2:-1"]["refused"].startswith("ScoreMismatch: latents by 'magic'")


def test_run_that_was_cut_off_goes_on_and_ends_the_same(setting, measured, tmp_path):
    out, first = measured
    lines = out.read_text().splitlines(keepends=True)
    cut, told = tmp_path / "cut.jsonl", []
    cut.write_text("".join(lines[:3]) + lines[3][:20])

    again = run(setting, CONFIGS, cut, tell=told.append)

    bare = lambda rows: [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    assert bare(again) == bare(first)
    assert told == [f"{config} ..." for config in CONFIGS[2:]]
    assert again[:3] == first[:3]
    assert len(list(finished(cut))) == len(CONFIGS) + 1


def test_other_questions_latents_or_policy_are_measured_anew(setting, policy):  # noqa: F811
    fewer = replace(setting, questions={**setting.questions, "left": setting.questions["left"][:4]})
    trained = replace(setting, train=setting.train[:9])

    key = setting.key("dsg:5:-1")
    assert len({key, fewer.key("dsg:5:-1"), trained.key("dsg:5:-1"), setting.key("dsg:5:-2")}) == 4
    assert trained.key("plain") == setting.key("plain")


def test_frontier_is_the_accuracy_on_the_topic_against_the_loss_on_others(measured, tmp_path, capsys):
    rows = measured[1]
    found = by_config(frontier(rows, "left"))
    plain, own = rows[0]["right"], by_config(rows)["mean_square:6:-2"]["right"]

    show(list(found.values()), "left")
    draw(list(found.values()), tmp_path / "a" / "frontier.png", "left")

    one = found["mean_square:6:-2"]
    assert one["forget"] == pytest.approx(sum(own["left"]) / 16)
    others = sum(sum(own[topic]) - sum(plain[topic]) for topic in ("right", "near"))
    assert one["retain_change"]["difference"] == pytest.approx(others / 16)
    assert "refused" in found["magic:2:-1"]
    said = capsys.readouterr().out
    assert all(config.split(":")[0] in said for config in CONFIGS)
    assert (tmp_path / "a" / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_file_of_results_is_read_as_it_was_written(tmp_path):
    out = tmp_path / "a" / "b.jsonl"

    assert list(finished(out)) == []
    append(out, {"key": "x", "n": 1.5})
    assert append(out, {"key": "y", "latents": (1, 2)}) == {"key": "y", "latents": [1, 2]}
    assert [row["key"] for row in finished(out)] == ["x", "y"]


@pytest.mark.parametrize(("more", "said"), [
    ((), '"skipped": "give --questions and --train"'), (("--configs", "dsg:20"), "write SELECTION:LATENTS:AMOUNT"),
    (("--configs", "dsg:0:-1"), "write SELECTION:LATENTS:AMOUNT"),
])  # fmt: skip
def test_command_says_what_it_lacks(more, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["selections", *more])
    with pytest.raises(SystemExit) if more else nullcontext():
        main()

    shown = capsys.readouterr()
    assert said in shown.out + shown.err


def test_topic_without_questions_is_refused(tmp_path, monkeypatch, capsys):
    row = {"question": "w1", "choices": ["w2", "w3"], "gold": 0, "topic": "biology"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr("sys.argv", ["selections", "--questions", str(tmp_path / "q.jsonl"), "--train",
                                     str(tmp_path / "q.jsonl"), "--topic", "physics"])  # fmt: skip

    with pytest.raises(SystemExit):
        main()

    assert "--questions have none about physics" in capsys.readouterr().err


def test_plain_model_is_as_it_was_afterwards(setting, measured, model):  # noqa: F811
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.isfinite(model(torch.tensor([[1, 5]])).logits).all()
