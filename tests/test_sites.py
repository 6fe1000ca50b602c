"""Streams: each is what the catalogue says in every architecture, and an edit moves the model as one made by hand.

The oracle computes streams and edits with plain torch hooks; where the modules are it knows from `more_models`.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from saeguard import SAE, Add, Clamp, Layout, Plan, Rule, Site, capture, steer
from saeguard.engines.hf import HuggingFace
from saeguard.engines.layouts import LAYOUTS
from saeguard.errors import SiteNotFound, UnsupportedModel
from saeguard.sites import STREAMS
from tests import laws, tiny
from tests.more_models import ALL, HIDDEN, LAYER, block_of, family, first, gain_and_bias, model_of, normalised, shared

IDS = tiny.prompt(2, 8, seed=3)
CHOSEN = slice(3, 6)
"""The columns that edits are about; rows have no padding, so they are positions too."""
DTYPES = (torch.float32, torch.bfloat16)


def offered(name: str) -> list[str]:
    """The streams that the oracle knows in an architecture."""
    its = family(name)
    missing = {"resid_mid": its.parallel, "mlp_normed": its.norm is None, "mlp_post": its.hidden is None}
    return [stream for stream in STREAMS if not missing.get(stream, False)]


class Seen:
    """Inputs and outputs of the modules in block `LAYER` during one pass."""

    def __init__(self, model: nn.Module, ids: Tensor = IDS):
        self.into: dict[str, Tensor] = {}
        self.out: dict[str, Tensor] = {}
        with ExitStack() as stack, torch.no_grad():
            for path, module in block_of(model).named_modules():
                handle = module.register_forward_hook(self._hook(path), with_kwargs=True)
                stack.callback(handle.remove)
            self.logits = model(ids).logits

    def _hook(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            if isinstance(given, Tensor) and isinstance(first(output), Tensor):
                self.into[path], self.out[path] = given.clone(), first(output).clone()

        return hook


def recorded(model: nn.Module, streams: list[str], **options: Any) -> dict[str, Tensor]:
    with capture(model, [Site(stream, LAYER) for stream in streams], **options) as tape, torch.no_grad():
        model(IDS)
    return {stream: tape[Site(stream, LAYER)] for stream in streams}


@pytest.mark.parametrize("name", ALL)
def test_layout_offers_exactly_the_streams_that_the_architecture_has(name):
    engine = HuggingFace(shared(name))
    found = []

    for stream in STREAMS:
        try:
            found.append(engine.resolve(Site(stream, LAYER)).site.stream)
        except SiteNotFound:
            continue

    assert found == offered(name)


def test_oracle_covers_every_row_of_the_table():
    assert {shared(name).config.model_type for name in ALL} == set(LAYOUTS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_streams_are_bit_for_bit_what_the_modules_pass_on(name, dtype):
    model, its = shared(name, dtype), family(name)
    seen = Seen(model)

    x = recorded(model, offered(name))

    expected = {
        "resid_pre": seen.into[""],
        "resid_post": seen.out[""],
        "attn_out": seen.out[its.post_attn or its.attn],
        "mlp_out": seen.out[its.post_mlp or "mlp"],
        "mlp_in": seen.into["mlp"],
        "attn_z": seen.into[its.z],
    }
    if its.hidden:
        expected["mlp_post"] = seen.into[its.hidden]
    if not its.parallel:  # the only module that reads it is the norm in front of the MLP, or the MLP itself
        expected["resid_mid"] = seen.into[its.norm or "mlp"]
    assert {stream for stream in expected if not laws.same_bits(x[stream], expected[stream])} == set()
    assert set(expected) | {"mlp_normed"} >= set(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_streams_add_up_to_what_leaves_the_block(name, dtype):
    model, its = shared(name, dtype), family(name)

    x = recorded(model, offered(name))

    if its.parallel:
        total = x["mlp_out"] + x["attn_out"] + x["resid_pre"]
        assert laws.distance(x["resid_post"], total) <= (1e-6 if dtype == torch.float32 else 1e-2)
    else:
        assert laws.same_bits(x["resid_mid"], x["resid_pre"] + x["attn_out"])
        assert laws.same_bits(x["resid_post"], x["resid_mid"] + x["mlp_out"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_projections_of_hidden_streams_give_the_raw_outputs(name, dtype):
    model, its = shared(name, dtype), family(name)
    seen, block = Seen(model), block_of(model)

    x = recorded(model, offered(name))

    assert laws.same_bits(block.get_submodule(its.z)(x["attn_z"]), seen.out[its.attn])
    if its.hidden:
        assert laws.same_bits(block.get_submodule(its.hidden)(x["mlp_post"]), seen.out["mlp"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in ALL if family(name).norm])
def test_mlp_normed_has_unit_power_and_becomes_mlp_in_with_gain_and_bias(name, dtype):
    model, its = shared(name, dtype), family(name)
    norm = block_of(model).get_submodule(its.norm)
    gain, bias = gain_and_bias(norm, name)
    expected, power = normalised(Seen(model).into[its.norm], norm)
    near = 1e-5 if dtype == torch.float32 else 2e-2

    x = recorded(model, ["mlp_normed", "mlp_in"])

    assert laws.distance(x["mlp_normed"], expected) <= near
    assert laws.distance(x["mlp_normed"].square().mean(-1), power) <= near
    assert laws.distance((x["mlp_normed"] * gain + bias), x["mlp_in"]) <= 1e-6


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_post_norm_families_add_what_the_post_norm_returns(name):
    """The output of the attention module is not what attention adds there; SAEs named attn_out read the latter."""
    model, its = shared(name), family(name)
    seen = Seen(model)

    x = recorded(model, ["attn_out", "mlp_out"])

    assert laws.distance(x["attn_out"], seen.out[its.attn]) > 0.1
    assert laws.distance(x["mlp_out"], seen.out["mlp"]) > 0.1


def small_sae(name: str, stream: str) -> SAE:
    hidden = 4 * tiny.D if name == "gpt2" else HIDDEN
    return tiny.tiny_sae(d_in=hidden if stream == "mlp_post" else tiny.D, site=Site(stream, LAYER), seed=11)


def edit_rules() -> Plan:
    columns = {"start": CHOSEN.start, "stop": CHOSEN.stop}
    clamp = Rule("tiny", (1, 7, 20), Clamp(3.0, when="always"), **columns)
    return Plan((clamp, Rule("tiny", (4,), Add(1.5), **columns)))


def change_by_hand(x: Tensor, sae: SAE) -> Tensor:
    """``x`` after the rules of `edit_rules`, in float32, token by token."""
    found = x.float().clone()
    pre = x.float() @ sae.W_enc + sae.b_enc
    f = torch.where(pre > sae.threshold, pre, 0.0)
    moved = (3.0 - f[..., [1, 7, 20]]) @ sae.W_dec[[1, 7, 20]] + 1.5 * sae.W_dec[4]
    found[:, CHOSEN] += moved[:, CHOSEN]
    return found


@contextmanager
def edited_by_hand(model: nn.Module, name: str, stream: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace a stream of block `LAYER` by ``change`` of it at the chosen columns, with nothing but torch hooks."""
    its, block, seen = family(name), block_of(model), {}
    sides = {"resid_pre": ("", "in"), "resid_post": ("", "out"), "attn_out": (its.post_attn or its.attn, "out"),
             "mlp_out": (its.post_mlp or "mlp", "out"), "mlp_in": ("mlp", "in"), "attn_z": (its.z, "in"),
             "mlp_post": (its.hidden, "in")}  # fmt: skip

    def pre_hook(module: nn.Module, args: Any) -> Any:
        return (change(args[0]).to(args[0].dtype), *args[1:])

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        found = change(first(output)).to(first(output).dtype)
        return (found, *output[1:]) if isinstance(output, tuple) else found

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen[module] = (args[0] if args else None, first(output))

    def normed_hook(module: nn.Module, args: Any) -> Any:
        norm = block.get_submodule(its.norm)
        gain, bias = gain_and_bias(norm, name)
        found = change(normalised(seen[norm][0], norm)[0]) * gain + bias
        x = args[0].clone()
        x[:, CHOSEN] = found.to(x.dtype)[:, CHOSEN]
        return (x, *args[1:])

    def mid_hook(module: nn.Module, args: Any, output: Any) -> Tensor:
        mid = change(args[0] + seen[block.get_submodule(its.post_attn or its.attn)][1]).to(args[0].dtype)
        added = mid
        for path in (its.norm, "mlp", its.post_mlp):
            added = block.get_submodule(path)(added) if path else added
        return mid + added

    with ExitStack() as stack:
        if stream in ("resid_mid", "mlp_normed"):
            for path in (its.norm, its.post_attn or its.attn):
                if path:
                    stack.callback(block.get_submodule(path).register_forward_hook(keep).remove)
            handle = (
                block.register_forward_hook(mid_hook)
                if stream == "resid_mid"
                else block.mlp.register_forward_pre_hook(normed_hook)
            )
        else:
            path, side = sides[stream]
            module = block.get_submodule(path)
            handle = module.register_forward_pre_hook(pre_hook) if side == "in" else module.register_forward_hook(hook)
        stack.callback(handle.remove)
        yield


