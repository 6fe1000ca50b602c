r"""Dilution of policies, and of DSG's gate as published and as intended, over the same questions and benign texts.

    python -m benchmarks.dilution --policy biology --policy FILE --prepared out/unlearning/results.json \
        --questions glossary_mcq.val.jsonl.gz --topic biology --benign history.val.jsonl.gz [--out out/dilution]

For each: how many of the questions that open a gate alone are lost, and how many others are gained, with so many benign
tokens before, after and around them; and of how many rows the decision depends on padding, passes or batch mates.
--prepared is what `benchmarks.unlearning` wrote: DSG's latents and thresholds are read there. A picture, and one line
of JSON; without questions it says that nothing was measured.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.baselines.published import PublishedHook, hooked
from benchmarks.baselines.systems import dense_clamp, rho, under_plan
from saeguard import Plan
from saeguard.cli.evaluated import dilution_table
from saeguard.cli.guarded import deploy
from saeguard.cli.measured import tokens_of
from saeguard.cli.policy_files import named_policy
from saeguard.evaluating.dilution import FORMS, Dilution, decider, dilution
from saeguard.evaluating.multiple_choice import read_questions
from saeguard.evaluating.prompts import Frame, token_ids
from saeguard.evaluating.subject import Subject

COLOURS = ("#2f6fdb", "#e0691f", "#3a9d5d", "#7a4fbf")
STYLES = {"before": "-", "around": "--", "after": ":"}


@contextmanager
def published(deployment: Any, parts: dict[str, Any]) -> Iterator[Subject]:
    """The model under the published hook, with the latents and the threshold that were prepared."""
    (sae,) = deployment.saes
    hook = PublishedHook(sae, tuple(parts["latents"]["dsg_texts"]), parts["c"], parts["thresholds"]["published"])
    with hooked(deployment.model, deployment.tokenizer, hook) as subject:
        yield subject


def intended(deployment: Any, parts: dict[str, Any]) -> AbstractContextManager[Subject]:
    """The model under DSG's edit behind its rate over the prompt, padding and BOS left out."""
    (sae,) = deployment.saes
    latents = tuple(parts["latents"]["dsg_questions"])
    plan = Plan((dense_clamp(sae, latents, rho(latents, parts["thresholds"]["rho"])),), "DSG as intended")
    return under_plan(deployment.model, deployment.tokenizer, (sae,), plan)


def draw(found: dict[str, Dilution], path: Path) -> None:
    """Decisions that changed, lost and gained, over the number of benign tokens."""
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, one) in enumerate(found.items()):
        for place, style in STYLES.items():
            points = [point for point in one.points if point.place == place]
            share = [100 * (point.lost + point.gained) / one.n for point in points]
            axes.plot([point.length for point in points], share, style, color=COLOURS[number % len(COLOURS)],
                      marker="o", ms=4, label=f"{name}, {place}")  # fmt: skip
    axes.set_xscale("log")
    axes.set(xlabel="benign tokens", ylabel="decisions that flip, % of questions", ylim=(-2, 102))
    axes.set_title("Benign text beside a question")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    FigureCanvasAgg(figure).print_png(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", action="append", default=[], help="a file or a shipped name; repeatable")
    parser.add_argument("--prepared", type=Path, help="results.json of benchmarks.unlearning, for DSG")
    parser.add_argument("--questions", action="append", default=[])
    parser.add_argument("--topic", default="biology")
    parser.add_argument("--benign", action="append", default=[], help="text files to take benign tokens from")
    parser.add_argument("--most", type=int, default=60)
    parser.add_argument("--length", type=int, nargs="+", default=[50, 200, 800, 1600])
    parser.add_argument("--forms", type=int, default=len(FORMS), help="so many forms of batches, the first is alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/dilution"))
    return parser.parse_args()


def main() -> None:
    given, console = arguments(), Console(stderr=True)
    if not (given.questions and given.benign):
        print(json.dumps({"benchmark": "dilution", "skipped": "give --questions and --benign"}))
        return
    asked = [one for path in given.questions for one in read_questions(path, topics=[given.topic], most=given.most)]
    found: dict[str, Dilution] = {}

    def measure(name: str, subject: Subject, benign: list[int], forms: int) -> None:
        rows = [token_ids(subject.tokenizer, one.question) for one in asked]
        found[name] = dilution(
            decider(subject), rows, benign, Frame.of(subject.tokenizer), lengths=given.length, forms=FORMS[:forms],
            progress=lambda done, total: console.print(f"{name}: {done} of {total}", markup=False),
        )  # fmt: skip
        console.print(dilution_table(found[name]))

    for number, name in enumerate(given.policy or ["biology"]):
        deployment = deploy(named_policy(name), "", lambda _: None)
        benign = tokens_of(given.benign, deployment.tokenizer, max(given.length), given.seed)
        with deployment.guarded() as (_, subject):
            measure(name, subject, benign, given.forms)
        if number == 0 and given.prepared is not None:
            parts = json.loads(given.prepared.read_text(encoding="utf-8"))["parts"]
            for other, opened in (("DSG, published hook", published), ("DSG as intended", intended)):
                with opened(deployment, parts) as subject:
                    measure(other, subject, benign, min(2, given.forms))
    given.out.mkdir(parents=True, exist_ok=True)
    draw(found, given.out / "dilution.png")
    text = json.dumps({name: asdict(one) | {"flips": one.flips} for name, one in found.items()})
    (given.out / "dilution.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
