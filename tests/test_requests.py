"""However a generate call spells its arguments, its prompt, ends and rows are read as transformers reads them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from saeguard import SAE, Add, Plan, Rule, steer
from saeguard.errors import AmbiguousSAE, BadRule, BrokenFile, RowsMismatch, UnsupportedMode
from tests.tiny import fresh_model, prompt, tiny_model, tiny_sae

TINY = tiny_sae()
IDS = prompt(2, 6, seed=5)
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
GENERATED = Plan((Rule("tiny", (3,), Add(2.0), phase="generated", special=True),))
ALL = Plan((Rule("tiny", (3,), Add(2.0), special=True),))


def positions(run: Any) -> Any:
    return [call for rule in run.report.rules for call in rule.edited_positions]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((IDS,), {}),
        ((), {"input_ids": IDS}),
        ((), {"inputs": IDS}),
        ((None,), {"input_ids": IDS}),
        ((), {"inputs": IDS, "input_ids": None}),
        ((IDS, GenerationConfig(eos_token_id=None)), {}),
    ],
)
def test_request_finds_its_prompt_however_it_is_given(args, kwargs):
    with steer(tiny_model(), GENERATED, saes=TINY) as run:
        tiny_model().generate(*args, **kwargs, **GREEDY, min_new_tokens=4)

    assert positions(run) == [((6, 7, 8), (6, 7, 8))]


def first_token(plan: Plan) -> int:
    with steer(tiny_model(), plan, saes=TINY):
        return int(tiny_model().generate(IDS, **GREEDY)[0, 6])


def test_request_with_ends_switched_off_counts_every_token():
    model = fresh_model()
    model.generation_config.eos_token_id = first_token(ALL)
    with steer(model, ALL, saes=TINY) as run:
        width = model.generate(IDS, eos_token_id=None, **GREEDY).shape[1]

    assert positions(run) == [(tuple(range(width - 1)),) * 2]


@pytest.mark.parametrize("as_what", ["int", "list", "tensor", "config", "positional config"])
def test_request_ends_where_its_end_token_says(as_what):
    end = first_token(ALL)
    more: dict[str, Any] = {"eos_token_id": {"list": [end], "tensor": torch.tensor([end])}.get(as_what, end)}
    args: tuple[Any, ...] = ()
    if as_what.endswith("config"):
        config = GenerationConfig(**more)
        args, more = ((config,), {}) if as_what.startswith("pos") else ((), {"generation_config": config})
    with steer(tiny_model(), ALL, saes=TINY) as run:
        tiny_model().generate(IDS, *args, **more, **GREEDY)

    assert positions(run)[0][0] == tuple(range(6))


def test_request_that_goes_on_from_a_filled_cache_reports_absolute_columns():
    model, cache = tiny_model(), DynamicCache()
    with torch.no_grad():
        model(IDS[:, :4], past_key_values=cache)
    with steer(model, ALL, saes=TINY) as run:
        model.generate(IDS, past_key_values=cache, **GREEDY, min_new_tokens=4)

    assert positions(run) == [(tuple(range(4, 9)),) * 2]


def test_request_of_new_tokens_alone_on_a_filled_cache_reports_absolute_columns():
    model, cache = tiny_model(), DynamicCache()
    with torch.no_grad():
        model(IDS[:, :4], past_key_values=cache)
    with steer(model, GENERATED, saes=TINY) as run:
        mask = torch.ones_like(IDS)
        model.generate(IDS[:, 4:], past_key_values=cache, attention_mask=mask, **GREEDY, min_new_tokens=4)

    assert positions(run) == [((6, 7, 8),) * 2]


@pytest.mark.parametrize("with_ids", ["none", "empty", "positional"])
def test_request_of_embeddings_is_counted_from_its_prompt(with_ids):
    embeds = tiny_model().get_input_embeddings()(IDS)
    args = {"none": (), "empty": (IDS[:, :0],), "positional": (IDS,)}[with_ids]
    with steer(tiny_model(), ALL, saes=TINY) as run:
        tiny_model().generate(*args, inputs_embeds=embeds, **GREEDY, min_new_tokens=4)

    assert positions(run) == [(tuple(range(9)),) * 2]


def test_cache_that_is_cut_shorter_than_it_was_before_the_block_is_followed():
    model, cache = tiny_model(), DynamicCache()
    with torch.no_grad():
        model(IDS[:, :2], past_key_values=cache)
        with steer(model, ALL, saes=TINY) as run:
            model(IDS[:, 2:6], past_key_values=cache)
            cache.crop(-4)
            model(IDS[:, 2:3], past_key_values=cache)

    assert positions(run)[0] == ((2,), (2,))
    assert run.report.rules[0].tokens_edited == 2


def test_cache_whose_rows_are_multiplied_starts_another_call():
    model, cache = tiny_model(), DynamicCache()
    with torch.no_grad(), steer(model, ALL, saes=TINY) as run:
        model(IDS[:1, :4], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        model(IDS[:1, 4:5].expand(3, 1), past_key_values=cache)

    assert positions(run) == [((0, 1, 2, 3),), ((4,), (4,), (4,))]


def test_packed_rows_are_refused():
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)

    with pytest.raises(UnsupportedMode, match="packs several"), steer(tiny_model(), ALL, saes=TINY):
        tiny_model()(IDS, position_ids=packed, use_cache=False)


def test_prompt_tokens_for_another_number_of_rows_are_refused():
    block = steer(tiny_model(), GENERATED, saes=TINY, prompt_tokens=[3])

    with pytest.raises(RowsMismatch, match="prompt_tokens for 1 rows: the batch has 2 rows"), block:
        tiny_model()(IDS)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("given", [-3, 2.5, True, "34", [3, -4], [3, True], [2**70], {3, 4}, torch.tensor([3, 4])])
def test_prompt_tokens_that_are_no_counts_are_refused(given):
    with pytest.raises(BadRule, match="not a count of tokens. Give one int, or one per row"):
        steer(tiny_model(), GENERATED, saes=TINY, prompt_tokens=given).__enter__()
    with pytest.raises(BadRule, match="there are 2 plans, one per row"):
        steer(tiny_model(), [GENERATED, None], saes=TINY, prompt_tokens=[3]).__enter__()


def test_saes_of_one_name_and_other_weights_are_kept_apart():
    other = replace(TINY, W_dec=-TINY.W_dec)
    rules = Rule("a", (3,), Add(4.0), special=True), Rule("b", (4,), Add(4.0), special=True)
    with torch.no_grad(), steer(tiny_model(), Plan(rules), saes={"a": TINY, "b": other}):
        both = tiny_model()(IDS).logits
    merged = replace(TINY, W_dec=torch.cat([TINY.W_dec[:4], -TINY.W_dec[4:]]))
    with torch.no_grad(), steer(tiny_model(), Plan(tuple(replace(r, sae="m") for r in rules)), saes={"m": merged}):
        expected = tiny_model()(IDS).logits

    assert torch.allclose(both, expected, atol=1e-4)
    with pytest.raises(AmbiguousSAE, match="two different SAEs of that name"):
        steer(tiny_model(), ALL, saes=[TINY, other]).__enter__()


def test_edits_that_the_dtype_rounds_away_are_not_counted():
    plan = Plan((Rule("tiny", (3,), Add(1e-9), special=True),))
    model = fresh_model(dtype=torch.bfloat16)
    with torch.no_grad(), steer(model, plan, saes=TINY) as run:
        model(IDS)

    assert run.report.rules[0].tokens_selected == 12
    assert run.report.rules[0].tokens_edited == 0


@pytest.mark.parametrize("fields", [{"activation": "relu"}, {"activation": "topk"}, {"top_k": 3}])
def test_sae_whose_fields_contradict_its_activation_is_refused(fields):
    with pytest.raises(BrokenFile, match="It needs"):
        replace(TINY, **fields)
    assert isinstance(TINY, SAE)
