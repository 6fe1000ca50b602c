"""Rules at one site act together: all read the same x, and neither their order nor the nesting of blocks matters."""

import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saeguard import Ablate, Add, AnyActive, AtLeast, Clamp, Layout, Plan, Rule, Scale, Site, capture, steer
from saeguard.errors import ModelBusy, OverlappingRules
from tests import laws, tiny
from tests.counts import cases

SAES = [tiny.tiny_sae(activation=kind, name=kind, seed=i) for i, kind in enumerate(("relu", "jumprelu", "topk"))]
SAES.append(tiny.tiny_sae(name="later", seed=7, site=Site("resid_post", 2)))
LATENT = st.integers(0, 11)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@settings(max_examples=cases(2_000))
@given(
    st.sampled_from(tiny.ARCHITECTURES), laws.plans(SAES, most=6, where=laws.wheres(longest=8)), st.integers(0, 2**30)
)
def test_declaration_order_changes_not_one_bit(architecture, plan, seed):
    """A case is one plan of up to six rules on up to four SAEs, and the same rules shuffled."""
    model = tiny.tiny_model(architecture)
    ids = torch.randint(0, tiny.VOCAB, (2, 8), generator=torch.Generator().manual_seed(seed))
    shuffled = Plan(tuple(random.Random(seed).sample(plan.rules, len(plan.rules))))

    with steer(model, plan, saes=SAES, prompt_tokens=5) as run:
        found = logits(model, ids)
    with steer(model, shuffled, saes=SAES, prompt_tokens=5) as other:
        again = logits(model, ids)

    assert laws.same_bits(found, again)
    assert laws.edited(run) == laws.edited(other)


def test_declaration_order_of_many_rules_changes_not_one_bit():
    """Sums of many products, where the order of the terms shows in the last bit."""
    model, ids = tiny.tiny_model(), tiny.prompt(2, 8)
    saes = [tiny.tiny_sae(name=f"sae{i}", seed=i) for i in range(4)]
    rules = [Rule(sae.name, (latent,), Scale(0.1 * latent)) for sae in saes for latent in range(20)]

    with steer(model, Plan(tuple(rules)), saes=saes):
        found = logits(model, ids)
    random.Random(0).shuffle(rules)
    with steer(model, Plan(tuple(rules)), saes=saes):
        again = logits(model, ids)

    assert laws.same_bits(found, again)


@settings(max_examples=cases(1_000))
@given(
    st.sampled_from(tiny.ARCHITECTURES), laws.plans(SAES, most=6, where=laws.wheres(longest=8)), st.integers(0, 2**30)
)
def test_nested_blocks_equal_one_flat_plan(architecture, plan, seed):
    """A case is one plan, and the same rules spread over an outer and an inner block."""
    model = tiny.tiny_model(architecture)
    ids = torch.randint(0, tiny.VOCAB, (2, 8), generator=torch.Generator().manual_seed(seed))
    claimed = [(rule.sae, latent) for rule in plan.rules for latent in rule.latents]
    assume(len(plan.rules) > 1 and len(set(claimed)) == len(claimed))  # priorities do not reach across blocks
    assume(not laws.near_edge(model, plan, SAES, ids, prompt_tokens=5))
    cut = 1 + seed % (len(plan.rules) - 1)
    outer, inner = Plan(plan.rules[:cut]), Plan(plan.rules[cut:])

    with steer(model, plan, saes=SAES, prompt_tokens=5) as flat:
        expected = logits(model, ids)
    with steer(model, outer, saes=SAES, prompt_tokens=5) as a, steer(model, inner, saes=SAES, prompt_tokens=5) as b:
        found = logits(model, ids)

    assert laws.distance(found, expected) <= laws.TOLERANCE
    assert laws.edited(a) | laws.edited(b) == laws.edited(flat)


@given(LATENT, st.sets(LATENT), st.sets(LATENT), st.sampled_from((None, 0, 4)), st.sampled_from((None, 0, 4)))
def test_two_rules_that_set_one_latent_are_refused_unless_their_priorities_differ(latent, some, others, a, b):
    first = Rule("relu", tuple(some | {latent}), Clamp(1.0, when="always"), priority=a)
    second = Rule("relu", tuple(others | {latent}), Ablate(), priority=b, trigger=AnyActive((30,)))

    if a is None or b is None or a == b:
        with pytest.raises(OverlappingRules, match=r"latent \d+ of relu set by two rules of one row"):
            Plan((first, second))
    else:
        assert Plan((first, second)).rules == (first, second)


