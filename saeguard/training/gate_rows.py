"""Rows that a gate is trained and calibrated on, in the formats in which a deployed model reads them.

    plain     BOS "Question: ...\\nAnswer:"
    chat      the tokenizer's chat template around the question, as far as the beginning of the answer
    passage   BOS and a piece of a document

A threshold holds for the format that it was fitted on, so a question is read in both. A row has a topic and a group:
rows of one group, such as both formats of one question, are in the same fold, so that no score of a row comes from a
head that has seen the question.
"""

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saeguard.errors import MissingBOS, TrainError

Form = Literal["plain", "chat", "passage"]


@dataclass(frozen=True)
class Question:
    """A question and what it is about."""

    text: str
    topic: str


@dataclass(frozen=True)
class GateRow:
    """Token ids as the model is given them, special tokens included; ``text`` are those of the text without a format.

    Words are learned from ``text``: what every row of a format has says nothing about topics.
    """

    ids: tuple[int, ...]
    text: tuple[int, ...]
    topic: str
    form: Form
    group: str


def read_questions(paths: Sequence[Path]) -> tuple[Question, ...]:
    """The questions of .jsonl and .jsonl.gz files, each once; ``topic`` is the file's first word where a row has none.

    Raises `TrainError`.
    """
    found: dict[Question, None] = {}
    for path in paths:
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines if line.strip()]
            found |= dict.fromkeys(Question(_text(row, "question"), _topic(row, path)) for row in rows)
        except (OSError, EOFError, ValueError, TypeError) as error:
            raise TrainError(
                f"questions from {path}", f"a row could not be read ({error})",
                "Give JSON lines with question and topic.",
            ) from error  # fmt: skip
    if not found:
        raise TrainError(
            f"questions from {len(paths)} files", "there is none in them", "Give JSON lines with question."
        )
    return tuple(found)


def _text(row: Any, key: str) -> str:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"a row has no text {key}")
    return value


def _topic(row: Any, path: Path) -> str:
    return _text(row, "topic") if row.get("topic") is not None else path.name.split(".")[0]


def question_rows(
    questions: Sequence[Question], tokenizer: Any, *, bos: bool = True, chat_every: int = 1
) -> tuple[GateRow, ...]:
    """Every question in plain form, and every ``chat_every``-th of them, drawn by its text, as a chat too.

    A tokenizer without a chat template gives plain rows alone. Raises `MissingBOS`.
    """
    front = _front(tokenizer, bos)
    rows = []
    for question in questions:
        group = hashlib.sha256(question.text.encode()).hexdigest()[:16]
        encode = lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        plain = encode(f"Question: {question.text}\nAnswer:")
        rows.append(GateRow((*front, *plain), encode(f" {question.text}"), question.topic, "plain", group))
        if getattr(tokenizer, "chat_template", None) and int(group, 16) % chat_every == 0:
            turn = [{"role": "user", "content": question.text}]
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            rows.append(GateRow(encode(text), encode(question.text), question.topic, "chat", group))
    return tuple(rows)


def passage_rows(
    documents: Mapping[str, Sequence[str]], tokenizer: Any, *, each: int, tokens: int = 384, bos: bool = True,
    seed: int = 0,
) -> tuple[GateRow, ...]:  # fmt: skip
    """``each`` pieces of at most ``tokens`` tokens per topic, drawn by ``seed``, a document giving one at a time.

    A piece begins anywhere, as what a user pastes does. Raises `MissingBOS`.
    """
    front = _front(tokenizer, bos)
    rows = []
    for topic, texts in documents.items():
        rng = np.random.default_rng([seed, int(hashlib.sha256(topic.encode()).hexdigest()[:8], 16)])
        for number in range(each if texts else 0):
            document = int(rng.integers(len(texts)))
            start = int(rng.integers(max(1, len(texts[document]) - 4 * tokens)))
            piece = texts[document][start : start + 12 * tokens]
            ids = tokenizer(piece, add_special_tokens=False)["input_ids"][:tokens]
            if ids:
                rows.append(GateRow((*front, *ids), tuple(ids), topic, "passage", f"{topic}/{document}/{number}"))
    return tuple(rows)


def folds_of(rows: Sequence[GateRow], n: int) -> tuple[int, ...]:
    """The fold of each row, by its group's name alone: rows that are added move no other."""
    return tuple(int(hashlib.sha256(row.group.encode()).hexdigest()[:12], 16) % n for row in rows)


def _front(tokenizer: Any, bos: bool) -> tuple[int, ...]:
    if bos and tokenizer.bos_token_id is None:
        raise MissingBOS(
            "rows that each begin with BOS",
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no BOS token",
            "Set tokenizer.bos_token to the token that the model saw first in training.",
        )
    return (tokenizer.bos_token_id,) if bos else ()
