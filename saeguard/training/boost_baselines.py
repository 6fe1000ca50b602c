"""What boosting is compared with: other ways to spend as many latents, or as much training, on a domain.

    extended     the base and n more latents, all of it trained on the domain's text; the new ones begin as copies of
                 the base's most active latents there, or at random
    fine_tuned   the base, all of it trained on the domain's text
    stitched     an SAE trained on the domain alone; the n of its latents that explain most of the base's error stand
                 behind the base, with decoder rows fitted to that error
    at_random    n random directions stand behind the base in the same way: a floor

The first three are named in arXiv 2507.12990, which came without code: how they are done is our choice. A latent
explains E[f e]^2 / E[f^2] of the error e. Decoder rows are fitted jointly, W = (F'F + r)^-1 F'e. Copies get a tenth of
noise, because twins would learn the same for ever. `stitched` and `at_random` leave the base as it is; the others do
not, and lose on other text what they change.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from saeguard.boosted import Boosted
from saeguard.errors import TrainError
from saeguard.sae import SAE
from saeguard.training.batch_topk import Weights, calibrate
from saeguard.training.boost import Read, check_base
from saeguard.training.trainer import (
    CALIBRATION_TOKENS,
    BatchSource,
    Progress,
    TrainConfig,
    begin,
    export,
    train,
    unit_scale,
)

Tell = Callable[[Progress], None]
Start = Literal["active", "random"]
RIDGE = 1e-3
"""Of the mean of the latents' summed squares."""
HEAVY = 16.0
"""Times the median squared error; a token beyond it counts like one at it."""
ENCODED = 2048
"""Tokens whose activations, of all latents, are held at a time."""
NOISE = 0.1
"""Length of what is added to a copied unit direction."""


def extended(
    base: SAE, batches: BatchSource, config: TrainConfig, *, start: Start, progress: Tell | None = None
) -> SAE:
    """The base with latents up to ``config.d_sae``, all trained; see the module's text. Raises `TrainError`."""
    held_in = batches.sample(CALIBRATION_TOKENS)
    old, centre, scale = from_base(base, held_in)
    n = config.d_sae - base.d_sae
    directions = torch.randn(n, base.d_in, generator=torch.Generator().manual_seed(config.seed))
    new = F.normalize(directions, dim=-1)
    columns, b_enc = new.T, torch.zeros(n)
    if start == "active":
        sums = [base.encode(part).sum(0) for part in held_in.split(ENCODED)]
        busiest = torch.stack(sums).sum(0).argsort(descending=True)
        chosen = busiest[torch.arange(n) % base.d_sae]
        columns, b_enc = old.W_enc[:, chosen] + NOISE * columns, old.b_enc[chosen]
        new = F.normalize(old.W_dec[chosen] + NOISE * new, dim=-1)
    weights = Weights(
        torch.cat([old.W_enc, columns], dim=1), torch.cat([old.b_enc, b_enc]), torch.cat([old.W_dec, new]), old.b_dec
    )
    return _trained(base, weights, centre, scale, batches, config, f"extended ({start})", progress)


def fine_tuned(base: SAE, batches: BatchSource, config: TrainConfig, *, progress: Tell | None = None) -> SAE:
    """The base, all of it trained on; ``config.d_sae`` is its own. Raises `TrainError`."""
    weights, centre, scale = from_base(base, batches.sample(CALIBRATION_TOKENS))
    return _trained(base, weights, centre, scale, batches, config, "fine-tuned", progress)


def stitched(
    base: SAE,
    batches: BatchSource,
    errors: BatchSource,
    config: TrainConfig,
    n: int,
    *,
    progress: Tell | None = None,
) -> SAE:
    """The base and the ``n`` most useful latents of an SAE trained by ``config`` on the domain from scratch.

    ``errors`` are the base's on the tokens of ``batches``. Raises `TrainError` when that SAE has fewer than n latents.
    """
    check_base(base)
    if n > config.d_sae:
        raise TrainError(
            f"{n} latents stitched to {base.name}", f"the domain's SAE has {config.d_sae}", "Give it more latents."
        )
    reads = Read(batches, base)
    held_in, left = reads.sample(CALIBRATION_TOKENS), errors.sample(CALIBRATION_TOKENS).float()
    donor = export(train(reads, config, progress=progress), held_in, l0=config.k, name="donor")
    e, f = _tamed(left, donor.encode(held_in))
    useful = (f.T @ e).square().sum(-1) / f.square().sum(0).clamp_min(1e-12)
    chosen = useful.argsort(descending=True)[:n]
    assert donor.threshold is not None
    return _behind(
        base, donor.W_enc[:, chosen], donor.b_enc[chosen], donor.threshold[chosen], held_in, left, "stitched"
    )


