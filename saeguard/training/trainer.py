"""The training loop: batches in, an SAE in the model's own units out, interruptible at any checkpoint.

A batch is a function of the seed and the step (`Batches`), and nothing else is random after the first weights, so a
resumed run equals an uninterrupted one bit for bit (on the same machine with the same number of threads).
"""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from saeguard.errors import TrainError
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.training.batch_topk import (
    Weights,
    batch_topk_loss,
    calibrate,
    initial_weights,
    normalise_decoder,
    project_gradient,
)

logger = logging.getLogger("saeguard.training")

CENTRE_TOKENS = 32_768
CALIBRATION_TOKENS = 32_768


@runtime_checkable
class BatchSource(Protocol):
    """Where batches come from: `saeguard.training.activations.Batches`, or tensors in a test."""

    def at(self, step: int) -> Float[Tensor, "batch d_in"]: ...
    def sample(self, n: int) -> Float[Tensor, "tokens d_in"]: ...


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters. ``k`` is latents per token, ``lr`` the peak after ``warmup`` steps, ``decay`` the last share of
    the steps over which it falls to zero; a latent is dead after ``dead_after`` tokens without firing.
    """

    d_sae: int = 4608
    k: float = 60.0
    steps: int = 4000
    batch: int = 4096
    lr: float = 1e-3
    warmup: int = 100
    decay: float = 0.5
    seed: int = 0
    prefixes: tuple[int, ...] = ()
    dead_after: int = 400_000
    aux_k: int = 256

    def __post_init__(self):
        if not 0 < self.k < self.d_sae:
            raise TrainError(f"k={self.k} of {self.d_sae} latents", "k is not between 0 and d_sae", "Give a smaller k.")
        if sorted({p for p in self.prefixes if 0 < p < self.d_sae}) != list(self.prefixes):
            raise TrainError(
                f"Matryoshka prefixes {self.prefixes}",
                f"they do not rise between 1 and {self.d_sae - 1}",
                "Give sizes in rising order; the whole dictionary is always the last one.",
            )
        if not 0 < self.lr < math.inf:
            raise TrainError(f"a peak learning rate of {self.lr}", "it is not above 0", "Give one such as 1e-3.")

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, a plateau, then linear decay to zero."""
        warm = min(1.0, (step + 1) / max(self.warmup, 1))
        left = (self.steps - step) / max(self.decay * self.steps, 1.0)
        return self.lr * min(warm, left, 1.0)


@dataclass(frozen=True)
class Progress:
    """What one step gave; FVU is of the batch, in the training form."""

    step: int
    steps: int
    fvu: float
    dead: int
    theta: float


@dataclass(eq=False)
class TrainState:
    """Everything a checkpoint holds."""

    weights: Weights
    optimizer: torch.optim.Adam
    centre: Float[Tensor, " d_in"]
    scale: float
    silent: Tensor
    step: int = 0
    target_scale: float | None = None
    """By what a target is multiplied before it is learnt; None where x is its own target."""


