"""The fast kernel of dense ops: all latents of the selected tokens, a stretch of tokens at a time.

Only tokens that some rule is about are encoded, once for all rules, and never more of them at a time than `AT_A_TIME`
numbers hold. Each rule's change of the stream y is

    Splice      scale * (f @ W_dec + b_dec) + shift + x @ skip - y       f without boosts unless they are asked for
    Reweight    scale * (f' - f) @ W_dec
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saeguard.activations import CHUNK, elementwise
from saeguard.axes import Fired, Stream
from saeguard.dense import Reweight, Splice
from saeguard.kernels.dense_parts import DensePart
from saeguard.sae import SAE

AT_A_TIME = 1 << 24
"""Activations that are held at a time, tokens times latents; about five arrays of that size are alive at once."""


@dataclass(frozen=True, eq=False)
class Told:
    """What is known of some tokens: what flows past, ``scale`` and ``shift`` of the norm, pre-activations if any, f."""

    x: Float[Tensor, "token d_in"]
    y: Float[Tensor, "token d_out"]
    scale: Float[Tensor, "token 1"] | None
    shift: Float[Tensor, "token 1"] | None
    pre: Float[Tensor, "token d_sae"] | None
    f: Float[Tensor, "token d_sae"]

    def only(self, applies: Tensor) -> "Told":
        """The same of the tokens where ``applies``."""
        parts = (self.x, self.y, self.scale, self.shift, self.pre, self.f)
        return Told(*(None if part is None else part[applies] for part in parts))  # type: ignore[arg-type]


def edit(
    x: Stream, y: Float[Tensor, "batch pos d_out"], part: DensePart, selected: Fired
) -> tuple[Float[Tensor, "batch pos d_out"], Fired, Float[Tensor, "batch pos rules"]]:
    """What to add to ``y``, per rule whether it adds anything, and the norm of what it adds.

    ``x`` is what the SAE reads and ``y`` what is edited, both float32; they differ under a transcoder. ``selected``
    says per rule of the part which tokens it is about, before triggers.
    """
    all_x, all_y, chosen = x.flatten(0, 1), y.flatten(0, 1), selected.flatten(0, 1)
    dy, adds, norm = torch.zeros_like(all_y), torch.zeros_like(chosen), all_y.new_zeros(chosen.shape)
    for tokens in chosen.any(-1).nonzero()[:, 0].split(max(AT_A_TIME // part.sae.d_sae, 1)):
        if not len(tokens):
            continue
        told = _tell(all_x[tokens], all_y[tokens], part.sae)
        for number, rule in enumerate(part.rules):
            applies = chosen[tokens, number]
            if rule.trigger is not None:
                applies = applies & rule.trigger.fires(told.f[:, list(rule.trigger.latents)])
            change, at = _change(told.only(applies), part, number), tokens[applies]
            dy[at] += change
            adds[at, number] = (change != 0).any(-1)
            norm[at, number] = torch.linalg.vector_norm(change, dim=-1)
    return dy.view_as(y), adds.view_as(selected), norm.view(selected.shape)


def _tell(x: Tensor, y: Tensor, sae: SAE) -> Told:
    read = sae.read(x)
    if sae.activation == "pursuit":
        return Told(x, y, read.scale, read.shift, None, sae.activate(read.x))
    pre = _pre(read.x, sae)
    return Told(x, y, read.scale, read.shift, pre, _fire(pre, sae))


def _change(told: Told, part: DensePart, number: int) -> Tensor:
    op, weights, sae = part.rules[number].op, part.weights[number], part.sae
    if isinstance(op, Reweight) and weights is not None and told.pre is not None:
        return _scaled(_sum(_reweighted(told.pre, op, weights, sae) - told.f, sae), told)
    if isinstance(op, Splice) and op.error != "kept":
        return _spliced(told, op, sae) - told.y
    return torch.zeros_like(told.y)


def _pre(x: Tensor, sae: SAE) -> Tensor:
    """Pre-activations of all latents."""
    if sae.W_enc.dtype == torch.float32:
        return x @ sae.W_enc + sae.b_enc
    stretches = [slice(low, low + CHUNK) for low in range(0, sae.d_sae, CHUNK)]
    return torch.cat([x @ sae.W_enc[:, some].float() + sae.b_enc[some].float() for some in stretches], dim=-1)


def _sum(f: Tensor, sae: SAE) -> Tensor:
    """f @ W_dec."""
    if sae.W_dec.dtype == torch.float32:
        return f @ sae.W_dec
    total = f.new_zeros(f.shape[0], sae.d_out)
    for low in range(0, sae.d_sae, CHUNK):
        total += f[:, low : low + CHUNK] @ sae.W_dec[low : low + CHUNK].float()
    return total


def _scaled(dy: Tensor, told: Told) -> Tensor:
    return dy if told.scale is None else dy * told.scale


def _n_own(sae: SAE) -> int:
    """How many latents the SAE's kind is about; those behind them are boosts."""
    return sae.d_sae if sae.n_base is None else sae.n_base


