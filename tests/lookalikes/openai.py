"""OpenAI's SAEs of GPT-2 small and SDXL Turbo's."""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from tests.lookalikes.base import D_IN, D_SAE, TOP_K, LookAlike, Tensors, largest, weights

T = weights(seed=81)
TOPK = {"activation": "TopK", "activation_state_dict": OrderedDict(k=TOP_K, postact_fn="ReLU")}
MANY = 36
"""More than are positive, so that a ReLU behind the TopK shows."""
WIDE = {"activation": "TopK", "activation_state_dict": OrderedDict(k=MANY, postact_fn="ReLU")}
SIGNED = {"activation": "TopK", "activation_state_dict": OrderedDict(k=MANY, postact_fn="Identity")}
RELU = {"activation": "ReLU", "activation_state_dict": OrderedDict()}
SDXL = {"n_dirs_local": D_SAE, "d_model": D_IN, "k": TOP_K, "auxk": 256, "dead_steps_threshold": 2441}


def tensors(t: Tensors = T, *, tied: bool = False) -> Tensors:
    """With the records of training that lie among them."""
    decoder = {"decoder.linear.weight": t["W_enc"].T.contiguous()} if tied else {"decoder.weight": t["W_dec"].T}
    return OrderedDict(
        pre_bias=t["b_dec"], latent_bias=t["b_enc"], stats_last_nonzero=torch.zeros(D_SAE, dtype=torch.long),
        latents_activation_frequency=torch.ones(D_SAE), latents_mean_square=torch.zeros(D_SAE),
        **{"encoder.weight": t["W_enc"].T.contiguous()}, **decoder,
    )  # fmt: skip


def write(
    place: str, layer: int, activation: dict[str, Any], *, tied: bool = False, folder: bool = False
) -> Callable[[Path], Path]:
    """A file where OpenAI's storage has it; with ``folder`` its neighbours are there too, with other weights."""

    def put(root: Path) -> Path:
        there = root / "gpt2-small" / place / "autoencoders"
        there.mkdir(parents=True)
        torch.save(OrderedDict(**tensors(tied=tied), **activation), there / f"{layer}.pt")
        for other in (0, layer + 1) if folder else ():
            torch.save(OrderedDict(**tensors(weights(seed=other)), **activation), there / f"{other}.pt")
        return there if folder else there / f"{layer}.pt"

    return put


def write_sdxl(root: Path) -> Path:
    """A folder with its config, and the statistics of its inputs that its authors do not use to encode."""
    folder = root / "unet.mid_block.attentions.0_k10_hidden5120_auxk256_bs4096_lr0.0001" / "final"
    folder.mkdir(parents=True)
    state = {key: tensor for key, tensor in tensors().items() if not key.startswith("latents_")}
    torch.save({"state_dict": OrderedDict(state)}, folder / "state_dict.pth")
    torch.save(torch.zeros(D_IN), folder / "mean.pt")
    torch.save(torch.ones(D_SAE), folder / "std.pt")
    (folder / "config.json").write_text(json.dumps(SDXL))
    return folder


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The token, its mean and its spread, with n - 1 and with eps outside of the root."""
    mu = x.mean(dim=-1, keepdim=True)
    std = (((x - mu) ** 2).sum(dim=-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
    return (x - mu) / (std + 1e-5), mu, std


def _pre(x: Tensor) -> Tensor:
    return linear(x - T["b_dec"], T["W_enc"].T, T["b_enc"])


def _topk(x: Tensor, k: int = TOP_K) -> Tensor:
    pre = _pre(x)
    return relu(pre * largest(pre, k))


def _v5(x: Tensor) -> Tensor:
    return _topk(layer_norm(x)[0])


def _wide(x: Tensor) -> Tensor:
    return _topk(layer_norm(x)[0], MANY)


def _signed(x: Tensor) -> Tensor:
    pre = _pre(layer_norm(x)[0])
    return pre * largest(pre, MANY)


def _decode(f: Tensor, x: Tensor) -> Tensor:
    return linear(f, T["W_dec"].T) + T["b_dec"]


def _decode_v5(f: Tensor, x: Tensor) -> Tensor:
    _, mu, std = layer_norm(x)
    return _decode(f, x) * std + mu


def _like(
    name: str, note: str, put: Callable[[Path], Path], acts: Callable[[Tensor], Tensor], **more: Any
) -> LookAlike:
    about: dict[str, Any] = {"model": "gpt2", "decode": _decode_v5} | more
    return LookAlike(name=name, family="openai", note=note, write=put, acts=acts, **about)


LOOKALIKES = [
    _like("openai_v5", "TopK behind a layer norm", write("resid_post_mlp_v5_32k", 8, TOPK), _v5, site="resid_post.8"),
    _like(
        "openai_v5_attn",
        "the same, with more than are positive",
        write("resid_delta_attn_v5_128k", 6, WIDE),
        _wide,
        site="attn_out.6",
    ),
    _like(
        "openai_v5_mid",
        "the same, one of a folder",
        write("resid_post_attn_v5_32k", 7, TOPK, folder=True),
        _v5,
        site="resid_mid.7",
        options={"site": "resid_mid.7"},
    ),
    _like(
        "openai_v5_signed", "TopK without a ReLU", write("resid_delta_mlp_v5_32k", 2, SIGNED), _signed, site="mlp_out.2"
    ),
    _like(
        "openai_v4",
        "ReLU, and said so",
        write("resid_delta_mlp_v4", 5, RELU),
        lambda x: relu(_pre(x)),
        decode=_decode,
        site="mlp_out.5",
    ),
    _like(
        "openai_v1",
        "ReLU, nothing said",
        write("mlp_post_act", 0, {}),
        lambda x: relu(_pre(x)),
        decode=_decode,
        site="mlp_post.0",
    ),
    _like(
        "openai_tied",
        "its decoder is its encoder",
        write("mlp_post_act_v4", 1, RELU, tied=True),
        lambda x: relu(_pre(x)),
        decode=lambda f, x: f @ T["W_enc"].T + T["b_dec"],
        site="mlp_post.1",
    ),
    _like("sdxl_unbox", "TopK without a norm", write_sdxl, _topk, decode=_decode, model=None),
]
