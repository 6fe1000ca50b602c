"""dictionary_learning: which class a file is of, where it reads, and what is refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saeguard import Site, load_sae
from saeguard.errors import BrokenFile, LoadError, MissingSite, UnsupportedFormat
from saeguard.loaders import open_sae
from tests.damage import surprises
from tests.lookalikes import LOOKALIKES
from tests.lookalikes.base import D_IN, D_SAE, TOP_K, Tensors, inputs
from tests.lookalikes.dictionary_learning import (
    AUTO_ENCODER,
    AUTO_ENCODER_NEW,
    BUFFER,
    GATED,
    JUMP_RELU,
    THRESHOLD,
    T,
    jkminder,
    matryoshka,
    ranked,
    trainer,
    write,
    write_jkminder,
)  # fmt: skip

OURS = [name for name, like in LOOKALIKES.items() if like.family in ("dictionary_learning", "jkminder")]
BATCH = trainer("BatchTopKSAE", "BatchTopKTrainer", k=TOP_K)
PLAIN = {key: JUMP_RELU[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec")}


@pytest.mark.parametrize(("trainer_class", "dict_class", "tensors"), [
    ("StandardTrainer", "AutoEncoder", AUTO_ENCODER), ("PAnnealTrainer", "AutoEncoder", AUTO_ENCODER),
    ("GatedSAETrainer", "GatedAutoEncoder", GATED), ("GatedAnnealTrainer", "GatedAutoEncoder", GATED),
    ("JumpReluTrainer", "JumpReluAutoEncoder", JUMP_RELU), ("TopKTrainer", "AutoEncoderTopK", ranked()),
    ("BatchTopKTrainer", "BatchTopKSAE", ranked()),
    ("MatryoshkaBatchTopKTrainer", "MatryoshkaBatchTopKSAE", matryoshka()),
])  # fmt: skip
def test_class_is_that_of_the_trainer_where_a_config_names_none(trainer_class, dict_class, tensors, tmp_path):
    stored = open_sae(write(tensors, trainer(None, trainer_class, k=TOP_K))(tmp_path))

    assert stored.manifest["architecture"] == dict_class


@pytest.mark.parametrize("name", ["CrossCoder", "SwitchAutoEncoder", "autoencoder"])
def test_class_that_is_not_known_is_refused_with_those_that_are(name, tmp_path):
    with pytest.raises(UnsupportedFormat, match=f"class '{name}': .* It reads AutoEncoder, AutoEncoderNew"):
        load_sae(write(AUTO_ENCODER, trainer(name, "StandardTrainer"))(tmp_path))


def test_threshold_that_was_never_set_is_a_plain_relu_and_the_manifest_says_so(tmp_path):
    sae = load_sae(write(ranked(-1.0), BATCH)(tmp_path))

    assert sae.activation == "relu"
    assert sae.threshold is None
    assert sae.manifest["threshold"] == "never set (-1), so it is a plain ReLU"


def test_threshold_of_topk_is_recorded_and_not_used(tmp_path):
    about = trainer("AutoEncoderTopK", "TopKTrainer", k=TOP_K)

    learned, unset = (load_sae(write(ranked(t), about)(tmp_path / str(t))) for t in (THRESHOLD, -1.0))

    assert learned.manifest["threshold"] == pytest.approx(THRESHOLD)
    assert unset.manifest["threshold"] == "never set"
    assert (learned.activation, learned.top_k, learned.threshold) == ("topk", TOP_K, None)


def test_batchtopk_without_a_threshold_is_refused_because_it_would_depend_on_the_batch(tmp_path):
    tensors = {key: tensor for key, tensor in ranked().items() if key != "threshold"}

    with pytest.raises(
        UnsupportedFormat, match="stores no threshold, and without one a latent depends on the other tokens"
    ):
        load_sae(write(tensors, BATCH)(tmp_path))


def test_k_that_differs_between_file_and_config_is_broken(tmp_path):
    about = trainer("AutoEncoderTopK", "TopKTrainer", k=TOP_K + 1)

    with pytest.raises(BrokenFile, match=rf"k is \[{TOP_K}\], and {TOP_K + 1} in config.json"):
        load_sae(write(ranked(), about)(tmp_path))


def test_k_that_nobody_says_is_broken(tmp_path):
    tensors = {key: tensor for key, tensor in ranked().items() if key != "k"}

    with pytest.raises(BrokenFile, match="k is not there, and None in config.json"):
        load_sae(write(tensors, trainer("AutoEncoderTopK", "TopKTrainer"))(tmp_path))


@pytest.mark.parametrize(("tensors", "says"), [
    (ranked(), "AutoEncoderTopK and BatchTopKSAE have the same tensors"),
    (PLAIN, "nothing says what its latents do with these weights"),
    (JUMP_RELU, "only the first take no b_dec off x"),
    ({"W_enc": PLAIN["W_enc"], "W_dec": PLAIN["W_dec"], "mean": PLAIN["b_dec"]}, "it is SAEBench's PCA"),
])  # fmt: skip
def test_file_without_a_config_whose_tensors_do_not_say_enough_is_refused(tensors, says, tmp_path):
    with pytest.raises(UnsupportedFormat, match=says):
        load_sae(write(tensors, None)(tmp_path))


@pytest.mark.parametrize("tensors", [AUTO_ENCODER, GATED, matryoshka()])
def test_file_without_a_config_whose_tensors_say_enough_is_read(tensors, tmp_path):
    sae = load_sae(write(tensors, None, folder="run")(tmp_path))

    assert sae.site is None
    assert sae.manifest["site_unknown"] == "neither config.json nor the path names a submodule"


@pytest.mark.parametrize(("submodule", "layer", "model", "site"), [
    ("mlp_out_layer_8", 8, "EleutherAI/pythia-160m-deduped", "mlp_out.8"),
    ("attention_out_layer_8", 8, "EleutherAI/pythia-160m-deduped", "attn_out.8"),
    ("resid_post_layer_8", None, "openai/gpt-oss-20b", "resid_post.8"),
    ("resid_post_layer_8", 8, "google/gemma-2-2b", "resid_post.8"),
    ("mlp_out_layer_8", 8, "google/gemma-2-2b", None),
    ("attention_out_layer_8", 8, "google/gemma-3-1b-pt", None),
    ("embed", 8, "EleutherAI/pythia-160m-deduped", None),
    (None, 8, "EleutherAI/pythia-160m-deduped", "resid_post.3"),
])  # fmt: skip
def test_site_is_that_of_the_submodule_and_on_models_with_post_norms_only_of_the_stream(
    submodule, layer, model, site, tmp_path
):
    """A module's output is not what Gemma 2 adds to the stream: a norm comes after it."""
    about = BATCH | {"submodule_name": submodule, "layer": layer, "lm_name": model}

    sae = load_sae(write(ranked(), about, folder="resid_out_layer3/10_32768")(tmp_path))

    assert (str(sae.site) if sae.site else None) == site
    assert ("site_unknown" in sae.manifest) == (site is None)


