"""The maths of a BatchTopK SAE: keep the k * batch largest activations of a whole batch (arXiv 2412.06410).

    pre = (x - b_dec) @ W_enc + b_enc       theta = the (k * batch)-th largest of pre, over tokens and latents
    f = pre where pre > max(theta, 0)       x_hat = f @ W_dec + b_dec
    loss = mean w |x - x_hat|^2 / d_in      + 1/32 of the dead latents' attempt at what is left of x (aux-k)

theta is a property of the batch, so f depends on the other tokens: for steering the SAE becomes a JumpReLU with a
fixed threshold (`calibrate`). Matryoshka (2503.17547) sums the loss over reconstructions from nested prefixes of the
latents. Matmuls run in bfloat16 over float32 master weights.

A boost (arXiv 2507.12990) reads x and is to give something else, a target e; it has no b_dec:

    f = (x @ W_enc + b_enc) as above        loss = mean w |e - f @ W_dec|^2 / d_out + aux-k of what is left of e
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

AUX_COEFFICIENT = 1 / 32
EXACT_RANK_LIMIT = 1 << 20
"""Activations; a larger batch has its theta estimated from evenly spaced tokens, about 2 % off in the count kept."""


@dataclass(frozen=True, eq=False)
class Weights:
    """Trainable tensors, float32, for inputs scaled to a mean squared norm of ``d_in``."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.W_enc, self.b_enc, self.W_dec, self.b_dec

    def require_grad(self) -> "Weights":
        for tensor in self.all():
            tensor.requires_grad_(True)
        return self


@dataclass(frozen=True, eq=False)
class Loss:
    """What one batch gave. ``theta`` is in scaled units; ``alive`` is true for latents that fired on this batch."""

    total: Float[Tensor, ""]
    fvu: float
    theta: float
    alive: Bool[Tensor, " d_sae"]


def initial_weights(d_sae: int, b_dec: Float[Tensor, " d_in"], *, seed: int) -> Weights:
    """Random unit decoder rows, the encoder as their transpose, and ``b_dec`` as given."""
    rows = torch.randn(d_sae, len(b_dec), generator=torch.Generator().manual_seed(seed))
    W_dec = F.normalize(rows, dim=-1)
    return Weights(W_dec.T.contiguous().clone(), torch.zeros(d_sae), W_dec, b_dec.clone()).require_grad()


def batch_topk_loss(
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"] | None = None,
    *,
    k: float,
    dead: Bool[Tensor, " d_sae"] | None = None,
    aux_k: int = 256,
    prefixes: Sequence[int] = (),
    heavy: float = 16.0,
) -> Loss:
    """Loss of one batch, with gradients to ``weights``.

    ``target`` is what to reconstruct, x itself unless given. ``prefixes`` are the sizes of the nested Matryoshka
    prefixes; empty means the whole dictionary alone. A token whose squared norm exceeds ``heavy`` times the mean of a
    typical token (d_in) is weighted down to that: a single massive activation would otherwise own the batch.
    """
    half = torch.bfloat16
    centred = x - weights.b_dec
    wanted = centred if target is None else target
    bias = weights.b_enc - weights.b_dec @ weights.W_enc  # same pre, without a gradient through batch x d_in
    pre = torch.addmm(bias.to(half), x.to(half), weights.W_enc.to(half))
    theta = max(rank_threshold(pre.detach(), k), 0.0)
    f = F.threshold(pre, theta, 0.0)
    decoder = weights.W_dec.to(half)
    size = wanted.detach().square().sum(-1, keepdim=True)
    weight = (heavy * wanted.shape[-1] / size).clamp(max=1.0) / wanted.numel()
    error, total = _errors(wanted, f, decoder, weight, prefixes)
    if dead is not None and bool(dead.any()):
        total = total + AUX_COEFFICIENT * _aux_loss(weights, centred, error.detach(), dead, aux_k)
    with torch.no_grad():
        whole = x if target is None else target
        spread = (whole - whole.mean(0)).square().sum()
        fvu = float(error.square().sum() / spread)
    return Loss(total, fvu, theta, f.detach().amax(0) > 0)


def _errors(
    wanted: Float[Tensor, "batch d_out"],
    f: Float[Tensor, "batch d_sae"],
    decoder: Float[Tensor, "d_sae d_out"],
    weight: Float[Tensor, "batch 1"],
    prefixes: Sequence[int],
) -> tuple[Float[Tensor, "batch d_out"], Float[Tensor, ""]]:
    """What the whole dictionary leaves over, and the mean loss over the prefixes, the whole one included."""
    error, losses, start = wanted, [], 0
    for stop in (*prefixes, decoder.shape[0]):
        error = error - (f[:, start:stop] @ decoder[start:stop]).float()
        losses.append((weight * error.square()).sum())
        start = stop
    return error, torch.stack(losses).mean()


def _aux_loss(
    weights: Weights,
    centred: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_out"],
    dead: Bool[Tensor, " d_sae"],
    aux_k: int,
) -> Float[Tensor, ""]:
    """Squared error of the dead latents' reconstruction of ``error``, relative to the error (OpenAI's aux-k).

    Computed on every fourth token only: it needs a ranking per token, and dead latents need a direction, not speed.
    """
    half = torch.bfloat16
    some, left = centred[::4].detach().to(half), error[::4]
    pre = torch.addmm(weights.b_enc[dead].to(half), some, weights.W_enc[:, dead].to(half))
    if pre.shape[-1] > aux_k:
        values, places = pre.topk(aux_k, dim=-1)
        pre = torch.zeros_like(pre).scatter(-1, places, values)
    attempt = (pre.relu() @ weights.W_dec[dead].to(half)).float()
    size = left.square().sum(-1)
    some_left = size[size > 0]  # on other text a boost leaves nothing where it is silent
    if not len(some_left):
        return (attempt * 0.0).sum()
    weight = some_left.median() / size.clamp(min=some_left.median())  # massive tokens count like a typical one
    return (weight * (attempt - left).square().sum(-1)).sum() / (weight * size).sum().clamp(min=1e-12)


def rank_threshold(pre: Float[Tensor, "batch d_sae"], k: float) -> float:
    """The value that about ``k`` activations per token exceed."""
    step = -(-pre.numel() // EXACT_RANK_LIMIT)
    values = pre[::step].flatten().float()
    rank = min(max(int(round(k * len(pre[::step]))), 1), values.numel() - 1)
    return float(values.kthvalue(values.numel() - rank).values)


@torch.no_grad()
def project_gradient(weights: Weights) -> None:
    """Take out of the decoder's gradient what would only change the length of its rows."""
    gradient = weights.W_dec.grad
    if gradient is not None:
        gradient.sub_((gradient * weights.W_dec).sum(-1, keepdim=True) * weights.W_dec)


@torch.no_grad()
def normalise_decoder(weights: Weights) -> None:
    """Give every decoder row unit length."""
    weights.W_dec.div_(weights.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8))


@torch.no_grad()
def calibrate(pre: Float[Tensor, "tokens d_sae"], *, l0: float) -> float:
    """The fixed threshold above which ``l0`` activations per token lie, on average over these tokens; at least 0.

    Exact for the tokens given: a bound from a sample sets most activations aside, the rest are ranked.
    """
    rank = round(l0 * len(pre))
    bound = rank_threshold(pre, 2.0 * l0)
    values = torch.cat([part[part > bound] for part in pre.split(4096)])
    if len(values) <= rank:  # the sample misled: rank them all
        values = pre.flatten()
    return max(float(values.kthvalue(len(values) - rank).values), 0.0)
