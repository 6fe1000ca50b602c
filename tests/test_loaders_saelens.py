"""SAELens folders: what the manifest says, what is refused and why, and the errors that a loader of them can make."""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from saeguard import SAE, Site, load_sae
from saeguard.errors import BrokenFile, MissingExtra, MissingScale, MissingSite, UnsupportedFormat
from saeguard.loaders import LOADERS, saelens
from saeguard.loaders.live import load_saelens
from saeguard.loaders.source import Hints, Source
from tests.damage import refused
from tests.lookalikes import LOOKALIKES
from tests.lookalikes.base import D_IN, D_SAE, TOP_K, Tensors, inputs
from tests.lookalikes.saelens import (
    AVERAGE,
    CASES,
    CENTRED,
    D_OUT,
    GATED,
    LEGACY,
    METADATA,
    SCALE,
    THRESHOLD,
    V6,
    atoms,
    no_skip,
    old,
    save,
    tensors,
    transcoder,
    v6,
)
from tests.test_families import close, same_support


def folder(root: Path, stored: Tensors, cfg: dict[str, Any], **metadata: Any) -> Path:
    whole = LEGACY | cfg if "hook_point" in cfg else V6 | cfg | {"metadata": METADATA | metadata}
    return save(root / "mine", stored, whole)


def with_overrides(path: Path, **overrides: Any) -> SAE:
    return saelens.open(Source(path), Hints(overrides=overrides)).sae()


def test_saelens_manifest_and_site_of_version_six(tmp_path):
    sae = load_sae(folder(tmp_path, tensors("threshold"), v6("jumprelu")))

    assert (sae.name, sae.model, sae.site) == ("mine", "gemma-2-2b", Site("resid_post", 7))
    assert set(sae.manifest.pop("sha256")) == {"sae_weights.safetensors"}
    assert sae.manifest == {
        "format": "saelens",
        "architecture": "jumprelu",
        "hook_name": METADATA["hook_name"],
        "bos": True,
        "context": 128,
        "model_name": "gemma-2-2b",
        "dataset": "some/text",
        "sae_lens_version": "6.21.0",
        "folds": [],
        "dtype": "float32",
    }


def test_saelens_manifest_and_site_of_a_legacy_config(tmp_path):
    sae = load_sae(folder(tmp_path, tensors(), old()))

    assert (sae.model, sae.site) == ("gpt2", Site("resid_pre", 3))
    assert (sae.manifest["bos"], sae.manifest["context"]) == (True, 64)
    assert sae.manifest["folds"] == ["apply_b_dec_to_input"]


@pytest.mark.parametrize(("name", "folds"), [
    ("gated b_dec", ["gated", "apply_b_dec_to_input"]),
    ("jumprelu logarithm", ["log_threshold"]),
    ("matryoshka rescaled average", ["topk_threshold", "expected_average_only_in", "rescale_acts_by_decoder_norm"]),
    ("legacy finetuned", ["apply_b_dec_to_input", "finetuning_scaling_factor"]),
    ("legacy scale of one", ["apply_b_dec_to_input"]),
    ("pursuit", []),
    ("layer norm", []),
])  # fmt: skip
def test_saelens_manifest_says_what_was_folded(name, folds, tmp_path):
    like = LOOKALIKES[f"saelens {name}"]

    manifest = load_sae(like.write(tmp_path), **like.options).manifest

    assert sorted(manifest["folds"]) == sorted(folds)
    assert manifest.get("input_scale") == (SCALE if "average" in name else None)


def test_saelens_weights_that_are_not_folded_keep_their_dtype(tmp_path):
    sae = load_sae(folder(tmp_path, {name: t.bfloat16() for name, t in tensors("threshold").items()}, v6("jumprelu")))

    assert {getattr(sae, name).dtype for name in ("W_enc", "b_enc", "W_dec", "threshold")} == {torch.bfloat16}
    assert sae.manifest["dtype"] == "bfloat16"


