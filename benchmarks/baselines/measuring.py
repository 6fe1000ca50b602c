"""What is measured of every system, each number once: what was measured is kept in the work folder and not repeated.

    questions   right by sum, per byte and by PMI, and whether the gate opened on the question alone, per question
    decoding    greedy answers with and without the cache, and which share of the decoded tokens was edited
    padding     questions whose decision changes when a longer row is in the batch, padded on the right or the left
    benign      KL to the plain model per token, and the ratio of perplexities, on text about other things

A token counts as edited where the stream behind the block moved by more than a thousandth of its length: adding up the
same numbers in another order does not count.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.baselines.systems import System, digest
from saeguard import Site
from saeguard.evaluating.answers_by_writing import ends_of
from saeguard.evaluating.multiple_choice import Question, Reading, answers_of, asked_as
from saeguard.evaluating.prompts import Side, bare_ids, padded, places, token_ids
from saeguard.evaluating.subject import Subject, device_of, special_id
from saeguard.training.activations import find_blocks

MOVED = 1e-3
NEW_TOKENS = 24
MORE = 64
"""Tokens by which the longest row of a batch is longer than the others, to see what padding does."""
PART = 12
"""Questions of a topic that are one result: a run over more of them goes on where one over fewer has ended."""
_FROM = ", from "
Task = Callable[[Subject, System], dict[str, Any]]


@dataclass(frozen=True)
class Kept:
    """Results on disk, one file per system and task, under a hash of all that it depends on."""

    folder: Path

    def path(self, system: str, task: str, key: str) -> Path:
        """Where a result is."""
        name = "".join(c if c.isalnum() else "-" for c in f"{system} {task}")
        return self.folder / f"{name}.{digest(system, task, key)}.json"

    def get(self, system: str, task: str, key: str) -> dict[str, Any] | None:
        """What was measured before, if it was."""
        path = self.path(system, task, key)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def put(self, system: str, task: str, key: str, found: dict[str, Any]) -> dict[str, Any]:
        """Whole or not at all."""
        path = self.path(system, task, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(found), encoding="utf-8")
        os.replace(partial, path)
        return json.loads(path.read_text(encoding="utf-8"))


def measure(
    system: System, tasks: Mapping[str, tuple[str, Task]], kept: Kept, tell: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """The result of each task, each of which comes with its own key. A system that has all of them is not opened."""
    found = {name: kept.get(system.name, name, system.key + key) for name, (key, _) in tasks.items()}
    if None in found.values():
        with system.open() as subject:
            for name, (key, task) in tasks.items():
                if found[name] is None:
                    tell(f"{system.name}: {name}")
                    found[name] = kept.put(system.name, name, system.key + key, task(subject, system))
    return {name: one for name, one in found.items() if one is not None}


def part(topic: str, start: int) -> str:
    """The name of the task of some questions of a topic."""
    return f"topic {topic}{_FROM}{start}"


def joined(found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same results with the parts of each topic put together, as ``topic <name>``."""
    whole: dict[str, dict[str, Any]] = {}
    for name, one in found.items():
        topic, _, start = name.partition(_FROM)
        before = whole.get(topic)
        if not start or before is None:
            whole[topic] = one
            continue
        right = {reading: [*before["right"][reading], *more] for reading, more in one["right"].items()}
        whole[topic] = {"right": right, "opened": [*before["opened"], *one["opened"]]}
    return whole


def answering(questions: Sequence[Question]) -> tuple[str, Task]:
    """Multiple choice by log-likelihood."""

    def task(subject: Subject, system: System) -> dict[str, Any]:
        answers = answers_of(subject, [system.posed(one) for one in questions])
        right = {reading: answers.right(reading) for reading in get_args(Reading)}
        return {"right": right, "opened": [one.opened for one in answers.asked]}

    return digest([(one.question, one.choices, one.gold) for one in questions]), task


def decoding(questions: Sequence[Question], site: Site, *, new_tokens: int = NEW_TOKENS) -> tuple[str, Task]:
    """Greedy answers, all in one batch."""

    def task(subject: Subject, system: System) -> dict[str, Any]:
        prompts = [bare_ids(subject.tokenizer, asked_as(system.posed(one))) for one in questions]
        ids, mask = padded(prompts, "left", device_of(subject))
        pad = special_id(subject, "pad")
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "num_beams": 1,
                   "pad_token_id": 0 if pad is None else pad}  # fmt: skip
        with moved_tokens(subject.model, site) as meter, torch.no_grad():
            cached, _ = subject.write(ids, mask, use_cache=True, **options)
        if system.is_causal:
            afresh = _in_one_pass(subject, cached, mask)
        else:
            with torch.no_grad():
                afresh = subject.write(ids, mask, use_cache=False, **options)[0][:, ids.shape[1] :]
        equal = int((cached[:, ids.shape[1] :] == afresh).all(1).sum())
        return {"equal": equal, "n": len(questions), "edited": meter.moved / max(meter.decoded, 1)}

    return digest([one.question for one in questions], new_tokens), task


