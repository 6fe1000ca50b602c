"""``saeguard guard fit`` edits the latents that were asked for, as strongly as was asked, and says what it did."""

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from saeguard import Ablate, Add, Clamp, Plan, Rule, steer
from saeguard.cli import app
from saeguard.cli.edits import Wanted, made, said
from saeguard.errors import ScoreMismatch, StrengthUnreachable
from saeguard.guarding.policy import Policy
from saeguard.loaders import load_sae
from saeguard.scoring import kl_strength
from saeguard.scoring.selections import SELECTIONS
from saeguard.scoring.table import Meaning, ScoreTable
from tests import tiny
from tests.test_cli import flat, run
from tests.test_cli_guard import arguments, place  # noqa: F401  the fixture
from tests.test_gate_training import planted
from tests.words import word_tokenizer


@dataclass(frozen=True, eq=False)
class Read:
    """What an edit is made from."""

    model: Any
    tokenizer: Any
    sae: Any
    questions: Any


QUICK = ("--evidence", "words", "--sentences", 200, "--grams", 500)
"""The gate is not what is tested here."""
READ = Read(tiny.tiny_model(), word_tokenizer(), tiny.tiny_sae(), planted(30, seed=2))


def edited(tmp_path, **asked):
    options = {"op": Clamp(-1.0, when="always", unit="norm"), "select": "mean_square", "top": 3} | asked
    return made(Wanted(**options), READ, "planted", tokens=400, seed=0, folder=tmp_path, say=lambda *told: None)


def fitted(place, tmp_path, *more):  # noqa: F811
    """The policy and the document of a fit."""
    target = tmp_path / "p.policy.json"
    run(*arguments(place, target, *QUICK, *more))
    return Policy.load(target), json.loads((tmp_path / "p.fit.json").read_text())


def field(op) -> str:
    """Where an op has its amount."""
    return "amount" if isinstance(op, Add) else "value"


def mean_kl(rule) -> float:
    """KL between what the plain and the edited model say next, row by row, over all tokens that are edited."""
    found = []
    for question in (q for q in READ.questions if q.topic == "planted"):
        words = READ.tokenizer(f"Question: {question.text}\nAnswer:", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[tiny.BOS, *words]])
        with torch.no_grad():
            plain = READ.model(ids).logits[0].double().log_softmax(-1)
            with steer(READ.model, Plan((rule,)), saes={"tiny": READ.sae}, special_ids=(0, 1, 2)) as ran:
                other = READ.model(ids).logits[0].double().log_softmax(-1)
        kl = (plain.exp() * (plain - other)).sum(-1)
        found += kl[list(ran.report.rules[0].edited_positions[0][0])].tolist()
    return sum(found) / len(found)


def test_policy_that_refuses_can_edit_behind_the_same_gate(place, tmp_path):  # noqa: F811
    policy, document = fitted(place, tmp_path, "--refuse", "I do not know.", "--also-edit", "--latents", "1,2")

    assert policy.plan is not None
    (rule,), (stop,) = policy.plan.rules, policy.refusals
    assert rule.latents == (1, 2)
    assert stop.gate is rule.gate
    assert document["refuses"] is True
    assert said(document).endswith("Refuses")


@pytest.mark.parametrize(
    "op", [Clamp(-1.0, when="always", unit="norm"), Clamp(-1.0, when="active"), Add(-1.0)], ids=str
)
@pytest.mark.parametrize("times", [0.5, 3.0])
def test_edit_moves_predictions_by_the_kl_that_was_asked_for(op, times, tmp_path):
    """What a rule of some strength does is asked for, and found by a search that begins at another one."""
    latents = edited(tmp_path, op=op).latents
    goal = Rule("tiny", latents, replace(op, **{field(op): times * getattr(op, field(op))}))
    kl = mean_kl(goal)

    edit = edited(tmp_path, op=op, kl=kl)

    told = edit.figures["strength"]
    assert told["kl"] == pytest.approx(kl, rel=0.05)
    assert mean_kl(Rule("tiny", edit.latents, edit.op)) == pytest.approx(told["kl"], rel=1e-3)
    assert edit.strength["kl"]["tried"][0][0] == 1.0
    assert getattr(edit.op, field(op)) == pytest.approx(told["factor"] * getattr(op, field(op)))
    assert (told["asked_kl"], told["tokens"]) == (kl, edit.strength["kl"]["tokens"])


