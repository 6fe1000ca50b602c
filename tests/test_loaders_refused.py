"""Layouts that are known and not read are refused with their reason, and hostile files end in one error."""

import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from saeguard import load_sae
from saeguard.errors import LoadError, UnsafePickle, UnsupportedFormat
from saeguard.loaders import LOADERS
from saeguard.loaders.source import Source
from tests.lookalikes import LOOKALIKES

D, N, LAYERS = 8, 20, 3


def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}


def gemma_scope_2_clt(root: Path) -> Path:
    folder = root / "clt" / "width_262k_l0_medium_affine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "type": "clt"}))
    layer = tensors(w_enc=(D, N), b_enc=(N,), threshold=(N,), w_dec=(N, LAYERS, D), b_dec=(D,))
    for i in range(LAYERS):
        save_file(layer | tensors(affine_skip_connection=(D, D)), folder / f"params_layer_{i}.safetensors")
    return folder


def gemma_scope_2_layer(root: Path) -> Path:
    return gemma_scope_2_clt(root) / "params_layer_1.safetensors"


def gemma_scope_2_in_one_file(root: Path) -> Path:
    layer = tensors(w_enc=(D, N), b_enc=(N,), threshold=(N,), w_dec=(N, LAYERS, D), b_dec=(D,))
    save_file(layer, root / "params.safetensors")
    return root


def circuit_tracer_clt(root: Path) -> Path:
    for i in range(LAYERS):
        encoder = {f"W_enc_{i}": (N, D), f"b_enc_{i}": (N,), f"b_dec_{i}": (D,), f"threshold_{i}": (N,)}
        save_file(tensors(**encoder), root / f"W_enc_{i}.safetensors")
        save_file(tensors(**{f"W_dec_{i}": (N, LAYERS - i, D)}), root / f"W_dec_{i}.safetensors")
    (root / "config.yaml").write_text(yaml.safe_dump({"model_kind": "cross_layer_transcoder", "model_name": "a/b"}))
    return root


def circuit_tracer_layer(root: Path) -> Path:
    return circuit_tracer_clt(root) / "W_dec_0.safetensors"