def test_output_before_a_post_norm_says_why_it_has_no_site(tmp_path):
    about = BATCH | {"submodule_name": "mlp_out_layer_8", "lm_name": "google/gemma-2-2b"}

    sae = load_sae(write(ranked(), about)(tmp_path))

    assert sae.manifest["site_unknown"] == "mlp_out_layer_8 of google/gemma-2-2b is before the norm behind the module"


def test_layer_that_differs_from_the_submodule_is_broken(tmp_path):
    with pytest.raises(BrokenFile, match="submodule_name is 'resid_post_layer_8', and layer is 9"):
        load_sae(write(ranked(), BATCH | {"layer": 9})(tmp_path))


def test_input_of_a_module_is_no_site(tmp_path):
    about = BATCH | {"submodule_name": "mlp_out_layer_8"}

    sae = load_sae(write(ranked(), about, buffer=BUFFER | {"io": "in"})(tmp_path))

    assert sae.manifest["site_unknown"] == "it reads the input of the module mlp_out_layer_8"


def test_transcoder_needs_both_sites(tmp_path):
    folder = write(ranked(), BATCH, buffer=BUFFER | {"io": "in_and_out"})(tmp_path)

    with pytest.raises(MissingSite, match="from the input of a module to its output"):
        load_sae(folder, "mlp_in.8")

    sae = load_sae(folder, "mlp_in.8", site_out="mlp_out.8")
    assert (sae.site, sae.site_out) == (Site("mlp_in", 8), Site("mlp_out", 8))