EDITS = [(name, stream) for name in ALL for stream in offered(name)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "stream"), EDITS)
def test_edit_equals_the_same_edit_by_hand_and_other_tokens_keep_their_bits(name, stream, dtype):
    model, sae, site = shared(name, dtype), small_sae(name, stream), Site(stream, LAYER)
    exact = dtype == torch.float32
    with capture(model, site) as plain:
        logits = model(IDS).logits
    with edited_by_hand(model, name, stream, lambda x: change_by_hand(x, sae)):
        expected = model(IDS).logits

    with steer(model, edit_rules(), saes=sae) as run, capture(model, site) as tape:
        found = model(IDS).logits

    others = [column for column in range(IDS.shape[1]) if not CHOSEN.start <= column < CHOSEN.stop]
    assert laws.same_bits(tape[site][:, others], plain[site][:, others])
    assert laws.same_bits(found[:, : CHOSEN.start], logits[:, : CHOSEN.start])
    assert laws.distance(tape[site], change_by_hand(plain[site], sae)) <= (1e-5 if exact else 1e-2)
    assert laws.distance(found, expected) <= (1e-5 if exact else 5e-2)
    assert laws.distance(expected, logits) > 0.05
    assert [entry.edited_positions for entry in run.report.rules] == [((tuple(range(3, 6)),) * 2,)] * 2


