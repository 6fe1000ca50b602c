"""Multiple choice by log-likelihood: which answer does the model find likeliest, under whatever steers it now?

    prompt   "Question: Q\\nAnswer:"                     behind BOS, if the tokenizer has one
    sum(c)   = sum over the tokens t of " c" of ln p(t | prompt, c before t)
    bytes(c) = sum(c) / bytes of c
    pmi(c)   = sum(c) - the same sum behind "Answer:" alone

An answer is right where the right choice has the largest number; ties count as wrong. A plan on the model acts on the
question and on the choice. Where a guardrail would end the row of the choice that the model finds likeliest, the
question is refused, which counts as wrong. Intervals are Wilson's, 95 %.
"""

import gzip
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from saeguard.errors import BrokenFile, UnsupportedFormat
from saeguard.evaluating.likelihoods import BATCH, Branches, likelihoods
from saeguard.evaluating.prompts import bare_ids, token_ids
from saeguard.evaluating.subject import Plain, Subject, Verdict

Reading = Literal["sum", "bytes", "pmi"]
_Z = 1.959963984540054


@dataclass(frozen=True)
class Question:
    """``gold`` is the place of the right choice, from 0."""

    question: str
    choices: tuple[str, ...]
    gold: int
    topic: str = ""

    def __post_init__(self):
        if len(self.choices) < 2 or not 0 <= self.gold < len(self.choices) or not all(map(str.strip, self.choices)):
            raise BrokenFile(
                f"the question {self.question[:60]!r}", f"it has {len(self.choices)} choices, and gold is {self.gold}",
                "Give at least two choices with words in them, and the place of the right one, from 0.",
            )  # fmt: skip


@dataclass(frozen=True)
class Accuracy:
    """``right`` of ``n``, with the share that guessing would get."""

    right: int
    n: int
    chance: float

    @property
    def share(self) -> float:
        return self.right / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        if not self.n:
            return math.nan, math.nan
        p, n = self.share, self.n
        middle, half = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
        return (middle - half) / (1 + _Z**2 / n), (middle + half) / (1 + _Z**2 / n)


@dataclass(frozen=True)
class Answers:
    """Per question and choice, the numbers of the three readings, in nats (and nats per byte).

    ``asked`` is what became of each question alone, ``said`` of it with each choice behind it; empty where nobody told.
    """

    questions: tuple[Question, ...]
    sum: tuple[tuple[float, ...], ...]
    bytes: tuple[tuple[float, ...], ...]
    pmi: tuple[tuple[float, ...], ...]
    asked: tuple[Verdict, ...] = ()
    said: tuple[tuple[Verdict, ...], ...] = ()

    def right(self, reading: Reading = "sum", *, refusals: bool = True) -> list[bool]:
        """Per question, whether the right choice has the largest number, and alone, and its row was not stopped.

        Without ``refusals`` a stop counts for nothing: what the model knows behind its edits.
        """
        stopped = self.refused(reading) if refusals else [False] * len(self.questions)
        rows = zip(self.questions, getattr(self, reading), stopped, strict=True)
        return [not no and all(row[q.gold] > x for i, x in enumerate(row) if i != q.gold) for q, row, no in rows]

    def refused(self, reading: Reading = "sum") -> list[bool]:
        """Per question, whether the row of the choice with the largest number was stopped."""
        rows = getattr(self, reading)
        said = self.said or [(Verdict(),) * len(row) for row in rows]
        return [several[row.index(max(row))].stopped for row, several in zip(rows, said, strict=True)]

    def accuracy(self, reading: Reading = "sum", *, topic: str | None = None) -> Accuracy:
        """Over all questions, or those of one topic."""
        assert reading in get_args(Reading)
        pairs = [(q, r) for q, r in zip(self.questions, self.right(reading), strict=True) if topic in (None, q.topic)]
        chance = sum(1 / len(q.choices) for q, _ in pairs) / len(pairs) if pairs else math.nan
        return Accuracy(sum(r for _, r in pairs), len(pairs), chance)


