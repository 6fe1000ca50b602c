"""Multiple choice by log-likelihood: exact sums, whatever the batch, of the model with the plan around the call."""

import json

import pytest
import torch

from saeguard import Add, Plan, Rule, steer
from saeguard.errors import BrokenFile, UnstableEdit, UnsupportedFormat
from saeguard.evaluating.multiple_choice import Accuracy, Answers, Question, answer, read_questions
from tests.tiny import ARCHITECTURES, fresh_model, tiny_model, tiny_sae
from tests.words import word_tokenizer

ASKED = (
    Question("w7 w8", ("w9", "w10 w11 w12"), 0, "left"),
    Question("w20 w21 w22 w23 w24", ("w30", "w31 w32", "w33 w34 w35 w36"), 1, "right"),
)


def slowly(model, tokenizer, front: str, choice: str) -> float:
    """Each token of the choice from a pass of its own."""
    ids = [tokenizer.bos_token_id, *tokenizer(front, add_special_tokens=False)["input_ids"]]
    total = 0.0
    for token in tokenizer(choice, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            total += float(model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
        ids.append(token)
    return total


@pytest.mark.parametrize("batch_rows", [1, 3, 64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_are_those_of_one_token_after_the_other_whatever_the_batch(architecture, batch_rows):
    model, tokenizer = tiny_model(architecture), word_tokenizer()

    answers = answer(model, tokenizer, ASKED, batch_rows=batch_rows)

    for number, one in enumerate(ASKED):
        for place, choice in enumerate(one.choices):
            full = slowly(model, tokenizer, f"Question: {one.question}\nAnswer:", choice)
            bare = slowly(model, tokenizer, "Answer:", choice)
            assert answers.sum[number][place] == pytest.approx(full, abs=1e-3)
            assert answers.bytes[number][place] == pytest.approx(full / len(choice), abs=1e-3)
            assert answers.pmi[number][place] == pytest.approx(full - bare, abs=1e-3)


def test_the_plan_around_the_call_is_what_is_measured():
    model, tokenizer, sae = tiny_model(), word_tokenizer(), tiny_sae()
    plain = answer(model, tokenizer, ASKED)

    with steer(model, Plan((Rule("tiny", (1, 2), Add(8.0)),)), saes=sae, tokenizer=tokenizer):
        steered = answer(model, tokenizer, ASKED)
    after = answer(model, tokenizer, ASKED)

    assert steered.sum != plain.sum
    assert after == plain


def test_a_tie_is_wrong_and_chance_is_the_mean_of_one_over_the_choices():
    answers = Answers(
        ASKED, ((1.0, 1.0), (0.0, 2.0, 1.0)), ((0.0, 1.0), (0.0, 0.0, 1.0)), ((1.0, 0.0), (0.0, 0.0, 1.0))
    )

    assert answers.right() == [False, True]
    assert answers.accuracy() == Accuracy(1, 2, (1 / 2 + 1 / 3) / 2)
    assert answers.accuracy("pmi", topic="left").share == 1.0


def test_the_interval_is_wilsons():
    low, high = Accuracy(8, 10, 0.25).interval

    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_questions_are_read_and_drawn_evenly_by_topic(tmp_path):
    rows = [
        {"question": f"q{i}", "choices": ["a", "b"], "gold": i % 2, "topic": "left" if i < 8 else "right"}
        for i in range(10)
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    drawn = read_questions(path, most=3)

    assert [one.topic for one in drawn] == ["left"] * 3 + ["right"] * 2
    assert drawn == read_questions(path, most=3)
    assert [one.topic for one in read_questions(path, topics=["right"])] == ["right"] * 2


@pytest.mark.parametrize(
    "row",
    ["{", "[]", '{"question": "q", "choices": ["a"], "gold": 0}', '{"question": "q", "choices": ["a", "b"], "gold": 2}',
     '{"question": "q", "choices": ["a", " "], "gold": 0}', '{"choices": ["a", "b"], "gold": 0}',
     '{"question": "q", "choices": ["a", "b"], "gold": "0"}', '{"question": "q", "choices": ["a", "b"], "gold": 1.0}',
     '{"question": "q", "choices": ["a", "b"], "gold": true}', '{"question": "q", "choices": "abc", "gold": 0}',
     '{"question": "q", "choices": ["a", null], "gold": 0}', '{"question": null, "choices": ["a", "b"], "gold": 0}',
     '{"question": "q", "choices": ["a", "b"], "gold": 0, "topic": 3}',
     '{"question": "\\ud800", "choices": ["a", "b"], "gold": 0}'],
)  # fmt: skip
def test_a_row_that_is_no_question_is_refused_by_name(tmp_path, row):
    (tmp_path / "bad.jsonl").write_text(row + "\n")

    with pytest.raises(BrokenFile):
        read_questions(tmp_path / "bad.jsonl")


def test_rows_with_and_without_a_topic_go_together(tmp_path):
    row = {"question": "q", "choices": ["a", "b"], "gold": 0}
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row | more) + "\n" for more in ({}, {"topic": None}, {"topic": "left"})))

    assert [one.topic for one in read_questions(path)] == ["", "", "left"]


def test_nan_is_no_wrong_answer():
    model = fresh_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))

    with pytest.raises(UnstableEdit, match="it is NaN"):
        answer(model, word_tokenizer(), ASKED)


def test_a_file_that_is_not_there_or_empty_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")

    for name in ("empty.jsonl", "none.jsonl"):
        with pytest.raises(UnsupportedFormat):
            read_questions(tmp_path / name)
