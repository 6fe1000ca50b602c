"""Change of token confidence: does moving a latent make the model surer or less sure of its next token?

    C_k(p) = -(1/k) sum_{i <= k} log p_(i)        dC_k(j) = C_k(p moved) - C_k(p plain)

p_(i) is the i-th largest probability: Wang et al. 2025 (arXiv 2510.03659), appendix D, k = 1 and alpha = 10. Positive
is less sure (UP), negative is surer (DOWN). The paper's "scale the code by alpha while keeping all other codes at zero"
reads in two ways, and both are here:

    additive    x' = x + alpha M W_dec[j]                 M as in the output score; every latent has a score
    scaled      x' = decode(alpha f_j, all others 0)      no error term; NaN where f_j = 0, as alpha then says nothing
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saeguard.sae import SAE
from saeguard.scoring.next_token import PREFIX, MaxOf, Prefix, provenance, read_prefixes, rows_at_once
from saeguard.scoring.pushed import FACTOR, pushed
from saeguard.scoring.pushed import Reading as Read
from saeguard.scoring.sweep import Progress, chosen, spread, sweep, weights_of
from saeguard.scoring.table import Meaning, ScoreTable

Reading = Literal["additive", "scaled"]


def confidence(log_p: Float[Tensor, "*rows vocab"], k: int = 1) -> Float[Tensor, "*rows"]:
    """C_k: the mean negative log-probability of the ``k`` likeliest tokens, in nats."""
    if k == 1:
        return -log_p.amax(-1)
    return -log_p.topk(k, dim=-1).values.mean(-1)


def token_confidence(
    model: nn.Module,
    tokenizer: Any,
    sae: SAE,
    *,
    reading: Reading = "additive",
    ks: Sequence[int] = (1,),
    prefixes: Sequence[str] = (PREFIX,),
    latents: Sequence[int] | None = None,
    factor: float = FACTOR,
    of: MaxOf = "batch",
    batch: int | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> ScoreTable:
    """One column per k: ``confidence_change_1``, ... or ``confidence_change_scaled_1``, ...

    ``factor`` is alpha; ``of`` is for the additive reading. Over several prefixes the changes are averaged; in the
    scaled reading over those at whose end the latent fires. Raises `BindError`, `ScoreMismatch`.
    """
    if reading == "additive":
        return pushed(
            model, tokenizer, sae, [additive(ks)], prefixes=prefixes, latents=latents, factor=factor, of=of,
            batch=batch, checkpoint=checkpoint, progress=progress,
        )  # fmt: skip
    wanted = chosen(sae, latents)
    read = read_prefixes(model, tokenizer, sae, prefixes)
    moved = [factor * prefix.f for prefix in read]
    firing = torch.stack([prefix.f for prefix in read]).ne(0).any(0).tolist()
    swept = [latent for latent in wanted if firing[latent]]
    names = _names(ks, "confidence_change_scaled_")

    def step(rows: list[int]) -> dict[str, Tensor]:
        each: dict[int, list[Tensor]] = {k: [] for k in ks}
        for prefix, amount in zip(read, moved, strict=True):
            dx = amount[rows, None] * prefix.directions(rows) + _emptied(prefix)
            log_p, silent = prefix.log_p(dx), amount[rows] == 0
            for k in ks:
                change = confidence(log_p, k) - confidence(prefix.clean, k)
                each[k].append(change.masked_fill(silent.to(change.device), torch.nan))
        return {names[k]: torch.stack(each[k]).nanmean(0) for k in ks}

    asked = provenance(model, read, score="token_confidence", ks=list(ks), factor=factor, reading=reading)
    found = sweep(
        swept, step, batch=rows_at_once(read[0], batch), asked={**asked, **weights_of(model, sae, checkpoint)},
        checkpoint=checkpoint, progress=progress,
    )  # fmt: skip
    columns = {names[k]: (spread(sae, swept, found.get(names[k], torch.zeros(0))), _meaning(k)) for k in ks}
    return ScoreTable.of(sae, columns, **asked)


def additive(ks: Sequence[int] = (1,)) -> Read:
    """The additive reading's columns as a `pushed.Reading`, to share a sweep with others."""
    names = _names(ks, "confidence_change_")

    def read(prefix: Prefix, log_p: Float[Tensor, "rows vocab"], rows: list[int]) -> dict[str, Tensor]:
        return {names[k]: confidence(log_p, k) - confidence(prefix.clean, k) for k in ks}

    asked = {"score": "token_confidence", "ks": list(ks), "reading": "additive"}
    return Read(read, {names[k]: _meaning(k) for k in ks}, asked)


def _names(ks: Sequence[int], front: str) -> dict[int, str]:
    return {k: f"{front}{k}" for k in ks}


def _meaning(k: int) -> Meaning:
    unit = f"change of -mean log p of the {k} likeliest tokens, nats; below 0 is surer"
    return Meaning(unit, "Wang et al. 2025, appendix D")


def _emptied(prefix: Prefix) -> Float[Tensor, "1 d_out"]:
    """What takes the stream to the reconstruction from codes that are all zero."""
    nothing = torch.zeros(1, len(prefix.sae.W_dec), device=prefix.x.device)
    return prefix.sae.decode(nothing, prefix.x) - prefix.y
