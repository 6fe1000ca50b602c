"""Whatever fails, fails closed: no answer, no unguarded token, a record that says so, and the next call works.

A fault point is a function on the way of a guarded call, from the request to the record. It is made to raise (at its
first call, at a later one, always), to return garbage or NaN, and to hang.
"""

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from saeguard import Add, Plan, Rule
from saeguard.errors import AuditError, GuardError
from saeguard.gates import Count, Hits, Latched, Watch
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.keys import AuditKey
from saeguard.guarding.policy import Policy, Refuse
from saeguard.guarding.verify import read, verify
from tests import tiny
from tests.words import word_tokenizer

SAE, TOKENIZER, KEY = tiny.tiny_sae(), word_tokenizer(), AuditKey(b"0123456789abcdef")
IDS = tiny.prompt(2, 8)
WRITE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}

POINTS = (
    "editor:Editor.__call__",
    "gating:Gating.masks",
    "gating:History.back_to",
    "gating:History.add",
    "gating:Memory.check",
    "gates.evidence:Hits.of",
    "gates.pools:Count.step",
    "gates.watch:Watch.step",
    "gates.combined:Latched.step",
    "sae:SAE.activate",
    "sae:SAE.read",
    "tokens:TokenBatch.select",
    "engines.hf:HuggingFace.read_pass",
    "engines.hf:HuggingFace.read_request",
    "engines.hf:HuggingFace.read_outcome",
    "engines.hf:HuggingFace.read_cache",
    "engines.session:tokens_of",
    "engines.session:Session._forward_at",
    "engines.memories:Memories.resume",
    "engines.memories:Memories.keep",
    "ledger:Track.add",
    "ledger:CallRecord.table",
    "ledger:CallRecord.trace",
    "guarding.attached:Attached.cover",
    "guarding.attached:Attached.open_record",
    "guarding.attached:Attached.see",
    "guarding.attached:Attached.stopped",
    "guarding.stopping:EndStopped.__call__",
    "guarding.guardrail:decide",
    "guarding.guardrail:replaced",
    "guarding.recording:Recorder._who",
    "guarding.audit:AuditLog.write",
    "guarding.keys:AuditKey.of_tokens",
    "guarding.records:AuditRecord.to_dict",
)
SEES_TENSORS = ("sae:SAE.activate", "gates.evidence:Hits.of")
"""Points whose results can be NaN."""
SILENT = {
    "gating:History.add", "gating:Memory.check", "engines.memories:Memories.resume", "engines.memories:Memories.keep",
    "ledger:Track.add", "guarding.attached:Attached.see",
}  # fmt: skip
"""Points whose result is nothing, or is not needed in this call: garbage from them is no fault."""


