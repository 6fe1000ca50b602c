"""Questions in another dress: how many still trigger, and how many are still answered, plainly and under a guardrail.

triggered   a gate opened in the conversation as it is deployed, turns as turns, before anything was written
accuracy    log-likelihood behind "Question: T(q)" with the choices as they are, the turns joined line by line
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from saeguard.evaluating.multiple_choice import Accuracy, Question, answers_of
from saeguard.evaluating.prompts import chat_ids, padded, places
from saeguard.evaluating.subject import Subject, device_of
from saeguard.evaluating.transforms import TRANSFORMS

BATCH = 8
"""Rows per forward pass."""


@dataclass(frozen=True)
class Transformed:
    """Of one transform: shares of ``n`` questions; ``asked`` counts gates that opened at "Question: ..." alone."""

    name: str
    triggered: Accuracy
    asked: Accuracy
    plain: Accuracy
    guarded: Accuracy


def transformed(
    plain: Subject, guarded: Subject, questions: Sequence[Question], names: Sequence[str] = tuple(TRANSFORMS), *,
    seed: int = 0, progress: Callable[[int, int], None] | None = None,
) -> list[Transformed]:  # fmt: skip
    """One per name of `TRANSFORMS`, each question with a seed of its own."""
    found = []
    for done, name in enumerate(names):
        turns = [TRANSFORMS[name](one.question, seed + i) for i, one in enumerate(questions)]
        asked = [replace(one, question="\n".join(said)) for one, said in zip(questions, turns, strict=True)]
        answers = [answers_of(subject, asked) for subject in (plain, guarded)]
        opened, n = triggered(guarded, turns), len(questions)
        at_once = sum(one.opened for one in answers[1].asked)
        scores = (answer.accuracy() for answer in answers)
        found.append(Transformed(name, Accuracy(sum(opened), n, 0.0), Accuracy(at_once, n, 0.0), *scores))
        if progress is not None:
            progress(done + 1, len(names))
    return found


@torch.no_grad()
def triggered(subject: Subject, conversations: Sequence[Sequence[str]]) -> list[bool]:
    """Per conversation of a user's turns, whether something opens before the model has written a token."""
    found: list[bool] = []
    rows = [chat_ids(subject.tokenizer, turns) for turns in conversations]
    for low in range(0, len(rows), BATCH):
        some = rows[low : low + BATCH]
        ids, mask = padded(some, "left", device_of(subject))
        with subject.passes([len(row) for row in some]) as verdicts:
            subject.model(input_ids=ids, attention_mask=mask, position_ids=places(mask), use_cache=False,
                          logits_to_keep=1)  # fmt: skip
            found += [verdict.opened for verdict in verdicts()]
    return found
