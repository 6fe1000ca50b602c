"""How likely several continuations of one beginning are: the beginning is read once, and its cache serves them all.

    nats(back) = sum over the tokens t of back of ln p(t | front, back before t)

A gate's memory belongs to the rows of the cache and is multiplied with them, so that what is measured under a guardrail
is what rows of their own would show. Fronts are padded on the left and backs on the right, of which neither is seen.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from saeguard.errors import UnstableEdit
from saeguard.evaluating.prompts import padded, places
from saeguard.evaluating.subject import Subject, Verdict, device_of

BATCH = 32
"""Continuations per forward pass."""


@dataclass(frozen=True)
class Branches:
    """Token ids of one beginning and of the two or more that may follow it, none of them empty."""

    front: tuple[int, ...]
    backs: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Likelihoods:
    """``nats`` per continuation; what became of the beginning, and of each row once it was said."""

    nats: tuple[float, ...]
    asked: Verdict
    said: tuple[Verdict, ...]


def likelihoods(
    subject: Subject, branches: Sequence[Branches], *, batch_rows: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> list[Likelihoods]:  # fmt: skip
    """One per beginning, in order. Raises `UnstableEdit` for NaN, and what the subject raises.

    Neither batch size nor padding changes a number beyond float32 rounding.
    """
    found: dict[int, Likelihoods] = {}
    for numbers in _batches(branches, batch_rows):
        several = _of_batch(subject, [branches[i] for i in numbers])
        found |= dict(zip(numbers, several, strict=True))
        if any(math.isnan(x) for one in several for x in one.nats):
            raise UnstableEdit(
                f"the log-likelihood of answers under {type(subject.model).__name__}", "it is NaN",
                "Weaken the plan around the call, or run the model in float32 or bfloat16.",
            )  # fmt: skip
        if progress is not None:
            progress(len(found), len(branches))
    return [found[i] for i in range(len(branches))]


def _batches(branches: Sequence[Branches], batch_rows: int) -> Iterator[list[int]]:
    """Numbers of beginnings of about one length, with at most ``batch_rows`` continuations where one has no more."""
    some: list[int] = []
    for i in sorted(range(len(branches)), key=lambda i: -len(branches[i].front)):
        if some and sum(len(branches[j].backs) for j in [*some, i]) > batch_rows:
            yield some
            some = []
        some.append(i)
    if some:
        yield some


def branch_nats(
    subject: Subject, some: Sequence[Branches]
) -> tuple[Float[Tensor, " back"], Sequence[Verdict], Sequence[Verdict]]:
    """Of one batch: ``nats`` of all continuations, beginning by beginning, with their gradient where one is asked for;
    what became of each beginning, and of each continuation.
    """
    device, model = device_of(subject), subject.model
    fronts, real = padded([one.front for one in some], "left", device)
    config: Any = model.config
    cache = DynamicCache(config=config)
    with subject.passes([len(one.front) for one in some]) as verdicts:
        first = model(input_ids=fronts, attention_mask=real, position_ids=places(real), past_key_values=cache,
                      use_cache=True, logits_to_keep=1).logits  # fmt: skip
        asked = verdicts()
    owner = torch.tensor([i for i, one in enumerate(some) for _ in one.backs], device=device)
    cache.batch_select_indices(owner)
    backs, told = padded([back for one in some for back in one.backs], "right", device)
    mask = torch.cat([real[owner], told], dim=1)
    with subject.passes([len(some[i].front) for i in owner.tolist()]) as verdicts:
        later = model(input_ids=backs, attention_mask=mask, position_ids=places(mask)[:, real.shape[1] :],
                      past_key_values=cache, use_cache=True).logits  # fmt: skip
        said = verdicts()
    return _sums(torch.cat([first[owner], later[:, :-1]], dim=1), backs, told), asked, said


@torch.no_grad()
def _of_batch(subject: Subject, some: Sequence[Branches]) -> list[Likelihoods]:
    nats, asked, said = branch_nats(subject, some)
    sums, told = iter(nats.tolist()), iter(said)
    return [
        Likelihoods(tuple(next(sums) for _ in one.backs), verdict, tuple(next(told) for _ in one.backs))
        for one, verdict in zip(some, asked, strict=True)
    ]


def _sums(
    logits: Float[Tensor, "row column vocabulary"], ids: Int[Tensor, "row column"], told: Int[Tensor, "row column"]
) -> Float[Tensor, " row"]:
    """Of the log-probabilities of ``ids`` where they are told; each column's logits are those before its token."""
    log_p = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return log_p.double().masked_fill(told == 0, 0.0).sum(1)
