"""A row's output and edits depend on its own text and plan, not on who else is in the batch, or in what order.

A case is one batch of one to five rows under mixed plans, run again with some rows dropped, repeated and in another
order. Edited sets are compared by absolute position, exactly; logits to 1e-5 of the largest; rows without a plan are
bit-identical to the plain model in a batch of the same shape.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saeguard import Clamp, Plan, Rule, Site, steer
from tests import laws, mutants, tiny
from tests.counts import cases

SAES = [tiny.tiny_sae(activation=kind, name=kind, seed=i) for i, kind in enumerate(("relu", "jumprelu", "topk"))]
SAES.append(tiny.tiny_sae(name="later", seed=7, site=Site("resid_post", 2)))
Plans = Sequence[Plan | None]


def logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


def disagreement(a: Tensor, b: Tensor, order: Sequence[int]) -> float:
    """How far the rows of a batch are from those of another one that has its rows in ``order``."""
    return max(laws.distance(b[j], a[i]) for j, i in enumerate(order))


def texts(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Any ids, special ones included, some rows padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, tiny.VOCAB, (rows, width), generator=generator)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    return ids, (torch.arange(width) < lengths).long()


@st.composite
def batches(draw: Any, **options: Any) -> tuple[list[Plan | None], list[int]]:
    """A plan or None per row, some of them shared, and the order in which a second batch takes the rows."""
    rows = draw(st.integers(1, 5))
    known = draw(st.lists(laws.plans(SAES, most=3, **options), min_size=1, max_size=3))
    plans = draw(st.lists(st.none() | st.sampled_from(known), min_size=rows, max_size=rows))
    order = draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=6))
    return plans, order


@settings(max_examples=cases(4_800))
@given(
    st.sampled_from(tiny.ARCHITECTURES),
    batches(where=laws.wheres(longest=8), gated=True),
    st.integers(1, 8),
    st.integers(0, 2**30),
)
def test_rows_do_not_depend_on_each_other(architecture, batch, width, seed):
    model, (plans, order) = tiny.tiny_model(architecture), batch
    ids, mask = texts(len(plans), width, seed)
    prompts = [(seed + row) % (width + 1) for row in range(len(plans))]
    assume(not laws.near_edge(model, plans, SAES, ids, attention_mask=mask, prompt_tokens=prompts))

    with steer(model, plans, saes=SAES, prompt_tokens=prompts) as run:
        found = logits(model, ids, mask)
    with steer(model, [plans[i] for i in order], saes=SAES, prompt_tokens=[prompts[i] for i in order]) as other:
        again = logits(model, ids[order], mask[order])

    real = mask[..., None].bool()
    assert disagreement(found.masked_fill(~real, 0), again.masked_fill(~real[order], 0), order) <= laws.TOLERANCE
    edits, other_edits = rows_of(run, len(plans)), rows_of(other, len(order))
    assert other_edits == [edits[i] for i in order]
    plain = logits(model, ids, mask)
    for row, plan in enumerate(plans):
        assert plan is not None or laws.same_bits(found[row], plain[row])
        assert plan is None or set(edits[row]) <= set(plan.rules)


def rows_of(run: Any, rows: int) -> list[dict[Rule, tuple[int, ...]]]:
    return laws.edited_by_row(run) or [{} for _ in range(rows)]


@settings(max_examples=cases(200))
@given(
    st.sampled_from(tiny.ARCHITECTURES),
    batches(where=laws.wheres(), gated=True),
    st.integers(1, 5),
    st.integers(0, 2**30),
)
def test_rows_of_a_generated_batch_do_not_depend_on_each_other(architecture, batch, width, seed):
    """Here a row is compared with a call of its own, token by token."""
    model, (plans, _) = tiny.tiny_model(architecture), batch
    ids = torch.randint(3, tiny.VOCAB, (len(plans), width), generator=torch.Generator().manual_seed(seed))
    options: Any = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [tiny.PAD]}

    with steer(model, plans, saes=SAES) as run:
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    for row, plan in enumerate(plans):
        with steer(model, [plan], saes=SAES) as one:
            alone = model.generate(ids[row : row + 1], attention_mask=torch.ones(1, width, dtype=torch.long), **options)
        assume(not laws.near_edge(model, [plan], SAES, alone, prompt_tokens=width))
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()
        assert rows_of(run, len(plans))[row] == rows_of(one, 1)[0]


def test_sequences_per_request_run_under_the_plan_of_their_request():
    model, ids = tiny.tiny_model(), tiny.prompt(3, 5)
    plans = [rule_plan(1), None, rule_plan(2)]
    torch.manual_seed(0)

    with steer(model, plans, saes=SAES) as run:
        model.generate(ids, num_return_sequences=2, do_sample=True, max_new_tokens=3, min_new_tokens=3)

    first, second = (entry.edited_positions[0] for entry in run.report.rules)
    assert [bool(row) for row in first] == [True, True, False, False, False, False]
    assert [bool(row) for row in second] == [False, False, False, False, True, True]


def rule_plan(latent: int, value: float = 60.0) -> Plan:
    return Plan((Rule("relu", (latent,), Clamp(value, when="always"), special=True),))


class Faulty:
    """Steering with a plan per row, by a mutant: latent 1 in row 0, nothing in row 1, latent 2 in row 2."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, block: nn.Module, latents: Sequence[int | None]) -> AbstractContextManager[None]:
        if self.name == "leaks rows":
            return mutants.leaks_rows(block, SAES[0], latents, 60.0)
        return mutants.edits_row_0_only(block, SAES[0], [latent for latent in latents if latent is not None], 60.0)


@pytest.mark.parametrize("fault", ["leaks rows", "edits row 0 only"])
def test_law_catches_rows_that_get_each_others_edits(fault):
    model, ids, order = tiny.tiny_model(), tiny.prompt(3, 6), [2, 1, 0]
    block, latents = model.get_submodule("model.layers.1"), [4, None, 5]

    with Faulty(fault)(block, latents):
        found = logits(model, ids)
    with Faulty(fault)(block, latents[:1]):
        alone = logits(model, ids[:1])
    with Faulty(fault)(block, [latents[i] for i in order]):
        again = logits(model, ids[order])

    moved = disagreement(found, again, order) > 1e-2 or not laws.same_bits(found[1], logits(model, ids)[1])
    assert laws.distance(alone, logits(model, ids[:1])) > 1e-2, "the fault does not edit a row alone"
    assert moved


def test_law_holds_for_the_edit_that_the_mutants_get_wrong():
    model, ids, order = tiny.tiny_model(), tiny.prompt(3, 6), [2, 1, 0]
    plans = [rule_plan(4), None, rule_plan(5)]

    with steer(model, plans, saes=SAES):
        found = logits(model, ids)
    with steer(model, [plans[i] for i in order], saes=SAES):
        again = logits(model, ids[order])

    assert disagreement(found, again, order) <= laws.TOLERANCE
    assert laws.same_bits(found[1], logits(model, ids)[1])
    assert laws.distance(found[0], logits(model, ids)[0]) > 1e-2
