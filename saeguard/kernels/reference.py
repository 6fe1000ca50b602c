"""The slow kernel: one token and one latent at a time, in float64, with the whole dictionary encoded.

It is what every fast kernel is tested against; nothing is shared with them but the meaning of a part.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float

from saeguard.axes import Fired, Stream
from saeguard.dense import Misdirect, Project, Reweight, Splice
from saeguard.kernels.dense_parts import DensePart
from saeguard.kernels.parts import TINY, Part
from saeguard.kernels.stream_parts import SAME, StreamPart
from saeguard.plans import Rule
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


def edit_dense(
    x: Stream, y: Float[torch.Tensor, "batch pos d_out"], part: DensePart, selected: Fired
) -> tuple[Float[torch.Tensor, "batch pos d_out"], Fired, Float[torch.Tensor, "batch pos rules"]]:
    """The dense ops: what to add to ``y``, per rule whether it adds anything, and that one's norm; see `dense.edit`."""
    changes = torch.zeros(*selected.shape, y.shape[-1], dtype=torch.float64)
    for row, token, number in selected.nonzero().tolist():
        rule, seen, out = part.rules[number], x[row, token].double(), y[row, token].double()
        f = _encode(_read(seen, part.sae)[0], part.sae)
        if rule.trigger is None or any(f[latent] > rule.trigger.threshold for latent in rule.trigger.latents):
            changes[row, token, number] = _dense_change(seen, out, f, part, number)
    norm = (changes**2).sum(-1).sqrt()
    return changes.sum(2).float(), (changes != 0).any(-1), norm.float()


def _dense_change(x: torch.Tensor, y: torch.Tensor, f: torch.Tensor, part: DensePart, number: int) -> torch.Tensor:
    op, sae, weights = part.rules[number].op, part.sae, part.weights[number]
    read, scale = _read(x, sae)
    if isinstance(op, Reweight) and weights is not None:
        return (_reweighted(read, op, weights.double(), sae) - f) @ sae.W_dec.double() * scale
    if not isinstance(op, Splice) or op.error == "kept":
        return y * 0
    told = f.clone()
    if op.error == "dropped" and sae.n_base is not None:
        told[sae.n_base :] = 0.0
    x_hat = (told @ sae.W_dec.double() + sae.b_dec.double()) * scale
    if sae.norm in ("center", "layer_norm") and not sae.is_transcoder:
        x_hat = x_hat + x.mean()
    return x_hat - y if sae.skip is None else x_hat + x @ sae.skip.double() - y


def edit_stream(
    x: Stream, y: Float[torch.Tensor, "batch pos d_out"], part: StreamPart, selected: Fired
) -> tuple[Float[torch.Tensor, "batch pos d_out"], Fired, Float[torch.Tensor, "batch pos rules"]]:
    """The dense ops that need no activation; gives what `edit_dense` gives. See `stream.edit`."""
    changes = torch.zeros(*selected.shape, y.shape[-1], dtype=torch.float64)
    for row, token, number in selected.nonzero().tolist():
        rule, out = part.rules[number], y[row, token].double()
        f = _encode(_read(x[row, token].double(), part.sae)[0], part.sae)
        held = dict(zip(part.sae.held or (), f.tolist(), strict=True))
        if rule.trigger is None or any(held[latent] > rule.trigger.threshold for latent in rule.trigger.latents):
            changes[row, token, number] = _stream_change(out, part.sae, rule)
    norm = (changes**2).sum(-1).sqrt()
    return changes.sum(2).float(), (changes != 0).any(-1), norm.float()


def _stream_change(y: torch.Tensor, sae: SAE, rule: Rule) -> torch.Tensor:
    op = rule.op
    if isinstance(op, Misdirect):
        length = op.amount * (float(y.norm()) if op.unit == "norm" else 1.0)
        return length * y.new_tensor(op.direction(len(y))) - y
    if not isinstance(op, Project):
        return y * 0
    # what is nearest to y among the sums of the rows, one latent after the other made orthogonal to those before it
    taken = y * 0
    kept: list[torch.Tensor] = []
    held = list(sae.held or ())
    for latent in rule.latents:
        row = sae.W_dec[held.index(latent)].double()
        rest = row / row.norm().clamp_min(TINY)
        for _ in range(2):  # twice, because once leaves what rounding left
            for other in kept:
                rest = rest - (rest @ other) * other
        if float(rest.norm()) > SAME:
            kept.append(rest / rest.norm())
            taken = taken + (y @ kept[-1]) * kept[-1]
    return -op.strength * taken