def read_questions(
    path: str | Path, *, topics: Sequence[str] = (), most: int | None = None, seed: int = 0
) -> list[Question]:  # fmt: skip
    """Questions from JSON lines with question, choices, gold and perhaps topic; ``most`` per topic, drawn by ``seed``.

    Raises `UnsupportedFormat` when there is no such file or nothing in it, `BrokenFile` for a row that is none.
    """
    file = Path(path)
    if not file.is_file():
        raise UnsupportedFormat(f"questions in {file.name}", "there is no such file", "Check the path.")
    found: dict[str, list[Question]] = {}
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                one = _question(row)
                if not topics or one.topic in topics:
                    found.setdefault(one.topic, []).append(one)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError) as error:
        raise BrokenFile(
            f"questions in {file.name}", f"a row could not be read ({type(error).__name__}: {error})",
            'Give JSON lines like {"question": "...", "choices": ["...", "..."], "gold": 0, "topic": "..."}.',
        ) from error  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for topic in sorted(found):
        order = torch.randperm(len(found[topic]), generator=generator).tolist()
        drawn += [found[topic][i] for i in order[:most]]
    if not drawn:
        raise UnsupportedFormat(
            f"questions in {file.name}", f"there is none{f' of {list(topics)}' if topics else ''}", "Give others."
        )
    return drawn


def _question(row: Any) -> Question:
    """Raises `TypeError` for values of another kind, which would make a question, but not the one that was meant."""
    question, choices, gold, topic = row["question"], row["choices"], row["gold"], row.get("topic") or ""
    if type(choices) is not list or type(gold) is not int:
        raise TypeError(f"choices {choices!r:.60} and gold {gold!r:.60} are not a list and a whole number")
    wrong = [text for text in (question, topic, *choices) if not isinstance(text, str)]
    if wrong:
        raise TypeError(f"{wrong[0]!r:.60} is no text")
    "".join((question, topic, *choices)).encode()  # half a surrogate pair is no text either
    return Question(question, tuple(choices), gold, topic)


def answer(
    model: nn.Module,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    batch_rows: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """`answers_of` the model as it is now: plain, or under the plan of the block around the call."""
    return answers_of(Plain(model, tokenizer), questions, batch_rows=batch_rows, progress=progress)


def answers_of(
    subject: Subject,
    questions: Sequence[Question],
    *,
    batch_rows: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Every choice's log-likelihood, and what became of each question and each choice.

    Neither batch size nor padding changes a number beyond float32 rounding. Raises `UnstableEdit` for NaN, which would
    count as a wrong answer, and `BrokenFile` for a choice in which the tokenizer finds no token.
    """
    tokenizer, branches = subject.tokenizer, []
    for one in questions:
        backs = tuple(tuple(token_ids(tokenizer, f" {choice}")) for choice in one.choices)
        if not all(backs):
            raise BrokenFile(
                f"the question {one.question[:60]!r}", "the tokenizer finds no token in one of its choices",
                "Give choices in words that it knows.",
            )  # fmt: skip
        fronts = (bare_ids(tokenizer, text) for text in (asked_as(one), "Answer:"))
        branches += [Branches(tuple(front), backs) for front in fronts]
    found = likelihoods(subject, branches, batch_rows=batch_rows, progress=progress)
    full, bare = found[::2], found[1::2]
    readings = {
        "sum": [one.nats for one in full],
        "bytes": [
            tuple(x / len(c.encode()) for x, c in zip(one.nats, q.choices, strict=True))
            for one, q in zip(full, questions, strict=True)
        ],
        "pmi": [tuple(x - y for x, y in zip(a.nats, b.nats, strict=True)) for a, b in zip(full, bare, strict=True)],
    }
    said = {"asked": tuple(one.asked for one in full), "said": tuple(one.said for one in full)}
    return Answers(tuple(questions), **{name: tuple(rows) for name, rows in readings.items()}, **said)


def asked_as(question: Question) -> str:
    """The prompt of the log-likelihoods."""
    return f"Question: {question.question}\nAnswer:"
