"""Dilution counts every decision that benign text or the form of a batch changes, and none that they do not."""

from typing import Any

import pytest

from saeguard.errors import ScoreMismatch
from saeguard.evaluating.dilution import FORMS, Form, decider, dilution, mixed
from saeguard.evaluating.prompts import Frame
from saeguard.gates import Latched, Rate, Watch
from tests import planted, tiny

FRAME = Frame((1, 3), (4,))
ASKED = ((7, planted.WORD, 9), (7, 8), (20, 21, 22, 23, planted.WORD))
BENIGN = tuple(5 + (7 * i) % 30 for i in range(120))
LENGTHS = (1, 7, 120)
DILUTES = Watch(planted.HITS, Rate(), 0.15)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.fresh_model()


def curve(model: Any, gate: Any, **options: Any) -> Any:
    sae = planted.planted_sae(model)
    with planted.under(model, sae, planted.editing(model, sae, gate)) as (_, subject):
        return dilution(decider(subject), ASKED, BENIGN, FRAME, lengths=LENGTHS, **options)


def test_latched_gate_flips_nothing_in_any_form(model):
    found = curve(model, planted.GATE)

    assert (found.n, found.opened_alone, found.flips, found.disagreeing_alone) == (3, 2, 0, 0)
    assert len(found.points) == 3 * len(LENGTHS)
    assert all((p.opened, p.disagreeing, p.benign_opens) == (2, 0, False) for p in found.points)


def test_rate_of_the_published_gate_is_diluted(model):
    """DSG's share of hit tokens: a long benign text in front keeps the gate shut, and the curve says so."""
    found = curve(model, DILUTES)

    before = {p.length: p.lost for p in found.points if p.place == "before"}
    assert before[1] <= before[7] <= before[120] == found.opened_alone
    assert all(point.disagreeing == 0 for point in found.points)
    assert all(p.lost == 0 for p in curve(model, Latched(DILUTES), where=("after",)).points)


def test_benign_text_that_triggers_by_itself_is_told_from_a_gain(model):
    sae = planted.planted_sae(model)
    with planted.under(model, sae, planted.editing(model, sae)) as (_, subject):
        found = dilution(decider(subject), ASKED[1:2], (planted.WORD, 5), FRAME, lengths=(2,), where=("after",))

    (point,) = found.points
    assert (point.gained, point.benign_opens) == (1, True)


def test_form_that_disagrees_is_counted():
    by_side = lambda rows, form: [form.side == "left" and planted.WORD in row for row in rows]
    forms = (Form("alone"), Form("right", "right"))

    found = dilution(by_side, ASKED, BENIGN, FRAME, lengths=(1,), forms=forms)

    assert found.disagreeing_alone == 2
    assert [point.disagreeing for point in found.points] == [2, 2, 2]
    assert found.flips == 0


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_form_decides_as_the_row_alone(form, model):
    sae = planted.planted_sae(model)
    rows = [mixed(one, BENIGN[:length], "around") for one in ASKED for length in (0, 3, 100)]
    with planted.under(model, sae, planted.editing(model, sae, Watch(planted.HITS, Rate(), 0.02))) as (_, subject):
        decide = decider(subject)

        assert decide(rows, form) == [decide([row], Form("alone"))[0] for row in rows]


def test_question_stands_where_the_place_says():
    assert mixed([1], [8, 9], "before") == [8, 9, 1]
    assert mixed([1], [8, 9], "after") == [1, 8, 9]
    assert mixed([1], [8, 9], "around") == [8, 1, 9]


@pytest.mark.parametrize(("asked", "lengths"), [((), (1,)), (ASKED, (121,))])
def test_too_little_to_measure_is_refused(asked, lengths):
    with pytest.raises(ScoreMismatch, match="benign tokens"):
        dilution(lambda rows, form: [False] * len(rows), asked, BENIGN, FRAME, lengths=lengths)


def test_progress_ends_at_the_total():
    told: list[tuple[int, int]] = []
    dilution(lambda rows, form: [False] * len(rows), ASKED, BENIGN, FRAME, lengths=(1, 2),
             progress=lambda done, total: told.append((done, total)))  # fmt: skip

    assert told[-1] == (7, 7)
    assert [done for done, _ in told] == list(range(1, 8))
