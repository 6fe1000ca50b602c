# ruff: noqa: E501  one case of the table is one line
"""OpenMOSS's formats: what is refused by name, whose units activations are in, and readings that would be wrong."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saeguard import SAE, load_sae
from saeguard.errors import BrokenFile, LoadError, MissingScale, MissingSite, UnsupportedFormat
from saeguard.loaders import open_sae
from tests.damage import refused
from tests.lookalikes import LOOKALIKES
from tests.lookalikes.base import D_IN, D_SAE, LookAlike, Tensors, inputs
from tests.lookalikes.llama_scope import (
    LINEAR,
    R1_FOLDER,
    SAME,
    TC,
    TC2,
    V1,
    V2,
    linear,
    save,
    tensors,
    write_v1,
    write_v2,
)

T = tensors(95)
SCALED = {"blocks.7.hook_resid_post": 9.0}
FOLDER = "Llama3_1-8B-Base-L15R-8x"


def first(root: Path, folder: str = FOLDER, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    """Llama Scope's folder with another config."""
    return write_v1(T, {key: value for key, value in (V1 | changes).items() if key not in drop}, folder)(root)


def second(root: Path, t: Tensors = T, norms: dict[str, float] = SCALED, **changes: Any) -> Path:
    """lm-saes 2's folder with another config."""
    return write_v2(t, V2 | changes, norms)(root)