def test_strength_that_was_found_is_not_searched_again(tmp_path, monkeypatch):
    first = edited(tmp_path, kl=2.0)
    monkeypatch.setattr(kl_strength, "kl_strength", lambda *given, **options: pytest.fail("searched again"))

    again = edited(tmp_path, kl=2.0)

    assert (again.op, again.figures, again.strength) == (first.op, first.figures, first.strength)
    with pytest.raises(pytest.fail.Exception, match="searched again"):
        edited(tmp_path, kl=2.2)


def test_kl_that_no_strength_reaches_is_refused_before_the_gate_is_fitted(tmp_path):
    with pytest.raises(StrengthUnreachable, match=r"a mean KL of 1e\+06 nats"):
        edited(tmp_path, kl=1e6)
    with pytest.raises(StrengthUnreachable, match="it still is"):  # that of an ablation is the least
        edited(tmp_path, kl=1e-6)
    with pytest.raises(ScoreMismatch, match="a KL of 0.0 nats"):
        edited(tmp_path, kl=0.0)


@pytest.mark.parametrize("name", [way.name for way in SELECTIONS if way.name not in ("farrell", "crisp")])
def test_edit_of_any_selection_says_how_its_latents_scored(name, tmp_path):
    told = edited(tmp_path, select=name).selection

    assert told["name"] == name
    assert len(told["latents"]) == 3
    assert all(told["by"] in one and "forget_frequency" in one for one in told["latents"])
    assert told["meanings"][told["by"]]["unit"]
    assert told["provenance"]["sae_fingerprint"] == READ.sae.fingerprint()


def test_fit_edits_the_latents_of_a_selection(place, tmp_path):  # noqa: F811
    policy, document = fitted(place, tmp_path, "--select", "attribution")

    (rule,) = policy.plan.rules
    latents = [one["latent"] for one in document["selection"]["latents"]]
    assert latents == list(rule.latents) == document["latents"]
    assert document["selection"]["name"] == policy.calibration["fit"]["select"] == "attribution"
    assert document["selection"]["meanings"]["loss_attribution"]["unit"] == "nats per token"
    assert document["strength"] == {
        "op": {"kind": "clamp", "value": -1.0, "unit": "norm", "when": "always"}, "kl": None
    }  # fmt: skip


def test_policy_of_old_options_says_nothing_of_new_ones(place, tmp_path):  # noqa: F811
    """Fitted again by the same command, a policy of before is the same to the last bit."""
    policy, _ = fitted(place, tmp_path)

    assert set(policy.calibration["fit"]) == {
        "topic", "evidence", "select", "top", "floor", "passages", "sentences", "grams", "chat_every", "tokens", "seed",
        "neighbours", "weights",
    }  # fmt: skip


def test_fit_at_a_kl_puts_strength_and_kl_into_the_policy(place, tmp_path):  # noqa: F811
    policy, document = fitted(place, tmp_path, "--kl", "2", "--select", "dsg_mean_square")

    (rule,) = policy.plan.rules
    told = policy.calibration["fit"]["strength"]
    assert told["kl"] == pytest.approx(2, rel=0.05)
    assert rule.op.value == document["strength"]["op"]["value"] == -told["factor"] != -1.0
    assert document["strength"]["kl"]["kl"] == told["kl"]


def test_fit_edits_a_list_as_it_stands(place, tmp_path):  # noqa: F811
    policy, document = fitted(place, tmp_path, "--latents", "31,4")

    assert policy.plan.rules[0].latents == (31, 4)
    assert policy.calibration["fit"]["select"] == document["selection"]["name"] == "listed"
    assert "top" not in policy.calibration["fit"]


def test_fit_takes_what_select_wrote(place, tmp_path):  # noqa: F811
    """So that any score of the catalogue can choose what a policy edits."""
    sae = load_sae(str(place / "sae"))
    table = ScoreTable.of(sae, {"mine": (torch.arange(float(sae.d_sae)), Meaning("share", "made up"))}, seed=1)
    table.save(tmp_path / "s.safetensors")
    run("select", tmp_path / "s.safetensors", "--by", "mine", "--top", 3, "--op", "ablate", "--out",
        tmp_path / "plan.json")  # fmt: skip

    policy, document = fitted(
        place, tmp_path, "--latents-from", tmp_path / "plan.selection.json", "--op", "ablate"
    )  # fmt: skip

    (rule,) = policy.plan.rules
    assert (rule.latents, rule.op) == ((47, 46, 45), Ablate())
    assert document["selection"]["latents"][0] == {"latent": 47, "mine": 47.0}
    assert document["selection"]["by"] == "mine"
    assert len(policy.calibration["fit"]["selection"]) == 64


