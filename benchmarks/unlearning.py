r"""Policies and what they are to be compared with, on the same questions in one run; what is done is not repeated.

    python -m benchmarks.unlearning --questions glossary_mcq.val.jsonl.gz --train glossary_mcq.train.jsonl.gz \
        --forget biology.train.jsonl.gz --retain wikipedia.train.jsonl.gz physics.train.jsonl.gz \
        --benign wikipedia.val.jsonl.gz [--policy FILE] [--also FILE] [--most 60] [--work FOLDER]

No guard; Farrell's static clamp; DSG's hook as published, as intended, and with latents found by their labels; the
policies; the first one's edit without a gate, behind a linear probe of the raw stream and behind DSG's gate; its gate
with random latents and with a random direction; an instruction; RMU with a small budget. Everything is chosen and
calibrated on --train and on the texts. Accuracy by log-likelihood on --questions with paired differences to no guard;
recall against false positives of every gate; decoding with and without the cache; padding; text about other things.
Two pictures and results.json in the work folder; the last line is JSON too.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.baselines import measuring, showing
from benchmarks.baselines.frontier import Roles
from benchmarks.baselines.preparing import Setting, Tell, prepare, tasks_of
from benchmarks.baselines.rmu import RMUConfig
from benchmarks.baselines.systems import digest, systems
from saeguard import load_model, load_sae
from saeguard.evaluating.multiple_choice import read_questions
from saeguard.fingerprints import model_fingerprint
from saeguard.guarding.policy import Policy
from saeguard.guarding.shipped import FOLDER
from saeguard.latents import LatentTable
from saeguard.scoring.sentences import minilm


def run(setting: Setting, tell: Tell) -> dict[str, Any]:
    """All numbers; whatever the work folder has of them is read there."""
    kept = measuring.Kept(
        setting.work / "results" / digest(model_fingerprint(setting.model), setting.sae.fingerprint())
    )
    parts, gates = prepare(setting, kept, tell)
    tasks, padded = tasks_of(setting)
    results, gated = {}, {}
    for system in systems(parts):
        mine = tasks | ({"padding": padded} if system.gated else {})
        results[system.name] = measuring.joined(measuring.measure(system, mine, kept, tell))
        gated[system.name] = system.gated
    rows = showing.summary(results, setting.roles, gated)
    told = {"c": parts.c, "farrell": parts.farrell, "thresholds": parts.thresholds, "latents": asdict(parts.chosen),
            "rmu": asdict(setting.rmu)}  # fmt: skip
    return {
        "topic": setting.roles.topic,
        "neighbours": setting.roles.neighbours,
        "parts": told,
        "systems": rows,
        "gates": gates,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=FOLDER / "biology-edits.policy.json", help="one that edits")
    parser.add_argument("--also", type=Path, nargs="*", default=[FOLDER / "biology.policy.json"], help="more policies")
    parser.add_argument("--questions", type=Path, nargs="+", default=[], help="to report; JSON lines with topics")
    parser.add_argument("--train", type=Path, nargs="+", default=[], help="to choose and calibrate on")
    parser.add_argument("--forget", type=Path, nargs="+", default=[], help="texts about the topic")
    parser.add_argument("--retain", type=Path, nargs="+", default=[], help="texts about other things")
    parser.add_argument("--benign", type=Path, nargs="+", default=[], help="texts for KL and perplexity")
    parser.add_argument("--topics", nargs="+", default=["biology", "physics", "history", "government_law", "chemistry",
                                                        "psychology", "anthropology", "astronomy"])  # fmt: skip
    parser.add_argument("--topic", default="biology", help="what is to be forgotten, one of --topics")
    parser.add_argument("--neighbours", nargs="*", default=["chemistry", "psychology", "anthropology", "astronomy"])
    parser.add_argument("--most", type=int, default=60, help="questions per topic and file")
    parser.add_argument("--gate-most", type=int, default=200, help="questions per topic on which gates are compared")
    parser.add_argument(
        "--train-most", type=int, default=300, help="training questions per topic; of the topic, thrice"
    )
    parser.add_argument("--rmu-lr", type=float, default=RMUConfig.lr)
    parser.add_argument("--rmu-steps", type=int, default=RMUConfig.steps, help="of 4 rows of 128 tokens on either side")
    parser.add_argument("--work", type=Path, default=Path("out/unlearning"))
    return parser.parse_args()


def load(given: argparse.Namespace) -> Setting:
    """Raises what loading raises."""
    policy = Policy.load(given.policy)
    model, tokenizer = load_model(policy.model.name)
    source = policy.saes[0].source
    read = lambda files, topics, most: [q for file in files for q in read_questions(file, topics=topics, most=most)]
    own = [one for one in read(given.train, [given.topic], 3 * given.train_most)]
    train = own + [one for one in read(given.train, [], given.train_most) if one.topic != given.topic]
    return Setting(
        model.eval(), tokenizer, load_sae(source), LatentTable.load(source), policy, minilm(),
        Roles(given.topic, tuple(given.neighbours)), read(given.questions, given.topics, given.most),
        read(given.questions, [], given.gate_most), train, given.forget, given.retain, given.benign, given.work,
        rmu=RMUConfig(lr=given.rmu_lr, steps=given.rmu_steps), also=tuple(Policy.load(file) for file in given.also),
    )  # fmt: skip


def main() -> None:
    given, started = arguments(), time.perf_counter()
    if not all((given.questions, given.train, given.forget, given.retain, given.benign)):
        needed = "--questions, --train, --forget, --retain and --benign"
        print(json.dumps({"benchmark": "unlearning", "skipped": f"give {needed}"}))
        return
    console = Console(stderr=True)
    tell = lambda stage: console.print(
        f"{time.perf_counter() - started:6.0f} s  {stage}", markup=False, highlight=False
    )
    given.work.mkdir(parents=True, exist_ok=True)
    document = run(load(given), tell)
    document["minutes"] = round((time.perf_counter() - started) / 60, 1)
    showing.show(document["systems"], document["gates"], given.topic)
    showing.draw_frontier(document["gates"], given.work / "frontier.png", given.topic)
    showing.draw_forget_retain(document["systems"], given.work / "forget_retain.png", given.topic)
    (given.work / "results.json").write_text(json.dumps(document), encoding="utf-8")
    for gate in document["gates"]:
        del gate["curve"]
    print(json.dumps(document))


if __name__ == "__main__":
    main()