def train(
    batches: BatchSource,
    config: TrainConfig,
    *,
    target: BatchSource | None = None,
    start: TrainState | None = None,
    checkpoint: str | Path | None = None,
    every: int = 500,
    resume: bool = False,
    made_of: str | None = None,
    stop_at: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> TrainState:
    """Train to ``config.steps`` (or ``stop_at``), writing ``checkpoint`` every ``every`` steps, whole or not at all.

    The latents learn to give ``target`` where there is one, and else x itself; its batches belong to those of
    ``batches`` token by token. ``start`` has weights to begin with instead of random ones. ``resume`` goes on from the
    checkpoint when there is one, which says ``made_of``: a fingerprint of what the batches come from. Raises
    `TrainError` when it was made with other hyper-parameters or of something else, or when the loss stops being finite.
    """
    path = Path(checkpoint) if checkpoint is not None else None
    state = start or _start(batches, target, config)
    if resume and path is not None and path.is_file():
        _restore(state, config, path, made_of)
    last = min(stop_at if stop_at is not None else config.steps, config.steps)
    while state.step < last:
        report = _step(state, batches.at(state.step), None if target is None else target.at(state.step), config)
        if progress is not None:
            progress(report)
        if path is not None and (state.step % every == 0 or state.step == last):
            _save(state, config, path, made_of)
    return state


def _start(batches: BatchSource, target: BatchSource | None, config: TrainConfig) -> TrainState:
    x = batches.sample(CENTRE_TOKENS)
    centre = geometric_median(x)
    weights = initial_weights(config.d_sae, torch.zeros_like(centre), seed=config.seed)
    state = begin(weights, config, centre=centre, scale=unit_scale(x - centre))
    if target is not None:
        weights.b_dec.requires_grad_(False)  # it stays 0: where no latent fires, nothing is added
        state.target_scale = unit_scale(target.sample(CENTRE_TOKENS))
    return state


def begin(weights: Weights, config: TrainConfig, *, centre: Float[Tensor, " d_in"], scale: float) -> TrainState:
    """A state before its first step; the weights are for (x - centre) * scale."""
    optimizer = torch.optim.Adam(weights.all(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    return TrainState(weights, optimizer, centre, scale, torch.zeros(config.d_sae, dtype=torch.long))


def unit_scale(x: Float[Tensor, "tokens d_in"]) -> float:
    """What gives a typical token a squared norm of d_in."""
    size = x.square().sum(-1).median()
    return math.sqrt(x.shape[-1] / max(float(size), 1e-12))


def _step(
    state: TrainState,
    batch: Float[Tensor, "batch d_in"],
    wanted: Float[Tensor, "batch d_out"] | None,
    config: TrainConfig,
) -> Progress:
    x = (batch.float() - state.centre) * state.scale
    target = None if wanted is None or state.target_scale is None else wanted.float() * state.target_scale
    dead = state.silent > config.dead_after
    loss = batch_topk_loss(state.weights, x, target, k=config.k, dead=dead, aux_k=config.aux_k,
                           prefixes=config.prefixes)  # fmt: skip
    if not math.isfinite(loss.fvu):
        raise TrainError(
            f"step {state.step} of training",
            "the loss is not finite",
            "Lower the learning rate, or go on from an earlier checkpoint.",
        )
    state.optimizer.zero_grad(set_to_none=True)
    loss.total.backward()
    project_gradient(state.weights)
    torch.nn.utils.clip_grad_norm_(state.weights.all(), 1.0)
    for group in state.optimizer.param_groups:
        group["lr"] = config.learning_rate(state.step)
    state.optimizer.step()
    normalise_decoder(state.weights)
    state.silent = torch.where(loss.alive, 0, state.silent + len(batch))
    state.step += 1
    return Progress(state.step, config.steps, loss.fvu, int(dead.sum()), loss.theta)


def geometric_median(x: Float[Tensor, "tokens d_in"], rounds: int = 15) -> Float[Tensor, " d_in"]:
    """The point with the least summed distance to all tokens (Weiszfeld): massive activations do not drag it."""
    centre = x.mean(0)
    for _ in range(rounds):
        pull = 1 / (x - centre).norm(dim=-1, keepdim=True).clamp(min=1e-6)
        centre = (pull * x).sum(0) / pull.sum()
    return centre


def _save(state: TrainState, config: TrainConfig, path: Path, made_of: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    content = {
        "config": asdict(config),
        "made_of": made_of,
        "step": state.step,
        "weights": [tensor.detach() for tensor in state.weights.all()],
        "optimizer": state.optimizer.state_dict(),
        "centre": state.centre,
        "scale": state.scale,
        "silent": state.silent,
        "target_scale": state.target_scale,
    }
    torch.save(content, partial)
    os.replace(partial, path)


def _restore(state: TrainState, config: TrainConfig, path: Path, made_of: str | None) -> None:
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler does
        raise TrainError(
            f"resuming from {path}",
            f"it is not a whole checkpoint ({error})",
            "Remove it to start again.",
        ) from error
    if content["config"] != asdict(config):
        changed = sorted(key for key, value in asdict(config).items() if content["config"].get(key) != value)
        raise TrainError(
            f"resuming from {path}",
            f"it was made with other values of {', '.join(changed)}",
            "Repeat the command with the values it was started with, or start in another folder.",
        )
    if content.get("made_of") != made_of:
        raise TrainError(
            f"resuming from {path}",
            "it was trained on other activations: of another text, model or base",
            "Repeat the command with the files it was started with, or remove it to start again.",
        )
    with torch.no_grad():
        for tensor, saved in zip(state.weights.all(), content["weights"], strict=True):
            tensor.copy_(saved)
    state.optimizer.load_state_dict(content["optimizer"])
    state.centre, state.scale = content["centre"], content["scale"]
    state.silent, state.step = content["silent"], content["step"]
    state.target_scale = content.get("target_scale")


@torch.no_grad()
def export(
    state: TrainState,
    held_in: Float[Tensor, "tokens d_in"],
    *,
    l0: float,
    name: str,
    site: Site | None = None,
    model: str | None = None,
    manifest: dict[str, Any] | None = None,
) -> SAE:
    """The SAE in the model's units as a JumpReLU whose one threshold gives ``l0`` latents per token on ``held_in``.

    With x' = (x - centre) * scale in training, f here is f' / scale. W_enc and W_dec are rounded to float16 first and
    the biases (float32) are folded from the rounded weights, so rounding does not shift activations by a constant.
    """
    weights, scale = state.weights, state.scale
    W_enc, W_dec = weights.W_enc.detach().half(), weights.W_dec.detach().half()
    b_dec = state.centre + weights.b_dec.detach() / scale
    b_enc = weights.b_enc.detach() / scale - b_dec @ W_enc.float()
    pre = held_in[:CALIBRATION_TOKENS].float() @ W_enc.float() + b_enc
    threshold = torch.full_like(b_enc, calibrate(pre, l0=l0))
    return SAE(
        name=name,
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        activation="jumprelu",
        threshold=threshold,
        site=site,
        model=model,
        manifest=manifest or {},
    )