def test_bounds_of_fit_are_those_of_select(place, tmp_path):  # noqa: F811
    policy, document = fitted(
        place, tmp_path, "--select", "mean_square", "--percentile-bound", "dsg_ratio>=90", "--bound",
        "forget_frequency>=0.01", "--within", "dsg_ratio=40",
    )  # fmt: skip

    fit = policy.calibration["fit"]
    assert fit["bounds"] == ("forget_frequency>=0.01", "dsg_ratio>=90%")
    assert fit["within"] == {"dsg_ratio": 40}
    assert document["selection"]["provenance"]["n_left"] < 40
    assert all(one["forget_frequency"] >= 0.01 for one in document["selection"]["latents"])


@pytest.mark.parametrize(("more", "message"), [
    (("--kl", "1", "--value", "-2"), "--value and --kl: give one of them"),
    (("--kl", "1", "--op", "ablate"), "has no amount that could be larger or smaller"),
    (("--kl", "1", "--refuse", "No."), "--refuse edits nothing: leave out --kl"),
    (("--latents", "1", "--refuse", "No."), "--refuse edits nothing: leave out --latents"),
    (("--bound", "dsg>=1", "--refuse", "No."), "--refuse edits nothing: leave out bounds"),
    (("--also-edit",), "--also-edit goes with --refuse"),
    (("--latents", "1", "--select", "dsg"), "--select and --latents: give one of them"),
    (("--latents", "1", "--bound", "dsg>=1"), "a list is taken as it is"),
    (("--latents", "1,1"), "or one twice"), (("--latents", "99"), "99"), (("--latents", "a"), "write integers"),
    (("--select", "magic"), "there is no selection of that name"),
    (("--bound", "dsg"), "write COLUMN>=NUMBER"), (("--within", "dsg"), "write COLUMN=NUMBER"),
    (("--kl", "1e9"), "nats by"), (("--kl", "nan"), "a KL of nan nats"), (("--kl", "0"), "a KL of 0.0 nats"),
    (("--latents-from", "nothing.json"), "the selection in nothing.json"),
    (("--op", "ablate", "--value", "1"), "ablate takes no amount"),
], ids=" ".join)  # fmt: skip
def test_edit_that_cannot_be_made_is_refused_in_words(place, tmp_path, more, message):  # noqa: F811
    result = CliRunner().invoke(app, [str(part) for part in arguments(place, tmp_path / "p.json", *more)])

    assert result.exit_code != 0
    assert message in flat(result.output + (str(result.exception) if result.exception else ""))
    assert not (tmp_path / "p.json").exists()


def test_help_and_list_name_what_there_is():
    shown = flat(run("guard", "fit", "--help").output)
    listed = json.loads(run("guard", "selections", "--json").output)

    for option in ("--select", "--latents", "--latents-from", "--bound", "--percentile-bound", "--within", "--kl"):
        assert option in shown
    assert [one["name"] for one in listed] == [way.name for way in SELECTIONS]
    shown = flat(run("guard", "selections").output)
    assert all(way.name in shown for way in SELECTIONS)


def test_line_that_is_shown_says_latents_op_and_kl(tmp_path):
    edit = edited(tmp_path, latents=(3, 5), kl=1.5)
    document = {
        "refuses": False, "latents": list(edit.latents), "selection": edit.selection, "strength": edit.strength
    }  # fmt: skip

    assert said(document).startswith("Edits latents 3,5 (by listed): clamp norm -")
    assert said(document).endswith(" nats per token")
    assert said(document | {"refuses": True}).endswith(" nats per token. Refuses")
    assert said({"refuses": True, "latents": []}) == "Refuses"


def test_texts_of_an_edit_are_questions_as_they_are_asked(tmp_path):
    edit = edited(tmp_path)

    (own,) = {json.dumps(one["texts"]) for one in edit.selection["provenance"]["scores"].values()}
    counted = json.loads(own)["forget"]["n_tokens"]
    assert counted == sum(len(q.text.split()) for q in READ.questions if q.topic == "planted")