def _reweighted(read: torch.Tensor, op: Reweight, weights: torch.Tensor, sae: SAE) -> torch.Tensor:
    """f' as the activations of an SAE whose encoder was weighted: pre * w = x @ (W_enc * w) + b_enc * w."""
    weighted = replace(sae, W_enc=sae.W_enc.double() * weights, b_enc=sae.b_enc.double() * weights)
    if op.top_k is not None:
        behind = torch.arange(sae.d_sae) >= (sae.d_sae if sae.n_base is None else sae.n_base)
        weighted = replace(
            weighted, activation=sae.activation if sae.ranks else "topk", top_k=op.top_k, threshold=None, n_base=None,
            rank_by=None if sae.rank_by is None else sae.rank_by.masked_fill(behind, 1.0),
        )  # fmt: skip
    f, pre = _encode(read, weighted), read @ sae.W_enc.double() + sae.b_enc.double()
    if sae.activation == "tanh_relu":
        own = torch.arange(sae.d_sae) < (sae.d_sae if sae.n_base is None else sae.n_base)
        pre = torch.where(own, pre.tanh(), pre)
        f = torch.where(own, f.tanh(), f) if op.top_k is not None else f
    return f if op.mode == "weight" else torch.where(f == 0, 0.0, pre)


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
    n = sae.d_sae if sae.n_base is None else sae.n_base  # what comes behind are boosts
    held = list(range(sae.d_sae) if sae.held is None else sae.held)
    ranked = _ranked(x, pre[:n], sae) if sae.ranks else []
    limits = [0.0] * len(held) if sae.threshold is None else sae.threshold.double().tolist()
    values = []
    for latent, own, limit in zip(held, [pre[latent] for latent in held] if sae.ranks else pre, limits, strict=True):
        if latent < n and sae.ranks:
            values.append(ranked[latent])
        elif latent < n and sae.activation != "jumprelu":
            p = 0.0 if own <= 0 else own
            values.append(math.tanh(p) if sae.activation == "tanh_relu" else p)
        else:
            values.append(0.0 if own <= limit else own)
    return x.new_tensor(values)


def _ranked(x: torch.Tensor, pre: list[float], sae: SAE) -> list[float]:
    """Activations under a kind that ranks, of the latents that it ranks."""
    if sae.activation == "pursuit":
        return _pursue(x, len(pre), sae)
    kept = _kept(pre, sae)
    signed = sae.activation in ("topk_norelu", "abstopk")
    return [(p if signed or not p <= 0 else 0.0) if latent in kept else 0.0 for latent, p in enumerate(pre)]


def _kept(pre: list[float], sae: SAE) -> set[int]:
    """The latents that may fire, those that tie with the last of them included."""
    weights = [1.0] * len(pre) if sae.rank_by is None else sae.rank_by[: len(pre)].double().tolist()
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


def _pursue(x: torch.Tensor, n: int, sae: SAE) -> list[float]:
    how, atoms, found, rest = sae.pursuit, sae.W_enc[:, :n].double(), [0.0] * n, x - sae.b_dec.double()
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
    unit = 1.0
    if part.by_norm is not None and part.by_norm[column]:
        unit = max(float(torch.linalg.vector_norm(y)), TINY)
    if f <= float(part.floor[column]) * unit:
        return f * 0
    scale, shift, lo, hi = (float(t[column]) for t in (part.scale, part.shift, part.lo, part.hi))
    if (scale, lo, hi) == (1.0, -float("inf"), float("inf")):
        return torch.tensor(shift * unit, dtype=torch.float64)
    return (scale * f + shift * unit).clamp(lo * unit, hi * unit) - f
