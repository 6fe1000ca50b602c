"""Run the model once over the chunks and keep the activations of several sites on disk.

One pass serves all sites and ends at the deepest: higher layers never run. A shard is one safetensors file with a
bfloat16 matrix per site, written atomically, so an interrupted pass goes on at its first missing shard. bfloat16 is
chosen over float16 because single tokens reach a norm of 11,000 and more: its rounding costs an FVU below 1e-5 at every
layer measured, and it cannot overflow.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import BFloat16, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from saeguard.engines.layouts import LAYOUTS
from saeguard.errors import TrainError, UnsupportedModel
from saeguard.sites import Site
from saeguard.training.claims import claim
from saeguard.training.corpus import Chunks

logger = logging.getLogger("saeguard.training")

SCHEMA = 1
MANIFEST = "manifest.json"
ROWS_PER_SHARD = 512
SAMPLE_SHARDS = 4

Progress = Callable[[int, int], None]
"""Called with tokens done and tokens in all."""


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """Activations on disk, in the order of ``chunks``: shard i holds chunks i*rows .. (i+1)*rows, kept tokens only."""

    folder: Path
    chunks: Chunks
    rows_per_shard: int = ROWS_PER_SHARD

    @property
    def n_shards(self) -> int:
        return -(-len(self.chunks.ids) // self.rows_per_shard)

    def rows(self, shard: int) -> slice:
        """Chunks that a shard holds."""
        return slice(shard * self.rows_per_shard, (shard + 1) * self.rows_per_shard)

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def shard_sizes(self) -> list[int]:
        """Tokens per shard."""
        per_chunk = self.chunks.kept.sum(1)
        return [int(per_chunk[self.rows(shard)].sum()) for shard in range(self.n_shards)]

    def read(self, shard: int, site: Site) -> BFloat16[Tensor, "tokens d_in"]:
        """One site's activations in a shard. Raises `TrainError` for a damaged file, and one without that site."""
        try:
            with safe_open(self.path(shard), framework="pt") as file:
                return file.get_tensor(str(site))
        except (OSError, SafetensorError) as error:
            raise TrainError(
                f"activations at {site} in {self.path(shard)}", f"they cannot be read ({error})",
                "Remove that file to compute them again.",
            ) from error  # fmt: skip

    def fingerprint(self) -> str:
        """SHA-256 of what the folder says it is for: model, sites, text and size of its shards."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()


def write_activations(
    model: nn.Module,
    chunks: Chunks,
    sites: Sequence[Site],
    folder: str | Path,
    *,
    batch_rows: int = 16,
    rows_per_shard: int = ROWS_PER_SHARD,
    compiled: bool = False,
    progress: Progress | None = None,
) -> ActivationStore:
    """Fill ``folder`` with the activations of ``sites``; shards that are already whole are not computed again.

    ``compiled`` puts every block through torch.compile, which needs a C++ compiler and is about twice as fast on CPU.
    Raises `TrainError` when the folder holds activations of another model, corpus or set of sites.
    """
    store = ActivationStore(Path(folder), chunks, rows_per_shard)
    store.folder.mkdir(parents=True, exist_ok=True)
    _claim(store, model, sites)
    sizes, done = store.shard_sizes(), 0
    with Reader(model, sites, compiled=compiled) as reader:
        for shard, size in enumerate(sizes):
            if not store.path(shard).is_file():
                _write_shard(reader, store, shard, batch_rows)
            done += size
            if progress is not None:
                progress(done, sum(sizes))
    return store


def _claim(store: ActivationStore, model: nn.Module, sites: Sequence[Site]) -> None:
    """Write what the folder is for, or compare with what is written there."""
    wanted = {
        "schema": SCHEMA,
        "model": str(getattr(getattr(model, "config", None), "_name_or_path", type(model).__name__)),
        "sites": [str(site) for site in sites],
        "chunks": store.chunks.fingerprint(),
        "rows_per_shard": store.rows_per_shard,
    }
    claim(store.folder / MANIFEST, "activations", wanted)


def _write_shard(reader: "Reader", store: ActivationStore, shard: int, batch_rows: int) -> None:
    ids, kept = store.chunks.ids[store.rows(shard)], store.chunks.kept[store.rows(shard)]
    parts: dict[Site, list[Tensor]] = {site: [] for site in reader.sites}
    for start in range(0, len(ids), batch_rows):
        rows = ids[start : start + batch_rows]
        mask = kept[start : start + batch_rows]
        for site, x in reader.read(rows).items():
            parts[site].append(x[mask].to(torch.bfloat16))
    partial = store.path(shard).with_suffix(".partial")
    save_file({str(site): torch.cat(xs).contiguous() for site, xs in parts.items()}, partial)
    os.replace(partial, store.path(shard))


class _DeepEnough(Exception):
    """Unwinds a forward pass after the deepest site."""


class Reader:
    """Reads the residual stream behind several blocks in one pass that ends at the deepest one.

    Matmuls run in bfloat16 under autocast and the residual stream stays float32, unless ``exact``.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], *, compiled: bool = False, exact: bool = False):
        self.model, self.sites = model, tuple(sites)
        self._compiled, self._exact = compiled, exact
        self._seen: dict[Site, Tensor] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Reader":
        blocks = find_blocks(self.model)
        deepest = max(site.layer for site in self.sites)
        for site in self.sites:  # all of them before the first hook: nobody takes one off when entering fails
            if site.stream != "resid_post" or site.layer >= len(blocks):
                raise TrainError(
                    f"activations at {site}",
                    f"training reads resid_post of blocks 0..{len(blocks) - 1} of this model",
                    "Choose a layer in that range.",
                )
        for site in self.sites:
            hook = self._hook(site, last=site.layer == deepest)
            self._stack.callback(blocks[site.layer].register_forward_hook(hook).remove)
        if self._compiled:
            for block in blocks[: deepest + 1]:
                self._stack.callback(setattr, block, "forward", block.forward)
                block.forward = torch.compile(block.forward, dynamic=False)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _hook(self, site: Site, *, last: bool) -> Callable[..., None]:
        def keep(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._seen[site] = (output if isinstance(output, Tensor) else output[0]).detach()
            if last:
                raise _DeepEnough

        return keep

    def read(self, ids: Int[Tensor, "batch pos"]) -> dict[Site, Float[Tensor, "batch pos d_in"]]:
        """Activations of every site for a batch of chunks, padded on the right: later tokens change none before."""
        device = next(self.model.parameters()).device
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=not self._exact)
        with torch.no_grad(), autocast, contextlib.suppress(_DeepEnough):
            self.model(input_ids=ids.to(device), use_cache=False)
        seen, self._seen = self._seen, {}
        return {site: seen[site].float().cpu() for site in self.sites}


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks. Raises `UnsupportedModel` for an architecture without a layout."""
    layout = LAYOUTS.get(str(getattr(getattr(model, "config", None), "model_type", None)))
    if layout is None:
        raise UnsupportedModel(
            f"the blocks of a {type(model).__name__}",
            "its architecture has no layout",
            f"Training reads {', '.join(sorted(LAYOUTS))}.",
        )
    blocks = model.get_submodule(layout.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


class Batches:
    """Batches of one site in an order that is a function of the seed and the step alone, so a resumed run repeats it.

    Chunks lie on disk in a random order over documents and files. The first epoch visits the shards in that order,
    later ones in new orders, and every epoch shuffles the tokens of each shard anew. Tokens that do not fill a batch
    at a shard's end sit this epoch out.
    """

    def __init__(self, store: ActivationStore, site: Site, *, batch: int, seed: int):
        self.store, self.site, self.batch, self.seed = store, site, batch, seed
        self._per_shard = [size // batch for size in store.shard_sizes()]
        self._loaded: tuple[tuple[int, int], Tensor] | None = None
        if not self.steps_per_epoch:
            raise TrainError(
                f"batches of {batch} tokens",
                f"the corpus has {store.chunks.n_tokens} tokens in {store.n_shards} shards, no batch in any",
                "Give more text or a smaller batch.",
            )

    @property
    def steps_per_epoch(self) -> int:
        return sum(self._per_shard)

    def at(self, step: int) -> BFloat16[Tensor, "batch d_in"]:
        """The batch of one step, counted from 0 over all epochs."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        shards = torch.randperm(len(self._per_shard), generator=_generator(self.seed, epoch)).tolist()
        for shard in shards if epoch else sorted(shards):
            if rest < self._per_shard[shard]:
                return self._shuffled(epoch, shard)[rest * self.batch : (rest + 1) * self.batch]
            rest -= self._per_shard[shard]
        raise AssertionError("a step lies in one of the shards")

    def sample(self, n: int) -> Float[Tensor, "tokens d_in"]:
        """About ``n`` tokens of the first shards, the same on every call; any shard is a fair sample of the text."""
        n_shards = min(SAMPLE_SHARDS, self.store.n_shards)
        each = -(-n // n_shards)
        parts = []
        for shard in range(n_shards):
            x = self.store.read(shard, self.site)
            parts.append(x[torch.randperm(len(x), generator=_generator(self.seed, -1, shard))[:each]].float())
        return torch.cat(parts)

    def _shuffled(self, epoch: int, shard: int) -> Tensor:
        if self._loaded is None or self._loaded[0] != (epoch, shard):
            x = self.store.read(shard, self.site)
            order = torch.randperm(len(x), generator=_generator(self.seed, epoch, shard))
            self._loaded = ((epoch, shard), x[order])
        return self._loaded[1]


def _generator(*numbers: int) -> torch.Generator:
    """A generator seeded by several integers, without the collisions of adding them up."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


def iterate(store: ActivationStore, site: Site) -> Iterator[tuple[slice, Tensor]]:
    """Every shard of one site in order, with the chunks it holds."""
    for shard in range(store.n_shards):
        yield store.rows(shard), store.read(shard, site)
