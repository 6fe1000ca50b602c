"""Which choice a written answer names: first by place, letters only where they stand as such, stopped rows never."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saeguard.errors import UnsupportedFormat
from saeguard.evaluating.answers_by_writing import Written, holds, named_choice, prompt_of, write_answers
from saeguard.evaluating.multiple_choice import Question
from saeguard.evaluating.prompts import Frame, chat_ids, padded, token_ids
from saeguard.evaluating.subject import Plain, Verdict
from tests import tiny
from tests.words import word_tokenizer

CHOICES = ("cell wall", "cell", "Newton's law", "iron (II) oxide")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", 1), ("B.", 1), ("b", None), ("(C) Newton's law", 2), ("The answer is D.", 3), ("C: because", 2),
        ("Option A", 0), ("answer: (B)", 1), ("B\nbecause", 1),
        ("A cell wall is what plants have.", 0), ("A cell.", 1), ("It is the cell, not the cell wall.", 1),
        ("newton s law", 2), ("NEWTON'S LAW of motion", 2), ("iron oxide", 3), ("iron (ii) oxide", 3),
        ("a cellar", None), ("unicell", None), ("", None), ("E. none of them", None), ("I do not know. A. B.", 0),
        ("Vitamin C helps", None), ("D. is wrong, the answer is A", 3), ("It isn't B.", 1), ("U.S.A. law", None),
    ],
)  # fmt: skip
def test_first_choice_that_is_named_counts(text, expected):
    assert named_choice(text, CHOICES) == expected


@given(
    st.lists(st.text("xyz ", min_size=3, max_size=9).filter(str.strip), min_size=2, max_size=4, unique=True), st.data()
)
def test_choice_alone_names_itself_or_one_of_the_same_words(choices, data):
    place = data.draw(st.integers(0, len(choices) - 1))
    found = named_choice(choices[place], choices)

    assert found is not None
    assert choices[found].split() == choices[place].split()


def test_words_have_to_follow_each_other():
    assert holds("That is the Cell-Wall of plants", "cell wall")
    assert not holds("a cell with a wall", "cell wall")
    assert holds("it costs 5 €", "€")


def test_options_are_listed_with_letters_and_no_more_than_there_are():
    asked = Question("What?", ("one", "two"), 0)

    assert prompt_of(asked, "options").splitlines()[:3] == ["What?", "A. one", "B. two"]
    assert prompt_of(asked, "open") == "What?"
    with pytest.raises(UnsupportedFormat, match="27 choices"):
        prompt_of(Question("What?", tuple(f"c{i}" for i in range(27)), 0), "options")


def asked(n: int) -> list[Question]:
    return [Question(" ".join(f"w{3 + i + j}" for j in range(2 + i % 4)), ("w9", "w10 w11"), i % 2) for i in range(n)]


@pytest.mark.parametrize("batch_rows", [1, 3, 16])
def test_answers_are_what_generate_writes_to_each_prompt_alone(batch_rows):
    model: Any = tiny.tiny_model()
    tokenizer = word_tokenizer()

    found = write_answers(Plain(model, tokenizer), asked(7), "open", new_tokens=6, batch_rows=batch_rows)

    for one, ids in zip(asked(7), found.ids, strict=True):
        prompt = torch.tensor([chat_ids(tokenizer, (one.question,))])
        alone = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :].tolist()
        assert list(ids) == alone


def test_stopped_answer_is_wrong_whatever_stands_in_its_place():
    one = Question("q", ("yes", "no"), 0)
    written = lambda stopped: Written((one,), "options", ("yes",), ((5,),), (Verdict(stopped, stopped),))

    assert written(False).right() == [True]
    assert written(True).right() == [False]
    assert written(True).named() == [None]
    assert written(False).accuracy().chance == 0.5


def test_open_answers_are_not_guessed():
    one = Question("q", ("cell wall", "nucleus"), 0)
    written = Written((one,), "open", ("It has a cell wall.",), ((5,),), (Verdict(),))

    assert (written.right(), written.accuracy().chance) == ([True], 0.0)


TEMPLATE = "{% for m in messages %}w3 {{ m.role == 'user' and 'w4' or 'w5' }} {{ m.content }} w6 {% endfor %}w7"


def test_template_frames_what_is_said_and_turns_alternate():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE

    assert chat_ids(tokenizer, ("w20 w21",)) == [3, 4, 20, 21, 6, 7]
    assert Frame.of(tokenizer).around(token_ids(tokenizer, "w20 w21")) == [3, 4, 20, 21, 6, 7]
    assert chat_ids(tokenizer, ("w20", "w21")) == [3, 4, 20, 6, 3, 5, 0, 0, 6, 3, 4, 21, 6, 7]
    assert Frame.of(word_tokenizer()).around([20]) == [tiny.BOS, 20]


def test_padding_is_told_by_the_mask():
    ids, mask = padded([[5], [6, 7]], "left")

    assert (ids.tolist(), mask.tolist()) == ([[0, 5], [6, 7]], [[0, 1], [1, 1]])
    assert padded([[5], [6, 7]], "right")[0].tolist() == [[5, 0], [6, 7]]
