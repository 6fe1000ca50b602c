"""The demonstration runs from prompts to files, and its checks notice what they are there to notice."""

import json
from dataclasses import replace

import pytest
import torch

from saeguard import AnyActive, AtLeast, Clamp, Plan, Rule, Scale, load_sae
from saeguard.demo import ROWS, DemoRow, prove, run_demo
from saeguard.demo.guarded import run_guarded
from saeguard.demo.proofs import Case, hooks
from saeguard.drawing.scene import encode, play, sites_of
from saeguard.gates import Latched, Words
from saeguard.guarding.policy import Policy
from saeguard.guarding.stops import Refuse
from saeguard.latents import LatentTable
from saeguard.loaders import shipped
from tests.tiny import fresh_model, tiny_model, tiny_sae
from tests.words import word_tokenizer

TINY = (
    DemoRow("boost", "w5 w6 w7", Plan((Rule("tiny", (1, 2), AtLeast(1.0, unit="max"), phase="generated"),))),
    DemoRow("turn", "w8 w9 w10 w11 w12", Plan((Rule("tiny", (3, 8, 9, 10), Scale(-2.0)),))),
    DemoRow("trigger", "w20", Plan((Rule("tiny", (4,), Clamp(3.0, when="always"), trigger=AnyActive((5, 6, 7))),))),
    DemoRow("alone", "w30 w31", None),
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run_demo(
        tmp_path_factory.mktemp("demo"), rows=TINY, model=tiny_model(), tokenizer=word_tokenizer(),
        saes={"tiny": tiny_sae()}, max_new_tokens=6, chat=False,
    )  # fmt: skip


@pytest.fixture
def case():
    model, tokenizer, saes = fresh_model(), word_tokenizer(), {"tiny": tiny_sae()}
    plans = tuple(row.plan for row in TINY)
    batch = encode(tokenizer, [row.prompt for row in TINY], chat=False)
    options = {"tokenizer": tokenizer, "saes": saes, "sites": sites_of(plans, saes), "max_new_tokens": 5}
    plain = play(model, batch, None, **options)
    return Case(model, tokenizer, plans, saes, plain, play(model, batch, plans, **options), hooks(model))


def failing(case):
    return [proof.claim for proof in prove(case) if not proof.holds]


def test_every_check_holds_on_a_tiny_model(result):
    assert [(proof.claim, proof.found) for proof in result.scene.proofs if not proof.holds] == []
    assert len(result.scene.proofs) == 5
    assert result.holds


def test_every_row_with_a_plan_is_edited_and_the_other_is_not(result):
    edits = [sum(token.edited for token in line.steered) for line in result.scene.lines]

    assert all(edits[:3])
    assert edits[3] == 0


def test_files_are_there_and_agree(result):
    report, page, picture = result.files
    found = json.loads(report.read_text(encoding="utf-8"))

    assert [row["title"] for row in found["rows"]] == [row.title for row in TINY]
    assert all(check["holds"] for check in found["checks"])
    assert "bit-identical" in page.read_text(encoding="utf-8")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_checks_notice_a_row_that_was_touched(case):
    logits = tuple(step.clone() for step in case.steered.logits)
    logits[2][3, 0] = torch.nextafter(logits[2][3, 0], torch.tensor(torch.inf))

    broken = replace(case, steered=replace(case.steered, logits=logits))

    assert failing(broken) == ["A row without a plan is bit-identical to the plain model"]


def test_checks_notice_tokens_that_no_pass_would_pick(case):
    ids = case.steered.ids.clone()
    ids[0, -1] = (ids[0, -1] + 1) % 50 + 5

    broken = replace(case, steered=replace(case.steered, ids=ids))

    assert "Decoding with a cache equals one pass without it" in failing(broken)
    assert "A row in the batch equals the row alone" in failing(broken)


def test_checks_notice_a_hook_that_stayed(case):
    case.model.model.layers[0].register_forward_hook(lambda *_: None)

    assert failing(case) == ["Nothing is left on the model afterwards"]


def test_checks_notice_other_edits(case):
    other = tuple(None if plan is None else Plan((replace(plan.rules[0], start=4),)) for plan in case.plans)

    assert "The sliced kernel equals the reference kernel" not in failing(replace(case, plans=other))
    assert "Decoding with a cache equals one pass without it" in failing(replace(case, plans=other))


def test_checks_do_not_hold_without_an_unsteered_row(case):
    plans = (case.plans[0],) * 4
    proofs = prove(replace(case, plans=plans))

    assert not proofs[0].holds


@pytest.mark.skipif(not shipped(), reason="no SAE ships with this checkout")
def test_rows_of_the_demonstration_fit_what_ships():
    assert sum(row.plan is None for row in ROWS) == 1
    assert len({row.plan for row in ROWS}) == len(ROWS)
    for rule in (rule for row in ROWS if row.plan for rule in row.plan.rules):
        load_sae(rule.sae).check_latents(rule.latents)
        assert all(LatentTable.load(rule.sae).row(latent).frequency > 0 for latent in rule.latents)


@pytest.fixture(scope="module")
def guarded():
    """A gate that opens on the words of the first question; one policy edits there, so that it shows, one refuses."""
    model, tokenizer, sae = fresh_model(), word_tokenizer(), tiny_sae()
    words = Words((5, 6, 7), (9.0, 9.0, 9.0), (1.0, 1.0, 1.0), last=8, floor=1.0, threshold=1.0)
    ids = [tokenizer.decode([token]) for token in (5, 6, 7, 30, 31)]
    rule = Rule("tiny", (1, 2), Clamp(-4.0, when="always", unit="norm"), gate=Latched(words))
    stop = Refuse(Latched(words), "tiny", None, " ".join(ids[3:]), "words")
    made = lambda plan, *stops: Policy.of(model, tokenizer, [sae], plan, name="three words", refusals=stops)
    policies = {"refuses": made(Plan((rule,)), stop), "edits": made(Plan((rule,)))}
    questions = (" ".join(ids[:3]), " ".join(ids[3:]))
    return run_guarded(model, tokenizer, policies, [sae], questions=questions, max_new_tokens=5, chat=False)


def test_guarded_question_is_refused_and_edited_and_the_other_left_alone(guarded):
    about, other = guarded.answers

    assert [(one.policy, one.decision) for one in about.under] == [("refuses", "refuse"), ("edits", "steer")]
    assert [one.decision for one in other.under] == ["allow", "allow"]
    assert about.under[0].text == other.question
    assert about.under[1].tokens_edited > 0
    assert all(one.text == other.plain and one.tokens_edited == 0 for one in other.under)
    assert [(proof.claim, proof.found) for proof in guarded.proofs if not proof.holds] == []
    assert len(guarded.proofs) == 6
