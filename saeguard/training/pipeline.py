"""From a model and text files to a folder per site with weights, card and latent notes; every stage resumes.

OUT/activations/            shards of the training text's activations, all sites in one pass
OUT/<site>/checkpoint.pt    the training state
OUT/<site>/                 sae.safetensors, card.json, latents.jsonl.gz
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saeguard.errors import TrainError
from saeguard.loaders.native import save_sae
from saeguard.sites import Site
from saeguard.training.activations import ActivationStore, Batches, write_activations
from saeguard.training.card import make_card, read_attribution, read_origins, save_card
from saeguard.training.corpus import Chunks, read_corpus, special_ids
from saeguard.training.describe import describe_latents, save_notes
from saeguard.training.evaluate import evaluate_sae
from saeguard.training.trainer import CALIBRATION_TOKENS, TrainConfig, TrainState, export, train

Progress = Callable[[str, int, int, str], None]
"""Called with the stage's name, how much is done, how much there is, and a note."""


@dataclass(frozen=True, eq=False)
class Subject:
    """The model to train on, under the name that SAEs will carry."""

    name: str
    model: nn.Module
    tokenizer: Any


@dataclass(frozen=True)
class Texts:
    """Training and held-out files, and how much of them to read."""

    train: tuple[Path, ...]
    held_out: tuple[Path, ...]
    n_tokens: int | None = None
    n_held_out: int = 100_000
    n_ce_chunks: int = 128
    context: int = 256
    seed: int = 0

    def __post_init__(self):
        both = {path.resolve() for path in self.train} & {path.resolve() for path in self.held_out}
        if both or not self.held_out:
            raise TrainError(
                f"training on {len(self.train)} files and measuring on {len(self.held_out)}",
                f"{', '.join(sorted(path.name for path in both))} would be on both sides"
                if both
                else "no held-out text is given",
                "Name other files with --validation: numbers on the training text say little.",
            )


def read_texts(texts: Texts, tokenizer: Any) -> tuple[Chunks, Chunks]:
    """Training and held-out chunks. Raises `TrainError`, `MissingBOS`."""
    chunks = read_corpus(texts.train, tokenizer, context=texts.context, n_tokens=texts.n_tokens, seed=texts.seed)
    held_out = read_corpus(
        texts.held_out, tokenizer, context=texts.context, n_tokens=texts.n_held_out, seed=texts.seed + 1
    )
    return chunks, held_out


def collect(
    subject: Subject,
    chunks: Chunks,
    sites: Sequence[Site],
    out: Path,
    *,
    compiled: bool = False,
    progress: Progress | None = None,
) -> ActivationStore:
    """Activations of all sites for the training chunks, from disk where they are there already."""
    tell = None if progress is None else lambda done, total: progress("activations", done, total, "tokens")
    return write_activations(subject.model, chunks, sites, out / "activations", compiled=compiled, progress=tell)


def train_site(
    store: ActivationStore,
    site: Site,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> TrainState:
    """Train on one site's activations, with a checkpoint in the site's folder."""
    batches = Batches(store, site, batch=config.batch, seed=config.seed)
    tell = None
    if progress is not None:
        tell = lambda p: progress(f"training {site}", p.step, p.steps, f"FVU {p.fvu:.3f}, dead {p.dead}")  # noqa: E731
    return train(batches, config, checkpoint=out / str(site) / "checkpoint.pt", resume=resume,
                 made_of=store.fingerprint(), progress=tell)  # fmt: skip


def finish_site(
    subject: Subject,
    store: ActivationStore,
    held_out: Chunks,
    state: TrainState,
    *,
    site: Site,
    config: TrainConfig,
    texts: Texts,
    out: Path,
    command: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export, describe and measure one SAE, write its three files and return its card."""
    folder = out / str(site)
    held_in = Batches(store, site, batch=config.batch, seed=config.seed).sample(CALIBRATION_TOKENS)
    sae = export(
        state,
        held_in,
        l0=config.k,
        name=f"{subject.name}/{site}",
        site=site,
        model=subject.name,
        manifest=manifest_of(subject, texts.context),
    )
    if progress is not None:
        progress(f"describing {site}", 0, 1, "")
    notes = describe_latents(sae, subject.model, subject.tokenizer, store)
    sae = replace(sae, maximum=torch.tensor([note.maximum for note in notes]))
    save_sae(sae, folder)
    save_notes(notes, folder)
    tell = None if progress is None else lambda done, total: progress(f"measuring {site}", done, total, "chunks")
    evaluation = evaluate_sae(sae, subject.model, held_out, n_ce_chunks=texts.n_ce_chunks, progress=tell)
    files = (*texts.train, *texts.held_out)
    card = make_card(
        sae,
        config,
        chunks=store.chunks,
        held_out=held_out,
        evaluation=evaluation,
        model_source=model_source(subject),
        origins=read_origins(files),
        attribution=read_attribution(files),
        command=command,
    )
    save_card(card, folder)
    return card


def manifest_of(subject: Subject, context: int) -> dict[str, Any]:
    """What the weights file records besides the weights, for the checks that bind it to a model."""
    config = subject.model.config
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return {
        "bos": True,
        "context": context,
        "special_ids": list(special_ids(subject.tokenizer)),
        "model_shape": {name: getattr(config, name) for name in names if hasattr(config, name)},
        "model_weights": model_source(subject).get("source", ""),
    }


def model_source(subject: Subject) -> dict[str, Any]:
    """What `saeguard.models` wrote beside the model it fetched; for any other model, its path or hub name."""
    place = Path(str(getattr(subject.model.config, "_name_or_path", "")))
    marker = place / "saeguard-model.json"
    if marker.is_file():
        return json.loads(marker.read_text(encoding="utf-8"))
    return {"name": subject.name, "source": place.name}
