"""On processed weights an SAE does what it does on the plain model, or is refused by name.

The model is that of transformers, and TransformerLens's after it was processed: the same function, with other streams.
An SAE says how its own model was processed. Both engines have to edit the same tokens and give the same logits.
"""

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from saeguard import SAE, Clamp, Plan, Rule, steer
from saeguard.engines import engine_for
from saeguard.errors import SiteNotFound, WrongModel
from tests import laws, tiny
from tests.more_models import shared
from tests.saelens.hooked_models import make
from tests.test_engine_lens import sae_at

pytestmark = pytest.mark.filterwarnings("ignore")

WRITTEN = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
STREAMS = (*WRITTEN, "mlp_in", "mlp_normed", "mlp_post", "attn_z")
CENTER, VALUES, FOLD = "center_writing_weights", "fold_value_biases", "fold_ln"
DONE = ((), (CENTER,), (VALUES,), (FOLD,), (CENTER, VALUES, FOLD))
NAMES = ("gpt2", "qwen2", "llama")
PLACED = [*product(("gpt2", "qwen2"), STREAMS), *product(("llama",), ("resid_post", "mlp_in", "mlp_normed", "attn_z"))]
PLAN = Plan((Rule("tiny", (1, 7, 20, 31), Clamp(3.0, when="active")), Rule("tiny", (2, 3), Clamp(-2.0, when="always"))))


@cache
def processed(name: str, done: tuple[str, ...]) -> Any:
    return make(name, **dict.fromkeys(done, True))


def trained_on(name: str, stream: str, done: tuple[str, ...]) -> SAE:
    sae = replace(sae_at(name, stream), activation="jumprelu", threshold=torch.full((48,), 0.7))
    said = {key: key in done for key in (CENTER, VALUES, FOLD)}
    return replace(sae, manifest={"processing": said} if done else {})


def steered(model: Any, sae: SAE) -> tuple[laws.Edited, Tensor]:
    ids = tiny.prompt(2, 7, seed=3)
    with steer(model, PLAN, saes=sae) as run, torch.no_grad():
        found = model(ids)
    return laws.edited(run), getattr(found, "logits", found)


def refusal(name: str, stream: str, done: tuple[str, ...], said: tuple[str, ...]) -> type[Exception] | None:
    """What has to happen: what was taken out of the stream is gone, unless the SAE never had it."""
    layer_norms = name == "gpt2"
    if stream == "mlp_in" and FOLD in done:
        return SiteNotFound
    lost_mean = stream in WRITTEN and CENTER in done and CENTER not in said and layer_norms
    lost_bias = stream == "attn_z" and VALUES in done and VALUES not in said and name != "llama"
    lost_mean |= stream == "mlp_normed" and FOLD in done and FOLD not in said and layer_norms
    mixed_bias = stream == "attn_z" and FOLD in done and VALUES in said and FOLD not in said and layer_norms
    return WrongModel if lost_mean or lost_bias or mixed_bias else None


@pytest.mark.parametrize(("name", "stream"), PLACED)
def test_sae_edits_what_it_edits_on_the_plain_model_or_is_refused(name, stream):
    ways = DONE if name == "gpt2" else (DONE[0], DONE[2], DONE[-1])
    for said in ways:
        sae = trained_on(name, stream, said)
        expected, right = steered(shared(name), sae)
        for done in ways:
            wanted = refusal(name, stream, done, said)
            if wanted is not None:
                with pytest.raises(wanted):
                    steered(processed(name, done), sae)
                continue
            edited, logits = steered(processed(name, done), sae)
            assert edited == expected, (done, said)
            assert laws.distance(logits, right) <= laws.TOLERANCE, (done, said)


@pytest.mark.parametrize("done", DONE)
def test_what_was_done_is_told_from_the_weights(done):
    told = {name: engine_for(processed(name, done)).processed() for name in NAMES}  # type: ignore[attr-defined]

    assert told["gpt2"] == set(done)
    assert told["qwen2"] == set(done) - {CENTER}  # its norms do not take the mean out
    assert told["llama"] == set(done) - {CENTER, VALUES}  # and here there are no biases


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_does_not_hide_what_was_done(dtype):
    plain, centered = make("gpt2").to(dtype), make("gpt2", center_writing_weights=True).to(dtype)

    assert engine_for(plain).processed() == frozenset()  # type: ignore[attr-defined]
    assert engine_for(centered).processed() == {CENTER}  # type: ignore[attr-defined]


def test_heads_in_another_basis_are_refused_and_other_streams_are_not():
    model = make("gpt2", fold_value_biases=True, refactor_factored_attn_matrices=True)

    with pytest.raises(WrongModel, match="refactor_factored_attn_matrices"):
        steered(model, trained_on("gpt2", "attn_z", (VALUES,)))
    edited, logits = steered(model, trained_on("gpt2", "resid_post", ()))
    expected, right = steered(shared("gpt2"), trained_on("gpt2", "resid_post", ()))
    assert edited == expected
    assert laws.distance(logits, right) <= laws.TOLERANCE


def test_refusal_says_what_was_done_and_how_to_load_the_model():
    with pytest.raises(WrongModel, match="without center_writing_weights.*from_pretrained_no_processing"):
        steered(processed("gpt2", (CENTER,)), trained_on("gpt2", "resid_post", ()))
    with pytest.raises(SiteNotFound, match="mlp_normed.*from_pretrained_no_processing"):
        steered(processed("gpt2", (FOLD,)), trained_on("gpt2", "mlp_in", ()))


def test_law_catches_an_sae_that_is_let_through_on_centered_weights(monkeypatch):
    from saeguard.engines import corrections

    monkeypatch.setattr(corrections, "_check_processed", lambda *args: None)

    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_sae_edits_what_it_edits_on_the_plain_model_or_is_refused("gpt2", "resid_post")
    edited, logits = steered(processed("gpt2", (CENTER,)), trained_on("gpt2", "resid_post", ()))
    expected, right = steered(shared("gpt2"), trained_on("gpt2", "resid_post", ()))
    assert edited != expected or laws.distance(logits, right) > 1e-3