@dataclass
class Ears:
    """A streamer that remembers."""

    ids: list[int] = field(default_factory=list)
    ended: bool = False

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@contextmanager
def failing(point: str, fault: Callable[[int, Callable[[], Any]], Any]) -> Iterator[list[int]]:
    """The function replaced: ``fault`` is given the number of the call, from 1, and what the function would do."""
    module, _, path = point.partition(":")
    owner: Any = importlib.import_module(f"saeguard.{module}")
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), [0]

    def replacement(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return fault(calls[0], lambda: original(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, replacement)
        yield calls


class Broken(Exception):
    """What a fault raises."""


def raising(at: Callable[[int], bool]) -> Callable[[int, Callable[[], Any]], Any]:
    def fault(number: int, original: Callable[[], Any]) -> Any:
        if at(number):
            raise Broken
        return original()

    return fault


RAISING = {"once": lambda n: n == 1, "always": lambda n: True, "later": lambda n: n >= 3}


@pytest.fixture
def guard(tmp_path: Any) -> Iterator[Guardrail]:
    """One row is edited and one refused, so that every point is on the way."""
    model = tiny.fresh_model()
    edit = Plan((Rule("tiny", (4, 5), Add(6.0), gate=Latched(Watch(Hits((1, 2, 3)), Count(), 2.0))),))
    stop = Refuse(Watch(Hits(tuple(range(48))), Count(), 7.0), "tiny", None, "w9 w8", "no")
    policies = {
        "edit": Policy.of(model, TOKENIZER, SAE, edit, name="edit"),
        "stop": Policy.of(model, TOKENIZER, SAE, edit, name="stop", refusals=(stop,)),
    }
    log = AuditLog(tmp_path / "audit.jsonl", key=KEY)
    with Guardrail.attach(model, policies, tokenizer=TOKENIZER, saes=SAE, audit=log, key=KEY) as attached:
        yield attached


def answers(guard: Guardrail) -> Tensor:
    return guard.generate(IDS, rows=["edit", "stop"], **WRITE).sequences


def check_closed(guard: Guardrail, expected: Tensor) -> None:
    """After a fault: what is on record is whole, nothing goes around, and the next call is as if nothing had been."""
    assert torch.equal(answers(guard), expected)
    with pytest.raises(GuardError):
        guard.model.generate(IDS, **WRITE)


@pytest.mark.parametrize("when", RAISING)
@pytest.mark.parametrize("point", POINTS)
def test_failure_gives_no_answer_and_a_record_that_says_so(point, when, guard, tmp_path):
    expected = answers(guard)
    before = verify(tmp_path / "audit.jsonl", key=KEY).records
    with failing(point, raising(RAISING[when])) as calls:
        raised = False
        try:
            answers(guard)
        except BaseException:
            raised = True

    assert raised == (calls[0] >= (3 if when == "later" else 1)), f"{calls[0]} calls"
    assert raised or when == "later", "the point is not on the way"
    assert verify(tmp_path / "audit.jsonl", key=KEY).ok
    new = [entry.record for entry in read(tmp_path / "audit.jsonl", key=KEY)][before:]
    if raised:
        assert not any(record.passed for record in new[1:])
    check_closed(guard, expected)


MEANS_SOMETHING = {("engines.hf:HuggingFace.read_cache", None), ("guarding.keys:AuditKey.of_tokens", None)}
"""No cache was returned; no key stands for the prompt."""
GARBAGE = [
    (point, garbage) for point in POINTS if point not in SILENT for garbage in (None, "x")
    if (point, garbage) not in MEANS_SOMETHING
]  # fmt: skip


@pytest.mark.parametrize(("point", "garbage"), GARBAGE)
def test_garbage_gives_no_answer(point, garbage, guard):
    expected = answers(guard)
    with failing(point, lambda number, original: garbage), pytest.raises(BaseException):  # noqa: B017, PT011
        answers(guard)

    check_closed(guard, expected)


@pytest.mark.parametrize("point", SEES_TENSORS)
def test_nan_gives_no_answer(point, guard):
    expected = answers(guard)
    with failing(point, lambda number, original: original() * torch.nan), pytest.raises(GuardError):
        answers(guard)

    check_closed(guard, expected)


@pytest.mark.parametrize("point", POINTS)
def test_what_hangs_is_refused_at_the_deadline(point, guard):
    expected, free, ears = answers(guard), threading.Event(), Ears()
    told = guard.generate(IDS[:1], rows="edit", **WRITE).sequences[0].tolist()
    guard._seconds = 0.25

    def fault(number: int, original: Callable[[], Any]) -> Any:
        free.wait(20)
        return original()

    with failing(point, fault) as calls:
        try:
            with pytest.raises((GuardError, AuditError)) if point not in NOT_FOR_ONE_EDITED else nullcontext():
                guard.generate(IDS[:1], rows="edit", streamer=ears, **WRITE)
        finally:
            free.set()
        if calls[0]:
            assert ears.ids == told[: len(ears.ids)]
            assert len(ears.ids) < len(told)
    guard._seconds = None
    with guard._changing:
        guard._changing.wait_for(lambda: not guard._running, timeout=20)
    check_closed(guard, expected)


NOT_FOR_ONE_EDITED = {
    "guarding.attached:Attached.stopped", "guarding.stopping:EndStopped.__call__",
}  # fmt: skip
"""Points that a row without a stop does not pass."""


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_disk_that_fails_gives_no_answer(call, guard, monkeypatch):
    answers(guard)

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(AuditError):
            answers(guard)


def test_hook_that_somebody_removes_gives_no_answer(guard):
    expected = answers(guard)
    block = guard.model.model.layers[1]
    kept = dict(block._forward_hooks)
    block._forward_hooks.clear()
    with pytest.raises(GuardError):
        answers(guard)
    block._forward_hooks.update(kept)

    check_closed(guard, expected)
