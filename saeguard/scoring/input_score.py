"""Input score: does a latent fire on the tokens that it promotes?

    S_in(j) = (1/n) sum_{i <= n} 1[ max-activating token of example i in T_j ]

An example is one row of text, n is at most 100 of those in which the latent fires hardest, and latents with fewer than
10 have no score; T_j are the latent's own tokens (`logit_lens.top_tokens`): Arad, Mueller & Belinkov 2025 (arXiv
2505.20063), section 3. Tokens are compared by id, so there is no text to take apart.
"""

import hashlib
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saeguard.capturing import capture
from saeguard.engines import engine_for
from saeguard.engines.corrections import on_plain_weights
from saeguard.errors import ScoreMismatch, SiteNotFound
from saeguard.sae import SAE
from saeguard.scoring.logit_lens import top_tokens
from saeguard.scoring.sweep import Progress, chosen, spread
from saeguard.scoring.table import Meaning, ScoreTable

EXAMPLES, FEWEST = 100, 10
"""Per latent, as published."""
ROWS = 16
"""Rows of text per forward pass."""
_ACTIVATIONS = 2**25
"""Activations that are held at a time."""


def max_tokens(
    model: nn.Module,
    sae: SAE,
    ids: Int[Tensor, "row column"],
    kept: Bool[Tensor, "row column"],
    *,
    mask: Bool[Tensor, "row column"] | None = None,
    n: int = EXAMPLES,
    rows: int = ROWS,
    progress: Progress | None = None,
) -> Int[Tensor, "d_sae n"]:
    """Per latent the tokens on which it fires hardest, one of each row of ``ids``, hardest first; -1 for none.

    ``kept`` says which tokens count: no special ones, no padding. ``mask`` says which columns are text at all, and is
    needed for padding on the left, which is moved to the right. Raises `SiteNotFound` for an SAE without a site.
    """
    if sae.site is None:
        raise SiteNotFound(f"tokens of {sae.name}", "it does not say at which site it reads", "Give it a site.")
    site, sae, latents = sae.site, on_plain_weights(sae, engine_for(model)), chosen(sae, None)
    device = next(model.parameters()).device
    if mask is not None:
        order = mask.logical_not().long().argsort(dim=1, stable=True)
        ids, kept = ids.gather(1, order), (kept & mask).gather(1, order)
    best, tokens = torch.zeros(n, len(latents)), torch.full((n, len(latents)), -1)
    for start in range(0, len(ids), rows):
        here = slice(start, start + rows)
        with torch.no_grad(), capture(model, site) as tape:
            model(input_ids=ids[here].to(device), use_cache=False)
        values, places = _hardest(sae, latents, tape[site], kept[here].cpu())
        found = ids[here].cpu().gather(1, places)
        best, order = torch.cat([best, values]).sort(dim=0, descending=True, stable=True)
        best, order = best[:n], order[:n]
        tokens = torch.cat([tokens, found]).gather(0, order)
        if progress is not None:
            progress(min(start + rows, len(ids)), len(ids))
    tokens = tokens.masked_fill(best <= 0, -1).T.contiguous()
    every = torch.full((sae.d_sae, n), -1)
    every[torch.tensor(latents, dtype=torch.long)] = tokens
    return every


def matches(tokens: Int[Tensor, "d_sae n"], own: Int[Tensor, "d_sae k"]) -> Float[Tensor, " d_sae"]:
    """The share of each latent's ``tokens`` (-1: none) that are among its ``own``; NaN for fewer than `FEWEST`."""
    there = tokens >= 0
    hits = (tokens[:, :, None] == own[:, None, :]).any(-1) & there
    n = there.sum(1)
    return (hits.sum(1) / n.clamp(min=1)).masked_fill(n < FEWEST, torch.nan)


def input_score(
    model: nn.Module,
    sae: SAE,
    ids: Int[Tensor, "row column"],
    kept: Bool[Tensor, "row column"],
    *,
    mask: Bool[Tensor, "row column"] | None = None,
    own: Int[Tensor, "d_sae k"] | None = None,
    rows: int = ROWS,
    progress: Progress | None = None,
) -> ScoreTable:
    """Columns ``input_score`` and ``input_examples``; the text is as for `max_tokens`.

    Raises `SiteNotFound`, `UnsupportedModel`, and `ScoreMismatch` for own tokens of another number of latents.
    """
    own = top_tokens(model, sae) if own is None else own
    if len(own) != sae.d_sae:
        raise ScoreMismatch(
            f"input score of {sae.name}", f"own tokens are given for {len(own)} latents",
            f"Give a row of token ids for each of its {sae.d_sae} latents.",
        )  # fmt: skip
    tokens, latents = max_tokens(model, sae, ids, kept, mask=mask, rows=rows, progress=progress), chosen(sae, None)
    digest = hashlib.sha256(ids.to(torch.int64).cpu().numpy().tobytes() + kept.cpu().numpy().tobytes())
    names = engine_for(model).model_names()
    asked: dict[str, Any] = {
        "model": names[0] if names else type(model).__name__, "data": digest.hexdigest(), "score": "input_score",
        "examples": EXAMPLES, "own_tokens": own.shape[1],
    }  # fmt: skip
    source = "Arad et al. 2025, section 3"
    counted = (tokens >= 0).sum(1).float()
    return ScoreTable.of(
        sae,
        {
            "input_score": (matches(tokens, own), Meaning("share of examples, 0 to 1", source)),
            "input_examples": (spread(sae, latents, counted[latents]), Meaning("rows in which it fires", source)),
        },
        **asked,
    )


def _hardest(sae: SAE, latents: list[int], x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Per row and latent the largest activation on a kept token, and its column."""
    size = max(1, _ACTIVATIONS // (x.shape[1] * sae.d_sae))
    values, places = [], []
    for some, inside in zip(x.split(size), kept.split(size), strict=True):
        some = some.to(sae.W_dec.device)
        f = sae.encode(some) if sae.held is None else sae.encode_at(some, latents)
        found = f.cpu().masked_fill(~inside[..., None], 0.0).max(dim=1)
        values.append(found.values)
        places.append(found.indices)
    return torch.cat(values), torch.cat(places)
