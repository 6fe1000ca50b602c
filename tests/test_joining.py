"""Several policies as one: each topic is decided on as its own policy alone decides, and what clashes is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard import Add, Clamp, Plan, Rule, errors
from saeguard.gates import Count, Hits, Latched, Watch
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.joining import PARTS, joined
from saeguard.guarding.policy import Policy, Refuse
from tests import policies, tiny
from tests.counts import cases
from tests.words import word_tokenizer

TOKENIZER = word_tokenizer()
SAE = tiny.tiny_sae()
LEVEL = 25.0
LATENTS = st.lists(st.integers(0, SAE.d_sae - 1), min_size=1, max_size=4, unique=True).map(tuple)


def opens_on(*latents: int) -> Any:
    """A gate that opens in some random rows and not in others."""
    return Latched(Watch(Hits(latents, LEVEL), Count(), 0.0))


def policy(name: str, *rules: Rule, **options: Any) -> Policy:
    plan = Plan(rules) if rules else None
    return Policy.of(tiny.tiny_model(), TOKENIZER, SAE, plan, name=name, **options)


def editing(name: str, latents: tuple[int, ...], gate: Any, value: float = 3.0, **options: Any) -> Policy:
    return policy(name, Rule("tiny", latents, Clamp(value, when="always"), gate=gate), **options)


def logits(policy: Policy | None, ids: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """Of every token, and in which rows a gate opened."""
    if policy is None:
        with torch.no_grad():
            return tiny.tiny_model()(ids).logits, [False] * len(ids)
    guard = Guardrail.attach(tiny.tiny_model(), policy, tokenizer=TOKENIZER, saes=SAE)
    with guard, torch.no_grad(), guard.rows(n=len(ids), measuring=True) as table:
        found = tiny.tiny_model()(ids).logits
        return found, [one.gate for one in guard.opened(table)]


def alone(policies: list[Policy], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each policy makes of every row by itself, and which of them opened, ``policy row ...``."""
    several = [logits(one, ids) for one in policies]
    return torch.stack([x for x, _ in several]), torch.tensor([opened for _, opened in several])


@settings(max_examples=cases(200), deadline=None)
@given(a=LATENTS, b=LATENTS, seed=st.integers(0, 2**20))
def test_rows_of_one_topic_are_what_its_own_policy_makes_of_them(a, b, seed):
    """Shared latents, which both policies set to one value, are set once and wherever either gate is open."""
    ids = tiny.prompt(8, 9, seed=seed)
    both = [editing("a", a, opens_on(1, 2)), editing("b", b, opens_on(5, 9))]
    found, opened = logits(joined(both), ids)
    own, gates = alone(both, ids)
    plain, _ = logits(None, ids)

    assert opened == gates.any(0).tolist()
    for row in range(len(ids)):
        if gates[:, row].sum() == 0:
            assert torch.equal(found[row], plain[row])
        elif gates[:, row].sum() == 1:
            of = int(gates[:, row].int().argmax())
            torch.testing.assert_close(found[row], own[of, row])  # sums over more latents round differently


def test_rows_of_both_topics_have_the_edits_of_both():
    ids = tiny.prompt(6, 9)
    both = [editing("a", (3, 4), None), editing("b", (4, 5), None)]
    one = editing("one", (3, 4, 5), None)

    torch.testing.assert_close(logits(joined(both), ids)[0], logits(one, ids)[0])


def test_random_rows_are_of_every_kind():
    """Else the law above would say little."""
    gates = torch.cat([
        alone([editing("a", (3,), opens_on(1, 2)), editing("b", (4,), opens_on(5, 9))], tiny.prompt(8, 9, seed=seed))[1]
        for seed in range(8)
    ], 1)  # fmt: skip

    assert set(map(tuple, gates.T.tolist())) == {(a, b) for a in (False, True) for b in (False, True)}


def test_refusals_of_all_stand_in_the_order_of_the_policies():
    first = Refuse(opens_on(1), "tiny", None, "No a.", "a.gate")
    second = Refuse(opens_on(2), "tiny", None, "No b.", "b.gate")
    found = joined([policy("a", refusals=(first,)), policy("b", refusals=(second, first))])

    assert found.refusals == (first, second)
    assert found.plan is None


