"""OpenAI's SAEs: which activation, which layer of a folder, and what is refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saeguard import load_sae
from saeguard.errors import BrokenFile, LoadError, UnsupportedFormat
from saeguard.loaders import open_sae
from tests.damage import surprises
from tests.lookalikes import LOOKALIKES
from tests.lookalikes.base import D_IN, D_SAE, TOP_K, inputs
from tests.lookalikes.openai import RELU, SDXL, TOPK, T, tensors, write, write_sdxl


@pytest.mark.parametrize(("place", "stream"), [
    ("resid_delta_attn_v5_32k", "attn_out"), ("resid_delta_mlp_v5_128k", "mlp_out"),
    ("resid_post_attn_v5_32k", "resid_mid"),
    ("resid_post_mlp_v5_128k", "resid_post"), ("mlp_post_act", "mlp_post"), ("resid_delta_mlp_v4", "mlp_out"),
])  # fmt: skip
def test_site_is_that_of_the_location_and_the_number_of_the_file(place, stream, tmp_path):
    sae = load_sae(write(place, 11, TOPK)(tmp_path))

    assert (str(sae.site), sae.name) == (f"{stream}.11", f"gpt2-small/{place}/11")


def test_file_elsewhere_has_no_site_until_one_is_given(tmp_path):
    torch.save({**tensors(), **TOPK}, tmp_path / "8.pt")

    unknown, given = load_sae(tmp_path / "8.pt"), load_sae(tmp_path / "8.pt", "resid_post.8", model="gpt2")

    assert (unknown.site, unknown.model) == (None, None)
    assert unknown.manifest["site_unknown"] == "the path has no location of OpenAI's with a layer's file in it"
    assert (str(given.site), given.model) == ("resid_post.8", "gpt2")
    assert "site_unknown" not in given.manifest


def test_folder_of_several_layers_needs_to_be_told_which(tmp_path):
    folder = write("resid_post_mlp_v5_32k", 7, TOPK, folder=True)(tmp_path)

    with pytest.raises(UnsupportedFormat, match="3 files of it match .* say site=... with the layer"):
        load_sae(folder)


@pytest.mark.parametrize("activation", [
    {"activation": "JumpReLU"}, {"activation": "Identity"}, {"activation": 3},
    {"activation": "TopK", "activation_state_dict": {"k": TOP_K, "postact_fn": "GELU"}},
    {"activation": "TopK", "activation_state_dict": {"k": TOP_K, "postact_fn": 3}},
    {"activation": "TopK"},
])  # fmt: skip
def test_activation_that_is_not_known_is_refused(activation, tmp_path):
    with pytest.raises(UnsupportedFormat, match="this version does not compute that. Use one with ReLU or TopK"):
        load_sae(write("resid_post_mlp_v5_32k", 8, activation)(tmp_path))


@pytest.mark.parametrize("k", [True, 0, -1, 3.0, "32", D_SAE + 1, None])
def test_k_that_cannot_be_is_broken(k, tmp_path):
    activation = {"activation": "TopK", "activation_state_dict": {"k": k, "postact_fn": "ReLU"}}

    with pytest.raises(BrokenFile):
        load_sae(write("resid_post_mlp_v5_32k", 8, activation)(tmp_path))


@pytest.mark.parametrize("change", [
    {"encoder.weight": torch.zeros(D_SAE, D_IN + 1)}, {"encoder.weight": torch.zeros(4)},
    {"pre_bias": torch.zeros(D_SAE)},
    {"latent_bias": torch.zeros(D_IN)}, {"decoder.weight": torch.zeros(D_SAE, D_IN)}, {"scale": torch.zeros(1)},
    {"pre_bias": torch.zeros(D_IN, dtype=torch.long)}, {"latent_bias": torch.full((D_SAE,), torch.nan)},
    {"decoder.linear.weight": torch.zeros(D_SAE, D_IN)},
])  # fmt: skip
def test_tensors_of_wrong_shapes_kinds_or_names_are_broken(change, tmp_path):
    torch.save(dict(tensors()) | change | TOPK, tmp_path / "8.pt")

    with pytest.raises(BrokenFile):
        load_sae(tmp_path / "8.pt")


def test_nothing_is_centred_and_the_norm_has_its_own_mean(tmp_path):
    normed, plain = (load_sae(write(place, 3, kind)(tmp_path))
                     for place, kind in (("resid_post_mlp_v5_32k", TOPK), ("resid_delta_mlp", RELU)))  # fmt: skip

    assert (normed.norm, normed.eps, plain.norm) == ("layer_norm", 1e-5, "none")


def test_sdxl_without_its_config_needs_top_k(tmp_path):
    folder = write_sdxl(tmp_path)
    (folder / "config.json").unlink()

    with pytest.raises(UnsupportedFormat, match="config.json, which has k, is not there. Say top_k="):
        load_sae(folder)

    assert load_sae(folder, top_k=4).top_k == 4


@pytest.mark.parametrize(
    ("key", "value"), [("k", "10"), ("k", 0), ("k", True), ("d_model", 17), ("n_dirs_local", 5120)]
)
def test_config_of_sdxl_that_does_not_fit_is_broken(key, value, tmp_path):
    folder = write_sdxl(tmp_path)
    (folder / "config.json").write_text(json.dumps(SDXL | {key: value}))

    with pytest.raises(BrokenFile, match=f"{key} is"):
        load_sae(folder)


def test_site_of_an_image_model_is_unknown(tmp_path):
    sae = load_sae(write_sdxl(tmp_path))

    assert sae.manifest["site_unknown"] == "it is of an image model"
    assert sae.manifest["format"] == "sdxl_unbox"


@pytest.mark.parametrize("name", ["openai_v5", "openai_v1", "openai_tied", "sdxl_unbox"])
def test_files_cut_anywhere_raise_only_our_errors(name, tmp_path):
    assert surprises(LOOKALIKES[name], tmp_path) == []


def test_file_of_something_else_is_recognised_by_nobody(tmp_path):
    torch.save({"pre_bias": T["b_dec"], "latent_bias": T["b_enc"]}, tmp_path / "8.pt")

    with pytest.raises(LoadError, match="no loader recognises it"):
        load_sae(tmp_path / "8.pt")


def _subtracted_twice(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return raw | {"b_enc": raw["b_enc"] - 2 * raw["b_dec"] @ raw["W_enc"]}


MUTANTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "no norm": ("openai_v5", lambda stored: replace(stored, norm="none")),
    "topk as relu": ("openai_v5", lambda stored: replace(stored, activation="relu", top_k=None)),
    "relu after topk": ("openai_v5_signed", lambda stored: replace(stored, activation="topk")),
    "no relu after topk": ("openai_v5_attn", lambda stored: replace(stored, activation="topk_norelu")),
    "a norm under ReLU": ("openai_v4", lambda stored: replace(stored, norm="layer_norm")),
    "pre_bias twice": ("openai_v1", lambda stored: replace(stored, fold=_subtracted_twice)),
}


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_wrong_loader_would_be_caught(mutant, tmp_path):
    name, change = MUTANTS[mutant]
    like, x = LOOKALIKES[name], inputs()

    wrong = change(open_sae(like.write(tmp_path), **like.options)).sae()

    assert not torch.allclose(wrong.encode(x), like.acts(x), atol=1e-2)


def test_decoder_that_was_not_kept_contiguous_is_read_as_it_is(tmp_path: Path):
    """SDXL's authors keep the decoder column by column, so its strides in the file are those of a transpose."""
    folder = write_sdxl(tmp_path)

    assert torch.equal(load_sae(folder).W_dec, T["W_dec"])
