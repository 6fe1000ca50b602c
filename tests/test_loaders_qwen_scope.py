# ruff: noqa: E501  one case of the table is one line
"""Qwen-Scope: which of a folder's layers is meant, what its config may say, and readings that would be wrong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saeguard import SAE, load_sae
from saeguard.errors import BrokenFile, LoadError, UnsafePickle, UnsupportedFormat
from saeguard.loaders import open_sae
from tests.damage import refused
from tests.lookalikes import LOOKALIKES
from tests.lookalikes.base import D_IN, D_SAE, TOP_K, LookAlike, Tensors, inputs
from tests.lookalikes.qwen_scope import CONFIG, MANY, REPOSITORY, write

SQUARE = {"W_enc": MANY["W_enc"][:, :D_IN], "b_enc": MANY["b_enc"][:D_IN], "W_dec": MANY["W_dec"][:D_IN]}


def folder_of(root: Path, **changes: Any) -> Path:
    return write(MANY, CONFIG | changes)(root)


def spoiled(folder: Path, changes: Tensors) -> Path:
    path = folder / "layer3.sae.pt"
    torch.save(torch.load(path, weights_only=True) | changes, path)
    return folder


def test_folder_of_many_layers_needs_a_site_or_a_file(tmp_path):
    folder = write(MANY, layers=(0, 3, 12))(tmp_path)

    with pytest.raises(UnsupportedFormat, match=r"3 files of it match .* Name the file, or say site"):
        load_sae(folder)
    with pytest.raises(UnsupportedFormat, match="0 files of it match"):
        load_sae(folder, "resid_post.4")
    assert open_sae(folder, "resid_post.3").name == f"{REPOSITORY}/layer3"
    assert str(open_sae(folder / "layer0.sae.pt").site) == "resid_post.0"


def test_folder_with_one_layer_does_not_stand_for_another(tmp_path):
    with pytest.raises(UnsupportedFormat, match=r"0 files of it match .* and are of layer 5"):
        load_sae(write(MANY)(tmp_path), "resid_post.5")


def test_site_that_is_given_with_a_file_is_taken(tmp_path):
    assert str(open_sae(write(MANY)(tmp_path) / "layer3.sae.pt", "resid_pre.4").site) == "resid_pre.4"


def test_manifest_says_that_saelens_adds_a_relu(tmp_path):
    manifest = open_sae(write(MANY)(tmp_path)).manifest

    assert manifest["gate"] == "the k largest as they are, as its model card says; SAELens sets those below 0 to 0"
    assert manifest["bos"] is False, "Qwen's tokenizers have no BOS token"


def test_hook_point_that_is_no_stream_leaves_the_site_open(tmp_path):
    sae = load_sae(folder_of(tmp_path, hook_point="expert_out"))

    assert sae.site is None
    assert sae.manifest["site_unknown"] == "config.json names the hook point 'expert_out', which is not a stream"


def test_square_encoder_is_as_the_format_has_it(tmp_path):
    """With as many latents as inputs no shape tells which way round a matrix is."""
    sae = load_sae(write(MANY | SQUARE, CONFIG | {"d_sae": D_IN})(tmp_path))

    assert torch.equal(sae.W_enc, SQUARE["W_enc"])
    assert torch.equal(sae.W_dec, SQUARE["W_dec"])


@pytest.mark.parametrize("config", [{}, {"config": None}])
def test_another_k_than_that_of_the_files_is_refused(config, tmp_path):
    with pytest.raises(UnsupportedFormat, match=f"top_k=3: its files say top_k {TOP_K}. Leave top_k away"):
        open_sae(write(MANY, *config.values())(tmp_path), top_k=3)


REFUSED: dict[str, tuple[type[LoadError], str, Callable[[Path], Path]]] = {
    "no k": (UnsupportedFormat, "says how many latents are active. Give top_k=....", lambda r: write(MANY, None, "x")(r)),
    "other type": (UnsupportedFormat, "its model_type is 'jumprelu_sae'", lambda r: folder_of(r, model_type="jumprelu_sae")),
    "type a list": (BrokenFile, "model_type is ['topk_sae'], not text", lambda r: folder_of(r, model_type=["topk_sae"])),
    "k true": (BrokenFile, "k is True, not a whole number", lambda r: folder_of(r, k=True)),
    "k zero": (BrokenFile, "k is 0, not between 1 and 48", lambda r: folder_of(r, k=0)),
    "k too large": (BrokenFile, "k is 49, not between 1 and 48", lambda r: folder_of(r, k=D_SAE + 1)),
    "other width": (BrokenFile, "d_model is 48, and the weights have 16", lambda r: folder_of(r, d_model=D_SAE)),
    "other d_sae": (BrokenFile, "d_sae is 16, and the weights have 48", lambda r: folder_of(r, d_sae=D_IN)),
    "model a number": (BrokenFile, "base_model is 3, not text", lambda r: folder_of(r, base_model=3)),
    "hook a mapping": (BrokenFile, "hook_point is {}, not text", lambda r: folder_of(r, hook_point={})),
    "our orientation": (
        BrokenFile, "b_enc is (48,) torch.float32, not floating point (16,)",
        lambda r: spoiled(folder_of(r), {"W_enc": MANY["W_enc"], "W_dec": MANY["W_dec"]}),
    ),
    "decoder transposed": (BrokenFile, "W_dec is (48, 16)", lambda r: spoiled(folder_of(r), {"W_dec": MANY["W_dec"]})),
    "three axes": (BrokenFile, "W_enc is (1, 48, 16)", lambda r: spoiled(folder_of(r), {"W_enc": MANY["W_enc"].T[None]})),
    "one more": (BrokenFile, "it holds 'threshold'", lambda r: spoiled(folder_of(r), {"threshold": torch.ones(D_SAE)})),
    "integers": (BrokenFile, "b_dec is (16,) torch.int64", lambda r: spoiled(folder_of(r), {"b_dec": torch.arange(D_IN)})),
    "not finite": (
        BrokenFile, "b_enc holds NaN or infinity", lambda r: spoiled(folder_of(r), {"b_enc": torch.full((D_SAE,), torch.inf)})
    ),
    "code": (UnsafePickle, "Path", lambda r: spoiled(folder_of(r), {"where": Path("x")})),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name, tmp_path):
    error, text, put = REFUSED[name]

    with pytest.raises(error) as caught:
        load_sae(put(tmp_path))
    assert text in str(caught.value)


def differs(like: LookAlike, mutant: SAE) -> bool:
    """Whether a test that compares with the look-alike would fail."""
    return not torch.allclose(mutant.encode(inputs()), like.acts(inputs()), atol=1e-3)


MUTANTS: dict[str, tuple[str, Callable[[SAE], SAE]]] = {
    "topk as relu": ("one layer", lambda sae: replace(sae, activation="relu", top_k=None)),
    "topk with a relu": ("few positive", lambda sae: replace(sae, activation="topk")),
    "b_dec taken off x": ("one layer", lambda sae: replace(sae, b_enc=sae.b_enc - sae.b_dec @ sae.W_enc)),
    "other layer": ("many layers", lambda sae: replace(sae, W_enc=sae.W_enc * 2)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_look_alike_tells_a_wrong_reading_from_the_right_one(name, tmp_path):
    like, change = LOOKALIKES[f"qwen_scope {MUTANTS[name][0]}"], MUTANTS[name][1]
    sae = load_sae(like.write(tmp_path), **like.options)

    assert not differs(like, sae)
    assert differs(like, change(sae))


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", ["layer3.sae.pt", "config.json"])
def test_truncated_or_damaged_files_end_in_load_errors_only(name, tmp_path):
    folder = write(MANY)(tmp_path)
    path, generator = folder / name, torch.Generator().manual_seed(0)
    whole = path.read_bytes()
    for n in range(0, len(whole), max(len(whole) // 80, 1)):
        path.write_bytes(whole[:n])

        assert refused(folder), f"{n} of {len(whole)} bytes"
    for _ in range(150):
        place, byte = (int(torch.randint(n, (1,), generator=generator)) for n in (min(len(whole), 900), 256))
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        refused(folder)
