"""IBM's steering modes for topics give what its published code gives, and the comparison notices its likely faults."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saeguard import SAE, steer
from saeguard.errors import BadRule, ScoreMismatch
from saeguard.scoring.table import Meaning, ScoreTable
from saeguard.scoring.topic_modes import topic_plan, topic_rules
from tests import laws, mutants, tiny

IDS = tiny.prompt(3, 7)


def score_table(sae: SAE, seed: int = 0) -> ScoreTable:
    """Scores from 0 to 1, a tenth of them missing."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(sae.d_sae, generator=generator)
    scores[::10] = torch.nan
    return ScoreTable.of(sae, {"topic": (scores, Meaning("similarity", "here"))})


PUBLISHED = {
    "topk behind a layer norm": replace(tiny.tiny_sae(activation="topk", seed=1), norm="layer_norm"),
    "topk": tiny.tiny_sae(activation="topk", seed=2),
    "jumprelu": tiny.tiny_sae(activation="jumprelu", seed=3),
}


def published(x: Tensor, sae: SAE, scores: Tensor, mode: str) -> Tensor:
    """The stream under a mode, as the published code writes it, error dropped."""
    mean, std = (x.mean(-1, keepdim=True), x.std(-1, keepdim=True)) if sae.norm == "layer_norm" else (0.0, 1.0)
    pre = (x - mean) / (std + (sae.eps if sae.norm == "layer_norm" else 0.0)) @ sae.W_enc + sae.b_enc

    def gate(p: Tensor) -> Tensor:
        if sae.top_k is None:
            return p * (p > sae.threshold)
        values, places = p.topk(sae.top_k, dim=-1)
        return torch.zeros_like(p).scatter(-1, places, values.relu())

    f, scores = gate(pre), scores.nan_to_num(0.0)
    if mode == "clamp":
        f[..., scores.topk(5).indices] += 10.0
    if mode == "weight":
        f = gate(pre * scores)
    if mode == "swap":
        f = pre * (gate(pre * scores) != 0)
    return x if mode == "original" else (f @ sae.W_dec + sae.b_dec) * std + mean


def logits_by_hand(sae: SAE, scores: Tensor, mode: str, *, keep_error: bool = False) -> Tensor:
    model = tiny.tiny_model()

    def write(module: nn.Module, args: Any, x: Tensor) -> Tensor:
        told = published(x, sae, scores, mode)
        return told + x - published(x, sae, scores, "sae") if keep_error else told

    handle = model.get_submodule("model.layers.1").register_forward_hook(write)
    try:
        with torch.no_grad():
            return model(IDS).logits
    finally:
        handle.remove()


MODES = [(mode, keep) for mode in ("clamp", "weight", "swap") for keep in (False, True)]


@pytest.mark.parametrize(("mode", "keep_error"), [("original", False), ("sae", False), *MODES])
@pytest.mark.parametrize("name", PUBLISHED)
def test_topic_modes_give_the_logits_of_the_published_code(name, mode, keep_error):
    sae = PUBLISHED[name]
    scores = score_table(sae)
    plan = topic_plan(scores, mode=mode, keep_error=keep_error, special=True)

    with torch.no_grad(), steer(tiny.tiny_model(), plan, saes=sae):
        found = tiny.tiny_model()(IDS).logits

    expected = logits_by_hand(sae, scores.column("topic"), mode, keep_error=keep_error)
    assert laws.distance(found, expected) <= 1e-5
    assert (plan is None) == (mode == "original")


@pytest.mark.parametrize("fault", ["", "keeps the error", "takes weighted values", "ranks over the batch"])
def test_comparison_with_the_published_code_catches_faults(fault):
    sae, model = PUBLISHED["topk"], tiny.tiny_model()
    scores = score_table(sae).column("topic")

    with torch.no_grad(), mutants.swaps(model.get_submodule("model.layers.1"), sae, scores.nan_to_num(0.0), fault):
        found = model(IDS).logits

    distance = laws.distance(found, logits_by_hand(sae, scores, "swap"))
    assert distance > 1e-2 if fault else distance <= 1e-5


def test_row_law_catches_a_rank_over_the_batch():
    sae, model = PUBLISHED["topk"], tiny.tiny_model()
    scores = score_table(sae)
    weights = scores.column("topic").nan_to_num(0.0)

    with torch.no_grad():
        with mutants.swaps(model.get_submodule("model.layers.1"), sae, weights, "ranks over the batch"):
            wrong = laws.distance(model(IDS[:1]).logits, model(IDS).logits[:1])
        with steer(model, topic_plan(scores, mode="swap", special=True), saes=sae):
            right = laws.distance(model(IDS[:1]).logits, model(IDS).logits[:1])

    assert wrong > 1e-2
    assert right <= 1e-5


BAD: dict[str, Any] = {
    "unknown mode": ({"mode": "best"}, BadRule, "topic mode 'best'"),
    "reconstruction and its error": ({"mode": "sae", "keep_error": True}, BadRule, "the stream as it is"),
    "a rank where nothing ranks": ({"mode": "clamp", "top_k": 3}, BadRule, "ranks nothing"),
    "no latents to clamp": ({"mode": "clamp", "top": 0}, BadRule, "no count of latents"),
    "half a latent": ({"mode": "clamp", "top": 2.5}, BadRule, "no count of latents"),
    "no scores to clamp by": ({"mode": "clamp", "column": "silent"}, ScoreMismatch, "no latent has that score"),
    "no scores to weigh by": ({"mode": "swap", "column": "silent"}, ScoreMismatch, "no latent has that score"),
    "an infinite score": ({"mode": "weight", "column": "infinite"}, BadRule, "inf is not a finite number"),
    "distances as weights": (
        {"mode": "weight", "column": "distance"},
        ScoreMismatch,
        "its lower numbers are the better",
    ),
    "unknown score": ({"mode": "swap", "column": "tone"}, ScoreMismatch, "tone"),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", BAD)
def test_modes_that_make_no_sense_are_refused(name):
    options, error, message = BAD[name]

    sae = PUBLISHED["topk"]
    columns = {
        "silent": torch.full((48,), torch.nan),
        "infinite": torch.tensor([torch.inf] * 48),
        "distance": torch.ones(48),
    }
    odd = {name: (column, Meaning("made up", "here", higher=name != "distance")) for name, column in columns.items()}

    with pytest.raises(error, match=message):
        topic_rules(score_table(sae).join(ScoreTable.of(sae, odd)), **options)


def test_rules_of_a_mode_carry_the_tokens_that_they_are_about():
    rules = topic_rules(score_table(PUBLISHED["topk"]), mode="swap", phase="generated", first=4, top_k=3)

    assert [(rule.phase, rule.first) for rule in rules] == [("generated", 4)] * 2
    assert rules[1].op.top_k == 3
    assert 10 not in rules[1].latents  # it has no score, and so the weight of latents that are not named: 0
    assert rules[1].op.others == 0.0
