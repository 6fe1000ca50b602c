"""Amounts at one KL: what the search gives is what one token at a time says, and what cannot be reached is refused."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard import (
    Ablate,
    Add,
    AnyActive,
    AtLeast,
    AtMost,
    Clamp,
    ClampAbove,
    Misdirect,
    Plan,
    Project,
    Reduce,
    Rule,
    Scale,
    Splice,
    steer,
)
from saeguard.errors import LatentOutOfRange, ModelBusy, ScoreMismatch, StrengthUnreachable
from saeguard.gates import Count, Hits, Latched, Watch
from saeguard.scoring.kl_strength import KLStrength, kl_strength, scaled, token_divergence
from saeguard.scoring.texts import Texts
from tests import tiny, words
from tests.counts import cases
from tests.test_cli import flat, run

SAE = tiny.tiny_sae()
S = (12, 13, 20)
TOKENIZER = words.word_tokenizer()
WORDS = ["w5 w6 w7 w8 w5 w6", "w9 w5 w7", "w6 w6 w8 w11 w10 w30 w31 w32", "w20 w21"]
TEXT = Texts.from_text(WORDS, TOKENIZER, SAE)
GATE = Latched(Watch(Hits(S), Count(), 2.0))
RULES = {
    "clamp": Rule("tiny", S, Clamp(-5.0, when="active")),
    "clamp above": Rule("tiny", S, ClampAbove((-5.0, -1.0, -9.0), above=3.0)),
    "scale": Rule("tiny", S, Scale(-1.0)),
    "add": Rule("tiny", S, Add((1.0, -2.0, 0.5))),
    "add by norm": Rule("tiny", S, Add(0.1, unit="norm")),
    "at least": Rule("tiny", S, AtLeast(30.0, unit="max")),
    "reduce": Rule("tiny", S, Reduce(2.0), trigger=AnyActive((5,))),
    "gated": Rule("tiny", S, Add(3.0), gate=GATE),
    "project": Rule("tiny", S, Project(0.1)),
    "the last": Rule("tiny", S, Add(3.0), phase="newest", first=2),
}


def slow_kl(rule: Rule, text: Texts = TEXT, model: Any = None) -> tuple[float, int]:
    """The mean over edited tokens, one row and one token at a time."""
    model, nats = model or tiny.tiny_model(), []
    for ids, mask, kept in zip(text.ids, text.mask, text.kept, strict=True):
        row = ids[mask][None]
        prompt = int(kept[mask].int().argmax()) if kept.any() else row.shape[1]
        with torch.no_grad():
            plain = model(row).logits[0].double()
            with steer(model, Plan((rule,)), saes=SAE, tokenizer=TOKENIZER, prompt_tokens=prompt) as run:
                edited = model(row).logits[0].double()
        for at in run.report.rules[0].edited_positions[0][0]:
            p, q = plain[at].softmax(-1).tolist(), edited[at].softmax(-1).tolist()
            nats.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return sum(nats) / max(len(nats), 1), len(nats)


def find(rule: Rule, **options: Any) -> KLStrength:
    return kl_strength(tiny.tiny_model(), TOKENIZER, SAE, rule, options.pop("text", TEXT), **options)


@pytest.mark.parametrize("name", RULES)
def test_amounts_that_are_found_have_the_kl_that_was_asked_for(name):
    """Measured again, the slow way."""
    reached = slow_kl(RULES[name])[0]
    kappa = reached * (1.05 if "clamp" in name else 0.7)  # a clamp to nothing moves much already

    found = find(RULES[name], kappa=kappa)

    kl, edited = slow_kl(found.rule)
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert kl == pytest.approx(kappa, rel=0.06)
    assert found.edited == edited
    assert len(found.tried) <= 12
    assert found.rule == scaled(RULES[name], found.factor)
    assert found.tokens == int(TEXT.kept.sum())


@pytest.mark.parametrize("kappa", [1e-3, 0.05, 1.0])
def test_any_kl_is_reached_from_any_beginning(kappa):
    factors = [find(Rule("tiny", S, Add(start)), kappa=kappa, rtol=0.01) for start in (0.01, 1.0, 90.0)]

    amounts = [found.rule.op.amount for found in factors]  # type: ignore[union-attr]
    assert amounts == pytest.approx([amounts[0]] * 3, rel=0.02)
    assert all(found.kl == pytest.approx(kappa, rel=0.011) for found in factors)


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_batches_and_padding_change_nothing(batch):
    flipped = Texts.from_ids(
        TEXT.ids.flip(0), mask=TEXT.mask.flip(0), special_ids=TOKENIZER.all_special_ids, name="flipped"
    )
    left = torch.cat([torch.zeros(4, 3, dtype=torch.long), TEXT.ids], 1), torch.cat([torch.zeros(4, 3), TEXT.mask], 1)
    padded = Texts.from_ids(left[0], mask=left[1], special_ids=TOKENIZER.all_special_ids)

    found = [find(RULES["gated"], kappa=0.05, text=text, batch=batch) for text in (TEXT, flipped, padded)]

    assert [one.edited for one in found] == [find(RULES["gated"], kappa=0.05).edited] * 3
    assert [one.factor for one in found] == [find(RULES["gated"], kappa=0.05).factor] * 3


def test_prompts_of_the_texts_are_prompts_to_the_rule():
    """A rule for the prompt's last token edits one token per text, and is measured there."""
    text = Texts.from_text(WORDS, TOKENIZER, SAE, prompts=["w40 w41", "w42", "w43 w44 w45", "w46"])

    found = find(Rule("tiny", S, Add(3.0), phase="last"), kappa=0.1, text=text)

    assert found.edited == 4
    assert slow_kl(found.rule, text)[0] == pytest.approx(0.1, rel=0.06)


