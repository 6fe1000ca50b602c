"""Dilution: does benign text around a question change what is decided about it, and does the form of the batch?

    alone            the question in its frame, by itself: what is decided there is what should stay
    before(n)        n benign tokens, then the question
    after(n)         the question, then n benign tokens
    around(n)        n/2 benign tokens on either side

A flip is a decision that differs from the one alone: lost where it fell silent, gained where it spoke up. The benign
text alone is decided on as well, since a gain may be its own. Each of these rows is put into batches of several forms
(padding left or right, cut into passes, with other rows beside it); where two forms disagree is counted apart, and
nothing excuses that.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from saeguard.errors import ScoreMismatch
from saeguard.evaluating.prompts import Frame, Side, padded, places
from saeguard.evaluating.subject import Subject, device_of

Place = Literal["before", "after", "around"]
PLACES: tuple[Place, ...] = get_args(Place)
LENGTHS = (50, 100, 200, 400, 800, 1600)
CHUNK = 61
"""Columns per pass where a prompt is cut; no multiple of anything in it."""


@dataclass(frozen=True)
class Form:
    """How rows go through the model: padded on a side, in passes of ``chunk`` columns, so many rows together."""

    name: str
    side: Side = "left"
    chunk: int | None = None
    rows: int = 1


FORMS = (Form("alone"), Form("left, mates", rows=4), Form("right, mates", "right", rows=4),
         Form("left, chunks, mates", "left", CHUNK, 4), Form("chunks", "left", CHUNK))  # fmt: skip


@runtime_checkable
class Decide(Protocol):
    """Whether something steps in, per row of token ids, when they go through in this form."""

    def __call__(self, rows: Sequence[Sequence[int]], form: Form) -> list[bool]: ...


@dataclass(frozen=True)
class Point:
    """Of ``n`` questions with ``length`` benign tokens at one place: decisions open, flips, and forms that disagree.

    ``benign_opens`` is what is decided on the benign text without a question.
    """

    place: Place
    length: int
    n: int
    opened: int
    lost: int
    gained: int
    disagreeing: int
    benign_opens: bool


@dataclass(frozen=True)
class Dilution:
    """The curve, and how many of ``n`` questions are decided on alone as open."""

    n: int
    opened_alone: int
    disagreeing_alone: int
    forms: tuple[str, ...]
    points: tuple[Point, ...]

    @property
    def flips(self) -> int:
        """Lost and gained, over the whole curve."""
        return sum(point.lost + point.gained for point in self.points)


def dilution(
    decide: Decide,
    questions: Sequence[Sequence[int]],
    benign: Sequence[int],
    frame: Frame,
    *,
    lengths: Sequence[int] = LENGTHS,
    where: Sequence[Place] = PLACES,
    forms: Sequence[Form] = FORMS,
    progress: Callable[[int, int], None] | None = None,
) -> Dilution:
    """Decide on every question, as token ids, with so much of ``benign`` at every place, in every form.

    The first form's decisions are the curve. Raises `ScoreMismatch` for too little benign text.
    """
    if not questions or not forms or len(benign) < max(lengths, default=0):
        raise ScoreMismatch(
            f"dilution of {len(questions)} questions up to {max(lengths, default=0):,} tokens",
            f"there are {len(benign):,} benign tokens and {len(forms)} forms", "Give more text, or shorter lengths.",
        )  # fmt: skip
    total, done = len(lengths) * len(where) + 1, 0
    alone, odd = _decided(decide, [frame.around(one) for one in questions], forms)
    points = []
    for length in lengths:
        quiet, _ = _decided(decide, [frame.around(benign[:length])], forms[:1])
        for place in where:
            done += 1
            if progress is not None:
                progress(done, total)
            rows = [frame.around(mixed(one, benign[:length], place)) for one in questions]
            found, disagreeing = _decided(decide, rows, forms)
            lost = sum(a and not b for a, b in zip(alone, found, strict=True))
            gained = sum(b and not a for a, b in zip(alone, found, strict=True))
            points.append(Point(place, length, len(rows), sum(found), lost, gained, disagreeing, quiet[0]))
    if progress is not None:
        progress(total, total)
    return Dilution(len(questions), sum(alone), odd, tuple(form.name for form in forms), tuple(points))


def mixed(question: Sequence[int], benign: Sequence[int], place: Place) -> list[int]:
    """The question with all of ``benign`` at that place."""
    cut = {"before": len(benign), "after": 0, "around": len(benign) // 2}[place]
    return [*benign[:cut], *question, *benign[cut:]]


def decider(subject: Subject) -> Decide:
    """Decisions by passes of the subject over each row as a prompt: whether anything has opened by its end."""

    def decide(rows: Sequence[Sequence[int]], form: Form) -> list[bool]:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: dict[int, bool] = {}
        for low in range(0, len(order), form.rows):
            some = order[low : low + form.rows]
            found |= dict(zip(some, _opened(subject, [rows[i] for i in some], form), strict=True))
        return [found[i] for i in range(len(rows))]

    return decide


def _decided(decide: Decide, rows: Sequence[Sequence[int]], forms: Sequence[Form]) -> tuple[list[bool], int]:
    """Per row what the first form decides, and of how many rows another one decides otherwise."""
    several = [decide(rows, form) for form in forms]
    return several[0], sum(len(set(row)) > 1 for row in zip(*several, strict=True))


@torch.no_grad()
def _opened(subject: Subject, rows: Sequence[Sequence[int]], form: Form) -> Iterator[bool]:
    ids, mask = padded(rows, form.side, device_of(subject))
    positions, columns = places(mask), ids.shape[1]
    cuts = [0, *range(form.chunk, columns, form.chunk), columns] if form.chunk else [0, columns]
    model, cache = subject.model, DynamicCache(config=subject.model.config)  # type: ignore[arg-type]
    with subject.passes([len(row) for row in rows]) as verdicts:
        for a, b in pairwise(cuts):
            _pass(model, ids[:, a:b], mask[:, :b], positions[:, a:b], cache if form.chunk else None)
        return iter([verdict.opened for verdict in verdicts()])


def _pass(
    model: torch.nn.Module, ids: Int[Tensor, "row new"], mask: Int[Tensor, "row column"],
    positions: Int[Tensor, "row new"], cache: DynamicCache | None,
) -> None:  # fmt: skip
    model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
          use_cache=cache is not None, logits_to_keep=1)  # fmt: skip