def _fire(p: Tensor, sae: SAE) -> Tensor:
    """Activations of all latents from (weighted) pre-activations, by the SAE's own kind; boosts are JumpReLU."""
    n, kind, limits = _n_own(sae), sae.activation, sae.threshold
    if sae.ranks:
        own = _ranked(p[:, :n], kind, sae.top_k or 1, sae.rank_by)
    else:
        own = elementwise(kind, p[:, :n], limits[:n] if limits is not None and kind == "jumprelu" else None)
    if limits is None or n == sae.d_sae:
        return own
    return torch.cat([own, elementwise("jumprelu", p[:, n:], limits[n:])], dim=-1)


def _ranked(p: Tensor, kind: str, top_k: int, rank_by: Tensor | None) -> Tensor:
    # "where <" rather than "where >=": a NaN goes on to the output and is refused there
    if kind == "groupmax":
        groups = p.relu().unflatten(-1, (top_k, -1))
        return torch.where(groups < groups.amax(-1, keepdim=True), 0.0, groups).flatten(-2)
    by = p if rank_by is None else p * rank_by[: p.shape[-1]].float()
    by = by.abs() if kind == "abstopk" else by
    least = by.topk(top_k, dim=-1).values[:, -1:]
    return torch.where(by < least, 0.0, p.relu() if kind == "topk" else p)


def _reweighted(pre: Tensor, op: Reweight, weights: Tensor, sae: SAE) -> Tensor:
    """f' of all latents."""
    p = pre * weights
    if op.top_k is None:
        f = _fire(p, sae)
    else:
        f = _bent(_ranked(p, sae.activation if sae.ranks else "topk", op.top_k, _rank_by(sae)), sae)
    return f if op.mode == "weight" else torch.where(f == 0, 0.0, _bent(pre, sae))


def _rank_by(sae: SAE) -> Tensor | None:
    """By what the latents' pre-activations are multiplied before all of them are compared; boosts count as they are."""
    if sae.rank_by is None or sae.n_base is None:
        return sae.rank_by
    return torch.where(torch.arange(sae.d_sae, device=sae.rank_by.device) < sae.n_base, sae.rank_by, 1.0)


def _bent(values: Tensor, sae: SAE) -> Tensor:
    """Values as the kind writes them: through tanh under tanh_relu, but for boosts, and else as they are."""
    if sae.activation != "tanh_relu":
        return values
    n = _n_own(sae)
    return torch.cat([values[:, :n].tanh(), values[:, n:]], dim=-1)


def _spliced(told: Told, op: Splice, sae: SAE) -> Tensor:
    """The reconstruction, as `SAE.decode` computes it."""
    f = told.f
    if op.error == "dropped" and sae.n_base is not None:
        f = torch.where(torch.arange(sae.d_sae, device=f.device) < sae.n_base, f, 0.0)
    x_hat = _scaled(_sum(f, sae) + sae.b_dec.float(), told)
    x_hat = x_hat if told.shift is None else x_hat + told.shift
    return x_hat if sae.skip is None else x_hat + told.x @ sae.skip.float()
