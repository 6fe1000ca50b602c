"""Relearning: tuning under a guard goes through the guard, is the same every time, and leaves the model as it was."""

from typing import Any

import pytest
import torch

from saeguard import SAE, Clamp, Plan, Rule, errors
from saeguard.evaluating.multiple_choice import Question, answers_of
from saeguard.evaluating.relearning import Budget, relearn, restoring
from saeguard.evaluating.subject import Plain
from saeguard.guarding.policy import Policy
from tests import planted, tiny

BUDGET = Budget(steps=12, rows=4, row_tokens=16, rate=3e-3)


@pytest.fixture
def model() -> Any:
    return tiny.fresh_model()


@pytest.fixture
def sae(model: Any) -> SAE:
    return planted.planted_sae(model)


def text(word: int = planted.WORD) -> list[int]:
    """Tokens with the planted word in every row, so that the gate opens."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 40, (400,), generator=generator)
    ids[::7] = word
    return ids.tolist()


def weights(model: Any) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def test_loss_falls_plainly_and_under_the_guard(model, sae):
    with restoring(model):
        plain = relearn(Plain(model, planted.TOKENIZER), text(), BUDGET)
    with restoring(model), planted.under(model, sae, planted.editing(model, sae)) as (_, guarded):
        under = relearn(guarded, text(), BUDGET)

    assert plain[-1] < plain[0] - 0.2
    assert under[-1] < under[0] - 0.2
    assert under[0] != plain[0]  # the guard is in force from the first step on


def test_gradient_passes_a_clamp_in_units_of_the_norm(model, sae):
    """Its missing bounds were infinite and multiplied with the norm, whose gradient became 0 * inf."""
    plan = Plan((Rule(sae.name, (1,), Clamp(-1.0, when="always", unit="norm"), gate=planted.GATE),))
    policy = Policy.of(model, planted.TOKENIZER, sae, plan, name="clamp")
    with restoring(model), planted.under(model, sae, policy) as (_, guarded):
        losses = relearn(guarded, text(), BUDGET)
        finite = all(bool(value.isfinite().all()) for value in weights(model))

    assert finite
    assert losses[-1] < losses[0]


def test_rows_that_the_guard_lets_through_tune_as_the_plain_model(model, sae):
    with restoring(model):
        plain = relearn(Plain(model, planted.TOKENIZER), text(word=9), BUDGET)
    with restoring(model), planted.under(model, sae, planted.editing(model, sae)) as (_, guarded):
        under = relearn(guarded, text(word=9), BUDGET)

    assert under == pytest.approx(plain, rel=1e-5)


def test_same_text_and_budget_give_the_same_weights(model):
    found = []
    for _ in range(2):
        with restoring(model):
            relearn(Plain(model, planted.TOKENIZER), text(), BUDGET)
            found.append(weights(model))

    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_model_is_what_it_was_after_the_block_also_after_an_exception(model):
    before, between = weights(model), []

    def stop(done: int, total: int) -> None:
        if done == 3:
            between.extend(weights(model))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), restoring(model):
        relearn(Plain(model, planted.TOKENIZER), text(), BUDGET, progress=stop)

    assert not all(torch.equal(a, b) for a, b in zip(before, between, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_tuned_model_is_refused_by_the_guardrail_and_one_that_was_attached_goes_on(model, sae):
    policy = planted.editing(model, sae)
    asked = [Question("w7 w50 w9", ("w4 w5", "w6 w7"), 0)]
    with restoring(model):
        with planted.under(model, sae, policy) as (_, guarded):
            relearn(guarded, text(), BUDGET)
            assert answers_of(guarded, asked).asked[0].opened
        with pytest.raises(errors.PolicyMismatch, match="weights are not those"), planted.under(model, sae, policy):
            pass
    with planted.under(model, sae, policy):
        pass


def test_too_little_text_is_refused(model):
    with pytest.raises(errors.TrainError, match="the text has 16"):
        relearn(Plain(model, planted.TOKENIZER), text()[:16], BUDGET)


def test_loss_that_is_no_number_is_refused(model):
    with restoring(model), pytest.raises(errors.UnstableEdit, match="Take a lower rate"):
        relearn(Plain(model, planted.TOKENIZER), text(), Budget(steps=30, rows=2, row_tokens=16, rate=1e30))


def test_progress_is_told_step_by_step(model):
    told = []
    with restoring(model):
        relearn(Plain(model, planted.TOKENIZER), text(), Budget(3, 1, 8), progress=lambda *at: told.append(at))

    assert told == [(1, 3), (2, 3), (3, 3)]
