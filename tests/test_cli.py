"""The command does what its help says, speaks JSON when asked, and fails in one line with a status."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saeguard import Plan, Rule, Scale, cards, loaders
from saeguard.cli import app
from tests import words

COMMANDS = (
    (), ("demo",), ("steer",), ("plan",), ("export-vector",), ("assets",), ("models",), ("train",), ("boost",),
    ("inspect",),
    ("convert",), ("error",), ("compare",),
    ("latents",), ("latents", "search"), ("latents", "show"), ("latents", "contexts"),
    ("audit",), ("audit", "verify"), ("audit", "show"),
    ("eval",), ("eval", "unlearn"), ("eval", "dilution"), ("eval", "transforms"), ("eval", "benign"),
    ("policy",), ("policy", "show"), ("policy", "verify"), ("policy", "sign"), ("policy", "keygen"),
)  # fmt: skip


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == status, result.output + result.stderr
    return result


def flat(text):
    """Text as a reader sees it: no colour, no box, no line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    words.save_model(folder / "model")
    words.save_described_sae(folder / "sae")
    (folder / "corpus.txt").write_text(" ".join(f"w{3 + i % 50}" for i in range(400)))
    return folder


@pytest.fixture(scope="module")
def plan_file(place):
    plan = Plan((Rule(str(place / "sae"), (1, 2), Scale(-2.0)),), "turn")
    plan.save(place / "plan.json")
    return place / "plan.json"


@pytest.fixture
def shipped(place, monkeypatch):
    """One SAE ships: the tiny one."""
    for module in (loaders, cards):
        monkeypatch.setattr(module, "shipped", lambda: {"tiny/resid_post.1": place / "sae"})


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_of_every_command_explains_it(command):
    text = flat(run(*command, "--help").output)

    assert "Usage: " in text
    assert len(text) > 150


def test_help_names_every_command():
    text = flat(run("--help").output)

    assert all(command[0] in text for command in COMMANDS if command)


def test_steer_with_flags_reports_plain_and_steered(place):
    result = run(
        "steer", "--prompt", "w5 w6", "--prompt", "w7", "--model", place / "model", "--sae", place / "sae",
        "--latents", "1,2", "--at-least", 2, "--unit", "max", "--tokens", 4, "--raw", "--json",
    )  # fmt: skip
    found = json.loads(result.stdout)

    assert [row["prompt"] for row in found["rows"]] == ["w5 w6", "w7"]
    assert len(found["report"]["rules"]) == 1
    assert all(row["tokens_edited"] > 0 for row in found["rows"])


def test_steer_with_a_plan_per_row_leaves_the_row_without_one_alone(place, plan_file):
    result = run(
        "steer", "--prompt", "w5 w6", "--prompt", "w7", "--model", place / "model", "--plan", plan_file,
        "--plan", "none", "--tokens", 4, "--raw", "--json", "--page", place / "p.html",
    )  # fmt: skip
    rows = json.loads(result.stdout)["rows"]

    assert rows[1]["plain"] == rows[1]["steered"]
    assert rows[1]["rules"] == []
    assert (place / "p.html").is_file()


def test_steer_without_json_shows_the_table(place, plan_file):
    text = run(
        "steer", "--prompt", "w5", "--model", place / "model", "--plan", plan_file, "--tokens", 3, "--raw"
    ).output  # fmt: skip

    assert "What was edited" in text
    assert "Scale(factor=-2.0)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--latents", "1"), "--latents needs exactly one op: --add, --scale, --clamp, --at-least, --at-most"),
        (("--latents", "1", "--add", "1", "--ablate"), "--latents needs exactly one op"),
        (("--latents", "one", "--add", "1"), "--latents one: write integers with commas, such as 12,87"),
        ((), "give either --plan or --latents with an op"),
        (("--plan", "none", "--plan", "none"), "2 plans for 1 prompts: give one, or one per prompt"),
        (("--plan", "none", "--add", "1"), "--plan already says what to do"),
        (("--plan", "nowhere.json"), "there is no such file; write \"none\" for a row to leave alone"),
        (("--latents", "1", "--clamp", "1", "--when", "never"), "'never' is not one of 'always', 'active'"),
        (("--latents", "1", "--add", "1", "--unit", "m"), "'m' is not one of 'activation', 'max', 'norm'"),
        (("--latents", "-1", "--add", "1"), "rule latents: -1 is not a latent. Latents are integers from 0 upwards."),
        (("--latents", "1", "--add", "1"), "this tokenizer has no chat template. Give the prompts as they are"),
        (("--latents", "99", "--add", "1", "--raw"), "this SAE has latents 0..47. Negative indices are not accepted."),
    ],
)  # fmt: skip
def test_steer_refuses_in_words(place, arguments, message):
    extra = ("--sae", place / "sae") if "--latents" in arguments else ()
    result = run("steer", "--prompt", "w5", "--model", place / "model", *extra, *arguments, status=2)

    assert message in flat(result.stderr)
    assert "Traceback" not in result.stderr


