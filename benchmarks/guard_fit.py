"""What fitting and calibrating a policy costs, against one plain forward pass of the model over the same text.

    python benchmarks/guard_fit.py [--sample 20000] --forget TOPIC=FILE --retain TOPIC=FILE ... --questions FILE ...
        --forget-topic TOPIC --out POLICY [options of saeguard guard fit]

All options but --sample go to `saeguard guard fit`, which runs in a process of its own and starts from nothing; its
time is that of the whole command, imports and loading included. The text is every row that the command puts through
the model: questions in each format, and passages. The plain pass, over --sample tokens of those rows and scaled up,
computes the logits of all tokens in float32, rows of about one length in a batch and no padding counted. Both use all
cores. Ends with one line of JSON; without texts and questions it says that nothing was measured.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from saeguard.cli.texts import documents_of, named_files
from saeguard.models import LoadedModel, load_model
from saeguard.training.gate_rows import GateRow, passage_rows, question_rows, read_questions

BATCH_TOKENS = 2048
console = Console(stderr=True)


def fit(options: list[str]) -> tuple[float, dict]:
    """Seconds of the whole command, and what it reports."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "saeguard", "guard", "fit", *options, "--checkpoint", folder, "--json"]
        started = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return time.perf_counter() - started, json.loads(done.stdout)


def rows_of(loaded: LoadedModel, args: argparse.Namespace) -> tuple[GateRow, ...]:
    """The rows that the command reads."""
    questions = read_questions([Path(path) for path in args.questions])
    named = named_files([*args.forget, *args.retain])
    documents = {
        topic: [text for texts in documents_of(patterns, loaded.tokenizer).values() for text in texts]
        for topic, patterns in named.items()
    }
    return (*question_rows(questions, loaded.tokenizer, chat_every=args.chat_every),
            *passage_rows(documents, loaded.tokenizer, each=args.passages))  # fmt: skip


def forward(loaded: LoadedModel, rows: tuple[GateRow, ...], sample: int) -> float:
    """Seconds per token of plain passes over every nth of ``rows``."""
    total = sum(len(row.ids) for row in rows)
    part = sorted(rows[:: max(1, total // sample)], key=lambda row: len(row.ids))
    batches: list[list[GateRow]] = [[]]
    for row in part:
        if sum(len(one.ids) for one in batches[-1]) + len(row.ids) > BATCH_TOKENS and batches[-1]:
            batches.append([])
        batches[-1].append(row)
    pad = torch.nn.utils.rnn.pad_sequence
    made = []
    for batch in batches:
        ids = pad([torch.tensor(row.ids) for row in batch], batch_first=True)
        mask = pad([torch.ones(len(row.ids), dtype=torch.long) for row in batch], batch_first=True)
        made.append({"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        loaded.model(**made[0])
        started = time.perf_counter()
        for inputs in made:
            loaded.model(**inputs)
    return (time.perf_counter() - started) / sum(len(row.ids) for row in part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=20_000, help="tokens of the plain pass")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--passages", type=int, default=10)
    parser.add_argument("--chat-every", type=int, default=1)
    for name in ("--forget", "--retain", "--questions"):
        parser.add_argument(name, action="append", default=[])
    args, others = parser.parse_known_args()
    if not (args.forget and args.retain and args.questions):
        print(json.dumps({"benchmark": "guard_fit", "skipped": "give --forget, --retain and --questions"}))
        return
    options = [*others, "--model", args.model, "--passages", str(args.passages), "--chat-every", str(args.chat_every)]
    options += [part for name in ("forget", "retain", "questions") for value in getattr(args, name)
                for part in (f"--{name}", value)]  # fmt: skip
    console.print("fitting")
    seconds, document = fit(options)
    console.print(f"{seconds:.0f} s; now the plain pass")
    loaded = load_model(args.model)
    rows = rows_of(loaded, args)
    total = sum(len(row.ids) for row in rows)
    plain = forward(loaded, rows, args.sample) * total
    result = {
        "fit_seconds": round(seconds, 1), "forward_seconds": round(plain, 1),
        "fit_over_forward": round(seconds / plain, 3),
        "tokens": total, "peak_mb": document["cost"]["peak_memory_mb"], "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
