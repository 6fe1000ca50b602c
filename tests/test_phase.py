"""A full pass, prefill and decode, any chunking, a static cache and no cache at all edit the same tokens.

A case is one plan on one batch, computed twice: in one pass, and in some other way. The edited sets are compared by
absolute position, exactly; logits to 1e-5 of the largest. Cases that lie within 1e-4 of an edge are rejected.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor

from saeguard import Clamp, Plan, Rule, Scale, Site, steer
from tests import laws, mutants, tiny
from tests.counts import cases

SAES = [tiny.tiny_sae(activation=kind, name=kind, seed=i) for i, kind in enumerate(("relu", "jumprelu", "topk"))]
SAES.append(tiny.tiny_sae(name="below", seed=7, site=Site("resid_pre", 1)))
Enter = Callable[[], AbstractContextManager[Any]]


def full_pass(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def in_chunks(model: nn.Module, ids: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """Logits of the whole text, fed in pieces that end at ``cuts``."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [
            model(ids[:, a:b], past_key_values=cache, use_cache=True).logits
            for a, b in pairwise((0, *cuts, ids.shape[1]))
        ]
    return torch.cat(pieces, dim=1)


def disagreement(model: nn.Module, ids: Tensor, cuts: tuple[int, ...], enter: Enter) -> float:
    """How far chunked logits are from those of one pass: the phase law is that they are not."""
    with enter():
        whole = full_pass(model, ids)
    with enter():
        chunked = in_chunks(model, ids, cuts)
    return laws.distance(chunked, whole)


@st.composite
def texts(draw: Any, *, rows: int = 2, longest: int = 12) -> Tensor:
    """Any ids, special ones included, without padding."""
    shape = (draw(st.integers(1, rows)), draw(st.integers(2, longest)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    return torch.randint(0, tiny.VOCAB, shape, generator=generator)


@settings(max_examples=cases(1_600))
@given(st.sampled_from(tiny.ARCHITECTURES), laws.plans(SAES, where=laws.wheres(), gated=True), texts(), st.data())
def test_any_chunking_edits_what_a_full_pass_edits(architecture, plan, ids, data):
    model, length = tiny.tiny_model(architecture), ids.shape[1]
    cuts = tuple(sorted(data.draw(st.sets(st.integers(1, length - 1)))))
    prompts = data.draw(st.lists(st.integers(0, length), min_size=len(ids), max_size=len(ids)))
    assume(not laws.near_edge(model, plan, SAES, ids, prompt_tokens=prompts))

    with steer(model, plan, saes=SAES, prompt_tokens=prompts) as whole:
        expected = full_pass(model, ids)
    with steer(model, plan, saes=SAES, prompt_tokens=prompts) as chunked:
        logits = in_chunks(model, ids, cuts)

    assert laws.edited(chunked) == laws.edited(whole)
    assert laws.distance(logits, expected) <= laws.TOLERANCE


WAYS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt in chunks of 2": {"prefill_chunk_size": 2},
    "prompt in chunks of 3": {"prefill_chunk_size": 3},
}


def generate(model: Any, ids: Tensor, way: dict[str, Any], **more: Any) -> Any:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, output_logits=True,
        return_dict_in_generate=True, **way, **more,
    )  # fmt: skip


def used(sequence: Tensor, prompt: int) -> int:
    """How many tokens of a generated row the model was given: not its last one, nor its EOS or what follows."""
    ends = (sequence[prompt:] == tiny.EOS).nonzero()
    return prompt + int(ends[0]) if len(ends) else len(sequence) - 1