def test_joined_policy_is_a_policy_like_any_other(tmp_path):
    a = editing("a", (3,), opens_on(1), calibration={"level": 0.01}, serial=4)
    b = editing("b", (4,), opens_on(2), on_error="bypass", serial=9)
    found = joined([a, b])
    found.save(tmp_path / "both.json")

    assert Policy.load(tmp_path / "both.json") == found
    assert (found.name, found.serial, found.on_error) == ("a + b", 9, "refuse")
    assert found.calibration["a"] == {"level": 0.01}
    assert [part["fingerprint"] for part in found.calibration[PARTS]] == [a.fingerprint(), b.fingerprint()]
    assert joined([b, replace(b, name="c")]).on_error == "bypass"


def test_joining_two_and_then_a_third_is_joining_three():
    three = [editing(name, (i,), opens_on(i)) for i, name in enumerate("abc")]
    step, once = joined([joined(three[:2]), three[2]]), joined(three)

    assert step.plan is not None
    assert once.plan is not None
    assert step.plan.rules == once.plan.rules
    assert step.calibration == once.calibration


@pytest.mark.parametrize("shared", [True, False])
def test_rules_are_left_as_they_are_unless_latents_are_shared(shared):
    a, b = editing("a", (3,), opens_on(1)), editing("b", (3,) if shared else (4,), opens_on(2))
    found = joined([a, b])

    assert a.plan is not None
    assert b.plan is not None
    assert found.plan is not None
    assert [rule.priority is None for rule in found.plan.rules] == [not shared] * 2
    assert (found.plan.rules == a.plan.rules + b.plan.rules) is not shared


def test_priorities_within_a_policy_keep_their_order():
    two = (Rule("tiny", (3,), Clamp(1.0, when="always"), priority=-7),
           Rule("tiny", (3,), Clamp(2.0, when="always"), priority=5))  # fmt: skip
    per_latent = Rule("tiny", (9, 3), Clamp((4.0, 1.0), when="always"))
    found = joined([policy("a", two[0]), policy("b", per_latent)])

    assert found.plan is not None
    priorities = [rule.priority for rule in found.plan.rules]
    assert all(type(one) is int for one in priorities)
    assert priorities[0] > priorities[1]  # type: ignore[operator]
    with pytest.raises(errors.OverlappingRules, match="latent 3 of tiny, to different things"):
        joined([policy("a", *two), policy("b", per_latent)])


CLASHES = {
    "another amount": (lambda: editing("b", (3,), None, 4.0), errors.OverlappingRules, "both set latent 3 of tiny"),
    "another op": (lambda: policy("b", Rule("tiny", (3,), Add(3.0))), errors.OverlappingRules, "Fit one of them"),
    "another model": (
        lambda: replace(editing("b", (4,), None), model=policies.with_gate(opens_on(1)).model),
        errors.PolicyMismatch, "model's weights are not the same; their model's configurations are not the same",
    ),
    "another tokenizer": (
        lambda: replace(editing("b", (4,), None), tokenizer="0" * 64), errors.PolicyMismatch, "tokenizers are not",
    ),
    "another SAE of one name": (
        lambda: Policy.of(tiny.tiny_model(), TOKENIZER, policies.shifted_sae(),
                          Plan((Rule("tiny", (4,), Clamp(3.0, when="always")),)), name="b"),
        errors.PolicyMismatch, "SAE tiny is another one. Fit both for one model",
    ),
    "one name": (lambda: editing("a", (4,), None), errors.BadPolicy, "two called a"),
}  # fmt: skip


@pytest.mark.parametrize("clash", CLASHES)
def test_policies_that_contradict_each_other_are_refused_by_name(clash):
    make, kind, text = CLASHES[clash]

    with pytest.raises(kind, match=text):
        joined([editing("a", (3,), None), make()])


def test_one_reason_for_two_refusals_is_refused():
    stop = Refuse(opens_on(1), "tiny", None, "No.", "gate")

    with pytest.raises(errors.BadPolicy, match="two refusals have one reason"):
        joined([policy("a", refusals=(stop,)), policy("b", refusals=(replace(stop, text="Never."),))])


def test_one_policy_is_not_joined():
    with pytest.raises(errors.BadPolicy, match="Give two or more"):
        joined([editing("a", (3,), None)])
