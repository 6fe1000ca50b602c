"""How well an SAE explains activations, and how well it would if its weights were read in another way.

    FVU             sum |y - y_hat|^2 / sum |y - mean|^2    over typical tokens
    scale           the c with the least |y - mean - c (y_hat - its mean)|^2
    mean share      n |mean error|^2 / sum |error|^2        what a missing b_dec leaves
    gain off        <f d, error> / |f d|^2 of a latent: what its activations times (1 + gain off) would do better
    weak scale      the c with the least |error - (c - 1) w|^2, w what the weaker half of all |f d| > 0 gives

Training an SAE drives the last four to 1, 0, 0 and 1 whatever its size, so they tell a wrong weight from a weak SAE.
Only an L1 penalty, which shrinks activations, leaves a scale above 1 and positive gains off. Without the TopK or the
threshold that an SAE was trained with, its weaker activations are noise that it never saw: their scale falls.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saeguard.norms import NORMS
from saeguard.sae import SAE

MASSIVE = 4.0
"""Times the median norm; tokens beyond it are set aside: a few of them can own every sum."""
COMPARED = 256
"""Tokens on which one place or reading is compared with another."""
WORST = 1e30
"""The FVU of a reconstruction that is not finite."""
EXACT = 1e-3
"""An FVU below which an SAE is as good as exact, and its error mostly rounding."""
FIRED = 5
"""Tokens on which a latent fires before its gain is looked at."""


@dataclass(frozen=True, eq=False)
class Streams:
    """What an SAE reads and what it should explain, token by token; the same tensor unless it is a transcoder."""

    x: Float[Tensor, "tokens d_in"]
    y: Float[Tensor, "tokens d_out"]

    def some(self) -> "Streams":
        """At most `COMPARED` tokens, evenly spaced."""
        step = max(-(-len(self.x) // COMPARED), 1)
        return Streams(self.x[::step], self.y[::step])

    def typical(self) -> Bool[Tensor, " tokens"]:
        """Which tokens are massive on neither side."""
        return _typical(self.x) & _typical(self.y)

    def at(self, kept: Bool[Tensor, " tokens"]) -> "Streams":
        """Some of the tokens."""
        return Streams(self.x[kept], self.y[kept])


@dataclass(frozen=True)
class Fit:
    """See the module's text."""

    fvu: float
    l0: float
    scale: float
    mean_share: float

    def over(self, base: "Fit") -> float:
        """The FVU as a multiple of another's; what both leave below `EXACT` does not count."""
        return (self.fvu + EXACT) / (base.fvu + EXACT)


def fit(sae: SAE, at: Streams) -> Fit:
    """How well ``sae`` explains ``at.y`` from ``at.x``."""
    f = sae.encode(at.x)
    y_hat = sae.decode(f, at.x)
    error, y, h = (at.y - y_hat).double(), _centred(at.y), _centred(y_hat)
    squares = float(error.square().sum())
    if not math.isfinite(squares):
        return Fit(WORST, float(len(f.T)), 0.0, 1.0)
    return Fit(
        fvu=squares / max(float(y.square().sum()), 1e-30),
        l0=float((f != 0).float().sum(-1).mean()),
        scale=float((y * h).sum()) / max(float(h.square().sum()), 1e-30),
        mean_share=len(y) * float(error.mean(0).square().sum()) / max(squares, 1e-30),
    )


def gains_off(sae: SAE, at: Streams) -> tuple[float, float]:
    """Root mean squares of the latents' negative and of their positive gains off, weighted by |f d|^2.

    Zero where no latent fires often enough.
    """
    f = sae.encode(at.x)
    error = at.y - sae.decode(f, at.x)
    scale = sae.read(at.x).scale
    f = f if scale is None else f * scale
    rows = sae.W_dec.float()
    energy = f.square().sum(0) * rows.square().sum(1)
    often = ((f != 0).sum(0) >= FIRED) & (energy > 0)
    weight = energy[often]
    if not len(weight):
        return 0.0, 0.0
    off = (f[:, often] * (error @ rows[often].T)).sum(0) / weight
    parts = (off.clamp(max=0.0), off.clamp(min=0.0))
    overshoot, undershoot = (_finite(((part.square() * weight).sum() / weight.sum()).sqrt()) for part in parts)
    return overshoot, undershoot


