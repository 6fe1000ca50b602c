"""``saeguard eval sequence`` and ``page``: topics forgotten one after the other, and many measurements on one page."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli import unlearning
from saeguard.cli.console import check_target, out, progress
from saeguard.cli.judging import bars
from saeguard.cli.kept import Kept
from saeguard.cli.policy_files import HELP, named_policy
from saeguard.cli.unlearning import JsonFile, Model, Most, Questions, Seed, Topics

Policies = Annotated[list[Path], typer.Argument(parser=named_policy, metavar="POLICY...", help=HELP)]
Forget = Annotated[list[str] | None, typer.Option("--forget", help="A topic to forget; repeatable.")]


def sequence(
    policies: Policies,
    questions: Questions,
    forget: Forget = None,
    topic: Topics = None,
    model: Model = "",
    most: Most = 60,
    seed: Seed = 0,
    target: JsonFile = None,
) -> None:
    """Put policies in force one after the other, the earlier ones staying, and ask all topics after each step.

    --forget names the topic of each policy, in their order; the policies' names by default. Shows whether each topic is
    still forgotten at the end, and what the topics that no policy is about have lost. With --json an interrupted
    command goes on with the next step when it is given again.
    """
    from saeguard.cli.evaluated import sequence_table
    from saeguard.cli.guarded import deployed
    from saeguard.evaluating.sequence import after_step
    from saeguard.evaluating.subject import Plain

    check_target(target, "--json")
    asked, parts, topics = _given(policies, questions, forget, topic, most, seed)
    with progress("loading") as tick:
        deployment = deployed(_up_to(parts, len(parts)), model, tick)
    settings = {"topics": topic or [], "most": most, "seed": seed, "forget": topics}
    made_of = [{"name": one.name, "serial": one.serial, "fingerprint": one.fingerprint()} for one in parts]
    about = {"saeguard": "eval sequence", "schema": unlearning.SCHEMA, **deployment.about(), "settings": settings,
             "policies": made_of}  # fmt: skip
    kept, steps = Kept(target, [about, [[one.question, one.choices, one.gold] for one in asked]]), []
    with bars(shown=True) as tell:
        plain = _answers(kept, "plain", Plain(deployment.model, deployment.tokenizer), asked, tell)
        for number in range(1, len(parts) + 1):
            name = " + ".join(one.name for one in parts[:number])
            with replace(deployment, policy=_up_to(parts, number)).guarded() as (_, guarded):
                under = _answers(kept, name, guarded, asked, tell)
            steps.append({"policy": name} | after_step(plain, under, topics[:number], topics[number:]))
    if target is not None:
        unlearning.write_document(target, about | {"steps": steps})
    kept.forget()
    out().print(sequence_table(steps))


def page(
    files: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="JSON files of eval unlearn.")],
    target: Annotated[Path, typer.Option("--out", dir_okay=False, help="Where the HTML page goes.")],
    forget: Forget = None,
) -> None:
    """Draw what ``saeguard eval unlearn --json`` measured, of one policy or several, on one HTML page.

    Without --forget a topic counts as one to forget where a gate opened in at least half of its questions.
    """
    from saeguard.drawing.unlearning_page import write_unlearning_page

    check_target(target)
    written = write_unlearning_page([_document(path) for path in files], target, forget=tuple(forget or ()))
    out().print(f"Wrote {written}", markup=False, soft_wrap=True)


def _given(
    policies: Sequence[Path], questions: Sequence[str], forget: Sequence[str] | None, topic: Sequence[str] | None,
    most: int | None, seed: int,
) -> tuple[list[Any], list[Any], list[str]]:  # fmt: skip
    """The questions, the policies, and the topic of each."""
    from saeguard.cli.training import expand
    from saeguard.evaluating.multiple_choice import read_questions
    from saeguard.guarding.policy import Policy

    files = expand([*questions])
    asked = [one for path in files for one in read_questions(path, topics=topic or (), most=most, seed=seed)]
    parts = [Policy.load(path) for path in policies]
    topics, there = list(forget or (one.name for one in parts)), {one.topic for one in asked}
    if len(topics) != len(parts):
        raise typer.BadParameter(f"--forget was given {len(topics)} times for {len(parts)} policies")
    if missing := [one for one in topics if one not in there]:
        raise typer.BadParameter(f"--forget {missing[0]}: the questions are about {', '.join(sorted(there))}")
    return asked, parts, topics


def _up_to(parts: Sequence[Any], number: int) -> Any:
    """The first so many policies as one."""
    from saeguard.guarding.joining import joined

    return parts[0] if number == 1 else joined(parts[:number])


def _answers(kept: Kept, name: str, subject: Any, asked: Sequence[Any], tell: Any) -> Any:
    """The subject's answers, or those that were kept of it."""
    from saeguard.evaluating.multiple_choice import Answers, answers_of
    from saeguard.evaluating.subject import Verdict

    if name not in kept:
        found = answers_of(subject, asked, progress=lambda done, total: tell(name, done, total))
        flat = lambda one: [one.opened, one.stopped]
        kept[name] = {
            "sum": found.sum, "bytes": found.bytes, "pmi": found.pmi, "asked": [flat(one) for one in found.asked],
            "said": [[flat(one) for one in several] for several in found.said],
        }  # fmt: skip
    part = kept[name]
    numbers = {reading: tuple(tuple(row) for row in part[reading]) for reading in ("sum", "bytes", "pmi")}
    verdicts = tuple(Verdict(*one) for one in part["asked"])
    said = tuple(tuple(Verdict(*one) for one in several) for several in part["said"])
    return Answers(tuple(asked), **numbers, asked=verdicts, said=said)


def _document(path: Path) -> dict[str, Any]:
    """Raises `BrokenFile` for what ``saeguard eval unlearn`` did not write."""
    from saeguard.errors import BrokenFile

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenFile(f"measurements in {path}", f"it is not JSON ({error})", "Measure again.") from error
    if not isinstance(found, dict) or found.get("saeguard") != "eval unlearn":
        raise BrokenFile(f"measurements in {path}", "saeguard eval unlearn did not write it", "Give one of its files.")
    return found
