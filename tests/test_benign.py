"""Benign text under a guardrail: exactly nothing where nothing triggered, and the right numbers where something did."""

import math
from typing import Any

import pytest
import torch

from saeguard.errors import ScoreMismatch
from saeguard.evaluating.benign import benign
from saeguard.evaluating.subject import Plain
from tests import planted, tiny
from tests.test_unlearning import Silent

QUIET = ([1, 7, 8, 9, 10], [1, 11, 12], [1, 13, 14, 15, 16, 17, 18], [1, 20], [1, 21, 22, 23])
LOUD = [1, 7, planted.WORD, 9, 10, 11]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.fresh_model()


def measured(model: Any, rows: Any, gate: Any = planted.GATE) -> Any:
    sae = planted.planted_sae(model)
    with planted.under(model, sae, planted.editing(model, sae, gate)) as subjects:
        return benign(*subjects, "text", rows)


def test_text_in_which_nothing_triggers_has_exactly_the_plain_models_predictions(model):
    found = measured(model, QUIET)

    assert (found.kl, found.perplexity_ratio, found.triggered.right, found.changed_untriggered) == (0.0, 1.0, 0, 0)
    assert found.per_tokens == 0.0
    assert math.isnan(found.kl_triggered)
    assert found.tokens == sum(map(len, QUIET))


def test_numbers_of_a_triggered_row_are_those_of_the_definition(model):
    sae = planted.planted_sae(model)
    found = measured(model, [*QUIET, LOUD])
    ids = torch.tensor([LOUD])
    with torch.no_grad():
        p = model(ids).logits[0, :-1].double().log_softmax(-1)
        with planted.under(model, sae, planted.editing(model, sae)) as (_, subject), subject.passes([len(LOUD)]):
            q = model(ids).logits[0, :-1].double().log_softmax(-1)
    n = sum(len(row) - 1 for row in (*QUIET, LOUD))
    kl = float((p.exp() * (p - q)).sum())
    moved = float((p - q).gather(1, ids[0, 1:, None]).sum())

    assert found.triggered.right == 1
    assert found.kl == pytest.approx(kl / n, rel=1e-4)
    assert found.kl_triggered == pytest.approx(kl / (len(LOUD) - 1), rel=1e-4)
    assert found.perplexity_ratio == pytest.approx(math.exp(moved / n), rel=1e-4)
    assert found.per_tokens == pytest.approx(1600 / found.tokens)


def test_edit_without_a_trigger_on_record_is_counted(model):
    sae = planted.planted_sae(model)
    with planted.under(model, sae, planted.editing(model, sae)) as (plain, subject):
        found = benign(plain, Silent(subject), "text", [*QUIET, LOUD])

    assert found.changed_untriggered == 1


def test_rows_without_a_policy_are_the_unguarded_models(model):
    sae = planted.planted_sae(model)
    alone = benign(Plain(model, planted.TOKENIZER), Plain(model, planted.TOKENIZER), "text", QUIET)
    with planted.under(model, sae, planted.editing(model, sae)) as (plain, _):
        assert benign(plain, plain, "text", QUIET).perplexity == alone.perplexity


def test_text_of_no_two_tokens_is_refused(model):
    with pytest.raises(ScoreMismatch, match="two tokens"):
        measured(model, [[1], []])
