"""Families of one file each: how their configs are read, what TransformerLens did, and what is refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from saeguard import load_sae
from saeguard.activations import Pursuit
from saeguard.errors import BrokenFile, UnsupportedFormat
from saeguard.loaders import open_sae, open_source
from saeguard.loaders.source import Hints, Source
from saeguard.sites import Site
from tests.damage import surprises
from tests.lookalikes import LOOKALIKES
from tests.lookalikes.base import D_IN, D_SAE, TOP_K, inputs
from tests.lookalikes.single_files import (
    BUSSMANN,
    ITDA,
    KISSANE,
    LINEAR,
    NEEL,
    PLAIN,
    UNIT,
    T,
    apollo,
    pursue,
    write,
    write_itda,
)  # fmt: skip

FAMILIES = ("linear_relu", "nanda", "apollo_e2e", "mistral_sae", "bussmann", "itda")
OURS = [name for name, like in LOOKALIKES.items() if like.family in FAMILIES]
MISTRAL = {"w_enc": T["W_enc"], "b_enc": T["b_enc"], "w_dec": T["W_dec"], "b_pre": T["b_dec"]}
HOOKS = ("blocks-2-hook_resid_pre", "blocks-6-hook_resid_pre")


# what TransformerLens did to the model


@pytest.mark.parametrize(("hook", "norm"), [
    ("blocks.5.hook_resid_pre", "center"), ("blocks.5.hook_resid_mid", "center"),
    ("blocks.5.hook_resid_post", "center"),
    ("blocks.5.hook_attn_out", "center"), ("blocks.5.hook_mlp_out", "center"), ("blocks.5.attn.hook_z", "none"),
    ("blocks.5.mlp.hook_post", "none"), ("blocks.5.ln2.hook_normalized", "none"),
])  # fmt: skip
def test_streams_that_were_written_with_centred_weights_are_centred(hook, norm, tmp_path):
    sae = load_sae(write("a.pt", PLAIN, {"a_cfg.json": KISSANE | {"act_name": hook}})(tmp_path))

    assert sae.norm == norm


def test_release_that_knows_better_decides_whether_a_stream_is_centred(tmp_path):
    config = KISSANE | {"act_name": "blocks.5.hook_resid_pre"}
    source = Source(write("a.pt", PLAIN, {"a_cfg.json": config})(tmp_path))

    found = [open_source(source, Hints(overrides={"center_writing_weights": said})).norm for said in (True, False)]

    assert found == ["center", "none"]


def test_heads_side_by_side_lack_the_bias_of_the_values(tmp_path):
    z, out = (load_sae(write("a.pt", PLAIN, {"a_cfg.json": KISSANE | {"act_name": f"blocks.5.{hook}"}})(tmp_path))
              for hook in ("attn.hook_z", "hook_attn_out"))  # fmt: skip

    assert z.manifest["processing"] == {"fold_value_biases": True, "fold_ln": True}
    assert "processing" not in out.manifest


def test_models_of_transformer_lens_have_the_hubs_names(tmp_path):
    names = [load_sae(write("a.pt", PLAIN, {"a_cfg.json": KISSANE | {"model_name": name}})(tmp_path)).model
             for name in ("gpt2-small", "gelu-2l")]  # fmt: skip

    assert names == ["gpt2", "gelu-2l"]


# linear_relu


def test_layer_is_in_the_name_of_the_file_or_nowhere(tmp_path):
    named, unnamed = (
        load_sae(write(file, LINEAR, give=file)(tmp_path)) for file in ("Llama-3.2-1B-SAE-l9.pt", "sae.pt")
    )

    assert (str(named.site), named.model) == ("resid_post.9", "meta-llama/Llama-3.2-1B")
    assert (unnamed.site, unnamed.model) == (None, None)
    assert unnamed.manifest["site_unknown"] == "the file's name has no layer, as in -SAE-l19"


# nanda


@pytest.mark.parametrize("change", [{"head": 3, "concat_heads": False}, {"concat_heads": False}, {"head": 3}])
def test_sae_of_one_head_is_refused(change, tmp_path):
    with pytest.raises(UnsupportedFormat, match="it reads one head of a site"):
        load_sae(write("a.pt", PLAIN, {"a_cfg.json": KISSANE | change})(tmp_path))


def test_folder_of_several_saes_asks_for_a_file(tmp_path):
    write("a.pt", PLAIN, {"a_cfg.json": KISSANE})(tmp_path)
    write("b.pt", PLAIN, {"b_cfg.json": KISSANE})(tmp_path)

    with pytest.raises(UnsupportedFormat, match="2 SAEs are in it. Name the file"):
        load_sae(tmp_path)

    assert load_sae(tmp_path / "b.pt").name == "b"


@pytest.mark.parametrize(("said", "why"), [
    ({}, "its config names no hook"), ({"site": "q", "layer": 0},
    "site 'blocks.0.hook_q': that is not a stream and a layer"),
    ({"act_name": "ln_final.hook_normalized"}, "site 'ln_final.hook_normalized'"),
])  # fmt: skip
def test_hook_that_is_no_stream_leaves_the_site_open_and_says_why(said, why, tmp_path):
    folder = write("25.pt", PLAIN, {"25_cfg.json": NEEL | said})(tmp_path)

    assert load_sae(folder).manifest["site_unknown"].startswith(why)
    assert load_sae(folder, "mlp_post.0").site == Site("mlp_post", 0)


@pytest.mark.parametrize(("key", "value"), [
    ("act_size", 17), ("act_size", "16"), ("dict_size", True), ("act_name", 5), ("model_name", 1), ("seq_len", "128"),
    ("concat_heads", "yes"), ("layer", -1), ("site", ["z"]),
])  # fmt: skip
def test_value_of_a_wrong_kind_in_a_config_is_broken(key, value, tmp_path):
    with pytest.raises(BrokenFile, match=f"{key} is"):
        load_sae(write("a.pt", PLAIN, {"a_cfg.json": KISSANE | {key: value}})(tmp_path))


# apollo_e2e


def test_several_hooks_are_listed_when_none_or_another_is_asked_for(tmp_path):
    path = write("samples_4.pt", apollo(*HOOKS), give="samples_4.pt")(tmp_path)

    for site in (None, "resid_post.6"):
        with pytest.raises(
            UnsupportedFormat, match="SAEs of blocks.2.hook_resid_pre, blocks.6.hook_resid_pre. Say which"
        ):
            load_sae(path, site)


def test_folder_of_several_moments_of_a_run_asks_for_a_file(tmp_path):
    for count in (200, 400):
        write(f"samples_{count}.pt", apollo(HOOKS[0]))(tmp_path)

    with pytest.raises(UnsupportedFormat, match="2 files of it match .* Name the file"):
        load_sae(tmp_path)

    assert load_sae(tmp_path / "samples_400.pt").name == "samples_400/blocks.2.hook_resid_pre"


def test_one_hook_is_read_at_the_site_that_is_given(tmp_path):
    sae = load_sae(write("samples_4.pt", apollo(HOOKS[0]))(tmp_path), "resid_post.1")

    assert str(sae.site) == "resid_post.1"


def test_hook_of_apollo_that_is_no_stream_leaves_the_site_open(tmp_path):
    sae = load_sae(write("samples_4.pt", apollo("blocks-2-ln1-hook_scale"))(tmp_path))

    assert (sae.site, sae.norm) == (None, "none")
    assert sae.manifest["site_unknown"].startswith("site 'blocks.2.ln1.hook_scale'")


@pytest.mark.parametrize(("key", "value"), [("tlens_model_name", 3), ("tlens_model_path", ["a"])])
def test_config_of_apollo_of_a_wrong_kind_is_broken(key, value, tmp_path):
    with pytest.raises(BrokenFile, match=f"{key} is"):
        load_sae(write("samples_4.pt", apollo(HOOKS[0]), {"final_config.yaml": {key: value}})(tmp_path))


# mistral_sae


def test_mistral_sae_asks_for_top_k(tmp_path):
    with pytest.raises(UnsupportedFormat, match=r"how many latents are active at a token is not in it.*top_k=128"):
        load_sae(write("a.pt", MISTRAL)(tmp_path))


def test_mistral_sae_needs_fewer_active_latents_than_there_are(tmp_path):
    with pytest.raises(BrokenFile, match=f"top_k is {D_SAE + 1}"):
        load_sae(write("a.pt", MISTRAL)(tmp_path), top_k=D_SAE + 1)


# bussmann


def _bussmann(tmp_path, tensors=PLAIN, **change):
    return write("sae.pt", tensors, {"config.json": BUSSMANN | change})(tmp_path)


def test_batchtopk_without_a_threshold_is_refused_because_it_would_depend_on_the_batch(tmp_path):
    with pytest.raises(UnsupportedFormat, match="the largest activations of a whole batch and stores no threshold"):
        load_sae(_bussmann(tmp_path, sae_type="batchtopk"))


@pytest.mark.parametrize("kind", ["gated", None])
def test_type_that_is_not_known_is_refused_with_those_that_are(kind, tmp_path):
    with pytest.raises(UnsupportedFormat, match="It reads vanilla, topk, jumprelu"):
        load_sae(_bussmann(tmp_path, sae_type=kind))


@pytest.mark.parametrize(("key", "value"), [
    ("top_k", None), ("top_k", 0), ("top_k", "32"), ("input_unit_norm", 1), ("act_size", 17), ("dict_size", 1.5),
    ("hook_point", 8), ("model_name", 1), ("sae_type", 1), ("dataset_path", {}), ("top_k", D_SAE + 1),
])  # fmt: skip
def test_value_of_a_wrong_kind_in_bussmanns_config_is_broken(key, value, tmp_path):
    with pytest.raises(BrokenFile, match=f"{key} "):
        load_sae(_bussmann(tmp_path, **{key: value}))


def test_tensors_of_another_type_are_broken(tmp_path):
    log = {"jumprelu.log_threshold": T["threshold"].log()}

    for tensors, kind in ((PLAIN, "jumprelu"), (PLAIN | log, "topk"), (PLAIN | log, "vanilla")):
        with pytest.raises(BrokenFile):
            load_sae(_bussmann(tmp_path, tensors, sae_type=kind))


def test_norm_makes_centring_needless_and_without_it_the_stream_is_centred(tmp_path):
    found = [load_sae(_bussmann(tmp_path, input_unit_norm=said)).norm for said in (True, False, None)]

    assert found == ["layer_norm", "center", "center"]


# itda


def test_pursuit_has_the_rounds_of_its_metadata_or_forty(tmp_path):
    said = load_sae(write_itda(UNIT, ITDA)(tmp_path))
    silent = load_sae(write_itda(UNIT, {key: value for key, value in ITDA.items() if key != "k"})(tmp_path))

    assert said.pursuit == Pursuit(TOP_K, signed=True)
    assert silent.pursuit == Pursuit(40, signed=True)


def test_atom_that_is_taken_twice_adds_up(tmp_path):
    """Of two atoms at a sharp angle each takes out what the other put back, so coefficients are sums over rounds."""
    atoms = torch.nn.functional.normalize(torch.eye(D_IN)[:2] + 0.8, dim=1)
    x = torch.randn(1, 9, D_IN, generator=torch.Generator().manual_seed(3))

    sae = load_sae(write_itda(atoms, ITDA | {"k": 2})(tmp_path))

    assert torch.allclose(sae.encode(x), pursue(x, atoms, 2), atol=1e-5)


@pytest.mark.parametrize(("submodule", "layer", "site"), [
    (None, 3, "resid_post.3"), (None, None, None), ("model.layers.4", 3, "resid_post.4"), ("transformer.h", 3, None),
])  # fmt: skip
def test_site_of_atoms_is_the_submodule_or_the_stream_behind_the_layer(submodule, layer, site, tmp_path):
    sae = load_sae(write_itda(UNIT, ITDA | {"submodule_name": submodule, "layer": layer})(tmp_path))

    assert (str(sae.site) if sae.site else None) == site
    assert ("site_unknown" in sae.manifest) == (site is None)


@pytest.mark.parametrize(("key", "value"), [
    ("k", 0), ("k", True), ("k", 6.0), ("k", D_SAE + 1), ("activation_dim", 17), ("layer", -3), ("layer", "3"),
    ("lm_name", 3),
    ("submodule_name", 3), ("layer", 10**12),
])  # fmt: skip
def test_metadata_that_cannot_be_is_broken(key, value, tmp_path):
    with pytest.raises(BrokenFile, match=f"{key} is"):
        load_sae(write_itda(UNIT, ITDA | {key: value})(tmp_path))


@pytest.mark.parametrize("atoms", [
    torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(4, D_IN, dtype=torch.long), {"a": UNIT, "b": UNIT}, {},
    torch.zeros(0, D_IN),
])  # fmt: skip
def test_atoms_that_are_no_matrix_are_broken(atoms, tmp_path):
    with pytest.raises(BrokenFile):
        load_sae(write("atoms.pt", atoms, {"metadata.yaml": ITDA})(tmp_path))


def test_metadata_with_aliases_is_broken(tmp_path):
    folder = write_itda(UNIT, ITDA)(tmp_path)
    (folder / "metadata.yaml").write_text("a: &a [1]\nb: *a\n")

    with pytest.raises(BrokenFile, match="alias"):
        load_sae(folder)


# all of them


@pytest.mark.parametrize(("name", "broken"), [
    ("linear_relu", {"encoder.bias": torch.zeros(3)}), ("linear_relu", {"decoder.weight": torch.zeros(D_SAE, D_IN)}),
    ("nanda_z", {"W_dec": torch.zeros(D_IN, D_SAE)}), ("nanda_z", {"b_dec": torch.zeros(D_IN, dtype=torch.int32)}),
    ("apollo_e2e", {"blocks-6-hook_resid_pre.encoder.0.bias": torch.zeros(1)}),
    ("apollo_e2e", {"blocks-6-hook_resid_pre.encoder.0.weight": torch.zeros(1)}),
    ("mistral_sae", {"b_pre": torch.zeros(D_SAE)}), ("mistral_sae", {"w_enc": torch.full((D_IN, D_SAE), torch.nan)}),
    ("bussmann_topk", {"W_enc": torch.zeros(D_SAE, D_IN)}), ("bussmann_topk", {"b_enc": torch.zeros(1)}),
])  # fmt: skip
def test_tensors_of_wrong_shapes_or_kinds_are_broken(name, broken, tmp_path):
    like = LOOKALIKES[name]
    source = like.write(tmp_path)
    path = next(path for path in tmp_path.rglob("*.pt"))
    torch.save(dict(torch.load(path)) | broken, path)

    with pytest.raises(BrokenFile):
        load_sae(source, **like.options)


@pytest.mark.parametrize("name", ["linear_relu", "nanda_z", "apollo_e2e", "mistral_sae", "bussmann_jumprelu", "itda"])
def test_files_cut_anywhere_raise_only_our_errors(name, tmp_path):
    assert surprises(LOOKALIKES[name], tmp_path) == []


def test_every_look_alike_names_its_format_what_was_folded_and_its_bos(tmp_path):
    for name in OURS:
        like, folder = LOOKALIKES[name], tmp_path / name
        folder.mkdir()
        manifest = open_sae(like.write(folder), **like.options).manifest

        assert manifest["format"] == like.family
        assert isinstance(manifest["folds"], list)
        assert manifest["bos"] in (True, None)
        assert json.loads(json.dumps(manifest)) == manifest
        assert yaml.safe_load(yaml.dump(manifest)) == manifest


def _as_stored(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(raw)


def _with_b_enc(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return raw | {"b_enc": raw["b_enc"] - raw["b_dec"] @ raw["W_enc"]}


MUTANTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "b_dec not taken off": ("nanda_z", lambda stored: replace(stored, fold=_as_stored)),
    "mean left in": ("nanda_resid", lambda stored: replace(stored, norm="none")),
    "topk as relu": ("mistral_sae", lambda stored: replace(stored, activation="relu", top_k=None)),
    "b_enc not ignored": ("bussmann_topk", lambda stored: replace(stored, fold=_with_b_enc)),
    "log threshold as it is": ("bussmann_jumprelu", lambda stored: replace(stored, fold=_as_stored)),
    "input not normalised": ("bussmann_vanilla", lambda stored: replace(stored, norm="center")),
    "signs lost": ("itda", lambda stored: replace(stored, pursuit=Pursuit(TOP_K))),
}


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_wrong_loader_would_be_caught(mutant, tmp_path):
    name, change = MUTANTS[mutant]
    like, x = LOOKALIKES[name], inputs()

    wrong = change(open_sae(like.write(tmp_path), **like.options)).sae()

    assert not torch.allclose(wrong.encode(x), like.acts(x), atol=1e-2)


def test_decoder_that_is_not_normalised_would_be_caught(tmp_path):
    like, x = LOOKALIKES["apollo_e2e_own"], inputs()

    wrong = replace(open_sae(like.write(tmp_path)), fold=_as_stored).sae()

    assert not torch.allclose(wrong.decode(wrong.encode(x)), like.decode(like.acts(x), x), atol=1e-2)
