"""dictionary_learning's seven classes, SAEBench's configs, Sam Marks' lone files, and jkminder's fork."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, relu

from tests.lookalikes.base import D_IN, D_SAE, TOP_K, LookAlike, Tensors, largest, relu_jump, weights

T = weights("threshold", "r_mag", "gate_bias", "mag_bias", seed=71)
THRESHOLD = 0.4
BUFFER = {
    "d_submodule": D_IN, "io": "out", "n_ctxs": 244, "ctx_len": 1024, "refresh_batch_size": 32, "out_batch_size": 2048,
    "device": "cuda:0",
}  # fmt: skip
MEAN, STD = torch.linspace(-0.5, 1.0, D_IN), torch.linspace(0.2, 2.0, D_IN)
TARGET_RMS = 4.0
SCALE = TARGET_RMS / float((STD**2).sum() + 1e-8) ** 0.5


def trainer(dict_class: str | None, trainer_class: str, **more: Any) -> dict[str, Any]:
    """What a trainer writes of itself."""
    said = {
        "trainer_class": trainer_class, "lr": 0.0003, "steps": 244140, "seed": 0, "activation_dim": D_IN,
        "dict_size": D_SAE, "device": "cuda:0", "layer": 8, "lm_name": "EleutherAI/pythia-160m-deduped",
        "wandb_name": f"{trainer_class}-pythia-160m-deduped", "submodule_name": "resid_post_layer_8",
    }  # fmt: skip
    return said | ({"dict_class": dict_class} if dict_class else {}) | more


def linear_tensors(t: Tensors) -> Tensors:
    """As torch's linear layers keep them."""
    return {"encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"],
            "decoder.weight": t["W_dec"].T.contiguous()}  # fmt: skip


def ranked(threshold: float = THRESHOLD) -> Tensors:
    """AutoEncoderTopK and BatchTopKSAE."""
    return linear_tensors(T) | {
        "b_dec": T["b_dec"],
        "k": torch.tensor(TOP_K, dtype=torch.int),
        "threshold": torch.tensor(threshold),
    }


