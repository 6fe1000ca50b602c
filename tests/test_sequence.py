"""Topics forgotten one after the other, attacks and pages on the command line: complete, resumable, refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from saeguard.cli import attacking, sequences
from saeguard.cli.kept import Kept
from saeguard.drawing.unlearning_page import render
from saeguard.errors import BrokenFile
from saeguard.evaluating.multiple_choice import Answers, Question, answers_of
from saeguard.evaluating.sequence import after_step
from saeguard.evaluating.subject import Plain, Verdict
from saeguard.guarding.policy import Policy
from saeguard.models import load_model
from tests import planted
from tests.test_cli import flat, run
from tests.test_cli_eval import unlearn


def answers(right: dict[str, list[bool]], opened: tuple[str, ...] = ()) -> Answers:
    """Questions of two choices each, answered so; in topics of ``opened`` a gate was open."""
    pairs = [(topic, one) for topic, several in right.items() for one in several]
    asked = tuple(Question("q", ("a", "b"), 0, topic) for topic, _ in pairs)
    numbers = tuple((1.0, 0.0) if one else (0.0, 1.0) for _, one in pairs)
    verdicts = tuple(Verdict(topic in opened) for topic, _ in pairs)
    return Answers(asked, numbers, numbers, numbers, verdicts, tuple((one, one) for one in verdicts))


PLAIN = answers({"a": [True] * 4, "b": [True] * 4, "c": [True] * 3 + [False], "d": [True, True, False, False]})
GUARDED = answers(
    {"a": [True, True, False, False], "b": [True] * 4, "c": [True, True, False, True], "d": [True, False] * 2}, ("a",)
)


def test_step_tells_forgotten_topics_from_those_to_come_and_from_those_that_are_kept():
    found = after_step(PLAIN, GUARDED, ["a"], ["b"])

    assert {part["topic"]: part["role"] for part in found["topics"]} == {
        "a": "to forget", "b": "to come", "c": "never forgotten", "d": "never forgotten",
    }  # fmt: skip
    assert found["forgotten"] == {"a": True}
    assert found["topics"][0]["triggered"]["count"] == 4
    assert [part["loss"] for part in found["topics"]] == [50.0, 0.0, 0.0, 0.0]


def test_loss_counts_every_question_of_topics_that_no_step_forgets():
    found = after_step(PLAIN, answers({"a": [False] * 4, "b": [False] * 4, "c": [True] * 2 + [False] * 2,
                                       "d": [True, True, True, False]}), ["a", "b"], [])["loss"]  # fmt: skip

    assert (found["n"], found["points"], found["mean_of_topics"]) == (8, 0.0, 0.0)
    assert found["low"] == pytest.approx(-100 * 1.959964 * (2 / 8 / 8) ** 0.5)


def test_topic_a_little_above_chance_is_forgotten_and_far_above_is_not():
    plain = answers({"a": [True] * 100})
    of = lambda n: after_step(plain, answers({"a": [True] * n + [False] * (100 - n)}), ["a"], [])["forgotten"]["a"]

    assert of(55)
    assert not of(56)


def test_without_other_topics_there_is_no_loss():
    assert after_step(answers({"a": [True]}), answers({"a": [True]}), ["a"], [])["loss"]["points"] is None


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """As for the other commands, and a second policy, which is about the word of the other topic."""
    folder = planted.save_deployment(tmp_path_factory.mktemp("sequence"))
    planted.save_second(folder)
    model, tokenizer = load_model(str(folder / "model"))
    rows = planted.rows_of(8)
    asked = [Question(one["question"], tuple(one["choices"]), one["gold"], one["topic"]) for one in rows]
    sums = answers_of(Plain(model, tokenizer), asked).sum
    known = [one | {"gold": row.index(max(row))} for one, row in zip(rows, sums, strict=True)]
    planted.save_questions(folder / "known.jsonl", known)
    return folder


def sequence(place: Path, *options: Any, policies: tuple[str, ...] = ("edit.json", "second.json"), status: int = 0):
    files = [place / name for name in policies]
    return run("eval", "sequence", *files, "--questions", place / "questions.jsonl", *options, status=status)


BOTH = ("--forget", "left", "--forget", "right")


def test_sequence_shows_every_topic_after_every_step(place, tmp_path):
    result = sequence(place, *BOTH, "--json", tmp_path / "out.json")

    found = json.loads((tmp_path / "out.json").read_text())
    assert [step["forgets"] for step in found["steps"]] == [["left"], ["left", "right"]]
    assert [step["policy"] for step in found["steps"]] == ["planted", "planted + second"]
    assert [[part["triggered"]["count"] for part in step["topics"]] for step in found["steps"]] == [[4, 0], [4, 4]]
    assert "planted + second" in flat(result.stdout)
    assert not list(tmp_path.glob("*.unfinished"))


def test_interrupted_sequence_goes_on_and_ends_with_the_same_bytes(place, tmp_path, monkeypatch):
    sequence(place, *BOTH, "--json", tmp_path / "whole.json")
    own, asked = sequences._answers, []

    def until_the_third(kept, name, *rest):
        asked.append((name, name in kept))
        if len(asked) == 3:
            raise OSError(28, "no space left", "disk")
        return own(kept, name, *rest)

    monkeypatch.setattr(sequences, "_answers", until_the_third)
    target = tmp_path / "cut.json"
    sequence(place, *BOTH, "--json", target, status=2)
    assert not target.exists()
    sequence(place, *BOTH, "--json", target)

    assert asked[3:] == [("plain", True), ("planted", True), ("planted + second", False)]
    assert target.read_bytes() == (tmp_path / "whole.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--forget", "left"), "was given 1 times for 2"),
        ((*BOTH[:2], "--forget", "up"), "left, right"),
        ((), "planted"),
    ],
)
def test_topics_that_do_not_fit_the_policies_are_refused(place, options, said):
    assert said in flat(sequence(place, *options, status=2).stderr)


def test_policies_are_joined_on_the_command_line(place, tmp_path):
    target = tmp_path / "both.json"
    result = run("policy", "join", place / "edit.json", place / "second.json", "--out", target, "--serial", 4, "--json")

    policy = Policy.load(target)
    assert json.loads(result.stdout) == {
        "file": str(target), "name": "planted + second", "serial": 4, "fingerprint": policy.fingerprint(), "rules": 2,
        "refusals": 0, "bytes": target.stat().st_size,
    }  # fmt: skip
    assert "not signed" in run("policy", "join", place / "edit.json", place / "second.json", "--out", target).stdout
    twice = run("policy", "join", place / "edit.json", place / "edit.json", "--out", target, status=2)
    assert "two called planted" in flat(twice.stderr)


def recover(place: Path, *options: Any, status: int = 0):
    return run(
        "eval", "recover", "--policy", place / "edit.json", "--questions", place / "known.jsonl", "--steps", 2,
        "--all-steps", 2, *options, status=status,
    )  # fmt: skip


@pytest.mark.parametrize("where", ["before", "behind"])
def test_recovery_says_what_it_attacked_and_what_came_back(place, tmp_path, where):
    result = recover(place, "--where", where, "--learn", place / "questions.jsonl", "--json", tmp_path / "out.json")

    found = json.loads((tmp_path / "out.json").read_text())
    assert found["aim"]["site"] == "resid_pre.0"
    assert (found["aim"]["edited_latents"], found["aim"]["gate_latents"], found["aim"]["unseen_by"]) == (1, 1, 2)
    assert found["settings"]["where"] == where
    assert (found["n"], found["plain"], len(found["each"])) == (8, 8, 8 - found["guarded"])
    assert found["universal"]["trained_on"] == found["universal"]["n"] == 8
    assert "one push for all" in flat(result.stdout)


def test_recovery_of_a_policy_without_edits_is_refused(place):
    result = run(
        "eval", "recover", "--policy", place / "refuse.json", "--questions", place / "questions.jsonl", status=2
    )

    assert "it edits latents at 0 places" in flat(result.stderr)


def relearn(place: Path, *options: Any):
    return run(
        "eval", "relearn", "--policy", place / "edit.json", "--questions", place / "questions.jsonl", "--text",
        place / "text.jsonl", "--steps", 3, "--row-tokens", 8, "--rate", 0.003, *options,
    )  # fmt: skip


def test_relearning_asks_with_the_guardrail_on_and_off(place, tmp_path):
    result = relearn(place, "--json", tmp_path / "out.json")

    tuned = json.loads((tmp_path / "out.json").read_text())["tuned"]
    assert list(tuned) == ["before", "under the guardrail", "plainly"]
    assert [len(part["losses"]) for part in tuned.values()] == [0, 3, 3]
    assert all(set(part[side]) == {"left", "right"} for part in tuned.values() for side in ("on", "off"))
    assert all("weights are not those" in tuned[name]["refused"] for name in ("under the guardrail", "plainly"))
    assert "refused" in flat(result.stdout)


def test_interrupted_relearning_goes_on_with_the_next_tuning(place, tmp_path, monkeypatch):
    relearn(place, "--json", tmp_path / "whole.json")

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attacking, "_tuned_plainly", stop)
        run("eval", "relearn", "--policy", place / "edit.json", "--questions", place / "questions.jsonl", "--text",
            place / "text.jsonl", "--steps", 3, "--row-tokens", 8, "--rate", 0.003, "--json", tmp_path / "cut.json",
            status=130)  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(attacking, "_tuned_under", stop)
        relearn(place, "--json", tmp_path / "cut.json")

    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_kept_parts_that_are_broken_are_refused_and_other_settings_begin_anew(tmp_path):
    target = tmp_path / "out.json"
    Kept(target, {"a": 1})["part"] = {"b": (1,)}
    assert Kept(target, {"a": 1})["part"] == {"b": [1]}
    assert "part" not in Kept(target, {"a": 2})
    next((tmp_path / "out.json.unfinished").iterdir()).write_text("[1")

    with pytest.raises(BrokenFile, match="Delete it, and begin anew"):
        Kept(target, {"a": 1})["part"]


def test_page_of_several_policies_draws_each_with_a_shape_of_its_own(place, tmp_path):
    for policy in ("edit", "refuse"):
        unlearn(place, "--no-generate", "--json", tmp_path / f"{policy}.json", policy=f"{policy}.json")
    run(
        "eval",
        "page",
        tmp_path / "edit.json",
        tmp_path / "refuse.json",
        "--forget",
        "left",
        "--out",
        tmp_path / "p.html",
    )

    page = (tmp_path / "p.html").read_text()
    assert "2 policies" in page
    assert "planted, refusing" in page
    assert page.count("left (to forget)") == 2
    assert "kept of plain accuracy elsewhere" in page
    assert page.count("<circle") == page.count('width="9"') == 4  # two topics, one policy, one legend


def test_topics_to_forget_are_those_that_are_named(place, tmp_path):
    unlearn(place, "--no-generate", "--json", tmp_path / "out.json")
    document = json.loads((tmp_path / "out.json").read_text())

    assert "right (to forget)" in render(document, forget=("right",))
    assert "left (to forget)" in render(document)
    assert "right (to forget)" not in render(document)


@pytest.mark.parametrize("text", ["{", "[]", '{"saeguard": "eval benign"}'])
def test_page_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)

    result = run("eval", "page", tmp_path / "x.json", "--out", tmp_path / "p.html", status=2)

    assert "BrokenFile" in result.stderr
