"""One look-alike: how its files are written, and what its authors' own code would compute from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

D_IN, D_SAE, TOP_K = 16, 48, 6
"""Small, and all different, so that a wrong orientation does not fit."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LookAlike:
    """``write`` puts the files into a folder and returns what to give `load_sae`, with ``options`` beside it.

    ``acts`` and ``decode`` are the family's own: from x to published activations, from activations (and x, where
    decoding needs it) to the reconstruction. ``site`` and ``site_out`` are what a loader must find. ``note`` is for
    the table of families: what it is.
    """

    name: str
    family: str
    note: str
    write: Callable[[Path], Path]
    acts: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, Tensor], Tensor]
    site: str | None = None
    site_out: str | None = None
    model: str | None = None
    d_in: int = D_IN
    options: Mapping[str, Any] = field(default_factory=dict)


def weights(*names: str, seed: int = 0, d_in: int = D_IN, d_sae: int = D_SAE, d_out: int | None = None) -> Tensors:
    """Random tensors: W_enc (d_in, d_sae), W_dec (d_sae, d_out), b_dec (d_out), others (d_sae)."""
    generator = torch.Generator().manual_seed(seed)
    out = d_in if d_out is None else d_out
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, out), "b_dec": (out,), "b_pre": (d_in,), "skip": (d_in, out)}
    names = ("W_enc", "b_enc", "W_dec", "b_dec", *names)
    found = {name: torch.randn(shapes.get(name, (d_sae,)), generator=generator) * 0.4 for name in names}
    return {name: tensor.abs() + 0.05 if "threshold" in name else tensor for name, tensor in found.items()}


def inputs(d_in: int = D_IN) -> Tensor:
    """Tokens to encode, of several lengths and with a mean that is not 0."""
    generator = torch.Generator().manual_seed(99)
    x = torch.randn(3, 40, d_in, generator=generator)
    return x * torch.linspace(0.3, 4.0, 40)[:, None] + 0.2


def relu_jump(p: Tensor, threshold: Tensor | float) -> Tensor:
    """relu(p) where p > threshold."""
    return p.relu() * (p > threshold)


def largest(p: Tensor, k: int) -> Tensor:
    """1 at the k largest of the last axis, else 0."""
    return torch.zeros_like(p).scatter(-1, p.topk(k, dim=-1).indices, 1.0)
