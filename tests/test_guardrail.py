"""A guarded model answers under its policies row by row, or it does not answer; nothing goes around the guardrail."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, TextIteratorStreamer

from saeguard import Add, Plan, Rule, Scale, steer
from saeguard.editor import Editor
from saeguard.errors import (
    AuditFailed,
    BadRecord,
    BadRule,
    GateFailed,
    GuardError,
    GuardTimeout,
    ModelBusy,
    PolicyMismatch,
    RowsMismatch,
    TokensUnknown,
    UnguardedCall,
    UnsupportedMode,
)
from saeguard.gates import Count, Hits, Latched, Watch
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.keys import AuditKey
from saeguard.guarding.policy import Halt, Policy, Refuse
from saeguard.guarding.records import Fired
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


DECODED: dict[str, Callable[[], dict[str, Any]]] = {
    "without a cache": lambda: {"use_cache": False},
    "a static cache": lambda: {"cache_implementation": "static"},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "an assistant that is wrong": lambda: {"assistant_model": tiny.fresh_model(seed=3)},
    "an assistant that is right": lambda: {"assistant_model": tiny.fresh_model()},
    "forced to go on": lambda: {"min_new_tokens": 12, "suppress_tokens": [tiny.EOS], "forced_eos_token_id": 5},
}


@pytest.mark.parametrize("way", DECODED)
def test_row_is_stopped_at_the_same_token_however_it_is_decoded(way, model):
    write = WRITE | {"max_new_tokens": 12}
    with attach(model, policy(model, None, refusals=(Halt(LATE, "tiny", None, "enough"),))) as guard:
        expected = guard.generate(IDS[:1], **write)
        found = guard.generate(IDS[:1], **write | DECODED[way]())

    assert torch.equal(found.sequences, expected.sequences)
    assert (found.decisions[0].decision, found.decisions[0].at) == ("refuse", expected.decisions[0].at)


def test_gate_that_opened_more_chunks_ago_than_can_be_gone_back_stops_the_row(model):
    early = Watch(Hits(tuple(range(48))), Count(), 4.0)
    long = torch.cat([tiny.prompt(1, 8), torch.full((1, 90), tiny.EOS)], 1)  # special tokens count for nothing
    with attach(model, policy(model, None, refusals=(Halt(early, "tiny", None, "enough"),))) as guard:
        found = guard.generate(long, prefill_chunk_size=1, **WRITE)

    assert found.sequences[0, long.shape[1] :].tolist() == [tiny.EOS]


def test_guarded_model_is_no_assistant_of_itself(model):
    with attach(model, refusing(model, LATE)) as guard, pytest.raises(UnsupportedMode, match="inside of guard"):
        guard.generate(IDS[:1], assistant_model=model, **WRITE)


def test_row_is_refused_where_the_beam_that_opened_the_gate_was_given_up(model):
    gate = Watch(Hits((44, 45)), Count(), 0.5)
    with attach(model, refusing(model, gate)) as guard:
        found = guard.generate(tiny.prompt(2, 3, seed=2), num_beams=3, **WRITE | {"max_new_tokens": 12})

    assert found.texts(TOKENIZER)[1] == "w9 w9 w8"
    assert found.decisions[1].decision == "refuse"


@pytest.mark.parametrize("ends", [-1, [tiny.EOS, 999]])
def test_end_token_that_the_model_has_not_is_refused_by_name(ends, model):
    with attach(model, refusing(model)) as guard, pytest.raises(UnsupportedMode, match="end token"):
        guard.generate(IDS[:1], **WRITE | {"eos_token_id": ends})


def test_new_tokens_alone_need_a_mask_that_says_so(model):
    with attach(model, refusing(model, LATE)) as guard:
        cache = DynamicCache(config=model.config)
        guard.generate(IDS[:1, :5], past_key_values=cache, **WRITE | {"max_new_tokens": 1})
        with pytest.raises(TokensUnknown):
            guard.generate(IDS[:1, 5:], past_key_values=cache, **WRITE)
        found = guard.generate(
            IDS[:1, 5:], past_key_values=cache, attention_mask=torch.ones(1, 8), **WRITE | {"max_new_tokens": 12}
        )

    assert found.texts(TOKENIZER) == ["w9 w9 w8"]


def test_prompt_that_ends_in_padding_is_refused(model):
    masked, padded = torch.ones_like(IDS), IDS.clone()
    masked[1, -1], padded[1, -1] = 0, tiny.PAD
    with attach(model, {"push": policy(model), "open": None}) as guard:
        for ids, mask in ((IDS, {"attention_mask": masked}), (padded, {})):
            with pytest.raises(UnsupportedMode, match="ends in padding"):
                guard.generate(ids, rows="push", **mask, **WRITE)
            assert guard.generate(ids, rows=["push", "open", "push"], **mask, **WRITE) is not None


def test_tasks_of_one_thread_do_not_see_each_others_rows(model):
    down, plain = Plan((Rule("tiny", (4, 5), Scale(-3.0)),)), model(IDS).logits
    with steer(model, down, saes=SAE):
        steered = model(IDS).logits

    async def passes(guard: Guardrail, name: str) -> Tensor:
        with guard.rows(name, n=3):
            await asyncio.sleep(0)
            found = model(IDS).logits
            await asyncio.sleep(0)
        return found

    async def both(guard: Guardrail) -> list[Tensor]:
        return list(await asyncio.gather(passes(guard, "down"), passes(guard, "open")))

    with attach(model, {"down": policy(model, down), "open": None}) as guard:
        found = asyncio.run(both(guard))
        with pytest.raises(UnguardedCall):
            model(IDS)

    assert torch.equal(found[0], steered)
    assert torch.equal(found[1], plain)


def test_task_that_outlives_its_rows_is_refused(model):
    async def late() -> None:
        await asyncio.sleep(0.01)
        model(IDS)

    async def outer(guard: Guardrail) -> None:
        with guard.rows(n=3):
            task = asyncio.create_task(late())
        await task

    with attach(model, policy(model)) as guard, pytest.raises(UnguardedCall):
        asyncio.run(outer(guard))


def test_gate_that_opened_in_an_earlier_block_counts_where_its_cache_goes_on(model):
    with attach(model, refusing(model, LATE)) as guard:
        cache, long = DynamicCache(config=model.config), tiny.prompt(1, 30)
        with guard.rows(n=1, measuring=True):
            model(long[:, :29], past_key_values=cache)
        with guard.rows(n=1, measuring=True) as table:
            model(long[:, 29:], past_key_values=cache)
        found = guard.opened(table)

    assert found[0].stop


def test_pass_that_an_interrupt_ended_leaves_no_way_in(model):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with attach(model, {"push": policy(model), "open": None}) as guard:
        hook = model.model.layers[0].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), guard.rows("open", n=3):
            model(IDS)
        hook.remove()
        for way in (model.forward, model.model.forward, model):
            with pytest.raises(GuardError):
                way(IDS)


def test_second_guardrail_is_refused_and_changing_one_from_inside_too(model):
    made = policy(model, on_error="bypass")
    with attach(model, made) as guard:
        with pytest.raises(ModelBusy):
            attach(model, refusing(model))
        for change in (guard.detach, lambda: guard.reload(made)):
            with guard.rows(n=3), pytest.raises(ModelBusy):
                change()


def test_request_that_ends_in_an_error_has_that_on_record_and_nothing_else(model, tmp_path, monkeypatch):
    log = AuditLog(tmp_path / "audit.jsonl")

    class Fails(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.calls += 1
            raise GateFailed("a gate", "it fails", "Mend it.") if self.calls == 1 else RuntimeError

    with attach(model, policy(model, on_error="bypass"), audit=log) as guard:
        with pytest.raises(RuntimeError):
            guard.generate(IDS[:1], logits_processor=[Fails()], **WRITE)
        with pytest.raises(BadRule):
            guard.generate(IDS, request_ids=["a", "b", "no code"], **WRITE)
        monkeypatch.setattr("saeguard.guarding.deciding.fired_at", lambda *_: ({"resid_post.1": Fired(1, 2, 3)}, None))
        with pytest.raises(BadRecord):
            guard.generate(IDS, **WRITE)

    records = [entry.record for entry in read(tmp_path / "audit.jsonl")]
    assert [(one.decision, one.err) for one in records] == [("error", "RuntimeError"), *[("error", "BadRecord")] * 3]


def test_every_request_that_runs_out_of_time_is_on_record_once(model, tmp_path, monkeypatch):
    log, before = AuditLog(tmp_path / "audit.jsonl"), Guardrail._in_force
    guard = attach(model, policy(model), audit=log, seconds=0.05)

    def slow(self: Any) -> Any:
        threading.Event().wait(0.2)
        return before(self)

    with monkeypatch.context() as patch:
        patch.setattr(Guardrail, "_in_force", slow)
        with pytest.raises(GuardTimeout):
            guard.generate(IDS[:1], request_ids=["late"], **WRITE)
    threading.Event().wait(0.5)  # the thread goes on until it finds that nobody waits for it
    guard.detach()

    records = [entry.record for entry in read(tmp_path / "audit.jsonl")]
    assert [(one.request_id, one.err) for one in records] == [("late", "GuardTimeout")]
