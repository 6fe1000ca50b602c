"""The slow kernel: one token and one latent at a time, in float64, with the whole dictionary encoded.

It is what every fast kernel is tested against; nothing is shared with them but the meaning of a part.
"""

import torch
from jaxtyping import Float

from saeguard.axes import Fired, Stream
from saeguard.kernels.parts import TINY, Part
from saeguard.sae import SAE


def edit(
    x: Stream, y: Float[torch.Tensor, "batch pos d_out"], part: Part, selected: Fired
) -> tuple[Float[torch.Tensor, "batch pos d_out"], Float[torch.Tensor, "batch pos k"], torch.Tensor | None]:
    """What to add to ``y`` (float32), the change of each column's activation, and the scale; see `sliced.edit`."""
    batch, pos, _ = x.shape
    df = torch.zeros(batch, pos, len(part.rule), dtype=torch.float64)
    scale = torch.ones(batch, pos, 1, dtype=torch.float64)
    for row in range(batch):
        for token in range(pos):
            normed, scale[row, token] = _read(x[row, token].double(), part.sae)
            chosen = selected[row, token].clone()
            df[row, token] = _edit_token(_encode(normed, part.sae), y[row, token].double(), part, chosen)
    dy = df @ part.W_dec.double() * scale
    return dy.float(), df.float(), scale.float()


def _edit_token(f: torch.Tensor, y: torch.Tensor, part: Part, selected: torch.Tensor) -> torch.Tensor:
    for rule, trigger, watched in part.triggers:
        if not any(f[i] > trigger.threshold for i in watched.tolist()):
            selected[rule] = False
    df = torch.zeros(len(part.rule), dtype=torch.float64)
    for column, rule in enumerate(part.rule.tolist()):
        stronger = any(selected[high] and column in columns.tolist() for columns, high in part.yields)
        if selected[rule] and not stronger:
            df[column] = _change(y, f[part.source[column]], part, column)
    return df


def _read(x: torch.Tensor, sae: SAE) -> tuple[torch.Tensor, float]:
    """A token as the encoder reads it, and what the change of the reconstruction is multiplied with."""
    values, n = x.tolist(), len(x)
    mean = sum(values) / n if sae.norm in ("center", "layer_norm") else 0.0
    centred, scale = [value - mean for value in values], 1.0
    if sae.norm == "layer_norm":
        std = (sum(value**2 for value in centred) / (n - 1)) ** 0.5
        centred, scale = [value / (std + sae.eps) for value in centred], std
    if sae.norm == "const_norm":
        scale = (sum(value**2 for value in values) / n) ** 0.5
        centred = [value / max(scale, TINY) for value in values]
    return x.new_tensor(centred), 1.0 if sae.is_transcoder else scale


def _encode(x: torch.Tensor, sae: SAE) -> torch.Tensor:
    """Activations of the held latents of one token, from all of them where the kind ranks."""
    pre = (x @ sae.W_enc.double() + sae.b_enc.double()).tolist()
    held = list(sae.held or range(len(pre)))
    if sae.activation == "pursuit":
        found = _pursue(x, sae)
        return x.new_tensor([found[latent] for latent in held])
    if sae.ranks:
        kept = _kept(pre, sae)
        value = (lambda p: p) if sae.activation in ("topk_norelu", "abstopk") else (lambda p: 0.0 if p <= 0 else p)
        return x.new_tensor([value(pre[latent]) if latent in kept else 0.0 for latent in held])
    if sae.activation == "tanh_relu":
        return x.new_tensor([0.0 if p <= 0 else p for p in pre]).tanh()
    limits = [0.0] * len(pre) if sae.threshold is None else sae.threshold.double().tolist()
    return x.new_tensor([0.0 if p <= limit else p for p, limit in zip(pre, limits, strict=True)])


def _kept(pre: list[float], sae: SAE) -> set[int]:
    """The latents that may fire, those that tie with the last of them included."""
    weights = [1.0] * len(pre) if sae.rank_by is None else sae.rank_by.double().tolist()
    rank = [p * weight for p, weight in zip(pre, weights, strict=True)]
    k = sae.top_k or 1
    if sae.activation == "groupmax":
        size = len(pre) // k
        tops = [max(pre[group * size : (group + 1) * size]) for group in range(k)]
        return {latent for latent, p in enumerate(pre) if p >= tops[latent // size]}
    if sae.activation == "abstopk":
        rank = [abs(p) for p in rank]
    last = sorted(rank)[-k]
    return {latent for latent, p in enumerate(rank) if p >= last}


def _pursue(x: torch.Tensor, sae: SAE) -> list[float]:
    how, atoms, found, rest = sae.pursuit, sae.W_enc.double(), [0.0] * sae.d_sae, x - sae.b_dec.double()
    assert how is not None
    for _ in range(how.rounds):
        products = (rest @ atoms).tolist()
        fit = [abs(p) if how.signed else max(p, 0.0) for p in products]
        best = fit.index(max(fit))
        coefficient = products[best] if how.signed else fit[best]
        is_old = coefficient == 0 or found[best] != 0
        found[best] += coefficient
        rest = rest - coefficient * atoms[:, best]
        if how.stops_on_repeat and is_old or float(torch.linalg.vector_norm(rest)) < how.residual:
            break
    return found


def _change(y: torch.Tensor, f: torch.Tensor, part: Part, column: int) -> torch.Tensor:
    if f <= part.floor[column]:
        return f * 0
    unit = 1.0
    if part.by_norm is not None and part.by_norm[column]:
        unit = max(float(torch.linalg.vector_norm(y)), TINY)
    scale, shift, lo, hi = (float(t[column]) for t in (part.scale, part.shift, part.lo, part.hi))
    if (scale, lo, hi) == (1.0, -float("inf"), float("inf")):
        return torch.tensor(shift * unit, dtype=torch.float64)
    return (scale * f + shift * unit).clamp(lo * unit, hi * unit) - f
