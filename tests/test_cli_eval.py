"""``saeguard eval``: the same numbers whether or not it was interrupted, bad files refused by name, one status each."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from saeguard.cli import unlearning
from saeguard.cli.guarded import UnderPolicy
from saeguard.drawing.unlearning_page import render
from tests import planted
from tests.test_cli import flat, run
from tests.test_unlearning import Silent


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = planted.save_deployment(tmp_path_factory.mktemp("eval"))
    planted.save_questions(folder / "more.jsonl", planted.rows_of(6, seed=3))
    return folder


def unlearn(place: Path, *options, policy="edit.json", files=("questions.jsonl",), status=0):
    asked = [part for name in files for part in ("--questions", place / name)]
    return run("eval", "unlearn", "--policy", place / policy, *asked, "--new-tokens", 4, *options, status=status)


@pytest.mark.parametrize("policy", ["edit.json", "refuse.json"])
def test_numbers_of_each_topic_are_complete_and_on_the_screen(place, tmp_path, policy):
    result = unlearn(place, "--json", tmp_path / "out.json", policy=policy)

    found = json.loads((tmp_path / "out.json").read_text())
    (file,) = found["files"]
    left, right = file["topics"]
    assert (left["topic"], left["n"], left["chance"]) == ("left", 4, 0.25)
    assert left["triggered"]["question"]["count"] == 4
    assert right["triggered"]["question"]["count"] == 0
    assert set(left["likelihood"]) == {"sum", "bytes", "pmi"}
    assert set(left["written"]) == {"options", "open"}
    assert left["likelihood"]["sum"]["refused"] == (4 if policy == "refuse.json" else 0)
    assert found["policy"]["fingerprint"]
    assert found["settings"] == {"topics": [], "most": None, "seed": 0, "generate": True, "new_tokens": 4}
    assert "rest identical" in flat(result.stdout)
    assert not list(tmp_path.glob("*.unfinished"))


def test_without_generation_nothing_is_written_and_one_topic_is_one_row(place, tmp_path):
    unlearn(place, "--no-generate", "--topic", "left", "--most", 2, "--json", tmp_path / "out.json")

    (part,) = json.loads((tmp_path / "out.json").read_text())["files"][0]["topics"]
    assert (part["n"], part["written"]) == (2, {})


def test_interrupted_evaluation_goes_on_and_ends_with_the_same_bytes(place, tmp_path, monkeypatch):
    files = ("questions.jsonl", "more.jsonl")
    unlearn(place, "--no-generate", "--json", tmp_path / "whole.json", files=files)
    own, measured = unlearning._measure, []

    def until_the_second(deployment, path, *rest):
        measured.append(path.name)
        if len(measured) == 2:
            raise OSError(28, "no space left", "disk")
        return own(deployment, path, *rest)

    monkeypatch.setattr(unlearning, "_measure", until_the_second)
    target = tmp_path / "cut.json"
    unlearn(place, "--no-generate", "--json", target, files=files, status=2)
    assert not target.exists()
    unlearn(place, "--no-generate", "--json", target, files=files)

    assert measured == ["questions.jsonl", "more.jsonl", "more.jsonl"]
    assert target.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_other_settings_do_not_go_on_from_what_is_there(place, tmp_path, monkeypatch):
    own, measured = unlearning._measure, []

    def counted(deployment, path, *rest):
        measured.append(path.name)
        return own(deployment, path, *rest)

    monkeypatch.setattr(unlearning, "_measure", counted)
    monkeypatch.setattr(unlearning.shutil, "rmtree", lambda *_, **__: None)
    for most in (2, 2, 3):
        unlearn(place, "--no-generate", "--most", most, "--json", tmp_path / "out.json")

    assert len(measured) == 2


def test_unfinished_file_that_is_broken_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.setattr(unlearning.shutil, "rmtree", lambda *_, **__: None)
    unlearn(place, "--no-generate", "--json", tmp_path / "out.json")
    (kept,) = (tmp_path / "out.json.unfinished").iterdir()
    kept.write_text(kept.read_text()[:-9])

    result = unlearn(place, "--no-generate", "--json", tmp_path / "out.json", status=2)

    assert "BrokenFile" in result.stderr


def test_row_that_moved_without_a_trigger_is_a_failed_check(place, monkeypatch):
    own = UnderPolicy.passes
    monkeypatch.setattr(UnderPolicy, "passes", lambda self, prompts: Silent(_Own(own, self)).passes(prompts))

    result = unlearn(place, "--no-generate", status=1)

    assert "left: sums 0 of 4" in flat(result.stdout)


class _Own:
    """A subject as it was before `UnderPolicy.passes` was replaced."""

    def __init__(self, passes, subject):
        self.passes = lambda prompts: passes(subject, prompts)


@pytest.mark.parametrize("row", ['{"question": "q", "choices": ["a"], "gold": 0}', "{", '{"choices": []}'])
def test_bad_question_files_are_refused_before_anything_is_loaded(place, tmp_path, row):
    (tmp_path / "bad.jsonl").write_text(row + "\n")

    result = run(
        "eval", "unlearn", "--policy", place / "edit.json", "--questions", tmp_path / "bad.jsonl", "--model", "nowhere",
        status=2,
    )  # fmt: skip

    assert "BrokenFile" in result.stderr


def test_file_that_is_no_policy_is_refused(place):
    result = unlearn(place, policy="questions.jsonl", status=2)

    assert "BadPolicyFile" in result.stderr


def test_dilution_of_a_latched_gate_has_no_flips(place, tmp_path):
    result = run(
        "eval", "dilution", "--policy", place / "edit.json", "--questions", place / "questions.jsonl", "--benign",
        place / "text.jsonl", "--length", 3, "--length", 40, "--most", 2, "--json", tmp_path / "out.json",
    )  # fmt: skip

    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["n"], found["opened_alone"], found["flips"], found["disagreeing"]) == (4, 2, 0, 0)
    assert len(found["points"]) == 6
    assert "0 flips" in flat(result.stdout)


def test_transforms_are_listed_with_both_accuracies(place, tmp_path):
    result = run(
        "eval", "transforms", "--policy", place / "refuse.json", "--questions", place / "questions.jsonl",
        "--transform", "plain", "--transform", "upper", "--json", tmp_path / "out.json",
    )  # fmt: skip

    plain, upper = json.loads((tmp_path / "out.json").read_text())["transforms"]
    assert (plain["triggered"]["count"], upper["triggered"]["count"]) == (4, 0)
    assert upper["plain"] == upper["guarded"]
    assert "triggered in chat" in flat(result.stdout)
    run("eval", "transforms", "--policy", place / "refuse.json", "--questions", place / "questions.jsonl",
        "--transform", "sideways", status=2)  # fmt: skip


def test_benign_text_is_measured_file_by_file(place, tmp_path):
    result = run(
        "eval", "benign", "--policy", place / "edit.json", "--text", place / "text.jsonl", "--row-tokens", 16,
        "--json", tmp_path / "out.json",
    )  # fmt: skip

    (text,) = json.loads((tmp_path / "out.json").read_text())["texts"]
    assert (text["name"], text["kl"], text["changed_untriggered"]) == ("text.jsonl", 0.0, 0)
    assert text["triggered"]["count"] == 0
    assert text["kl_triggered"] is None
    assert "perplexity" in flat(result.stdout)


class _Tags(HTMLParser):
    """Checks that tags close in order."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "line", "rect", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "rect", "circle"):
            assert self.open.pop() == tag


def test_page_shows_every_topic_and_what_got_through_and_loads_nothing(place, tmp_path):
    unlearn(place, "--no-generate", "--json", tmp_path / "out.json", "--page", tmp_path / "out.html")
    document = json.loads((tmp_path / "out.json").read_text())
    document["files"][0]["topics"][0] |= {"topic": "<left & co>", "through": ["<b>w1</b>"]}
    page, saved = render(document), (tmp_path / "out.html").read_text()

    checker = _Tags()
    checker.feed(page)
    assert checker.open == []
    assert page.count("<circle") == 3  # two topics, and the policy
    assert "&lt;left &amp; co&gt;" in page
    assert "&lt;b&gt;w1" in page
    assert all(word not in saved for word in ("http://", "https://", "<script"))
    assert ">right<" in saved