def test_rules_that_meet_only_after_sites_are_settled_are_refused_before_the_model_is_touched():
    model = tiny.tiny_model()
    here = Rule("relu", (3,), Add(1.0))
    spelled_out = Rule("relu", (3,), Add(2.0), site=Site("resid_post", 1))

    refused = pytest.raises(OverlappingRules, match="nothing says which of them acts")
    with refused, steer(model, Plan((here, spelled_out)), saes=SAES):
        pass


def test_rules_on_one_latent_in_two_nested_blocks_are_refused():
    model = tiny.tiny_model()
    plan = Plan((Rule("relu", (3, 4), Add(1.0)),))

    refused = pytest.raises(OverlappingRules, match=r"latents \[4\] of relu .* nested blocks")
    with steer(model, plan, saes=SAES):
        with refused, steer(model, Plan((Rule("relu", (4, 5), Ablate()),)), saes=SAES):
            pass
        logits(model, tiny.prompt())


def test_same_latent_in_plans_of_different_rows_is_no_overlap():
    model = tiny.tiny_model()
    plans = [Plan((Rule("relu", (3,), Clamp(v, when="always"), special=True),)) for v in (2.0, 60.0)]

    with steer(model, plans, saes=SAES) as run:
        logits(model, tiny.prompt(2, 3))

    assert [entry.edited_positions for entry in run.report.rules] == [(((0, 1, 2), ()),), (((), (0, 1, 2)),)]


def edited_stack(x: list[list[float]], *rules: Rule) -> list[list[float]]:
    """The stream of one row after the rules, on an SAE whose latents are the coordinates."""
    eye, zero = torch.eye(2), torch.zeros(2)
    sae = laws.SAE("eye", eye, zero, eye, zero, site=laws.STACK_SITE)
    stack = laws.Stack(2)
    with steer(stack, Plan(rules), saes=sae, layout=Layout("blocks")):
        return stack(inputs_embeds=torch.tensor([x]))[0].tolist()


def test_higher_priority_acts_where_both_apply_and_the_lower_one_elsewhere():
    low = Rule("eye", (0,), Clamp(5.0, when="always"), special=True, priority=1)
    high = Rule("eye", (0,), Clamp(9.0, when="always"), special=True, priority=2, trigger=AnyActive((1,)))
    x = [[1.0, 0.0], [1.0, 1.0]]

    assert edited_stack(x, low, high) == edited_stack(x, high, low) == [[5.0, 0.0], [9.0, 1.0]]


def test_higher_priority_that_changes_nothing_still_keeps_the_lower_one_away():
    low = Rule("eye", (0,), Clamp(5.0, when="always"), special=True, priority=1)
    high = Rule("eye", (0,), AtLeast(0.0), special=True, priority=2)

    assert edited_stack([[1.0, 0.0]], low, high) == [[1.0, 0.0]]


def test_every_rule_reads_activations_from_before_all_edits():
    """Rule by rule, the first would switch latent 1 off and the trigger of the second would no longer fire."""
    first = Rule("eye", (1,), Ablate(), special=True)
    second = Rule("eye", (0,), Add(3.0), special=True, trigger=AnyActive((1,)))

    assert edited_stack([[1.0, 2.0]], first, second) == edited_stack([[1.0, 2.0]], second, first) == [[4.0, 0.0]]


@pytest.mark.parametrize("inner", [True, False], ids=["the part second", "the part first"])
@pytest.mark.parametrize("second", ["steer", "steer without canary", "capture"])
@pytest.mark.parametrize("first", ["steer", "capture"])
def test_block_on_a_model_and_block_on_a_part_of_it_are_refused_in_either_order(first, second, inner):
    """They would not be joint, and a capture on one would not see the edits of the other."""
    model, plans = tiny.fresh_model(), [Plan((Rule("relu", (latent,), AtLeast(4.0)),)) for latent in (1, 2)]
    models = (model, model.model) if inner else (model.model, model)

    def block(way: str, which: int):
        if way == "capture":
            return capture(models[which], "resid_post.1")
        return steer(models[which], plans[which], saes=SAES, canary="without" not in way)

    with block(first, 0):
        with pytest.raises(ModelBusy, match="Open both blocks on the same one"), block(second, 1):
            raise AssertionError("entered")
        models[0](tiny.prompt(1, 5))
    with block(second, 1), torch.no_grad():
        models[1](tiny.prompt(1, 5))