@pytest.mark.parametrize(("name", "early", "late"), [
    ("llama", "attn_out", "resid_mid"), ("gemma2", "attn_out", "resid_mid"), ("gpt2", "attn_out", "resid_mid"),
    ("llama", "mlp_normed", "mlp_in"), ("gemma2", "mlp_normed", "mlp_in"), ("gpt2", "mlp_normed", "mlp_in"),
])  # fmt: skip
@pytest.mark.parametrize("how", ["early first", "late first", "early outside", "late outside"])
def test_two_streams_of_one_module_are_edited_in_the_order_in_which_they_come_about(name, early, late, how):
    """Hooks of one module ran in the order of the rules: then attn_out was read after the edit of resid_mid."""
    model, a, b = shared(name), small_sae(name, early), small_sae(name, late)
    with ExitStack() as stack:
        stack.enter_context(edited_by_hand(model, name, early, lambda x: change_by_hand(x, a)))
        stack.enter_context(edited_by_hand(model, name, late, lambda x: change_by_hand(x, b)))
        expected = model(IDS).logits
    plans = [Plan(tuple(replace(rule, sae=sae) for rule in edit_rules().rules)) for sae in "ab"]
    plans = plans if how in ("early first", "early outside") else plans[::-1]
    if how in ("early first", "late first"):
        plans = [Plan(plans[0].rules + plans[1].rules)]

    with ExitStack() as stack:
        for plan in plans:
            stack.enter_context(steer(model, plan, saes={"a": a, "b": b}))
        found = model(IDS).logits

    assert laws.distance(found, expected) <= 1e-5


@pytest.mark.parametrize("name", ["neox", "phi"])
def test_parallel_blocks_have_nothing_between_attention_and_mlp(name):
    refused = pytest.raises(SiteNotFound, match=r"resid_mid\.1 in .*read the same stream.*Use resid_pre\.1")

    with refused, capture(shared(name), "resid_mid.1"):
        pass


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts_have_no_single_hidden_layer(name):
    refused = pytest.raises(SiteNotFound, match=r"mlp_post\.1 in .*no such stream.*It has resid_pre, .*mlp_normed")

    with refused, capture(shared(name), "mlp_post.1"):
        pass


def test_mlp_without_a_norm_in_front_of_it_has_no_stream_before_the_gain():
    refused = pytest.raises(SiteNotFound, match=r"mlp_normed\.1 in Olmo2.*no norm with a gain.*Use mlp_in\.1")

    with refused, capture(shared("olmo2"), "mlp_normed.1"):
        pass