@pytest.mark.parametrize(("metadata", "overrides", "bos"), [
    ({"prepend_bos": False}, {}, False), ({"prepend_bos": None}, {}, None),
    ({"prepend_bos": None}, {"prepend_bos": True}, True), ({"prepend_bos": False}, {"prepend_bos": True}, False),
])  # fmt: skip
def test_saelens_bos_is_unknown_where_neither_the_config_nor_the_release_says_it(metadata, overrides, bos, tmp_path):
    path = folder(tmp_path, tensors(), v6("standard"), **metadata)

    assert with_overrides(path, **overrides).manifest["bos"] is bos


@pytest.mark.parametrize(("hook", "reason"), [
    ("blocks.7.hook_mlp_in", "is not a stream and a layer"), ("x.3", "'x' is not a stream"),
    ("resid_post.-1", "Negative layers"), (None, "cfg.json names no hook"),
])  # fmt: skip
def test_saelens_hook_that_is_no_site_of_ours_leaves_the_site_open_and_says_why(hook, reason, tmp_path):
    path = folder(tmp_path, tensors("threshold"), v6("jumprelu"), hook_name=hook)
    sae = load_sae(path)

    assert sae.site is None
    assert reason in sae.manifest["site_unknown"]
    assert load_sae(path, "resid_mid.4").site == Site("resid_mid", 4)
    assert "site_unknown" not in load_sae(path, "resid_mid.4").manifest


def test_saelens_hook_of_transformers_is_read_where_the_other_one_is_no_site(tmp_path):
    path = folder(tmp_path, tensors(), v6("standard"), hook_name="somewhere", hf_hook_name="model.layers.7.output")

    assert load_sae(path).site == Site("resid_post", 7)


def test_saelens_hints_replace_what_the_files_say(tmp_path):
    path = folder(tmp_path, tensors(), v6("standard"))

    sae = load_sae(path, "resid_pre.8", model="google/gemma-2-2b-it")

    assert (sae.site, sae.model) == (Site("resid_pre", 8), "google/gemma-2-2b-it")


def test_saelens_weights_file_stands_for_its_folder(tmp_path):
    path = folder(tmp_path, tensors(), v6("standard"))

    assert load_sae(path / "sae_weights.safetensors").fingerprint() == load_sae(path).fingerprint()


def test_saelens_mlp_input_under_fold_ln_is_before_the_gain(tmp_path):
    cfg, hook = v6("standard"), "blocks.2.mlp.hook_in"

    folded = folder(tmp_path / "a", tensors(), cfg, hook_name=hook, model_from_pretrained_kwargs={"fold_ln": True})
    plain = folder(tmp_path / "b", tensors(), cfg, hook_name=hook)

    assert (load_sae(folded).site, load_sae(plain).site) == (Site("mlp_normed", 2), Site("mlp_in", 2))
    assert load_sae(folded, "mlp_in.2").site == Site("mlp_in", 2)


@pytest.mark.parametrize(("hook", "kwargs", "found"), [
    ("blocks.2.attn.hook_z", {"fold_value_biases": True}, {"fold_value_biases": True, "fold_ln": False}),
    ("blocks.2.attn.hook_z", {"fold_value_biases": True, "fold_ln": True},
     {"fold_value_biases": True, "fold_ln": True}),
    ("blocks.2.ln2.hook_normalized", {"fold_ln": True}, {"fold_ln": True}),
    ("blocks.2.ln2.hook_normalized", {}, None),
    ("blocks.2.attn.hook_z", {"fold_value_biases": False}, None), ("blocks.2.attn.hook_z", {}, None),
    ("blocks.2.hook_attn_out", {"fold_value_biases": True}, None),
])  # fmt: skip
def test_saelens_heads_without_their_value_bias_are_left_to_the_engine(hook, kwargs, found, tmp_path):
    path = folder(tmp_path, tensors(), v6("standard"), hook_name=hook, model_from_pretrained_kwargs=kwargs)

    assert load_sae(path).manifest.get("processing") == found


@pytest.mark.parametrize(("hook", "norm"), [
    ("blocks.3.hook_resid_pre", "center"), ("blocks.3.hook_resid_mid", "center"), ("blocks.3.hook_attn_out", "center"),
    ("blocks.3.hook_mlp_out", "center"), ("blocks.3.attn.hook_z", "none"), ("blocks.3.mlp.hook_post", "none"),
    ("blocks.3.ln2.hook_normalized", "none"),
])  # fmt: skip
def test_saelens_mean_is_taken_off_the_streams_that_writing_weights_reach(hook, norm, tmp_path):
    path = folder(tmp_path, tensors(), old(hook_point=hook))

    assert with_overrides(path, center_writing_weights=True).norm == norm
    assert with_overrides(path, center_writing_weights=False).norm == "none"
    assert load_sae(folder(tmp_path / "b", tensors(), old(hook_point=hook, **CENTRED))).norm == norm


