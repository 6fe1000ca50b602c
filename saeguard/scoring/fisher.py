"""How much a text's log-likelihood depends on each latent: the diagonal Fisher information, from gradients.

    L                       -log p of the row's counted tokens, summed, in nats
    fisher_j                mean over tokens of (dL/df_j)^2         W_dec[j] G W_dec[j], G = mean of g g^T, g = a g_x
    weighted_fisher_j       mean over tokens of (f_j dL/df_j)^2     nothing where the latent does not fire
    ratio                   on the text to forget over that on the text to keep, as DSG (arXiv 2504.08192) does

DSG takes the mean square of f for this; here is what it stands for. The first asks what would happen if the latent
were moved, the second what the part of x that it stands for matters; its unit is squared nats, so latents of different
scales compare. G is one matrix of d_out x d_out, whatever the number of latents.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from saeguard.engines.layouts import Layout
from saeguard.errors import ScoreMismatch
from saeguard.sae import SAE
from saeguard.scoring.cache import Cache
from saeguard.scoring.gradients import BATCH, GradientReader, Gradients, Progress, State, Walk
from saeguard.scoring.losses import cross_entropy
from saeguard.scoring.table import Meaning, ScoreTable
from saeguard.scoring.texts import Texts

EPSILON = 1e-21
"""DSG's."""
LATENTS = 8192
"""Latents whose Fisher information is made from G at a time."""


def fisher(
    model: nn.Module,
    sae: SAE,
    forget: Texts,
    retain: Texts,
    *,
    epsilon: float = EPSILON,
    batch_rows: int = BATCH,
    cache: Cache | None = None,
    save_every: int = 50,
    progress: Progress | None = None,
    layout: Layout | None = None,
) -> ScoreTable:
    """Both readings on both texts, and their ratios. One backward pass per batch, each text once.

    ``batch_rows`` changes speed and memory only. Raises `ScoreMismatch` for a text of which no token counts, and what
    `GradientReader` raises.
    """
    walk = Walk(GradientReader(model, sae, layout=layout), batch_rows, cache, save_every)
    texts, total = {"forget": forget, "retain": retain}, len(forget.ids) + len(retain.ids)
    columns: dict[str, tuple[Tensor, Meaning]] = {}
    made: dict[str, dict[str, Any]] = {}
    for role, text in texts.items():
        state = _gather(walk, text, _report(progress, len(forget.ids) if role == "retain" else 0, total))
        n_tokens, better = int(state["n_tokens"]), role == "forget"
        made[role] = {"name": text.name, "fingerprint": text.fingerprint, "n_tokens": n_tokens}
        plain, weighted = _diagonal(walk.reader.sae, state["gram"]) / n_tokens, state["weighted"] / n_tokens
        unit = "squared nats per squared activation unit"
        columns[f"fisher_{role}"] = (plain, Meaning(unit, "E[(dL/df)^2]", better))
        columns[f"weighted_fisher_{role}"] = (weighted, Meaning("squared nats", "E[(f dL/df)^2]", better))
    for name in ("fisher", "weighted_fisher"):
        ratio = columns[f"{name}_forget"][0] / (columns[f"{name}_retain"][0] + epsilon)
        columns[f"{name}_ratio"] = (ratio, Meaning("ratio", "forget over retain, as DSG, arXiv 2504.08192"))
    return ScoreTable.of(
        sae, columns, score="fisher", model=walk.reader.name, site=str(walk.reader.writes), texts=made, epsilon=epsilon
    )


def _gather(walk: Walk, text: Texts, report: Callable[[int], None]) -> State:
    sae = walk.reader.sae
    start = {
        "gram": torch.zeros(sae.d_out, sae.d_out, dtype=torch.float64),
        "weighted": torch.zeros(sae.d_sae, dtype=torch.float64),
        "n_tokens": torch.zeros((), dtype=torch.int64),
    }
    state = walk.over(text, cross_entropy, start, _add, report, score="fisher")
    if not int(state["n_tokens"]):
        raise ScoreMismatch(
            f"Fisher information of {sae.name} on the text {text.name!r}", "none of its tokens counts",
            "Give text that is not only special tokens.",
        )  # fmt: skip
    return state


def _add(state: State, found: Gradients) -> None:
    g = found.g.cpu().double()
    state["gram"] += g.T @ g
    for part in found.slices():
        state["weighted"][part.latents] += (part.f * part.g).square().sum(0, dtype=torch.float64).cpu()
    state["n_tokens"] += len(g)


def _diagonal(sae: SAE, gram: Float64[Tensor, "d_out d_out"]) -> Float64[Tensor, " d_sae"]:
    """W_dec[j] gram W_dec[j] of every latent."""
    parts = [part.cpu().double() for part in sae.W_dec.split(LATENTS)]
    return torch.cat([((W @ gram) * W).sum(-1) for W in parts])


def _report(progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    return lambda rows: progress(before + rows, total) if progress is not None else None
