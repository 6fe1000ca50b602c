"""Gemma Scope 1 and 2: what a path or a config says, what is refused by name, and which mistakes show."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saeguard import SAE, Site, load_sae
from saeguard.errors import BrokenFile, LoadError, MissingSite, UnsupportedFormat
from saeguard.loaders import open_sae
from tests.damage import refused
from tests.lookalikes import LOOKALIKES
from tests.lookalikes.base import D_IN, D_SAE, LookAlike, Tensors, inputs
from tests.lookalikes.gemma_scope import AFFINE, FIRST, SCALED, SECOND, WIDER, config_of, write_npz, write_params

PLACE = "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
SECOND_PLACE = "gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium"
IN, OUT = "model.layers.13.pre_feedforward_layernorm.output", "model.layers.13.post_feedforward_layernorm.output"
RESID = "model.layers.13.output"
BOTH = {"site": "mlp_in.1", "site_out": "mlp_out.1"}


@pytest.mark.parametrize(("repository", "site", "model"), [
    ("gemma-scope-2b-pt-res", "resid_post.12", "google/gemma-2-2b"),
    ("models--google--gemma-scope-9b-it-res/snapshots/f00", "resid_post.12", "google/gemma-2-9b-it"),
    ("gemma-scope-27b-pt-res", "resid_post.12", "google/gemma-2-27b"),
    ("gemma-scope-2b-pt-mlp", "mlp_out.12", "google/gemma-2-2b"),
    ("gemma-scope-9b-pt-att", "attn_z.12", "google/gemma-2-9b"),
])  # fmt: skip
def test_gemma_scope_site_and_model_come_from_the_path(repository, site, model, tmp_path):
    stored = open_sae(write_npz(f"{repository}/layer_12/width_16k/average_l0_82", FIRST)(tmp_path))

    assert (str(stored.site), stored.model) == (site, model)
    assert stored.name.startswith("gemma-scope-")
    assert stored.name.endswith("/layer_12/width_16k/average_l0_82")
    assert stored.manifest == {
        "format": "gemma_scope",
        "architecture": "jumprelu",
        "folds": [],
        "l0": 82,
        "bos": True,
    }


def test_gemma_scope_path_is_found_from_inside_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(write_npz(PLACE, FIRST)(tmp_path))

    assert str(load_sae("params.npz").site) == "resid_post.12"


@pytest.mark.parametrize(("place", "model", "says"), [
    ("mine", None, "no folder gemma-scope-...-res"),
    ("layer_12/width_16k/average_l0_82", None, "no folder gemma-scope"),
    ("gemma-scope-2b-pt-res/mine", "google/gemma-2-2b", "no folder layer_.../width_"),
    ("not-gemma-scope-2b-pt-res/layer_1/width_16k/canonical", None, "no folder gemma-scope"),
    ("gemma-scope-2b-pt-res/player_1/width_16k/canonical", "google/gemma-2-2b", "no folder layer_"),
])  # fmt: skip
def test_gemma_scope_outside_its_folders_has_no_site_and_says_why(place, model, says, tmp_path):
    sae = load_sae(write_npz(place, FIRST)(tmp_path))

    assert (sae.site, sae.model) == (None, model)
    assert says in sae.manifest["site_unknown"]


def test_gemma_scope_outside_its_folders_takes_the_site_that_is_given(tmp_path):
    stored = open_sae(write_npz("mine", FIRST)(tmp_path), "resid_post.3", model="google/gemma-2-2b-it")

    assert (stored.site, stored.site_out, stored.model) == (Site("resid_post", 3), None, "google/gemma-2-2b-it")
    assert "site_unknown" not in stored.manifest


@pytest.mark.parametrize(("place", "stored", "given", "says"), [
    ("gemma-scope-2b-pt-transcoders/mine", FIRST, {}, "the path has no folder layer_"),
    ("gemma-scope-2b-pt-transcoders/mine", FIRST, {"site": "mlp_normed.3"}, "the path has no folder layer_"),
    ("gemma-scope-2b-pt-transcoders/embedding/width_4k/canonical", FIRST, {}, "the path has no folder layer_"),
    ("mine", WIDER, {}, "no folder gemma-scope-...-res, -mlp, -att or -transcoders"),
    ("mine", FIRST, {"site_out": "mlp_out.3"}, "no folder gemma-scope"),
    (PLACE, WIDER, {}, "no folder gemma-scope-...-transcoders"),
])  # fmt: skip
def test_gemma_scope_transcoder_without_both_sites_is_refused(place, stored, given, says, tmp_path):
    folder = write_npz(place, {key: tensor for key, tensor in stored.items() if key != "skip"})(tmp_path)

    with pytest.raises(MissingSite, match=says) as caught:
        load_sae(folder, **given)
    assert "Say site=... and site_out=..." in str(caught.value)


def without(stored: Tensors, name: str) -> Tensors:
    return {key: tensor for key, tensor in stored.items() if key != name}


FIRST_BROKEN: dict[str, tuple[Tensors, str]] = {
    "one more": (FIRST | {"W_skip": FIRST["b_enc"]}, "'W_skip'"),
    "one less": (without(FIRST, "threshold"), "tensors ['W_dec', 'W_enc', 'b_dec', 'b_enc']"),
    "two spellings": (FIRST | {"w_enc": FIRST["W_enc"]}, "'w_enc'"),
    "transposed": (FIRST | {"W_enc": FIRST["W_enc"].T}, "b_enc is (48,) torch.float32, not floating point (16,)"),
    "vector": (FIRST | {"W_enc": FIRST["b_dec"]}, "W_enc is (16,), not a matrix"),
    "one threshold": (FIRST | {"threshold": torch.ones(())}, "threshold is ()"),
    "integers": (FIRST | {"b_dec": torch.zeros(D_IN, dtype=torch.int32)}, "b_dec is (16,) torch.int32"),
    "infinite": (FIRST | {"b_dec": torch.full((D_IN,), torch.inf)}, "b_dec holds NaN or infinity"),
    "one scale": (FIRST | {"scaling_factor": torch.ones(1)}, "scaling_factor is (1,)"),
}


@pytest.mark.parametrize("name", FIRST_BROKEN)
def test_gemma_scope_archive_of_other_tensors_is_refused(name, tmp_path):
    stored, text = FIRST_BROKEN[name]

    with pytest.raises(BrokenFile) as caught:
        load_sae(write_npz(PLACE, stored)(tmp_path))
    assert text in str(caught.value)


def test_archive_without_an_encoder_is_of_no_family(tmp_path):
    np.savez(tmp_path / "params.npz", other=np.zeros(3))

    with pytest.raises(UnsupportedFormat, match="no loader recognises it"):
        load_sae(tmp_path)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickle_in_a_gemma_scope_archive_is_refused_and_never_executed(tmp_path):
    folder = write_npz(PLACE, FIRST)(tmp_path)
    arrays = {name: tensor.numpy() for name, tensor in FIRST.items()}
    trap = np.array([Trap(tmp_path / "sprung")] * D_IN, dtype=object)
    np.savez(folder / "params.npz", allow_pickle=True, **arrays | {"b_dec": trap})

    with pytest.raises(LoadError, match="Python objects are never read"):
        load_sae(folder)
    assert not (tmp_path / "sprung").exists()


def test_compressed_gemma_scope_archive_loads_too(tmp_path):
    sae, x = load_sae(write_npz(PLACE, FIRST, np.savez_compressed)(tmp_path)), inputs()

    torch.testing.assert_close(sae.encode(x), LOOKALIKES["gemma_scope res"].acts(x), atol=1e-5, rtol=1e-5)


def test_gemma_scope_2_manifest_says_l0_and_where_the_tokens_began(tmp_path):
    stored = open_sae(write_params(SECOND_PLACE, SECOND, config_of(RESID))(tmp_path))

    assert stored.name == SECOND_PLACE
    assert stored.manifest == {
        "format": "gemma_scope_2",
        "architecture": "jumprelu",
        "folds": [],
        "l0": 150,
        "bos": True,
    }


def test_gemma_scope_2_folder_that_disagrees_with_its_config_is_named_in_the_manifest(tmp_path):
    folder = write_params(SECOND_PLACE, SECOND, config_of("model.layers.14.self_attn.o_proj.input"))(tmp_path)

    stored = open_sae(folder)

    assert stored.site == Site("attn_z", 14)
    said = "the folder says resid_post.13, config.json attn_z.14, and that holds"
    assert stored.manifest["path_disagrees"] == said


@pytest.mark.parametrize(("said", "model"), [
    ("google/gemma-3-4b-pt", "google/gemma-3-4b-pt"), ("gemma-v3-4b-it", "google/gemma-3-4b-it"),
    ("gemma-3-270m-pt", "google/gemma-3-270m"), ("gemma-v3-270m-it", "google/gemma-3-270m-it"),
    (None, "google/gemma-3-1b-pt"),
])  # fmt: skip
def test_gemma_scope_2_model_gets_the_name_that_it_has_on_the_hub(said, model, tmp_path):
    folder = write_params(SECOND_PLACE, SECOND, config_of(RESID, model_name=said))(tmp_path)

    assert open_sae(folder).model == model
    assert open_sae(folder, model="mine").model == "mine"


def test_gemma_scope_2_hook_that_is_no_stream_leaves_the_site_open_and_says_why(tmp_path):
    folder = write_params("mine", SECOND, config_of("model.layers.3.self_attn.output"))(tmp_path)

    assert open_sae(folder).site is None
    assert "'model.layers.3.self_attn.output' is no stream" in open_sae(folder).manifest["site_unknown"]
    assert open_sae(folder, "attn_out.3").site == Site("attn_out", 3)


def test_gemma_scope_2_outside_its_folders_has_no_site_and_says_why(tmp_path):
    assert "there is no config.json" in open_sae(write_params("mine", SECOND)(tmp_path)).manifest["site_unknown"]


@pytest.mark.parametrize(("place", "stored", "said", "given", "says"), [
    ("mine", AFFINE, None, {}, "there is no config.json"),
    ("mine", WIDER, None, {"site": "mlp_in.3"}, "there is no config.json"),
    ("mine", SECOND, None, {"site_out": "mlp_out.3"}, "there is no config.json"),
    (SECOND_PLACE, AFFINE, None, {}, "nothing says where what it reads from resid_post.13 goes"),
    ("mine", SECOND, config_of(IN, "model.layers.13.mlp.output"), {}, "hf_hook_point_out 'model.layers.13.mlp.output'"),
    ("mine", SECOND, config_of(IN), {}, "config.json: hf_hook_point_out is 'model.layers.13.pre_feed"),
    ("mine", SECOND, config_of(RESID, type="transcoder"), {}, "hf_hook_point_out is 'model.layers.13.output'"),
    ("mine", AFFINE, config_of(RESID, affine_connection=True), {}, "hf_hook_point_out is 'model.layers.13.output'"),
])  # fmt: skip
def test_gemma_scope_2_transcoder_without_both_sites_is_refused(place, stored, said, given, says, tmp_path):
    folder = write_params(place, stored, said)(tmp_path)

    with pytest.raises(MissingSite, match=says) as caught:
        load_sae(folder, **given)
    assert "Say site=... and site_out=..." in str(caught.value)
    assert (str(open_sae(folder, **BOTH).site), str(open_sae(folder, **BOTH).site_out)) == ("mlp_in.1", "mlp_out.1")


@pytest.mark.parametrize(("said", "says"), [
    (config_of(RESID, architecture="topk"), "its architecture is 'topk'. Read is jump_relu."),
    (without(config_of(RESID), "architecture"), "its architecture is None"),
    (config_of(RESID, type="crosscoder"), "it is a crosscoder, which reads or writes several sites"),
    (config_of(RESID, type="clt"), "it is a clt, which"),
    (config_of("model.layers.{5,9,12,15}.output"), "the sites 'model.layers.{5,9,12,15}.output' at once"),
    (config_of(IN, "model.layers.{all}.post_feedforward_layernorm.output"), "{all}"),
])  # fmt: skip
def test_gemma_scope_2_variant_that_is_no_sae_of_one_site_is_refused(said, says, tmp_path):
    with pytest.raises(UnsupportedFormat) as caught:
        load_sae(write_params(SECOND_PLACE, SECOND, said)(tmp_path))
    assert says in str(caught.value)


SECOND_BROKEN: dict[str, tuple[Tensors, dict[str, Any] | None, str]] = {
    "hook a number": (SECOND, config_of(RESID, hf_hook_point_in=3), "hf_hook_point_in is 3"),
    "hook out a list": (SECOND, config_of(RESID, hf_hook_point_out=["a"]), "hf_hook_point_out is ['a']"),
    "model a number": (SECOND, config_of(RESID, model_name=3), "model_name is 3"),
    "architecture a list": (SECOND, config_of(RESID, architecture=["jump_relu"]), "architecture is ['jump_relu']"),
    "type a number": (SECOND, config_of(RESID, type=1), "type is 1"),
    "l0 true": (SECOND, config_of(RESID, l0=True), "l0 is True"),
    "l0 huge": (SECOND, config_of(RESID, l0=10**400), "l0 is 1000"),
    "affine a word": (SECOND, config_of(RESID, affine_connection="no"), "affine_connection is 'no'"),
    "affine announced": (
        SECOND,
        config_of(IN, OUT, affine_connection=True),
        "and the tensor affine_skip_connection is n",
    ),
    "affine unannounced": (AFFINE, config_of(IN, OUT), "affine_connection is False and the tensor"),
    "one more": (SECOND | {"other": torch.ones(3)}, None, "tensors ['other']"),
    "transposed": (SECOND | {"W_enc": SECOND["W_enc"].T.contiguous()}, None, "b_enc is (48,) torch.float32, not"),
    "other decoder": (
        SECOND | {"W_dec": SECOND["W_dec"].T.contiguous()},
        None,
        "b_dec is (16,) torch.float32, not floating point (48,)",
    ),
    "skip transposed": (WIDER | {"skip": WIDER["skip"].T.contiguous()}, None, "affine_skip_connection is (10, 16)"),
    "integers": (SECOND | {"threshold": torch.ones(D_SAE, dtype=torch.int8)}, None, "threshold is (48,) torch.int8"),
    "not finite": (SECOND | {"b_enc": torch.full((D_SAE,), torch.nan)}, None, "b_enc holds NaN"),
}


@pytest.mark.parametrize("name", SECOND_BROKEN)
def test_gemma_scope_2_folder_that_contradicts_itself_is_refused(name, tmp_path):
    stored, said, text = SECOND_BROKEN[name]

    with pytest.raises(BrokenFile) as caught:
        load_sae(write_params(SECOND_PLACE, stored, said)(tmp_path))
    assert text in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", "{", '{"l0": NaN}', '{"l0": 1, "l0": 2}', "[" * 100_000, "\xff", ""])
def test_gemma_scope_2_config_that_is_no_config_is_refused(text, tmp_path):
    folder = write_params(SECOND_PLACE, SECOND, {})(tmp_path)
    (folder / "config.json").write_bytes(text.encode("latin-1"))

    with pytest.raises(BrokenFile):
        load_sae(folder)


def differs(like: LookAlike, mutant: SAE) -> bool:
    """Whether a test that compares with the look-alike would fail."""
    x, f = inputs(), like.acts(inputs())
    right = torch.allclose(mutant.encode(x), f, atol=1e-3) and torch.allclose(
        mutant.decode(f, x), like.decode(f, x), atol=1e-3
    )
    return not right


MUTANTS: dict[str, tuple[str, Callable[[SAE], SAE]]] = {
    "skip transposed": ("gemma_scope_2 affine", lambda sae: replace(sae, skip=AFFINE["skip"].T)),
    "skip forgotten": ("gemma_scope_2 affine", lambda sae: replace(sae, skip=None)),
    "embedding not scaled": ("gemma_scope embedding", lambda sae: replace(sae, **FIRST)),
    "embedding's bias not scaled": ("gemma_scope embedding", lambda sae: replace(sae, b_dec=FIRST["b_dec"])),
    "thresholds below 0": ("gemma_scope it", lambda sae: replace(sae, threshold=FIRST["threshold"] - 0.4)),
    "scale forgotten": ("gemma_scope finetuned", lambda sae: replace(sae, W_dec=SCALED["W_dec"])),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_look_alike_tells_a_wrong_fold_from_the_right_one(name, tmp_path):
    like, change = LOOKALIKES[MUTANTS[name][0]], MUTANTS[name][1]
    sae = load_sae(like.write(tmp_path), **like.options)

    assert not differs(like, sae)
    assert differs(like, change(sae))


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(("write", "name"), [
    (write_npz(PLACE, FIRST), "params.npz"),
    (write_params(SECOND_PLACE, SECOND, config_of(RESID)), "params.safetensors"),
    (write_params(SECOND_PLACE, SECOND, config_of(RESID)), "config.json"),
])  # fmt: skip
def test_truncated_or_damaged_gemma_scope_files_end_in_load_errors_only(write, name, tmp_path):
    folder = write(tmp_path)
    path = folder / name
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for n in range(0, len(whole), max(len(whole) // 150, 1)):
        path.write_bytes(whole[:n])

        assert refused(folder), f"{n} of {len(whole)} bytes"
    for _ in range(200):
        place, byte = (int(torch.randint(n, (1,), generator=generator)) for n in (min(len(whole), 600), 256))
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        refused(folder)


def test_weights_of_another_layout_beside_a_gemma_scope_config_are_not_taken_for_it(tmp_path):
    save_file({"W_enc": FIRST["W_enc"], "b_enc": FIRST["b_enc"]}, tmp_path / "params.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_of(RESID)))

    with pytest.raises(UnsupportedFormat, match="no loader recognises it"):
        load_sae(tmp_path)
