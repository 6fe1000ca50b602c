"""A guarded model answers under its policies row by row, or it does not answer; nothing goes around the guardrail."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer

from saeguard import Add, Plan, Rule, Scale, steer
from saeguard.editor import Editor
from saeguard.errors import (
    AuditFailed,
    GateFailed,
    GuardError,
    GuardTimeout,
    PolicyMismatch,
    RowsMismatch,
    UnguardedCall,
    UnsupportedMode,
)
from saeguard.gates import Count, Hits, Latched, Watch
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.keys import AuditKey
from saeguard.guarding.policy import Halt, Policy, Refuse
from saeguard.guarding.verify import read, verify
from tests import tiny
from tests.words import word_tokenizer

SAE = tiny.tiny_sae()
TOKENIZER = word_tokenizer()
PUSH = Plan((Rule("tiny", (4, 5), Add(6.0), gate=Latched(Watch(Hits((1, 2, 3)), Count(), 2.0))),))
FIRST = Watch(Hits(tuple(range(48))), Count(), 0.0)
LATE = Watch(Hits(tuple(range(48))), Count(), 9.0)


@pytest.fixture
def model():
    return tiny.fresh_model()


def policy(model: Any, plan: Plan | None = PUSH, **options: Any) -> Policy:
    return Policy.of(model, TOKENIZER, SAE, plan, name="tiny policy", **options)


def refusing(model: Any, gate: Any = FIRST, **options: Any) -> Policy:
    stop = Refuse(gate, "tiny", None, "w9 w9 w8", "said.no")
    return policy(model, None, refusals=(stop,), **options)


def attach(model: Any, policies: Any, **options: Any) -> Guardrail:
    return Guardrail.attach(model, policies, tokenizer=TOKENIZER, saes=SAE, **options)


IDS = tiny.prompt(3, 8)
WRITE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}


def test_rows_are_under_their_own_policies(model):
    plain = model.generate(IDS, **WRITE)
    with steer(model, [PUSH, None, PUSH], saes=SAE):
        steered = model.generate(IDS, **WRITE)
    with attach(model, {"push": policy(model), "open": None}) as guard:
        found = guard.generate(IDS, rows=["push", "open", "push"], **WRITE)

    assert torch.equal(found.sequences, steered)
    assert torch.equal(found.sequences[1], plain[1])
    assert [one.decision for one in found.decisions] == ["steer", "allow", "steer"]
    assert [one.policy for one in found.decisions] == ["push", "open", "push"]
    assert torch.equal(model.generate(IDS, **WRITE), plain)


def test_names_of_rows_have_to_be_known_and_as_many(model):
    with attach(model, {"push": policy(model), "open": None}) as guard:
        for rows in (None, "nobody", ["push", "open"], ["push", "open", "shut"]):
            with pytest.raises(UnguardedCall):
                guard.generate(IDS, rows=rows, **WRITE)
        assert guard.generate(IDS, rows="push", **WRITE).sequences.shape[0] == 3


AROUND: dict[str, Callable[[Any], Any]] = {
    "generate": lambda model: model.generate(IDS, **WRITE),
    "a forward pass": lambda model: model(IDS),
    "a kept bound method": lambda model: type(model).generate(model, IDS, **WRITE),
    "the inner model": lambda model: model.model(IDS),
    "a thread": lambda model: in_thread(lambda: model.generate(IDS, **WRITE)),
    "an executor": lambda model: ThreadPoolExecutor(1).submit(model.generate, IDS, **WRITE).result(),
    "asyncio.to_thread": lambda model: asyncio.run(asyncio.to_thread(model.generate, IDS, **WRITE)),
    "a streamer's thread": lambda model: streamed(model),
}


def in_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def streamed(model: Any) -> None:
    streamer = TextIteratorStreamer(TOKENIZER, timeout=5)
    in_thread(lambda: model.generate(IDS[:1], streamer=streamer, **WRITE))


@pytest.mark.parametrize("way", AROUND)
def test_nothing_goes_around_the_guardrail(way, model):
    with attach(model, policy(model)), pytest.raises(GuardError):
        AROUND[way](model)

    assert AROUND["generate"](model) is not None


def test_refused_row_has_the_refusal_in_place_of_its_answer(model):
    plain = model.generate(IDS, **WRITE)
    with attach(model, {"no": refusing(model), "open": None}) as guard:
        found = guard.generate(IDS, rows=["open", "no", "open"], **WRITE)

    assert found.texts(TOKENIZER)[1] == "w9 w9 w8"
    assert found.decisions[1].decision == "refuse"
    assert found.decisions[1].reason == "said.no"
    for row in (0, 2):
        assert torch.equal(found.sequences[row, : plain.shape[1]], plain[row])


def test_gate_that_opens_late_stops_the_row_there(model):
    halt = policy(model, None, refusals=(Halt(LATE, "tiny", None, "enough"),))
    plain = model.generate(IDS[:1], **WRITE | {"max_new_tokens": 12})
    with attach(model, halt) as guard:
        found = guard.generate(IDS[:1], **WRITE | {"max_new_tokens": 12})

    at = found.decisions[0].at
    assert at is not None
    assert at >= IDS.shape[1]
    assert torch.equal(found.sequences[0, : at + 1], plain[0, : at + 1])
    assert found.sequences[0, at + 1] == tiny.EOS


SEVERAL = [
    {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 3},
]  # fmt: skip


@pytest.mark.parametrize("options", SEVERAL)
def test_all_sequences_of_a_refused_row_are_refused(options, model):
    with attach(model, {"no": refusing(model), "open": None}) as guard:
        found = guard.generate(IDS, rows=["open", "no", "open"], **WRITE | options)

    kept = found.sequences.shape[0] // 3
    assert [text == "w9 w9 w8" for text in found.texts(TOKENIZER)] == [i // kept == 1 for i in range(3 * kept)]


class Ears:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.heard: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard.append(value.flatten())

    def end(self) -> None:
        self.ended = True

    @property
    def ids(self) -> list[int]:
        return [number for piece in self.heard for number in piece.tolist()]


def test_stream_holds_no_token_behind_the_gate_and_then_the_refusal(model):
    ears = Ears()
    with attach(model, refusing(model, LATE)) as guard:
        found = guard.generate(IDS[:1], streamer=ears, **WRITE | {"max_new_tokens": 12})
    plain = model.generate(IDS[:1], **WRITE | {"max_new_tokens": 12})[0].tolist()

    at = found.decisions[0].at
    assert ears.ended
    assert ears.ids == [*plain[: (at or 0) + 1], tiny.EOS, 9, 9, 8, tiny.EOS]


def test_stream_ends_without_its_last_token_when_the_record_fails(model, tmp_path, monkeypatch):
    log, ears = AuditLog(tmp_path / "audit.jsonl"), Ears()
    monkeypatch.setattr(log, "write", lambda record: (_ for _ in ()).throw(AuditFailed("a", "b", "C.")))
    with attach(model, policy(model), audit=log) as guard, pytest.raises(AuditFailed):
        guard.generate(IDS[:1], streamer=ears, **WRITE)

    assert ears.ended
    assert len(ears.ids) < IDS.shape[1] + 6


def test_every_row_of_every_request_is_on_record(model, tmp_path):
    path, key = tmp_path / "audit.jsonl", AuditKey(b"0123456789abcdef")
    log = AuditLog(path, key=key)
    with attach(model, {"push": policy(model), "no": refusing(model), "open": None}, audit=log, key=key) as guard:
        guard.generate(IDS, rows=["push", "no", "open"], request_ids=["a", "b", "c"], tenant="Jo\n", **WRITE)
        with pytest.raises(RowsMismatch), guard.rows("push", n=2):
            model(IDS)

    assert verify(path, key=key).ok
    records = [entry.record for entry in read(path, key=key)]
    assert [(r.request_id, r.decision, r.reason_code, r.guard_status) for r in records] == [
        ("a", "steer", "edited", "ran"), ("b", "refuse", "said.no", "ran"), ("c", "allow", "open", "ran"),
    ]  # fmt: skip
    assert records[0].fired["resid_post.1"].tokens > 0
    assert records[0].prompt_hmac == key.of_tokens(IDS[0].tolist())
    assert "Jo" not in path.read_text()


def test_failing_guard_refuses_and_says_so(model, tmp_path, monkeypatch):
    log = AuditLog(tmp_path / "audit.jsonl")
    with attach(model, policy(model), audit=log) as guard:
        monkeypatch.setattr("saeguard.gating.Memory.check", fail)
        with pytest.raises(GateFailed):
            guard.generate(IDS, **WRITE)

    records = [entry.record for entry in read(tmp_path / "audit.jsonl")]
    assert [(r.decision, r.guard_status, r.err) for r in records] == [("error", "partial", "GateFailed")] * 3


def fail(*_: Any, **__: Any) -> None:
    raise GateFailed("a gate", "it fails", "Mend it.")


def test_bypass_has_to_be_chosen_and_is_on_record(model, tmp_path, monkeypatch):
    log, plain = AuditLog(tmp_path / "audit.jsonl"), model.generate(IDS, **WRITE)
    with attach(model, policy(model, on_error="bypass"), audit=log) as guard:
        monkeypatch.setattr("saeguard.gating.Memory.check", fail)
        found = guard.generate(IDS, **WRITE)

    assert torch.equal(found.sequences, plain)
    records = [entry.record for entry in read(tmp_path / "audit.jsonl")]
    assert all(r.bypassed and r.reason_code == "bypass.GateFailed" and r.err == "GateFailed" for r in records)


def test_policy_for_another_model_or_sae_is_not_attached(model):
    made = policy(model)
    with pytest.raises(PolicyMismatch):
        Guardrail.attach(tiny.fresh_model(seed=1), made, tokenizer=TOKENIZER, saes=SAE)
    with pytest.raises(PolicyMismatch):
        Guardrail.attach(model, made, tokenizer=TOKENIZER, saes=tiny.tiny_sae(seed=5))
    assert model.generate(IDS, **WRITE) is not None


def test_reload_puts_the_new_policy_in_force_and_keeps_the_old_one_if_it_does_not_fit(model):
    down = Plan((Rule("tiny", (4, 5), Scale(-3.0)),))
    with steer(model, down, saes=SAE):
        expected = model.generate(IDS, **WRITE)
    made, other = policy(model), policy(tiny.fresh_model(seed=1))
    with attach(model, made) as guard:
        before = guard.generate(IDS, **WRITE).sequences
        with pytest.raises(PolicyMismatch):
            guard.reload(other)
        assert torch.equal(guard.generate(IDS, **WRITE).sequences, before)
        guard.reload(policy(model, down))
        assert torch.equal(guard.generate(IDS, **WRITE).sequences, expected)
        with pytest.raises(GuardError):
            model.generate(IDS, **WRITE)


def test_passes_inside_rows_are_edited_and_policies_that_stop_are_refused_there(model):
    with steer(model, PUSH, saes=SAE):
        expected = model(IDS).logits
    with attach(model, {"push": policy(model), "no": refusing(model)}) as guard:
        with guard.rows("push", n=3):
            found = model(IDS).logits
        with pytest.raises(UnsupportedMode), guard.rows("no", n=3):
            pass

    assert torch.equal(found, expected)


def test_threads_share_a_guarded_model_and_get_their_own_rows(model):
    plans = {"push": policy(model), "down": policy(model, Plan((Rule("tiny", (4, 5), Scale(-3.0)),))), "open": None}
    with attach(model, plans) as guard:
        expected = {name: guard.generate(IDS, rows=name, **WRITE).sequences for name in plans}

        def calls(number: int) -> list[bool]:
            names = [list(plans)[(number + i) % 3] for i in range(6)]
            return [torch.equal(guard.generate(IDS, rows=name, **WRITE).sequences, expected[name]) for name in names]

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(calls, range(8)))

    assert all(all(one) for one in found)


def test_detached_guardrail_refuses_and_leaves_nothing_behind(model):
    guard = attach(model, policy(model))
    guard.detach()
    guard.detach()

    with pytest.raises(UnguardedCall):
        guard.generate(IDS, **WRITE)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "generate" not in model.__dict__


def test_row_without_an_end_token_cannot_be_stopped_and_is_refused(model):
    model.generation_config.eos_token_id = None
    with attach(model, refusing(model)) as guard, pytest.raises(UnsupportedMode, match="end token"):
        guard.generate(IDS, **WRITE)


def test_call_that_hangs_is_refused_at_its_deadline_and_never_goes_out(model, tmp_path, monkeypatch):
    log, hung, ears = AuditLog(tmp_path / "audit.jsonl"), threading.Event(), Ears()
    before = Editor.__call__

    def hang(self: Any, *args: Any, **kwargs: Any) -> Any:
        hung.wait(30)
        return before(self, *args, **kwargs)

    guard = attach(model, policy(model), audit=log, seconds=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(Editor, "__call__", hang)
        with pytest.raises(GuardTimeout):
            guard.generate(IDS[:1], streamer=ears, **WRITE)
        assert ears.ended
        heard = len(ears.ids)
        hung.set()
    guard.detach()  # waits for the call that hung

    assert len(ears.ids) == heard
    assert [entry.record.decision for entry in read(tmp_path / "audit.jsonl")] == ["error"]
