"""Beams trade places: a plan belongs to a row of the request, whatever rows of the forward pass stand for it."""

import copy

import pytest
import torch
from torch import Tensor

from saeguard import capture, steer
from saeguard.errors import RowsMismatch, UnsupportedMode
from tests.tiny import BOS, EOS, PAD, fresh_model, prompt, tiny_sae
from tests.traces import add_plan, edited, fed, should_edit, union

ARCHITECTURES = ("llama", "gpt2", "neox", "gemma3")
MODELS = {name: fresh_model(name) for name in ARCHITECTURES}
SAE = tiny_sae()
IDS = prompt(3, 6, seed=2)
NEW = 6
BEAMS = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 3, "num_return_sequences": 2, "pad_token_id": PAD}
WORDS = BEAMS | {"suppress_tokens": [PAD, BOS, EOS]}
"""Without special tokens every beam has the same editable positions, so that the union is known from any of them."""
STRONG = add_plan(3, amount=9.0)
OTHER = add_plan(8, 9, amount=-7.0, phase="generated")
PROMPT = add_plan(4, amount=6.0, phase="prompt", start=2)


def search(name: str, plans: object, ids: Tensor = IDS, **options: object) -> tuple[Tensor, object]:
    with steer(MODELS[name], plans, saes=SAE) as run:
        return MODELS[name].generate(ids, **(WORDS | options)), run


def rows(sequences: Tensor, number: int) -> Tensor:
    """The sequences of one row of the request."""
    return sequences[2 * number : 2 * number + 2]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plans_of_a_mixed_batch_follow_their_request_through_the_search(name):
    plans = [STRONG, None, OTHER]
    mixed, run = search(name, plans)
    alone = [search(name, plan, IDS[i : i + 1])[0] for i, plan in enumerate(plans)]

    assert torch.equal(mixed, torch.cat(alone))
    assert [rule[0] for rule in edited(run)] == [
        (tuple(range(1, 6 + NEW - 1)), (), ()),
        ((), (), tuple(range(6, 6 + NEW - 1))),
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_row_without_a_plan_gets_the_plain_models_search(name):
    plain = MODELS[name].generate(IDS, **WORDS)
    mixed, _ = search(name, [STRONG, None, STRONG])

    assert torch.equal(rows(mixed, 1), rows(plain, 1))
    assert not torch.equal(rows(mixed, 0), rows(plain, 0))
    assert not torch.equal(rows(mixed, 2), rows(plain, 2))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_order_of_the_requests_does_not_matter(name, order):
    plans = [STRONG, None, PROMPT]
    straight, run = search(name, plans)
    turned, other = search(name, [plans[i] for i in order], IDS[list(order)])

    for place, i in enumerate(order):
        assert torch.equal(rows(turned, place), rows(straight, i))
    sets = {str(rule.rule): found[0] for rule, found in zip(run.rules, edited(run), strict=True)}
    for bound, found in zip(other.rules, edited(other), strict=True):
        assert found[0] == tuple(sets[str(bound.rule)][i] for i in order)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("beams", [2, 3, 4])
def test_what_is_reported_is_the_union_over_all_beams(name, beams):
    found, run = search(name, STRONG, num_beams=beams, num_return_sequences=beams)

    due = [should_edit(STRONG.rules[0], fed(sequence, 6), columns=6) for sequence in found]
    assert edited(run) == [(tuple(union(due[beams * i : beams * (i + 1)]) for i in range(3)),)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_beams_that_end_early_are_edited_at_least_where_the_returned_ones_are(name):
    """With end tokens, beams that were dropped may have had editable tokens where the returned ones have none."""
    found, run = search(name, STRONG, suppress_tokens=None)

    for number in range(3):
        due = [should_edit(STRONG.rules[0], fed(one, 6), columns=6) for one in rows(found, number)]
        assert set(union(due)) <= set(edited(run)[0][0][number]) <= set(range(1, 6 + NEW))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_search_over_padded_rows_edits_by_absolute_position(name):
    padded = torch.cat([torch.full((3, 2), PAD), IDS], dim=1)
    padded[2, :2] = torch.tensor([BOS, 7])
    mask = (torch.arange(8) >= torch.tensor([[2], [2], [0]])).long()
    _, run = search(name, [STRONG, None, STRONG], padded, attention_mask=mask)

    assert edited(run) == [((tuple(range(1, 6 + NEW - 1)), (), (1, *range(3, 8 + NEW - 1))),)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])  # gemma3 has a norm between the bias and the stream
def test_search_equals_that_of_a_model_whose_bias_holds_the_edit(name):
    """A second way to the same search, without hooks: the edit at every token is a constant added by the block."""
    plan = add_plan(3, amount=5.0, special=True)
    model = copy.deepcopy(MODELS[name])
    names = (".1.mlp.down_proj", ".1.mlp.c_proj", ".1.mlp.dense_4h_to_h")
    last = [module for path, module in model.named_modules() if path.endswith(names)]
    bias = last[0].bias.detach() if last[0].bias is not None else torch.zeros(32)
    last[0].bias = torch.nn.Parameter(bias + 5.0 * SAE.W_dec[3])
    found, _ = search(name, plan)

    assert torch.equal(found, model.generate(IDS, **WORDS))


@pytest.mark.parametrize("options", [{"num_beams": 1, "num_return_sequences": 2, "do_sample": True}])
def test_sampled_sequences_of_a_row_share_its_plan(options):
    model = MODELS["llama"]
    torch.manual_seed(0)
    plain = model.generate(IDS, **(WORDS | options))
    torch.manual_seed(0)
    mixed, run = search("llama", [None, STRONG, None], **options)

    assert torch.equal(rows(mixed, 0), rows(plain, 0))
    assert not torch.equal(rows(mixed, 1), rows(plain, 1))
    assert [bool(positions) for positions in edited(run)[0][0]] == [False, False, True, True, False, False]


def test_plans_for_another_number_of_rows_are_refused_and_counted_in_requests():
    with pytest.raises(RowsMismatch, match="the batch has 9 rows for 3 sequences per request"):
        search("llama", [STRONG, None])


def test_capturing_a_beam_search_is_refused():
    refused = pytest.raises(UnsupportedMode, match="its rows trade places. Generate without beams")
    with refused, capture(MODELS["llama"], "resid_post.1"):
        MODELS["llama"].generate(IDS, **WORDS)
