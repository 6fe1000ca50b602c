"""What a guardrail costs and what it takes away: the same questions asked plainly and under it, topic by topic.

Each side is asked for the likeliest choice and, in writing, for the answer. Of the questions in which no gate opened
every number has to be the plain model's to the last bit: sums of log-likelihoods, written ids, and, for a sample, all
logits. `figures` compares the two sides as one JSON object per topic; shares come with Wilson's 95 % interval. A
refused question counts as wrong; ``edits_alone`` is what is right if stops are passed over and the edits are not.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch

from saeguard.evaluating.answers_by_writing import FORMS, Form, Written, write_answers
from saeguard.evaluating.multiple_choice import Accuracy, Answers, Question, Reading, answers_of, asked_as
from saeguard.evaluating.prompts import bare_ids
from saeguard.evaluating.subject import Subject, device_of

SAMPLE = 16
"""Questions of each topic whose logits are compared bit by bit."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Side:
    """What one subject answered. ``bits`` holds, by question number, a hash of the question's logits."""

    answers: Answers
    written: Mapping[Form, Written]
    bits: Mapping[int, str]


def ask(
    subject: Subject, questions: Sequence[Question], *, forms: Sequence[Form] = FORMS, new_tokens: int = 64,
    progress: Progress | None = None,
) -> Side:  # fmt: skip
    """All that `figures` needs. Raises what `answers_of` and `write_answers` raise."""
    told = lambda stage: None if progress is None else partial(progress, stage)
    answers = answers_of(subject, questions, progress=told("likelihoods"))
    written: dict[Form, Written] = {
        form: write_answers(subject, questions, form, new_tokens=new_tokens, progress=told(f"writing, {form}"))
        for form in forms
    }
    return Side(answers, written, {i: _bits(subject, questions[i]) for i in _sample(questions)})


def figures(plain: Side, guarded: Side) -> list[dict[str, Any]]:
    """One object per topic, in the order of their names; questions without a topic are the topic ""."""
    topics = sorted({one.topic for one in plain.answers.questions})
    return [_of_topic(topic, _only(plain, topic), _only(guarded, topic)) for topic in topics]


def share(count: int, n: int) -> dict[str, Any]:
    """A count as a share of ``n``, with its interval; null where there is nothing to count."""
    found = Accuracy(count, n, 0.0)
    low, high = found.interval if n else (None, None)
    return {"count": count, "n": n, "share": found.share if n else None, "low": low, "high": high}


def _of_topic(topic: str, plain: Side, guarded: Side) -> dict[str, Any]:
    questions, n = plain.answers.questions, len(plain.answers.questions)
    asked = [one.opened for one in guarded.answers.asked]
    said = [any(one.opened for one in several) for several in guarded.answers.said]
    through = [q.question for q, right in zip(questions, guarded.answers.right(), strict=True) if right]
    return {
        "topic": topic, "n": n, "chance": sum(1 / len(one.choices) for one in questions) / n,
        "likelihood": {
            reading: _compared(plain.answers.right(reading), guarded.answers.right(reading))
            | {"refused": sum(guarded.answers.refused(reading)),
               "edits_alone": share(sum(guarded.answers.right(reading, refusals=False)), n)}
            for reading in get_args(Reading)
        },
        "written": {form: _in_writing(plain.written[form], guarded.written[form]) for form in plain.written},
        "triggered": {"question": share(sum(asked), n), "answers": share(sum(said), n)},
        "identical": _identical(plain, guarded, said),
        "through": through if 2 * sum(asked) >= n else [],
    }  # fmt: skip


def _compared(plain: Sequence[bool], guarded: Sequence[bool]) -> dict[str, Any]:
    """Both accuracies, and in how many questions they differ which way."""
    pairs = list(zip(plain, guarded, strict=True))
    return {
        "plain": share(sum(plain), len(pairs)), "guarded": share(sum(guarded), len(pairs)),
        "lost": sum(a and not b for a, b in pairs), "gained": sum(b and not a for a, b in pairs),
    }  # fmt: skip


def _in_writing(plain: Written, guarded: Written) -> dict[str, Any]:
    names = lambda written: sum(found is None for found in written.named())
    return _compared(plain.right(), guarded.right()) | {
        "refused": sum(one.stopped for one in guarded.verdicts),
        "triggered": share(sum(one.opened for one in guarded.verdicts), len(guarded.verdicts)),
        "names_no_choice": {"plain": names(plain), "guarded": names(guarded)},
    }


def _identical(plain: Side, guarded: Side, opened: Sequence[bool]) -> dict[str, Any]:
    """Of what nothing stepped into, how much is the plain model's to the last bit: [same, compared]."""
    quiet = [i for i, one in enumerate(opened) if not one]
    same = [plain.answers.sum[i] == guarded.answers.sum[i] for i in quiet]
    alone = [i for i in plain.bits if not guarded.answers.asked[i].opened]
    found: dict[str, Any] = {
        "sums": [sum(same), len(same)],
        "logits": [sum(plain.bits[i] == guarded.bits[i] for i in alone), len(alone)],
    }
    for form, written in guarded.written.items():
        pairs = zip(plain.written[form].ids, written.ids, written.verdicts, strict=True)
        same = [a == b for a, b, verdict in pairs if not verdict.opened]
        found[f"written, {form}"] = [sum(same), len(same)]
    return found


def _only(side: Side, topic: str) -> Side:
    """The part of a side that is about one topic."""
    places = [i for i, one in enumerate(side.answers.questions) if one.topic == topic]
    some = lambda values: tuple(values[i] for i in places)
    names = ("questions", *get_args(Reading), "asked", "said")
    answers = Answers(**{name: some(getattr(side.answers, name)) for name in names})
    written: dict[Form, Written] = {
        form: replace(one, **{name: some(getattr(one, name)) for name in ("questions", "texts", "ids", "verdicts")})
        for form, one in side.written.items()
    }
    return Side(answers, written, {new: side.bits[old] for new, old in enumerate(places) if old in side.bits})


def _sample(questions: Sequence[Question]) -> list[int]:
    """The first questions of each topic."""
    seen: dict[str, int] = {}
    found = []
    for i, one in enumerate(questions):
        seen[one.topic] = seen.get(one.topic, 0) + 1
        found += [i] if seen[one.topic] <= SAMPLE else []
    return found


@torch.no_grad()
def _bits(subject: Subject, question: Question) -> str:
    ids = torch.tensor([bare_ids(subject.tokenizer, asked_as(question))], device=device_of(subject))
    with subject.passes([ids.shape[1]]):
        logits = subject.model(input_ids=ids, use_cache=False).logits
    return hashlib.sha256(logits.float().cpu().contiguous().numpy().tobytes()).hexdigest()
