"""Quantised layers are steered like plain ones: the edits are those of a hook by hand on the same quantised model.

transformers imports torchao wherever it is installed, which takes seconds and prints warnings; so it is installed in
the environment of `make test-saelens` only, which runs this file too.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

ao = pytest.importorskip("torchao.quantization", reason="make test-saelens runs this")

from torchao.quantization.granularity import PerGroup, PerTensor  # noqa: E402

from saeguard import SAE, AtLeast, Plan, Rule, Site, load_model, steer  # noqa: E402
from saeguard.engines.hf import HuggingFace  # noqa: E402
from saeguard.errors import UnsupportedMode  # noqa: E402
from tests import laws, tiny  # noqa: E402
from tests.counts import FULL  # noqa: E402
from tests.laws import edited, same_bits  # noqa: E402
from tests.test_placement import IDS, WRITE, logits, noisy_biases, plans_at  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


def wide_llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Wide enough for groups of 32 weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=tiny.VOCAB, num_key_value_heads=2, **sizes, **tiny.SPECIAL)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return model.eval()


QUANTISED: dict[str, Callable[[], Any]] = {
    "int8 weights": lambda: ao.Int8WeightOnlyConfig(),
    "int8 weights and activations": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
    "int4 weights": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "int4 weights and int8 activations": lambda: ao.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    ),
}


def quantised(kind: str, model: Any = None) -> Any:
    model = model or wide_llama()
    ao.quantize_(model, QUANTISED[kind]())
    return model


def by_hand(model: Any, site: str, sae: SAE, latents: list[int], amount: float, ids: Tensor = IDS) -> Tensor:
    """Logits under a hook of the site that encodes and decodes the whole SAE; rows behind the first are left alone."""
    block = model.model.layers[int(site.partition(".")[2])]
    stream = site.partition(".")[0]
    module = {
        "resid_post": block,
        "mlp_out": block.mlp,
        "mlp_post": block.mlp.down_proj,
        "attn_z": block.self_attn.o_proj,
    }
    wanted = torch.stack([ids == special for special in tiny.SPECIAL.values()]).any(0).logical_not()[..., None]
    wanted = wanted & (torch.arange(len(ids)) == 0)[:, None, None]

    def moved(x: Tensor) -> Tensor:
        f = sae.encode(x.float())
        other = f.clone()
        other[..., latents] = f[..., latents].clamp(min=amount)
        return torch.where(wanted, x + sae.decode(other) - sae.decode(f), x)

    if stream in ("mlp_post", "attn_z"):
        handle = module[stream].register_forward_pre_hook(lambda _, args: (moved(args[0]), *args[1:]))
    else:
        handle = module[stream].register_forward_hook(lambda _, args, out: moved(out))
    try:
        return logits(model, ids)
    finally:
        handle.remove()


@pytest.mark.parametrize("site", ["resid_post.1", "mlp_out.1", "mlp_post.1", "attn_z.1"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_model_is_edited_as_a_hook_with_the_whole_sae_edits_it(kind, site):
    model = quantised(kind)
    place = HuggingFace(model).resolve(Site.parse(site))
    sae = tiny.tiny_sae(d_in=place.width, site=Site.parse(site))
    plans = [Plan((Rule("tiny", (1, 2, 5), AtLeast(6.0)),)), None, None]

    with torch.no_grad(), steer(model, plans, saes=sae) as run:
        found = model(IDS, use_cache=False).logits
    expected = by_hand(model, site, sae, [1, 2, 5], 6.0)

    assert place.width == (128 if site == "mlp_post.1" else 64)
    assert type(model.model.layers[1].mlp.down_proj.weight).__module__.startswith("torchao")
    assert list(edited(run).values()) == [((tuple(range(1, 7)), (), ()),)]
    assert laws.distance(found, expected) <= (
        0.02 if "activations" in kind else laws.TOLERANCE
    )  # their steps are coarse
    assert laws.distance(found[0], logits(model)[0]) > 0.1
    assert same_bits(found[1:], logits(model)[1:])


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_model_writes_what_a_full_pass_edits(kind):
    model, sae = quantised(kind), tiny.tiny_sae(d_in=64)
    plan = Plan((Rule("tiny", (1, 2, 5), AtLeast(6.0)),))

    with torch.no_grad(), steer(model, plan, saes=sae) as run:
        said = model.generate(IDS[:1], **WRITE)
    with torch.no_grad(), steer(model, plan, saes=sae, prompt_tokens=IDS.shape[1]) as whole:
        model(said[:, :-1], use_cache=False)

    assert edited(run) == edited(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_that_transformers_quantised_while_loading_is_steered(dtype, tmp_path):
    wide_llama(dtype).save_pretrained(tmp_path)
    how = TorchAoConfig(ao.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=how, dtype=dtype).eval()
    sae = tiny.tiny_sae(d_in=64)

    with torch.no_grad(), steer(model, plans_at("resid_post.1", sae), saes=sae):
        found = model(IDS).logits

    assert found.dtype == dtype
    assert type(model.model.layers[1].mlp.down_proj.weight).__module__.startswith("torchao")
    assert same_bits(found[1], logits(model)[1])
    assert laws.distance(found[0], logits(model)[0]) > 0.1


@pytest.mark.parametrize("kind", ["int8 weights", "int8 weights and activations"])
def test_bias_of_the_values_is_read_through_packed_weights(kind):
    model = noisy_biases(tiny.fresh_model("neox"))
    engine = HuggingFace(model)
    expected, without = engine.value_bias(1, with_norm=True), engine.value_bias(1, with_norm=False)

    found = HuggingFace(quantised(kind, model)).value_bias(1, with_norm=True)

    assert found is not None
    assert expected is not None
    assert without is not None
    assert laws.distance(found, expected) < 0.03 < laws.distance(without, expected)


def torch_dynamic() -> Any:
    return torch.ao.quantization.quantize_dynamic(wide_llama(), {nn.Linear}, dtype=torch.qint8)


def per_tensor() -> Any:
    model = wide_llama()
    ao.quantize_(model, ao.Int8DynamicActivationInt8WeightConfig(granularity=PerTensor()))
    return model


@pytest.mark.parametrize("make", [torch_dynamic, per_tensor])
def test_one_scale_for_the_activations_of_all_rows_is_refused(make):
    """The scale of a layer's int8 inputs is that of the largest in the batch, so an edit in one row moved them all."""
    model, sae = make(), tiny.tiny_sae(d_in=64)
    plain = logits(model)

    assert not torch.equal(by_hand(model, "resid_post.1", sae, [1, 2, 5], 60.0)[1], plain[1])
    refused = pytest.raises(
        UnsupportedMode, match=r"one scale for the activations of all tokens.* Quantise with a scale per"
    )
    with refused, steer(model, plans_at("resid_post.1", sae), saes=sae):
        raise AssertionError("entered")


@pytest.mark.parametrize("kind", ["int8 weights", "int4 weights"] if FULL else ["int4 weights"])
def test_quantised_real_model_is_edited_as_by_hand(kind):
    model, _ = load_model("smollm2-135m-instruct")
    model = quantised(kind, model)
    ids = torch.arange(300, 316).view(2, 8)
    sae = tiny.tiny_sae(d_in=576, site=Site("resid_post", 15), activation="relu")
    plans = [Plan((Rule("tiny", (1, 2, 5), AtLeast(1e4)),)), None]  # more than any of them has by itself

    with torch.no_grad(), steer(model, plans, saes=sae) as run:
        found = model(ids, use_cache=False).logits
    plain = logits(model, ids)

    assert list(edited(run).values()) == [((tuple(range(8)), ()),)]
    assert laws.distance(found, by_hand(model, "resid_post.15", sae, [1, 2, 5], 1e4, ids)) <= laws.TOLERANCE
    assert laws.distance(found[0], plain[0]) > 1e-3
    assert same_bits(found[1], plain[1])
    for site, width in (("mlp_post.3", 1536), ("attn_z.3", 576)):
        assert HuggingFace(model).resolve(Site.parse(site)).width == width
