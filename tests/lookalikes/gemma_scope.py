"""Gemma Scope 1 and 2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from tests.lookalikes.base import D_IN, LookAlike, Tensors, relu_jump, weights

FIRST = weights("threshold", seed=41)
BELOW = FIRST | {"threshold": FIRST["threshold"] - 0.4}
SCALED = weights("threshold", "scaling_factor", seed=42)
SECOND = weights("threshold", seed=43)
AFFINE = weights("threshold", "skip", seed=44)
WIDER = weights("threshold", "skip", seed=45, d_out=10)
LAYER = "layer_12/width_16k/average_l0_82"
GEMMA_1B = "google/gemma-3-1b-pt"


def write_npz(
    place: str, stored: Tensors, save: Callable[..., None] = np.savez, **names: str
) -> Callable[[Path], Path]:
    """A folder of Gemma Scope 1, with some tensors under other names."""

    def write(folder: Path) -> Path:
        (folder / place).mkdir(parents=True)
        save(folder / place / "params.npz", **{names.get(key, key): t.numpy() for key, t in stored.items()})
        return folder / place

    return write


def write_params(place: str, stored: Tensors, config: dict[str, Any] | None = None) -> Callable[[Path], Path]:
    """A folder of Gemma Scope 2; ``skip`` under the name that it has there."""
    names = {"W_enc": "w_enc", "W_dec": "w_dec", "skip": "affine_skip_connection"}

    def write(folder: Path) -> Path:
        (folder / place).mkdir(parents=True)
        save_file(
            {names.get(key, key): tensor for key, tensor in stored.items()}, folder / place / "params.safetensors"
        )
        if config is not None:
            (folder / place / "config.json").write_text(json.dumps(config))
        return folder / place

    return write


def config_of(hook: str, hook_out: str | None = None, **changes: Any) -> dict[str, Any]:
    """A config of Gemma Scope 2."""
    return {"width": 16384, "model_name": GEMMA_1B, "architecture": "jump_relu", "l0": 150, "affine_connection": False,
            "hf_hook_point_in": hook, "hf_hook_point_out": hook_out or hook, "type": "sae"} | changes  # fmt: skip


def _acts(t: Tensors) -> Callable[[Tensor], Tensor]:
    return lambda x: relu_jump(x @ t["W_enc"] + t["b_enc"], t["threshold"])


def _decode(t: Tensors) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, x: f @ t["W_dec"] + t["b_dec"]


def _first(name: str, note: str, place: str, stored: Tensors = FIRST, **said: Any) -> LookAlike:
    save, names = said.pop("save", np.savez), said.pop("names", {})
    said = {"acts": _acts(stored), "decode": _decode(stored)} | said
    return LookAlike(f"gemma_scope {name}", "gemma_scope", note, write_npz(place, stored, save, **names), **said)


def _second(name: str, note: str, place: str, stored: Tensors = SECOND, **said: Any) -> LookAlike:
    write = write_params(place, stored, said.pop("config", None))
    said = {"acts": _acts(stored), "decode": _decode(stored)} | said
    return LookAlike(f"gemma_scope_2 {name}", "gemma_scope_2", note, write, **said)


def _affine(t: Tensors) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, x: f @ t["W_dec"] + t["b_dec"] + x @ t["skip"]


def _file(folder: Path) -> Path:
    return write_npz("mine", FIRST)(folder) / "params.npz"


def _other_file(folder: Path) -> Path:
    path = write_params("mine", SECOND)(folder) / "params.safetensors"
    return path.rename(path.with_name("layer_7.safetensors"))


_POST = "post_feedforward_layernorm.output"

LOOKALIKES = [
    _first("res", "JumpReLU", f"gemma-scope-2b-pt-res/{LAYER}", site="resid_post.12", model="google/gemma-2-2b"),
    _first("mlp", "JumpReLU", f"models--google--gemma-scope-9b-pt-mlp/snapshots/f00/{LAYER}", site="mlp_out.12",
           model="google/gemma-2-9b"),
    _first("att", "JumpReLU, heads side by side", "gemma-scope-2b-pt-att/layer_3/width_65k/canonical", site="attn_z.3",
           model="google/gemma-2-2b", names={"W_enc": "w_enc", "W_dec": "w_dec"}),
    _first("it", "JumpReLU, thresholds below 0", f"gemma-scope-9b-it-res-canonical/{LAYER}", BELOW,
           site="resid_post.12", model="google/gemma-2-9b-it"),
    _first("embedding", "JumpReLU, on embeddings before Gemma scales them",
           "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", site="resid_pre.0", model="google/gemma-2-2b",
           acts=lambda x: _acts(FIRST)(x / D_IN**0.5), decode=lambda f, x: _decode(FIRST)(f, x) * D_IN**0.5),
    _first("transcoder", "JumpReLU transcoder", f"gemma-scope-2b-pt-transcoders/{LAYER}", site="mlp_normed.12",
           site_out="mlp_out.12", model="google/gemma-2-2b"),
    _first("finetuned", "JumpReLU, latents scaled after training", f"gemma-scope-27b-pt-res/{LAYER}", SCALED,
           site="resid_post.12", model="google/gemma-2-27b",
           decode=lambda f, x: (f * SCALED["scaling_factor"]) @ SCALED["W_dec"] + SCALED["b_dec"]),
    LookAlike("gemma_scope alone", "gemma_scope", "JumpReLU, a file outside of its folders", _file, _acts(FIRST),
              _decode(FIRST)),
    _first("named", "JumpReLU transcoder, a folder outside of its repository", "mine", site="mlp_normed.4",
           site_out="mlp_out.4",
           options={"site": "mlp_normed.4", "site_out": "mlp_out.4", "model": "google/gemma-2-2b"}),
    _second("res", "JumpReLU", "gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium",
            config=config_of("model.layers.13.output"), site="resid_post.13", model=GEMMA_1B),
    _second("mlp", "JumpReLU", "x/y", config=config_of(f"model.layers.2.{_POST}", model_name="gemma-v3-270m-pt"),
            site="mlp_out.2", model="google/gemma-3-270m"),
    _second("att", "JumpReLU, no config", "gemma-scope-2-270m-it/attn_out_all/layer_0_width_65k_l0_small_seed_1",
            site="attn_z.0", model="google/gemma-3-270m-it"),
    _second("disagrees", "JumpReLU, in a folder of another layer",
            "gemma-scope-2-4b-it/resid_post/layer_9_width_16k_l0_big",
            config=config_of("model.language_model.layers.17.self_attn.o_proj.input", model_name="gemma-v3-4b-it"),
            site="attn_z.17", model="google/gemma-3-4b-it"),
    _second("transcoder", "JumpReLU transcoder", "gemma-scope-2-1b-pt/transcoder/layer_7_width_16k_l0_small",
            config=config_of("model.layers.7.pre_feedforward_layernorm.output", f"model.layers.7.{_POST}",
                             type="transcoder"),
            site="mlp_in.7", site_out="mlp_out.7", model=GEMMA_1B),
    _second("affine", "JumpReLU transcoder with a skip",
            "gemma-scope-2-1b-pt/transcoder_all/layer_7_width_262k_l0_big_affine", AFFINE, decode=_affine(AFFINE),
            config=config_of("model.layers.7.pre_feedforward_layernorm.output", f"model.layers.7.{_POST}",
                             type="transcoder", affine_connection=True),
            site="mlp_in.7", site_out="mlp_out.7", model=GEMMA_1B),
    _second("affine by path", "JumpReLU transcoder with a skip, no config",
            "models--google--gemma-scope-2-270m-pt/snapshots/f00/transcoder_all/layer_5_width_16k_l0_small_affine",
            AFFINE, decode=_affine(AFFINE), site="mlp_in.5", site_out="mlp_out.5", model="google/gemma-3-270m"),
    _second("wider", "JumpReLU transcoder with a skip, to another width", "mine", WIDER, decode=_affine(WIDER),
            site="mlp_in.1", site_out="mlp_out.1",
            options={"site": "mlp_in.1", "site_out": "mlp_out.1", "model": GEMMA_1B}),
    LookAlike("gemma_scope_2 alone", "gemma_scope_2", "JumpReLU, a file outside of its folders", _other_file,
              _acts(SECOND), _decode(SECOND)),
]  # fmt: skip