def padding(rows: Sequence[Sequence[int]], *, more: int = MORE) -> tuple[str, Task]:
    """Decisions on rows alone against those beside a longer row."""

    def task(subject: Subject, system: System) -> dict[str, Any]:
        alone = [_opened(subject, [row], "right")[0] for row in rows]
        longest = list(max(rows, key=len))
        long = [*longest, *(longest[1:] * math.ceil((more + 1) / max(1, len(longest) - 1)))][: len(longest) + more]
        sides: tuple[Side, ...] = ("right", "left")
        beside = {side: _opened(subject, [*rows, long], side)[:-1] for side in sides}
        flips = {side: sum(a != b for a, b in zip(alone, told, strict=True)) for side, told in beside.items()}
        return {"n": len(rows), "opened": sum(alone), **flips}

    return digest([list(row) for row in rows], more), task


@dataclass(frozen=True, eq=False)
class Text:
    """Rows of ids that begin with BOS, and what the plain model says of them."""

    rows: tuple[tuple[int, ...], ...]
    log_p: tuple[Tensor, ...]

    @classmethod
    def of(cls, plain: Subject, rows: Sequence[Sequence[int]]) -> "Text":
        """Read once."""
        return cls(tuple(map(tuple, rows)), tuple(one for one, _ in _log_p(plain, rows, ())))


def benign(text: Text) -> tuple[str, Task]:
    """How far the next-token predictions are from the plain model's."""

    def task(subject: Subject, system: System) -> dict[str, Any]:
        lead = token_ids(subject.tokenizer, f"{system.instruction}\n\n") if system.instruction else []
        kl = nats = plain = 0.0
        opened, tokens = 0, 0
        for row, p, (q, fired) in zip(text.rows, text.log_p, _log_p(subject, text.rows, lead), strict=True):
            targets = torch.tensor(row[1:])[:, None]
            kl += float((p.exp() * (p - q)).sum(-1).double().sum())
            nats -= float(q.gather(-1, targets).double().sum())
            plain -= float(p.gather(-1, targets).double().sum())
            opened, tokens = opened + fired, tokens + len(row) - 1
        return {"tokens": tokens, "rows": len(text.rows), "kl": kl / tokens, "opened": opened,
                "perplexity": math.exp(plain / tokens), "ratio": math.exp((nats - plain) / tokens)}  # fmt: skip

    return digest([list(row) for row in text.rows]), task


@dataclass
class Meter:
    """Tokens that were decoded one by one, and those of them that were edited."""

    decoded: int = 0
    moved: int = 0
    before: list[Tensor] = field(default_factory=list)


@contextmanager
def moved_tokens(model: Any, site: Site) -> Iterator[Meter]:
    """Counts edits between a block and the next one; both sides of whatever hangs on the block."""
    meter, blocks = Meter(), find_blocks(model)
    stream = lambda output: output if isinstance(output, Tensor) else output[0]

    def leaves(block: Any, args: Any, output: Any) -> None:
        meter.before = [stream(output).detach().clone()]

    def arrives(block: Any, args: Any, kwargs: Any) -> None:
        x, y = meter.before[0], (args[0] if args else kwargs["hidden_states"]).detach()
        if x.shape[1] == 1:
            meter.decoded += x.shape[0]
            meter.moved += int(((y - x).norm(dim=-1) > MOVED * x.norm(dim=-1)).sum())

    handles = [blocks[site.layer].register_forward_hook(leaves, prepend=True),
               blocks[site.layer + 1].register_forward_pre_hook(arrives, with_kwargs=True)]  # fmt: skip
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _in_one_pass(subject: Subject, written: Tensor, mask: Tensor) -> Tensor:
    """Row by row the tokens that greedy decoding without a cache would choose as long as it chose what was written.

    So where all are what was written, generating without a cache gives that too: what a pass says of a prefix does not
    depend on what follows it. One pass in place of one per token.
    """
    whole = torch.cat([mask, mask.new_ones(len(mask), written.shape[1] - mask.shape[1])], 1)
    with subject.passes(mask.sum(1).tolist()):
        logits = subject.model(
            input_ids=written, attention_mask=whole, position_ids=places(whole), use_cache=False
        ).logits[:, mask.shape[1] - 1 : -1]
    logits[..., sorted(ends_of(subject))] = -torch.inf  # written with min_new_tokens: no answer ends early
    return logits.argmax(-1)


@torch.no_grad()
def _opened(subject: Subject, rows: Sequence[Sequence[int]], side: Side) -> list[bool]:
    ids, mask = padded(rows, side, device_of(subject))
    with subject.passes([len(row) for row in rows]) as verdicts:
        subject.model(input_ids=ids, attention_mask=mask, position_ids=places(mask), use_cache=False, logits_to_keep=1)
        return [one.opened for one in verdicts()]


@torch.no_grad()
def _log_p(subject: Subject, rows: Sequence[Sequence[int]], lead: Sequence[int]) -> Iterator[tuple[Tensor, bool]]:
    """Per row the log-probabilities of what follows each of its tokens, and whether anything opened.

    ``lead`` stands between BOS and the text.
    """
    for low in range(0, len(rows), 4):
        some = rows[low : low + 4]
        ids, mask = padded([[row[0], *lead, *row[1:]] for row in some], "right", device_of(subject))
        with subject.passes([len(row) + len(lead) for row in some]) as verdicts:
            logits = subject.model(
                input_ids=ids, attention_mask=mask, position_ids=places(mask), use_cache=False
            ).logits
            told = [one.opened for one in verdicts()]
        for row, one, opened in zip(some, logits, told, strict=True):
            yield one[len(lead) : len(lead) + len(row) - 1].float().log_softmax(-1).cpu(), opened