def test_given_site_and_model_take_the_place_of_the_config(tmp_path):
    sae = load_sae(write(ranked(), BATCH)(tmp_path), "resid_pre.2", model="me/mine")

    assert (str(sae.site), sae.model) == ("resid_pre.2", "me/mine")


def test_four_linear_tensors_are_autoencoder_new_only_with_a_config(tmp_path):
    alone, beside = (write(AUTO_ENCODER_NEW, about)(tmp_path / str(i))
                     for i, about in enumerate([None, trainer("AutoEncoderNew", "StandardTrainer")]))  # fmt: skip

    assert (open_sae(alone).family, open_sae(beside).family) == ("linear_relu", "dictionary_learning")


@pytest.mark.parametrize(("key", "value"), [
    ("k", True), ("k", 6.0), ("k", "6"), ("k", 0), ("activation_dim", D_IN + 1), ("activation_dim", "16"),
    ("dict_size", D_SAE - 1), ("dict_class", 3), ("lm_name", ["a"]), ("submodule_name", 8), ("layer", -1),
    ("layer", True),
    ("trainer_class", {}),
])  # fmt: skip
def test_value_of_a_wrong_kind_in_a_config_is_broken(key, value, tmp_path):
    about = trainer("AutoEncoderTopK", "TopKTrainer", k=TOP_K) | {key: value}

    with pytest.raises(BrokenFile, match=f"{key} is"):
        load_sae(write(ranked(), about)(tmp_path))


@pytest.mark.parametrize("buffer", [["io"], {"io": 1}, {"ctx_len": "long"}, {"ctx_len": -1}])
def test_buffer_of_a_wrong_kind_is_broken(buffer, tmp_path):
    with pytest.raises(BrokenFile):
        load_sae(write(ranked(), BATCH, buffer=buffer)(tmp_path))


@pytest.mark.parametrize("change", [
    {"encoder.weight": torch.zeros(D_SAE, D_IN + 1)}, {"encoder.weight": T["W_enc"].contiguous()},
    {"encoder.bias": torch.zeros(D_SAE - 1)}, {"decoder.weight": torch.zeros(D_SAE, D_IN)},
    {"b_dec": torch.zeros(D_SAE)},
    {"b_dec": torch.zeros(D_IN, dtype=torch.int64)}, {"threshold": torch.zeros(2)},
    {"threshold": torch.tensor(torch.nan)},
    {"threshold": torch.tensor(1)}, {"k": torch.tensor(6.0)}, {"k": torch.tensor([3, 3])}, {"scale": torch.ones(1)},
    {"encoder.weight": torch.zeros(3)}, {"k": torch.tensor(D_SAE + 1, dtype=torch.int)},
    {"b_dec": torch.full((D_IN,), torch.inf)},
])  # fmt: skip
def test_tensors_of_wrong_shapes_kinds_or_names_are_broken(change, tmp_path):
    about = trainer("AutoEncoderTopK", "TopKTrainer")

    with pytest.raises(BrokenFile):
        load_sae(write(ranked() | change, about)(tmp_path))


@pytest.mark.parametrize("groups", [torch.tensor([1, 2]), torch.tensor([48.0]), torch.full((20_000,), 1)])
def test_groups_that_do_not_add_up_are_broken(groups, tmp_path):
    about = trainer("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer", k=TOP_K)

    with pytest.raises(BrokenFile, match="group_sizes"):
        load_sae(write(matryoshka() | {"group_sizes": groups}, about)(tmp_path))


def test_interrupted_run_is_not_read_as_finished(tmp_path):
    """The scale of the inputs is not yet folded into a backup's weights: read as it is, every threshold is off."""
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    backup = {"step": 100, "ae": ranked(), "optimizer": optimizer, "config": {}, "norm_factor": 3.0}

    with pytest.raises(UnsupportedFormat, match="backup"):
        load_sae(write(backup, BATCH)(tmp_path))  # type: ignore[arg-type]


# jkminder's fork