def matryoshka(threshold: float = THRESHOLD) -> Tensors:
    """Its groups add up to all latents."""
    return {key: T[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec")} | {
        "k": torch.tensor(TOP_K, dtype=torch.int), "threshold": torch.tensor(threshold),
        "group_sizes": torch.tensor([6, 12, D_SAE - 18]),
    }  # fmt: skip


AUTO_ENCODER = linear_tensors(T) | {"bias": T["b_dec"]}
AUTO_ENCODER_NEW = linear_tensors(T) | {"decoder.bias": T["b_dec"]}
GATED = {key: T[key] for key in ("r_mag", "gate_bias", "mag_bias")} | {
    "decoder_bias": T["b_dec"], "encoder.weight": T["W_enc"].T.contiguous(), "decoder.weight": T["W_dec"].T.contiguous()
}  # fmt: skip
JUMP_RELU = {key: T[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec")} | {"threshold": T["threshold"] - 0.2}


def jkminder(normalised: bool = True, threshold: float = THRESHOLD) -> Tensors:
    """NaN stands for no statistics."""
    nan = torch.full((D_IN,), torch.nan)
    return ranked(threshold) | {
        "activation_mean": MEAN if normalised else nan, "activation_std": STD if normalised else nan.clone(),
        "activation_global_scale": torch.tensor(SCALE if normalised else 1.0), "target_rms": torch.tensor(TARGET_RMS),
    }  # fmt: skip


def write(
    tensors: Tensors,
    about: Mapping[str, Any] | None,
    *,
    folder: str = "resid_post_layer_8/trainer_20",
    file: str = "ae.pt",
    buffer: Mapping[str, Any] = BUFFER,
    give_file: bool = False,
) -> Callable[[Path], Path]:
    """A trainer's folder; ``about`` None leaves its config out."""

    def put(root: Path) -> Path:
        (root / folder).mkdir(parents=True)
        torch.save(tensors, root / folder / file)
        if about is not None:
            (root / folder / "config.json").write_text(json.dumps({"trainer": about, "buffer": buffer}, indent=4))
            (root / folder / "eval_results.json").write_text(json.dumps({"l0": 6.0}))
        return root / folder / file if give_file else root / folder

    return put


def write_jkminder(tensors: Tensors) -> Callable[[Path], Path]:
    """As PyTorchModelHubMixin saves it: only arguments that are JSON are in the config."""

    def put(root: Path) -> Path:
        save_file(tensors, root / "model.safetensors")
        (root / "config.json").write_text(json.dumps({"activation_dim": D_IN, "dict_size": D_SAE, "k": TOP_K}))
        return root

    return put


def _encoder(x: Tensor) -> Tensor:
    return linear(x, T["W_enc"].T, T["b_enc"])


def _decoder(f: Tensor, x: Tensor) -> Tensor:
    return linear(f, T["W_dec"].T) + T["b_dec"]


def _auto_encoder(x: Tensor) -> Tensor:
    return relu(_encoder(x - T["b_dec"]))


def _gated(x: Tensor) -> Tensor:
    z = linear(x - T["b_dec"], T["W_enc"].T)
    return (z + T["gate_bias"] > 0).float() * relu(T["r_mag"].exp() * z + T["mag_bias"])


def _jump_relu(x: Tensor) -> Tensor:
    pre = x @ T["W_enc"] + T["b_enc"]
    return relu(pre * (pre > JUMP_RELU["threshold"]))


def _topk(x: Tensor) -> Tensor:
    post = _auto_encoder(x)
    return post * largest(post, TOP_K)


def _thresholded(x: Tensor) -> Tensor:
    return relu_jump(_auto_encoder(x), THRESHOLD)


def _jkminder(x: Tensor) -> Tensor:
    return relu_jump(_auto_encoder((x - MEAN) * SCALE), THRESHOLD)


def _jkminder_decoder(f: Tensor, x: Tensor) -> Tensor:
    return _decoder(f, x) / (SCALE + 1e-8) + MEAN


def _like(
    name: str, note: str, put: Callable[[Path], Path], acts: Callable[[Tensor], Tensor], **more: Any
) -> LookAlike:
    about = {"site": "resid_post.8", "model": "EleutherAI/pythia-160m-deduped"} | more
    return LookAlike(
        name=f"dl_{name}", family="dictionary_learning", note=note, write=put, acts=acts, decode=_decoder, **about
    )


_BATCH = trainer("BatchTopKSAE", "BatchTopKTrainer", k=TOP_K)
_MATRYOSHKA = trainer("MatryoshkaBatchTopKSAE", "MatryoshkaBatchTopKTrainer", k=TOP_K)
_STANDARD = trainer("AutoEncoder", "StandardTrainer")
LOOKALIKES = [
    _like("autoencoder", "ReLU, bias taken off x", write(AUTO_ENCODER, _STANDARD), _auto_encoder),
    _like(
        "autoencoder_april",
        "class only in trainer_class",
        write(AUTO_ENCODER, trainer(None, "StandardTrainerAprilUpdate")),
        _auto_encoder,
    ),
    _like(
        "autoencoder_alone",
        "Sam Marks' files without a config",
        write(AUTO_ENCODER, None, folder="pythia-70m-deduped/mlp_out_layer3/10_32768"),
        _auto_encoder,
        site="mlp_out.3",
        model=None,
    ),
    _like(
        "autoencoder_new",
        "ReLU, nothing taken off x",
        write(AUTO_ENCODER_NEW, trainer("AutoEncoderNew", "StandardTrainerNew")),
        lambda x: relu(_encoder(x)),
    ),
    _like("gated", "gated", write(GATED, trainer("GatedAutoEncoder", "GatedSAETrainer")), _gated),
    _like(
        "jumprelu",
        "JumpReLU, some thresholds below 0",
        write(JUMP_RELU, trainer("JumpReluAutoEncoder", "JumpReluTrainer")),
        _jump_relu,
    ),
    _like(
        "topk",
        "TopK, with a threshold beside it",
        write(ranked(), trainer("AutoEncoderTopK", "TopKTrainer", k=TOP_K)),
        _topk,
    ),
    _like(
        "topk_old",
        "TopK, k only in the config",
        write(linear_tensors(T) | {"b_dec": T["b_dec"]}, trainer("AutoEncoderTopK", "TopKTrainer", k=TOP_K)),
        _topk,
    ),
    _like("batchtopk", "BatchTopK with its threshold", write(ranked(), _BATCH), _thresholded),
    _like(
        "batchtopk_unset",
        "BatchTopK whose threshold was never set",
        write(ranked(-1.0), _BATCH, give_file=True),
        _auto_encoder,
    ),
    _like(
        "batchtopk_attention",
        "BatchTopK on attention",
        write(ranked(), _BATCH | {"submodule_name": "attention_out_layer_8"}),
        _thresholded,
        site="attn_out.8",
    ),
    _like(
        "batchtopk_input",
        "on the input of a block",
        write(ranked(), _BATCH, buffer=BUFFER | {"io": "in"}),
        _thresholded,
        site="resid_pre.8",
    ),
    _like("matryoshka", "Matryoshka BatchTopK", write(matryoshka(), _MATRYOSHKA), _thresholded),
    _like(
        "matryoshka_alone",
        "the same, a checkpoint without a config",
        write(matryoshka(-1.0), None, file="ae_1000.pt"),
        _auto_encoder,
        model=None,
    ),
    LookAlike(
        name="jkminder",
        family="jkminder",
        note="BatchTopK with statistics of its input",
        write=write_jkminder(jkminder()),
        acts=_jkminder,
        decode=_jkminder_decoder,
    ),
    LookAlike(
        name="jkminder_plain",
        family="jkminder",
        note="the same without them",
        write=write_jkminder(jkminder(False)),
        acts=_thresholded,
        decode=_decoder,
        site="resid_post.13",
        model="google/gemma-2-2b",
        options={"site": "resid_post.13", "model": "google/gemma-2-2b"},
    ),
    LookAlike(
        name="jkminder_unset",
        family="jkminder",
        note="its threshold was never set",
        write=write_jkminder(jkminder(True, -1.0)),
        acts=lambda x: _auto_encoder((x - MEAN) * SCALE),
        decode=_jkminder_decoder,
    ),
]
