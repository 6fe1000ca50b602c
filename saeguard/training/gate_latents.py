"""The latents of every token of some rows, sparse and on disk, so that heads can be fitted many times over.

    F[t, j] = f_j at token t        tokens of all rows in one matrix, row behind row

The model runs once, up to the SAE's site. A shard is one safetensors file, written atomically: an interrupted pass goes
on at its first missing shard. Activations are kept in bfloat16.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saeguard.errors import TrainError
from saeguard.fingerprints import model_fingerprint
from saeguard.sae import SAE
from saeguard.training.activations import Reader
from saeguard.training.claims import claim
from saeguard.training.gate_rows import GateRow

SCHEMA = 1
MANIFEST = "latents.json"
ROWS_PER_SHARD = 256
BATCH_TOKENS = 2048

Progress = Callable[[int, int], None]
"""Called with tokens done and tokens in all."""


@dataclass(frozen=True, eq=False)
class TokenLatents:
    """``starts[i]`` is the first token of row i in the matrix, ``starts[-1]`` the number of tokens."""

    starts: Int[Tensor, " rows_and_one"]
    ids: Int[Tensor, " token"]
    crow: Int[Tensor, " token_and_one"]
    column: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]
    d_sae: int

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    def of_tokens(self, kept: Bool[Tensor, " token"]) -> tuple[Tensor, Tensor, Tensor]:
        """``crow``, ``column`` and ``value`` of the same matrix with the other tokens' latents all silent."""
        sizes = self.crow.diff() * kept
        entries = kept.repeat_interleave(self.crow.diff())
        crow = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        return crow, self.column[entries], self.value[entries]


def gather_latents(
    model: nn.Module,
    sae: SAE,
    rows: Sequence[GateRow],
    folder: str | Path,
    *,
    exact: bool = False,
    rows_per_shard: int = ROWS_PER_SHARD,
    progress: Progress | None = None,
) -> TokenLatents:
    """All latents of ``sae`` at all tokens of ``rows``; shards in ``folder`` that are whole are not computed again.

    Blocks run under bfloat16 unless ``exact``. Raises `TrainError` for no rows, and for a folder of other work.
    """
    if sae.site is None or not rows:
        found = "it does not say at which site it reads" if rows else "there are no rows"
        raise TrainError(f"latents of {sae.name}", found, "Give an SAE with a site, and rows.")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    _claim(place, model, sae, rows, exact, rows_per_shard)
    total, done, shards = sum(len(row.ids) for row in rows), 0, []
    with Reader(model, [sae.site], exact=exact) as reader:
        for start in range(0, len(rows), rows_per_shard):
            part = rows[start : start + rows_per_shard]
            path = place / f"latents-{start // rows_per_shard:05d}.safetensors"
            if not path.is_file():
                _write(_latents(reader, sae, part), path)
            shards.append(_read(path))
            done += sum(len(row.ids) for row in part)
            if progress is not None:
                progress(done, total)
    return _joined(rows, shards, sae.d_sae)


def _claim(folder: Path, model: nn.Module, sae: SAE, rows: Sequence[GateRow], exact: bool, rows_per_shard: int) -> None:
    """Write what the folder is for, or compare with what is written there."""
    text = hashlib.sha256(json.dumps([row.ids for row in rows]).encode()).hexdigest()
    wanted = {
        "schema": SCHEMA, "model": model_fingerprint(model), "sae": sae.fingerprint(), "site": str(sae.site),
        "rows": text, "exact": exact, "rows_per_shard": rows_per_shard,
    }  # fmt: skip
    claim(folder / MANIFEST, "latents", wanted)


def _latents(reader: Reader, sae: SAE, rows: Sequence[GateRow]) -> dict[str, Tensor]:
    """Rows of about one length go through the model together; what comes out is in the order of ``rows``."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found: list[tuple[Tensor, ...]] = [()] * len(rows)
    while order:
        # the rows ahead grow longer: about as many as fill a batch when all are as long as the 64th from here
        size = max(1, BATCH_TOKENS // max(1, len(rows[order[min(len(order) - 1, 63)]].ids)))
        batch, order = order[:size], order[size:]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[i].ids) for i in batch], batch_first=True)
        assert sae.site is not None
        with torch.no_grad():
            f = sae.encode(reader.read(ids)[sae.site].to(sae.W_enc.device)).cpu()
        for i, row in zip(batch, f, strict=True):
            own = row[: len(rows[i].ids)]
            token, latent = own.nonzero(as_tuple=True)
            found[i] = (torch.bincount(token, minlength=len(own)), latent.int(), own[token, latent].bfloat16())
    names = ("per_token", "latent", "value")
    return {name: torch.cat(parts).contiguous() for name, parts in zip(names, zip(*found, strict=True), strict=True)}


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, path)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrainError(
            f"latents in {path}", f"they cannot be read ({error})", "Remove that file to compute them again."
        ) from error


def _joined(rows: Sequence[GateRow], shards: Sequence[dict[str, Tensor]], d_sae: int) -> TokenLatents:
    join = lambda name: torch.cat([shard[name] for shard in shards])
    upto = lambda sizes: torch.cat([torch.zeros(1, dtype=torch.long), sizes.long().cumsum(0)])
    starts = upto(torch.tensor([len(row.ids) for row in rows]))
    ids = torch.tensor([token for row in rows for token in row.ids])
    return TokenLatents(starts, ids, upto(join("per_token")), join("latent"), join("value").float(), d_sae)