@settings(max_examples=cases(400))
@given(
    st.sampled_from(tiny.ARCHITECTURES),
    laws.plans(SAES, where=laws.wheres(), gated=True),
    texts(),
    st.sampled_from(sorted(WAYS)),
)
def test_generation_edits_what_a_full_pass_over_its_text_edits(architecture, plan, ids, way):
    model, prompt = tiny.tiny_model(architecture), ids.shape[1]

    with steer(model, plan, saes=SAES) as run:
        output = generate(model, ids, WAYS[way], suppress_tokens=[tiny.PAD])

    for row, text in enumerate(output.sequences):
        text = text[None, : used(text, prompt)]
        assume(not laws.near_edge(model, plan, SAES, text, prompt_tokens=prompt))
        with steer(model, plan, saes=SAES, prompt_tokens=prompt) as whole:
            expected = full_pass(model, text)
        assert [laws.edited_by_row(run)[row]] == (laws.edited_by_row(whole) or [{}])
        for step in range(text.shape[1] - prompt + 1):
            assert laws.distance(output.logits[step][row], expected[0, prompt - 1 + step]) <= laws.TOLERANCE


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_chunking_beyond_a_sliding_window_edits_what_a_full_pass_edits(architecture):
    """The cache of a sliding layer forgets its oldest columns; what it counts must still be all of them."""
    model, ids = tiny.tiny_model(architecture), tiny.prompt(1, 150)
    plan = Plan((Rule("jumprelu", (1, 2, 3), Clamp(-4.0, when="active"), start=120, stop=145),))

    with steer(model, plan, saes=SAES) as whole:
        expected = full_pass(model, ids)
    with steer(model, plan, saes=SAES) as chunked:
        logits = in_chunks(model, ids, (100, 127, 128, 129, 140, 141))

    assert laws.edited(chunked) == laws.edited(whole)
    assert laws.edited_by_row(whole)[0]
    assert laws.distance(logits, expected) <= laws.TOLERANCE


class Say(LogitsProcessor):
    """Makes the model say given tokens."""

    def __init__(self, prompt: int, words: list[int]):
        self.prompt, self.words = prompt, words

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = torch.full_like(scores, -torch.inf)
        said[:, self.words[input_ids.shape[1] - self.prompt]] = 0.0
        return said


def test_pad_token_that_the_model_says_does_not_end_the_report():
    """Everything after a padding token was once taken for padding, and the report left out real edits."""
    model, ids = tiny.tiny_model(), tiny.prompt(1, 4)
    plan = Plan((Rule("relu", (1, 2, 3), Scale(2.0), special=True),))

    with steer(model, plan, saes=SAES) as run:
        output = generate(model, ids, {}, logits_processor=[Say(4, [9, tiny.PAD, 11, 12, 13, 14])])
    with steer(model, plan, saes=SAES) as whole:
        full_pass(model, output.sequences[:, :-1])

    assert laws.edited(run) == laws.edited(whole)


def test_edits_of_the_law_are_seen_in_the_logits():
    """The law would also hold if nothing were edited."""
    model, ids = tiny.tiny_model(), tiny.prompt(1, 8)

    with steer(model, Plan((Rule("relu", (1, 2, 3), Clamp(-9.0, when="active")),)), saes=SAES):
        steered = full_pass(model, ids)

    assert laws.distance(steered, full_pass(model, ids)) > 1e-2


@pytest.mark.parametrize("mutant", [mutants.zeroes_column_0, mutants.tells_phase_by_width])
def test_law_catches_phase_told_by_the_shape_of_a_pass(mutant):
    model, ids = tiny.tiny_model(), tiny.prompt(1, 8)
    enter = lambda: mutant(model.model.layers[1], SAES[0], (1, 2, 3, 4), -9.0)

    assert disagreement(model, ids, (5, 6, 7), enter) > 1e-2


def test_law_holds_for_the_edit_that_the_mutants_get_wrong():
    model, ids = tiny.tiny_model(), tiny.prompt(1, 8)
    plan = Plan((Rule("relu", (1, 2, 3, 4), Clamp(-9.0, when="active")),))

    assert disagreement(model, ids, (5, 6, 7), lambda: steer(model, plan, saes=SAES)) <= laws.TOLERANCE