def test_progress_is_told_the_rows_of_each_try():
    told: list[tuple[int, int]] = []

    found = find(RULES["add"], kappa=0.05, batch=2, progress=lambda done, total: told.append((done, total)))

    assert told == [(2, 4), (4, 4)] * len(found.tried)
    assert found.tried[-1] == (found.factor, found.kl)


def test_figures_are_plain_values():
    found = find(RULES["add"], kappa=0.05)

    assert json.loads(json.dumps(found.figures()))["kl"] == found.kl
    assert set(found.figures()) == {"factor", "kl", "kappa", "edited", "tokens", "text", "tried"}


def test_factor_multiplies_what_an_op_does():
    double = lambda op: scaled(Rule("a", () if isinstance(op, Misdirect) else (1, 2), op), 2.0).op

    assert double(Scale((3.0, -1.0))) == Scale((5.0, -3.0))
    assert double(Clamp((3.0, -1.0), when="active")) == Clamp((6.0, -2.0), when="active")
    assert double(ClampAbove(3.0, above=1.0)) == ClampAbove(6.0, above=1.0)
    assert double(AtMost(3.0, unit="max")) == AtMost(6.0, unit="max")
    assert double(Misdirect(4.0, seed=3)) == Misdirect(8.0, seed=3)
    assert double(Project()) == Project(2.0)


@settings(max_examples=cases(1_000))
@given(st.integers(1, 4), st.integers(0, 2**30), st.sampled_from((1e-6, 1e-3, 1.0, 30.0)), st.booleans())
def test_divergence_is_its_definition(tokens, seed, size, masked):
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(tokens, 7, generator=generator) * 5
    edited = plain + size * torch.randn(tokens, 7, generator=generator)
    if masked:
        plain[:, 0] = edited[:, 0] = -torch.inf

    found = token_divergence(plain, edited)

    p, q = plain.double().softmax(-1), edited.double().softmax(-1)
    expected = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-13)
    assert bool((found >= 0).all())


def dead_sae() -> Any:
    """One whose latent 0 never fires."""
    return replace(SAE, b_enc=torch.where(torch.arange(48) == 0, -1e6, SAE.b_enc))


UNREACHABLE = {
    "what a clamp to nothing moves already": (Rule("tiny", S, Clamp(-1.0, when="always")), 1e-7, "it still is"),
    "more than an op can": (Rule("tiny", S, Reduce(1.0)), 300.0, "it still is"),
    "between two jumps": (Rule("tiny", (), Misdirect(1e-3)), 1e-9, "it still is"),
}


@pytest.mark.parametrize("name", UNREACHABLE)
def test_a_kl_that_cannot_be_reached_is_refused_with_what_was_tried(name):
    rule, kappa, message = UNREACHABLE[name]

    with pytest.raises(StrengthUnreachable, match=message) as caught:
        find(rule, kappa=kappa)

    assert "tried: " in str(caught.value)