def test_saelens_release_can_ask_for_another_normalisation_than_the_config(tmp_path):
    """mistral-7b-res-wg: SAELens's list of releases says constant_norm_rescale, the config says none."""
    x, like = inputs(), LOOKALIKES["saelens legacy constant norm"]

    sae = with_overrides(folder(tmp_path, tensors(), old()), normalize_activations="constant_norm_rescale")

    assert close(sae.encode(x), like.acts(x))


def test_saelens_scale_of_the_caller_goes_before_that_of_the_files(tmp_path):
    path = folder(tmp_path, tensors("threshold"), v6("jumprelu", norm_scaling_factor=9.0, **AVERAGE))

    assert load_sae(path, input_scale=0.25).manifest["input_scale"] == 0.25
    assert load_sae(path).manifest["input_scale"] == 9.0


@pytest.mark.parametrize("normalize", ["expected_average_only_in", "constant_scalar_rescale"])
def test_saelens_scale_that_is_not_in_the_files_is_asked_for(normalize, tmp_path):
    path = folder(tmp_path, tensors(), v6("standard", normalize_activations=normalize))

    with pytest.raises(MissingScale, match=rf"normalised by {normalize}, and the factor is not .* Give input_scale="):
        load_sae(path)


def test_saelens_site_that_decides_what_the_stream_is_has_to_be_known(tmp_path):
    path = folder(tmp_path, tensors(), old(hook_point="blocks.3.hook_mlp_in", **CENTRED))

    with pytest.raises(MissingSite, match="whether its stream had a mean depends on which stream that is"):
        load_sae(path)
    assert load_sae(path, "resid_mid.3").norm == "center"


@pytest.mark.parametrize(("hooks", "says"), [
    ({}, "where it writes is not known: cfg.json names no hook"),
    ({"hook_name_out": "blocks.7.elsewhere"}, "where it writes is not known: site 'blocks.7.elsewhere'"),
    ({"hook_name": None, "hook_name_out": "blocks.7.hook_mlp_out"}, "where it reads is not known"),
])  # fmt: skip
def test_saelens_transcoder_needs_both_sites(hooks, says, tmp_path):
    path = folder(tmp_path, no_skip(transcoder()), v6("transcoder", d_out=D_OUT), **hooks)

    with pytest.raises(MissingSite, match=says):
        load_sae(path)
    sae = load_sae(path, "mlp_in.7", site_out="mlp_out.7")
    assert (sae.site, sae.site_out) == (Site("mlp_in", 7), Site("mlp_out", 7))


