"""The stream at one site for many rows, on disk, and what any gate would say of each row, without the model.

A pass ends at the site. Shards hold the rows in order and are written atomically, so an interrupted pass goes on at its
first missing shard. A gate is stepped over the kept stream as a deployed one is over the model's, row by row.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeguard import SAE, Site
from saeguard.fingerprints import model_fingerprint
from saeguard.gates import Gate, Latched, Seen
from saeguard.training.activations import Reader

ROWS = 128
"""Rows per shard, and per step of a gate."""


@dataclass(frozen=True, eq=False)
class Streams:
    """``x`` is that of all tokens, row behind row; row i is ``starts[i]`` to ``starts[i + 1]``."""

    ids: tuple[tuple[int, ...], ...]
    starts: Int[Tensor, " rows_and_one"]
    x: Float[Tensor, "token d_in"]

    def row(self, number: int) -> Float[Tensor, "pos d_in"]:
        """One row's."""
        return self.x[self.starts[number] : self.starts[number + 1]]

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int = ROWS) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """Rows of about one length: their numbers, ids, which columns are real, and streams, padded on the right."""
        order = self.starts.diff().argsort(stable=True)
        for numbers in (part.tolist() for part in order.split(size)):
            pad = lambda rows: torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
            ids = pad(torch.tensor(self.ids[i]) for i in numbers)
            real = pad(torch.ones(len(self.ids[i]), dtype=torch.bool) for i in numbers)
            yield numbers, ids, real, pad(self.row(i) for i in numbers)


def gather_streams(
    model: Any, site: Site, rows: Sequence[Sequence[int]], folder: Path, *, exact: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Streams:  # fmt: skip
    """The stream of every row; blocks run under bfloat16 unless ``exact``. Folders are named after what is in them."""
    ids = tuple(tuple(row) for row in rows)
    about = json.dumps([model_fingerprint(model), str(site), ids, exact])
    place = folder / hashlib.sha256(about.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    parts = []
    with Reader(model, [site], exact=exact) as reader:
        for low in range(0, len(ids), ROWS):
            shard = place / f"{low:06d}.safetensors"
            if not shard.is_file():
                _write(shard, _read(reader, site, ids[low : low + ROWS]))
            parts.append(load_file(shard)["x"])
            if progress is not None:
                progress(min(low + ROWS, len(ids)), len(ids))
    lengths = torch.tensor([0, *map(len, ids)])
    return Streams(ids, lengths.cumsum(0), torch.cat(parts))


def _read(reader: Reader, site: Site, rows: Sequence[tuple[int, ...]]) -> Tensor:
    """Rows of about one length go through the model together; what comes out is in the order of ``rows``."""
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for low in range(0, len(order), 16):
        some = order[low : low + 16]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[i]) for i in some], batch_first=True)
        for number, x in zip(some, reader.read(ids)[site], strict=True):
            found[number] = x[: len(rows[number])]
    return torch.cat(found)


def _write(shard: Path, x: Tensor) -> None:
    partial = shard.with_suffix(".partial")
    save_file({"x": x.contiguous()}, partial)
    os.replace(partial, shard)


@torch.no_grad()
def scores(gate: Gate, sae: SAE, streams: Streams, special: Sequence[int]) -> Float[Tensor, " row"]:
    """Per row the largest score that the gate reaches, a row being all prompt; what a latched gate latches."""
    while isinstance(gate, Latched):
        gate = gate.gate
    odd, found = torch.tensor(sorted(special)), torch.full((len(streams),), -torch.inf, dtype=torch.float64)
    slices = [sae.narrow(list(leaf.latents)).to(dtype=torch.float32) if leaf.latents else None for leaf in gate.leaves]
    for numbers, ids, real, x in streams.batches():
        last = torch.arange(ids.shape[1]) >= real.sum(1)[:, None] - 1
        counts = real & ~torch.isin(ids, odd)
        seen = []
        for leaf, own in zip(gate.leaves, slices, strict=True):
            f = torch.zeros(*ids.shape, 0) if own is None else own.activate(own.read(x).x)
            seen.append(Seen(f, x, real if leaf.special else counts, real, real & last, ids))
        _, verdict = gate.step(gate.begin(len(numbers), x.device), seen)
        found[numbers] = verdict.score.double().masked_fill(~real, -torch.inf).amax(1)
    return found
