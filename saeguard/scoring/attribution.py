"""What a latent contributes to an answer or to a loss, to first order: activation times gradient, and what uses it.

    attribution   f_j W_dec[j] . grad_x (logit(right) - mean logit(wrong))      Farrell et al., arXiv 2410.19278
    on a text     a_j = -mean over tokens of f_j dL/df_j;   a_j(forget) - |a_j(retain)|     the same of the loss
    GradSAE       mean over tokens of max(f_j dp(answer)/df_j, 0)               arXiv 2505.08080
    g-SAE         sigma = z + beta z |W_dec . grad_x L|, the k largest are kept      arXiv 2411.10397

The gradient is dL/df, see `saeguard.scoring.gradients`. The first sum over a question's tokens is the margin that is
lost when the latent is ablated in it, to first order. a_j is what a text's loss rises by per token when the latent is
ablated in it; what moves the loss of the retain text counts against it, in either direction. g-SAE's beta is not
known; L is the sum over a row's tokens here.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saeguard.engines.layouts import Layout
from saeguard.errors import ScoreMismatch
from saeguard.sae import SAE
from saeguard.scoring.cache import Cache
from saeguard.scoring.gradients import BATCH, GradientReader, Gradients, Progress, State, Walk, rows_of
from saeguard.scoring.losses import Questions, cross_entropy, log_probability, margin, probability
from saeguard.scoring.table import Meaning, ScoreTable
from saeguard.scoring.texts import Texts

TOP_N = 10
"""Latents per question that count as its top ones."""
NAN = torch.tensor(float("nan"), dtype=torch.float64)
LOSSES = {"margin": margin, "log_p": log_probability}
UNITS = {"margin": "logits", "log_p": "nats"}


def attribution(
    model: nn.Module,
    sae: SAE,
    questions: Questions,
    *,
    toward: str = "margin",
    top_n: int = TOP_N,
    batch_rows: int = BATCH,
    cache: Cache | None = None,
    progress: Progress | None = None,
    layout: Layout | None = None,
) -> ScoreTable:
    """What each latent adds toward the right answers: the ``margin``, or with ``toward="log_p"`` log p.

    Columns: the mean over questions of the sum over tokens, that of the largest at any token, and the share of
    questions in which a latent is among the ``top_n`` by the latter. A latent that fires in none is NaN. Raises
    `ScoreMismatch` and what `GradientReader` raises.
    """
    if toward not in LOSSES:
        raise ScoreMismatch(f"attribution toward {toward!r}", "there is no such loss", f"Use {' or '.join(LOSSES)}.")
    walk = Walk(GradientReader(model, sae, layout=layout), batch_rows, cache)
    names, settings = ("sum", "peak", "top", "active"), {"score": "attribution", "toward": toward, "top_n": top_n}
    add = partial(_add_attribution, top_n)
    sums = _walk(walk, questions, LOSSES[toward](questions), names, add, progress, settings)
    n, unit, source = int(sums["n"]), UNITS[toward], "Farrell et al., arXiv 2410.19278"
    columns = {
        "attribution": (sums["sum"] / n, Meaning(f"{unit} per question", source)),
        "attribution_peak": (sums["peak"] / n, Meaning(f"{unit} at the best token", source)),
        "attribution_top": (sums["top"] / n, Meaning("share of questions", source)),
    }
    return _table(sae, walk, columns, sums, questions.fingerprint, **settings)


def loss_attribution(
    model: nn.Module,
    sae: SAE,
    forget: Texts,
    retain: Texts,
    *,
    batch_rows: int = BATCH,
    cache: Cache | None = None,
    progress: Progress | None = None,
    layout: Layout | None = None,
) -> ScoreTable:
    """What ablating each latent would add to the loss of both texts per token, and the forget text's less the other's
    size; NaN where a latent never fires on the forget text.

    One backward pass per batch, each text once. Raises `ScoreMismatch` for a text of which no token counts, and what
    `GradientReader` raises.
    """
    walk = Walk(GradientReader(model, sae, layout=layout), batch_rows, cache)
    texts, total, done = {"forget": forget, "retain": retain}, len(forget.ids) + len(retain.ids), 0
    adds: dict[str, Tensor] = {}
    made: dict[str, dict[str, Any]] = {}
    fires = torch.zeros(sae.d_sae, dtype=torch.bool)
    for role, text in texts.items():
        tell = None if progress is None else lambda rows, _, before=done: progress(before + rows, total)
        sums = _walk(walk, text, cross_entropy, ("sum", "active"), _add_loss, tell, {"score": "loss_attribution"})
        adds[role], done = -sums["sum"] / int(sums["n"]), done + len(text.ids)
        made[role] = {"name": text.name, "fingerprint": text.fingerprint, "n_tokens": int(sums["n"])}
        fires |= (sums["active"] > 0) & (role == "forget")
    unit, source = "nats per token", "after Farrell et al., arXiv 2410.19278, of the loss"
    columns = {
        "loss_attribution": (adds["forget"] - adds["retain"].abs(), Meaning(unit, source)),
        "loss_attribution_forget": (adds["forget"], Meaning(unit, source)),
        "loss_attribution_retain": (adds["retain"], Meaning(unit, source, higher=False)),
    }
    shown = {name: (torch.where(fires, values, NAN), meaning) for name, (values, meaning) in columns.items()}
    return ScoreTable.of(
        sae, shown, score="loss_attribution", model=walk.reader.name, site=str(walk.reader.writes), texts=made
    )


def grad_sae(
    model: nn.Module,
    sae: SAE,
    questions: Questions,
    *,
    batch_rows: int = BATCH,
    cache: Cache | None = None,
    progress: Progress | None = None,
    layout: Layout | None = None,
) -> ScoreTable:
    """GradSAE's influence on the right answer's probability, the mean over questions; NaN where a latent never fires.

    ``grad_sae_half`` has it for the upper half of the latents that fire, which is the published selection. Raises what
    `GradientReader` raises.
    """
    walk = Walk(GradientReader(model, sae, layout=layout), batch_rows, cache)
    names, settings = ("sum", "active"), {"score": "grad_sae"}
    sums = _walk(walk, questions, probability(questions), names, _add_grad_sae, progress, settings)
    values = sums["sum"] / int(sums["n"])
    fires = (sums["active"] > 0).nonzero()[:, 0]
    best = fires[values[fires].argsort(descending=True, stable=True)[: (len(fires) + 1) // 2]]
    half = NAN.repeat(sae.d_sae).index_copy(0, best, values[best])
    meaning = Meaning("probability per token", "GradSAE, arXiv 2505.08080")
    columns = {"grad_sae": (values, meaning), "grad_sae_half": (half, meaning)}
    return _table(sae, walk, columns, sums, questions.fingerprint, **settings)


def gsae(
    model: nn.Module,
    sae: SAE,
    text: Texts,
    *,
    beta: float = 1.0,
    k: int | None = None,
    batch_rows: int = BATCH,
    cache: Cache | None = None,
    progress: Progress | None = None,
    layout: Layout | None = None,
) -> ScoreTable:
    """The mean over tokens of g-SAE's selection score, and the share of tokens at which it selects the latent.

    z are pre-activations above 0 where the SAE is a TopK, and else its activations. ``k`` is the SAE's own unless
    given. A latent that is 0 on every token is NaN. Raises `ScoreMismatch` without a k or a token that counts, and
    what `GradientReader` raises.
    """
    k = k or sae.top_k
    if not k or not 0 < k <= sae.d_sae:
        raise ScoreMismatch(f"g-SAE's selection by {sae.name}", f"k is {k}", f"Give k=1..{sae.d_sae}.")
    read = replace(sae, activation="relu", top_k=None, rank_by=None) if sae.activation == "topk" else sae
    walk = Walk(GradientReader(model, read, layout=layout), batch_rows, cache)
    names, settings = ("sum", "top", "active"), {"score": "gsae", "beta": beta, "k": k}
    sums = _walk(walk, text, cross_entropy, names, partial(_add_gsae, beta, k), progress, settings)
    n, source = int(sums["n"]), "g-SAE, arXiv 2411.10397"
    columns = {
        "gsae": (sums["sum"] / n, Meaning("activation units", source)),
        "gsae_top": (sums["top"] / n, Meaning("share of tokens", source)),
    }
    return _table(sae, walk, columns, sums, text.fingerprint, **settings)


def gsae_score(
    z: Float[Tensor, "*tokens k"], g: Float[Tensor, "*tokens k"], *, beta: float = 1.0
) -> Float[Tensor, "*tokens k"]:
    """z + beta z |g|, where g is the loss's gradient with respect to each latent: W_dec @ grad_x."""
    return z + beta * z * g.abs()


