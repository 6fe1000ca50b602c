"""Padding never matters: not its side, its amount, what is in it, or whether its id is also that of BOS or EOS.

A case is one row: a text with padding before, after or inside it, in a batch with others, against the same text without
any. Edited sets are compared by absolute position, exactly; logits at the text's tokens to 1e-5 of the largest.
"""

import random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saeguard import Clamp, Plan, Rule, steer
from tests import laws, mutants, tiny
from tests.counts import cases

ROWS = 4
SAES = [tiny.tiny_sae(activation=kind, name=kind, seed=i) for i, kind in enumerate(("relu", "jumprelu", "topk"))]
SPECIALS = ((tiny.BOS, tiny.EOS, tiny.PAD), (tiny.BOS,), (tiny.PAD,), ())  # () and one id: pad, BOS and EOS in one


class Padded(NamedTuple):
    """``columns[row]`` are the columns of the text's tokens; every row holds the beginning of one text."""

    ids: Tensor
    mask: Tensor
    columns: list[list[int]]

    @property
    def call(self) -> dict[str, Tensor]:
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        return {"attention_mask": self.mask, "position_ids": positions}


def pad(text: Tensor, *, lengths: list[int], width: int, side: str, filler: list[int], seed: int) -> Padded:
    """Put beginnings of a text into rows of ``width`` columns, with ``filler`` ids between."""
    rng = random.Random(seed)
    ids = torch.tensor([[rng.choice(filler) for _ in range(width)] for _ in lengths])
    mask = torch.zeros_like(ids)
    columns = []
    for row, length in enumerate(lengths):
        where = rng.choice(("left", "right", "inside")) if side == "mixed" else side
        taken = {
            "left": list(range(width - length, width)),
            "right": list(range(length)),
            "inside": sorted(rng.sample(range(width), length)),
        }[where]
        columns.append(taken)
        ids[row, taken] = text[0, :length]
        mask[row, taken] = 1
    return Padded(ids, mask, columns)


def logits(model: nn.Module, ids: Tensor, **call: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **call).logits


def disagreement(found: Tensor, padded: Padded, expected: Tensor) -> float:
    """How far logits at the text's tokens are from those without padding."""
    pairs = [(found[row, taken], expected[0, : len(taken)]) for row, taken in enumerate(padded.columns) if taken]
    return max((laws.distance(a, b) for a, b in pairs), default=0.0)


fillers = st.lists(st.integers(0, tiny.VOCAB - 1), min_size=1, max_size=4) | st.sampled_from(
    ([tiny.PAD], [tiny.BOS], [tiny.EOS], [tiny.BOS, tiny.EOS, tiny.PAD])
)


@settings(max_examples=cases(4_600, per_example=ROWS))
@given(
    st.sampled_from(tiny.ARCHITECTURES), laws.plans(SAES, where=laws.wheres(longest=9), gated=True),
    st.sampled_from(SPECIALS), st.sampled_from(("left", "right", "inside", "mixed")), fillers, st.integers(0, 2**30),
    st.data(),
)  # fmt: skip
def test_padding_of_any_kind_changes_nothing(architecture, plan, special_ids, side, filler, seed, data):
    """4,600 rows."""
    model = tiny.tiny_model(architecture)
    length = data.draw(st.integers(1, 9))
    lengths = data.draw(st.lists(st.integers(0, length), min_size=ROWS, max_size=ROWS))
    prompt = data.draw(st.integers(0, length))
    text = torch.randint(0, tiny.VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))
    width = data.draw(st.integers(max(*lengths, 1), max(*lengths, 1) + 7))
    padded = pad(text, lengths=lengths, width=width, side=side, filler=filler, seed=seed)
    options: dict[str, Any] = {"prompt_tokens": prompt, "special_ids": special_ids}
    assume(not laws.near_edge(model, plan, SAES, text, **options))

    with steer(model, plan, saes=SAES, **options) as alone:
        expected = logits(model, text)
    with steer(model, plan, saes=SAES, **options) as batched:
        found = logits(model, padded.ids, **padded.call)

    truth = laws.edited(alone)
    for rule, (rows,) in laws.edited(batched).items():
        for row, kept in enumerate(lengths):
            assert rows[row] == tuple(at for at in truth[rule][0][0] if at < kept)
    assert disagreement(found, padded, expected) <= laws.TOLERANCE


