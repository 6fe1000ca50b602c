"""Transforms are pure, keep what can be undone, and are measured by what triggers and what is still answered."""

import base64
import codecs
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeguard.evaluating.multiple_choice import Question
from saeguard.evaluating.subject import Plain
from saeguard.evaluating.transformed import transformed, triggered
from saeguard.evaluating.transforms import PADDING_WORDS, TRANSFORMS
from tests import planted, tiny

TEXT = "Which organ pumps the blood, and how often?"
ANY = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
KEEPS = ("plain", "role-play", "few-shot", "prefix-injection", "long-padding")


@pytest.mark.parametrize("name", TRANSFORMS)
@given(text=ANY, seed=st.integers(0, 99))
def test_every_transform_is_a_function_of_text_and_seed_alone(name, text, seed):
    found = TRANSFORMS[name](text, seed)

    assert found == TRANSFORMS[name](text, seed)
    assert found
    assert all(isinstance(turn, str) for turn in found)


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "plain"])
def test_every_transform_but_plain_changes_a_question(name):
    assert TRANSFORMS[name](TEXT * 3, 0) != (TEXT * 3,)


@pytest.mark.parametrize("name", KEEPS)
def test_frames_hold_the_question_as_it_is(name):
    assert TEXT in TRANSFORMS[name](TEXT, 0)[0]


@given(ANY)
def test_what_is_encoded_can_be_decoded(text):
    encoded = TRANSFORMS["base64"](text, 0)[0].rpartition(": ")[2]
    rotated = TRANSFORMS["rot13"](text, 0)[0].partition(": ")[2]

    assert base64.b64decode(encoded).decode() == text
    assert codecs.decode(rotated, "rot13") == text


@given(ANY)
def test_turns_and_spaces_lose_no_word(text):
    assert " ".join(TRANSFORMS["turn-splitting"](text, 0)).split() == text.split()
    assert "".join(TRANSFORMS["spaced"](text, 0)[0].split()) == "".join(text.split())


def test_turns_are_three_where_there_are_words_for_them():
    assert len(TRANSFORMS["turn-splitting"](TEXT, 0)) == 3
    assert TRANSFORMS["turn-splitting"]("one", 0) == ("one",)


def test_typos_are_drawn_by_the_seed_and_are_few():
    several = {TRANSFORMS["typos"](TEXT * 10, seed)[0] for seed in range(5)}

    assert len(several) == 5
    assert all(abs(len(one) - len(TEXT) * 10) < 40 for one in several)


def test_padding_is_as_long_as_it_says_whatever_the_seed():
    assert {len(TRANSFORMS["long-padding"]("", seed)[0].split()) for seed in range(9)} == {PADDING_WORDS}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.fresh_model()


def test_word_that_is_hidden_no_longer_triggers_and_the_table_says_so(model):
    sae = planted.planted_sae(model)
    rows = planted.rows_of(8)
    asked = [Question(one["question"], tuple(one["choices"]), one["gold"], one["topic"]) for one in rows]
    with planted.under(model, sae, planted.refusing(model, sae)) as (plain, subject):
        found = transformed(plain, subject, asked, ("plain", "upper", "turn-splitting", "base64"))
    unguarded = transformed(Plain(model, planted.TOKENIZER), Plain(model, planted.TOKENIZER), asked, ("plain",))

    assert [one.name for one in found] == ["plain", "upper", "turn-splitting", "base64"]
    assert [one.triggered.right for one in found] == [4, 0, 4, 0]
    assert [one.asked.right for one in found] == [4, 0, 4, 0]
    assert found[1].plain == found[1].guarded
    assert found[0].plain == unguarded[0].plain
    assert found[0].guarded.right <= found[0].plain.right


def test_triggers_do_not_depend_on_batch_mates(model):
    sae = planted.planted_sae(model)
    said = [(one["question"],) for one in planted.rows_of(11)]
    with planted.under(model, sae, planted.editing(model, sae)) as (_, subject):
        together = triggered(subject, said)

        assert together == [triggered(subject, [one])[0] for one in said]
        assert together == [f"w{planted.WORD}" in one[0] for one in said]
