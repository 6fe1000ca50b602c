"""A plan on a HookedTransformer does what it does on the transformers model with the same weights.

Edited sets are compared by absolute position, exactly; logits to 1e-5 of the largest, which is what TransformerLens
itself differs by. Cases that lie within 1e-4 of an edge are rejected.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from saeguard import AtLeast, Clamp, Plan, Rule, Scale, Site, capture, steer
from saeguard.engines import engine_for
from saeguard.errors import (
    CompiledModel,
    GuardError,
    GuardNotApplied,
    SiteNotFound,
    TokensUnknown,
    UnsupportedMode,
    UnsupportedModel,
    WidthMismatch,
)
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy
from tests import laws, tiny
from tests.counts import cases
from tests.modes import word_tokenizer
from tests.more_models import shared
from tests.saelens.hooked_models import NAMES, hooked, make
from tests.test_engine_lens import GATED, PUSH, SAES, TEXTS, batch, plans_per_row, positions, sae_at

pytestmark = pytest.mark.filterwarnings("ignore")

STREAMS = (
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in", "mlp_normed", "mlp_post", "attn_z",
)  # fmt: skip
PLACED = [(name, stream) for name in NAMES for stream in STREAMS if (name, stream) != ("neox", "resid_mid")]


def logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of one pass without a cache; a transformers model has to be told what positions padding leaves."""
    with torch.no_grad():
        if "HookedSAETransformer" in type(model).__name__:
            return model(ids, attention_mask=mask)
        told = {} if mask is None else {"position_ids": positions(mask)}
        return model(ids, attention_mask=mask, use_cache=False, **told).logits


@settings(max_examples=cases(600))
@given(st.sampled_from(NAMES), st.integers(1, 3), st.integers(2, 9), st.integers(0, 2**20), st.data())
def test_pass_edits_what_a_pass_of_transformers_edits(name, rows, width, seed, data):
    """Rows with plans of their own, some padded on the left or on the right."""
    plans = data.draw(plans_per_row(rows))
    ids, mask = batch(rows, width, seed)
    prompts = [(seed + row) % (width + 1) for row in range(rows)]
    options: dict[str, Any] = {"saes": SAES, "prompt_tokens": prompts}
    padded = {"attention_mask": mask, "position_ids": positions(mask)}
    assume(not laws.near_edge(shared(name), plans, SAES, ids, prompt_tokens=prompts, **padded))

    with steer(shared(name), plans, **options) as expected:
        right = logits(shared(name), ids, mask)
    with steer(hooked(name), plans, **options) as run:
        found = logits(hooked(name), ids, mask)

    assert laws.edited(run) == laws.edited(expected)
    real = mask[..., None].bool()
    assert laws.distance(found.masked_fill(~real, 0), right.masked_fill(~real, 0)) <= laws.TOLERANCE
    plain = logits(hooked(name), ids, mask)
    for row, plan in enumerate(plans):
        assert plan is not None or laws.same_bits(found[row], plain[row])


def assert_streams_agree(name: str, stream: str, model: Any) -> None:
    plan, sae = Plan((Rule("tiny", (1, 7, 20, 31), Clamp(3.0, when="always")),)), sae_at(name, stream)
    ids, mask = batch(2, 8, seed=5)

    with steer(shared(name), plan, saes=sae), capture(shared(name), sae.site) as expected:
        right = logits(shared(name), ids, mask)
    with steer(model, plan, saes=sae), capture(model, sae.site) as tape:
        found = logits(model, ids, mask)

    real = mask[..., None].bool()
    assert laws.distance(found * real, right * real) <= laws.TOLERANCE
    assert laws.distance(tape[sae.site] * real, expected[sae.site] * real) <= laws.TOLERANCE
    assert laws.distance(found * real, logits(model, ids, mask) * real) > 1e-2


@pytest.mark.parametrize(("name", "stream"), PLACED)
def test_every_stream_is_read_and_written_where_transformers_has_it(name, stream):
    assert_streams_agree(name, stream, hooked(name))


SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


@pytest.mark.parametrize("switch", SWITCHES)
def test_streams_are_where_they_were_when_a_model_shows_more_of_itself(switch):
    model = make("gpt2")
    getattr(model, f"set_{switch}")(True)

    for stream in STREAMS:
        assert_streams_agree("gpt2", stream, model)


WRONG_POINTS = {
    "takes what attention adds for the stream": ("gpt2", "resid_mid", "hook_attn_out"),
    "takes the output of a block for its input": ("llama", "resid_pre", "hook_resid_post"),
    "takes the MLP before its activation": ("gpt2", "mlp_post", "mlp.hook_pre"),
    "reads the values without the pattern": ("neox", "attn_z", "attn.hook_v"),
}


