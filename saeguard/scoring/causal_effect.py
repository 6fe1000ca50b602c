"""Causal effect: how far a latent moves the next token, and how hard it must be pushed to move it so far.

    effect       KL(p plain || p moved) with f_j += s at the last token, s = 1
    strength     the s at which that KL is kappa, by bisection of log10 s in [-3, 4] from 2, in at most 10 steps

s is in activation units and KL in nats, both averaged over the prefixes: Delphi's intervention scoring (arXiv
2410.13928), whose kappa is 0.5 and relative tolerance 0.1. Strengths at one KL are how latents are compared fairly.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saeguard.sae import SAE
from saeguard.scoring.next_token import PREFIX, Prefix, divergence, provenance, read_prefixes, rows_at_once
from saeguard.scoring.sweep import Progress, chosen, spread, sweep, weights_of
from saeguard.scoring.table import Meaning, ScoreTable

LOWEST, HIGHEST, START, STEPS = -3.0, 4.0, 2.0, 10
"""Of log10 s."""
_SOURCE = "arXiv 2410.13928, intervention scoring"


def causal_effect(
    model: nn.Module,
    tokenizer: Any,
    sae: SAE,
    *,
    kappa: float | None = 0.5,
    rtol: float = 0.1,
    strength: float = 1.0,
    prefixes: Sequence[str] = (PREFIX,),
    latents: Sequence[int] | None = None,
    batch: int | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> ScoreTable:
    """Columns ``effect`` and, unless ``kappa`` is None, ``strength_at_kl``: NaN where no strength has that KL.

    ``strength`` is the s of ``effect``. Raises `BindError`, `ScoreMismatch`.
    """
    wanted = chosen(sae, latents)
    read = read_prefixes(model, tokenizer, sae, prefixes)

    def step(rows: list[int]) -> dict[str, Tensor]:
        found = {"effect": _kl(read, rows, torch.full((len(rows),), strength))}
        return found if kappa is None else found | {"strength_at_kl": _strengths(read, rows, kappa, rtol)}

    asked = provenance(model, read, score="causal_effect", strength=strength, kappa=kappa, rtol=rtol)
    found = sweep(
        wanted, step, batch=rows_at_once(read[0], batch), asked={**asked, **weights_of(model, sae, checkpoint)},
        checkpoint=checkpoint, progress=progress,
    )  # fmt: skip
    meanings = {
        "effect": Meaning(f"KL(plain || moved) in nats, moved by {strength:g} in activation units", _SOURCE),
        "strength_at_kl": Meaning(f"activation units at which the KL is {kappa} nats", _SOURCE, higher=False),
    }
    return ScoreTable.of(
        sae, {name: (spread(sae, wanted, values), meanings[name]) for name, values in found.items()}, **asked
    )


def _kl(read: Sequence[Prefix], rows: list[int], strength: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    each = [divergence(p.clean, p.log_p(strength.to(p.x.device)[:, None] * p.directions(rows))) for p in read]
    return torch.stack(each).mean(0).cpu()


def _strengths(read: Sequence[Prefix], rows: list[int], kappa: float, rtol: float) -> Float[Tensor, " n"]:
    """Rows that have arrived drop out, so later steps are smaller passes."""
    low, high = torch.full((len(rows),), LOWEST), torch.full((len(rows),), HIGHEST)
    middle, found = torch.full((len(rows),), START), torch.full((len(rows),), torch.nan)
    open_rows = torch.arange(len(rows))
    for _ in range(STEPS):
        if not len(open_rows):
            break
        strength = 10.0 ** middle[open_rows]
        kl = _kl(read, [rows[i] for i in open_rows.tolist()], strength)
        there = (kl - kappa).abs() <= rtol * kappa
        found[open_rows[there]] = strength[there]
        weak, strong = open_rows[~there & (kl < kappa)], open_rows[~there & ~(kl < kappa)]
        low[weak], high[strong] = middle[weak], middle[strong]
        middle = (low + high) / 2
        open_rows = open_rows[~there]
    return found
