"""Fluency is the plain model's own likelihood of what was written, row by row, whatever the padding and the batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard import Add, Plan, Rule, steer
from saeguard.errors import ModelBusy
from saeguard.evaluating.fluency import continuation_nats, distinct_pairs, perplexity_ratio, word_share
from tests.counts import cases
from tests.tiny import ARCHITECTURES, EOS, PAD, VOCAB, prompt, tiny_model, tiny_sae

TOKENS = st.integers(3, VOCAB - 1)


def slowly(model, before: list[int], written: list[int]) -> float:
    """One token after the other, each from a pass of its own."""
    nats = []
    for place, token in enumerate(written):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([before + written[:place]])).logits[0, -1]
        nats.append(-float(logits.log_softmax(-1)[token]))
    return sum(nats) / len(nats)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=cases(60), deadline=None)
@given(data=st.data())
def test_nats_of_a_padded_batch_are_those_of_one_token_after_the_other(architecture, data):
    model = tiny_model(architecture)
    prompts = data.draw(st.lists(st.lists(TOKENS, min_size=1, max_size=5), min_size=1, max_size=4))
    written = [data.draw(st.lists(TOKENS, min_size=3, max_size=3)) for _ in prompts]
    width = max(map(len, prompts))
    ids = [[PAD] * (width - len(row)) + row + new for row, new in zip(prompts, written, strict=True)]
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])

    nats = continuation_nats(model, torch.tensor(ids), mask, batch_rows=data.draw(st.integers(1, 3)))

    for row, found in enumerate(nats.tolist()):
        assert found == pytest.approx(slowly(model, prompts[row], written[row]), abs=1e-4)


def test_what_stands_behind_the_first_stop_does_not_count_and_the_stop_does():
    model, before = tiny_model(), prompt(1, 4)
    ended = torch.cat([before, torch.tensor([[9, EOS, 5, 5]])], dim=1)

    nats = continuation_nats(model, ended, torch.ones_like(before), stop_ids=[EOS])

    assert float(nats) == pytest.approx(slowly(model, before[0].tolist(), [9, EOS]), abs=1e-4)


def test_a_row_that_wrote_nothing_has_no_perplexity():
    model, before = tiny_model(), prompt(2, 4)

    nats = continuation_nats(model, before, torch.ones_like(before))

    assert bool(nats.isnan().all())
    assert math.isnan(perplexity_ratio(nats, nats))


def test_text_is_not_judged_by_the_model_that_is_being_steered():
    model, sae, before = tiny_model(), tiny_sae(), prompt(1, 4)

    with steer(model, Plan((Rule("tiny", (1,), Add(1.0)),)), saes=sae):
        ids = model.generate(before, max_new_tokens=2)
        with pytest.raises(ModelBusy):
            continuation_nats(model, ids, torch.ones_like(before))


def test_the_ratio_is_of_geometric_means_over_rows_that_have_both():
    steered, plain = torch.tensor([1.0, 2.0, math.nan]), torch.tensor([0.5, 1.5, 9.0])

    ratio = perplexity_ratio(steered, plain)

    assert ratio == pytest.approx(math.exp(0.5))


def test_words_are_counted_whatever_their_case_and_signs():
    assert word_share("The Moon, the moon!", ["MOON"]) == 0.5
    assert word_share("", ["moon"]) == 0.0
    assert distinct_pairs("a b a b a b") == pytest.approx(2 / 5)
    assert distinct_pairs("one") == 1.0


def test_no_rows_have_no_nats():
    assert continuation_nats(
        tiny_model(), torch.zeros(0, 5, dtype=torch.long), torch.ones(0, 3, dtype=torch.long)
    ).shape == (0,)
