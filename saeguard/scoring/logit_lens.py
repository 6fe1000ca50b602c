"""The tokens that each latent promotes: its decoder row, read by the model's own final norm and unembedding.

    P = softmax(unembed(final_norm(W_dec)))        Arad, Mueller & Belinkov 2025 (arXiv 2505.20063), section 3

The norm has its gain (one plus its weight in Gemma) because it is the model's own module that is called. The softmax
keeps the order of the logits, so the ids are those of the largest logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saeguard.errors import UnsupportedModel, WidthMismatch
from saeguard.sae import SAE

TOP = 20
"""Ids per latent, as published."""
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
"""What transformers calls the norm behind the last block."""
_CHUNK = 2**23
"""Logits at a time."""


@dataclass(frozen=True, eq=False)
class Unembedding:
    """How a model turns the stream behind its last block into logits."""

    norm: nn.Module
    head: nn.Module
    width: int
    vocabulary: int

    def __call__(self, x: Float[Tensor, "n d_model"], *, norm: bool = True) -> Float[Tensor, "n vocab"]:
        """Logits of vectors, in float32, without what some models do to all logits alike (caps, scales)."""
        weight: Any = self.head.weight
        x = x.to(device=weight.device, dtype=weight.dtype)
        return self.head(self.norm(x) if norm else x).float()


def unembedding(model: nn.Module) -> Unembedding:
    """The model's final norm and output layer. Raises `UnsupportedModel` when either cannot be told."""
    owner: Any = model
    head = owner.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise UnsupportedModel(
            f"reading latents of {type(model).__name__} as tokens", "it has no output embeddings",
            "Load it with its language-model head (AutoModelForCausalLM).",
        )  # fmt: skip
    body = owner.get_decoder() if hasattr(model, "get_decoder") else None
    for inner in (body, getattr(model, "base_model", None)):
        for name in _NORMS:
            norm = getattr(inner, name, None)
            if isinstance(norm, nn.Module):
                vocabulary, width = head.weight.shape
                return Unembedding(norm, head, width, vocabulary)
    raise UnsupportedModel(
        f"reading latents of {type(model).__name__} as tokens",
        f"its body has no final norm under any of the names {', '.join(_NORMS)}",
        "Report the model class.",
    )


def top_tokens(
    model: nn.Module, sae: SAE, *, k: int = TOP, norm: bool = True, chunk: int | None = None
) -> Int[Tensor, "d_sae k"]:
    """Per latent the ``k`` tokens that it promotes most, the most promoted first; -1 for latents that were not read.

    ``norm=False`` leaves the final norm out. Raises `UnsupportedModel`, `WidthMismatch`.
    """
    reads = unembedding(model)
    if sae.d_out != reads.width:
        raise WidthMismatch(
            f"reading latents of {sae.name} as tokens",
            f"they write vectors of width {sae.d_out}, and the unembedding reads {reads.width}",
            "Only SAEs that write into the residual stream can be read this way.",
        )
    size = chunk or max(1, _CHUNK // reads.vocabulary)
    with torch.no_grad():
        found = [reads(rows, norm=norm).topk(k, dim=-1).indices.cpu() for rows in sae.W_dec.split(size)]
    ids = torch.cat(found)
    if sae.held is None:
        return ids
    return torch.full((sae.d_sae, k), -1).index_copy(0, torch.tensor(sae.held, dtype=torch.long), ids)
