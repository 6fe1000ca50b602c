"""Find the contexts in which a latent fires hardest, in text that the caller has or that the model writes itself."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saeguard.engines.corrections import on_plain_weights
from saeguard.errors import MissingBOS
from saeguard.sae import SAE
from saeguard.scoring.reading import SiteReader
from saeguard.scoring.sweep import Progress

BATCH = 16
"""Rows per forward pass."""
LATENTS = 4096
"""Latents whose activations are held at a time."""
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

    ``kept`` says which tokens count; rows are padded on the right. Raises `LatentOutOfRange`, and as `SiteReader`.
    """
    return contexts_of(model, tokenizer, sae, [latent], ids, kept, top=top, around=around)[latent]


def contexts_of(
    model: nn.Module,
    tokenizer: Any,
    sae: SAE,
    latents: Sequence[int],
    ids: Int[Tensor, "row column"],
    kept: Bool[Tensor, "row column"],
    *,
    top: int = 10,
    around: int = 12,
    progress: Progress | None = None,
) -> dict[int, list[Context]]:
    """`top_contexts` of many latents, from one pass over the text."""
    sae.check_latents(latents)
    best, row, place = (torch.zeros(0, len(latents), dtype=kind) for kind in (torch.float, torch.long, torch.long))
    for start, values, places in _hardest(model, sae, latents, ids, kept):
        number = torch.arange(start, start + len(values))[:, None].expand(values.shape)
        best, order = torch.cat([best, values]).sort(dim=0, descending=True, stable=True)
        best, order = best[:top], order[:top]
        row = torch.cat([row, number]).gather(0, order)
        place = torch.cat([place, places]).gather(0, order)
        if progress is not None:
            progress(min(start + BATCH, len(ids)), len(ids))
    contexts = {}
    for k, latent in enumerate(latents):
        hits = zip(row[:, k].tolist(), place[:, k].tolist(), best[:, k].tolist(), strict=True)
        contexts[latent] = [_context(tokenizer, ids[r], kept[r], p, v, around) for r, p, v in hits if v > 0]
    return contexts


def activations(
    model: nn.Module, sae: SAE, latent: int, ids: Int[Tensor, "row column"], kept: Bool[Tensor, "row column"]
) -> Float[Tensor, " token"]:
    """The latent's activation at every counted token, in the text's order. Raises as `top_contexts`."""
    sae.check_latents([latent])
    parts = [f[..., 0][kept[start : start + BATCH]] for start, f in _firing(model, sae, [[latent]], ids)]
    return torch.cat([torch.zeros(0), *parts])


def _hardest(
    model: nn.Module, sae: SAE, latents: Sequence[int], ids: Int[Tensor, "row column"], kept: Bool[Tensor, "row column"]
) -> Iterator[tuple[int, Float[Tensor, "batch k"], Int[Tensor, "batch k"]]]:
    """Per row and latent the largest activation on a counted token, and its column; a batch of rows at a time."""
    slices = [latents[low : low + LATENTS] for low in range(0, len(latents), LATENTS)]
    values: list[Tensor] = []
    places: list[Tensor] = []
    for start, f in _firing(model, sae, slices, ids):
        found = f.masked_fill(~kept[start : start + BATCH, :, None], 0.0).max(dim=1)
        values.append(found.values)
        places.append(found.indices)
        if len(values) == len(slices):
            yield start, torch.cat(values, dim=1), torch.cat(places, dim=1)
            values, places = [], []


def _firing(
    model: nn.Module, sae: SAE, slices: Sequence[Sequence[int]], ids: Int[Tensor, "row column"]
) -> Iterator[tuple[int, Float[Tensor, "batch column k"]]]:
    """Activations of some latents, a batch of rows and a slice of latents at a time, and the batch's first row."""
    reader = SiteReader(model, sae)
    sae = on_plain_weights(sae, reader.engine).to(device=reader.device)
    for start in range(0, len(ids), BATCH):
        x = reader.read(ids[start : start + BATCH])
        for latents in slices:
            yield start, sae.encode_at(x, list(latents)).float().cpu()


def _context(tokenizer: Any, ids: Tensor, kept: Tensor, place: int, value: float, around: int) -> Context:
    def text(start: int, stop: int) -> str:
        inside = slice(max(start, 0), stop)
        return tokenizer.decode(ids[inside][kept[inside]])

    return Context(value, text(place - around, place), text(place, place + 1), text(place + 1, place + 1 + around))
