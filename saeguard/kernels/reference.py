"""The slow kernel: one token and one latent at a time, in float64, with the whole dictionary encoded.

It is what every fast kernel is tested against; nothing is shared with them but the meaning of a part.
"""

import torch
from jaxtyping import Float

from saeguard.axes import Fired, Stream
from saeguard.kernels.parts import TINY, Part


def edit(x: Stream, part: Part, selected: Fired) -> tuple[Stream, Float[torch.Tensor, "batch pos k"]]:
    """What to add to ``x`` (float32), and the change of each column's activation; see `sliced.edit`."""
    batch, pos, _ = x.shape
    df = torch.zeros(batch, pos, len(part.rule), dtype=torch.float64)
    for row in range(batch):
        for token in range(pos):
            df[row, token] = _edit_token(x[row, token].double(), part, selected[row, token].clone())
    dx = df @ part.W_dec.double()
    return dx.float(), df.float()


def _edit_token(x: torch.Tensor, part: Part, selected: torch.Tensor) -> torch.Tensor:
    f = _encode(x, part)
    for rule, trigger, watched in part.triggers:
        if not any(f[i] > trigger.threshold for i in watched.tolist()):
            selected[rule] = False
    df = torch.zeros(len(part.rule), dtype=torch.float64)
    for column, rule in enumerate(part.rule.tolist()):
        stronger = any(selected[high] and column in columns.tolist() for columns, high in part.yields)
        if selected[rule] and not stronger:
            df[column] = _change(x, f[part.source[column]], part, column)
    return df


def _encode(x: torch.Tensor, part: Part) -> torch.Tensor:
    sae = part.sae
    pre = x @ sae.W_enc.double() + sae.b_enc.double()
    if sae.activation == "topk":
        f = torch.zeros_like(pre)
        for latent in sorted(range(len(pre)), key=lambda i: -float(pre[i]))[: sae.top_k]:
            f[latent] = max(float(pre[latent]), 0.0)
    elif sae.threshold is not None:
        limits = sae.threshold.double().tolist()
        f = pre.new_tensor([0.0 if p <= t else p for p, t in zip(pre.tolist(), limits, strict=True)])
    else:
        f = pre.new_tensor([0.0 if p <= 0 else p for p in pre.tolist()])
    return f if part.picks is None else f[part.picks]


def _change(x: torch.Tensor, f: torch.Tensor, part: Part, column: int) -> torch.Tensor:
    if f <= part.floor[column]:
        return f * 0
    unit = 1.0
    if part.by_norm is not None and part.by_norm[column]:
        unit = max(float(torch.linalg.vector_norm(x)), TINY)
    scale, shift, lo, hi = (float(t[column]) for t in (part.scale, part.shift, part.lo, part.hi))
    if (scale, lo, hi) == (1.0, -float("inf"), float("inf")):
        return torch.tensor(shift * unit, dtype=torch.float64)
    return (scale * f + shift * unit).clamp(lo * unit, hi * unit) - f
