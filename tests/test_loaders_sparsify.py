# ruff: noqa: E501  one case of the table is one line
"""sparsify: which module a folder's name means, when b_dec is taken off x, and readings that would be wrong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saeguard import SAE, load_sae
from saeguard.errors import BrokenFile, LoadError, MissingSite, UnsupportedFormat
from saeguard.loaders import open_sae
from tests.damage import refused
from tests.lookalikes import LOOKALIKES
from tests.lookalikes.base import D_IN, D_SAE, TOP_K, LookAlike, Tensors, inputs, weights
from tests.lookalikes.sparsify import EXPANDED, NOW, OLD, RUN, SKIP, write

T = weights(seed=125)
TRANSCODER = NOW | {"transcode": True}


def folder_of(root: Path, module: str = "layers.3", run: dict[str, Any] | None = RUN, **changes: Any) -> Path:
    return write(T, NOW | changes, module, run)(root)


def spoiled(folder: Path, changes: Tensors, drop: str = "") -> Path:
    path = folder / "sae.safetensors"
    stored = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    save_file(stored | {name: tensor.contiguous() for name, tensor in changes.items()}, path)
    return folder


@pytest.mark.parametrize(("module", "site"), [
    ("layers.3", "resid_post.3"), ("h.11", "resid_post.11"), ("layers_3", "resid_post.3"),
    ("gpt_neox.layers.0", "resid_post.0"), ("layers.0.mlp", "mlp_out.0"), ("layers.2.attention", "attn_out.2"),
    ("layers.2.self_attn", "attn_out.2"), ("h.2.attn", "attn_out.2"),
])  # fmt: skip
def test_folder_is_the_module_whose_output_is_read(module, site, tmp_path):
    assert str(open_sae(folder_of(tmp_path, module)).site) == site


@pytest.mark.parametrize(("module", "sites"), [
    ("layers.3", ("resid_pre.3", "resid_post.3")), ("h.3.mlp", ("mlp_in.3", "mlp_out.3")),
])  # fmt: skip
def test_transcoder_reads_its_module_s_input_and_writes_its_output(module, sites, tmp_path):
    stored = open_sae(folder_of(tmp_path, module, transcode=True))

    assert (str(stored.site), str(stored.site_out)) == sites


@pytest.mark.parametrize(("module", "why"), [
    ("embed_tokens", "it reads token embeddings; where nothing is added to them or scales them, that is resid_pre.0"),
    ("h.3.mlp.act", "its name is not that of a block, its MLP or its attention"),
    ("checkpoint", "its name is not that of a block, its MLP or its attention"),
])  # fmt: skip
def test_module_that_is_no_site_leaves_it_open(module, why, tmp_path):
    sae = load_sae(folder_of(tmp_path, module))

    assert sae.site is None
    assert sae.manifest["site_unknown"] == why
    assert str(load_sae(folder_of(tmp_path / "given", module), "resid_pre.0").site) == "resid_pre.0"


@pytest.mark.parametrize("module", ["layers.3.self_attn", "h.3.mlp.act", "embed_tokens"])
def test_transcoder_whose_ends_are_no_sites_needs_both(module, tmp_path):
    folder = folder_of(tmp_path, module, transcode=True)

    with pytest.raises(MissingSite, match=r"does not say a known site for both its ends. Give site=... and site_out"):
        load_sae(folder)
    stored = open_sae(folder, "mlp_in.3", site_out="mlp_out.3")
    assert (str(stored.site), str(stored.site_out)) == ("mlp_in.3", "mlp_out.3")


def test_module_that_a_norm_follows_is_not_what_the_stream_is_given(tmp_path):
    """Gemma 2 norms what its MLP puts out before it is added: an SAE of the MLP itself has no site of ours."""
    run = RUN | {"model": "google/gemma-2-2b"}

    sae = load_sae(folder_of(tmp_path, "layers.3.mlp", run))

    assert sae.site is None
    assert sae.manifest["site_unknown"].startswith("in google/gemma-2-2b a norm follows that module")
    with pytest.raises(MissingSite, match="in google/gemma-2-2b a norm follows that module"):
        load_sae(folder_of(tmp_path / "2", "layers.3.mlp", run, transcode=True))
    assert str(open_sae(folder_of(tmp_path / "3", "layers.3", run)).site) == "resid_post.3"


def test_manifest_says_that_it_is_the_module_s_own_output(tmp_path):
    manifest = open_sae(folder_of(tmp_path, "layers.3.mlp")).manifest

    assert manifest["site_note"].startswith("the module's own output")
    assert manifest["hookpoint"] == "layers.3.mlp"
    assert (manifest["dataset"], manifest["context"], manifest["bos"]) == (RUN["dataset"], 2048, None)
    assert "site_note" not in open_sae(folder_of(tmp_path / "block")).manifest


def test_name_is_that_of_the_run_and_the_module(tmp_path):
    assert open_sae(folder_of(tmp_path)).name == "run/layers.3"
    assert open_sae(folder_of(tmp_path, "layers.4/seed2", None)).name == "layers.4/seed2".replace(
        "layers", "run/layers"
    )
    cached = tmp_path / "models--EleutherAI--sae-pythia-70m-32k" / "snapshots" / "f00"
    assert open_sae(folder_of(cached)).name == "sae-pythia-70m-32k/layers.3"


def test_config_of_something_else_in_the_folder_above_is_not_read(tmp_path):
    stored = open_sae(folder_of(tmp_path, run={"model": "x", "transcode": True, "architectures": []}))

    assert (stored.model, stored.site_out) == (None, None)


@pytest.mark.parametrize(("cfg", "transcodes", "subtracts"), [
    (OLD, False, True), (SKIP, True, True), (NOW, False, True), (TRANSCODER, True, False),
    (TRANSCODER | {"skip_connection": True}, True, False),
])  # fmt: skip
def test_b_dec_is_taken_off_x_unless_the_config_says_transcode(cfg, transcodes, subtracts, tmp_path):
    """Before February 2025 transcoders took it off too, and their configs have no such key."""
    t = T | (weights("skip", seed=126) if cfg.get("skip_connection") else {})

    sae = load_sae(write(t, cfg, "layers.6.mlp")(tmp_path))

    assert sae.is_transcoder == transcodes
    assert torch.equal(sae.b_enc, t["b_enc"]) != subtracts


def test_num_latents_of_zero_or_none_is_the_expanded_width(tmp_path):
    for n, cfg in enumerate((NOW, EXPANDED, OLD)):
        assert open_sae(write(T, cfg, f"layers.{n}")(tmp_path / str(n))).d_sae == D_SAE


def test_square_matrices_are_as_the_format_has_them(tmp_path):
    t = {"W_enc": T["W_enc"][:, :D_IN], "b_enc": T["b_enc"][:D_IN], "W_dec": T["W_dec"][:D_IN], "b_dec": T["b_dec"]}

    sae = load_sae(write(t, NOW | {"expansion_factor": 1}, "layers.3")(tmp_path))

    assert torch.equal(sae.W_enc, t["W_enc"])
    assert torch.equal(sae.W_dec, t["W_dec"])


REFUSED: dict[str, tuple[type[LoadError], str, Callable[[Path], Path]]] = {
    "other gate": (UnsupportedFormat, "its activation is 'relu'. Known are topk", lambda r: folder_of(r, activation="relu")),
    "signed groups": (
        UnsupportedFormat, "its activation is 'groupmax', signed", lambda r: folder_of(r, activation="groupmax", signed=True)
    ),
    "uneven groups": (BrokenFile, "48 latents in 7 groups", lambda r: folder_of(r, activation="groupmax", k=7)),
    "no k": (BrokenFile, "it does not say k", lambda r: folder_of(r, k=None)),
    "k true": (BrokenFile, "k is True, not a whole number", lambda r: folder_of(r, k=True)),
    "k too large": (BrokenFile, "k is 49, not between 1 and 48", lambda r: folder_of(r, k=D_SAE + 1)),
    "other width": (BrokenFile, "d_in is 17, and the weights have 16", lambda r: folder_of(r, d_in=D_IN + 1)),
    "other latents": (BrokenFile, "it says 32 latents, and the encoder has 48", lambda r: folder_of(r, num_latents=32)),
    "other factor": (BrokenFile, "it says 64 latents", lambda r: folder_of(r, expansion_factor=4)),
    "latents text": (BrokenFile, "num_latents is '48', not a whole number", lambda r: folder_of(r, num_latents="48")),
    "flag a number": (BrokenFile, "transcode is 1, not true or false", lambda r: folder_of(r, transcode=1)),
    "signed text": (BrokenFile, "signed is 'no', not true or false", lambda r: folder_of(r, signed="no")),
    "gate a number": (BrokenFile, "activation is 0, not text", lambda r: folder_of(r, activation=0)),
    "no skip": (BrokenFile, "W_skip is not there", lambda r: folder_of(r, "layers.3.mlp", skip_connection=True)),
    "wide skip": (
        BrokenFile, "W_skip is (16, 48)", lambda r: spoiled(folder_of(r, "layers.3.mlp"), {"W_skip": T["W_enc"]})
    ),
    "decoder transposed": (BrokenFile, "W_dec is (16, 48)", lambda r: spoiled(folder_of(r), {"W_dec": T["W_dec"].T})),
    "encoder transposed": (
        BrokenFile, "encoder.bias is (48,)", lambda r: spoiled(folder_of(r), {"encoder.weight": T["W_enc"]})
    ),
    "no bias": (BrokenFile, "b_dec is not there", lambda r: spoiled(folder_of(r), {}, "b_dec")),
    "one more": (BrokenFile, "it holds 'threshold'", lambda r: spoiled(folder_of(r), {"threshold": torch.ones(D_SAE)})),
    "integers": (BrokenFile, "b_dec is (16,) torch.int64", lambda r: spoiled(folder_of(r), {"b_dec": torch.arange(D_IN)})),
    "not finite": (
        BrokenFile, "b_dec holds NaN or infinity", lambda r: spoiled(folder_of(r), {"b_dec": torch.full((D_IN,), torch.nan)})
    ),
    "no decoder": (UnsupportedFormat, "no loader recognises it", lambda r: spoiled(folder_of(r), {}, "W_dec")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name, tmp_path):
    error, text, put = REFUSED[name]

    with pytest.raises(error) as caught:
        load_sae(put(tmp_path))
    assert text in str(caught.value)


@pytest.mark.parametrize("file", ["cfg.json", "../config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{", '{"k": 1, "k": 2}', '{"k": NaN}', "\0"])
def test_config_that_is_no_plain_object_is_refused(file, text, tmp_path):
    folder = folder_of(tmp_path)
    (folder / file).write_text(text)

    with pytest.raises(BrokenFile):
        load_sae(folder)


def differs(like: LookAlike, mutant: SAE) -> bool:
    """Whether a test that compares with the look-alike would fail."""
    x, f = inputs(), like.acts(inputs())
    return not (
        torch.allclose(mutant.encode(x), f, atol=1e-3)
        and torch.allclose(mutant.decode(f, x), like.decode(f, x), atol=1e-3)
    )


def turned_skip(sae: SAE) -> SAE:
    return replace(sae, skip=None if sae.skip is None else sae.skip.T)


MUTANTS: dict[str, tuple[str, Callable[[SAE], SAE]]] = {
    "topk as relu": ("pythia", lambda sae: replace(sae, activation="relu", top_k=None)),
    "b_dec left on x": ("pythia", lambda sae: replace(sae, b_enc=sae.b_enc + sae.b_dec.float() @ sae.W_enc.float())),
    "b_dec taken off x": ("transcoder", lambda sae: replace(sae, b_enc=sae.b_enc - sae.b_dec @ sae.W_enc)),
    "signs lost": ("signed", lambda sae: replace(sae, activation="topk")),
    "groups ignored": ("groupmax", lambda sae: replace(sae, activation="topk")),
    "skip forgotten": ("skip transcoder", lambda sae: replace(sae, skip=None)),
    "skip transposed": ("skip transcoder", turned_skip),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_look_alike_tells_a_wrong_reading_from_the_right_one(name, tmp_path):
    like, change = LOOKALIKES[f"sparsify {MUTANTS[name][0]}"], MUTANTS[name][1]
    sae = load_sae(like.write(tmp_path), **like.options)

    assert not differs(like, sae)
    assert differs(like, change(sae))


def test_signed_keeps_activations_below_zero():
    f = LOOKALIKES["sparsify signed"].acts(inputs())

    assert bool((f < 0).any())
    assert int((f != 0).sum(-1).max()) == TOP_K


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", ["cfg.json", "sae.safetensors", "../config.json"])
def test_truncated_or_damaged_files_end_in_load_errors_only(name, tmp_path):
    folder = LOOKALIKES["sparsify skip transcoder"].write(tmp_path)
    path, generator = folder / name, torch.Generator().manual_seed(0)
    whole = path.read_bytes()
    for n in range(0, len(whole), max(len(whole) // 80, 1)):
        path.write_bytes(whole[:n])

        assert refused(folder), f"{n} of {len(whole)} bytes"
    for _ in range(150):
        place, byte = (int(torch.randint(n, (1,), generator=generator)) for n in (min(len(whole), 600), 256))
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        refused(folder)
