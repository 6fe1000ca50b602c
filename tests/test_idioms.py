"""What other libraries do with a transformers model, they do with a steered and with a guarded one.

Pipelines and streamers know only the model. What they make of it is compared with the same made by hand.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer, pipeline

from saeguard import steer
from saeguard.errors import GuardNotApplied, ModelBusy, PhaseUnknown, RowsMismatch, UnguardedCall, UnsupportedMode
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.verify import read
from tests import tiny
from tests.idioms import GREEDY, PHASED, PUSH, SAE, TEXTS, attach, by_hand, policy, refusing, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = tiny.prompt(3, 8)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.fresh_model()


def said(answers: Any) -> list[str]:
    """What a pipeline shows behind each text."""
    return [one[0]["generated_text"].removeprefix(text).strip() for one, text in zip(answers, TEXTS, strict=True)]


@pytest.mark.parametrize("plan", [PUSH, PHASED], ids=["gated", "phased"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_pipeline_writes_what_generate_writes_for_each_text_alone(model, batch_size, plan):
    pipe: Any = pipeline("text-generation", model=model, tokenizer=tokenizer())

    with steer(model, plan, saes=SAE, tokenizer=tokenizer()):
        found = said(pipe(TEXTS, batch_size=batch_size, **GREEDY))

    assert found == by_hand(model, TEXTS, plan)
    assert found != said(pipe(TEXTS, batch_size=batch_size, **GREEDY))


def test_pipeline_has_a_plan_for_every_row_when_it_makes_one_batch_of_them(model):
    pipe: Any = pipeline("text-generation", model=model, tokenizer=tokenizer())
    plans = [PUSH, None, PHASED]

    with steer(model, plans, saes=SAE, tokenizer=tokenizer()):
        found = said(pipe(TEXTS, batch_size=3, **GREEDY))
        for batch_size, rows in ((None, 1), (2, 2)):
            with pytest.raises(RowsMismatch, match=f"3 plans, one per row: the batch has {rows} rows.*batch_size"):
                pipe(TEXTS, batch_size=batch_size, **GREEDY)

    assert found == by_hand(model, TEXTS, plans)


def test_pipeline_of_a_guarded_model_edits_stops_and_goes_on_record(model, tmp_path):
    pipe: Any = pipeline("text-generation", model=model, tokenizer=tokenizer())
    policies = {"push": policy(model), "no": refusing(model), "open": None}

    with attach(model, policies, audit=AuditLog(tmp_path / "log.jsonl"), seconds=60.0) as guard:
        with pytest.raises(UnguardedCall, match=r"guard\.calls"):
            pipe(TEXTS, **GREEDY)
        found = {}
        for name in policies:
            with guard.calls(name):
                found[name] = said(pipe(TEXTS, batch_size=2, **GREEDY))

    assert found["push"] == by_hand(model, TEXTS, PUSH)
    assert found["open"] == by_hand(model, TEXTS)
    assert found["no"] == ["w9 w9 w8"] * 3
    decisions = [entry.record.decision for entry in read(tmp_path / "log.jsonl")]
    assert decisions == ["steer"] * 3 + ["refuse"] * 3 + ["allow"] * 3
    assert said(pipe(TEXTS, batch_size=2, **GREEDY)) == found["open"]


def streamed(call: Any, **options: Any) -> str:
    """What a consumer hears of a call that runs in another thread; what that raised, it raises."""
    streamer, failed = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=20), []

    def run() -> None:
        try:
            call(**tokenizer()(TEXTS[0], return_tensors="pt"), streamer=streamer, **GREEDY, **options)
        except Exception as error:
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=run)
    thread.start()
    text = "".join(streamer)
    thread.join()
    if failed:
        raise failed[0]
    return text.strip()


def test_streamer_hears_the_steered_text_from_a_bound_thread_and_nothing_from_another(model):
    with steer(model, PUSH, saes=SAE, tokenizer=tokenizer()) as run:
        found = streamed(run.bind(model.generate))
        with pytest.raises(ModelBusy, match=r"run\.bind\(model\.generate\)"):
            streamed(model.generate)

    assert found == by_hand(model, TEXTS[:1], PUSH)[0]


def test_streamer_hears_the_guarded_text_whoever_starts_the_thread(model):
    with attach(model, {"push": policy(model), "no": refusing(model)}) as guard:
        found = streamed(guard.generate, rows="push")
        with guard.calls("push"):
            lent = streamed(guard.bind(model.generate))
            with pytest.raises(ModelBusy):
                streamed(model.generate)
        with guard.calls("no"):
            refused = streamed(guard.bind(model.generate))

    assert found == by_hand(model, TEXTS[:1], PUSH)[0]
    assert lent == found
    assert refused == "</s> w9 w9 w8 </s>"  # the row ends, and then the refusal goes out


def test_calls_take_batches_of_any_size_and_end_with_their_block(model):
    with steer(model, PUSH, saes=SAE, tokenizer=tokenizer()):
        right = [model(IDS[:n]).logits for n in (3, 1, 2)]
    with attach(model, {"push": policy(model), "open": None}) as guard:
        with guard.calls("push"):
            found = [model(IDS[:n]).logits for n in (3, 1, 2)]
            kept = guard.bind(model.generate)
        for call in (lambda: model(IDS), lambda: model.generate(IDS, **GREEDY), lambda: kept(IDS, **GREEDY)):
            with pytest.raises(UnguardedCall):
                call()
        for name in (None, "nobody"):
            with pytest.raises(UnguardedCall), guard.calls(name):
                pass

    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))
    assert "generate" not in vars(model)


def test_calls_of_a_part_of_the_model_and_of_more_than_sequences_are_refused(model):
    with attach(model, policy(model)) as guard, guard.calls():
        with pytest.raises(UnsupportedMode, match="return_dict_in_generate"):
            model.generate(IDS, return_dict_in_generate=True, **GREEDY)
        with pytest.raises(UnsupportedMode, match="went around saeguard"):
            type(model).generate(model, IDS, **GREEDY)
        with pytest.raises(GuardNotApplied):
            model.model(IDS)


def test_threads_lend_the_model_out_under_their_own_policies_at_once(model):
    plans = {"push": policy(model), "no": refusing(model), "open": None}
    with attach(model, plans) as guard:
        expected = {name: guard.generate(IDS, rows=name, **GREEDY).sequences for name in plans}

        def calls(number: int) -> list[bool]:
            found = []
            for i in range(4):
                name = list(plans)[(number + i) % 3]
                with guard.calls(name):
                    found.append(torch.equal(model.generate(IDS, **GREEDY), expected[name]))
            return found

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(calls, range(4)))

    assert all(all(one) for one in found)


def test_calls_inside_calls_are_under_the_inner_policy_and_then_under_the_outer_one_again(model):
    with attach(model, {"push": policy(model), "open": None}) as guard, guard.calls("push"):
        first = model(IDS).logits
        with guard.calls("open"):
            second, words = model(IDS).logits, model.generate(IDS, **GREEDY)
        third = model(IDS).logits

    assert torch.equal(first, third)
    assert torch.equal(second, model(IDS).logits)
    assert torch.equal(words, model.generate(IDS, **GREEDY))


def test_prompt_tokens_of_calls_tell_prompts_from_answers_in_passes(model):
    with steer(model, PHASED, saes=SAE, tokenizer=tokenizer(), prompt_tokens=5):
        right = model(IDS).logits
    with attach(model, policy(model, PHASED)) as guard:
        with guard.calls(prompt_tokens=5):
            found = model(IDS).logits
        with guard.calls(), pytest.raises(PhaseUnknown):
            model(IDS)

    assert torch.equal(found, right)
