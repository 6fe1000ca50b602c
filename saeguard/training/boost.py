"""Fit a boost: an SAE that reads x and learns to give what a frozen base leaves over on the text of one domain.

    xn = (x - shift) / a              as the base reads it; a = 1 and shift = 0 without a norm
    e  = (x - base(x)) / a            the target
    f  = BatchTopK_k(xn @ W_enc + b_enc)
    loss = mean w |e - f @ W_dec|^2   w and aux-k as in `saeguard.training.batch_topk`

This is the method of arXiv 2507.12990, with the aux-k of base training for latents that would die. What is added here:
each batch may hold tokens of other text behind the domain's, with a target of 0. A boost that has not seen any
fires on all text alike, and boosts that are stacked then add what they share once each.

The base is never changed. Its errors are written once beside the activations, so runs with other k, sizes and seeds
cost only the boost's own steps. For inference the boost becomes a JumpReLU with one threshold, set to its k on the
domain's text.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from saeguard.engines import engine_for
from saeguard.engines.fit import check_model
from saeguard.errors import TrainError, WidthMismatch
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.training.activations import ActivationStore, Batches
from saeguard.training.activations import Progress as Told
from saeguard.training.batch_topk import calibrate
from saeguard.training.trainer import CALIBRATION_TOKENS, BatchSource, Progress, TrainConfig, TrainState, train

SHARE = 0.5
"""Tokens of other text per token of the domain: with more, less of the domain's error is learnt (README, Boosts)."""
LEAST_TOKENS = 1024
"""Tokens without which a threshold would be that of a few sentences."""
_ROWS = 2048


@dataclass(frozen=True, eq=False)
class Read:
    """Batches of x as the base reads them."""

    batches: BatchSource
    base: SAE

    def at(self, step: int) -> Float[Tensor, "batch d_in"]:
        """The batch of one step."""
        return self.base.read(self.batches.at(step)).x

    def sample(self, n: int) -> Float[Tensor, "tokens d_in"]:
        """About ``n`` tokens, the same on every call."""
        return self.base.read(self.batches.sample(n)).x


@dataclass(frozen=True, eq=False)
class Beside:
    """Batches of a domain with those of other text behind them; ``silent`` puts zeros there instead."""

    batches: BatchSource
    others: tuple[BatchSource, ...]
    silent: bool = False

    def at(self, step: int) -> Float[Tensor, "batch d_in"]:
        """The batch of one step, the domain's tokens first."""
        mine, others = self.batches.at(step), torch.cat([other.at(step) for other in self.others])
        return torch.cat([mine, torch.zeros_like(others) if self.silent else others])

    def sample(self, n: int) -> Float[Tensor, "tokens d_in"]:
        """Tokens of the domain alone: its centre and scale are those of the boost."""
        return self.batches.sample(n)


def fit_boost(
    base: SAE,
    store: ActivationStore,
    config: TrainConfig,
    *,
    name: str,
    domain: str,
    elsewhere: Sequence[ActivationStore] = (),
    share: float = SHARE,
    checkpoint: str | Path | None = None,
    every: int = 500,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    writing: Told | None = None,
) -> SAE:
    """A boost of ``base`` for the text that ``store`` has the activations of; ``config.k`` latents per token.

    ``elsewhere`` are activations of other text, on which it learns to be silent, the same number of each per batch and
    together ``share`` tokens per token of the domain.
    ``checkpoint`` and ``resume`` as in `train`, which goes on only with the same base and texts; ``progress`` hears of
    steps, ``writing`` of tokens whose error was computed. Raises `TrainError` for a base that is a transcoder, boosted
    or read in part, for a store without its site and for too little text.
    """
    site = check_base(base)
    errors = write_errors(base, store, progress=writing)
    batches = [Batches(one, site, batch=config.batch, seed=config.seed) for one in (store, errors)]
    each = max(1, round(share * config.batch / max(len(elsewhere), 1)))
    others = tuple(Batches(one, site, batch=each, seed=config.seed) for one in elsewhere)
    parts = [base.fingerprint(), *(one.fingerprint() for one in (store, *elsewhere))]
    return fit_batches(base, batches[0], batches[1], config, name=name, domain=domain, others=others,
                       checkpoint=checkpoint, every=every, resume=resume, progress=progress,
                       made_of=hashlib.sha256(" ".join(parts).encode()).hexdigest())  # fmt: skip