def circuit_tracer_list(root: Path) -> Path:
    listed = ["hf://google/gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_76/params.npz?revision=main"]
    (root / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", "transcoders": listed}))
    return root


def nanda_crosscoder(root: Path) -> Path:
    (root / "cfg.json").write_text(
        json.dumps({"seed": 49, "dict_size": N, "d_in": D, "hook_point": "blocks.14.hook_resid_pre"})
    )
    torch.save(tensors(W_enc=(2, D, N), W_dec=(N, 2, D), b_enc=(N,), b_dec=(2, D)), root / "cc_weights.pt")
    return root


def jkminder_crosscoder(root: Path) -> Path:
    (root / "config.json").write_text(json.dumps({"activation_dim": D, "dict_size": N, "num_layers": 2}))
    stored = tensors(encoder__weight=(2, D, N), encoder__bias=(N,), decoder__weight=(2, N, D), decoder__bias=(2, D))
    save_file(stored, root / "model.safetensors")
    return root


def newer_jkminder_crosscoder(root: Path) -> Path:
    """It carries statistics of its input, as the fork's BatchTopKSAE does."""
    stored = tensors(encoder__weight=(2, D, N), encoder__bias=(N,), decoder__weight=(2, N, D), decoder__bias=(2, D),
                     activation_mean=(2, D), activation_std=(2, D), activation_global_scale=(), target_rms=(),
                     code_normalization_id=())  # fmt: skip
    save_file(stored, jkminder_crosscoder(root) / "model.safetensors")
    return root


def temporal(root: Path) -> Path:
    (root / "conf.yaml").write_text(yaml.safe_dump({"llm": {"dimin": D}, "sae": {"exp_factor": 2.5}}))
    attention = {f"attn_layers__0__{name}__weight": (D, D) for name in ("k_ctx", "q_target", "v_ctx", "c_proj")}
    save_file(tensors(D=(N, D), b=(D,), E=(D, N), **attention), root / "latest_ckpt.safetensors")
    return root


def itda_transcoder(root: Path) -> Path:
    (root / "cfg.json").write_text(json.dumps({"d_model": D, "target_l0": 4, "dictionary_size": N}))
    save_file(tensors(xs=(N, D), ys=(N, D), mean_x=(D,), mean_y=(D,), weight=(D, D)), root / "sae.safetensors")
    return root


def interrupted(root: Path) -> Path:
    """A state dict of a module and that of its Adam, after one step."""
    model = nn.Module()
    model.encoder, model.decoder = nn.Linear(D, N), nn.Linear(N, D)
    adam = torch.optim.Adam(model.parameters())
    model.decoder(model.encoder(torch.ones(D))).sum().backward()
    adam.step()
    state = {"step": 1000, "ae": model.state_dict(), "optimizer": adam.state_dict(), "norm_factor": 2.5}
    torch.save(state, root / "ae.pt")
    trainer = {"dict_class": "AutoEncoder", "trainer_class": "StandardTrainer", "activation_dim": D, "dict_size": N}
    (root / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return root


def interrupted_file(root: Path) -> Path:
    return interrupted(root).joinpath("ae.pt").rename(root / "ae_1000.pt")


def packed_pickle(root: Path) -> Path:
    path = root / "sae.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps({"cfg": 3})))
    return path


def folder_of_pickles(root: Path) -> Path:
    packed_pickle(root)
    return root


Write = Callable[[Path], Path]
REFUSED: dict[str, tuple[Write, str]] = {
    "gemma scope 2 clt": (gemma_scope_2_clt, "it reads or writes several layers at once"),
    "gemma scope 2 layer": (gemma_scope_2_layer, "it reads or writes several layers at once"),
    "gemma scope 2 one file": (gemma_scope_2_in_one_file, "it reads or writes several layers at once"),
    "circuit-tracer clt": (circuit_tracer_clt, "a latent writes to its own layer and to all that follow"),
    "circuit-tracer clt layer": (circuit_tracer_layer, "a latent writes to its own layer and to all that follow"),
    "circuit-tracer list": (circuit_tracer_list, "its config.yaml lists weights that lie elsewhere"),
    "nanda crosscoder": (nanda_crosscoder, "it reads and writes two models at once"),
    "nanda crosscoder's file": (lambda root: nanda_crosscoder(root) / "cc_weights.pt", "two models at once"),
    "jkminder crosscoder": (jkminder_crosscoder, "it reads and writes several models or layers at once"),
    "newer jkminder crosscoder": (newer_jkminder_crosscoder, "it reads and writes several models or layers at once"),
    "temporal": (temporal, "through attention of its own"),
    "itda transcoder": (itda_transcoder, "its activations are found by gradient pursuit"),
    "interrupted training": (interrupted, "a training run saved it midway, with its optimizer"),
    "interrupted training's file": (interrupted_file, "a training run saved it midway"),
    "packed pickle": (packed_pickle, "only code can read it, and code in files is never run"),
    "folder of pickles": (folder_of_pickles, "only code can read it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_known_layout_is_refused_with_its_reason(name, tmp_path):
    write, text = REFUSED[name]

    with pytest.raises(UnsupportedFormat) as caught:
        load_sae(write(tmp_path), "resid_post.1", site_out="mlp_out.1", top_k=4)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_known_layout_is_recognised_by_nobody_else(name, tmp_path):
    source = REFUSED[name][0](tmp_path)

    assert [family for family, loader in LOADERS.items() if loader.recognises(Source(source))] == ["refused"]


@pytest.mark.parametrize("name", sorted(LOOKALIKES))
def test_layout_that_is_read_is_not_refused(name, tmp_path):
    assert not LOADERS["refused"].recognises(Source(LOOKALIKES[name].write(tmp_path)))


class Cfg:
    """What Dunefsky's transcoders have inside: an object of a class, which only its code can build."""

    def __init__(self, trap: Path):
        self.trap = trap

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trap),)


HOSTILE_NAMES = ("gpt2-small_L8_transcoder.pt", "ae.pt", "sae.pt", "cc_weights.pt", "params.npz", "params.safetensors",
                 "params_layer_0.safetensors", "layer_3.safetensors", "W_enc_0.safetensors", "latest_ckpt.safetensors",
                 "sae.safetensors", "model.safetensors", "x.pkl.gz")  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize("in_folder", [False, True])
def test_pickled_class_ends_in_one_error_under_any_name(name, in_folder, tmp_path):
    folder = tmp_path / "sae"
    folder.mkdir()
    torch.save({"cfg": Cfg(tmp_path / "sprung"), "state_dict": tensors(W_enc=(D, N), b_enc=(N,))}, folder / name)
    (folder / "cfg.json").write_text("{}")

    with pytest.raises(LoadError):
        load_sae(folder if in_folder else folder / name)
    assert not (tmp_path / "sprung").exists()


def test_pickled_class_is_named(tmp_path):
    torch.save({"cfg": Cfg(tmp_path / "sprung"), "state_dict": tensors(W_enc=(D, N))}, tmp_path / "transcoder.pt")

    with pytest.raises(UnsafePickle, match="mkdir"):
        load_sae(tmp_path / "transcoder.pt")


@pytest.mark.parametrize("name", HOSTILE_NAMES)
@pytest.mark.parametrize(
    "content", [b"", b"\0", b"PK\3\4", b"PK\5\6" + bytes(18), bytes(8) + b"{}", b"\x80\2}.", b"\xff" * 600]
)
def test_file_of_anything_ends_in_one_error_under_any_name(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text("{}")

    for source in (tmp_path, tmp_path / name):
        with pytest.raises(LoadError):
            load_sae(source)


def test_list_of_circuit_tracer_that_is_no_yaml_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [")

    with pytest.raises(LoadError, match="it is not YAML"):
        load_sae(tmp_path)
