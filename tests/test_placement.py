"""SAEs follow the layers: to other devices, into offloading, half precision and compiled calls.

A second device is simulated in two ways on a machine with one: offloaded weights are on the meta device between calls,
and an editor is given streams on the meta device, where any operand that was left behind raises.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from saeguard import (
    SAE,
    Add,
    AnyActive,
    AtLeast,
    Clamp,
    Layout,
    Misdirect,
    Plan,
    Project,
    Rule,
    Scale,
    Site,
    Splice,
    capture,
    steer,
)
from saeguard.editor import Editor, bind
from saeguard.engines.hf import HuggingFace
from saeguard.engines.placement import device_of
from saeguard.errors import GuardNotApplied, MetaDevice, UnstableEdit, UnsupportedMode, UnsupportedModel
from saeguard.tokens import TokenBatch
from tests import laws, tiny
from tests.counts import FULL
from tests.laws import Stack, edited, same_bits
from tests.traces import nothing_left

IDS = tiny.prompt(3, 7, seed=3)
CPU, META = torch.device("cpu"), torch.device("meta")
WRITE: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": tiny.PAD}
ALL_SITES = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "mlp_in",
    "mlp_normed",
    "mlp_post",
    "attn_z",
)
HALVES = (torch.bfloat16, torch.float16)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def plans_at(site: str, sae: SAE) -> list[Plan | None]:
    """One plan per row of `IDS`, and none for the second."""
    at = lambda op, *latents: Rule(sae.name, latents, op, site=Site.parse(site))
    return [Plan((at(AtLeast(6.0), 1, 2, 5),)), None, Plan((at(Scale(-2.0), 3, 4), at(Add(2.0), 7)))]


def steered(model: Any, plan: Any, sae: SAE) -> tuple[Tensor, Tensor, Any]:
    """Logits, what is written, and what was edited."""
    with torch.no_grad(), steer(model, plan, saes=sae) as run:
        return model(IDS, use_cache=False).logits, model.generate(IDS, **WRITE), edited(run)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def width_at(site: str) -> int:
    return 48 if site.startswith("mlp_post") else tiny.D


# Offloading


def to_cpu(model: Any, folder: Path) -> Any:
    return cpu_offload(model, CPU)


def to_cpu_by_block(model: Any, folder: Path) -> Any:
    return cpu_offload(model, CPU, preload_module_classes=["LlamaDecoderLayer"])


def to_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, str(folder), CPU)


def loaded_with_a_device_map(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "model")
    rest = ("embed_tokens", "layers.0", "layers.2", "norm", "rotary_emb")
    where = {"model.layers.1": "disk", "lm_head": "cpu"} | {f"model.{name}": "cpu" for name in rest}
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=where, offload_folder=folder / "offloaded"
    ).eval()


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    function.__name__: function for function in (to_cpu, to_cpu_by_block, to_disk, loaded_with_a_device_map)
}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_model_is_edited_like_the_whole_one(offload, tmp_path):
    sae = tiny.tiny_sae()
    plans = plans_at("resid_post.1", sae)
    model = OFFLOADS[offload](tiny.fresh_model(), tmp_path)
    plain = logits(model)
    assert all(parameter.is_meta for parameter in model.model.layers[1].parameters())

    with nothing_left(model):
        found = steered(model, plans, sae)
    expected = steered(tiny.tiny_model(), plans, sae)

    assert found[2] == expected[2]
    assert same_bits(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert same_bits(found[0][1], plain[1])
    assert laws.distance(found[0][0], plain[0]) > 1e-3
    assert all(parameter.is_meta for parameter in model.model.layers[1].parameters())


@pytest.mark.parametrize(
    ("offload", "site"), [(to_disk, site) for site in ALL_SITES] + [(to_cpu_by_block, "mlp_normed")]
)
def test_every_site_of_an_offloaded_block_is_steered(offload, site, tmp_path):
    sae = tiny.tiny_sae(d_in=width_at(site))
    plans = plans_at(f"{site}.1", sae)

    found = steered(offload(tiny.fresh_model(), tmp_path), plans, sae)
    expected = steered(tiny.tiny_model(), plans, sae)

    assert found[2] == expected[2]
    assert same_bits(found[0], expected[0])


@pytest.mark.parametrize("name", ["gpt2", "neox", "qwen2"])
def test_bias_of_the_values_is_read_from_where_it_is_kept(name, tmp_path):
    model = noisy_biases(tiny.fresh_model(name))
    expected = HuggingFace(model).value_bias(1, with_norm=True)

    found = HuggingFace(disk_offload(model, str(tmp_path), CPU)).value_bias(1, with_norm=True)

    assert found is not None
    assert expected is not None
    assert same_bits(found, expected)
    assert found.any()


def noisy_biases(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def test_place_of_an_offloaded_block_is_where_it_runs():
    model = cpu_offload(tiny.fresh_model(), CPU)
    for module in model.model.layers[1].modules():
        if hasattr(module, "_hf_hook"):
            module._hf_hook.execution_device = "cuda:1"

    assert HuggingFace(model).resolve(Site("resid_post", 1)).device == torch.device("cuda:1")
    assert HuggingFace(model).resolve(Site("resid_post", 0)).device == CPU


def test_offloading_hook_is_found_among_others():
    model = cpu_offload(tiny.fresh_model(), CPU)
    for module in list(model.modules()):
        if hasattr(module, "_hf_hook"):
            module._hf_hook = SequentialHook(AlignDevicesHook(), module._hf_hook)

    assert device_of(model, "model.layers.1") == CPU


def empty(model: Any) -> Any:
    return model.to("meta")


def empty_but_for_a_norm(model: Any) -> Any:
    norm = model.model.layers[1].input_layernorm
    model.to("meta")
    norm.to_empty(device="cpu")
    return model


def empty_under_a_hook_that_holds_nothing(model: Any) -> Any:
    model = model.to("meta")
    for block in model.model.layers:
        add_hook_to_module(block, AlignDevicesHook(execution_device=None))
    return model


def empty_beside_an_offloaded_block(model: Any) -> Any:
    block = model.model.layers[0]
    cpu_offload(block, CPU)
    model.model.layers[1].to("meta")
    return model


@pytest.mark.parametrize(
    "emptied", [empty, empty_but_for_a_norm, empty_under_a_hook_that_holds_nothing, empty_beside_an_offloaded_block]
)
def test_model_without_values_is_refused(emptied):
    model = emptied(tiny.fresh_model())

    with pytest.raises(MetaDevice, match="no offloading hook holds it, so it has no values"), steer(
        model, plans_at("resid_post.1", tiny.tiny_sae()), saes=tiny.tiny_sae()
    ):  # fmt: skip
        raise AssertionError("entered")


# Devices of the stream

PARTS: dict[str, Rule] = {
    "sliced": Rule("tiny", (1, 2, 5), AtLeast(6.0), special=True),
    "norm": Rule("tiny", (1, 2), Add(0.5, unit="norm"), special=True),
    "trigger": Rule("tiny", (3,), Clamp(2.0, when="always"), trigger=AnyActive((4, 5)), special=True),
    "dense": Rule("tiny", (), Splice("dropped"), special=True),
    "project": Rule("tiny", (1, 2), Project(), special=True),
    "misdirect": Rule("tiny", (), Misdirect(3.0), special=True),
}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_edits_are_made_where_the_stream_is_and_laid_out_there_once(kind, activation, monkeypatch):
    monkeypatch.setattr("torch.autocast", lambda *_, **__: nullcontext())  # which knows no meta device
    sae = tiny.tiny_sae(activation=activation)
    bound = bind([Plan((PARTS[kind],))], {"tiny": sae}, every_row=True)
    editor = Editor(Site("resid_post", 1), bound, {"tiny": sae}, device=CPU)
    x = torch.randn(2, 4, tiny.D)
    real, covers = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)
    tokens = TokenBatch(real, torch.arange(4).expand(2, 4), None, None, 0)

    before = editor(x, tokens, covers)
    with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):  # the rules are about all tokens
        there = editor(x.to(META), tokens, covers)
        laid_out = dict(editor._elsewhere)
        again = editor(x.to(META), tokens, covers)
    back = editor(x, tokens, covers)

    assert (there.dx.device, there.changed.device, again.dx.device) == (META, META, META)
    assert there.dx.shape == x.shape
    assert [key[1] for key in laid_out] == [META]
    assert editor._elsewhere == laid_out, "every device is laid out for once"
    assert same_bits(back.dx, before.dx)


# Half precision


@pytest.mark.parametrize("site", ALL_SITES)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_stream_keeps_its_dtype_and_is_rounded_once(dtype, site):
    """Against the formula in float64, from the stream as it is."""
    model, sae = tiny.fresh_model(dtype=dtype), tiny.tiny_sae(d_in=width_at(site))
    at, latents = Site.parse(f"{site}.1"), [1, 2, 5]
    plan = Plan((Rule("tiny", tuple(latents), AtLeast(2.0), site=at, special=True),))

    before, after = capture(model, at, side="before"), capture(model, at)
    with torch.no_grad(), steer(model, plan, saes=sae) as run, before as was, after as became:
        out = model(IDS).logits
    x, wide = was[at].double(), sae.narrow(latents).to(dtype=torch.float64)
    pre = x @ wide.W_enc + wide.b_enc
    f = torch.where(pre > wide.threshold, pre, 0.0)
    expected = x + (f.clamp(min=2.0) - f) @ wide.W_dec

    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    assert any(map(any, edited(run)[plan.rules[0]]))
    ulp = torch.finfo(dtype).eps * expected.abs().clamp(min=x.abs()).amax(-1, keepdim=True)
    if site == "mlp_normed":  # what the MLP reads is rounded, and this is that over a gain
        ulp = 2 * ulp
    assert bool(((became[at].double() - expected).abs() <= ulp).all())


@pytest.mark.parametrize("dtype", HALVES)
def test_row_without_a_plan_keeps_its_bits_in_half_precision(dtype):
    model, sae = tiny.fresh_model(dtype=dtype), tiny.tiny_sae()

    found, said, _ = steered(model, plans_at("resid_post.1", sae), sae)

    assert same_bits(found[1], logits(model)[1])
    assert not torch.equal(found[0], logits(model)[0])
    with torch.no_grad():
        assert torch.equal(said[1], model.generate(IDS, **WRITE)[1])


def test_edits_are_computed_in_float32_under_autocast():
    model, sae = tiny.fresh_model(), tiny.tiny_sae()
    at = Site("resid_post", 1)
    plan = Plan((Rule("tiny", (1, 2, 5), AtLeast(6.0), special=True),))

    before, after = capture(model, at, side="before"), capture(model, at)
    half = torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad(), half, steer(model, plan, saes=sae), before as was, after as became:
        model(IDS)
    f = sae.encode(was[at])[..., [1, 2, 5]]

    assert became[at].dtype == was[at].dtype == torch.float32
    moved = (f.clamp(min=6.0) - f) @ sae.W_dec[[1, 2, 5]]
    assert laws.distance(became[at], was[at] + moved) <= laws.TOLERANCE


def test_edit_that_overflows_float16_is_refused_by_name():
    model, plan = tiny.fresh_model(dtype=torch.float16), Plan((Rule("tiny", (1,), Add(1e6)),))

    with pytest.raises(UnstableEdit), steer(model, plan, saes=tiny.tiny_sae()):
        logits(model)


@pytest.mark.parametrize("dtype", HALVES)
def test_norm_of_a_stream_does_not_overflow_in_half_precision(dtype):
    """The square of 3e4 is beyond float16, and so is the norm of 32 of them."""
    sae, model = tiny.tiny_sae(site=laws.STACK_SITE), Stack(tiny.D).to(dtype)
    x = torch.full((1, 3, tiny.D), 3e4, dtype=dtype)
    plan = Plan((Rule("tiny", (1, 2), Add(1e-3, unit="norm"), special=True),))

    with torch.no_grad(), steer(model, plan, saes=sae, layout=Layout("blocks")):
        found = model(inputs_embeds=x)

    norm = torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True)
    expected = x.double() + 1e-3 * norm * sae.W_dec.double()[[1, 2]].sum(0)
    assert norm.max() > torch.finfo(torch.float16).max
    assert found.dtype == dtype
    assert laws.distance(found, expected) <= torch.finfo(dtype).eps


# Compiled calls


@pytest.mark.parametrize("backend", ["eager", "aot_eager"] if FULL else ["aot_eager"])
def test_model_compiled_inside_the_block_computes_what_it_computes_eagerly(backend):
    model, sae = tiny.fresh_model(), tiny.tiny_sae()
    torch._dynamo.reset()

    with torch.no_grad(), steer(model, plans_at("resid_post.1", sae), saes=sae) as run:
        compiled = torch.compile(model, backend=backend)
        found = compiled(IDS, use_cache=False).logits
    expected, _, edits = steered(tiny.tiny_model(), plans_at("resid_post.1", sae), sae)
    torch._dynamo.reset()

    assert laws.distance(found, expected) <= laws.TOLERANCE
    assert edited(run) == {rule: calls[:1] for rule, calls in edits.items()}
    assert laws.distance(found[0], logits(tiny.tiny_model())[0]) > 1e-3


# Wrappers


def test_data_parallel_is_refused_by_name():
    refused = pytest.raises(
        UnsupportedModel, match=r"steering DataParallel: it wraps a LlamaForCausalLM, and runs copies"
    )

    with refused, steer(nn.DataParallel(tiny.tiny_model()), None):  # type: ignore[arg-type]
        raise AssertionError("entered")


def test_copies_that_data_parallel_makes_for_other_devices_refuse_to_run():
    model, sae = tiny.fresh_model(), tiny.tiny_sae()

    with steer(model, plans_at("resid_post.1", sae), saes=sae):
        logits(model)
        copy: Any = model._replicate_for_data_parallel()
        with pytest.raises(GuardNotApplied, match="a call of a copy of LlamaForCausalLM"):
            logits(copy)


def test_weights_sharded_by_deepspeed_are_refused_by_name():
    """ZeRO-3 marks every parameter that it has taken apart; DeepSpeed itself is not needed to see that."""
    model = tiny.fresh_model()
    next(model.model.layers[1].parameters()).ds_id = 7  # type: ignore[attr-defined]

    refused = pytest.raises(UnsupportedMode, match=r"sharded by DeepSpeed \(ZeRO-3\).* Load it whole on each rank")

    with refused, steer(model, plans_at("resid_post.1", tiny.tiny_sae()), saes=tiny.tiny_sae()):
        raise AssertionError("entered")


def test_part_of_a_sequence_is_refused_by_name():
    """Under context parallelism a rank would take its first token for the first of the sequence."""
    model, sae = tiny.tiny_model(), tiny.tiny_sae()
    later = torch.arange(7, 14).expand(3, 7)

    with steer(model, plans_at("resid_post.1", sae), saes=sae), torch.no_grad():
        model(IDS, position_ids=later - 7)
        with pytest.raises(
            UnsupportedMode, match=r"do not begin at 0, so it is a part of a sequence.* whole sequences"
        ):
            model(IDS, position_ids=later)
