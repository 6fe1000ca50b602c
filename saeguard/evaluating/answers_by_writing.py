"""Questions answered in writing: greedy text in the chat format, and which answer it names.

    options   the question with its choices, "A. ..." and so on: the answer is the choice named first, by letter or by
              its text; where two texts begin at one place, the longer one
    open      the question alone: the answer is right where the right choice's words occur in it, in their order

A letter counts where it stands as one: "B", "B.", "(B)", "B:", "answer is B"; an article does not. Text is compared
without case and punctuation, and what a choice has in brackets may be missing. An answer that names nothing, or that
was stopped, is wrong.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from saeguard.errors import UnsupportedFormat
from saeguard.evaluating.multiple_choice import Accuracy, Question
from saeguard.evaluating.prompts import chat_ids, padded
from saeguard.evaluating.subject import Subject, Verdict, device_of, special_id

Form = Literal["options", "open"]
FORMS: tuple[Form, ...] = ("options", "open")
BATCH = 16
"""Rows per generate call."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Written:
    """What was written to each question: its text, its token ids up to the end token, and what became of the row."""

    questions: tuple[Question, ...]
    form: Form
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    verdicts: tuple[Verdict, ...]

    def named(self) -> list[int | None]:
        """Per question the choice that the answer names; in open answers that can only be the right one."""
        pairs = zip(self.questions, self.texts, self.verdicts, strict=True)
        return [None if verdict.stopped else self._named(one, text) for one, text, verdict in pairs]

    def right(self) -> list[bool]:
        """Per question, whether the right choice is named."""
        return [found == one.gold for one, found in zip(self.questions, self.named(), strict=True)]

    def accuracy(self) -> Accuracy:
        """Over all questions. Nobody guesses an open answer."""
        chance = sum(1 / len(one.choices) for one in self.questions) / max(len(self.questions), 1)
        return Accuracy(sum(self.right()), len(self.questions), chance if self.form == "options" else 0.0)

    def _named(self, one: Question, text: str) -> int | None:
        if self.form == "options":
            return named_choice(text, one.choices)
        return one.gold if holds(text, one.choices[one.gold]) else None


def write_answers(
    subject: Subject,
    questions: Sequence[Question],
    form: Form,
    *,
    new_tokens: int = 64,
    batch_rows: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Greedy answers of at most ``new_tokens`` tokens. Raises `UnsupportedFormat` for more choices than letters."""
    prompts = [chat_ids(subject.tokenizer, (prompt_of(one, form),)) for one in questions]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: dict[int, tuple[tuple[int, ...], Verdict]] = {}
    for low in range(0, len(order), batch_rows):
        some = order[low : low + batch_rows]
        found |= dict(zip(some, _written(subject, [prompts[i] for i in some], new_tokens), strict=True))
        if progress is not None:
            progress(len(found), len(order))
    ids = tuple(found[i][0] for i in range(len(prompts)))
    texts = tuple(subject.tokenizer.batch_decode([list(row) for row in ids], skip_special_tokens=True))
    return Written(tuple(questions), form, texts, ids, tuple(found[i][1] for i in range(len(prompts))))


def prompt_of(question: Question, form: Form) -> str:
    """What the user says. Raises `UnsupportedFormat`."""
    if form == "open":
        return question.question
    if len(question.choices) > len(LETTERS):
        raise UnsupportedFormat(
            f"the question {question.question[:60]!r} in writing", f"it has {len(question.choices)} choices",
            f"Give at most {len(LETTERS)}, which have a letter each.",
        )  # fmt: skip
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    return "\n".join([question.question, *options, "Answer with the letter and the text of the right option."])


def named_choice(text: str, choices: Sequence[str]) -> int | None:
    """The choice that ``text`` names first, by its letter or by its words; None where it names none."""
    letters = [(at, 1, LETTERS.index(letter)) for at, letter in _letters(text, len(choices))]
    spelled = [(at, len(choice), i) for i, choice in enumerate(choices) for at in _found(text, choice)]
    first = min([*letters, *spelled], key=lambda one: (one[0], -one[1]), default=None)
    return None if first is None else first[2]


def holds(text: str, term: str) -> bool:
    """Whether the words of ``term`` occur in ``text``, one after the other."""
    return bool(_found(text, term))


def _letters(text: str, n: int) -> Iterator[tuple[int, str]]:
    """Where letters of choices stand alone, marked as such or after a word that announces one."""
    some = f"[A-{LETTERS[n - 1]}]"
    marked = (
        rf"(?<![\w'.])\(?({some})(?:[.):](?!\w)|\s*$|\s*\n)|(?:answer|option|choice|letter)(?: is)?:? \(?({some})\b"
    )
    for match in re.finditer(marked, text):
        yield match.start(), match.group(1) or match.group(2)


def _found(text: str, term: str) -> list[int]:
    """Where ``term`` begins in ``text``, with what it has in brackets or without."""
    spellings = {term, re.sub(r"\([^)]*\)", " ", term)}
    patterns = [_pattern(spelling) for spelling in spellings if spelling.strip()]
    return sorted({match.start() for one in patterns for match in re.finditer(one, text, re.IGNORECASE)})


def _pattern(term: str) -> str:
    """Its words, one after the other; a term without words is looked for as it is."""
    words = re.findall(r"\w+", term)
    return r"(?<!\w)" + r"\W+".join(map(re.escape, words)) + r"(?!\w)" if words else re.escape(term.strip())


def _written(
    subject: Subject, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[tuple[tuple[int, ...], Verdict]]:
    ids, mask = padded(prompts, "left", device_of(subject))
    ends = ends_of(subject)
    pad = special_id(subject, "pad")
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
    if pad is not None or ends:
        options["pad_token_id"] = pad if pad is not None else min(ends)
    with torch.no_grad():
        sequences, verdicts = subject.write(ids, mask, **options)
    answers = [_until(row, ends) for row in sequences[:, ids.shape[1] :].tolist()]
    return list(zip(answers, verdicts, strict=True))


def ends_of(subject: Subject) -> frozenset[int]:
    """Ids that end an answer, by the model's generation config or by the tokenizer."""
    config: Any = getattr(subject.model, "generation_config", None)
    given = getattr(config, "eos_token_id", None)
    given = special_id(subject, "eos") if given is None else given
    return frozenset([given] if isinstance(given, int) else given or ())


def _until(row: Sequence[int], ends: frozenset[int]) -> tuple[int, ...]:
    """The ids of an answer, its end token included; what fills up the row behind it is none."""
    end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return tuple(row[:end])
