"""Live SAEs of sae_lens steer as they are, and a clamp does what SAELens's own way of setting a latent does.

That way is to attach the SAE with its error term, and to write the value at its ``hook_sae_acts_post`` in all tokens:
the rule is a `Clamp` to the value, always, special tokens included.
"""

from functools import partial
from typing import Any

import pytest
import sae_lens
import torch
from torch import Tensor

from saeguard import Clamp, Plan, Rule, Scale, steer
from saeguard.errors import GuardNotApplied, SiteNotFound, UnsupportedFormat
from saeguard.loaders.live import load_saelens
from tests import laws, tiny
from tests.saelens.hooked_models import NAMES, hooked, make

pytestmark = pytest.mark.filterwarnings("ignore")

D_SAE, LATENTS, VALUE = 48, (1, 7, 20, 31), 3.0
KINDS: dict[str, dict[str, Any]] = {
    "standard": {}, "jumprelu": {}, "gated": {}, "topk": {"k": 6},
    "standard layer norm": {"normalize_activations": "layer_norm"},
    "jumprelu constant norm": {"normalize_activations": "constant_norm_rescale"},
    "topk rescaled": {"k": 6, "rescale_acts_by_decoder_norm": True},
}  # fmt: skip
HOOKS = {
    "resid_pre": "blocks.1.hook_resid_pre", "resid_post": "blocks.1.hook_resid_post",
    "attn_out": "blocks.1.hook_attn_out", "mlp_out": "blocks.1.hook_mlp_out", "attn_z": "blocks.1.attn.hook_z",
}  # fmt: skip
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder")


def live(kind: str = "jumprelu", hook: str = HOOKS["resid_post"], hook_out: str | None = None) -> Any:
    """A random SAE of sae_lens whose latents fire on a part of the tokens."""
    torch.manual_seed(0)
    metadata = {"hook_name": hook, "model_name": "tiny", "prepend_bos": True}
    config = {"architecture": kind.split()[0], "d_in": tiny.D, "d_sae": D_SAE} | KINDS.get(kind, {})
    if hook_out is not None:
        metadata["hook_name_out"], config["d_out"] = hook_out, tiny.D
        config["apply_b_dec_to_input"] = False
    elif hook.endswith("hook_z"):
        config["reshape_activations"] = "hook_z"
    sae = sae_lens.SAE.from_dict(config | {"metadata": metadata})
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.rand_like(parameter) if name == "threshold" else torch.randn_like(parameter) / 4)
    return sae.eval().requires_grad_(False)


def plan_for(name: str, op: Any = None) -> Plan:
    return Plan((Rule(name, LATENTS, op or Clamp(VALUE, when="always"), special=True),))


def set_latents(acts: Tensor, hook: Any) -> Tensor:
    acts[..., list(LATENTS)] = VALUE
    return acts


def sae_lens_way(model: Any, sae: Any, call: Any) -> Tensor:
    """``call`` with the latents set as SAELens's tutorials do."""
    meta = sae.cfg.metadata
    point = f"{meta.hook_name_out or meta.hook_name}.hook_sae_acts_post"
    with model.saes(saes=[sae], use_error_term=True), model.hooks(fwd_hooks=[(point, set_latents)]), torch.no_grad():
        return call()


def agree(model: Any, sae: Any, name: str) -> None:
    ids = tiny.prompt(2, 7, seed=5)

    expected = sae_lens_way(model, sae, partial(model, ids))
    with steer(model, plan_for(name), saes=sae), torch.no_grad():
        found = model(ids)

    assert laws.distance(found, expected) <= laws.TOLERANCE
    assert laws.distance(found, model(ids)) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_clamp_is_what_sae_lens_does_with_the_error_term(name, kind):
    sae = live(kind)

    agree(hooked(name), sae, sae.get_name())


@pytest.mark.parametrize("stream", HOOKS)
@pytest.mark.parametrize("name", NAMES)
def test_clamp_is_what_sae_lens_does_at_every_stream(name, stream):
    sae = live("standard", HOOKS[stream])

    agree(hooked(name), sae, sae.get_name())


@pytest.mark.parametrize("kind", TRANSCODERS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_clamp_of_a_transcoder_is_what_sae_lens_does(name, kind):
    sae = live(kind, "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")

    agree(hooked(name), sae, sae.get_name())


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk"])
def test_generated_text_is_that_of_sae_lens(kind, use_past_kv_cache):
    model, sae = hooked("gpt2"), live(kind)

    def write() -> Tensor:
        return model.generate(
            tiny.prompt(2, 5), max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False,
            use_past_kv_cache=use_past_kv_cache,
        )  # fmt: skip

    expected = sae_lens_way(model, sae, write)
    with steer(model, plan_for(sae.get_name()), saes=sae):
        found = write()

    assert torch.equal(found, expected)
    assert not torch.equal(found, write())


def test_live_saes_may_be_one_several_or_named_and_are_what_load_saelens_makes_of_them():
    model, ids, first, second = hooked("llama"), tiny.prompt(2, 6), live("standard"), live("topk", HOOKS["attn_out"])
    one, two = load_saelens(first, name="a"), load_saelens(second, name="b")
    plan = Plan((*plan_for("a").rules, *plan_for("b", Scale(-2.0)).rules))
    with steer(model, plan, saes=[one, two]) as expected:
        right = model(ids)

    with steer(model, plan, saes={"a": first, "b": second}) as run:
        assert torch.equal(model(ids), right)
    assert list(laws.edited(run).values()) == list(laws.edited(expected).values())
    with steer(model, plan, saes={"a": first, "b": two}):
        assert torch.equal(model(ids), right)
    named = Plan((*plan_for(first.get_name()).rules, *plan_for(second.get_name(), Scale(-2.0)).rules))
    if first.get_name() != second.get_name():
        with steer(model, named, saes=[first, second]):
            assert torch.equal(model(ids), right)


def test_other_objects_are_refused_by_name():
    with (
        pytest.raises(UnsupportedFormat, match="an object Linear: it is not one of sae_lens"),
        steer(hooked("llama"), plan_for("a"), saes={"a": torch.nn.Linear(3, 3)}),
    ):
        pass


def test_site_at_which_sae_lens_has_attached_an_sae_is_refused_and_another_is_not():
    model, sae = make("gpt2"), live("standard")
    model.add_sae(sae, use_error_term=True)

    with (
        pytest.raises(SiteNotFound, match=r"_SAEWrapper stands there.*reset_saes"),
        steer(model, plan_for(sae.get_name()), saes=sae),
    ):
        pass
    with steer(model, plan_for("a"), saes={"a": live("standard", HOOKS["attn_out"])}) as run:
        model(tiny.prompt(1, 5))
    assert laws.edited(run)


def test_sae_that_is_attached_over_an_edit_inside_the_block_is_noticed():
    model, sae = make("gpt2"), live("standard")

    with steer(model, plan_for(sae.get_name()), saes=sae), pytest.raises(GuardNotApplied, match=r"resid_post\.1"):
        model.run_with_saes(tiny.prompt(1, 5), saes=[sae])
