"""Goodfire."""

from pathlib import Path

import torch

from tests.lookalikes.base import LookAlike, weights

_T = weights(seed=31)


def _write(folder: Path) -> Path:
    path = folder / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    layers = {
        "encoder_linear.weight": _T["W_enc"].T.contiguous(), "encoder_linear.bias": _T["b_enc"],
        "decoder_linear.weight": _T["W_dec"].T.contiguous(), "decoder_linear.bias": _T["b_dec"],
    }  # fmt: skip
    torch.save(layers, path)
    return path


LOOKALIKES = [
    LookAlike(
        name="goodfire", family="goodfire", note="ReLU, one file", write=_write,
        acts=lambda x: (x @ _T["W_enc"] + _T["b_enc"]).relu(), decode=lambda f, x: f @ _T["W_dec"] + _T["b_dec"],
        site="resid_post.19", model="meta-llama/Llama-3.1-8B-Instruct",
    )
]  # fmt: skip