MLP_OUT = {"hook_name": "blocks.7.hook_resid_mid", "hook_name_out": "blocks.7.hook_mlp_out"}
UNSUPPORTED: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "d_out": (tensors(), v6("standard", d_out=12), "with d_out 12: a transcoder reads one stream and writes another"),
    "legacy transcoder": (tensors(), old(is_transcoder=True), "with is_transcoder True: a transcoder reads"),
    "legacy hook out": (tensors(), old(hook_point_out="blocks.7.hook_mlp_out"), "with hook_name_out 'blocks"),
    "older hook out": (tensors(), old(out_hook_point="blocks.7.hook_mlp_out"), "with hook_name_out 'blocks"),
    "temporal": (tensors(), v6("temporal"), "with architecture temporal: its latents depend on earlier tokens"),
    "future": (tensors(), v6("novel"), "architecture 'novel': known are standard, jumprelu"),
    "whitening": (tensors(), v6("standard", normalize_activations="covariance_whitening"),
                  "covariance_whitening: the whitening that its input needs is not in its files"),
    "normalisation": (tensors(), v6("standard", normalize_activations="batch_norm"),
                      "normalize_activations 'batch_norm': known are none, expected_average_only_in"),
    "reshape": (tensors(), v6("standard", reshape_activations="other"), "reshape_activations 'other': only heads"),
    "one head": (tensors(), old(hook_point_head_index=4), "with hook_head_index 4: it reads or writes one head"),
    "tanh": (tensors("threshold"), old(architecture="jumprelu", activation_fn_str="tanh-relu"),
             "activation_fn 'tanh-relu': jumprelu SAEs have relu"),
    "gelu": (tensors(), old(activation_fn_str="gelu"), "activation_fn 'gelu': standard SAEs have relu or tanh-relu"),
    "topk of gated": (GATED, old(architecture="gated", activation_fn_str="topk"), "gated SAEs have relu"),
    "rescaled jumprelu": (tensors("threshold"), v6("jumprelu", rescale_acts_by_decoder_norm=True),
                          "rescale_acts_by_decoder_norm with jumprelu: only TopK families have it"),
    "centred constant norm": (tensors(), old(normalize_activations="constant_norm_rescale", **CENTRED),
                              "center_writing_weights True and constant_norm_rescale"),
    "no threshold": (tensors(), v6("batchtopk", k=5.0), "depend on the other tokens of the batch"),
    "norms unsaid": (tensors() | THRESHOLD, v6("batchtopk"), "whether the decoder's norms are in the threshold"),
    "norms said twice": (tensors("threshold"), v6("batchtopk", rescale_acts_by_decoder_norm=True),
                         "whether the decoder's norms are in the threshold"),
    "skip tensor": (transcoder(d_out=D_IN), v6("standard"), "tensor 'W_skip': standard SAEs have none"),
    "transcoder b_dec": (no_skip(transcoder()), v6("transcoder", d_out=D_OUT, apply_b_dec_to_input=True),
                         "apply_b_dec_to_input with transcoder: its b_dec is of the stream that it writes"),
    "pursuit average": (atoms(), v6("matching_pursuit", **AVERAGE), "expected_average_only_in: atoms have one length"),
    "pursuit finetuned": (atoms() | {"scaling_factor": torch.ones(D_SAE)}, v6("matching_pursuit"),
                          "tensor 'scaling_factor': matching_pursuit SAEs have none"),
}  # fmt: skip
IN_METADATA: dict[str, tuple[Tensors, dict[str, Any], dict[str, Any], str]] = {
    "hook_name_out": (tensors(), v6("standard"), {"hook_name_out": "blocks.7.hook_mlp_out"},
                      "with hook_name_out 'blocks"),
    "one head of the output": (no_skip(transcoder()), v6("transcoder", d_out=D_OUT), {"hook_head_index_out": 0},
                               "with hook_head_index_out 0: it reads or writes one head"),
    "centred skip": (transcoder(), v6("skip_transcoder", d_out=D_OUT), MLP_OUT | CENTRED,
                     "center_writing_weights True and a skip: a skip reads the stream without its mean"),
    "value bias before a norm": (tensors(), v6("standard", normalize_activations="layer_norm"),
                                 {"hook_name": "blocks.2.attn.hook_z",
                                  "model_from_pretrained_kwargs": {"fold_value_biases": True}},
                                 "fold_value_biases True and normalize_activations layer_norm"),
}  # fmt: skip


REFUSED = {name: (stored, cfg, {}, text) for name, (stored, cfg, text) in UNSUPPORTED.items()} | IN_METADATA


@pytest.mark.parametrize("name", REFUSED)
def test_saelens_variant_that_cannot_be_computed_is_refused_by_name(name, tmp_path):
    stored, cfg, metadata, text = REFUSED[name]
    path = folder(tmp_path, stored, cfg, **metadata)

    with pytest.raises(UnsupportedFormat) as caught:
        load_sae(path)
    assert text in str(caught.value)


def flat_row() -> Tensors:
    stored = tensors()
    stored["W_dec"][3] = 0.0
    return stored