def gsae_keep(
    z: Float[Tensor, "*tokens d_sae"], score: Float[Tensor, "*tokens d_sae"], k: int
) -> Float[Tensor, "*tokens d_sae"]:
    """z at the ``k`` largest scores, 0 elsewhere."""
    best = score.topk(k, dim=-1).indices
    return torch.zeros_like(z).scatter(-1, best, z.gather(-1, best))


def _add_attribution(top_n: int, state: State, found: Gradients) -> None:
    total, peak = _per_row(state, found, lambda effect: effect)
    top_n = min(top_n, peak.shape[1])
    value, latent = peak.topk(top_n, dim=1)
    state["top"] += torch.bincount(latent[value > 0], minlength=peak.shape[1])
    state["sum"] += total.sum(0)
    state["peak"] += peak.sum(0)
    state["n"] += len(found.kept)


def _add_loss(state: State, found: Gradients) -> None:
    for part in found.slices():
        state["sum"][part.latents] += (part.f * part.g).sum(0, dtype=torch.float64).cpu()
        state["active"][part.latents] += (part.f != 0).sum(0).cpu()
    state["n"] += len(found.x)


def _add_grad_sae(state: State, found: Gradients) -> None:
    total, _ = _per_row(state, found, torch.relu)
    n_tokens = found.kept.sum(1, keepdim=True).clamp(min=1)
    state["sum"] += (total / n_tokens).sum(0)
    state["n"] += len(found.kept)


