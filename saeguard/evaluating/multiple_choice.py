"""Multiple choice by log-likelihood: which answer does the model find likeliest, under whatever steers it now?

    prompt   "Question: Q\\nAnswer:"                     behind BOS, if the tokenizer has one
    sum(c)   = sum over the tokens t of " c" of ln p(t | prompt, c before t)
    bytes(c) = sum(c) / bytes of c
    pmi(c)   = sum(c) - the same sum behind "Answer:" alone

An answer is right where the right choice has the largest number; ties count as wrong. Every choice is a row of its own,
so a plan on the model acts on the question and on the choice. Intervals are Wilson's, 95 %.
"""

import gzip
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from saeguard.errors import BrokenFile, UnstableEdit, UnsupportedFormat

Reading = Literal["sum", "bytes", "pmi"]
BATCH = 16
"""Rows per forward pass."""
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
    """Per question and choice, the numbers of the three readings, in nats (and nats per byte)."""

    questions: tuple[Question, ...]
    sum: tuple[tuple[float, ...], ...]
    bytes: tuple[tuple[float, ...], ...]
    pmi: tuple[tuple[float, ...], ...]

    def right(self, reading: Reading = "sum") -> list[bool]:
        """Per question, whether the right choice has the largest number, and alone."""
        rows = zip(self.questions, getattr(self, reading), strict=True)
        return [all(row[q.gold] > x for i, x in enumerate(row) if i != q.gold) for q, row in rows]

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
    """Every choice's log-likelihood on the model as it is now: plain, or under the plan of the block around it.

    Neither batch size nor padding changes a number beyond float32 rounding. Raises `UnstableEdit` for NaN, which would
    count as a wrong answer.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows: list[tuple[list[int], list[int]]] = []
    for one in questions:
        asked, bare = bos + ids(f"Question: {one.question}\nAnswer:"), bos + ids("Answer:")
        choices = [ids(f" {choice}") for choice in one.choices]
        rows += [(front, choice) for choice in choices for front in (asked, bare)]
    sums = iter(_log_likelihoods(model, rows, batch_rows, progress))
    found: dict[str, list[tuple[float, ...]]] = {"sum": [], "bytes": [], "pmi": []}
    for one in questions:
        pairs = [(next(sums), next(sums)) for _ in one.choices]
        found["sum"].append(tuple(full for full, _ in pairs))
        found["bytes"].append(tuple(f / len(c.encode()) for (f, _), c in zip(pairs, one.choices, strict=True)))
        found["pmi"].append(tuple(full - bare for full, bare in pairs))
    return Answers(tuple(questions), *(tuple(found[name]) for name in get_args(Reading)))


def _log_likelihoods(
    model: nn.Module, rows: Sequence[tuple[list[int], list[int]]], batch_rows: int,
    progress: Callable[[int, int], None] | None,
) -> list[float]:  # fmt: skip
    """Of the second part of each row behind the first; rows of one length go through the model together."""
    order = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i])))
    device, found = next(model.parameters()).device, [0.0] * len(rows)
    for low in range(0, len(order), batch_rows):
        some = order[low : low + batch_rows]
        width = sum(map(len, rows[some[0]]))
        ids = torch.zeros(len(some), width, dtype=torch.long)
        mask, counts = torch.zeros_like(ids), torch.zeros_like(ids)
        for line, i in enumerate(some):
            front, back = rows[i]
            ids[line, : len(front) + len(back)] = torch.tensor(front + back)
            mask[line, : len(front) + len(back)] = 1
            counts[line, len(front) : len(front) + len(back)] = 1
        for i, total in zip(some, _sums(model, ids.to(device), mask.to(device), counts[:, 1:]), strict=True):
            found[i] = total
        if any(math.isnan(found[i]) for i in some):
            raise UnstableEdit(
                f"the log-likelihood of answers under {type(model).__name__}", "it is NaN",
                "Weaken the plan around the call, or run the model in float32 or bfloat16.",
            )  # fmt: skip
        if progress is not None:
            progress(min(low + batch_rows, len(order)), len(order))
    return found


@torch.no_grad()
def _sums(model: nn.Module, ids: Tensor, mask: Tensor, counts: Tensor) -> list[float]:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    row, place = counts.nonzero(as_tuple=True)
    log_p = logits[row, place].float().log_softmax(-1).gather(-1, ids[row, place + 1][:, None])[:, 0].double().cpu()
    return torch.zeros(len(ids), dtype=torch.float64).index_add(0, row, log_p).tolist()
