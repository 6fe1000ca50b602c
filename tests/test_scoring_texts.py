"""Texts say which tokens count, by mask and by id; how they are padded, cut and grouped is seen in their rows."""

from dataclasses import replace

import pytest
import torch

from saeguard.errors import MissingBOS, ScoreMismatch
from saeguard.scoring.statistics import gather
from saeguard.scoring.texts import Texts
from tests import tiny


def test_a_text_that_contradicts_itself_is_refused():
    ids = tiny.prompt(3)

    with pytest.raises(ScoreMismatch, match="go down"):
        Texts.from_ids(ids, document=torch.tensor([0, 1, 0]))
    with pytest.raises(ScoreMismatch, match="padding or special"):
        replace(Texts.from_ids(ids), mask=torch.zeros_like(ids, dtype=torch.bool))
    with pytest.raises(ScoreMismatch, match="document numbers"):
        replace(Texts.from_ids(ids), document=torch.arange(2))
    with pytest.raises(ScoreMismatch, match="no text"):
        gather(tiny.tiny_model(), tiny.tiny_sae(), {}).of("a")


class Letters:
    """A tokenizer with one id per letter."""

    bos_token_id: int | None = tiny.BOS
    all_special_ids = (tiny.PAD, tiny.BOS, tiny.EOS)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") + 3 for letter in text]}


def test_text_is_cut_behind_the_bos_that_the_sae_wants():
    sae = tiny.tiny_sae()
    wants, wants_none = replace(sae, manifest={"bos": True}), replace(sae, manifest={"bos": False, "context": 3})
    nameless = Letters()
    nameless.bos_token_id = None

    text = Texts.from_text(["abcde", "", "f"], Letters(), wants, context=4)
    bare = Texts.from_text(["abcde", "", "f"], Letters(), wants_none, context=4)

    assert text.ids.tolist() == [[1, 3, 4, 5], [1, 6, 7, 0], [1, 0, 0, 0], [1, 8, 0, 0]]
    assert text.document.tolist() == [0, 0, 1, 2]
    assert text.n_documents == 3
    assert text.kept.sum(1).tolist() == [3, 2, 0, 1]
    assert text.special.sum(1).tolist() == [1, 1, 1, 1]
    assert bare.ids.tolist() == [[3, 4, 5], [6, 7, 0], [0, 0, 0], [8, 0, 0]]
    assert Texts.from_text(["ab"], nameless, sae).ids.tolist() == [[3, 4]]
    with pytest.raises(MissingBOS):
        Texts.from_text(["ab"], nameless, wants)


def test_prompts_are_read_and_not_counted():
    text = Texts.from_text(["de", "f"], Letters(), tiny.tiny_sae(), prompts=["abc", "g"], context=5)

    assert text.ids.tolist() == [[1, 3, 4, 5, 6], [1, 9, 8, 0, 0]]
    assert text.kept.tolist() == [[False] * 4 + [True], [False, False, True, False, False]]
    assert text.special.sum(1).tolist() == [1, 1]


def test_windows_of_groups_overlap_and_leave_special_tokens_and_padding_out():
    ids = torch.tensor([[1, 10, 11, 12, 10, 2, 13, 14], [0, 0, 1, 12, 13, 10, 14, 15]])
    text = Texts.from_ids(ids, special_ids=(0, 1, 2), mask=ids != 0).with_groups(
        {"ten": [10], "twelve": [12]}, before=1, after=1
    )

    ten, twelve = text.member.unbind(-1)
    assert text.ids[1].tolist() == [1, 12, 13, 10, 14, 15, 0, 0]
    assert ten.int().tolist() == [[0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0]]
    assert twelve.int().tolist() == [[0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0]]


def test_chunks_and_random_tokens_say_what_counts():
    kept = torch.tensor([[False, True, False, True, False], [False, True, False, False, False]])
    chunks = Texts.from_chunks(torch.full((2, 5), 7), kept)
    random = Texts.random(tiny.VOCAB, tiny.tiny_sae(), Letters(), rows=5, columns=9, seed=4)

    assert chunks.mask.sum(1).tolist() == [4, 2]
    assert chunks.special.sum(1).tolist() == [2, 1]
    assert random.ids.shape == (5, 10)
    assert random.kept.sum() == 45
    assert torch.equal(random.ids, Texts.random(tiny.VOCAB, tiny.tiny_sae(), Letters(), rows=5, columns=9, seed=4).ids)
    assert not torch.equal(random.ids, Texts.random(tiny.VOCAB, tiny.tiny_sae(), Letters(), rows=5, columns=9).ids)