@pytest.mark.parametrize("fault", WRONG_POINTS)
def test_law_catches_a_hook_point_that_is_not_the_stream(monkeypatch, fault):
    from saeguard.engines import hooked as module

    name, stream, point = WRONG_POINTS[fault]
    monkeypatch.setitem(module._POINTS, stream, point)

    with pytest.raises(AssertionError):
        assert_streams_agree(name, stream, hooked(name))


WRITE: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "verbose": False}
WAYS: dict[str, dict[str, Any]] = {
    "cached": {}, "no cache": {"use_past_kv_cache": False}, "never ends": {"stop_at_eos": False},
    "another end": {"eos_token_id": [7, 9, 11]},
}  # fmt: skip


def used(sequence: Tensor, prompt: int, way: str) -> int:
    """How many tokens of a row the model was given: not its last one, nor its end or what follows."""
    eos = WAYS[way].get("eos_token_id", [tiny.EOS])
    ends = torch.isin(sequence[prompt:], torch.tensor(eos)).nonzero().flatten().tolist()
    return prompt + ends[0] if ends and way != "never ends" else len(sequence) - 1


@settings(max_examples=cases(300))
@given(
    st.sampled_from(NAMES), laws.plans(SAES, where=laws.wheres(), gated=True), st.integers(1, 3), st.integers(2, 8),
    st.integers(0, 2**20), st.sampled_from(sorted(WAYS)),
)  # fmt: skip
def test_generate_edits_what_a_full_pass_of_transformers_edits(name, plan, rows, width, seed, way):
    """Prompts are padded on the left with a token that stands for nothing else, as generate asks for."""
    ids, mask = batch(rows, width, 2 * (seed // 2) + 1)
    ids = ids.where(mask.bool(), tiny.PAD).where((ids != tiny.PAD) | ~mask.bool(), 5)

    with steer(hooked(name, "left"), plan, saes=SAES) as run:
        output = hooked(name, "left").generate(ids, output_logits=True, prepend_bos=False, **WRITE, **WAYS[way])

    for row, text in enumerate(output.sequences):
        pads, prompt = width - int(mask[row].sum()), int(mask[row].sum())
        text = text[None, pads : used(text, width, way)]
        assume(not laws.near_edge(shared(name), plan, SAES, text, prompt_tokens=prompt))
        with steer(shared(name), plan, saes=SAES, prompt_tokens=prompt) as whole:
            expected = logits(shared(name), text)
        assert [laws.edited_by_row(run)[row]] == (laws.edited_by_row(whole) or [{}])
        for step in range(min(text.shape[1] - prompt + 1, len(output.logits))):
            assert laws.distance(output.logits[step][row], expected[0, prompt - 1 + step]) <= laws.TOLERANCE


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_of_a_list_of_texts_are_edited_as_if_each_were_alone(name, padding_side):
    """Texts of different lengths, which generate pads on the left and a pass where the tokenizer says."""
    model = hooked(name, padding_side)
    plans = [GATED, None, Plan((Rule("topk", (1, 2), Scale(-2.0), phase="prompt"),))]

    with steer(model, plans, saes=SAES) as together:
        words = model.generate(TEXTS, return_type="tokens", **WRITE)
    with steer(model, plans, saes=SAES, prompt_tokens=2) as one_pass, torch.no_grad():
        found = model(TEXTS)

    for row, text in enumerate(TEXTS):
        with steer(model, plans[row], saes=SAES) as alone:
            said = model.generate(text, return_type="tokens", **WRITE)
        with steer(model, plans[row], saes=SAES, prompt_tokens=2) as own_pass, torch.no_grad():
            expected = model(text)[0]
        n = len(text.split()) + 1
        assert torch.equal(words[row, -6:][: said.shape[1] - n], said[0, -6:][: words.shape[1]])
        columns = slice(-n, None) if padding_side == "left" else slice(n)
        assert laws.distance(found[row, columns], expected) <= laws.TOLERANCE
        for several, one in ((together, alone), (one_pass, own_pass)):
            assert laws.edited_by_row(several)[row] == (laws.edited_by_row(one) or [{}])[0]
    assert laws.edited_by_row(together)[0]
    assert not laws.edited_by_row(together)[1]


def test_report_of_text_and_of_embeddings_is_that_of_tokens():
    """Neither says which tokens came after the end of a row, and their edits must not be reported."""
    found, model = [], hooked("llama", "left")
    for kind in ("tokens", "str", "embeds"):
        with steer(model, PUSH, saes=SAES) as run:
            model.generate(TEXTS, return_type=kind, **WRITE | {"max_new_tokens": 20})
        found.append(laws.edited(run))

    assert found[0] == found[1] == found[2]


def test_passes_that_share_a_cache_are_one_call_and_a_frozen_one_may_go_on_twice():
    ids, model = tiny.prompt(1, 8, seed=4), hooked("gpt2")
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 1)

    with steer(model, GATED, saes=SAES, prompt_tokens=3) as whole:
        expected = logits(model, ids)
    with steer(model, GATED, saes=SAES, prompt_tokens=3) as pieces, torch.no_grad():
        first = model(ids[:, :5], past_kv_cache=cache)
        cache.freeze()
        model(ids[:, 5:].flip(1), past_kv_cache=cache)
        second = model(ids[:, 5:], past_kv_cache=cache)

    assert laws.edited(pieces) == laws.edited(whole)
    assert laws.distance(torch.cat([first, second], 1), expected) <= laws.TOLERANCE


def test_forward_run_with_hooks_and_run_with_cache_are_passes_like_any_other():
    ids, model, seen = tiny.prompt(1, 6), hooked("llama"), []

    def double(x: Tensor, hook: Any) -> Tensor:
        seen.append(x.clone())
        return 2 * x

    with steer(model, PUSH, saes=SAES), capture(model, ["resid_post.1", "resid_pre.2"]) as tape, torch.no_grad():
        expected = model(ids)
        assert torch.equal(model.forward(ids), expected)
        loss = model(ids, return_type="loss")
        _, activations = model.run_with_cache(ids)
        assert torch.equal(activations["blocks.1.hook_resid_post"], tape["resid_post.1"])
        model.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_resid_post", double)])

    assert torch.equal(seen[0], activations["blocks.1.hook_resid_post"])
    assert torch.equal(tape["resid_pre.2"], 2 * seen[0])
    assert not torch.equal(loss, model(ids, return_type="loss"))


def test_stopping_behind_the_last_edit_is_a_whole_pass_and_before_it_is_refused():
    ids, model = tiny.prompt(1, 6), hooked("gpt2")

    with steer(model, PUSH, saes=SAES), capture(model, "resid_post.1") as tape, torch.no_grad():
        early = model(ids, stop_at_layer=2)
        assert torch.equal(early, tape["resid_post.1"])
        with pytest.raises(GuardNotApplied, match=r"resid_post\.1"):
            model(ids, stop_at_layer=1)


def hooks_of(model: Any) -> list[int]:
    return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]


