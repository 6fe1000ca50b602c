"""An edit that changes nothing returns every vector bit for bit: signs of zeros, subnormals and huge values included.

A case is one tensor of one dtype that went through real hooks under a plan that has nothing to do there: a trigger
that does not fire, an op that sets activations to what they are, no latents, no tokens, no plan for the row.
"""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard import (
    SAE,
    Ablate,
    Add,
    AnyActive,
    AtLeast,
    AtMost,
    Clamp,
    ClampAbove,
    Layout,
    Misdirect,
    Plan,
    Project,
    Reduce,
    Reweight,
    Rule,
    Scale,
    Splice,
    steer,
)
from tests import laws, tiny
from tests.counts import cases

D = 6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = 4
SAES = [
    tiny.tiny_sae(d_in=D, d_sae=12, activation=kind, name=kind, seed=i, site=laws.STACK_SITE)
    for i, kind in enumerate(("relu", "jumprelu", "topk"))
]
NEVER = AnyActive((0, 1), 3e38)
ANY_LATENTS = (0, 3, 5)

ZERO_EDITS = {
    "add nothing": {"op": Add(0.0)},
    "add nothing, each": {"op": Add((0.0, -0.0, 0.0), unit="max")},
    "scale by one": {"op": Scale(1.0)},
    "scale by one, each": {"op": Scale((1.0, 1.0, 1.0))},
    "raise to what is below": {"op": AtLeast(0.0)},
    "raise to far below": {"op": AtLeast(-3.0, unit="max")},
    "lower to what is above": {"op": AtMost(3e38)},
    "clamp above what is there": {"op": ClampAbove(9.0, above=3e38)},
    "clamp above, each": {"op": ClampAbove((9.0, 8.0, 7.0), above=(3e38, 1e38, 2e38), unit="max")},
    "reduce by nothing": {"op": Reduce(0.0)},
    "no latents": {"latents": (), "op": Clamp(9.0, when="always")},
    "no latents under a trigger": {"latents": (), "op": Ablate(), "trigger": AnyActive((0, 1, 2))},
    "trigger never fires": {"op": Clamp(9.0, when="always"), "trigger": NEVER},
    "trigger watches nothing": {"op": Add(9.0), "trigger": AnyActive(())},
    "no tokens": {"op": Clamp(9.0, when="always", unit="max"), "stop": 0},
    "first none": {"op": Scale(-4.0), "first": 0},
}

SPLICE = {"latents": (), "op": Splice()}
ONES = {"op": Reweight((1.0, 1.0, 1.0), mode="weight", others=1.0)}
DENSE_ZERO_EDITS = {
    "keep the error": {"latents": (), "op": Splice("kept")},
    "weigh by one": ONES,
    "weigh nobody": {"latents": (), "op": Reweight((), mode="weight", others=1.0)},
    "swap for itself": {"op": Reweight(1.0, mode="swap", others=1.0)},
    "splice where a trigger never fires": SPLICE | {"trigger": NEVER},
    "splice no tokens": SPLICE | {"stop": 0},
    "weigh where a trigger never fires": {"op": Reweight(-2.0, mode="swap"), "trigger": NEVER},
    "misdirect where a trigger never fires": {"latents": (), "op": Misdirect(20.0), "trigger": NEVER},
    "misdirect no tokens": {"latents": (), "op": Misdirect(0.5, unit="norm"), "start": 99},
    "project by nothing": {"op": Project(0.0)},
    "project nobody": {"latents": (), "op": Project()},
    "project where a trigger never fires": {"op": Project(), "trigger": NEVER},
    "weigh the first none": {"op": Reweight(-2.0, mode="weight", top_k=3), "first": 0},
}