def weak_scale(sae: SAE, at: Streams) -> float:
    """The weak scale of the module's text; 1 where too little fires to say."""
    f, lengths = sae.encode(at.x), torch.linalg.vector_norm(sae.W_dec.float(), dim=-1)
    sizes = (f * lengths).abs()
    active = sizes[sizes > 0]
    if len(active) < 2 * FIRED or not bool(active.isfinite().all()):
        return 1.0
    error = at.y - sae.decode(f, at.x)
    part = torch.where(sizes <= active.median(), f, 0.0) @ sae.W_dec.float()
    scale = sae.read(at.x).scale
    part = part if scale is None else part * scale
    return _finite(1.0 + (error * part).sum() / part.square().sum().clamp_min(1e-30), -WORST)


def row_cosine(sae: SAE, at: Streams) -> float | None:
    """Median cosine of a latent's encoder column and decoder row over latents that fire; None for transcoders."""
    if sae.is_transcoder:
        return None
    fires = (sae.encode(at.x) != 0).any(0)
    if not bool(fires.any()):
        return 0.0
    columns, rows = sae.W_enc.float().T[fires], sae.W_dec.float()[fires]
    return _finite(torch.cosine_similarity(columns, rows, dim=-1).median(), -1.0)


def other_readings(sae: SAE, at: Streams, l0: float) -> Iterator[tuple[str, SAE]]:
    """The same weights under the conventions that files are mistaken about, each with what it is in words."""
    W_enc, W_dec = sae.W_enc.float(), sae.W_dec.float()
    for share in (2, 4, 8):
        k = max(round(l0 / share), 1)
        if sae.activation != "pursuit" and k < l0:
            yield f"keeping the {k} largest activations per token", _top(sae, k)
    if not sae.is_transcoder:
        folded = sae.b_dec.float() @ W_enc
        yield "with b_dec taken off its input", replace(sae, b_enc=sae.b_enc.float() - folded)
        yield "without taking b_dec off its input", replace(sae, b_enc=sae.b_enc.float() + folded)
    size = float(torch.linalg.vector_norm(sae.read(at.x).x, dim=-1).mean())
    if size > 0:
        for s in (sae.d_in**0.5 / size, size / sae.d_in**0.5):
            y_scale = 1.0 if sae.is_transcoder else s
            scaled = replace(sae, W_enc=W_enc * s, W_dec=W_dec / y_scale, b_dec=sae.b_dec.float() / y_scale)
            yield f"with its input scaled by {s:.3g}", scaled
    for norm in NORMS:
        if norm != sae.norm:
            yield f"with norm {norm}", replace(sae, norm=norm)
    lengths = torch.linalg.vector_norm(W_dec, dim=-1)
    yield "with decoder rows of length 1", replace(sae, W_dec=W_dec / lengths.clamp_min(1e-12)[:, None])
    if sae.threshold is not None:
        threshold = sae.threshold.float()
        yield "with thresholds times the decoder rows' lengths", replace(sae, threshold=threshold * lengths)
        yield (
            "with thresholds over the decoder rows' lengths",
            replace(sae, threshold=threshold / lengths.clamp_min(1e-12)),
        )
    if sae.W_enc.shape[0] == sae.W_enc.shape[1]:
        yield "with W_enc transposed", replace(sae, W_enc=W_enc.T)
    if sae.W_dec.shape[0] == sae.W_dec.shape[1]:
        yield "with W_dec transposed", replace(sae, W_dec=W_dec.T)


def _top(sae: SAE, k: int) -> SAE:
    if sae.ranks:
        return replace(sae, top_k=k) if sae.activation != "groupmax" else sae
    if sae.n_base is not None:  # the boosts keep their thresholds
        return replace(sae, activation="topk", top_k=min(k, sae.n_base))
    return replace(sae, activation="topk", threshold=None, top_k=k)


def _typical(x: Float[Tensor, "tokens width"]) -> Bool[Tensor, " tokens"]:
    norms = torch.linalg.vector_norm(x, dim=-1)
    return norms <= MASSIVE * norms.median()


def _finite(number: Tensor, instead: float = WORST) -> float:
    return float(number) if bool(number.isfinite()) else instead


def _centred(x: Tensor) -> Tensor:
    return x.double() - x.double().mean(0)
