"""Scores join, filter and rank as they say, and a selection becomes a plan that says where it came from."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from saeguard import SAE, Plan, Scale
from saeguard.errors import BrokenFile, ScoreMismatch
from saeguard.scoring.select import Bound, select
from saeguard.scoring.table import Meaning, ScoreTable, pick
from tests.tiny import tiny_sae

NAN, INF = math.nan, math.inf
SMALL = tiny_sae(d_sae=6)
MEANING, LOWER = Meaning("share", "made up"), Meaning("share", "made up", higher=False)


def table_of(sae: SAE = SMALL, meaning: Meaning = MEANING, **columns: list[float]) -> ScoreTable:
    return ScoreTable.of(sae, {name: (torch.tensor(values), meaning) for name, values in columns.items()}, seed=3)


TABLE = table_of(a=[1, 5, NAN, 3, 5, 0], b=[0.1, 0.2, 0.3, NAN, 0.0, 0.9])


def test_ranking_leaves_out_what_has_no_number_and_ties_go_to_the_lower_one():
    assert TABLE.ranked("a") == [1, 4, 3, 0, 5]
    assert table_of(meaning=LOWER, a=[1, 5, NAN, 3, 5, 0]).ranked("a") == [5, 0, 3, 1, 4]


def test_bounds_and_places_among_the_first_all_hold():
    assert select(TABLE, "a", top=9).latents == (1, 4, 3, 0, 5)
    assert select(TABLE, "a", top=2, bounds=(Bound("b", least=0.1),)).latents == (1, 0)
    assert select(TABLE, "a", top=9, bounds=(Bound("b", least=0.1), Bound("a", most=1))).latents == (0, 5)
    assert select(TABLE, "a", top=9, within={"b": 3}).latents == (1, 5)
    assert select(TABLE, "a", top=9, bounds=(Bound("b", least=50, percentile=True),)).latents == (1, 5)


@given(st.lists(st.one_of(st.floats(-9, 9), st.just(NAN)), min_size=6, max_size=6), st.integers(1, 6), st.floats(-9, 9))
def test_selection_is_the_best_of_what_the_bound_leaves(values, top, least):
    values, least = torch.tensor(values).tolist(), float(torch.tensor(least))  # as float32 has them
    table, known = table_of(a=values), [v for v in values if v >= least]
    if not known:
        with pytest.raises(ScoreMismatch, match="none is left of 6"):
            select(table, "a", top=top, bounds=(Bound("a", least=least),))
        return

    found = select(table, "a", top=top, bounds=(Bound("a", least=least),))

    wanted = torch.tensor(sorted(known, reverse=True)[:top])
    assert torch.tensor(found.scores["a"]).tolist() == pytest.approx(wanted.tolist())


def test_selection_becomes_a_plan_and_says_where_it_came_from():
    found = select(TABLE, "a", top=2, bounds=(Bound("b", least=0.1),))

    plan = found.plan(Scale(-2.0), name="turned", phase="generated")

    assert Plan.from_json(plan.to_json()) == plan
    assert (plan.rules[0].latents, plan.rules[0].sae, plan.rules[0].phase) == ((1, 0), "tiny", "generated")
    document = json.loads(found.to_json())
    assert document["provenance"]["sae_fingerprint"] == SMALL.fingerprint()
    assert document["provenance"]["scores"]["a"] == {"seed": 3}
    assert document["provenance"]["bounds"] == [{"column": "b", "least": 0.1, "most": None, "percentile": False}]


@pytest.mark.parametrize(("bad", "text"), [
    (lambda: select(TABLE, "c", top=1), "this table has a, b. Compute it first"),
    (lambda: select(TABLE, "a", top=0), "that is no count"),
    (lambda: Bound("a", least=2, most=1), "no number lies between"), (lambda: Bound("a", least=NAN), "no number lies"),
    (lambda: TABLE.join(table_of(tiny_sae(d_sae=6, seed=1), c=[0.0] * 6)), "their weights differ"),
    (lambda: table_of(c=[0.0] * 5), "one number per latent"),
])  # fmt: skip
def test_scores_that_do_not_fit_are_refused(bad, text):
    with pytest.raises(ScoreMismatch, match=text):
        bad()


def test_tables_join_and_come_back_from_their_file(tmp_path):
    joined = TABLE.join(table_of(meaning=LOWER, c=[1.0] * 6))

    again = ScoreTable.load(joined.save(tmp_path / "scores.safetensors"))

    assert list(pick(again, ["c", "a"]).columns) == ["c", "a"]
    assert again.meanings == joined.meanings
    assert again.provenance == joined.provenance
    for name, column in joined.columns.items():
        assert torch.equal(again.columns[name], column) or bool(column.isnan().any())
        assert torch.equal(again.columns[name].nan_to_num(-1), column.nan_to_num(-1))


def test_damaged_score_file_is_refused(tmp_path):
    path = TABLE.save(tmp_path / "scores.safetensors")
    path.write_bytes(path.read_bytes()[:-5])

    with pytest.raises(BrokenFile):
        ScoreTable.load(path)
    with pytest.raises(BrokenFile, match="Score again"):
        ScoreTable.load(_without_meaning(tmp_path))


def _without_meaning(folder):
    table = replace(TABLE)
    object.__setattr__(table, "meanings", {})
    return table.save(folder / "bare.safetensors")


def test_infinite_scores_are_ranked_bounded_and_written():
    """A latent that fires on random tokens only has an infinite ratio; it once emptied selections and broke JSON."""
    table = table_of(meaning=LOWER, a=[INF, INF, INF, 3, 1, NAN], b=[0, 1, -INF, 3, 4, 5])

    worst = select(table, "b", top=9, bounds=(Bound("a", least=60, percentile=True),))
    best = select(table, "b", top=9, bounds=(Bound("a", most=25, percentile=True),))

    assert worst.latents == (2, 0, 1)
    assert best.latents == (3, 4)
    assert json.loads(worst.to_json())["scores"] == {"a": ["inf"] * 3, "b": ["-inf", 0.0, 1.0]}
    assert select(table, "b", top=9, bounds=(Bound("b", most=50, percentile=True),)).latents == (2, 0, 1)


DAMAGED = {"meanings": [], "provenance": ["a"], "schema": 2, "d_sae": "6"}


@pytest.mark.parametrize("key", DAMAGED)
def test_score_file_whose_facts_are_of_another_kind_is_refused(key, tmp_path):
    path = TABLE.save(tmp_path / "scores.safetensors")
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["saeguard_scores"])
    save_file(dict(TABLE.columns), path, metadata={"saeguard_scores": json.dumps(facts | {key: DAMAGED[key]})})

    with pytest.raises(BrokenFile, match="Score again"):
        ScoreTable.load(path)