@pytest.mark.parametrize("change", [
    {"activation_mean": torch.zeros(D_IN + 1)}, {"activation_global_scale": torch.tensor(torch.nan)},
    {"activation_global_scale": torch.tensor(0.0)}, {"threshold": torch.tensor(torch.inf)},
    {"threshold": torch.zeros(D_SAE)}, {"b_dec": torch.zeros(D_SAE)},
])  # fmt: skip
def test_statistics_that_cannot_be_are_broken(change, tmp_path):
    with pytest.raises(BrokenFile):
        load_sae(write_jkminder(jkminder() | change)(tmp_path))


def test_class_of_the_fork_that_is_not_known_is_refused(tmp_path):
    tensors = {key: tensor for key, tensor in jkminder().items() if key not in ("k", "threshold")}

    with pytest.raises(UnsupportedFormat, match="only those of its BatchTopKSAE are known"):
        load_sae(write_jkminder(tensors)(tmp_path))


def test_config_of_the_fork_with_another_width_is_broken(tmp_path):
    folder = write_jkminder(jkminder())(tmp_path)
    (folder / "config.json").write_text(json.dumps({"activation_dim": D_IN, "dict_size": D_SAE * 2}))

    with pytest.raises(BrokenFile, match=f"dict_size is {D_SAE * 2}, and the weights have {D_SAE}"):
        load_sae(folder)


def test_name_of_the_fork_is_that_of_the_repository_in_the_hubs_cache(tmp_path):
    folder = tmp_path / "models--science-of-finetuning--SAE-gemma-2-2b-L13" / "snapshots" / "f00"
    folder.mkdir(parents=True)

    assert load_sae(write_jkminder(jkminder())(folder)).name == "SAE-gemma-2-2b-L13"


def test_crosscoder_of_the_fork_is_refused(tmp_path):
    with pytest.raises(UnsupportedFormat, match="several models or layers at once"):
        load_sae(write_jkminder(jkminder() | {"encoder.weight": torch.zeros(2, D_IN, D_SAE)})(tmp_path))


# files that are cut short, and loaders that would be wrong


@pytest.mark.parametrize("name", ["dl_gated", "dl_batchtopk", "dl_matryoshka", "dl_autoencoder_alone", "jkminder"])
def test_files_cut_anywhere_raise_only_our_errors(name, tmp_path):
    assert surprises(LOOKALIKES[name], tmp_path) == []


def _unfolded(raw: dict[str, Tensor]) -> Tensors:
    return {key: raw[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec")}


def _gate_only(raw: dict[str, Tensor]) -> Tensors:
    kept = {key: raw[key] for key in ("W_enc", "W_dec", "b_dec")}
    return kept | {"b_enc": raw["gate_bias"] - raw["b_dec"] @ raw["W_enc"]}


MUTANTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "topk as relu": ("dl_topk", lambda stored: replace(stored, activation="relu", top_k=None)),
    "threshold forgotten": ("dl_batchtopk", lambda stored: replace(
        stored, activation="relu", pieces={key: piece for key, piece in stored.pieces.items() if key != "threshold"})),
    "bias not taken off": ("dl_autoencoder", lambda stored: replace(stored, fold=_unfolded)),
    "gate without magnitudes": ("dl_gated", lambda stored: replace(stored, fold=_gate_only, activation="relu")),
    "statistics ignored": ("jkminder", lambda stored: replace(
        stored, pieces={key: piece for key, piece in stored.pieces.items() if key not in ("mean", "scale")})),
}  # fmt: skip


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_wrong_loader_would_be_caught(mutant, tmp_path):
    name, change = MUTANTS[mutant]
    like, x = LOOKALIKES[name], inputs()

    wrong = change(open_sae(like.write(tmp_path), **like.options)).sae()

    assert not torch.allclose(wrong.encode(x), like.acts(x), atol=1e-2)


def test_every_look_alike_names_its_format_and_what_was_folded(tmp_path):
    for name in OURS:
        like = LOOKALIKES[name]
        manifest = open_sae(like.write(_made(tmp_path / name)), **like.options).manifest

        assert manifest["format"].startswith("dictionary_learning")
        assert isinstance(manifest["folds"], list)
        assert "bos" in manifest


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_folder_without_weights_is_recognised_by_nobody(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"trainer": BATCH}))

    with pytest.raises(LoadError, match="no loader recognises it"):
        load_sae(tmp_path)