def numbers(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A stream of ordinary, subnormal, tiny and huge numbers and zeros of both signs.

    Huge ends where a sum of ``D`` products no longer fits float32: beyond it the activations themselves are infinite.
    """
    rng = random.Random(seed)
    largest = min(torch.finfo(dtype).max, 1e35)
    smallest = torch.finfo(dtype).smallest_normal
    special = [0.0, -0.0, smallest, -smallest, smallest / 8, -smallest / 32, largest, -largest, largest / 3, 1.0, -1.0]
    wild = rng.choice((0.0, 0.2, 1.0))
    flat = [rng.choice(special) if rng.random() < wild else rng.gauss(0, 3) for _ in range(2 * 3 * D)]
    return torch.tensor(flat, dtype=torch.float64).to(dtype).view(2, 3, D)


def rule(sae: SAE, **parts: Any) -> Rule:
    return Rule(sae.name, parts.pop("latents", ANY_LATENTS), **{"special": True} | parts)


@settings(max_examples=cases(10_000, per_example=TENSORS))
@given(
    st.lists(st.sampled_from(sorted(ZERO_EDITS)), min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from(SAES), min_size=1, max_size=3, unique_by=lambda sae: sae.name),
    st.integers(0, 2**30),
)
def test_edits_that_change_nothing_return_every_tensor_bit_for_bit(names, saes, seed):
    """10,000 tensors in each dtype."""
    plan = Plan(tuple(rule(sae, priority=i, **ZERO_EDITS[name]) for sae in saes for i, name in enumerate(names)))
    stack = laws.Stack(D)
    streams = [numbers(dtype, seed + i) for i in range(TENSORS) for dtype in DTYPES]

    with steer(stack, plan, saes=saes, layout=Layout("blocks")):
        after = [stack(inputs_embeds=x) for x in streams]

    assert all(laws.same_bits(x, y) for x, y in zip(streams, after, strict=True))


@settings(max_examples=cases(10_000, per_example=TENSORS))
@given(
    st.sampled_from(sorted(DENSE_ZERO_EDITS)),
    st.lists(st.sampled_from(SAES), min_size=1, max_size=3, unique_by=lambda sae: sae.name),
    st.integers(0, 2**30),
)
def test_dense_ops_that_change_nothing_return_every_tensor_bit_for_bit(name, saes, seed):
    """10,000 tensors in each dtype."""
    edits = DENSE_ZERO_EDITS[name]
    saes = saes if isinstance(edits["op"], Reweight) else saes[:1]  # two that set the whole stream are refused
    plan = Plan(tuple(rule(sae, **edits) for sae in saes))
    stack = laws.Stack(D)
    streams = [numbers(dtype, seed + i) for i in range(TENSORS) for dtype in DTYPES]

    with steer(stack, plan, saes=saes, layout=Layout("blocks")):
        after = [stack(inputs_embeds=x) for x in streams]

    assert all(laws.same_bits(x, y) for x, y in zip(streams, after, strict=True))


@settings(max_examples=cases(10_000, per_example=TENSORS))
@given(st.integers(0, 2**30), st.integers(0, 3), st.data())
def test_tokens_and_rows_that_a_plan_is_not_about_keep_every_bit(seed, start, data):
    """10,000 tensors in each dtype; here the rest of the tensor is edited, and with large amounts."""
    sae = data.draw(st.sampled_from(SAES))
    edits = ({"op": Clamp(50.0, when="always")}, SPLICE, {"op": Reweight(-3.0, mode="swap", top_k=2)})
    plan = Plan((rule(sae, **data.draw(st.sampled_from(edits)), start=start),))
    stack = laws.Stack(D)
    streams = [numbers(dtype, seed + i) / 1024 for i in range(TENSORS) for dtype in DTYPES]

    with steer(stack, [plan, None], saes=sae, layout=Layout("blocks")) as run:
        after = [stack(inputs_embeds=x) for x in streams]

    for x, y in zip(streams, after, strict=True):
        assert laws.same_bits(x[1], y[1])
        assert laws.same_bits(x[0, :start], y[0, :start])
    assert run.report.rules[0].tokens_selected == len(streams) * (3 - start)


@settings(max_examples=cases(10_000, per_example=TENSORS))
@given(st.integers(0, 2**30))
def test_clamp_where_active_leaves_inactive_latents_bit_for_bit(seed):
    """10,000 tensors in each dtype; with these biases no latent is ever active."""
    base = SAES[0]
    silent = SAE("silent", base.W_enc, torch.full((12,), -3e38), base.W_dec, base.b_dec, "relu", site=laws.STACK_SITE)
    plan = Plan((rule(silent, op=Clamp(-20.0, when="active")),))
    stack = laws.Stack(D)
    streams = [numbers(dtype, seed + i) for i in range(TENSORS) for dtype in DTYPES]

    with steer(stack, plan, saes=silent, layout=Layout("blocks")):
        after = [stack(inputs_embeds=x) for x in streams]

    assert all(laws.same_bits(x, y) for x, y in zip(streams, after, strict=True))


def test_no_plan_returns_every_tensor_bit_for_bit():
    stack = laws.Stack(D)
    x = numbers(torch.float16, 0)

    with steer(stack, None, layout=Layout("blocks")):
        after = stack(inputs_embeds=x)

    assert laws.same_bits(x, after)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_harness_sees_an_edit(dtype):
    """Without this the laws above could hold because nothing ever runs."""
    sae = SAES[0]
    stack = laws.Stack(D)
    x = torch.ones(2, 3, D, dtype=dtype)

    with steer(stack, Plan((rule(sae, op=Add(4.0)),)), saes=sae, layout=Layout("blocks")):
        after = stack(inputs_embeds=x)

    assert not laws.same_bits(x, after)
    assert after.dtype == dtype


@settings(max_examples=cases(200))
@given(
    st.sampled_from(tiny.ARCHITECTURES),
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.sampled_from(sorted(ZERO_EDITS | DENSE_ZERO_EDITS)),
    st.integers(0, 9999),
)
def test_generation_under_an_edit_that_changes_nothing_is_bit_identical(architecture, dtype, name, seed):
    """A case is one generate call of ten tokens: every token and every logit, in the model's dtype."""
    model = tiny.fresh_model(architecture, dtype=dtype)
    sae = tiny.tiny_sae()
    ids = tiny.prompt(2, 5, seed=seed)
    options: Any = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    plain = model.generate(ids, **options)
    with steer(model, Plan((rule(sae, **(ZERO_EDITS | DENSE_ZERO_EDITS)[name]),)), saes=sae):
        steered = model.generate(ids, **options)

    assert torch.equal(plain.sequences, steered.sequences)
    assert all(laws.same_bits(a, b) for a, b in zip(plain.logits, steered.logits, strict=True))
