"""What loading promises beyond the equations: no hint is ignored, no file is trusted twice, and one SAE is one SAE."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saeguard import Ablate, Clamp, Plan, Rule, Site, load_sae, open_sae, save_sae, steer
from saeguard.engines.corrections import on_plain_weights
from saeguard.engines.hf import HuggingFace
from saeguard.errors import AmbiguousSAE, BrokenFile, LatentOutOfRange, LoadError, UnsupportedFormat
from saeguard.loaders.convert import convert
from saeguard.loaders.native import FILE
from tests.lookalikes import LOOKALIKES
from tests.tiny import fresh_model, prompt, tiny_model, tiny_sae

LIKE = LOOKALIKES["goodfire"]
ROOT = Path(__file__).resolve().parent.parent


pytestmark = pytest.mark.usefixtures("without_type_checks")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_sae(tiny_sae(), tmp_path / "tiny")
    return tmp_path / "tiny"


def test_convert_runs_nothing_that_lies_in_the_current_folder(tmp_path):
    """A downloaded folder may hold a yaml.py, and python -m looks for modules in the current folder first."""
    source = LIKE.write(tmp_path)
    for module in ("yaml", "torch", "json", "saeguard"):
        (tmp_path / f"{module}.py").write_text(
            "import pathlib; pathlib.Path('touched').touch(); raise ImportError('mine')"
        )
    code = f"from saeguard.loaders.convert import convert; convert({str(source)!r}, 'ours')"

    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "touched").exists()
    assert (tmp_path / "ours" / FILE).is_file()


def test_convert_replaces_a_file_only_when_told_and_never_one_of_its_source(folder, tmp_path):
    source = LIKE.write(tmp_path)
    written = convert(source, tmp_path / "ours")

    with pytest.raises(UnsupportedFormat, match="a file is there already. Name another target, or pass overwrite=True"):
        convert(source, tmp_path / "ours")
    assert convert(source, tmp_path / "ours", overwrite=True) == written
    with pytest.raises(UnsupportedFormat, match="beside the source's own"):
        convert(folder, folder, overwrite=True)


@pytest.mark.parametrize(("repo", "path", "norm"), [
    ("jbloom--GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre", "center"),
    ("somebody--their-own", "blocks.8.hook_resid_pre", "none"),
])  # fmt: skip
def test_facts_that_only_a_release_knows_hold_for_its_files_in_the_hubs_cache(repo, path, norm, tmp_path):
    """The same files gave other activations by their address than by their release."""
    place = tmp_path / f"models--{repo}" / "snapshots" / ("0" * 40) / path
    place.parent.mkdir(parents=True)
    LOOKALIKES["saelens legacy"].write(tmp_path / "made").rename(place)

    assert open_sae(place, "resid_pre.8").norm == norm


def test_one_sae_read_in_two_ways_is_not_edited_twice(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    rules = (Rule("tiny", (5, 6), Ablate()), Rule("./tiny", (5,), Clamp(2.0, when="always")))

    with pytest.raises(AmbiguousSAE, match="both are one SAE, read twice"), steer(tiny_model(), Plan(rules)):
        pass


def test_loaded_weights_do_not_follow_their_file(folder):
    sae, x = load_sae(folder), torch.randn(4, 32)
    before = sae.encode(x)

    with (folder / FILE).open("r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(b"\x40" * 4000)
    os.truncate(folder / FILE, 100)

    assert torch.equal(sae.encode(x), before)


@pytest.mark.parametrize("latents", [None, (3, 4)])
def test_file_that_changes_between_its_header_and_its_numbers_is_refused(folder, latents):
    stored = open_sae(folder)
    save_sae(replace(tiny_sae(seed=1), name="another"), folder)

    with pytest.raises(BrokenFile, match="it changed while it was read"):
        stored.sae(latents)


@pytest.mark.parametrize(("hints", "text"), [
    ({"top_k": 5}, "an SAE of its kind has no top_k. Leave top_k away"),
    ({"input_scale": 3.7}, "an SAE of its kind has no input_scale"),
    ({"top_k": -3}, "that is no count of latents"), ({"top_k": 2.5}, "that is no count"), ({"top_k": True}, "no count"),
    ({"input_scale": 0}, "that is no factor"), ({"input_scale": "3"}, "that is no factor"),
    ({"input_scale": float("inf")}, "that is no factor"),
    ({"site_out": "mlp_out.3"}, "its files hold an SAE, which writes where it reads"),
])  # fmt: skip
def test_hint_that_changes_nothing_is_refused(hints, text, folder):
    with pytest.raises(UnsupportedFormat, match=text):
        load_sae(folder, **hints)


@pytest.mark.parametrize("name", ["sparsify", "saelens standard", "gemma_scope res", "llama_scope"])
def test_plain_sae_does_not_become_a_transcoder_by_a_hint(name, tmp_path):
    like = next(like for key, like in LOOKALIKES.items() if key.startswith(name) and like.site and not like.site_out)

    with pytest.raises(UnsupportedFormat, match="which writes where it reads"):
        load_sae(like.write(tmp_path), **like.options, site_out="mlp_out.3")


def test_folder_of_one_layer_does_not_stand_for_another(tmp_path):
    folder = LOOKALIKES["openai_v5"].write(tmp_path)

    with pytest.raises(UnsupportedFormat, match="0 files of it match .* and are of layer 3"):
        load_sae(folder.parent if folder.is_file() else folder, "resid_post.3")


@pytest.mark.parametrize("latents", [[1.5], [True], ["3"], 5, [None]])
def test_latents_that_are_none_are_refused(latents, folder):
    with pytest.raises(LatentOutOfRange, match=r"Give latents=\[3, 17\]"):
        load_sae(folder, latents=latents)


@pytest.mark.parametrize("latents", [torch.tensor([4, 3]), np.array([4, 3]), (np.int64(4), 3), range(4, 2, -1)])
def test_integers_of_any_kind_are_latents(latents, folder):
    assert load_sae(folder, latents=latents).held == (4, 3)


@pytest.mark.parametrize("source", [None, ["a", "b"], ("gpt2-small-res-jb",), 5, ("a", 3)])
def test_source_that_is_none_is_refused(source):
    with pytest.raises(UnsupportedFormat, match="Give a str, a Path, or a tuple of two str"):
        load_sae(source)


def test_release_without_an_id_is_explained():
    with pytest.raises(UnsupportedFormat, match=r"that is a release of several SAEs.*\(release, id\)"):
        load_sae("gpt2-small-res-jb", "blocks.8.hook_resid_pre")


@pytest.mark.parametrize(
    "manifest", [{"special_ids": "ab"}, {"special_ids": [1.5]}, {"model_shape": 5}, {"processing": 3}]
)
def test_manifest_that_steering_could_not_read_is_refused(manifest, tmp_path):
    with pytest.raises(LoadError):
        load_sae(save_sae(replace(tiny_sae(), manifest=manifest), tmp_path / "sae"))


def test_what_saving_writes_can_be_read_or_is_refused(tmp_path):
    sae, x = tiny_sae(), torch.randn(3, 32)
    tied = replace(sae, W_dec=sae.W_enc.T, b_enc=torch.zeros(48), maximum=None, eps=1, norm="layer_norm")

    ours = load_sae(save_sae(tied, tmp_path / "tied"))

    assert torch.allclose(ours.encode(x), tied.encode(x), atol=1e-6)
    for value in (float("nan"), np.float32(3), object()):
        with pytest.raises(UnsupportedFormat, match="its manifest does not go into JSON"):
            save_sae(replace(sae, manifest={"x": value}), tmp_path / "bad")
    assert not list((tmp_path / "bad").glob("*.safetensors"))


def test_arithmetic_is_float32_under_autocast():
    sae, x = tiny_sae(), torch.randn(9, 32)
    f = sae.encode(x)
    x_hat, some = sae.decode(f), sae.encode_at(x, (3, 5))

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sae.encode(x), f)
        assert torch.equal(sae.encode_at(x, (3, 5)), some)
        assert torch.equal(sae.decode(f), x_hat)


def test_key_tells_apart_what_edits_differently():
    sae = tiny_sae()
    others = [replace(sae, maximum=torch.ones(48)), replace(sae, manifest={"processing": {"fold_ln": True}})]

    assert len({one.key for one in [sae, *others]}) == 3


def test_site_that_a_rule_names_settles_the_corrections_of_a_file_that_names_none(tmp_path):
    """Kissane's files were trained behind TransformerLens's processing, wherever a rule puts them."""
    source = LOOKALIKES["nanda_first"].write(tmp_path)
    engine = HuggingFace(fresh_model("gpt2"))
    told, silent = load_sae(source, "resid_pre.1"), load_sae(source)

    assert (told.norm, silent.norm) == ("center", "none")
    assert on_plain_weights(silent, engine, Site("resid_pre", 1)).norm == "center"
    assert on_plain_weights(silent, HuggingFace(tiny_model("llama")), Site("resid_pre", 1)).norm == "none"
    assert on_plain_weights(silent, engine, Site("mlp_post", 1)).norm == "none"


def test_norm_of_each_token_cannot_be_shifted():
    with pytest.raises(UnsupportedFormat, match="before the norm of each token"):
        replace(tiny_sae(), norm="layer_norm").shifted(torch.ones(32))


def test_bussmann_behind_value_biases_and_a_norm_is_refused(tmp_path):
    like = LOOKALIKES["bussmann_topk"]

    with pytest.raises(UnsupportedFormat, match="took the values' bias off attn_z"):
        load_sae(like.write(tmp_path), "attn_z.2")


def test_partly_read_saes_steer_as_whole_ones_do(folder):
    model, ids = tiny_model(), prompt(2, 9)
    rule = Rule(str(folder), (5, 40), Clamp(3.0, when="active"))

    with torch.no_grad(), steer(model, Plan((rule,))) as partly:
        found = model(ids).logits
    with torch.no_grad(), steer(model, Plan((rule,)), saes={str(folder): load_sae(folder)}):
        whole = model(ids).logits

    assert torch.equal(found, whole)
    assert partly.saes[str(folder)].held == (5, 40)