Case = tuple[type[LoadError], str, Callable[[Path], Path]]
BARE = ("hook_point_in", "hook_point_out")
AVERAGE = "dataset_average_activation_norm"
REFUSED: dict[str, Case] = {
    "glu": (UnsupportedFormat, "gated by a second one (use_glu_encoder)", lambda r: first(r, use_glu_encoder=True)),
    "other gate": (UnsupportedFormat, "its act_fn is 'gelu'. Known are relu", lambda r: first(r, act_fn="gelu")),
    "batch-wise": (
        UnsupportedFormat, "'batch-wise', which depends on the other tokens", lambda r: first(r, norm_activation="batch-wise")
    ),
    "other norm": (UnsupportedFormat, "'whitened', which is not known", lambda r: first(r, norm_activation="whitened")),
    "token-wise transcoder": (
        UnsupportedFormat, "scaled by the norm of each token's true output",
        lambda r: first(r, norm_activation="token-wise", **TC),
    ),
    "pre-encoder transcoder": (
        UnsupportedFormat, "takes its output's bias off its input", lambda r: first(r, apply_decoder_bias_to_pre_encoder=True, **TC)
    ),
    "no norm": (MissingScale, f"it has no {AVERAGE}. Give input_scale=...", lambda r: first(r, drop=(AVERAGE,))),
    "two streams, one site": (MissingSite, "are those of two streams", lambda r: first(r, **{AVERAGE: {"in": 9.0, "out": 2.0}})),
    "unknown stream": (
        MissingSite, "is not a stream and a layer. Give site=... and site_out=....",
        lambda r: first(r, **TC | {"hook_point_in": "blocks.0.hook_mlp_in"}),
    ),
    "one hook point": (
        MissingSite, "its config names only one hook point", lambda r: first(r, drop=("hook_point_in",))
    ),
    "norm zero": (BrokenFile, "{'in': 0, 'out': 9.0}", lambda r: first(r, **{AVERAGE: {"in": 0, "out": 9.0}})),
    "norm text": (BrokenFile, "{'in': '9', 'out': 9.0}", lambda r: first(r, **{AVERAGE: {"in": "9", "out": 9.0}})),
    "norm absent": (BrokenFile, "{'in': None, 'out': 9.0}", lambda r: first(r, **{AVERAGE: {"out": 9.0}})),
    "norm endless": (BrokenFile, "'in': 1", lambda r: first(r, **{AVERAGE: {"in": 10**400, "out": 9.0}})),
    "norms a list": (BrokenFile, f"{AVERAGE} is [9.0, 9.0], not a mapping", lambda r: first(r, **{AVERAGE: [9.0, 9.0]})),
    "threshold text": (BrokenFile, "jump_relu_threshold is '0.3', not a number", lambda r: first(r, jump_relu_threshold="0.3")),
    "threshold true": (BrokenFile, "jump_relu_threshold is True, not a number", lambda r: first(r, jump_relu_threshold=True)),
    "flag a number": (BrokenFile, "use_decoder_bias is 1, not true or false", lambda r: first(r, use_decoder_bias=1)),
    "gate a number": (BrokenFile, "act_fn is 3, not text", lambda r: first(r, act_fn=3)),
    "hook a number": (BrokenFile, "hook_point_in is 3, not text", lambda r: first(r, hook_point_in=3)),
    "k true": (BrokenFile, "top_k is True, not a whole number", lambda r: first(r, act_fn="topk", top_k=True)),
    "k too large": (BrokenFile, "top_k is 49", lambda r: first(r, act_fn="topk", jump_relu_threshold=0, top_k=D_SAE + 1)),
    "other width": (BrokenFile, "d_model is 17, and the weights have 16", lambda r: first(r, d_model=D_IN + 1)),
    "other d_sae": (BrokenFile, "d_sae is 16, and the weights have 48", lambda r: first(r, d_sae=D_IN)),
    "bias not there": (BrokenFile, "decoder.bias is not there", lambda r: write_v1({k: v for k, v in T.items() if k != "b_dec"}, V1, FOLDER)(r)),
    "bias too many": (UnsupportedFormat, "it holds decoder.bias", lambda r: first(r, use_decoder_bias=False)),
    "row of zeros": (BrokenFile, "W_dec is not finite once folded", lambda r: write_v1(T | {"W_dec": T["W_dec"] * 0}, V1, FOLDER)(r)),
    "integers": (BrokenFile, "encoder.bias is (48,) torch.int8, not floating point", lambda r: spoiled(first(r), {"encoder.bias": torch.ones(D_SAE, dtype=torch.int8)})),
    "transposed": (
        BrokenFile, "encoder.bias is (48,) torch.float32, not floating point (16,)",
        lambda r: spoiled(first(r, drop=("d_model", "d_sae")), {"encoder.weight": T["W_enc"], "encoder.bias": T["b_enc"]}),
    ),
    **{
        f"2 {kind}": (UnsupportedFormat, f"its sae_type is {kind!r}: {why}", lambda r, kind=kind: second(r, sae_type=kind))
        for kind, why in {"crosscoder": "it reads and writes several streams", "clt": "a latent of it writes to all later",
                          "molt": "what a latent of it writes depends on x", "mixcoder": "its latents belong to several",
                          "lorsa": "it stands for attention", "vae": "which this version does not know"}.items()
    },
    **{
        f"2 {kind}": (UnsupportedFormat, f"its act_fn is {kind!r}, which latents are active depends on {why}",
                      lambda r, kind=kind: second(r, {k: v for k, v in T.items() if k != "threshold"}, act_fn=kind))
        for kind, why in {"batchtopk": "the other tokens", "batchlayertopk": "the other tokens", "layertopk": "other layers"}.items()
    },
    "2 other gate": (UnsupportedFormat, "its act_fn is 'gelu'", lambda r: second(r, act_fn="gelu")),
    "2 glu": (UnsupportedFormat, "(use_glu_encoder)", lambda r: second(r, use_glu_encoder=True)),
    "2 glu unsaid": (UnsupportedFormat, "it holds W_E_glu", lambda r: spoiled(second(r), {"W_E_glu": T["W_enc"] + 1})),
    "2 batch-wise": (UnsupportedFormat, "which depends on the other tokens", lambda r: second(r, norm_activation="batch-wise")),
    "2 token-wise transcoder": (
        UnsupportedFormat, "the norm of a token's true output is not known", lambda r: second(r, norm_activation="token-wise", **TC2)
    ),
    "2 no norm": (MissingScale, f"it has no {AVERAGE}.blocks.7.hook_resid_post. Give input_scale", lambda r: second(r, norms={})),
    "2 no norm of the output": (
        MissingScale, f"it has no {AVERAGE}.blocks.3.hook_mlp_out. Give input_scale=", lambda r: second(r, norms={TC2["hook_point_in"]: 9.0}, **TC2)
    ),
    "2 norm never set": (
        BrokenFile, "is 1e-30, which is no stream's norm: it was saved without being set", lambda r: second(r, norms=dict.fromkeys(SCALED, 1e-30))
    ),
    "2 norm not a number": (BrokenFile, "is nan, which is no stream's", lambda r: second(r, norms=dict.fromkeys(SCALED, float("nan")))),
    "2 two norms": (
        BrokenFile, "not one number", lambda r: spoiled(second(r), {f"{AVERAGE}.blocks.7.hook_resid_post": torch.ones(2)})
    ),
    "2 no threshold": (BrokenFile, "act_fn is 'jumprelu' and the weights hold no threshold", lambda r: second(r, {k: v for k, v in T.items() if k != "threshold"})),
    "2 threshold and topk": (BrokenFile, "act_fn is 'topk' and the weights hold a threshold", lambda r: second(r, act_fn="topk")),
    "2 two thresholds": (BrokenFile, "two thresholds", lambda r: spoiled(second(r), {"log_jumprelu_threshold": T["threshold"]})),
    "2 threshold endless": (BrokenFile, "threshold is not finite", lambda r: spoiled(second(r), {"activation_function.log_jumprelu_threshold": torch.full((D_SAE,), 99.0)})),
    "2 unknown streams": (MissingSite, "Give site=... and site_out=....", lambda r: second(r, **TC2 | {"hook_point_in": "blocks.3.resid_mid_after_ln"})),
    "2 attention's input": (MissingSite, "blocks.3.ln1.hook_normalized", lambda r: second(r, **TC2 | {"hook_point_in": "blocks.3.ln1.hook_normalized"})),
    "2 other width": (BrokenFile, "d_model is 9, and the weights have 16", lambda r: second(r, d_model=9)),
    "2 decoder transposed": (BrokenFile, "W_D is (16, 48)", lambda r: spoiled(second(r), {"W_D": T["W_dec"].T})),
    "2 type a number": (BrokenFile, "sae_type is 1, not text", lambda r: second(r, sae_type=1)),
    "2 distributed": (UnsupportedFormat, "its weights are sae_weights.dcp/, a distributed checkpoint", lambda r: distributed(second(r))),
}  # fmt: skip


