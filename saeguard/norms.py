"""What some SAEs do to each token before they encode it, and undo after they decode.

    xn = (x - shift) / scale        x_hat = scale * (f @ W_dec + b_dec) + shift        shift and scale of this token

    center       scale 1                         shift mean(x)     trained on a stream whose mean was removed
    layer_norm   scale std(x) + eps, unbiased    shift mean(x)     OpenAI v5, Bussmann, SAELens layer_norm
    const_norm   scale |x| / sqrt(d)             shift 0           SAELens constant_norm_rescale, token-wise

`layer_norm` divides by std + eps and multiplies back by std alone, as its authors do. These norms differ from token to
token, so they cannot be folded into weights; everything that can is folded when an SAE is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Norm = Literal["none", "center", "layer_norm", "const_norm"]


@dataclass(frozen=True, eq=False)
class Normed:
    """A token as an SAE reads it, and how its reconstruction goes back; None stands for 1 and for 0."""

    x: Float[Tensor, "*tokens d_in"]
    scale: Float[Tensor, "*tokens 1"] | None = None
    shift: Float[Tensor, "*tokens 1"] | None = None


def _none(x: Tensor, eps: float) -> Normed:
    return Normed(x)


def _center(x: Tensor, eps: float) -> Normed:
    mean = x.mean(-1, keepdim=True)
    return Normed(x - mean, None, mean)


def _layer_norm(x: Tensor, eps: float) -> Normed:
    mean = x.mean(-1, keepdim=True)
    std = x.std(-1, keepdim=True)
    return Normed((x - mean) / (std + eps), std, mean)


def _const_norm(x: Tensor, eps: float) -> Normed:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return Normed(x / norm.clamp_min(torch.finfo(x.dtype).tiny), norm)


NORMS: dict[str, Callable[[Tensor, float], Normed]] = {
    "none": _none, "center": _center, "layer_norm": _layer_norm, "const_norm": _const_norm,
}  # fmt: skip
