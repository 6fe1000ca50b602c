"""A PEFT model is steered as the model inside of it: its adapters act, its passes say the same, or it is refused."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import pipeline

from saeguard import Add, AtLeast, Clamp, Plan, Rule, Site, capture, steer
from saeguard.engines import engine_for, requests
from saeguard.engines.session import participants
from saeguard.errors import (
    GuardNotApplied,
    ModelBusy,
    PolicyMismatch,
    UnguardedCall,
    UnsupportedMode,
    UnsupportedModel,
    WrongModel,
)
from saeguard.gates import Count, Hits, Latched, Watch
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy
from tests import laws, tiny
from tests.words import word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

SAE = tiny.tiny_sae()
LM = "CAUSAL_LM"
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(task_type=LM, target_modules=["q_proj", "v_proj", "down_proj"]),
    "lora without a task": lambda: LoraConfig(target_modules=["q_proj", "down_proj"]),
    "lora on all": lambda: LoraConfig(task_type=LM, target_modules="all-linear", modules_to_save=["lm_head"]),
    "dora": lambda: LoraConfig(task_type=LM, target_modules=["q_proj", "up_proj"], use_dora=True),
    "a saved mlp": lambda: LoraConfig(task_type=LM, target_modules=["q_proj"], modules_to_save=["mlp"]),
    "ia3": lambda: IA3Config(task_type=LM, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: LoHaConfig(task_type=LM, target_modules=["q_proj"]),
    "vera": lambda: VeraConfig(task_type=LM, target_modules=["o_proj"]),
    "norms": lambda: LNTuningConfig(task_type=LM, target_modules=["input_layernorm"]),
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "prefix": (lambda: PrefixTuningConfig(task_type=LM, num_virtual_tokens=4), "PREFIX_TUNING: it puts virtual"),
    "prompt": (lambda: PromptTuningConfig(task_type=LM, num_virtual_tokens=4), "PROMPT_TUNING: it puts virtual"),
    "p-tuning": (lambda: PromptEncoderConfig(task_type=LM, num_virtual_tokens=4), "P_TUNING: it puts virtual"),
    "adalora": (lambda: AdaLoraConfig(task_type=LM, target_modules=["q_proj"], total_step=9), "AdaLoraModel: it does"),
    "adaption": (lambda: AdaptionPromptConfig(task_type=LM, adapter_len=4, adapter_layers=2), "AdaptionPromptModel"),
}
GATE = Latched(Watch(Hits((1, 2, 3)), Count(), 2.0))
PLAN = Plan((
    Rule("tiny", (4, 5), Add(6.0), gate=GATE), Rule("tiny", (7,), Clamp(5.0, when="always"), phase="generated"),
    Rule("tiny", (8, 9), AtLeast(3.0), phase="last"),
))  # fmt: skip
PUSH = Plan((Rule("tiny", (4, 5), Add(6.0), gate=GATE),))
IDS = tiny.prompt(3, 8)
WRITE: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}


def adapted(kind: Any = "lora", seed: int = 3) -> Any:
    """A tiny llama under adapters whose weights are random, so that they do something."""
    config = KINDS[kind]() if isinstance(kind, str) else kind
    found = get_peft_model(tiny.fresh_model(), config)
    return excited(found, seed)


def excited(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.eval()


def merged(model: Any) -> Any:
    """A plain transformers model with the adapters' weights in its own."""
    return copy.deepcopy(model).merge_and_unload()


def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **more).logits