def test_error_is_one_line_with_its_class_and_nothing_on_stdout(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    result = run("plan", tmp_path / "bad.json", "--json", status=2)

    assert result.stdout == ""
    assert result.stderr.startswith("error BadPlanFile: a plan file: it is not JSON")
    assert result.stderr.count("\n") == 1


def test_debug_lets_the_error_through(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    result = CliRunner().invoke(app, ["--debug", "plan", str(tmp_path / "bad.json")])

    assert type(result.exception).__name__ == "BadPlanFile"


def test_plan_gives_canonical_text_and_fingerprint(plan_file):
    plan = Plan.load(plan_file)
    found = json.loads(run("plan", plan_file, "--bind", "--json").stdout)

    assert found["fingerprint"] == plan.fingerprint()
    assert found["bound"] is True
    assert run("plan", plan_file, "--canonical").stdout == plan.to_json() + "\n"
    assert plan.fingerprint() in flat(run("plan", plan_file).output)


def test_plan_bound_to_an_sae_with_fewer_latents_is_refused(place, tmp_path):
    Plan((Rule(str(place / "sae"), (400,), Scale(2.0)),)).save(tmp_path / "p.json")

    assert "latent 400" in run("plan", tmp_path / "p.json", "--bind", status=2).stderr


def test_latents_are_searched_and_shown(place):
    sae = ("--sae", place / "sae")
    found = json.loads(run("latents", "search", "w12", *sae, "--json").stdout)

    assert found["hits"][0]["latent"] == 12
    assert json.loads(run("latents", "show", 12, *sae, "--json").stdout)["label"] == "w12 -> w9"
    assert "w12" in run("latents", "search", "w12", *sae).output
    assert "0.30000%" in run("latents", "show", 12, *sae).output or "30.000%" in run("latents", "show", 12, *sae).output
    assert "the table has 48 rows" in run("latents", "show", 99, *sae, status=2).stderr


@pytest.mark.parametrize("text", [("--self-written",), ("--corpus", "corpus.txt")])
def test_contexts_are_found_in_given_and_in_written_text(place, text):
    text = [place / part if part.endswith(".txt") else part for part in text]
    result = run(
        "latents", "contexts", 3, *text, "--sae", place / "sae", "--model", place / "model", "--tokens", 256,
        "--top", 2, "--json",
    )  # fmt: skip
    found = json.loads(result.stdout)["contexts"]

    assert len(found) == 2
    assert found[0]["activation"] >= found[1]["activation"] > 0
    assert found[0]["token"].startswith("w")


def test_contexts_want_one_source_of_text(place):
    result = run("latents", "contexts", 3, "--sae", place / "sae", status=2)

    assert "give either --corpus FILE or --self-written" in flat(result.stderr)


def test_assets_lists_what_ships_with_its_card(shipped, place):
    found = json.loads(run("assets", "--json").stdout)

    assert found["tiny/resid_post.1"]["l0"] == 16.0
    assert "tiny/resid_post.1" in run("assets").output


def test_models_are_listed_with_their_licences():
    found = json.loads(run("models", "--json").stdout)

    assert {model["name"]: model["licence"] for model in found}["smollm2-135m-instruct"] == "Apache-2.0"


def test_unknown_model_is_refused_in_words():
    result = run("models", "--fetch", "gpt-17", status=2)

    assert "no demo model has this name and no local folder is there" in result.stderr


def test_train_says_which_argument_is_missing(tmp_path):
    assert "Missing argument" in flat(run("train", "--out", tmp_path, status=2).stderr)


def test_train_refuses_a_pattern_that_matches_nothing(tmp_path):
    result = run("train", tmp_path / "*.txt", "--validation", "x", "--out", tmp_path, status=2)

    assert "no file is there. Check the path; quote a pattern." in flat(result.stderr)


def test_no_command_file_imports_anything_heavy():
    """Help has to be quick: torch and transformers are imported by the commands that need them, when they run."""
    import ast

    folder = Path(loaders.__file__).parent.parent / "cli"
    for path in folder.glob("*.py"):
        names = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        tops = {getattr(node, "module", None) or node.names[0].name for node in names}
        ours = {top for top in tops if top.startswith("saeguard") and not top.startswith("saeguard.cli")}
        assert ours <= {"saeguard.errors"}, path
        assert not tops & {"torch", "transformers", "matplotlib"}, path