@pytest.mark.parametrize(("name", "weight"), [("llama", 0.0), ("gpt2", 0.0), ("gemma2", -1.0)])
def test_gain_of_zero_refuses_the_stream_before_it(name, weight):
    model = model_of(name)
    block_of(model).get_submodule(family(name).norm).weight[:2] = weight

    with pytest.raises(SiteNotFound, match="2 gains of its norm are 0"), capture(model, "mlp_normed.1"):
        pass
    with capture(model, ["mlp_in.1", "mlp_normed.0"]):  # the other block's norm is sound
        model(IDS)


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "neox", "phi", "qwen2", "llama_with_biases"])
def test_value_bias_is_what_attn_z_holds_whatever_the_tokens_are(name, with_norm):
    """Attention weights sum to 1, so without the biases attn_z lacks exactly that vector.

    The bias of the norm in front of attention reaches the values too. It was forgotten, while TransformerLens folds
    it into the values' bias before it folds that away.
    """
    model, plain = model_of(name), shared(name)
    bias = HuggingFace(plain).value_bias(LAYER, with_norm=with_norm)
    block, fused = block_of(model), {"gpt2": "attn.c_attn", "neox": "attention.query_key_value"}
    values = block.get_submodule(fused.get(name, "self_attn.v_proj"))
    norm = block.get_submodule("ln_1" if name == "gpt2" else "input_layernorm")
    shift = getattr(norm, "bias", None) if with_norm else None
    constant = copy.deepcopy(values)(torch.zeros(tiny.D) if shift is None else shift)

    def without(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Queries and keys keep theirs."""
        lacking = output.clone()
        if name == "neox":
            lacking.view(*output.shape[:2], 4, 3, -1)[..., 2, :] -= constant.view(4, 3, -1)[:, 2]
        else:
            lacking[..., -tiny.D :] -= constant[-tiny.D :]
        return lacking

    values.register_forward_hook(without)

    found = recorded(plain, ["attn_z"])["attn_z"] - recorded(model, ["attn_z"])["attn_z"]

    assert float(bias.abs().max()) > 0.1
    assert laws.distance(found, bias.expand_as(found)) <= 1e-5


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("gpt2", "neox", "neox_sequential", "phi")])
def test_models_without_layer_norm_are_not_centered(name):
    assert not HuggingFace(shared(name)).centers()


@pytest.mark.parametrize("name", ["gpt2", "neox", "neox_sequential", "phi"])
def test_models_with_layer_norm_are_centered(name):
    assert HuggingFace(shared(name)).centers()


class Mix(nn.Module):
    """Attention of a kind: the mean of the values so far."""

    def __init__(self, width: int):
        super().__init__()
        self.value, self.back = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the stream."""
        return self.back(self.value(x).cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


class Stage(nn.Module):
    """A block of names that no table has; its first parameters are those of the MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(width, 20), nn.ReLU(), nn.Linear(20, width))
        self.second, self.mix = nn.LayerNorm(width), Mix(width)

    def forward(self, x: Tensor) -> Tensor:
        """The stream after the block."""
        x = x + self.mix(x)
        return x + self.ff(self.second(x))


class Odd(nn.Module):
    """A model of nobody's, without a config."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.look_up, self.stages = nn.Embedding(tiny.VOCAB, 12), nn.ModuleList([Stage(12), Stage(12)])
        for parameter in self.parameters():
            parameter.data.normal_(0.0, 0.4)
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """The stream after the last stage."""
        x = self.look_up(input_ids)
        for stage in self.stages:
            x = stage(x)
        return x


ODD = Layout(
    "stages",
    {
        "attn_out": ("mix", "output"), "mlp_out": ("ff.2", "output"), "mlp_in": ("ff", "input"),
        "attn_z": ("mix.value", "output"), "mlp_post": ("ff.2", "input"),
    },
    mlp_norm="second", value_bias="mix.value",
)  # fmt: skip


def test_layout_of_the_user_gives_every_stream_of_an_unknown_model():
    model, sites = Odd(), [Site(stream, 1) for stream in STREAMS]
    stage = model.stages[1]

    with capture(model, sites, layout=ODD) as tape:
        out = model(IDS)

    x = {site.stream: tape[site] for site in sites}
    assert laws.same_bits(x["resid_pre"], model.stages[0](model.look_up(IDS)))
    assert laws.same_bits(x["attn_out"], stage.mix(x["resid_pre"]))
    assert laws.distance(stage.mix.back(running_mean(x["attn_z"])), x["attn_out"]) <= 1e-6
    assert laws.same_bits(x["resid_mid"], x["resid_pre"] + x["attn_out"])
    assert laws.same_bits(x["mlp_in"], stage.second(x["resid_mid"]))
    assert laws.distance(x["mlp_normed"] * stage.second.weight + stage.second.bias, x["mlp_in"]) <= 1e-6
    assert laws.distance(x["mlp_normed"].square().mean(-1), torch.ones(IDS.shape)) <= 1e-3
    assert laws.same_bits(x["mlp_post"], stage.ff[1](stage.ff[0](x["mlp_in"])))
    assert laws.same_bits(x["mlp_out"], stage.ff[2](x["mlp_post"]))
    assert laws.same_bits(x["resid_post"], x["resid_mid"] + x["mlp_out"])
    assert laws.same_bits(x["resid_post"], out)


@pytest.mark.parametrize("stream", STREAMS)
def test_layout_of_the_user_knows_the_width_of_every_stream(stream):
    """A model without a config: the width of ff.2's output was read off what ff.2 reads."""
    width = {"attn_z": 16, "mlp_post": 20}.get(stream, 12)
    sae, model = tiny.tiny_sae(d_in=width, site=Site(stream, 1)), Odd()
    plain = model(IDS)

    with steer(model, Plan((Rule("tiny", (1, 2), Add(3.0)),)), saes=sae, layout=ODD, special_ids=[tiny.BOS]):
        found = model(IDS)

    assert laws.distance(found, plain) > 0.01
    assert laws.same_bits(found[:, 0], plain[:, 0])


def test_module_that_does_not_say_its_width_is_refused():
    layout = Layout("stages", {"mlp_post": ("ff.1", "output")})
    refused = pytest.raises(SiteNotFound, match=r"mlp_post\.0 in Odd.*output of a ReLU, which does not say how wide")

    with refused, capture(Odd(), "mlp_post.0", layout=layout):
        pass


def test_layout_that_names_no_norm_or_says_parallel_refuses_what_follows_from_them():
    for layout, stream in ((Layout("stages", ODD.streams), "mlp_normed"), (replace(ODD, parallel=True), "resid_mid")):
        with pytest.raises(SiteNotFound, match=f"{stream}.0 in Odd"), capture(Odd(), f"{stream}.0", layout=layout):
            pass


def test_value_bias_of_a_model_without_a_config_needs_no_heads_unless_they_share_it():
    model = Odd()

    found = HuggingFace(model, ODD).value_bias(1, with_norm=False)

    assert laws.same_bits(found, model.stages[1].mix.value.bias)
    with pytest.raises(UnsupportedModel, match="no config that says how many heads"):
        HuggingFace(model, replace(ODD, value_bias="ff.0")).value_bias(1, with_norm=False)
    with pytest.raises(SiteNotFound, match="its layout does not name that norm"):
        HuggingFace(model, ODD).value_bias(1, with_norm=True)


def running_mean(x: Tensor) -> Tensor:
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


layers = st.integers(0, 10**9 - 1)


@given(st.sampled_from(tuple(STREAMS)), layers)
def test_site_reads_back_what_it_prints(stream, layer):
    site = Site(stream, layer)

    assert Site.parse(str(site)) == Site.parse(site) == site


LENS = {
    "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out", "attn.hook_z": "attn_z", "mlp.hook_in": "mlp_in",
    "mlp.hook_post": "mlp_post", "ln2.hook_normalized": "mlp_normed",
}  # fmt: skip


@given(st.sampled_from(tuple(LENS)), layers)
def test_site_reads_transformer_lens_names(hook, layer):
    assert Site.parse(f"blocks.{layer}.{hook}") == Site(LENS[hook], layer)


def test_transformer_lens_names_cover_every_stream():
    assert set(LENS.values()) == set(STREAMS)


@given(
    st.sampled_from(("model.layers", "transformer.h", "gpt_neox.layers")),
    layers,
    st.sampled_from(("input", "output", "")),
)
def test_site_reads_hugging_face_names(blocks, layer, side):
    found = Site.parse(f"{blocks}.{layer}" + (f".{side}" if side else ""))

    assert found == Site("resid_pre" if side == "input" else "resid_post", layer)


@pytest.mark.parametrize("text", [
    "blocks.1.hook_mlp_in", "blocks.1.attn.hook_q", "blocks.1.ln1.hook_normalized", "blocks.1.hook_resid_post ",
    "blocks.-1.hook_resid_post", "model.layers.1.mlp", "resid_post", "resid_post.", "resid_post.x", "resid_post.1.0",
    "resid_post.-1", ".1", "", "mlp_gain.3", "resid_post.1\n", "resid_post.٣", "resid_post." + "9" * 10,
])  # fmt: skip
def test_text_that_names_no_stream_is_refused(text):
    with pytest.raises(SiteNotFound, match="site"):
        Site.parse(text)