def spoiled(folder: Path, changes: Tensors) -> Path:
    """With some tensors instead of, or besides, the ones that are there."""
    first_version = (folder / "hyperparams.json").exists()
    stored = (
        linear(T) if first_version else {"W_E": T["W_enc"], "b_E": T["b_enc"], "W_D": T["W_dec"], "b_D": T["b_dec"]}
    )
    if not first_version:
        stored["activation_function.log_jumprelu_threshold"] = T["threshold"].log()
        stored |= {f"{AVERAGE}.{hook}": torch.tensor(norm) for hook, norm in SCALED.items()}
    save(folder / ("checkpoints/final.safetensors" if first_version else "sae_weights.safetensors"), stored | changes)
    return folder


def distributed(folder: Path) -> Path:
    (folder / "sae_weights.safetensors").unlink()
    (folder / "sae_weights.dcp").mkdir()
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name, tmp_path):
    error, text, write = REFUSED[name]

    with pytest.raises(error) as caught:
        load_sae(write(tmp_path))
    assert text in str(caught.value)


def test_both_sites_can_be_given_for_a_transcoder(tmp_path):
    folder = second(tmp_path, norms={"blocks.3.resid_mid_after_ln": 9.0, "blocks.3.hook_mlp_out": 2.0},
                    **TC2 | {"hook_point_in": "blocks.3.resid_mid_after_ln"})  # fmt: skip

    stored = open_sae(folder, "mlp_in.3", site_out="mlp_out.3")

    assert (str(stored.site), str(stored.site_out)) == ("mlp_in.3", "mlp_out.3")
    assert stored.manifest["hook_point_in"] == "blocks.3.resid_mid_after_ln"


def test_sae_at_an_unknown_hook_point_loads_without_a_site(tmp_path):
    hook = "blocks.7.attn.hook_q"

    sae = load_sae(second(tmp_path, norms={hook: 9.0}, hook_point_in=hook, hook_point_out=hook))

    assert sae.site is None
    assert "blocks.7.attn.hook_q" in sae.manifest["site_unknown"]


def test_folder_that_says_nothing_leaves_the_site_open(tmp_path):
    sae = load_sae(first(tmp_path, "mine", drop=BARE))

    assert (sae.site, sae.model) == (None, None)
    assert sae.manifest["site_unknown"] == "neither its config nor its folder's name says it"


def test_given_scale_stands_in_for_a_norm_that_was_never_set(tmp_path):
    x, folder = inputs(), second(tmp_path, norms=dict.fromkeys(SCALED, 1e-30))

    f = load_sae(folder, input_scale=4 / 9).encode(x)

    assert torch.allclose(f, load_sae(second(tmp_path / "good")).encode(x), atol=1e-4)