def test_an_amount_that_overflows_the_model_is_refused():
    model = tiny.fresh_model(dtype=torch.float16)

    with pytest.raises(StrengthUnreachable, match="NaN or infinity"):
        kl_strength(model, TOKENIZER, SAE, Rule("tiny", S, Add(3e4)), TEXT, kappa=0.1)


REFUSED = {
    "no amount": (Rule("tiny", S, Ablate()), {}, ScoreMismatch, "has no amount"),
    "a reconstruction": (Rule("tiny", (), Splice()), {}, ScoreMismatch, "has no amount"),
    "no kl": (RULES["add"], {"kappa": 0.0}, ScoreMismatch, "kappa > 0"),
    "no tolerance": (RULES["add"], {"rtol": 0.0}, ScoreMismatch, "0 < rtol"),
    "nothing is edited": (Rule("tiny", S, Add(1.0), start=500), {}, ScoreMismatch, "edits none of the 19 tokens"),
    "no such latent": (Rule("tiny", (4800,), Add(1.0)), {}, LatentOutOfRange, "4800"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_strength_is_refused(name):
    rule, options, error, message = REFUSED[name]

    with pytest.raises(error, match=message):
        find(rule, **options)


def test_a_model_that_is_being_steered_is_refused():
    with steer(tiny.tiny_model(), Plan((RULES["add"],)), saes=SAE):
        tiny.tiny_model()(tiny.prompt())
        with pytest.raises(ModelBusy):
            find(RULES["add"])


def test_logits_of_a_few_rows_are_alive_at_a_time(monkeypatch):
    """However long the text is."""
    widest: list[int] = []
    model = tiny.fresh_model()
    model.register_forward_hook(lambda module, args, output: widest.append(output.logits.numel()))
    monkeypatch.setattr("saeguard.scoring.kl_strength.LOGITS", 2 * 8 * tiny.VOCAB)

    kl_strength(model, TOKENIZER, SAE, RULES["add"], Texts.from_text(WORDS * 9, TOKENIZER, SAE), kappa=0.05)

    assert max(widest) <= 2 * 10 * tiny.VOCAB


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, an SAE, two texts and a plan of two rules on disk."""
    folder = tmp_path_factory.mktemp("strength")
    words.save_model(folder / "model")
    words.save_described_sae(folder / "sae")
    for name, texts in (("a", WORDS[:2]), ("b", WORDS[2:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = str(folder / "sae")
    Plan((Rule(source, S, Add(1.0)), Rule(source, (4,), Scale(3.0), gate=GATE)), "two").save(folder / "plan.json")
    return folder


def test_plan_command_gives_every_rule_the_strength_that_was_asked_for(place, tmp_path):
    given = ("--model", place / "model", "--text", place / "a.jsonl", "--text", place / "b.jsonl")
    done = run("plan", place / "plan.json", "--kl", 0.05, *given, "--out", tmp_path / "new.json", "--json")

    told, new = json.loads(done.stdout), Plan.load(tmp_path / "new.json")
    sae = replace(SAE, name=str(place / "sae"))
    expected = [kl_strength(tiny.tiny_model(), TOKENIZER, sae, rule, TEXT, kappa=0.05).rule
                for rule in Plan.load(place / "plan.json").rules]  # fmt: skip
    assert list(new.rules) == expected
    assert new.name == "two"
    assert Plan.from_json(json.dumps(told["plan"])) == new
    assert [one["kl"] for one in told["strength"]] == pytest.approx([0.05, 0.05], rel=0.05)
    assert json.loads((tmp_path / "new.strength.json").read_text())["strength"] == told["strength"]
    assert "nats" in run("plan", place / "plan.json", "--kl", 0.05, *given).output


def test_plan_command_refuses_options_that_would_mean_nothing(place, tmp_path):
    plan, text = place / "plan.json", ("--text", place / "a.jsonl")

    assert "--kl needs --text" in flat(run("plan", plan, "--kl", 0.1, status=2).stderr)
    assert "--text needs --kl" in flat(run("plan", plan, *text, status=2).stderr)
    assert "--out needs --kl" in flat(run("plan", plan, "--out", tmp_path / "x.json", status=2).stderr)
    far = run("plan", plan, "--kl", 1e3, *text, "--model", place / "model", "--out", tmp_path / "x.json", status=2)
    assert "StrengthUnreachable" in far.stderr
    assert not (tmp_path / "x.json").exists()
