"""What a model loses when it runs on an SAE's reconstruction, with and without a boost, and what that costs in time.

    python benchmarks/splice.py [--domain FILE] [--general FILE] [--tokens 20000] [--rounds 8] [--new-tokens 24]

`Splice` puts the reconstruction into the stream at every token that is not special: ``dropped`` that of the base alone,
``boosted`` with what the boost makes of the error. Perplexity is exp of the mean loss per token that is not special, on
the same chunks for the plain model and both splices. FILEs are .txt or .jsonl[.gz] with a text field; without them the
model writes both texts itself, biology behind biological openings. Its samples are easy for it, so their perplexities
are lower than those of text by people.

Time: one step of greedy decoding, which gives one token in every row of the batch, at batch 1 and 8. Plain and both
splices take turns in every round and ratios are taken within rounds, as in overhead.py; medians are reported. Ends with
one line of JSON.
"""

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from saeguard import SAE, Plan, Rule, Splice, load_model, load_sae, steer
from saeguard.models import LoadedModel
from saeguard.scoring.prefixes import NEUTRAL
from saeguard.training.corpus import Chunks, read_corpus

BIOLOGY = (
    "Photosynthesis is the process by which plants", "Inside the nucleus of a cell,",
    "The immune system protects the body",
    "Enzymes are proteins that", "Natural selection acts on", "Bacteria reproduce by", "The human heart pumps blood",
    "During mitosis, the chromosomes", "Neurons send signals to each other", "Mammals differ from reptiles because",
    "The genes of an organism are", "In a forest ecosystem, fungi", "Viruses need a host cell because",
    "Hormones are released by glands", "The cell membrane is made of", "Amphibians live both in water",
)  # fmt: skip
WRITTEN = 64
"""Tokens that the model writes behind each opening."""
ROWS = 4
"""Chunks per forward pass."""

console = Console(stderr=True)


class Judged(NamedTuple):
    """The mean loss in nats per token of one text under one model, over ``n_tokens``."""

    n_tokens: int
    nats: float


def plans_of(sae: SAE) -> dict[str, Plan | None]:
    """The plain model and both splices."""
    spliced = {mode: Plan((Rule(sae.name, (), Splice(mode)),)) for mode in ("dropped", "boosted")}
    return {"plain": None, **spliced}


def open_on(loaded: LoadedModel, plan: Plan | None, sae: SAE) -> Any:
    """A steer block, or nothing at all for the plain model."""
    return nullcontext() if plan is None else steer(loaded.model, plan, saes=sae, tokenizer=loaded.tokenizer)


def written(loaded: LoadedModel, openings: tuple[str, ...], folder: Path, name: str) -> Path:
    """A file of texts that the model writes, one behind each opening; the openings are part of them."""
    model, tokenizer = loaded
    batch = tokenizer([tokenizer.bos_token + text for text in openings], padding=True, padding_side="left",
                      return_tensors="pt")  # fmt: skip
    torch.manual_seed(0)
    ids = model.generate(**batch, do_sample=True, top_p=0.95, min_new_tokens=WRITTEN, max_new_tokens=WRITTEN)
    path = folder / f"{name}.jsonl"
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def judge(loaded: LoadedModel, plan: Plan | None, sae: SAE, chunks: Chunks) -> Judged:
    """The loss of every token of the chunks that is not special, given all that stands before it."""
    real = chunks.kept.flip(1).cumsum(1).flip(1) > 0  # what stands behind a chunk's last counted token is padding
    total, n = 0.0, 0
    with torch.no_grad(), open_on(loaded, plan, sae):
        for start in range(0, len(chunks.ids), ROWS):
            rows = slice(start, start + ROWS)
            mask = real[rows] | (torch.arange(real.shape[1]) == 0)
            logits = loaded.model(input_ids=chunks.ids[rows], attention_mask=mask.long(), use_cache=False).logits
            wanted = chunks.kept[rows, 1:]
            targets = chunks.ids[rows, 1:][wanted]
            total += float(F.cross_entropy(logits[:, :-1][wanted], targets, reduction="none").double().sum())
            n += len(targets)
    return Judged(n, total / n)