@settings(max_examples=cases(400, per_example=ROWS))
@given(
    st.sampled_from(tiny.ARCHITECTURES), laws.plans(SAES, where=laws.wheres(), gated=True), fillers, st.integers(1, 6),
    st.sampled_from(({}, {"use_cache": False}, {"cache_implementation": "static"})), st.integers(0, 2**30),
)  # fmt: skip
def test_left_padding_of_a_generated_batch_changes_nothing(architecture, plan, filler, length, way, seed):
    """400 rows; each generates four tokens, in a padded batch and alone."""
    model = tiny.tiny_model(architecture)
    text = torch.randint(3, tiny.VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))
    lengths = [random.Random(seed + row).randint(1, length) for row in range(ROWS)]
    padded = pad(text, lengths=lengths, width=length + 2, side="left", filler=filler, seed=seed)
    options: Any = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [tiny.PAD], **way}

    with steer(model, plan, saes=SAES) as batched:
        sequences = model.generate(padded.ids, attention_mask=padded.mask, **options)

    for row, kept in enumerate(lengths):
        with steer(model, plan, saes=SAES) as alone:
            single = model.generate(text[:, :kept], attention_mask=torch.ones(1, kept, dtype=torch.long), **options)
        assume(not laws.near_edge(model, plan, SAES, single, prompt_tokens=kept))
        new = single.shape[1] - kept  # a row that ended earlier than its batch is followed by padding
        assert sequences[row, length + 2 : length + 2 + new].tolist() == single[0, kept:].tolist()
        assert laws.edited_by_row(batched)[row : row + 1] == laws.edited_by_row(alone)


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("name", ["jumprelu", "topk"])
def test_padding_that_looks_like_the_text_is_never_edited(name, side):
    """The filler is the text's own tokens, and nothing is special: only the mask tells them apart."""
    model, text = tiny.tiny_model(), tiny.prompt(1, 6)
    padded = pad(text, lengths=[6, 3], width=11, side=side, filler=text[0].tolist(), seed=2)
    plan = Plan((Rule(name, (1, 2, 3, 4), Clamp(5.0, when="always"), special=True),))

    with steer(model, plan, saes=SAES) as run:
        logits(model, padded.ids, **padded.call)

    assert run.report.rules[0].edited_positions == ((tuple(range(6)), tuple(range(3))),)
    assert run.report.rules[0].tokens_seen == 9


FAULTS = {
    "counts columns": lambda block: mutants.counts_columns(block, SAES[0], (1, 2, 3, 4), -9.0, first=4),
    "pools over padding": lambda block: mutants.pools_over_padding(block, SAES[0], (12, 13), -9.0, rate=0.45),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_law_catches_padding_that_counts(fault):
    model, text = tiny.tiny_model(), tiny.prompt(1, 6)
    padded = pad(text, lengths=[6, 6], width=14, side="left", filler=[tiny.PAD], seed=0)
    block = model.get_submodule("model.layers.1")

    with FAULTS[fault](block):
        expected, found = logits(model, text), logits(model, padded.ids, **padded.call)

    assert laws.distance(expected, logits(model, text)) > 1e-2, "the fault does not edit the unpadded text"
    assert disagreement(found, padded, expected) > 1e-2


def test_law_holds_for_the_edit_that_the_mutants_get_wrong():
    model, text = tiny.tiny_model(), tiny.prompt(1, 6)
    padded = pad(text, lengths=[6, 6], width=14, side="left", filler=[tiny.PAD], seed=0)
    plan = Plan((Rule("relu", (1, 2, 3, 4), Clamp(-9.0, when="active"), first=4, special=True),))

    with steer(model, plan, saes=SAES):
        expected, found = logits(model, text), logits(model, padded.ids, **padded.call)

    assert disagreement(found, padded, expected) <= laws.TOLERANCE