BROKEN: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "another width": (tensors(), v6("standard", d_in=9), "W_dec is (48, 16) torch.float32, not floating point (48, 9)"),
    "no width": (tensors(), v6("standard", d_in=None), "d_in is not there"),
    "true width": (tensors(), v6("standard", d_sae=True), "d_sae is True"),
    "zero width": (tensors(), v6("standard", d_sae=0), "d_sae is 0"),
    "other output": (no_skip(transcoder()), v6("transcoder", d_out=13), "not floating point (48, 13)"),
    "skip turned": (transcoder() | {"W_skip": transcoder()["W_skip"].T}, v6("skip_transcoder", d_out=D_OUT),
                    "W_skip is (16, 12) torch.float32, not floating point (12, 16)"),
    "no threshold": (tensors(), v6("jumprelu"), "threshold of architecture jumprelu not there"),
    "no skip": (no_skip(transcoder()), v6("skip_transcoder", d_out=D_OUT), "W_skip of architecture skip_transcoder"),
    "gated without gate": (tensors(), v6("gated"), "b_gate, b_mag, r_mag of architecture gated"),
    "k missing": (tensors(), v6("topk"), "k is None of 48 latents"),
    "k a fraction": (tensors(), v6("topk", k=2.5), "k is 2.5"),
    "k too large": (tensors(), v6("abstopk", k=D_SAE + 1), "k is 49 of 48 latents"),
    "k zero": (tensors(), v6("topk", k=0), "k is 0"),
    "bos a word": (tensors(), v6("standard", prepend_bos="yes"), "prepend_bos is 'yes'"),
    "scale zero": (tensors(), v6("standard", norm_scaling_factor=0, **AVERAGE), "norm_scaling_factor is 0"),
    "scale not announced": (tensors("scaling_factor"), v6("standard"), "scaling factors other than 1 are there"),
    "scale not there": (tensors(), old(finetuning_scaling_factor=True), "finetuning_scaling_factor of the config"),
    "two scales": (tensors("scaling_factor", "finetuning_scaling_factor"), old(finetuning_scaling_factor=True),
                   "it has 2 scaling factors"),
    "flat row": (flat_row(), v6("topk", k=TOP_K, rescale_acts_by_decoder_norm=True), "a row of the decoder has norm 0"),
    "hook_z elsewhere": (tensors(), v6("standard", reshape_activations="hook_z"),
                         "reshape_activations is hook_z at 'blocks.7.hook_resid_post'"),
    "endless pursuit": (atoms(), v6("matching_pursuit", max_iterations=10**9), "max_iterations is 1000000000"),
    "no round": (atoms(), v6("matching_pursuit", max_iterations=0), "max_iterations is 0"),
    "not finite": (tensors() | {"b_enc": torch.full((D_SAE,), float("nan"))}, v6("standard"), "b_enc holds NaN"),
    "overflow": (GATED | {"r_mag": torch.full((D_SAE,), 200.0)}, v6("gated"), "not finite once folded"),
    "integers": (tensors() | {"b_enc": torch.zeros(D_SAE, dtype=torch.int32)}, v6("standard"),
                 "b_enc is (48,) torch.int32"),
    "three axes": (tensors() | {"W_enc": torch.zeros(2, 2, 2)}, v6("standard"), "W_enc is (2, 2, 2)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_saelens_folder_that_contradicts_itself_is_refused(name, tmp_path):
    stored, cfg, text = BROKEN[name]
    path = folder(tmp_path, stored, cfg)

    with pytest.raises(BrokenFile) as caught:
        load_sae(path)
    assert text in str(caught.value)


@pytest.mark.parametrize(("text", "says"), [
    ("[1]", "it is not JSON that maps names"), ('{"d_in": NaN}', "NaN is not a number"), ("{", "it is not JSON"),
    ('{"d_in": 8, "d_in": 9}', "a key stands twice"), ("[" * 100_000, "it is not JSON"),
    ('{"metadata": 3}', "metadata is 3"), (" " * 4_000_001, "are allowed"), ("\xff", "it is not JSON"),
])  # fmt: skip
def test_saelens_config_that_is_no_config_is_refused(text, says, tmp_path):
    path = folder(tmp_path, tensors(), v6("standard"))
    (path / "cfg.json").write_bytes(text.encode("latin-1"))

    with pytest.raises(BrokenFile, match=says):
        load_sae(path)


@pytest.mark.parametrize("text", ["{", '{"scaling_factor": true}', '{"scaling_factor": -1}', '{"scaling_factor": "2"}'])
def test_saelens_scale_of_a_training_run_that_is_no_scale_is_refused(text, tmp_path):
    path = folder(tmp_path, tensors(), v6("standard", **AVERAGE))
    (path / "activation_scaler.json").write_text(text)

    with pytest.raises(BrokenFile, match=r"activation_scaler\.json"):
        load_sae(path)


def mutant_topk_as_relu(sae: SAE, t: Tensors) -> SAE:
    """SAELens issue 553: activation_fn_str was not looked at."""
    return replace(sae, activation="relu", top_k=None)


def mutant_scaled_b_dec(sae: SAE, t: Tensors) -> SAE:
    """SAELens issue 354: b_dec is taken off the scaled input, so it goes with the encoder as it is in the file."""
    return replace(sae, b_enc=t["b_enc"] - t["b_dec"] @ sae.W_enc)


def mutant_threshold_without_norms(sae: SAE, t: Tensors) -> SAE:
    """SAELens issue 763: the threshold is compared with pre-activations times the norms of the decoder's rows."""
    norms = t["W_dec"].norm(dim=-1)
    return replace(sae, W_enc=sae.W_enc / norms, b_enc=sae.b_enc / norms, W_dec=t["W_dec"])


def mutant_threshold_without_gain(sae: SAE, t: Tensors) -> SAE:
    return replace(sae, threshold=(t["b_mag"] - t["b_gate"]).clamp_min(0))


def mutant_turned_skip(sae: SAE, t: Tensors) -> SAE:
    return replace(sae, skip=sae.skip.T)


def mutant_scaled_output(sae: SAE, t: Tensors) -> SAE:
    return replace(sae, W_dec=sae.W_dec / SCALE, b_dec=sae.b_dec / SCALE)


def mutant_unit_atoms(sae: SAE, t: Tensors) -> SAE:
    unit = t["W_dec"] / t["W_dec"].norm(dim=-1, keepdim=True)
    return replace(sae, W_enc=unit.T)


def mutant_negative_thresholds(sae: SAE, t: Tensors) -> SAE:
    return replace(sae, threshold=t["threshold"])


def mutant_without_its_mean(sae: SAE, t: Tensors) -> SAE:
    return replace(sae, norm="none")


MUTANTS: dict[str, Callable[[SAE, Tensors], SAE]] = {
    "legacy topk layer norm": mutant_topk_as_relu, "average b_dec": mutant_scaled_b_dec,
    "batchtopk rescaled": mutant_threshold_without_norms, "gated b_dec": mutant_threshold_without_gain,
    "jumprelu skip transcoder": mutant_turned_skip, "transcoder average": mutant_scaled_output,
    "pursuit": mutant_unit_atoms, "jumprelu below zero": mutant_negative_thresholds,
    "legacy centred": mutant_without_its_mean,
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_saelens_wrong_fold_does_not_pass_for_the_right_one(name, tmp_path):
    like, x = LOOKALIKES[f"saelens {name}"], inputs()
    sae = load_sae(like.write(tmp_path), **like.options)
    wrong = MUTANTS[name](sae, {key: t.float() for key, t in CASES[name].tensors.items()})

    f, x_hat = like.acts(x), like.decode(like.acts(x), x)

    def passes(sae: SAE) -> bool:
        return close(sae.encode(x), f) and same_support(sae.encode(x), f) and close(sae.decode(f, x), x_hat)

    assert passes(sae)
    assert not passes(wrong)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("case", ["jumprelu b_dec", "pursuit", "jumprelu skip transcoder", "legacy finetuned"])
@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_truncated_or_damaged_saelens_folders_end_in_load_errors_only(name, case, tmp_path):
    path = LOOKALIKES[f"saelens {case}"].write(tmp_path)
    file = path / name
    whole, generator = file.read_bytes(), torch.Generator().manual_seed(0)
    for n in range(0, len(whole), max(len(whole) // 150, 1)):
        file.write_bytes(whole[:n])

        assert refused(path), f"{n} of {len(whole)} bytes"
    for _ in range(150):
        place, byte = (int(torch.randint(n, (1,), generator=generator)) for n in (min(len(whole), 600), 256))
        file.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        refused(path)


ODD = [None, True, False, 0, -1, 2, 10**40, 0.5, "", "x", "\ud800", "topk", [], [1], {}, {"k": "x"}, {"k": 3}]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("case", ["topk rescaled average", "pursuit", "jumprelu skip transcoder", "legacy finetuned"])
def test_saelens_configs_with_any_value_in_any_place_load_or_end_in_load_errors(case, tmp_path):
    like = LOOKALIKES[f"saelens {case}"]
    path = like.write(tmp_path)
    cfg = json.loads((path / "cfg.json").read_text())
    optional = ["normalize_activations", "norm_scaling_factor", "hook_name", "model_from_pretrained_kwargs", "metadata",
                "hook_head_index", "d_out", "k", "max_iterations", "residual_threshold"]  # fmt: skip
    places = [(cfg, key) for key in {*cfg, *optional}] + [(cfg["metadata"], key) for key in cfg.get("metadata", {})]
    for place, key in places:
        before = dict(place)
        for value in [*ODD, float("inf")]:
            place[key] = value
            (path / "cfg.json").write_text(json.dumps(cfg).replace("Infinity", "1e999"))
            refused(path, **like.options)
        place.clear()
        place.update(before)


def test_saelens_folder_is_of_no_other_family(tmp_path):
    path = Source(folder(tmp_path, tensors(), v6("standard")))

    assert [name for name, loader in LOADERS.items() if loader.recognises(path)] == ["saelens"]


def test_saelens_folder_without_one_of_its_files_is_not_recognised(tmp_path):
    path = folder(tmp_path, tensors(), v6("standard"))
    (path / "cfg.json").unlink()

    assert not saelens.recognises(Source(path))
    assert not saelens.recognises(Source(path / "sae_weights.safetensors"))


class FakeSAE:
    """As much of a live SAE as is looked at."""

    def __init__(self, like: str = "jumprelu b_dec"):
        self.case = CASES[like]

    def get_name(self) -> str:
        return "sae_org/model_../x_48"

    def save_model(self, folder: Path) -> None:
        save(folder, self.case.tensors, self.case.config)


class FakeTrainingSAE(FakeSAE):
    def save_model(self, folder: Path) -> None:
        raise AssertionError("what is saved in training is not what is used")

    def save_inference_model(self, folder: Path) -> None:
        super().save_model(folder)


class UnsavedSAE(FakeSAE):
    def save_model(self, folder: Path) -> None:
        raise ValueError("a tensor is not contiguous")


@pytest.fixture
def fake_sae_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one is compared with in tests/saelens, in an environment of its own."""
    module = ModuleType("sae_lens")
    module.SAE, module.TrainingSAE = FakeSAE, FakeTrainingSAE
    monkeypatch.setitem(sys.modules, "sae_lens", module)


@pytest.mark.usefixtures("fake_sae_lens")
@pytest.mark.parametrize("kind", [FakeSAE, FakeTrainingSAE])
def test_live_saelens_object_becomes_what_its_files_would(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    x, like = inputs(), LOOKALIKES["saelens jumprelu b_dec"]

    sae = load_saelens(kind())

    assert list(tmp_path.iterdir()) == []
    assert close(sae.encode(x), like.acts(x))
    assert (sae.name, str(sae.site), sae.model) == ("sae_org/model_../x_48", "resid_post.7", "gemma-2-2b")


@pytest.mark.usefixtures("fake_sae_lens")
def test_live_saelens_object_takes_what_the_caller_knows():
    sae = load_saelens(FakeSAE("average"), "resid_pre.2", name="..", model="other", input_scale=SCALE)

    assert (sae.name, str(sae.site), sae.model, sae.manifest["input_scale"]) == ("..", "resid_pre.2", "other", SCALE)


@pytest.mark.usefixtures("fake_sae_lens")
@pytest.mark.parametrize(("given", "says"), [
    (3, "an SAE from an object int: it is not one of sae_lens"),
    (UnsavedSAE(), r"sae_lens cannot save it \(a tensor is not contiguous\)"),
])  # fmt: skip
def test_live_object_that_is_no_saelens_sae_is_refused(given, says):
    with pytest.raises(UnsupportedFormat, match=says):
        load_saelens(given)


def test_live_saelens_object_without_sae_lens_asks_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)

    with pytest.raises(MissingExtra, match="sae_lens cannot be imported here"):
        load_saelens(FakeSAE())