def step_times(loaded: LoadedModel, sae: SAE, batch: int, rounds: int, tokens: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of one decoding step, and the median over rounds of its ratio to the plain one."""
    inputs = loaded.tokenizer(["A living cell is made of"] * batch, return_tensors="pt")
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}

    def once(plan: Plan | None) -> float:
        with torch.inference_mode(), open_on(loaded, plan, sae):
            start = time.perf_counter()
            loaded.model.generate(**inputs, **options)
            return 1e3 * (time.perf_counter() - start) / tokens

    plans = plans_of(sae)
    taken: dict[str, list[float]] = {name: [] for name in plans}
    for name in plans:
        once(plans[name])
    for _ in range(rounds):
        for name in plans:
            taken[name].append(once(plans[name]))
    return {
        name: {
            "ms": statistics.median(mine),
            "over_plain": statistics.median(a / b for a, b in zip(mine, taken["plain"], strict=True)),
        }
        for name, mine in taken.items()
    }


def perplexities(loaded: LoadedModel, sae: SAE, texts: dict[str, Path], n_tokens: int) -> dict[str, dict[str, Judged]]:
    """By text and by model."""
    found: dict[str, dict[str, Judged]] = {}
    for text, path in texts.items():
        chunks = read_corpus([path], loaded.tokenizer, n_tokens=n_tokens, seed=1)
        for name, plan in plans_of(sae).items():
            judged = judge(loaded, plan, sae, chunks)
            found.setdefault(text, {})[name] = judged
            console.print(f"{text} text, {name}: {judged.nats:.4f} nats, {judged.n_tokens} tokens", style="dim")
    return found


def told(judged: dict[str, dict[str, Judged]]) -> dict[str, Any]:
    """Numbers for the JSON line."""
    return {
        text: {"tokens": row["plain"].n_tokens}
        | {name: {"perplexity": round(math.exp(found.nats), 3), "nats_above_plain": round(found.nats - plain, 4)}
           for plain in [row["plain"].nats] for name, found in row.items()}
        for text, row in judged.items()
    }  # fmt: skip


def show(numbers: dict[str, Any], times: dict[str, dict[str, dict[str, float]]], title: str) -> None:
    """One table: a row per model."""
    table = Table(title=title)
    texts = [text for text in ("domain", "general") if text in numbers]
    for name in ("", *(f"{text} perplexity" for text in texts), *(f"ms per step, {batch}" for batch in times)):
        table.add_column(name, justify="right")
    for name in ("plain", "dropped", "boosted"):
        found = [numbers[text][name] for text in texts]
        cells = [f"{cell['perplexity']:.2f} (+{cell['nats_above_plain']:.3f} nats)" for cell in found]
        steps = [f"{row[name]['ms']:.1f} (x {row[name]['over_plain']:.3f})" for row in times.values()]
        table.add_row(name, *cells, *steps)
    Console(width=140).print(table)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", default="smollm2-135m-instruct/resid_post.20+biology")
    parser.add_argument("--domain", type=Path)
    parser.add_argument("--general", type=Path)
    parser.add_argument("--tokens", type=int, default=20_000, help="of each text, at most")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=24)
    asked = parser.parse_args()
    sae = load_sae(asked.sae)
    loaded = load_model(sae.model or "")
    with tempfile.TemporaryDirectory() as folder:
        texts = {
            "domain": asked.domain or written(loaded, BIOLOGY, Path(folder), "domain"),
            "general": asked.general or written(loaded, NEUTRAL[: len(BIOLOGY)], Path(folder), "general"),
        }
        judged = told(perplexities(loaded, sae, texts, asked.tokens))
    times = {f"batch {n}": step_times(loaded, sae, n, asked.rounds, asked.new_tokens) for n in (1, 8)}
    title = f"{sae.name}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    show(judged, times, title)
    print(json.dumps({
        "benchmark": "splice", "sae": sae.name, "text": {name: path.name for name, path in texts.items()}, **judged,
        "step": {batch: {name: {key: round(value, 4) for key, value in row.items()} for name, row in found.items()}
                 for batch, found in times.items()},
        "rounds": asked.rounds, "new_tokens": asked.new_tokens, "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
