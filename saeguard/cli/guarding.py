"""``saeguard guard``: from texts and questions to a guardrail's policy, fitted and calibrated in one command."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli import edits
from saeguard.cli.console import Json, check_target, out, table, write_json
from saeguard.cli.fitting import Asked, fit_policy
from saeguard.cli.latents import Source, default_sae
from saeguard.cli.reading import DEMO, Model, Seed
from saeguard.cli.steering import AMOUNTS, Unit, When
from saeguard.cli.texts import named_files
from saeguard.cli.training import progress_bars

app = typer.Typer(
    no_args_is_help=True, help="Fit the policy of a guardrail, and read it.", pretty_exceptions_enable=False
)
Files = list[str]


class How(StrEnum):
    """What a threshold promises; see saeguard.guarding.calibrating."""

    percentile = "percentile"
    conformal = "conformal"
    certain = "certain"


class Reads(StrEnum):
    """What the gate reads."""

    words = "words"
    both = "both"


Neighbours = Annotated[
    list[str] | None, typer.Option(help="A topic so near that the threshold is not calibrated on it; repeatable.")
]
Weights = Annotated[list[str] | None, typer.Option(help="TOPIC=NUMBER: what its rows count for; repeatable.")]
Sentences = Annotated[int, typer.Option(min=1, help="Sentences of each topic, threefold of the one to forget.")]
Evidence = Annotated[
    Reads, typer.Option(help="What the gate reads: words, which text around them cannot hide, or both.")
]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of questions to choose latents by, on each side.")]


@app.command("fit")
def fit(
    forget: Annotated[Files, typer.Option(help="TOPIC=FILE: text of what is to be forgotten; repeatable.")],
    retain: Annotated[Files, typer.Option(help="TOPIC=FILE: text of another topic; repeatable.")],
    questions: Annotated[Files, typer.Option(help="JSON lines with question and topic; repeatable.")],
    target: Annotated[Path, typer.Option("--out", help="Where the policy goes; OUT.fit.json is put beside it.")],
    forget_topic: Annotated[str, typer.Option(help="The topic to forget, by its name in files and rows.")],
    neighbour: Neighbours = None,
    weigh: Weights = None,
    sae: Source = "",
    model: Model = DEMO,
    select: edits.Select = "",
    latents: edits.Latents = "",
    latents_from: edits.LatentsFrom = None,
    bound: edits.Bounds = None,
    percentile_bound: edits.Percentiles = None,
    within: edits.Within = None,
    top: Annotated[int, typer.Option(min=1, help="How many latents to edit, at most.")] = 20,
    least: edits.Floor = 0.01,
    op: Annotated[str, typer.Option(help=f"What is done with them: {', '.join(AMOUNTS)} or ablate.")] = "clamp",
    value: edits.Value = None,
    kl: edits.KL = None,
    unit: Annotated[Unit, typer.Option(help="Unit of the amount.")] = Unit.norm,
    when: Annotated[When, typer.Option(help="For clamp: everywhere, or only where the latent fires.")] = When.always,
    level: Annotated[float, typer.Option(help="The share of harmless questions that may fire.")] = 0.005,
    method: Annotated[How, typer.Option(help="What the threshold promises of that level.")] = How.certain,
    confidence: Annotated[float, typer.Option(help="Of --method certain, and of all intervals.")] = 0.95,
    passages: Annotated[int, typer.Option(min=0, help="Passages of each topic to learn from.")] = 10,
    sentences: Sentences = 10_000,
    evidence: Evidence = Reads.both,
    grams: Annotated[int, typer.Option(min=1, help="Words and pairs of words that the gate knows, at most.")] = 60_000,
    chat_every: Annotated[int, typer.Option(min=1, help="Read every so manieth question as a chat too.")] = 1,
    tokens: Tokens = 25_000,
    name: Annotated[str, typer.Option(help="The policy's name; the topic's by default.")] = "",
    refuse: Annotated[str, typer.Option(help="Edit nothing: end the row, and answer this text instead.")] = "",
    also_edit: edits.AlsoEdit = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of unfinished work; beside --out otherwise.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Choose latents to edit, train the gate that says when, calibrate it, and write the policy.

    An interrupted command goes on where it was when it is given again. Neighbours are learned from as what must not
    fire, and their false-positive rates are reported.
    """
    check_target(target)
    edit = edits.wanted(
        op, value, kl, unit=unit.value, when=when.value, select=select, latents=latents, latents_from=latents_from,
        refuse=refuse, also_edit=also_edit, bounds=(bound, percentile_bound, within), top=top, floor=least,
    )  # fmt: skip
    asked = Asked(
        forget=_topics("--forget", forget), retain=_topics("--retain", retain), questions=questions, topic=forget_topic,
        neighbours=tuple(neighbour or ()), weights=_weights(weigh or []), sae=sae or default_sae(), model=model,
        edit=edit, level=level, method=method.value, confidence=confidence, passages=passages, sentences=sentences,
        grams=grams, evidence=evidence.value, chat_every=chat_every, tokens=tokens, name=name or forget_topic,
        refuse=refuse, also_edit=also_edit, seed=seed,
        folder=checkpoint or target.with_name(target.name + ".unfinished"),
    )  # fmt: skip
    with progress_bars(shown=not as_json) as bars:
        policy, document = fit_policy(asked, bars)
    _report(document, policy, target, as_json=as_json)


