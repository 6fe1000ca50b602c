"""Go through latents in batches, keep on disk what is done, and put the numbers into columns.

What a batch gives depends on its latents only, so a sweep that was interrupted and one that was not end alike.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from saeguard.archives import open_archive
from saeguard.errors import BrokenFile, ScoreMismatch
from saeguard.fingerprints import model_fingerprint
from saeguard.sae import SAE

Progress = Callable[[int, int], None]
"""Told how many of how many are done."""

EVERY_S = 10.0
"""Seconds between two writes of a checkpoint."""
LOGITS = 2**23
"""Numbers in one batch of logits, where nobody says how many rows a batch has."""


def sweep(
    latents: Sequence[int],
    step: Callable[[list[int]], Mapping[str, Tensor]],
    *,
    batch: int,
    asked: Mapping[str, Any],
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """What ``step`` gives for all latents, ``batch`` at a time, put together along the first axis.

    ``asked`` says in plain JSON values what is computed: a checkpoint of something else is refused. The file is
    removed at the end. Raises `ScoreMismatch`, `BrokenFile`.
    """
    path = None if checkpoint is None else Path(checkpoint)
    key = hashlib.sha256(json.dumps([list(latents), dict(asked)], sort_keys=True).encode()).hexdigest()
    done, parts = (0, []) if path is None or not path.exists() else _resume(path, key)
    written = time.monotonic()
    while done < len(latents):
        given = step(list(latents[done : done + batch]))
        parts.append({name: values.detach().cpu() for name, values in given.items()})
        done = min(done + batch, len(latents))
        if progress is not None:
            progress(done, len(latents))
        if path is not None and done < len(latents) and (time.monotonic() - written >= EVERY_S or not EVERY_S):
            parts, written = [_together(parts)], time.monotonic()
            _write(path, parts[0], key, done)
    found = _together(parts)
    if path is not None:
        path.unlink(missing_ok=True)
    return found


def weights_of(model: nn.Module, sae: SAE, checkpoint: str | Path | None) -> dict[str, str]:
    """For ``asked``: a checkpoint of other weights under the same names must not go on. Hashed only for one."""
    return {} if checkpoint is None else {"sae": sae.fingerprint(), "weights": model_fingerprint(model)}


def spread(sae: SAE, latents: Sequence[int], values: Float[Tensor, " n"]) -> Float[Tensor, " d_sae"]:
    """One number per latent of the SAE, NaN for those that are not among ``latents``."""
    column = torch.full((sae.d_sae,), torch.nan)
    column[torch.tensor(list(latents), dtype=torch.long)] = values.float().cpu()
    return column


def chosen(sae: SAE, latents: Sequence[int] | None) -> list[int]:
    """The latents that were asked for, or all that the SAE holds. Raises `LatentOutOfRange`."""
    if latents is None:
        return list(range(sae.d_sae)) if sae.held is None else list(sae.held)
    sae.check_latents(latents)
    return list(dict.fromkeys(latents))


def digest_of(ids: Int[Tensor, "..."]) -> str:
    """SHA-256 of token ids and their shape."""
    plain = ids.to(torch.int64).cpu().contiguous().numpy()
    return hashlib.sha256(repr(plain.shape).encode() + plain.tobytes()).hexdigest()


def _together(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _write(path: Path, found: Mapping[str, Tensor], key: str, done: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    meta = {"saeguard_sweep": key, "done": str(done)}
    save_file({name: values.contiguous() for name, values in found.items()}, temporary, metadata=meta)
    os.replace(temporary, path)


def _resume(path: Path, key: str) -> tuple[int, list[dict[str, Tensor]]]:
    archive = open_archive(path)
    if archive.values.get("saeguard_sweep") != key:
        raise ScoreMismatch(
            f"going on with {path.name}", "it holds the beginning of other scores",
            "Delete it, or name another checkpoint.",
        )  # fmt: skip
    try:
        return int(archive.values["done"]), [{name: archive.read(name).clone() for name in archive.specs}]
    except (KeyError, ValueError) as error:
        raise BrokenFile(f"checkpoint {path.name}", f"{type(error).__name__}: {error}", "Delete it.") from error
