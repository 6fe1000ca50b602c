"""``saeguard train``: from text files and a model to SAEs, measured and described, one folder per layer."""

import glob
import json
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.errors import TrainError


def train(
    corpus: Annotated[list[str], typer.Argument(help="Text files (.txt, .jsonl, .jsonl.gz), or quoted patterns.")],
    validation: Annotated[list[str], typer.Option(help="Held-out text, measured on only; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder for activations, checkpoints and results.")],
    model: Annotated[str, typer.Option(help="A demo model's name, or a local folder.")] = "smollm2-135m-instruct",
    layer: Annotated[list[int] | None, typer.Option(help="Block whose output to learn; repeatable.")] = None,
    d_sae: Annotated[int, typer.Option(min=2, help="Number of latents.")] = 4608,
    k: Annotated[float, typer.Option(help="Latents active per token.")] = 60.0,
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens, shared evenly by the files.")] = 4_000_000,
    epochs: Annotated[float, typer.Option(help="Passes over them, when --steps is not given.")] = 2.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Tokens per step.")] = 4096,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    matryoshka: Annotated[str, typer.Option(help="Sizes of nested prefixes, such as 512,2048.")] = "",
    context: Annotated[int, typer.Option(min=8, help="Tokens per chunk, BOS included.")] = 256,
    validation_tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens to measure on.")] = 100_000,
    ce_chunks: Annotated[int, typer.Option(min=1, help="Held-out chunks for cross-entropy, three passes each.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the sample, the order and the first weights.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints in --out.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile the blocks (needs a C++ compiler).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cards as JSON and nothing else.")] = False,
) -> None:
    """Train SAEs on a model's residual stream over text that you name, measure and describe them."""
    from saeguard.models import load_model
    from saeguard.sites import Site
    from saeguard.training.activations import Batches
    from saeguard.training.pipeline import Subject, Texts, collect, finish_site, read_texts, train_site
    from saeguard.training.trainer import TrainConfig

    texts = Texts(expand(corpus), expand(validation), n_tokens=tokens, n_held_out=validation_tokens,
                  n_ce_chunks=ce_chunks, context=context, seed=seed)  # fmt: skip
    sites = [Site("resid_post", number) for number in layer or [9]]
    command = "saeguard " + shlex.join(sys.argv[1:])
    with progress_bars(shown=not as_json) as progress:
        loaded = load_model(model)
        subject = Subject(Path(model).name, loaded.model, loaded.tokenizer)
        chunks, held_out = read_texts(texts, loaded.tokenizer)
        store = collect(subject, chunks, sites, out, compiled=compiled, progress=progress)
        cards = []
        for site in sites:
            per_epoch = Batches(store, site, batch=batch, seed=seed).steps_per_epoch
            config = TrainConfig(d_sae=d_sae, k=k, steps=steps or steps_of(epochs, per_epoch), batch=batch, lr=lr,
                                 seed=seed, prefixes=sizes(matryoshka))  # fmt: skip
            state = train_site(store, site, config, out, resume=resume, progress=progress)
            cards.append(finish_site(subject, store, held_out, state, site=site, config=config, texts=texts, out=out,
                                     command=command, progress=progress))  # fmt: skip
    if as_json:
        typer.echo(json.dumps(cards, indent=1, ensure_ascii=False))
        return
    for card in cards:
        typer.echo(
            f"{card['name']}: FVU {card['fvu']}, L0 {card['l0']}, CE recovered {card['ce_recovered']}, "
            f"dead {card['dead']} of {card['d_sae']}; in {out / card['site']}"
        )


def expand(patterns: list[str]) -> tuple[Path, ...]:
    """Files behind paths and patterns, each once, in order. Raises `TrainError` for one that matches nothing."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(pattern))
        if not matches:
            raise TrainError(f"text from {pattern}", "no file is there", "Check the path; quote a pattern.")
        found |= dict.fromkeys(map(Path, matches))
    return tuple(found)


def steps_of(epochs: float, per_epoch: int) -> int:
    """Optimiser steps for so many passes over the text, at least one. Raises `TrainError`."""
    if not 0 < epochs < math.inf:
        raise TrainError(f"training for {epochs} epochs", "that is no number above 0", "Give one such as 2.")
    return max(1, round(epochs * per_epoch))


def sizes(text: str) -> tuple[int, ...]:
    """Whole numbers parted by commas. Raises `TrainError`."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise TrainError(f"Matryoshka prefixes {text!r}", "they are not whole numbers", "Write 512,2048.") from error


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[Any]:
    """One rich bar per stage on standard error, or none."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bars:
        tasks = {}

        def tell(stage: str, done: int, total: int, note: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note=note)
            bars.update(tasks[stage], completed=done, total=total, note=note)

        yield tell