def _add_gsae(beta: float, k: int, state: State, found: Gradients) -> None:
    best: dict[int, tuple[Tensor, Tensor]] = {}
    for part in found.slices():
        sigma = gsae_score(part.f, part.g, beta=beta)
        state["sum"][part.latents] += sigma.sum(0, dtype=torch.float64).cpu()
        state["active"][part.latents] += (part.f != 0).sum(0).cpu()
        value, latent = sigma.topk(min(k, sigma.shape[1]), dim=1)
        latent = latent + part.latents.start
        if part.tokens.start in best:
            value, latent = (
                torch.cat(both, dim=1) for both in zip(best[part.tokens.start], (value, latent), strict=True)
            )
            value, place = value.topk(k, dim=1)
            latent = latent.gather(1, place)
        best[part.tokens.start] = value, latent
    for value, latent in best.values():
        state["top"] += torch.bincount(latent[value > 0].cpu(), minlength=len(state["top"]))
    state["n"] += len(found.x)


def _per_row(state: State, found: Gradients, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Per row and latent the sum over tokens of ``change(f dL/df)``, and the largest f dL/df at any token, or 0.

    Counts in ``state["active"]`` on how many tokens each latent fires.
    """
    shape = (len(found.kept), found.sae.d_sae)
    total, peak = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape)
    rows = list(rows_of(found.kept))
    for part in found.slices():
        effect = (part.f * part.g).cpu()
        state["active"][part.latents] += (part.f != 0).sum(0).cpu()
        for row, where in rows:
            low, high = max(where.start, part.tokens.start), min(where.stop, part.tokens.stop)
            if low >= high:
                continue
            mine = effect[low - part.tokens.start : high - part.tokens.start]
            total[row, part.latents] += change(mine).sum(0, dtype=torch.float64)
            peak[row, part.latents] = torch.maximum(peak[row, part.latents], mine.amax(0))
    return total, peak


def _walk(
    walk: Walk, data: Questions | Texts, loss: Any, names: tuple[str, ...], add: Callable[[State, Gradients], None],
    progress: Progress | None, settings: dict[str, Any],
) -> State:  # fmt: skip
    text = data.text if isinstance(data, Questions) else data
    start = {name: torch.zeros(walk.reader.sae.d_sae, dtype=torch.float64) for name in names}
    start["n"] = torch.zeros((), dtype=torch.int64)
    report = lambda rows: progress(rows, len(text.ids)) if progress is not None else None
    state = walk.over(text, loss, start, add, report, data=data.fingerprint, **settings)
    if not int(state["n"]):
        raise ScoreMismatch(
            f"{settings['score']} of {walk.reader.sae.name} on {text.name!r}", "none of its tokens counts",
            "Give text that is not only special tokens.",
        )  # fmt: skip
    return state


def _table(
    sae: SAE, walk: Walk, columns: dict[str, tuple[Tensor, Meaning]], sums: State, fingerprint: str, **settings: Any
) -> ScoreTable:
    """The columns, with NaN for latents that never fire."""
    fires = sums["active"] > 0
    shown = {name: (torch.where(fires, values, NAN), meaning) for name, (values, meaning) in columns.items()}
    return ScoreTable.of(
        sae, shown, model=walk.reader.name, site=str(walk.reader.writes), data=fingerprint, n=int(sums["n"]), **settings
    )
