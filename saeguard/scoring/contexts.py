"""Find the contexts in which a latent fires hardest, in text that the caller has or that the model writes itself."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from saeguard.capturing import capture
from saeguard.errors import MissingBOS, SiteNotFound
from saeguard.sae import SAE

BATCH = 16
"""Rows per forward pass."""
WRITTEN_LENGTH = 64
"""Tokens that the model writes per row, after a BOS and nothing else."""


@dataclass(frozen=True)
class Context:
    """One place where the latent fires; ``activation`` is in activation units."""

    activation: float
    before: str
    token: str
    after: str


def write_chunks(
    model: nn.Module, tokenizer: Any, *, n_tokens: int, seed: int = 0
) -> tuple[Int[Tensor, "row column"], Bool[Tensor, "row column"]]:
    """Let the model write freely from BOS: token ids, and which of them are text. Raises `MissingBOS`."""
    bos = tokenizer.bos_token_id
    if bos is None:
        raise MissingBOS(
            "text that the model writes by itself",
            "the tokenizer has no BOS token to begin with",
            "Give text of your own with --corpus.",
        )
    rows = max(1, -(-n_tokens // WRITTEN_LENGTH))
    made = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, rows, BATCH):
            prompt = torch.full((min(BATCH, rows - start), 1), bos)
            output = model.generate(  # type: ignore[operator]  a transformers model
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_p=0.95,
                min_new_tokens=WRITTEN_LENGTH, max_new_tokens=WRITTEN_LENGTH,
            )  # fmt: skip
            made.append(output.cpu())
    ids = torch.cat(made)
    special = torch.tensor(sorted({*tokenizer.all_special_ids, bos}))
    return ids, ~(ids[..., None] == special).any(-1)


def top_contexts(
    model: nn.Module,
    tokenizer: Any,
    sae: SAE,
    latent: int,
    ids: Int[Tensor, "row column"],
    kept: Bool[Tensor, "row column"],
    *,
    top: int = 10,
    around: int = 12,
) -> list[Context]:
    """The ``top`` tokens with the largest activations, at most one per row, hardest first.

    ``kept`` says which tokens count. Raises `SiteNotFound` for an SAE without a site, `LatentOutOfRange`.
    """
    sae.check_latents([latent])
    if sae.site is None:
        raise SiteNotFound(f"contexts of {sae.name}", "it does not say at which site it reads", "Give it a site.")
    best: list[tuple[float, int, int]] = []
    for start in range(0, len(ids), BATCH):
        rows = ids[start : start + BATCH]
        with torch.no_grad(), capture(model, sae.site) as tape:
            model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False)
        x = tape[sae.site]
        f = (sae.encode(x)[..., [latent]] if sae.ranks else sae.encode_at(x, [latent]))[..., 0]
        values, places = f.masked_fill(~kept[start : start + BATCH], 0.0).max(dim=1)
        best += [(v, start + i, p) for i, (v, p) in enumerate(zip(values.tolist(), places.tolist(), strict=True))]
    best = sorted((entry for entry in best if entry[0] > 0), reverse=True)[:top]
    return [_context(tokenizer, ids[row], kept[row], place, value, around) for value, row, place in best]


def _context(tokenizer: Any, ids: Tensor, kept: Tensor, place: int, value: float, around: int) -> Context:
    def text(start: int, stop: int) -> str:
        inside = slice(max(start, 0), stop)
        return tokenizer.decode(ids[inside][kept[inside]])

    return Context(value, text(place - around, place), text(place, place + 1), text(place + 1, place + 1 + around))
