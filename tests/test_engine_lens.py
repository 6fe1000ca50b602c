"""A plan on a TransformerLens bridge does what it does on the transformers model with the same weights.

A case is one plan on one batch, computed on both. Edited sets are compared by absolute position, exactly; logits to
1e-5 of the largest, which is what the bridge's own arithmetic differs by. Cases that lie within 1e-4 of an edge are
rejected.
"""

import copy
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.stopping_criteria import MaxLengthCriteria

from saeguard import Add, AnyActive, AtLeast, Clamp, Plan, Rule, Scale, Site, capture, steer
from saeguard.engines import engine_for
from saeguard.errors import (
    BadRule,
    GuardNotApplied,
    RowsMismatch,
    SiteNotFound,
    TokensUnknown,
    UnstableEdit,
    UnsupportedMode,
    UnsupportedModel,
    WidthMismatch,
)
from saeguard.gates import Hits, Latched, Rate, Watch
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy, Refuse
from saeguard.hooks import plan_as_hooks
from saeguard.patching import patch
from tests import laws, tiny
from tests.counts import cases
from tests.modes import word_tokenizer
from tests.more_models import HIDDEN, LAYER, model_of, shared

Bridge: Any = pytest.importorskip("transformer_lens.model_bridge", reason="no extra 'lens' here").TransformerBridge
IS_OLD = version("transformer-lens").startswith("3.")
"""Version 3, whose bridge cannot start at a layer, and leaves the mask out when it replays what it has generated."""
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("llama", "gpt2", "neox", "neox_sequential", "gemma2", "gemma3", "qwen2", "qwen3", "phi3", "mixtral", "olmo2")
ABSENT = {("neox", "resid_mid"), ("mixtral", "mlp_post"), ("olmo2", "mlp_normed")}
STREAMS = (
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in", "mlp_normed", "mlp_post", "attn_z",
)  # fmt: skip
PLACED = [(name, stream) for name in NAMES for stream in STREAMS if (name, stream) not in ABSENT]
SAES = [tiny.tiny_sae(activation=kind, name=kind, seed=i) for i, kind in enumerate(("relu", "jumprelu", "topk"))]
SAES.append(tiny.tiny_sae(name="attention", seed=7, site=Site("attn_out", 0)))
SAES.append(tiny.tiny_sae(name="mlp", seed=8, site=Site("mlp_out", 2)))
LAYER_END = "resid_post.1"
PUSH = Plan((Rule("relu", (1, 2, 3), AtLeast(4.0)),))


def boot(name: str) -> Any:
    """A bridge of its own to the weights of `shared`."""
    tokenizer = copy.deepcopy(word_tokenizer())
    tokenizer.init_kwargs.update(name_or_path="", add_bos_token=True)
    plain = model_of(name)
    plain.config.architectures = [type(plain).__name__]
    return Bridge.boot_transformers("tiny", hf_model=plain, tokenizer=tokenizer, device="cpu")


@cache
def bridge(name: str) -> Any:
    """A bridge that several tests use; a test must leave it as it was."""
    return boot(name)


def logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of one pass without a cache, on a bridge or on a model, which has to be told what positions padding leaves."""
    told = {} if mask is None or isinstance(model, Bridge) else {"position_ids": positions(mask)}
    with torch.no_grad():
        found = model(ids, attention_mask=mask, use_cache=False, **told)
    return getattr(found, "logits", found)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def batch(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Any ids, special ones included; some rows are padded, on the left or on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, tiny.VOCAB, (rows, width), generator=generator)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    mask = torch.arange(width) < lengths
    return ids, (mask.flip(1) if seed % 2 else mask).long()


@st.composite
def plans_per_row(draw: Any, rows: int) -> list[Plan | None]:
    known = draw(st.lists(laws.plans(SAES, most=3, where=laws.wheres(longest=8), gated=True), min_size=1, max_size=2))
    return draw(st.lists(st.none() | st.sampled_from(known), min_size=rows, max_size=rows))


@settings(max_examples=cases(1_200))
@given(st.sampled_from(NAMES), st.integers(1, 3), st.integers(2, 9), st.integers(0, 2**20), st.data())
def test_pass_of_a_bridge_edits_what_a_pass_of_its_model_edits(name, rows, width, seed, data):
    plans = data.draw(plans_per_row(rows))
    ids, mask = batch(rows, width, seed)
    prompts = [(seed + row) % (width + 1) for row in range(rows)]
    options: dict[str, Any] = {"saes": SAES, "prompt_tokens": prompts}
    padded = {"attention_mask": mask, "position_ids": positions(mask)}
    assume(not laws.near_edge(shared(name), plans, SAES, ids, prompt_tokens=prompts, **padded))

    with steer(shared(name), plans, **options) as expected:
        right = logits(shared(name), ids, mask)
    with steer(bridge(name), plans, **options) as run:
        found = logits(bridge(name), ids, mask)

    assert laws.edited(run) == laws.edited(expected)
    real = mask[..., None].bool()
    assert laws.distance(found.masked_fill(~real, 0), right.masked_fill(~real, 0)) <= laws.TOLERANCE
    plain = logits(bridge(name), ids, mask)
    for row, plan in enumerate(plans):
        assert plan is not None or laws.same_bits(found[row], plain[row])


def sae_at(name: str, stream: str) -> Any:
    hidden = 4 * tiny.D if name == "gpt2" else HIDDEN
    width = hidden if stream == "mlp_post" else tiny.D
    return tiny.tiny_sae(d_in=width, site=Site(stream, LAYER), activation="relu", seed=13)


@pytest.mark.parametrize(("name", "stream"), PLACED)
def test_every_stream_is_read_and_written_where_the_model_has_it(name, stream):
    plan, sae = Plan((Rule("tiny", (1, 7, 20, 31), Clamp(3.0, when="always")),)), sae_at(name, stream)
    ids, mask = batch(2, 8, seed=5)

    with steer(shared(name), plan, saes=sae), capture(shared(name), sae.site) as expected:
        right = logits(shared(name), ids, mask)
    with steer(bridge(name), plan, saes=sae), capture(bridge(name), sae.site) as tape:
        found = logits(bridge(name), ids, mask)

    real = mask[..., None].bool()
    assert laws.distance(found * real, right * real) <= laws.TOLERANCE
    assert laws.distance(tape[sae.site] * real, expected[sae.site] * real) <= laws.TOLERANCE
    assert laws.distance(found * real, logits(bridge(name), ids, mask) * real) > 1e-2


SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_streams_are_where_they_were_when_a_bridge_shows_more_of_itself(name, switch):
    found, ids = boot(name), tiny.prompt(2, 6)
    getattr(found, f"set_{switch}")(True)

    for stream in STREAMS:
        plan, sae = Plan((Rule("tiny", (1, 7, 20, 31), Clamp(3.0, when="always")),)), sae_at(name, stream)
        with steer(shared(name), plan, saes=sae):
            right = logits(shared(name), ids)
        with steer(found, plan, saes=sae):
            assert laws.distance(logits(found, ids), right) <= laws.TOLERANCE, stream


WRONG_POINTS = {
    "moves what ln2 reads, not the stream": ("llama", "resid_mid", "ln2.hook_in"),
    "takes what attention returns before its post-norm": ("gemma3", "attn_out", "attn.hook_out"),
    "takes what the MLP returns before its post-norm": ("gemma2", "mlp_out", "mlp.hook_out"),
    "takes the output of a block for its input": ("gpt2", "resid_pre", "hook_out"),
    "takes the MLP before its activation": ("gpt2", "mlp_post", "mlp.hook_pre"),
    "reads before the norm": ("qwen3", "mlp_in", "ln2.hook_in"),
}


@pytest.mark.parametrize("fault", WRONG_POINTS)
def test_law_catches_a_hook_point_that_is_not_the_stream(monkeypatch, fault):
    name, stream, point = WRONG_POINTS[fault]
    monkeypatch.setitem(engines_lens()._POINTS, stream, point)

    with pytest.raises(AssertionError):
        test_every_stream_is_read_and_written_where_the_model_has_it(name, stream)


def engines_lens() -> Any:
    from saeguard.engines import lens as module

    return module


WRITE: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "verbose": False}
WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "no cache": {"use_past_kv_cache": False},
    "never ends": {"stop_at_eos": False},
} | ({} if IS_OLD else {"with a replay for the activations": {"return_cache": True}})


def used(sequence: Tensor, prompt: int, way: str) -> int:
    """How many tokens of a row the model was given: not its last one, nor its EOS or what follows."""
    ends = (sequence[prompt:] == tiny.EOS).nonzero().flatten().tolist() if way != "never ends" else []
    replayed = way == "with a replay for the activations"
    return prompt + ends[0] if ends else len(sequence) - (not replayed)


@settings(max_examples=cases(600))
@given(
    st.sampled_from(NAMES),
    laws.plans(SAES, where=laws.wheres(), gated=True),
    st.integers(1, 3),
    st.integers(2, 8),
    st.integers(0, 2**20),
    st.sampled_from(sorted(WAYS)),
)
def test_generate_of_a_bridge_edits_what_a_full_pass_of_its_model_edits(name, plan, rows, width, seed, way):
    rows = 1 if "replay" in way else rows
    ids, mask = batch(rows, width, 2 * (seed // 2) + 1)  # padded on the left, as generating asks for

    with steer(bridge(name), plan, saes=SAES) as run:
        output = bridge(name).generate(ids, attention_mask=mask, output_logits=True, **WRITE, **WAYS[way])

    output = output[0] if isinstance(output, tuple) else output
    for row, text in enumerate(output.sequences):
        pads, prompt = width - int(mask[row].sum()), int(mask[row].sum())
        text = text[None, pads : used(text, width, way)]
        assume(not laws.near_edge(shared(name), plan, SAES, text, prompt_tokens=prompt))
        with steer(shared(name), plan, saes=SAES, prompt_tokens=prompt) as whole:
            expected = logits(shared(name), text)
        assert [laws.edited_by_row(run)[row]] == (laws.edited_by_row(whole) or [{}])
        for step in range(min(text.shape[1] - prompt + 1, len(output.logits))):
            assert laws.distance(output.logits[step][row], expected[0, prompt - 1 + step]) <= laws.TOLERANCE


GATED = Plan((
    Rule(
        "jumprelu", (1, 2, 3), Clamp(-6.0, when="active"), phase="generated",
        gate=Latched(Watch(Hits((4, 5, 6, 7)), Rate(), 0.26)), trigger=AnyActive((1, 2, 3)),
    ),
    Rule("relu", (8, 9), AtLeast(3.0), phase="newest"),
))  # fmt: skip
TEXTS = ["w5 w9 w11 w30", "w7", "w40 w41 w9 w22 w51 w6 w8"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_rows_of_a_list_of_texts_are_edited_as_if_each_were_alone(name):
    """Texts of different lengths, which a bridge pads on the left and masks by itself, each under its own plan."""
    plans = [GATED, None, Plan((Rule("topk", (1, 2), Scale(-2.0), phase="prompt"),))]

    with steer(bridge(name), plans, saes=SAES) as together:
        words = bridge(name).generate(TEXTS, return_type="tokens", **WRITE)

    for row, text in enumerate(TEXTS):
        with steer(bridge(name), plans[row], saes=SAES) as alone:
            said = bridge(name).generate(text, return_type="tokens", **WRITE)
        assert torch.equal(words[row, -6:][: said.shape[1] - len(text.split()) - 1], said[0, -6:][: words.shape[1]])
        mine = laws.edited_by_row(alone)
        assert laws.edited_by_row(together)[row] == (mine[0] if mine else {})
    assert laws.edited_by_row(together)[0]
    assert not laws.edited_by_row(together)[1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_report_of_text_is_that_of_tokens(name):
    """Text says nothing of which tokens came after the end of a row, and their edits must not be reported."""
    with steer(bridge(name), PUSH, saes=SAES) as as_tokens:
        bridge(name).generate(TEXTS, return_type="tokens", **WRITE | {"max_new_tokens": 20})
    with steer(bridge(name), PUSH, saes=SAES) as as_text:
        bridge(name).generate(TEXTS, **WRITE | {"max_new_tokens": 20})

    assert laws.edited(as_text) == laws.edited(as_tokens)


def test_hf_generate_of_a_bridge_is_generate_of_its_model():
    ids = tiny.prompt(2, 6, seed=3)

    with steer(bridge("llama"), GATED, saes=SAES) as run:
        words = bridge("llama").hf_generate(ids, max_new_tokens=6, do_sample=False)
    with steer(shared("llama"), GATED, saes=SAES) as expected:
        right = shared("llama").generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=tiny.EOS)

    assert torch.equal(words, right)
    assert laws.edited(run) == laws.edited(expected)


def test_cache_of_activations_holds_the_edited_stream():
    ids = tiny.prompt(2, 6)

    with steer(bridge("llama"), PUSH, saes=SAES), capture(bridge("llama"), "resid_post.1") as tape:
        _, activations = bridge("llama").run_with_cache(ids)
    _, plain = bridge("llama").run_with_cache(ids)

    assert torch.equal(activations["blocks.1.hook_resid_post"], tape["resid_post.1"])
    assert not torch.equal(plain["blocks.1.hook_resid_post"], tape["resid_post.1"])


def test_hook_functions_of_the_user_see_the_edited_stream_and_may_change_it_further():
    ids, seen = tiny.prompt(1, 6), []

    def double(x: Tensor, hook: Any) -> Tensor:
        seen.append(x.clone())
        return 2 * x

    with steer(bridge("llama"), PUSH, saes=SAES), capture(bridge("llama"), ["resid_post.1", "resid_pre.2"]) as tape:
        bridge("llama").run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_resid_post", double)])

    assert torch.equal(seen[0], tape["resid_post.1"])
    assert torch.equal(tape["resid_pre.2"], 2 * seen[0])


def test_passes_that_share_a_cache_are_one_call():
    ids = tiny.prompt(1, 8, seed=4)

    with steer(bridge("gpt2"), GATED, saes=SAES, prompt_tokens=3) as whole:
        expected = logits(bridge("gpt2"), ids)
    with steer(bridge("gpt2"), GATED, saes=SAES, prompt_tokens=3) as pieces, torch.no_grad():
        first, kept = bridge("gpt2")(ids[:, :5], return_type="logits_and_cache", use_cache=True)
        second, _ = bridge("gpt2")(ids[:, 5:], return_type="logits_and_cache", past_key_values=kept)

    assert laws.edited(pieces) == laws.edited(whole)
    assert laws.distance(torch.cat([first, second], 1), expected) <= laws.TOLERANCE


def hooks_of(found: Any) -> list[int]:
    return [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (*found.modules(), *found.original_model.modules())
    ]


def test_nothing_stays_on_a_bridge_after_the_block_also_after_an_exception():
    found = bridge("llama")
    logits(found, tiny.prompt(1, 4))  # a bridge hooks itself at its first pass
    before = hooks_of(found)

    def fails() -> None:
        with steer(found, PUSH, saes=SAES):
            logits(found, tiny.prompt(1, 4))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fails()

    assert hooks_of(found) == before
    assert "generate" not in found.__dict__
    assert "generate" not in found.original_model.__dict__


def test_block_on_the_bridge_and_block_on_its_model_nest():
    ids = tiny.prompt(1, 6)
    other = Plan((Rule("topk", (5, 6), Scale(2.0)),))

    with steer(shared("llama"), PUSH, saes=SAES), steer(shared("llama"), other, saes=SAES):
        expected = logits(shared("llama"), ids)
    with steer(bridge("llama"), PUSH, saes=SAES), steer(bridge("llama"), other, saes=SAES):
        found = logits(bridge("llama"), ids)

    assert laws.distance(found, expected) <= laws.TOLERANCE


def test_bridge_under_a_guardrail_answers_as_inside_a_block():
    """A policy that stops rows does so with transformers' means, which a bridge's own generate lacks."""
    found, ids, tokenizer = boot("llama"), tiny.prompt(2, 6), word_tokenizer()
    refusal = Refuse(Watch(Hits((1, 2, 3)), Rate(), 0.5), "relu", None, "w9 w9", "said.no")
    edits = Policy.of(found, tokenizer, SAES[0], PUSH, name="edits")
    stops = Policy.of(found, tokenizer, SAES[0], None, name="stops", refusals=(refusal,))

    with steer(found, PUSH, saes=SAES, tokenizer=tokenizer):
        expected = found.generate(ids, **WRITE)
    guard = Guardrail.attach(found, {"edits": edits, "stops": stops}, tokenizer=tokenizer, saes=SAES)

    assert torch.equal(guard.generate(ids, rows="edits", **WRITE).sequences, expected)
    with pytest.raises(UnsupportedMode, match="logits_processor"):
        guard.generate(ids, rows="stops", **WRITE)
    guard.detach()


def streams(found: Any) -> Any:
    return list(found.generate_stream(tiny.prompt(1, 4), max_new_tokens=2, verbose=False))


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a stream of tokens": (streams, UnsupportedMode, "went around saeguard"),
    "the class's own function": (
        lambda found: type(found).generate(found, tiny.prompt(1, 4), **WRITE), UnsupportedMode, "went around saeguard",
    ),
    "a stream in the middle": (
        lambda found: found(torch.zeros(1, 4, tiny.D), start_at_layer=1),
        NotImplementedError if IS_OLD else UnsupportedMode, "start_at_layer",
    ),
    "generating from embeddings": (
        lambda found: found.generate(torch.zeros(1, 4, tiny.D), **WRITE), TokensUnknown, "Pass text, or rows x tokens",
    ),
    "generating from one row without its axis": (
        lambda found: found.generate(torch.tensor([1, 5, 6]), **WRITE), TokensUnknown, "rows x tokens",
    ),
    "images": (
        lambda found: found.generate(tiny.prompt(1, 4), pixel_values=torch.zeros(1), **WRITE),
        UnsupportedMode, "with pixel_values",
    ),
    "what the model would get unread": (
        lambda found: found.generate(tiny.prompt(1, 4), token_type_ids=tiny.prompt(1, 4), **WRITE),
        UnsupportedMode, "with token_type_ids",
    ),
    "stop strings for several rows": (
        lambda found: found.generate(TEXTS, stop_strings="w9", **WRITE), UnsupportedMode, "stop strings",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", ["a call", "run_with_cache"])
def test_stopping_behind_the_last_edit_is_a_whole_pass_and_before_it_is_refused(way):
    ids, found = tiny.prompt(1, 6), bridge("llama")
    stopped: Any = found if way == "a call" else lambda *args, **kwargs: found.run_with_cache(*args, **kwargs)[0]

    with steer(found, PUSH, saes=SAES), capture(found, LAYER_END) as tape, torch.no_grad():
        assert torch.equal(stopped(ids, stop_at_layer=2), tape[LAYER_END])
        for layer in (0, 1, -2):
            with pytest.raises(GuardNotApplied, match=r"resid_post\.1.*had not run"):
                stopped(ids, stop_at_layer=layer)
    at_the_end = Plan((Rule("relu", (1,), AtLeast(4.0), site=Site("resid_pre", 2)),))
    with steer(found, at_the_end, saes=SAES), capture(found, "resid_pre.2") as tape, torch.no_grad():
        assert torch.equal(stopped(ids, stop_at_layer=2), tape["resid_pre.2"])


def test_numbers_that_are_not_finite_are_noticed_in_a_pass_that_stops():
    endless = Plan((Rule("relu", (1,), Scale(1e38), special=True), Rule("relu", (2, 3), Add(3e38), special=True)))

    with steer(bridge("llama"), endless, saes=SAES), pytest.raises(UnstableEdit), torch.no_grad():
        bridge("llama")(tiny.prompt(1, 6), stop_at_layer=2)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(what):
    call, error, message = REFUSED[what]

    with pytest.raises(error, match=message), steer(bridge("llama"), PUSH, saes=SAES):
        call(bridge("llama"))


def test_one_row_may_end_where_a_criterion_says_so():
    third = MaxLengthCriteria(8)

    with steer(bridge("llama"), PUSH, saes=SAES) as run:
        words = bridge("llama").generate(TEXTS[0], stopping_criteria=third, return_type="tokens", **WRITE)

    assert words.shape[1] == 8
    assert max(laws.edited(run)[PUSH.rules[0]][0][0]) <= 6


def test_processed_weights_are_refused_and_the_legacy_names_without_them_are_not():
    processed, renamed = boot("llama"), boot("llama")
    processed.enable_compatibility_mode(disable_warnings=True)
    renamed.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    ids = tiny.prompt(1, 5)

    with steer(bridge("llama"), PUSH, saes=SAES):
        expected = logits(bridge("llama"), ids)
    with steer(renamed, PUSH, saes=SAES):
        found = logits(renamed, ids)

    assert laws.distance(found, expected) <= laws.TOLERANCE
    with pytest.raises(UnsupportedModel, match=r"processed.*no_processing=True"):
        engine_for(processed)
    with steer(renamed, PUSH, saes=SAES):
        logits(renamed, ids)
        renamed.process_weights()
        with pytest.raises(UnsupportedMode, match="processed while a block was open"):
            logits(renamed, ids)


@pytest.mark.parametrize("name", ["HookedTransformer", "HookedEncoder"])
def test_other_classes_of_transformer_lens_are_refused(name):
    """Among them what calls itself HookedTransformer, and has no generate that is known."""
    kind = type(name, (torch.nn.Module,), {"__module__": f"transformer_lens.{name}"})

    with pytest.raises(UnsupportedModel, match=f"{name}.*boot_transformers"):
        engine_for(kind())


def test_plan_that_does_not_fit_a_bridge_is_refused_before_it_is_touched():
    rule = Rule("tiny", (1,), Scale(2.0))

    for site, width, error in ((Site("resid_post", 9), tiny.D, SiteNotFound), (Site("mlp_post", 1), 7, WidthMismatch)):
        with pytest.raises(error), steer(bridge("llama"), Plan((rule,)), saes=tiny.tiny_sae(site=site, d_in=width)):
            pass
    with pytest.raises(SiteNotFound, match="nothing between them"):
        engine_for(bridge("neox")).resolve(Site("resid_mid", 1))


def test_copy_of_a_bridge_made_inside_a_block_is_refused_there_and_free_after_it():
    found, ids = boot("llama"), tiny.prompt(1, 4)

    with steer(found, PUSH, saes=SAES):
        twin = copy.deepcopy(found)
        with pytest.raises(GuardNotApplied, match="copy was made inside a block"):
            logits(twin, ids)
        logits(found, ids)

    assert torch.equal(logits(twin, ids), logits(found, ids))
    assert torch.equal(twin.generate(ids, **WRITE), found.generate(ids, **WRITE))


def test_hook_point_that_no_longer_runs_is_noticed():
    found = boot("llama")
    layers = found.original_model.model.layers

    with steer(found, PUSH, saes=SAES):
        layers[1] = layers[1].original_component
        with pytest.raises(GuardNotApplied, match=r"resid_post\.1"):
            logits(found, tiny.prompt(1, 4))


@settings(max_examples=cases(300))
@given(st.sampled_from(NAMES), st.integers(1, 3), st.integers(2, 9), st.integers(0, 2**20), st.data())
def test_hook_functions_of_a_plan_do_what_steering_does(name, rows, width, seed, data):
    plans, (ids, mask) = data.draw(plans_per_row(rows)), batch(rows, width, seed)
    fired = st.sampled_from([stream for n, stream in PLACED if n == name])
    sae = sae_at(name, data.draw(fired))
    plans[0] = Plan((Rule("tiny", (1, 7, 20, 31), Clamp(3.0, when="always")), *(plans[0].rules if plans[0] else ())))
    told: dict[str, Any] = {"prompt_tokens": (2,) * rows}

    with steer(bridge(name), plans, saes=[*SAES, sae], **told):
        expected = logits(bridge(name), ids, mask)
    hooks = plan_as_hooks(plans, bridge(name), [*SAES, sae], attention_mask=mask, **told)
    with torch.no_grad():
        twice = [bridge(name).run_with_hooks(ids, fwd_hooks=hooks, attention_mask=mask) for _ in range(2)]

    assert torch.equal(twice[0], expected)
    assert torch.equal(twice[1], expected)


@pytest.mark.usefixtures("without_type_checks")
def test_hook_functions_are_told_of_prompts_as_steering_is():
    found, ids = bridge("llama"), tiny.prompt(2, 5)
    plan = Plan((Rule("relu", (1, 2, 3), AtLeast(4.0), phase="prompt"),))

    for told in (-3, 2.5, True, [3, 2.5]):
        with pytest.raises(BadRule, match="not a count of tokens"):
            plan_as_hooks(plan, found, SAES, prompt_tokens=told)
    with pytest.raises(BadRule, match="there are 2 plans, one per row"):
        plan_as_hooks([plan, None], found, SAES, prompt_tokens=[3])
    with pytest.raises(RowsMismatch, match="prompt_tokens for 3 rows"):
        found.run_with_hooks(ids, fwd_hooks=plan_as_hooks(plan, found, SAES, prompt_tokens=[3, 4, 5]))
    with steer(found, plan, saes=SAES, prompt_tokens=[2, 4]):
        expected = logits(found, ids)
    hooks = plan_as_hooks(plan, found, SAES, prompt_tokens=[2, 4])
    with torch.no_grad():
        assert torch.equal(found.run_with_hooks(ids, fwd_hooks=hooks), expected)


def test_bridge_is_patched_as_its_model_is():
    found, sae = bridge("llama"), SAES[0]
    texts = {"input_ids": tiny.prompt(2, 7)}, {"input_ids": tiny.prompt(2, 7, seed=9)}

    with torch.no_grad():
        expected = patch(shared("llama"), sae, *texts, (3, 8)).logits
        renamed = patch(found, sae, {"input": texts[0]["input_ids"]}, texts[1], (3, 8))
        assert laws.distance(patch(found, sae, *texts, (3, 8)), expected) <= laws.TOLERANCE
    assert laws.distance(renamed, expected) <= laws.TOLERANCE


def test_hook_functions_of_a_plan_refuse_what_they_cannot_know():
    found, ids = bridge("llama"), tiny.prompt(1, 5)
    hooks = plan_as_hooks(PUSH, found, SAES)
    _, kept = found(ids, return_type="logits_and_cache", use_cache=True)

    with pytest.raises(UnsupportedMode, match="5 columns are in it already"):
        found.run_with_hooks(ids[:, 1:2], fwd_hooks=hooks, past_key_values=kept)
    with found.hooks(fwd_hooks=hooks), pytest.raises(UnsupportedMode, match="whole text in one pass"):
        found.generate(ids, **WRITE)
    with pytest.raises(GuardNotApplied, match="came to it twice"):
        found.run_with_hooks(ids, fwd_hooks=hooks[1:])
    with pytest.raises(GuardNotApplied, match="Give all functions"):
        found.run_with_hooks(ids, fwd_hooks=plan_as_hooks(PUSH, found, SAES)[1:])
    with pytest.raises(UnsupportedModel, match="its engine is transformers"):
        plan_as_hooks(PUSH, shared("llama"), SAES)