def test_another_scale_than_that_of_the_files_is_refused(tmp_path):
    with pytest.raises(UnsupportedFormat, match="input_scale=5.0: its files say input_scale"):
        load_sae(second(tmp_path), input_scale=5.0)


def test_llama_scope_without_norms_takes_the_scale_that_is_given(tmp_path):
    x = inputs()

    f = load_sae(first(tmp_path, drop=(AVERAGE,)), input_scale=4 / 9).encode(x)

    assert torch.allclose(f, load_sae(first(tmp_path / "said")).encode(x), atol=1e-4)


def test_keys_that_a_config_leaves_out_have_the_values_of_its_class(tmp_path):
    left_out = ("norm_activation", "sparsity_include_decoder_norm", "use_decoder_bias", "use_glu_encoder", "sae_type")
    folder = write_v2(T, {key: value for key, value in V2.items() if key not in left_out}, SCALED)(tmp_path)

    assert torch.equal(load_sae(folder).encode(inputs()), load_sae(second(tmp_path / "said")).encode(inputs()))


def test_first_of_the_places_for_weights_is_read(tmp_path):
    folder = second(tmp_path)
    save(folder / "checkpoints/final.safetensors", {"W_E": T["W_enc"]})

    assert [path.name for path in open_sae(folder).files] == ["sae_weights.safetensors"]


def test_file_itself_can_be_named(tmp_path):
    folder = second(tmp_path)

    assert open_sae(folder / "sae_weights.safetensors").name == open_sae(folder).name == "layer7"


def test_saelens_units_can_be_had_from_the_manifest(tmp_path):
    """SAELens has Llama Scope in units of the normed input, and without the norms of the decoder's rows."""
    like, x = LOOKALIKES["llama_scope residual"], inputs()
    sae = load_sae(like.write(tmp_path))
    units = sae.manifest["units"]
    t = {name: tensor.bfloat16().float() for name, tensor in tensors(71).items()}

    f = sae.encode(x)

    normed = (x * 4 / 9) @ t["W_enc"] + t["b_enc"]
    assert units["name"] == "official, raw"
    assert units["saelens_factor"] == pytest.approx(4 / 9)
    assert units["saelens_divides_by_decoder_norm"]
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5)
    theirs = f * units["saelens_factor"] / t["W_dec"].norm(dim=1)
    assert torch.allclose(theirs, normed * (f != 0), atol=1e-4)


def test_raw_factor_brings_lm_saes_to_the_units_of_a_folded_export(tmp_path):
    """fold_activation_scale divides the encoder's bias and leaves the rest of the encoder, so x comes as it is."""
    plain = {key: tensor for key, tensor in T.items() if key != "threshold"}
    sae = load_sae(second(tmp_path, plain, act_fn="relu"))
    folded = plain | {"b_enc": T["b_enc"] * 9 / 4, "b_dec": T["b_dec"] * 9 / 4}

    other = load_sae(second(tmp_path / "folded", folded, act_fn="relu", norm_activation="inference"))

    x = inputs()
    assert torch.allclose(sae.encode(x) * sae.manifest["units"]["raw_factor"], other.encode(x), atol=1e-4)
    assert torch.allclose(sae.decode(sae.encode(x)), other.decode(other.encode(x)), atol=1e-3)
    assert other.manifest["units"] == {"name": "official, raw"}


def test_manifest_says_what_was_folded(tmp_path):
    manifest = open_sae(first(tmp_path)).manifest

    assert manifest["folds"] == [AVERAGE, "sparsity_include_decoder_norm"]
    assert (manifest["format"], manifest["architecture"], manifest["bos"]) == ("llama_scope", "jumprelu", True)
    assert open_sae(second(tmp_path / "2")).manifest["bos"] is None


def differs(like: LookAlike, mutant: SAE) -> bool:
    """Whether a test that compares with the look-alike would fail."""
    x, f = inputs(), like.acts(inputs())
    return not (
        torch.allclose(mutant.encode(x), f, atol=1e-3)
        and torch.allclose(mutant.decode(f, x), like.decode(f, x), atol=1e-3)
    )


def with_threshold_times(sae: SAE, factor: float) -> SAE:
    assert sae.threshold is not None
    return replace(sae, threshold=sae.threshold * factor)