@app.command("selections")
def selections(as_json: Json = False) -> None:
    """List the ways in which fit can choose latents; their columns can be bound with --bound."""
    from saeguard.scoring.selections import SELECTIONS

    if as_json:
        write_json([{"name": way.name, "by": way.by, "about": way.about} for way in SELECTIONS])
    else:
        rows = [(way.name, way.by, way.about) for way in SELECTIONS]
        out().print(table("Selections", ("--select", "ranks by", "what it is"), rows))


def _report(document: dict[str, Any], policy: Any, target: Path, *, as_json: bool) -> None:
    """Write the policy, put what was measured beside it, and show that."""
    policy.save(target)
    beside = target.with_name(target.name.removesuffix(".json").removesuffix(".policy") + ".fit.json")
    size = target.stat().st_size
    document = document | {"policy": {"file": str(target), "fingerprint": policy.fingerprint(), "bytes": size}}
    _write(document, beside)
    if as_json:
        write_json(document)
    else:
        _show(document, target, beside)


def _topics(option: str, given: list[str]) -> dict[str, list[str]]:
    for entry in given:
        topic, equals, file = entry.partition("=")
        if not equals or not topic.isidentifier() or not file:
            raise typer.BadParameter(f"{option} {entry}: write TOPIC=FILE, such as biology=corpus.jsonl.gz")
    return named_files(given)


def _weights(given: list[str]) -> dict[str, float]:
    found = {}
    for entry in given:
        topic, equals, number = entry.rpartition("=")
        try:
            found[topic] = float(number)
        except ValueError:
            equals = ""
        if not equals or not topic:
            raise typer.BadParameter(f"--weigh {entry}: write TOPIC=NUMBER, such as psychology=6")
    return found


def _write(document: dict[str, Any], target: Path) -> None:
    import json
    import os

    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, target)


def _show(document: dict[str, Any], target: Path, beside: Path) -> None:
    found, console = document["calibration"], out()
    rows = [
        (topic, role, form, one["n"], one["above"], f"{one['share']:.2%}", f"{one['low']:.2%} to {one['high']:.2%}")
        for topic, about in found["topics"].items()
        for role, forms in [(about["role"], about["forms"])]
        for form, one in forms.items()
    ]
    heads = ("topic", "is", "form", "n", "fire", "share", f"{found['confidence']:.0%} interval")
    console.print(table("Rows that fire, out of fold", heads, rows, right=(3, 4, 5)))
    frontier = [
        (f"{one['level']:.2%}", f"{one['threshold']:.3f}", f"{one['recall']:.2%}", f"{one['retain']:.2%}",
         f"{one['neighbours']:.2%}") for one in document["frontier"]
    ]  # fmt: skip
    heads = ("level", "threshold", "to forget", "retain", "neighbours")
    console.print(table("What other thresholds would do", heads, frontier, right=(0, 1, 2, 3, 4)))
    cost = document["cost"]
    console.print(edits.said(document), soft_wrap=True, markup=False)
    console.print(f"{cost['minutes']:.1f} minutes, {cost['peak_memory_mb']:,.0f} MB at its peak", style="dim")
    size = document["policy"]["bytes"]
    console.print(f"Wrote {target} ({size:,} bytes) and {beside}", style="dim", soft_wrap=True)
