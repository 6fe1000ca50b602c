"""How the commands of ``saeguard eval`` begin and end: what is measured, the questions, and the JSON file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saeguard.cli import unlearning
from saeguard.cli.console import check_target, progress


def begin(
    policy: Path, model: str, questions: Sequence[str], topic: Sequence[str] | None, most: int | None, seed: int,
    target: Path | None,
) -> tuple[Any, list[Any]]:  # fmt: skip
    """What is measured, and the questions; ``most`` of each topic of each file."""
    from saeguard.cli.guarded import deploy
    from saeguard.cli.training import expand
    from saeguard.evaluating.multiple_choice import read_questions

    check_target(target, "--json")
    asked = [
        one for path in expand([*questions]) for one in read_questions(path, topics=topic or (), most=most, seed=seed)
    ]
    with progress("loading") as tick:
        return deploy(policy, model, tick), asked


def finish(target: Path | None, kind: str, deployment: Any, settings: dict[str, Any], found: dict[str, Any]) -> None:
    """Write what was found of a policy, and by which settings; numbers that are none become null."""
    from saeguard.cli.judging import finite

    document = {"saeguard": f"eval {kind}", "schema": unlearning.SCHEMA, **deployment.about(), "settings": settings}
    if target is not None:
        unlearning.write_document(target, finite(document | found))


def tokens_of(patterns: Sequence[str], tokenizer: Any, n: int, seed: int) -> list[int]:
    """At least ``n`` tokens of the texts, where they have so many, in an order drawn by ``seed``."""
    import random

    from saeguard.cli.texts import documents_of
    from saeguard.evaluating.prompts import token_ids

    documents = [text for texts in documents_of(patterns, tokenizer).values() for text in texts]
    random.Random(seed).shuffle(documents)
    found: list[int] = []
    for text in documents:
        if len(found) >= n:
            break
        found += token_ids(tokenizer, f"{text}\n\n")
    return found