MUTANTS: dict[str, tuple[str, Callable[[SAE], SAE]]] = {
    "threshold in normed units": ("llama_scope residual", lambda sae: with_threshold_times(sae, 4 / 9)),
    "decoder norms not folded": (
        "llama_scope residual",
        lambda sae: replace(sae, W_enc=sae.W_enc / NORMS, b_enc=sae.b_enc / NORMS, W_dec=sae.W_dec * NORMS[:, None]),
    ),
    "transcoder with the scale of an SAE": (
        "llama_scope transcoder", lambda sae: replace(sae, W_dec=sae.W_dec * 2, b_dec=sae.b_dec * 2)
    ),
    "topk as relu": ("llama_scope topk", lambda sae: replace(sae, activation="relu", top_k=None)),
    "threshold not over the norms": ("lm_saes jumprelu", lambda sae: replace(sae, threshold=T84["threshold"])),
    "rank by p alone": ("lm_saes topk", lambda sae: replace(sae, rank_by=None)),
    "threshold scaled with x": ("llama_scope_r1 residual", lambda sae: with_threshold_times(sae, 9 / 4)),
    "input not scaled": ("llama_scope_r1 residual", lambda sae: replace(sae, W_enc=sae.W_enc * 9 / 4)),
    "norm not taken": ("lm_saes token-wise", lambda sae: replace(sae, norm="none")),
}  # fmt: skip
NORMS = tensors(71)["W_dec"].bfloat16().float().norm(dim=1)
T84 = tensors(84)


@pytest.mark.parametrize("name", MUTANTS)
def test_look_alike_tells_a_wrong_reading_from_the_right_one(name, tmp_path):
    like, change = LOOKALIKES[MUTANTS[name][0]], MUTANTS[name][1]
    sae = load_sae(like.write(tmp_path), **like.options)

    assert not differs(like, sae)
    assert differs(like, change(sae))


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", ["llama_scope residual", "llama_scope_r1 residual", "lm_saes jumprelu transcoder"])
def test_truncated_or_damaged_files_end_in_load_errors_only(name, tmp_path):
    folder = LOOKALIKES[name].write(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for n in range(0, len(whole), max(len(whole) // 80, 1)):
            path.write_bytes(whole[:n])

            assert refused(folder), f"{n} of {len(whole)} bytes of {path.name}"
        for _ in range(120):
            place, byte = (int(torch.randint(n, (1,), generator=generator)) for n in (min(len(whole), 900), 256))
            path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            refused(folder)
        path.write_bytes(whole)


def test_config_of_another_tool_is_of_no_family(tmp_path):
    folder = second(tmp_path)
    save(folder / "sae_weights.safetensors", {"x": T["b_enc"]})
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))

    with pytest.raises(UnsupportedFormat, match="no loader recognises it"):
        load_sae(folder)


def test_what_is_not_folded_keeps_its_dtype(tmp_path):
    halves = {key: tensor.bfloat16() for key, tensor in T.items()}

    sae = load_sae(second(tmp_path, halves, norm_activation="inference"))

    assert (sae.W_enc.dtype, sae.W_dec.dtype) == (torch.bfloat16, torch.bfloat16)
    assert sae.threshold is not None
    assert sae.threshold.dtype == torch.float32


def test_r1_is_named_by_its_training_data_and_layer(tmp_path):
    stored = open_sae(write_v2(T, V2 | SAME, {SAME["hook_point_in"]: 9.0}, folder=R1_FOLDER, turned=True)(tmp_path))

    assert (stored.name, stored.model) == (R1_FOLDER, "deepseek-ai/DeepSeek-R1-Distill-Llama-8B")


def test_r1_without_hook_points_takes_the_site_of_its_folder(tmp_path):
    config = {key: value for key, value in V2.items() if key not in BARE}

    stored = open_sae(write_v2(T, config, {}, folder=R1_FOLDER, turned=True)(tmp_path), input_scale=0.5)

    assert str(stored.site) == "resid_post.15"


def test_linear_names_are_those_of_the_first_version_and_of_r1(tmp_path):
    """One look at the tensors tells the two generations of lm-saes apart."""
    folder = write_v2(T, V2, SCALED, turned=True)(tmp_path)

    assert open_sae(folder).family == "llama_scope_r1"
    assert set(LINEAR.values()) < set(open_sae(folder).pieces["W_enc"].archive.specs)
    shutil.copy(folder / "config.json", folder / "hyperparams.json")
    with pytest.raises(UnsupportedFormat, match="it holds .*log_jumprelu_threshold. Llama Scope's SAEs have no such"):
        open_sae(folder)
