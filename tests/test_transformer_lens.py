"""SAEs that were trained on weights as TransformerLens processes them, checked against TransformerLens.

It folds norms and value biases and takes the mean out of everything that is written to the stream. A model in that
form has other activations than the plain one; with saeguard's corrections an SAE has the same on the plain weights.
"""

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from saeguard import SAE, Clamp, Plan, Rule, Site, Splice, capture, steer
from saeguard.engines.corrections import on_plain_weights
from saeguard.engines.hf import HuggingFace
from saeguard.errors import AmbiguousSAE
from tests import laws, tiny
from tests.modes import word_tokenizer
from tests.more_models import HIDDEN, LAYER, shared

pytest.importorskip("transformer_lens", reason="the extra 'lens' is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = tiny.prompt(2, 8, seed=7)
NAMES = ("gpt2", "neox", "neox_sequential", "llama_with_biases")
HOOKS = {
    "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "attn_z": "attn.hook_z",
    "mlp_normed": "ln2.hook_normalized", "mlp_post": "mlp.hook_post",
}  # fmt: skip
WRITTEN = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""The streams whose mean TransformerLens takes out, in models with LayerNorm."""
CASES = [(name, stream) for name in NAMES for stream in HOOKS if (name, stream) != ("neox", "resid_mid")]


@cache
def bridge(name: str) -> Any:
    """TransformerLens's form of a model, with all of its default processing."""
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = copy.deepcopy(word_tokenizer())
    tokenizer.init_kwargs.update(name_or_path="", add_bos_token=True)
    plain = copy.deepcopy(shared(name))
    plain.config.architectures = [type(plain).__name__]
    found = TransformerBridge.boot_transformers("tiny", hf_model=plain, tokenizer=tokenizer, device="cpu")
    found.enable_compatibility_mode(disable_warnings=True)
    return found


def hook_name(stream: str) -> str:
    return f"blocks.{LAYER}.{HOOKS[stream]}"


@cache
def lens_streams(name: str) -> dict[str, Tensor]:
    with torch.no_grad():
        _, found = bridge(name).run_with_cache(IDS)
    return {stream: found[hook_name(stream)].flatten(2) for n, stream in CASES if n == name}


@cache
def plain_streams(name: str) -> dict[str, Tensor]:
    sites = {stream: Site(stream, LAYER) for n, stream in CASES if n == name}
    with capture(shared(name), sites.values()) as tape:
        shared(name)(IDS)
    return {stream: tape[site] for stream, site in sites.items()}


def is_centered(name: str, stream: str) -> bool:
    return stream in WRITTEN and not name.startswith("llama")


def lens_sae(name: str, stream: str, activation: str) -> SAE:
    """An SAE as if it had been trained on TransformerLens's stream; its config's claims are in norm and manifest."""
    hidden = 4 * tiny.D if name == "gpt2" else HIDDEN
    width = hidden if stream == "mlp_post" else tiny.D
    sae = tiny.tiny_sae(d_in=width, site=Site(stream, LAYER), activation=activation, seed=13)
    norm = "center" if stream in WRITTEN else "none"
    manifest = {"processing": {"fold_ln": True, "center_writing_weights": True, "fold_value_biases": True}}
    return replace(sae, norm=norm, manifest=manifest)


def on_plain(name: str, stream: str, x: Tensor) -> Tensor:
    """The formulas of `saeguard.engines.corrections`, applied to a stream instead of an SAE."""
    if is_centered(name, stream):
        return x - x.mean(-1, keepdim=True)
    if stream == "attn_z":
        return x - HuggingFace(shared(name)).value_bias(LAYER, with_norm=True)
    return x


@pytest.mark.parametrize(("name", "stream"), CASES)
def test_processed_stream_is_the_plain_one_after_the_correction(name, stream):
    x = plain_streams(name)[stream]

    found = on_plain(name, stream, x)

    assert laws.distance(found, lens_streams(name)[stream]) <= 1e-5
    if is_centered(name, stream) or stream == "attn_z":
        assert laws.distance(x, lens_streams(name)[stream]) > 0.02


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize(("name", "stream"), CASES)
def test_sae_of_a_processed_stream_has_the_same_activations_on_plain_weights(name, stream, activation):
    sae = lens_sae(name, stream, activation)
    expected = by_hand(sae, lens_streams(name)[stream])

    corrected = on_plain_weights(sae, HuggingFace(shared(name)))

    x = plain_streams(name)[stream]
    assert laws.distance(corrected.encode(x), expected) <= 1e-4
    assert ((corrected.encode(x) > 0) == (expected > 0)).all()
    assert ("fold_value_biases" in corrected.manifest["processing"]) == (stream != "attn_z")
    if is_centered(name, stream) or stream == "attn_z":
        assert laws.distance(by_hand(sae, x), expected) > 0.02  # what an SAE without corrections makes of it


def by_hand(sae: SAE, x: Tensor) -> Tensor:
    """Activations from x as it is, in float64: the SAE's norm and manifest are not looked at."""
    pre = x.double() @ sae.W_enc.double() + sae.b_enc.double()
    if sae.activation == "topk":
        pre = torch.zeros_like(pre).scatter(-1, pre.topk(sae.top_k).indices, pre.topk(sae.top_k).values)
    return torch.where(pre > (0.0 if sae.threshold is None else sae.threshold.double()), pre, 0.0)


EDITED = (1, 7, 20, 31)


@pytest.mark.parametrize("activation", ["relu", "topk"])
@pytest.mark.parametrize(("name", "stream"), CASES)
def test_steering_plain_weights_gives_the_log_probabilities_of_steering_the_processed_model(name, stream, activation):
    """On its way back to the stream an edit needs no correction: its mean over the width is never read.

    But behind ln2 of a LayerNorm model fold_ln makes the MLP ignore the mean, which it reads on plain weights.
    """
    sae = lens_sae(name, stream, activation)
    plan = Plan((Rule("tiny", EDITED, Clamp(3.0, when="always"), special=True),))
    expected = steered_lens(name, stream, sae)

    with steer(shared(name), plan, saes=sae):
        found = shared(name)(IDS).logits.log_softmax(-1)

    plain = shared(name)(IDS).logits.log_softmax(-1)
    assert float((found - expected).abs().max()) <= 1e-4
    assert float((found - plain).abs().max()) > 0.1
    if corrections_matter(name, stream):
        bare = replace(sae, norm="none", manifest={})
        with steer(shared(name), plan, saes=bare):
            wrong = shared(name)(IDS).logits.log_softmax(-1)
        assert float((wrong - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("activation", ["relu", "topk"])
@pytest.mark.parametrize(("name", "stream"), CASES)
def test_reconstruction_on_plain_weights_gives_the_log_probabilities_of_the_processed_model(name, stream, activation):
    """The reconstruction is put in place of the whole stream, so that all of a correction is in what is written."""
    sae = lens_sae(name, stream, activation)
    sae = replace(sae, W_dec=sae.W_dec / 16)  # of the size of what it replaces
    plan = Plan((Rule("tiny", (), Splice("dropped"), special=True),))
    expected = spliced_lens(name, stream, sae)

    with steer(shared(name), plan, saes=sae):
        found = shared(name)(IDS).logits.log_softmax(-1)

    plain = shared(name)(IDS).logits.log_softmax(-1)
    assert float((found - expected).abs().max()) <= 1e-4
    assert float((found - plain).abs().max()) > 0.1
    if corrections_matter(name, stream):
        with steer(shared(name), plan, saes=replace(sae, norm="none", manifest={})):
            wrong = shared(name)(IDS).logits.log_softmax(-1)
        assert float((wrong - expected).abs().max()) > 1e-2


def spliced_lens(name: str, stream: str, sae: SAE) -> Tensor:
    """Log-probabilities of TransformerLens's model with the reconstruction in place of a stream; see `steered_lens`."""
    streams = lens_streams(name)

    def put(x: Tensor, hook: Any) -> Tensor:
        read = streams[stream] if stream == "resid_mid" else x.flatten(2)
        x_hat = by_hand(sae, read) @ sae.W_dec.double() + sae.b_dec.double()
        return x + (x_hat - read).to(x.dtype).view(x.shape)

    at = hook_name("attn_out" if stream == "resid_mid" else stream)
    with torch.no_grad():
        return bridge(name).run_with_hooks(IDS, fwd_hooks=[(at, put)]).log_softmax(-1)


def steered_lens(name: str, stream: str, sae: SAE) -> Tensor:
    """Log-probabilities of TransformerLens's model with the edit by hand.

    TransformerBridge's hook at resid_mid moves only what ln2 reads; to move the stream, what attention adds is moved.
    """
    latents = list(EDITED)
    streams = lens_streams(name)  # not inside of the hook, where it would call the model again

    def edit(x: Tensor, hook: Any) -> Tensor:
        read = streams[stream] if stream == "resid_mid" else x.flatten(2)
        df = 3.0 - by_hand(sae, read)[..., latents]
        return x + (df @ sae.W_dec.double()[latents]).to(x.dtype).view(x.shape)

    at = hook_name("attn_out" if stream == "resid_mid" else stream)
    with torch.no_grad():
        return bridge(name).run_with_hooks(IDS, fwd_hooks=[(at, edit)]).log_softmax(-1)


def corrections_matter(name: str, stream: str) -> bool:
    return is_centered(name, stream) or stream == "attn_z" or stream == "mlp_normed" and not name.startswith("llama")


def test_value_biases_that_were_folded_without_the_norm_lack_only_themselves():
    model = shared("gpt2")
    sae = replace(
        lens_sae("gpt2", "attn_z", "relu"), manifest={"processing": {"fold_value_biases": True, "fold_ln": False}}
    )
    bias = model.transformer.h[LAYER].attn.c_attn.bias[-tiny.D :]
    x = plain_streams("gpt2")["attn_z"]

    corrected = on_plain_weights(sae, HuggingFace(model))

    assert laws.distance(corrected.encode(x), by_hand(sae, x - bias)) <= 1e-5


def test_corrections_are_made_where_a_rule_says_that_it_reads():
    """The SAE names no site: what is folded into its bias depends on where the rule puts it."""
    sited = lens_sae("gpt2", "attn_z", "relu")
    sae, rule = replace(sited, site=None), Rule("tiny", EDITED, Clamp(3.0, when="always"), special=True)
    model = shared("gpt2")

    with torch.no_grad(), steer(model, Plan((rule,)), saes=sited):
        expected = model(IDS).logits
    with torch.no_grad(), steer(model, Plan((replace(rule, site=sited.site),)), saes=sae):
        found = model(IDS).logits

    assert torch.equal(found, expected)


def test_one_sae_of_processed_weights_at_two_sites_is_refused():
    sae = lens_sae("gpt2", "attn_z", "relu")
    rules = tuple(Rule("tiny", (1,), Clamp(3.0, when="always"), site=Site("attn_z", layer)) for layer in (0, 1))

    with (
        pytest.raises(AmbiguousSAE, match=r"attn_z\.0 and attn_z\.1.*Give it under two names"),
        steer(shared("gpt2"), Plan(rules), saes=sae),
    ):
        pass
