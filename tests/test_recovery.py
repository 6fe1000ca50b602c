"""Residual recovery: what a guard takes away comes back where a path exists that it cannot see, and only there."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from saeguard import SAE, Clamp, Plan, Rule, Site, errors
from saeguard.evaluating import recovery
from saeguard.evaluating.multiple_choice import Question, answers_of
from saeguard.evaluating.pushing import Push, pushing
from saeguard.evaluating.recovery import Effort, Tried, choice_nats, recover
from saeguard.evaluating.subject import Plain
from saeguard.gates import Count, Hits, Latched, Watch
from saeguard.guarding.policy import Policy
from tests import planted, tiny

LATENTS, STRENGTH = (3, 5), 1.0
EFFORT = Effort(budget=1.0, steps=16, universal_steps=50, batch=6)

LITTLE = replace(EFFORT, steps=6, universal_steps=6)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.fresh_model()


@pytest.fixture(scope="module")
def sae(model: Any) -> SAE:
    """Behind the last block, where what an edit writes is what the model says; encoder and decoder are unrelated."""
    return tiny.tiny_sae(site=Site("resid_post", tiny.LAYERS - 1), name="late")


@pytest.fixture(scope="module")
def policy(model: Any, sae: SAE) -> Policy:
    """Where the planted word has been seen, two latents write loudly over what the model would say."""
    early = planted.planted_sae(model)
    gate = Latched(Watch(Hits((0,), sae=early.name, site=early.site), Count(), 0.0))
    plan = Plan((Rule(sae.name, LATENTS, Clamp(-STRENGTH, when="always", unit="norm"), gate=gate),))
    return Policy.of(model, planted.TOKENIZER, [early, sae], plan, name="planted")


def known(model: Any, n: int, seed: int) -> list[Question]:
    """Questions of the planted topic; right is what the model says plainly, so that it knows them all.

    Choices differ in their second word, since the colon before the first is a special token here, and never edited.
    """
    asked = [
        Question(one["question"], tuple(f"w{3 + (i + seed) % 40} w{3 + (5 * i + j) % 40}" for j in range(4)), 0)
        for i, one in enumerate(planted.rows_of(2 * n, seed=seed)) if one["topic"] == "left"
    ]  # fmt: skip
    sums = answers_of(Plain(model, planted.TOKENIZER), asked).sum
    return [replace(one, gold=row.index(max(row))) for one, row in zip(asked, sums, strict=True)]


@pytest.fixture(scope="module")
def questions(model: Any) -> list[Question]:
    return known(model, 12, seed=3)


@contextmanager
def under_attack(model: Any, sae: SAE, policy: Policy, *, before: bool = False) -> Iterator[Any]:
    guard = planted.under(model, [planted.planted_sae(model), sae], policy)
    attack = pushing(model, planted.TOKENIZER, sae, LATENTS)
    with ExitStack() as stack:
        early = stack.enter_context(attack) if before else None
        plain, guarded = stack.enter_context(guard)
        yield early or stack.enter_context(attack), plain, guarded


@pytest.fixture(scope="module")
def found(model: Any, sae: SAE, policy: Policy, questions: list[Question]) -> Any:
    with under_attack(model, sae, policy) as (push, plain, guarded):
        return recover(plain, guarded, push, questions, effort=EFFORT)


def test_answers_that_the_guard_takes_away_come_back(found, questions):
    assert found.plain == len(questions)
    assert len(found.each) == found.plain - found.guarded >= 5
    assert found.universal.trained_on + found.universal.n == found.n
    assert found.recovered >= 0.8 * len(found.each)
    assert all(one.norm <= EFFORT.budget + 1e-5 for one in found.each)


def test_random_pushes_of_the_same_length_bring_back_fewer(found):
    assert sum(one.random for one in found.each) <= 0.5 * found.recovered


def test_one_push_for_all_brings_back_answers_that_it_was_not_found_on(model, sae, policy, monkeypatch):
    monkeypatch.setattr(recovery, "_attack", lambda *_: {**asdict(Tried(False, 0.0, False, 0.0, False, True)),
                                                         "reaction": (1, 1.0, 0.0, 0)})  # fmt: skip
    held, learn = known(model, 40, seed=3), known(model, 400, seed=4)
    with under_attack(model, sae, policy) as (push, plain, guarded):
        one = recover(
            plain, guarded, push, held, learn=learn, effort=Effort(universal_steps=30, batch=8)
        ).universal  # fmt: skip

    assert (one.trained_on, one.n) == (400, 40)
    assert one.suppressed >= 20
    assert one.recovered >= max(0.2 * one.suppressed, 1.4 * one.random_recovered)


def test_guarded_latents_do_not_notice(found):
    assert found.woken == 0.0
    assert found.change < 1e-3
    assert all(one.opened for one in found.each)


def test_push_that_may_touch_the_latents_is_noticed(model, sae, policy, questions):
    """The same attack without the projection: else the test above could not fail."""
    with under_attack(model, sae, policy) as (push, plain, guarded):
        push._basis = push._basis[:, :0]
        found = recover(plain, guarded, push, questions[:8], effort=LITTLE)

    assert found.change > 0.1 or found.woken > 0.1


def test_guarded_latents_do_not_notice_a_push_that_their_edit_reads(model, sae, policy, questions):
    with under_attack(model, sae, policy, before=True) as (push, plain, guarded):
        found = recover(plain, guarded, push, questions[:8], effort=LITTLE)

    assert (found.woken, found.universal.norm > 0) == (0.0, True)
    assert found.change < 1e-3


def test_tiny_budget_recovers_nothing(model, sae, policy, questions):
    with under_attack(model, sae, policy) as (push, plain, guarded):
        found = recover(plain, guarded, push, questions[:8], effort=Effort(1e-4, 3, 3))

    assert found.recovered == 0


def test_latents_that_span_the_stream_leave_no_push(model):
    wide = tiny.tiny_sae(d_sae=tiny.D)

    with (
        pytest.raises(errors.ScoreMismatch, match="span all 32 directions"),
        pushing(model, planted.TOKENIZER, wide, range(tiny.D)),
    ):
        pass


def test_nothing_is_left_on_the_model(model, sae, policy, questions):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sums = answers_of(Plain(model, planted.TOKENIZER), questions[:4]).sum
    with under_attack(model, sae, policy) as (push, plain, guarded):
        push.u = torch.ones(tiny.D)
        pushed = answers_of(plain, questions[:4]).sum

    assert pushed != sums
    assert answers_of(Plain(model, planted.TOKENIZER), questions[:4]).sum == sums
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_special_tokens_and_padding_are_not_pushed(model, sae):
    ids = torch.tensor([[tiny.PAD, tiny.BOS, 7, 8], [tiny.BOS, 9, tiny.EOS, 10]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    seen = []
    with pushing(model, planted.TOKENIZER, sae, LATENTS) as push, torch.no_grad():
        push.u = push.allowed(torch.ones(tiny.D), 1.0)
        own = push.add
        push.add = lambda x: x  # type: ignore[method-assign]
        model(input_ids=ids, attention_mask=mask)
        x = torch.randn(2, 4, tiny.D)
        seen.append((own(x) != x).any(-1).tolist())

    assert seen == [[[False, False, True, True], [False, True, False, True]]]


def test_loss_is_that_of_the_answers(model, sae, policy, questions):
    with planted.under(model, [planted.planted_sae(model), sae], policy) as (_, guarded), torch.no_grad():
        for one, sums in zip(questions, answers_of(guarded, questions).sum, strict=True):
            assert choice_nats(guarded, one).tolist() == pytest.approx(sums, abs=1e-3)


def test_interrupted_attack_goes_on_to_the_same_numbers(model, sae, policy, questions, monkeypatch):
    notes: dict[str, Any] = {}
    asked = questions[:8]
    with under_attack(model, sae, policy) as (push, plain, guarded):
        whole = recover(plain, guarded, push, asked, effort=LITTLE)
        with monkeypatch.context() as patch:
            own, calls = recovery._attack, []

            def until_the_third(*args: Any) -> Any:
                calls.append(args)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return own(*args)

            patch.setattr(recovery, "_attack", until_the_third)
            with pytest.raises(KeyboardInterrupt):
                recover(plain, guarded, push, asked, effort=LITTLE, notes=notes)
        kept = list(notes)
        again = recover(plain, guarded, push, asked, effort=LITTLE, notes=notes)

    assert len(kept) == 3
    assert asdict(again) == asdict(whole)


def test_model_that_knows_nothing_is_not_attacked(model, sae, policy, questions):
    wrong = [replace(one, gold=(one.gold + 1) % len(one.choices)) for one in questions]
    with (
        under_attack(model, sae, policy) as (push, plain, guarded),
        pytest.raises(errors.ScoreMismatch, match="answers 0 of them plainly"),
    ):
        recover(plain, guarded, push, wrong)


def test_push_stays_as_near_as_it_can(sae):
    push = Push(None, sae, LATENTS, frozenset())
    u = torch.randn(tiny.D, generator=torch.Generator().manual_seed(0))
    near = push.allowed(u, 1e9)

    assert (near @ sae.W_enc[:, LATENTS]).abs().max() < 1e-5
    torch.testing.assert_close(push.allowed(near, 1e9), near)
    assert float((u - near) @ near) == pytest.approx(0.0, abs=1e-4)
    assert float(push.allowed(u, 0.5).norm()) == pytest.approx(0.5)