def fit_batches(
    base: SAE,
    batches: BatchSource,
    errors: BatchSource,
    config: TrainConfig,
    *,
    name: str,
    domain: str,
    others: Sequence[BatchSource] = (),
    **options: Any,
) -> SAE:
    """A boost from batches of x and of the base's errors on the same tokens; see `fit_boost`.

    ``others`` are batches of x of other text. ``options`` are those of `train`.
    """
    reads = Read(batches, base)
    held_in = reads.sample(CALIBRATION_TOKENS)
    if len(held_in) < LEAST_TOKENS:
        raise TrainError(
            f"a boost of {base.name} for {domain}",
            f"there are {len(held_in)} tokens to set its threshold on, and {LEAST_TOKENS} are the least",
            "Give more text.",
        )
    learnt, target = reads, errors
    if others:
        beside = tuple(Read(other, base) for other in others)
        learnt, target = Beside(reads, beside), Beside(errors, beside, silent=True)
        batch = len(learnt.at(0))
        # as many activations per batch as without the other text, which is to have none of them
        config, k = replace(config, batch=batch, k=config.k * config.batch / batch), config.k
    else:
        k = config.k
    state = train(learnt, config, target=target, **options)
    return export_boost(state, held_in, base, l0=k, name=name, domain=domain)


@torch.no_grad()
def export_boost(
    state: TrainState, held_in: Float[Tensor, "tokens d_in"], base: SAE, *, l0: float, name: str, domain: str
) -> SAE:
    """The boost in the model's units, a JumpReLU whose one threshold gives ``l0`` latents per token on ``held_in``.

    With x' = (xn - centre) * s and e' = e * t in training, f here is f' / t.
    """
    weights, s, t = state.weights, state.scale, state.target_scale
    assert t is not None
    W_enc, W_dec = (weights.W_enc.detach() * (s / t)).half(), weights.W_dec.detach().half()
    b_enc = weights.b_enc.detach() / t - state.centre @ W_enc.float()
    threshold = calibrate(held_in.float() @ W_enc.float() + b_enc, l0=l0)
    return SAE(
        name=name, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=torch.zeros(base.d_out), activation="jumprelu",
        threshold=torch.full_like(b_enc, threshold), site=base.site, model=base.model, norm=base.norm, eps=base.eps,
        manifest={"boost": {"base": base.fingerprint(), "base_name": base.name, "domain": domain}},
    )  # fmt: skip


def check_base(base: SAE) -> Site:
    """Where the base reads and writes. Raises `TrainError` when it cannot have boosts fitted to it here."""
    found = {
        "it names no site": base.site is None,
        "it is a transcoder: what it writes is not what it reads": base.is_transcoder,
        "it is boosted already": base.n_base is not None,
        "only some of its latents were read": base.held is not None,
        "it was trained on processed weights, which the model's own activations are not": bool(
            base.manifest.get("processing")
        ),
    }
    for reason, holds in found.items():
        if holds:
            raise TrainError(
                f"a boost of {base.name}", reason,
                "Give a whole SAE of one site of the plain model; boosts of one base stack without knowing each other.",
            )  # fmt: skip
    assert base.site is not None
    return base.site


def check_subject(base: SAE, model: nn.Module) -> Site:
    """Where on this model the base reads and writes.

    Raises what `check_base` raises, and `SiteNotFound`, `WidthMismatch` or `WrongModel` where it belongs to another.
    """
    site, engine = check_base(base), engine_for(model)
    width = engine.resolve(site).width
    if width != base.d_in:
        raise WidthMismatch(
            f"a boost of {base.name} at {site}", f"it reads vectors of width {base.d_in}, and that carries {width}",
            "Give the model that the base was trained on.",
        )  # fmt: skip
    check_model(base, site, engine)
    return site


def write_errors(base: SAE, store: ActivationStore, *, progress: Told | None = None) -> ActivationStore:
    """What ``base`` leaves over of the stored activations, in the same order, in a folder of its own beside them.

    Shards that are there already are not computed again. Raises `TrainError` when the base's site is not stored.
    """
    site = check_base(base)
    errors = ActivationStore(store.folder / f"error-{base.fingerprint()[:16]}", store.chunks, store.rows_per_shard)
    errors.folder.mkdir(parents=True, exist_ok=True)
    sizes, done = store.shard_sizes(), 0
    for shard, size in enumerate(sizes):
        if not errors.path(shard).is_file():
            left = torch.cat([error_of(base, x) for x in _stored(store, shard, site).split(_ROWS)])
            partial = errors.path(shard).with_suffix(".partial")
            save_file({str(site): left.to(torch.bfloat16)}, partial)
            os.replace(partial, errors.path(shard))
        done += size
        if progress is not None:
            progress(done, sum(sizes))
    return errors


def error_of(base: SAE, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
    """(x - base(x)) / a, in float32: what a boost of ``base`` is to give."""
    x = x.float()
    left, scale = x - base.decode(base.encode(x), x), base.read(x).scale
    return left if scale is None else left / scale.clamp_min(torch.finfo(torch.float32).tiny)


def _stored(store: ActivationStore, shard: int, site: Site) -> Tensor:
    try:
        return store.read(shard, site)
    except TrainError as error:
        raise TrainError(
            f"errors at {site}", f"the activations in {store.folder} do not have it ({error.found})",
            "Collect the activations of the base's site.",
        ) from error  # fmt: skip
