"""`with guard(model, rows=[...])`: the model in others' hands, each row under its own policy, and nothing else goes."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, pipeline

from saeguard import Plan, Rule, Scale
from saeguard.errors import (
    BadRule,
    GuardError,
    ModelBusy,
    PhaseUnknown,
    RowsMismatch,
    UnguardedCall,
    UnsupportedMode,
)
from saeguard.guarding.audit import AuditLog
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.verify import read
from tests import tiny
from tests.test_guardrail import IDS, WRITE, attach, policy, refusing
from tests.test_idioms import GREEDY, PHASED, TEXTS, said, tokenizer

DOWN = Plan((Rule("tiny", (4, 5), Scale(-3.0)),))
ROWS = ["push", "open", "down"]


@pytest.fixture
def model():
    return tiny.fresh_model()


@pytest.fixture
def policies(model) -> dict[str, Any]:
    return {"push": policy(model), "down": policy(model, DOWN), "open": None, "no": refusing(model)}


@pytest.fixture
def guard(model, policies):
    with attach(model, policies) as guard:
        yield guard


def hooks(model: Any) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


@pytest.mark.parametrize("rows", [ROWS, ["no", "open", "push"], ["open"] * 3, tuple(ROWS), "push"], ids=str)
def test_generate_inside_is_generate_of_the_guardrail(rows, model, guard):
    expected = guard.generate(IDS, rows=rows, **WRITE)
    with guard(model, rows=rows):
        found = model.generate(IDS, **WRITE)

    assert torch.equal(found, expected.sequences)


@pytest.mark.parametrize("rows", [ROWS, ["down", "push", "push"], "down"], ids=str)
def test_passes_inside_are_those_of_a_rows_block(rows, model, guard):
    with guard.rows(rows, n=3):
        expected = [model(ids).logits for ids in (IDS, IDS.flip(0))]
    with guard(model, rows=rows):
        found = [model(ids).logits for ids in (IDS, IDS.flip(0))]

    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_row_that_is_let_through_has_the_plain_models_bits(model, policies):
    plain = model.generate(IDS, **WRITE), model(IDS).logits
    with attach(model, policies) as guard, guard(model, rows=["push", "open", "no"]):
        words = model.generate(IDS, **WRITE)
        with guard(model, rows=ROWS):
            logits = model(IDS).logits

    width = plain[0].shape[1]
    assert torch.equal(words[1, :width], plain[0][1])
    assert torch.equal(logits[1], plain[1][1])


def test_pipeline_inside_answers_each_text_under_its_own_policy_and_goes_on_record(model, policies, tmp_path):
    pipe: Any = pipeline("text-generation", model=model, tokenizer=tokenizer())
    with attach(model, policies, audit=AuditLog(tmp_path / "log.jsonl")) as guard:
        alone = {}
        for name in ("push", "no", "open"):
            with guard.calls(name):
                alone[name] = said(pipe(TEXTS, batch_size=1, **GREEDY))
        with guard(model, rows=["push", "no", "open"], tenant="school"):
            found = said(pipe(TEXTS, batch_size=3, **GREEDY))
            with pytest.raises(UnguardedCall, match="call of 2 rows"):
                pipe(TEXTS, batch_size=2, **GREEDY)

    records = [entry.record for entry in read(tmp_path / "log.jsonl")]
    assert found == [alone[name][row] for row, name in enumerate(alone)]
    assert [one.decision for one in records[-3:]] == ["steer", "refuse", "allow"]


@pytest.mark.parametrize("copies", [{"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}])
def test_sequences_of_a_request_are_under_its_policy(copies, model, guard):
    expected = guard.generate(IDS, rows=ROWS, **WRITE | copies).sequences
    with guard(model, rows=ROWS):
        found = model.generate(IDS, **WRITE | copies)

    assert torch.equal(found, expected)


def test_another_number_of_rows_is_refused_by_name(model, guard):
    with guard(model, rows=ROWS):
        for ids in (IDS[:1], IDS[:2], torch.cat([IDS, IDS])):
            with pytest.raises(RowsMismatch, match=f"policies for 3 rows: the batch has {len(ids)} rows"):
                model(ids)
            with pytest.raises(UnguardedCall, match=f"a call of {len(ids)} rows.*3 policies were named"):
                model.generate(ids, **WRITE)


def test_one_name_for_all_rows_takes_batches_of_any_size_and_one_in_a_list_takes_one_row(model, guard):
    with guard(model, rows="push"):
        any_size = [model(IDS[:n]).logits for n in (3, 1, 2)]
    with guard(model, rows=["push"]):
        alone = model(IDS[:1]).logits
        with pytest.raises(RowsMismatch):
            model(IDS)

    assert [one.shape[0] for one in any_size] == [3, 1, 2]
    assert torch.equal(alone, any_size[1])


@pytest.mark.parametrize("rows", [None, "nobody", ["push", "nobody", "open"], []], ids=str)
def test_names_have_to_be_known_before_the_model_is_called(rows, model, guard):
    with pytest.raises(UnguardedCall), guard(model, rows=rows):
        pytest.fail("the block was entered")


def test_only_policy_there_is_needs_no_name(model):
    with attach(model, policy(model)) as guard:
        expected = guard.generate(IDS, **WRITE).sequences
        with guard(model):
            found = model.generate(IDS, **WRITE)

    assert torch.equal(found, expected)


def test_another_model_is_refused_and_stays_plain(model, guard):
    other = tiny.fresh_model()
    for given in (other, model.model):
        with pytest.raises(UnguardedCall, match="attached to another model"), guard(given, rows=ROWS):
            pytest.fail("the block was entered")

    assert hooks(other) == 0


def test_detached_guardrail_gives_no_block_and_none_can_be_detached_inside(model, policies):
    guard = attach(model, policies)
    with guard(model, rows=ROWS), pytest.raises(ModelBusy):
        guard.detach()
    guard.detach()
    with pytest.raises(UnguardedCall, match="it was detached"), guard(model, rows=ROWS):
        pytest.fail("the block was entered")

    assert hooks(model) == 0
    assert "generate" not in vars(model)


def test_thread_from_outside_is_refused_and_one_that_is_bound_is_inside(model, guard):
    def in_thread(function: Callable[[], Any]) -> Any:
        found: list[Any] = []

        def run() -> None:
            try:
                found.append(function())
            except GuardError as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found[0]

    with guard(model, rows=ROWS):
        expected = model(IDS).logits
        for call in (lambda: model(IDS), lambda: model.generate(IDS, **WRITE)):
            assert isinstance(in_thread(call), UnguardedCall | ModelBusy)
        found = in_thread(guard.bind(lambda: model(IDS).logits))

    assert torch.equal(found, expected)


def test_inner_block_counts_and_then_the_outer_one_again(model, guard):
    with guard(model, rows=ROWS):
        first, words = model(IDS).logits, model.generate(IDS, **WRITE)
        with guard(model, rows=["open", "down"]):
            inner = model(IDS[:2]).logits
            with pytest.raises(RowsMismatch):
                model(IDS)
            with guard.calls("open"):
                plain = model(IDS).logits
        assert torch.equal(model(IDS).logits, first)
        assert torch.equal(model.generate(IDS, **WRITE), words)

    assert torch.equal(inner[0], plain[0])
    assert not torch.equal(inner[1], plain[1])


def test_blocks_of_two_guarded_models_do_not_see_each_other(model, guard):
    other = tiny.fresh_model(seed=1)
    made = policy(other, DOWN)
    with attach(other, {"only": made}) as second, guard(model, rows=ROWS), second(other, rows=["only"] * 2):
        assert model(IDS).logits.shape[0] == 3
        assert other(IDS[:2]).logits.shape[0] == 2
        for call in (lambda: model(IDS[:2]), lambda: other(IDS)):
            with pytest.raises(RowsMismatch):
                call()


def test_exception_leaves_nothing_behind(model, guard):
    class Fails(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            raise ZeroDivisionError

    before, expected = hooks(model), guard.generate(IDS, rows=ROWS, **WRITE).sequences
    for inside in (lambda: model.generate(IDS, logits_processor=[Fails()], **WRITE), lambda: 1 // 0):
        with pytest.raises(ZeroDivisionError), guard(model, rows=ROWS):
            inside()
        for call in (lambda: model(IDS), lambda: model.generate(IDS, **WRITE)):
            with pytest.raises(UnguardedCall):
                call()

    assert hooks(model) == before
    assert torch.equal(guard.generate(IDS, rows=ROWS, **WRITE).sequences, expected)
    guard.reload(policy(model))  # nothing counts as running


def test_passes_of_a_row_whose_policy_stops_are_refused_unless_they_only_measure(model, guard):
    rows = ["push", "no", "open"]
    with guard(model, rows=rows), pytest.raises(UnsupportedMode, match="policy that stops rows"):
        model(IDS)
    with guard.rows(rows, n=3, measuring=True):
        expected = model(IDS).logits
    with guard(model, rows=rows, measuring=True):
        found = model(IDS).logits

    assert torch.equal(found, expected)


# Prompt tokens


def test_prompt_tokens_are_of_all_rows_or_of_each(model):
    with attach(model, {"phased": policy(model, PHASED), "open": None}) as guard:
        rows = ["phased", "open", "phased"]
        with guard.rows(rows, n=3, prompt_tokens=(5, 5, 5)):
            expected = model(IDS).logits
        for counts in (5, (5, 5, 5), [5, 5, 5]):
            with guard(model, rows=rows, prompt_tokens=counts):
                assert torch.equal(model(IDS).logits, expected)
            with guard.rows(rows, n=3, prompt_tokens=counts):
                assert torch.equal(model(IDS).logits, expected)
        with guard(model, rows=rows), pytest.raises(PhaseUnknown):
            model(IDS)


WAYS: dict[str, Callable[[Guardrail, Any], Any]] = {
    "rows": lambda guard, given: guard.rows("push", n=3, prompt_tokens=given),
    "calls": lambda guard, given: guard.calls("push", prompt_tokens=given),
    "a block": lambda guard, given: guard(guard.model, rows=ROWS, prompt_tokens=given),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "given", [-1, 2.0, True, "3", b"3", [3, -1, 3], [3, None, 3], (True, 3, 3), 2**63, {3}, torch.tensor(3)], ids=str
)
def test_prompt_tokens_that_are_no_counts_are_refused(way, given, guard):
    with pytest.raises(BadRule, match="not a count of tokens"), WAYS[way](guard, given):
        pytest.fail("the block was entered")


@pytest.mark.parametrize("way", ["rows", "a block"])
def test_prompt_tokens_for_another_number_of_rows_are_refused(way, guard):
    for given in ([3, 3], (3,) * 4, []):
        with pytest.raises(BadRule, match="there are 3 policies, one per row"), WAYS[way](guard, given):
            pytest.fail("the block was entered")


def test_prompt_tokens_of_calls_are_compared_with_the_rows_of_each_pass(model):
    with attach(model, policy(model, PHASED)) as guard, guard.calls(prompt_tokens=[5, 5]):
        assert model(IDS[:2]).logits.shape[0] == 2
        with pytest.raises(RowsMismatch, match="prompt_tokens for 2 rows"):
            model(IDS)


def test_rows_block_inside_of_a_loan_counts(model, guard):
    expected = guard.generate(IDS, rows="push", **WRITE).sequences
    with guard(model, rows="open"), guard.rows("push", n=3):
        found = model.generate(IDS, **WRITE)
    with guard(model, rows="open"), guard.rows("open", n=3), guard(model, rows="push"):
        innermost = model.generate(IDS, **WRITE)

    assert torch.equal(found, expected)
    assert torch.equal(innermost, expected)


def test_passes_of_others_leave_nothing_that_grows(model, guard):
    with guard(model, rows="push"):
        for _ in range(3):
            model(IDS)
        table = guard._known().attached.table
        assert table is not None
        assert table.calls == []


@pytest.mark.usefixtures("without_type_checks")
def test_names_come_from_anything_that_can_be_gone_through(model, guard):
    expected = guard.generate(IDS, rows=ROWS, **WRITE).sequences
    with guard(model, rows=iter(ROWS)):  # type: ignore[arg-type]
        found = model.generate(IDS, **WRITE)

    assert torch.equal(found, expected)
    with pytest.raises(UnguardedCall, match="no policy '3'"), guard(model, rows=3):  # type: ignore[arg-type]
        pass


def test_generate_in_a_measuring_block_of_rows_writes_no_token_that_nothing_would_stop(model, guard):
    seen = []

    class Listening(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores)
            return scores

    with guard.rows("no", n=3, measuring=True), pytest.raises(UnguardedCall, match="nothing there would stop"):
        model.generate(IDS, logits_processor=[Listening()], **WRITE)

    assert not seen
