"""circuit-tracer's transcoders: which layer, which hooks, which activation, and what is refused by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saeguard import SAE, Site, load_sae
from saeguard.errors import BrokenFile, MissingSite, UnsupportedFormat
from saeguard.loaders import open_sae
from saeguard.loaders.native import save_sae
from tests.damage import refused
from tests.lookalikes import LOOKALIKES
from tests.lookalikes.base import D_IN, D_SAE, TOP_K, LookAlike, Tensors, inputs, weights
from tests.lookalikes.circuit_tracer import CONFIG, FEW, JUMP, RUN, SKIP, as_published, write

PLAIN = weights(seed=55)
SQUARE = weights(seed=56, d_out=D_SAE)
THRESHOLD = "activation_function.threshold"


def folder_of(root: Path, **changes: Any) -> Path:
    return write(PLAIN, CONFIG | changes)(root)


@pytest.mark.parametrize(("hook", "site"), [
    ("mlp.hook_in", "mlp_in.4"), ("ln2.hook_normalized", "mlp_normed.4"), ("hook_resid_mid", "resid_mid.4"),
])  # fmt: skip
def test_input_hook_is_one_of_three_conventions(hook, site, tmp_path):
    assert str(open_sae(folder_of(tmp_path, feature_input_hook=hook)).site) == site


@pytest.mark.parametrize(("said", "given", "says"), [
    ({"feature_input_hook": "hook_mlp_in"}, {}, "feature_input_hook 'hook_mlp_in'"),
    ({"feature_input_hook": None}, {}, "feature_input_hook None"),
    ({"feature_output_hook": "mlp.hook_pre"}, {}, "feature_output_hook 'mlp.hook_pre', not two streams of ours"),
    ({"model_name": "google/gemma-2-2b"}, {}, "mlp.hook_out is one only where no norm follows the MLP"),
    ({"model_name": None}, {}, "mlp.hook_out is one only where no norm follows the MLP"),
    ({"feature_input_hook": ""}, {"site_out": "mlp_out.4"}, "feature_input_hook ''"),
])  # fmt: skip
def test_hook_that_is_no_stream_is_refused_until_both_sites_are_given(said, given, says, tmp_path):
    folder = folder_of(tmp_path, **said)

    with pytest.raises(MissingSite) as caught:
        load_sae(folder, **given)
    assert says in str(caught.value)
    assert "Say site=... and site_out=..., such as mlp_in.4" in str(caught.value)
    stored = open_sae(folder, "mlp_in.4", site_out="mlp_out.4")
    assert (stored.site, stored.site_out) == (Site("mlp_in", 4), Site("mlp_out", 4))


def test_without_a_config_the_sites_have_to_be_given(tmp_path):
    folder = write(PLAIN, None, "models--mwhanna--qwen3-14b-transcoders/snapshots/f00")(tmp_path)

    with pytest.raises(MissingSite, match=r"there is no config.yaml"):
        load_sae(folder, "mlp_in.4")
    stored = open_sae(folder, "mlp_in.4", site_out="mlp_out.4")
    assert (stored.model, stored.name) == ("Qwen/Qwen3-14B", "qwen3-14b-transcoders/layer_4")


def test_folder_of_many_layers_needs_a_site_or_a_file(tmp_path):
    folder = write(PLAIN, CONFIG, layers=(0, 1, 11))(tmp_path)

    with pytest.raises(UnsupportedFormat, match=r"3 files of it match .* Name the file, or say site"):
        load_sae(folder)
    with pytest.raises(UnsupportedFormat, match="0 files of it match"):
        load_sae(folder, "mlp_in.2")
    assert str(open_sae(folder, "mlp_in.11").site_out) == "mlp_out.11"
    assert open_sae(folder, site_out="mlp_out.1").name == "set/layer_1"
    assert str(open_sae(folder / "layer_1.safetensors").site) == "mlp_in.1"


def test_square_decoder_is_as_the_format_is_now(tmp_path):
    sae = load_sae(write(SQUARE, CONFIG)(tmp_path))

    assert torch.equal(sae.W_dec, SQUARE["W_dec"])


@pytest.mark.parametrize("name", ["wandb-config.yaml", "wanb-config.yaml"])
def test_training_config_is_read_under_either_name(name, tmp_path):
    manifest = open_sae(write(PLAIN, CONFIG, **{name: RUN})(tmp_path)).manifest

    assert manifest == {"format": "circuit_tracer", "architecture": "relu", "folds": [], "bos": None, "d_model": 16,
                        "d_feature": 48, "batch_size": 4096, "before_ln": False}  # fmt: skip


def test_another_k_than_that_of_the_config_is_refused(tmp_path):
    with pytest.raises(UnsupportedFormat, match=f"its files say top_k {TOP_K}"):
        open_sae(folder_of(tmp_path, activation="topk", k=TOP_K), top_k=3)

    assert open_sae(write(PLAIN, CONFIG | {"activation": "topk"}, "other")(tmp_path), top_k=3).top_k == 3


def test_k_for_thresholds_is_refused(tmp_path):
    with pytest.raises(UnsupportedFormat, match="an SAE of its kind has no top_k"):
        open_sae(write(JUMP, CONFIG)(tmp_path), top_k=3)


UNSUPPORTED: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "clt": (PLAIN, {"model_kind": "cross_layer_transcoder"}, "its model_kind is 'cross_layer_transcoder'"),
    "other activation": (PLAIN, {"activation": "gelu"}, "its activation is 'gelu'. Read are relu, topk and jumprelu."),
    "no k": (PLAIN, {"activation": "topk"}, "its activation is topk, and nothing says k. Say it: top_k=...."),
    "k alone": (PLAIN, {"k": 128}, "it says k 128 and no activation, so whether it ranks is open"),
}
BROKEN: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "relu with a threshold": (JUMP, {"activation": "relu"}, f"its activation is relu, and {THRESHOLD} is there"),
    "topk with a threshold": (JUMP, {"activation": "topk", "k": 4}, f"activation is topk, and {THRESHOLD} is there"),
    "no threshold": (PLAIN, {"activation": "jumprelu"}, f"its activation is jumprelu, and {THRESHOLD} is not there"),
    "k true": (PLAIN, {"activation": "topk", "k": True}, "k is True, not a whole number"),
    "k zero": (PLAIN, {"activation": "topk", "k": 0}, "k is 0"),
    "k too large": (PLAIN, {"activation": "topk", "k": D_SAE + 1}, "top_k is 49"),
    "k in the file zero": (PLAIN | {"k": torch.tensor(0)}, {}, "not one whole number from 1"),
    "k in the file a fraction": (PLAIN | {"k": torch.tensor(3.5)}, {}, "not one whole number from 1"),
    "ks in the file": (PLAIN | {"k": torch.ones(2, dtype=torch.int64)}, {}, "not one whole number from 1"),
    "kind a number": (PLAIN, {"model_kind": 3}, "model_kind is 3, not text"),
    "model a list": (PLAIN, {"model_name": ["a"]}, "model_name is ['a'], not text"),
    "hook a number": (PLAIN, {"feature_input_hook": 3}, "feature_input_hook is 3, not text"),
    "hook out a mapping": (PLAIN, {"feature_output_hook": {}}, "feature_output_hook is {}, not text"),
    "activation a number": (PLAIN, {"activation": 1}, "activation is 1, not text"),
    "one more": (PLAIN | {"log_thresholds": torch.ones(D_SAE)}, {}, "tensors ['log_thresholds']"),
    "encoder transposed": (PLAIN | {"W_enc": PLAIN["W_enc"].T.contiguous()}, {}, "W_enc is (16, 48) torch.float32"),
    "decoder of another width": (PLAIN | {"W_dec": torch.zeros(D_SAE, 3)}, {}, "W_dec is (48, 3)"),
    "bias with two axes": (PLAIN | {"b_enc": torch.zeros(D_SAE, 1)}, {}, "b_enc and b_dec are [(48, 16), (48, 1)"),
    "skip transposed": (SKIP | {"skip": SKIP["skip"].T.contiguous()}, {}, "W_skip is (16, 10)"),
    "integers": (PLAIN | {"b_dec": torch.zeros(D_IN, dtype=torch.int16)}, {}, "b_dec is (16,) torch.int16"),
    "not finite": (PLAIN | {"b_enc": torch.full((D_SAE,), torch.inf)}, {}, "b_enc holds NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_variant_that_is_not_read_is_refused_by_name(name, tmp_path):
    stored, changes, text = UNSUPPORTED[name]

    with pytest.raises(UnsupportedFormat) as caught:
        load_sae(write(stored, CONFIG | changes)(tmp_path))
    assert text in str(caught.value)


@pytest.mark.parametrize("name", BROKEN)
def test_folder_that_contradicts_itself_is_refused(name, tmp_path):
    stored, changes, text = BROKEN[name]

    with pytest.raises(BrokenFile) as caught:
        load_sae(write(stored, CONFIG | changes)(tmp_path))
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["config.yaml", "wandb-config.yaml"])
@pytest.mark.parametrize(
    "text", ["- 1", "{", "a: &x 1\nb: *x", "a: 1\na: 2", "a: !!python/object:os.system {}", "\0", "1: 2"]
)
def test_config_that_is_no_plain_mapping_is_refused(name, text, tmp_path):
    folder = folder_of(tmp_path)
    (folder / name).write_text(text)

    with pytest.raises(BrokenFile):
        load_sae(folder)


def test_run_whose_entries_are_no_mappings_is_refused(tmp_path):
    with pytest.raises(BrokenFile, match="d_model is 16, not a mapping"):
        load_sae(write(PLAIN, CONFIG, **{"wandb-config.yaml": {"d_model": 16}})(tmp_path))


def test_our_own_file_under_a_layer_name_is_ours(tmp_path):
    sae = load_sae(folder_of(tmp_path))

    ours = load_sae(save_sae(sae, tmp_path / "layer_9.safetensors"))

    assert (ours.site, ours.site_out) == (sae.site, sae.site_out)


def differs(like: LookAlike, mutant: SAE) -> bool:
    """Whether a test that compares with the look-alike would fail."""
    x, f = inputs(), like.acts(inputs())
    return not (
        torch.allclose(mutant.encode(x), f, atol=1e-3)
        and torch.allclose(mutant.decode(f, x), like.decode(f, x), atol=1e-3)
    )


MUTANTS: dict[str, tuple[str, Callable[[SAE], SAE]]] = {
    "topk as relu": ("topk", lambda sae: replace(sae, activation="relu", top_k=None)),
    "topk with a relu": ("topk", lambda sae: replace(sae, activation="topk")),
    "jumprelu as relu": ("jumprelu", lambda sae: replace(sae, activation="relu", threshold=None)),
    "jumprelu with a relu": ("jumprelu", lambda sae: replace(sae, threshold=JUMP[THRESHOLD].clamp_min(0.0))),
    "skip forgotten": ("skip", lambda sae: replace(sae, skip=None)),
    "b_dec taken off x": ("relu", lambda sae: replace(sae, b_enc=sae.b_enc - sae.b_dec @ sae.W_enc)),
    "other layer": ("many", lambda sae: replace(sae, W_enc=sae.W_enc * 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_look_alike_tells_a_wrong_reading_from_the_right_one(name, tmp_path):
    like, change = LOOKALIKES[f"circuit_tracer {MUTANTS[name][0]}"], MUTANTS[name][1]
    sae = load_sae(like.write(tmp_path), **like.options)

    assert not differs(like, sae)
    assert differs(like, change(sae))


def test_kept_activations_of_topk_may_be_below_zero():
    """circuit-tracer's TopK gates p itself: what is among the k largest counts, even below 0."""
    f = LOOKALIKES["circuit_tracer topk"].acts(inputs())

    assert bool((f < 0).any())
    assert FEW["b_enc"].max() < 0


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", ["layer_4.safetensors", "config.yaml", "wandb-config.yaml"])
def test_truncated_or_damaged_files_end_in_load_errors_only(name, tmp_path):
    """Half a YAML file may be a whole one, so only what is cut off weights has to be noticed."""
    folder = write(JUMP | SKIP | {"W_dec": SKIP["W_dec"]}, CONFIG, **{"wandb-config.yaml": RUN})(tmp_path)
    path = folder / name
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for n in range(0, len(whole), max(len(whole) // 150, 1)):
        path.write_bytes(whole[:n])

        assert refused(folder) or name.endswith(".yaml"), f"{n} of {len(whole)} bytes"
    for _ in range(200):
        place, byte = (int(torch.randint(n, (1,), generator=generator)) for n in (min(len(whole), 500), 256))
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        refused(folder)


def test_file_of_a_layer_with_other_tensors_is_of_no_family(tmp_path):
    save_file({"W_enc": as_published(PLAIN)["W_enc"]}, tmp_path / "layer_0.safetensors")

    with pytest.raises(UnsupportedFormat, match="no loader recognises it"):
        load_sae(tmp_path)
