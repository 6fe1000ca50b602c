"""Questions under a guardrail: numbers that rows of their own would show, and nothing moved where nothing triggered."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from saeguard.evaluating import likelihoods as liking
from saeguard.evaluating.answers_by_writing import FORMS
from saeguard.evaluating.likelihoods import Branches, likelihoods
from saeguard.evaluating.multiple_choice import Answers, Question, answers_of
from saeguard.evaluating.subject import Plain, Subject, Verdict
from saeguard.evaluating.unlearning import ask, figures, share
from saeguard.gates import Count, Hits, Latched, Or, Rate, Watch, Window
from tests import planted, tiny

GATES = {
    "none": None,
    "latched": planted.GATE,
    "not latched": Watch(planted.HITS, Window(2), 0.0),
    "prompt": Watch(planted.HITS, Rate("prompt"), 0.05),
    "two words": Or((Watch(planted.HITS, Count(), 1.0), Latched(Watch(Hits((0,)), Window(3), 0.0)))),
}
BRANCHES = (
    Branches((1, 7, 50, 9), ((4, 5), (6, 50, 8, 9), (11,))),
    Branches((1, 12, 13, 14, 15, 16, 17), ((4, 50), (50, 5), (19, 20, 21))),
    Branches((1, 30), ((31, 32), (33, 34, 35))),
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.fresh_model()


@pytest.fixture(scope="module")
def sae(model: Any) -> Any:
    return planted.planted_sae(model)


def questions(n: int = 8) -> list[Question]:
    return [Question(one["question"], tuple(one["choices"]), one["gold"], one["topic"]) for one in planted.rows_of(n)]


def slowly(subject: Subject, front: tuple[int, ...], back: tuple[int, ...]) -> tuple[float, Verdict]:
    """The whole row in one pass of its own, without a cache."""
    ids = torch.tensor([front + back])
    with torch.no_grad(), subject.passes([len(front)]) as verdicts:
        log_p = subject.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0]
        verdict = verdicts()[0]
    return sum(float(log_p[len(front) + i - 1, token]) for i, token in enumerate(back)), verdict


@pytest.mark.parametrize("batch_rows", [1, 5, 64])
@pytest.mark.parametrize("gate", GATES)
def test_branches_of_one_cache_are_what_rows_of_their_own_show(gate, batch_rows, model, sae):
    policy = planted.editing(model, sae, GATES[gate])
    with planted.under(model, sae, policy) as (_, subject):
        found = likelihoods(subject, BRANCHES, batch_rows=batch_rows)
        for one, branches in zip(found, BRANCHES, strict=True):
            for nats, verdict, back in zip(one.nats, one.said, branches.backs, strict=True):
                expected, told = slowly(subject, branches.front, back)

                assert nats == pytest.approx(expected, abs=1e-3)
                assert verdict == told


def test_gate_knows_at_which_point_it_opened(model, sae):
    with planted.under(model, sae, planted.editing(model, sae)) as (_, subject):
        found = likelihoods(subject, BRANCHES)

    assert [one.asked.opened for one in found] == [True, False, False]
    assert [[verdict.opened for verdict in one.said] for one in found] == [
        [True, True, True], [True, True, False], [False, False],
    ]  # fmt: skip


def test_padding_seen_as_tokens_would_be_noticed(model, sae, monkeypatch):
    """Beginnings padded on the right leave a hole before the choice, and the first choice token behind padding."""
    with planted.under(model, sae, planted.editing(model, sae)) as (_, subject):
        expected = [one.nats for one in likelihoods(subject, BRANCHES)]
        own = liking.padded
        monkeypatch.setattr(liking, "padded", lambda rows, side, device: own(rows, "right", device))
        found = [one.nats for one in likelihoods(subject, BRANCHES)]

    assert found[0] != pytest.approx(expected[0], abs=1e-3)


def test_stopped_choice_is_refused_and_counts_as_wrong(model, sae):
    with planted.under(model, sae, planted.refusing(model, sae)) as (_, subject):
        answers = answers_of(subject, questions())
    plain = answers_of(Plain(model, planted.TOKENIZER), questions())

    left = [one.topic == "left" for one in answers.questions]
    assert [r for r, is_left in zip(answers.refused(), left, strict=True) if is_left] == [True] * 4
    assert not any(right and no for right, no in zip(answers.right(), answers.refused(), strict=True))
    assert answers.sum == plain.sum  # a stop changes nothing in passes
    assert answers.said[1][2] == Verdict(opened=True, stopped=True)


def test_refusal_of_another_choice_leaves_the_answer():
    asked = (Question("q", ("a", "b"), 0),)
    numbers = ((2.0, 1.0),)
    free, stopped = Verdict(), Verdict(True, True)
    of = lambda said: Answers(asked, numbers, numbers, numbers, (free,), (said,))

    assert of((free, stopped)).right() == [True]
    assert of((stopped, free)).right() == [False]
    assert of((stopped, free)).refused() == [True]


def test_edits_alone_are_measured_as_if_nothing_were_refused(model, sae):
    refusing, plain = (
        both_sides(model, sae, planted.refusing(model, sae)),
        answers_of(Plain(model, planted.TOKENIZER), questions()),
    )
    editing = both_sides(model, sae, planted.editing(model, sae))

    for one in refusing:  # this policy edits nothing
        for reading, part in one["likelihood"].items():
            assert part["edits_alone"]["count"] == plain.accuracy(reading, topic=one["topic"]).right
    assert all(part["edits_alone"] == part["guarded"] for one in editing for part in one["likelihood"].values())


def both_sides(model: Any, sae: Any, policy: Any, **options: Any) -> list[dict[str, Any]]:
    asked = questions()
    plain = ask(Plain(model, planted.TOKENIZER), asked, new_tokens=5, **options)
    with planted.under(model, sae, policy) as (_, subject):
        return figures(plain, ask(subject, asked, new_tokens=5, **options))


@pytest.mark.parametrize("make", [planted.editing, planted.refusing])
def test_exactly_the_planted_questions_trigger_and_the_rest_is_identical(make, model, sae):
    left, right = both_sides(model, sae, make(model, sae))

    assert (left["topic"], right["topic"]) == ("left", "right")
    assert left["triggered"]["question"]["count"] == 4
    assert right["triggered"]["question"]["count"] == 0
    assert right["triggered"]["answers"]["count"] == 1
    assert left["identical"]["sums"] == left["identical"]["logits"] == [0, 0]
    assert right["identical"]["sums"] == [3, 3]
    assert right["identical"]["logits"] == [4, 4]
    for form in FORMS:  # in some the model itself writes the word, or a choice has it
        same, of = right["identical"][f"written, {form}"]
        assert same == of == 4 - right["written"][form]["triggered"]["count"] > 0


def test_counts_agree_with_each_other(model, sae):
    for part in both_sides(model, sae, planted.refusing(model, sae)):
        told = [*part["likelihood"].values(), *part["written"].values()]

        assert all(one["plain"]["count"] - one["lost"] + one["gained"] == one["guarded"]["count"] for one in told)
        assert all(one["plain"]["n"] == one["guarded"]["n"] == part["n"] == 4 for one in told)
        assert set(part["written"]) == set(FORMS)
        assert all(one["refused"] == one["triggered"]["count"] for one in part["written"].values())


@dataclass
class Silent:
    """A guard that edits and says that it did not: what a hook that lost its record would be."""

    inner: Any

    @property
    def model(self) -> Any:
        return self.inner.model

    @property
    def tokenizer(self) -> Any:
        return self.inner.tokenizer

    @contextmanager
    def passes(self, prompt_tokens):
        with self.inner.passes(prompt_tokens) as verdicts:
            yield lambda: [Verdict()] * len(verdicts())

    def write(self, ids, mask, **options):
        sequences, verdicts = self.inner.write(ids, mask, **options)
        return sequences, [Verdict()] * len(verdicts)


def test_edit_of_a_row_that_was_called_untouched_is_noticed(model, sae):
    asked = questions()
    plain = ask(Plain(model, planted.TOKENIZER), asked, new_tokens=5)
    with planted.under(model, sae, planted.editing(model, sae)) as (_, subject):
        left, right = figures(plain, ask(Silent(subject), asked, new_tokens=5))

    assert left["identical"]["sums"] == [0, 4]
    assert left["identical"]["logits"] == [0, 4]
    assert right["identical"]["logits"] == [4, 4]


def test_share_of_nothing_is_no_number():
    assert share(0, 0) == {"count": 0, "n": 0, "share": None, "low": None, "high": None}
    assert share(1, 4)["share"] == 0.25