def generated(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    return model.generate(input_ids=ids, **WRITE, **more)


def steered(model: Any, act: Callable[[Any], Tensor], plan: Any = PLAN, **options: Any) -> tuple[Tensor, Any]:
    with steer(model, plan, saes=SAE, **options) as run:
        out = act(model)
    return out, laws.edited(run)


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_model_is_edited_as_the_model_with_its_adapters_merged(kind):
    model = adapted(kind)
    plain, other = generated(model), merged(model)

    written, passed = steered(model, generated), steered(model, logits, prompt_tokens=6)

    right, straight = steered(other, generated), steered(other, logits, prompt_tokens=6)
    assert torch.equal(written[0], right[0])
    assert written[1] == right[1]
    assert laws.distance(passed[0], straight[0]) <= laws.TOLERANCE
    assert passed[1] == straight[1]
    assert torch.equal(generated(model), plain)
    assert not torch.equal(written[0], plain)
    assert laws.distance(logits(model), logits(tiny.tiny_model())) > 1e-2  # the adapters do something


@pytest.mark.parametrize("kind", REFUSED)
def test_adapter_whose_passes_are_not_the_models_is_refused_by_name(kind):
    make, text = REFUSED[kind]
    model = get_peft_model(tiny.fresh_model(), make())

    with pytest.raises(UnsupportedModel, match=text), steer(model, PLAN, saes=SAE):
        pass


@pytest.mark.parametrize("kind", ["prefix", "prompt", "p-tuning"])
def test_virtual_tokens_are_noticed_when_the_model_inside_is_steered(kind):
    """A prefix lies in the cache before the first pass: the last tokens of the prompt counted as generated ones."""
    inner = tiny.fresh_model()
    model = get_peft_model(inner, REFUSED[kind][0]())

    with pytest.raises(UnsupportedMode, match="virtual tokens"):
        steered(inner, lambda _: generated(model))

    assert torch.equal(steered(inner, generated)[0], steered(tiny.fresh_model(), generated)[0])


def test_without_that_refusal_prompt_tokens_behind_a_prefix_would_count_as_generated(monkeypatch):
    inner, phased = tiny.fresh_model(), Plan((Rule("tiny", (4,), Add(6.0), phase="generated"),))
    model = get_peft_model(inner, REFUSED["prefix"][0]())
    monkeypatch.setattr(requests, "_check_own_inputs", lambda model: None)

    with steer(inner, phased, saes=SAE) as run:
        generated(model)

    width = IDS.shape[1] + 4
    assert min(laws.edited(run)[phased.rules[0]][0][0]) < width


def test_adapters_that_are_switched_off_or_merged_inside_a_block_stay_steered():
    model, bare = adapted(), tiny.fresh_model()

    with steer(model, PUSH, saes=SAE):
        on = logits(model)
        with model.disable_adapter():
            off, words = logits(model), generated(model)
        model.merge_adapter()
        inside = logits(model)
        model.unmerge_adapter()
        again = logits(model)

    assert torch.equal(off, steered(bare, logits, PUSH)[0])
    assert torch.equal(words, steered(bare, generated, PUSH)[0])
    assert laws.distance(inside, on) <= laws.TOLERANCE
    assert laws.distance(again, on) <= laws.TOLERANCE
    assert laws.distance(on, off) > 1e-2


def test_each_of_several_adapters_is_steered_also_when_rows_have_their_own():
    model, ids = adapted(), tiny.prompt(3, 8, seed=4)
    model.add_adapter("other", KINDS["lora"]())
    model.set_adapter("other")
    excited(model, seed=9)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = steered(merged(model), lambda m: logits(m, ids), PUSH)[0]

    with steer(model, PUSH, saes=SAE):
        found = {}
        for name in alone:
            model.set_adapter(name)
            found[name] = logits(model, ids)
        rows = logits(model, ids, adapter_names=["other", "default", "__base__"])

    assert all(laws.distance(found[name], alone[name]) <= laws.TOLERANCE for name in alone)
    none = steered(tiny.fresh_model(), lambda m: logits(m, ids), PUSH)[0]
    for row, right in enumerate((alone["other"], alone["default"], none)):
        assert laws.distance(rows[row], right[row]) <= laws.TOLERANCE


def test_adapters_that_transformers_adds_itself_are_steered():
    wrapped, model = adapted(), tiny.fresh_model()
    model.add_adapter(KINDS["lora"]())
    model.load_state_dict(wrapped.get_base_model().state_dict())

    found, right = steered(model, generated), steered(wrapped, generated)

    assert torch.equal(found[0], right[0])
    assert found[1] == right[1]


STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in", "mlp_normed", "mlp_post", "attn_z")


@pytest.mark.parametrize("stream", STREAMS)
def test_every_stream_is_read_and_written_where_the_merged_model_has_it(stream):
    """Of ``mlp_post`` and ``attn_z`` too, whose projections are wrapped by the adapter that reads the same stream."""
    model = adapted("lora on all")
    other, width = merged(model), {"mlp_post": 48}.get(stream, tiny.D)
    sae = tiny.tiny_sae(d_in=width, site=Site(stream, 1), activation="relu", seed=13)
    plan = Plan((Rule("tiny", (1, 7, 20, 31), Clamp(3.0, when="always")),))

    with steer(model, plan, saes=sae), capture(model, sae.site) as tape:
        found = logits(model)
    with steer(other, plan, saes=sae), capture(other, sae.site) as expected:
        right = logits(other)

    assert laws.distance(found, right) <= laws.TOLERANCE
    assert laws.distance(tape[sae.site], expected[sae.site]) <= laws.TOLERANCE
    assert laws.distance(found, logits(model)) > 1e-2


def test_what_is_read_from_weights_once_is_refused_where_adapters_may_change_it():
    norms = adapted(LNTuningConfig(task_type=LM, target_modules=["post_attention_layernorm"]))
    saved = adapted(LoraConfig(task_type=LM, target_modules=["q_proj"], modules_to_save=["post_attention_layernorm"]))
    values = adapted("lora")

    for model in (norms, saved):
        with pytest.raises(UnsupportedModel, match="weights of a module that has adapters"):
            engine_for(model).resolve(Site("mlp_normed", 1))
        assert engine_for(model).resolve(Site("mlp_in", 1)).width == tiny.D
    with pytest.raises(UnsupportedModel, match="weights of a module that has adapters"):
        engine_for(values).value_bias(1, with_norm=False)
    assert engine_for(adapted("loha")).value_bias(1, with_norm=False) is None


def test_blocks_on_the_wrapper_and_on_the_model_inside_are_one_session():
    model = adapted()
    inner, down = model.get_base_model(), Plan((Rule("tiny", (8, 9), Add(4.0)),))
    both = steered(model, logits, Plan((*PUSH.rules, *down.rules)))[0]

    with steer(model, PUSH, saes=SAE), steer(inner, down, saes=SAE):
        found = logits(model), logits(inner)
        assert len(participants(model)) == len(participants(inner)) == 2

    assert laws.distance(found[0], both) <= laws.TOLERANCE
    assert laws.distance(found[1], both) <= laws.TOLERANCE
    assert participants(model) == ()
    assert "generate" not in vars(inner) | vars(model)


def test_adapters_put_on_inside_a_block_are_steered_or_refused_never_plain():
    model, inner = tiny.fresh_model(), Site("mlp_post", 1)
    wide = tiny.tiny_sae(d_in=48, site=inner)

    with steer(model, PUSH, saes=SAE):
        late = excited(get_peft_model(model, KINDS["lora"]()), seed=3)
        found = logits(late)
    with steer(model, PUSH, saes=wide), pytest.raises(GuardNotApplied, match=r"mlp_post\.1"):
        logits(late.merge_and_unload())

    assert laws.distance(found, steered(late, logits, PUSH)[0]) <= laws.TOLERANCE


def test_sae_of_another_model_is_refused_for_a_wrapped_one_too():
    model = adapted()
    model.get_base_model().config._name_or_path = "some/llama"
    model.get_base_model().name_or_path = "some/llama"

    with pytest.raises(WrongModel), steer(model, PUSH, saes=replace(SAE, model="some/gpt")):
        pass
    assert engine_for(model).model_names() == ("some/llama",)


TEXTS = ["w5 w9 w11 w30", "w7", "w40 w41 w9 w22 w51 w6 w8"]


def policy(model: nn.Module) -> Policy:
    return Policy.of(model, word_tokenizer(), SAE, PUSH, name="tiny policy")


def attach(model: Any, of: Any = None) -> Guardrail:
    return Guardrail.attach(model, policy(of or model), tokenizer=word_tokenizer(), saes=SAE)


def test_guardrail_stands_on_an_adapted_model_and_nothing_goes_around_it():
    model = adapted()
    inner, right = model.get_base_model(), steered(model, generated, PUSH, special_ids=[0, 1, 2])[0]
    passed = steered(model, logits, PUSH, special_ids=[0, 1, 2])[0]

    with attach(model) as guard:
        assert torch.equal(guard.generate(IDS, **WRITE).sequences, right)
        for call in (lambda: logits(model), lambda: logits(inner), lambda: generated(model), lambda: generated(inner)):
            with pytest.raises(UnguardedCall):
                call()
        with guard.calls():
            assert torch.equal(generated(model), right)
            assert torch.equal(logits(model), passed)
            with pytest.raises(UnguardedCall, match="the model inside a guarded one"):
                generated(inner)
        with pytest.raises(ModelBusy, match="another one is attached"):
            attach(inner)

    assert not torch.equal(generated(model), right)
    assert "generate" not in vars(inner) | vars(model)


def test_pipeline_writes_the_guarded_text_of_an_adapted_model():
    model, tokenizer = adapted(), word_tokenizer()
    tokenizer.padding_side = "left"
    pipe: Any = pipeline("text-generation", model=model, tokenizer=tokenizer)

    with steer(model, PUSH, saes=SAE, tokenizer=tokenizer):
        right = pipe(TEXTS, batch_size=2, max_new_tokens=6, do_sample=False)
    with attach(model) as guard, guard.calls():
        found = pipe(TEXTS, batch_size=2, max_new_tokens=6, do_sample=False)

    assert found == right
    assert found != pipe(TEXTS, batch_size=2, max_new_tokens=6, do_sample=False)


def changed(model: Any, how: str) -> Any:
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    match how:
        case "switched off":
            model.base_model.disable_adapter_layers()
        case "another adapter":
            model.add_adapter("other", KINDS["lora"]())
            model.set_adapter("other")
        case "another strength":
            layers[0].scaling["default"] *= 2
        case "merged":
            model.merge_adapter()
        case "other weights":
            excited(model, seed=1)
    return model


@pytest.mark.parametrize("how", ["switched off", "another adapter", "another strength", "merged", "other weights"])
def test_policy_of_one_state_of_the_adapters_is_not_for_another(how):
    model = adapted()
    made = policy(model)
    made.check(model, word_tokenizer(), SAE)

    with pytest.raises(PolicyMismatch, match="weights"):
        made.check(changed(model, how), word_tokenizer(), SAE)
    with pytest.raises(PolicyMismatch):
        made.check(tiny.fresh_model(), word_tokenizer(), SAE)
    assert isinstance(model, PeftModel)