def at_random(base: SAE, batches: BatchSource, errors: BatchSource, n: int, *, k: float, seed: int) -> SAE:
    """The base and ``n`` random directions, of which ``k`` fire per token. Raises `TrainError`."""
    check_base(base)
    held_in, e = Read(batches, base).sample(CALIBRATION_TOKENS), errors.sample(CALIBRATION_TOKENS).float()
    W_enc = F.normalize(torch.randn(base.d_in, n, generator=torch.Generator().manual_seed(seed)), dim=0)
    b_enc = -held_in.mean(0) @ W_enc
    threshold = torch.full((n,), calibrate(held_in @ W_enc + b_enc, l0=k))
    return _behind(base, W_enc, b_enc, threshold, held_in, e, "at random")


def from_base(base: SAE, x: Float[Tensor, "tokens d_in"]) -> tuple[Weights, Float[Tensor, " d_in"], float]:
    """The base in the form of training: weights, and the centre and scale of their inputs, of which x is a sample.

    Its thresholds are left out: BatchTopK sets one from each batch. Raises `TrainError` unless it is a ReLU or
    JumpReLU without a norm.
    """
    check_base(base)
    if base.activation not in ("relu", "jumprelu") or base.norm != "none":
        raise TrainError(
            f"training {base.name} on",
            f"its activation is {base.activation} and its norm {base.norm}",
            "Only relu and jumprelu SAEs without a norm are trained on; boosts and stitching take any.",
        )
    length = base.W_dec.float().norm(dim=-1).clamp_min(1e-8)
    W_enc, centre = base.W_enc.float() * length, base.b_dec.float()
    scale = unit_scale(x - centre)
    b_enc = (base.b_enc.float() + centre @ base.W_enc.float()) * length * scale
    return Weights(W_enc, b_enc, base.W_dec.float() / length[:, None], torch.zeros_like(centre)), centre, scale


def _trained(
    base: SAE,
    weights: Weights,
    centre: Float[Tensor, " d_in"],
    scale: float,
    batches: BatchSource,
    config: TrainConfig,
    how: str,
    progress: Tell | None,
) -> SAE:
    state = begin(weights.require_grad(), config, centre=centre, scale=scale)
    state = train(batches, config, start=state, progress=progress)
    held_in, manifest = batches.sample(CALIBRATION_TOKENS), {k: v for k, v in base.manifest.items() if k != "sha256"}
    return export(state, held_in, l0=config.k, name=f"{base.name} {how}", site=base.site, model=base.model,
                  manifest=manifest)  # fmt: skip


@torch.no_grad()
def _behind(
    base: SAE,
    W_enc: Float[Tensor, "d_in n"],
    b_enc: Float[Tensor, " n"],
    threshold: Float[Tensor, " n"],
    x: Float[Tensor, "tokens d_in"],
    e: Float[Tensor, "tokens d_in"],
    how: str,
) -> SAE:
    """These latents behind the base, with the decoder rows that give most of ``e``."""
    pre = x @ W_enc.float() + b_enc.float()
    e, f = _tamed(e, torch.where(pre > threshold, pre, 0.0))
    gram = f.T @ f
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
    rows = torch.linalg.solve(gram + ridge * torch.eye(len(gram)), f.T @ e)
    boost = SAE(
        name=f"{base.name}/{how}", W_enc=W_enc, b_enc=b_enc, W_dec=rows, b_dec=torch.zeros(base.d_out),
        activation="jumprelu", threshold=threshold, site=base.site, model=base.model, norm=base.norm, eps=base.eps,
        manifest={"boost": {"base": base.fingerprint(), "domain": how}},
    )  # fmt: skip
    return Boosted(base, [boost], name=f"{base.name} {how}")


def _tamed(e: Float[Tensor, "tokens d_in"], f: Float[Tensor, "tokens n"]) -> tuple[Tensor, Tensor]:
    """Tokens with a massive error, weighted down as in training: a single one would decide the fit."""
    size = e.square().sum(-1, keepdim=True)
    weight = (HEAVY * size.median() / size.clamp_min(1e-12)).clamp(max=1.0).sqrt()
    return e * weight, f * weight