def test_nothing_stays_on_a_model_after_the_block_also_after_an_exception():
    model = make("llama")
    own = model.__dict__["forward"] = type(model).forward.__get__(model)
    before = hooks_of(model)

    def fails() -> None:
        with steer(model, PUSH, saes=SAES):
            model(tiny.prompt(1, 4))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fails()

    assert hooks_of(model) == before
    assert model.__dict__["forward"] is own
    assert "generate" not in model.__dict__


def test_blocks_nest_and_a_block_that_ends_leaves_the_other_one():
    ids, other = tiny.prompt(1, 6), Plan((Rule("topk", (5, 6), Scale(2.0)),))

    with steer(shared("llama"), PUSH, saes=SAES):
        with steer(shared("llama"), other, saes=SAES):
            both = logits(shared("llama"), ids)
        one = logits(shared("llama"), ids)
    with steer(hooked("llama"), PUSH, saes=SAES):
        with steer(hooked("llama"), other, saes=SAES):
            assert laws.distance(logits(hooked("llama"), ids), both) <= laws.TOLERANCE
        assert laws.distance(logits(hooked("llama"), ids), one) <= laws.TOLERANCE


def test_copy_of_a_model_made_inside_a_block_is_refused_there_and_free_after_it():
    model, ids = make("llama"), tiny.prompt(1, 4)

    with steer(model, PUSH, saes=SAES):
        twin = copy.deepcopy(model)
        for call in (twin, twin.forward, lambda ids: twin.generate(ids, **WRITE)):
            with pytest.raises(GuardNotApplied):
                call(ids)
        logits(model, ids)

    assert torch.equal(logits(twin, ids), logits(model, ids))
    assert torch.equal(twin.generate(ids, **WRITE), model.generate(ids, **WRITE))


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a stream of tokens": (
        lambda model: list(model.generate_stream(tiny.prompt(1, 4), verbose=False)),
        UnsupportedMode, "went around saeguard",
    ),
    "the class's own function": (
        lambda model: type(model).generate(model, tiny.prompt(1, 4), **WRITE), UnsupportedMode, "went around saeguard",
    ),
    "a stream in the middle": (
        lambda model: model(torch.zeros(1, 4, tiny.D), start_at_layer=1), UnsupportedMode, "start_at_layer",
    ),
    "a stream at the beginning": (
        lambda model: model(torch.zeros(1, 4, tiny.D), start_at_layer=0), UnsupportedMode, "start_at_layer",
    ),
    "generating from embeddings": (
        lambda model: model.generate(torch.zeros(1, 4, tiny.D), **WRITE), TokensUnknown, "Pass text, or rows x tokens",
    ),
    "generating from one row without its axis": (
        lambda model: model.generate(torch.tensor([1, 5, 6]), **WRITE), TokensUnknown, "rows x tokens",
    ),
    "a mask of another width": (
        lambda model: model(tiny.prompt(1, 4), attention_mask=torch.ones(1, 3).long()), TokensUnknown, r"\(1, 3\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(what):
    call, error, message = REFUSED[what]

    with pytest.raises(error, match=message), steer(hooked("llama"), PUSH, saes=SAES):
        call(hooked("llama"))


def test_plan_that_does_not_fit_is_refused_before_the_model_is_touched():
    rule, model = Rule("tiny", (1,), Scale(2.0)), hooked("llama")

    for site, width, error in ((Site("resid_post", 9), tiny.D, SiteNotFound), (Site("mlp_post", 1), 7, WidthMismatch)):
        with pytest.raises(error), steer(model, Plan((rule,)), saes=tiny.tiny_sae(site=site, d_in=width)):
            pass
    with pytest.raises(SiteNotFound, match="nothing between them"):
        engine_for(hooked("neox")).resolve(Site("resid_mid", 1))


def test_models_that_are_not_understood_are_refused():
    compiled, bare = make("llama"), make("llama")
    compiled.compile()
    bare.tokenizer = None

    with pytest.raises(CompiledModel, match="compile"):
        engine_for(compiled)
    with pytest.raises(TokensUnknown, match="special_ids"), steer(bare, PUSH, saes=SAES):
        pass
    with steer(bare, PUSH, saes=SAES, special_ids=()) as run:
        logits(bare, tiny.prompt(1, 4))
    assert laws.edited(run)[PUSH.rules[0]] == (((0, 1, 2, 3),),)


def test_other_classes_of_its_package_are_refused():
    for name in ("HookedTransformer", "HookedEncoder"):
        kind = type(name, (nn.Module,), {"__module__": f"transformer_lens.{name}"})
        with pytest.raises(UnsupportedModel, match=f"{name}.*boot_transformers"):
            engine_for(kind())


def test_random_sampling_is_that_of_the_plain_model_where_nothing_is_edited():
    model = hooked("gpt2")
    never = Plan((Rule("relu", (1,), AtLeast(-1.0), start=100),))
    drawn = []

    for plan in (None, never):
        torch.manual_seed(3)
        if plan is None:
            drawn.append(model.generate(tiny.prompt(2, 5), max_new_tokens=8, top_k=20, verbose=False))
        else:
            with steer(model, plan, saes=SAES):
                drawn.append(model.generate(tiny.prompt(2, 5), max_new_tokens=8, top_k=20, verbose=False))

    assert torch.equal(drawn[0], drawn[1])


GUARDED_IDS = tiny.prompt(2, 6)
AROUND: dict[str, Callable[[Any], Any]] = {
    "call": lambda model: model(GUARDED_IDS),
    "forward": lambda model: model.forward(GUARDED_IDS),
    "generate": lambda model: model.generate(GUARDED_IDS, max_new_tokens=2, verbose=False),
    "generate_stream": lambda model: list(model.generate_stream(GUARDED_IDS, max_new_tokens=2, verbose=False)),
    "run_with_cache": lambda model: model.run_with_cache(GUARDED_IDS),
    "run_with_hooks": lambda model: model.run_with_hooks(GUARDED_IDS, fwd_hooks=[]),
}


@pytest.mark.parametrize("way", AROUND)
def test_way_around_a_guardrail_is_refused_and_free_when_it_is_gone(way):
    model, tokenizer = make("llama"), word_tokenizer()
    policy = Policy.of(model, tokenizer, SAES[0], PUSH, name="edits")

    with Guardrail.attach(model, policy, tokenizer=tokenizer, saes=SAES) as guard, torch.no_grad():
        with pytest.raises(GuardError):
            AROUND[way](model)
        answer = guard.generate(GUARDED_IDS, max_new_tokens=2, do_sample=False, verbose=False)
        assert answer.sequences.shape == (2, 8)
    with torch.no_grad():
        AROUND[way](model)
