"""Gates are what their equations say, token by token, however the tokens arrive and whatever lies between them.

Every gate is compared with `tests.slow_gates`, which has no state and looks at one row at a time. Numbers are in
eighths, so sums are exact and verdicts have to be equal, not close.
"""

import json
import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard import Add, Plan, Rule, Site
from saeguard.errors import BadPlanFile, BadRule, PhaseUnknown, SaeguardError, SiteNotFound, TokensUnknown, UnknownOp
from saeguard.gates import (
    Always,
    And,
    Blend,
    Cosine,
    Count,
    Cusum,
    Gate,
    Hits,
    Latched,
    LogOdds,
    Not,
    Or,
    Peak,
    PooledHead,
    Probe,
    Rate,
    Seen,
    TopKMean,
    Verdict,
    Watch,
    Window,
    Words,
    WordsCusum,
    token_rate,
)
from saeguard.gates.checks import MOST
from saeguard.gates.written import DEEPEST
from saeguard.plans import MAX_BYTES
from tests.counts import cases
from tests.gate_cases import VOCAB, D, Rows, gates, rows_for, slowly, step, words_cusum

CPU = torch.device("cpu")
NONE = -math.inf


def same(a: Verdict, b: Verdict) -> bool:
    """Equal decisions, and scores that are equal or differ in the last bits of a product of matrices."""
    close = torch.allclose(a.score, b.score, rtol=1e-9, atol=1e-9, equal_nan=True)
    return torch.equal(a.opened, b.opened) and close


@settings(max_examples=cases(2_400))
@given(st.data())
def test_gate_says_at_every_token_what_its_equation_says(data):
    gate = data.draw(gates())
    rows = data.draw(rows_for(gate))

    assert same(step(gate, rows), slowly(gate, rows))


@settings(max_examples=cases(1_600))
@given(st.data())
def test_tokens_may_arrive_in_any_passes(data):
    """Passes of no tokens are among them."""
    gate = data.draw(gates())
    rows = data.draw(rows_for(gate))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows.real.shape[1]), max_size=6)))

    assert same(step(gate, rows, cuts), step(gate, rows))


@settings(max_examples=cases(1_200))
@given(st.data(), st.sampled_from((torch.nan, torch.inf, -torch.inf, 1e30, -7.0)))
def test_what_does_not_count_may_hold_anything(data, value):
    gate = data.draw(gates())
    rows = data.draw(rows_for(gate))

    assert same(step(gate, rows.with_padding(value)), step(gate, rows))


@settings(max_examples=cases(1_200))
@given(st.data(), st.sampled_from((0.0, 3.0, torch.nan)))
def test_padding_between_tokens_changes_nothing(data, value):
    gate = data.draw(gates())
    rows = data.draw(rows_for(gate, most=1, least=1))
    places = data.draw(st.lists(st.integers(0, rows.real.shape[1]), max_size=5))
    padded, kept = padded_at(rows, sorted(places))

    found = step(gate, padded.with_padding(value))

    assert same(Verdict(found.opened[:, kept], found.score[:, kept]), step(gate, rows))


def padded_at(rows: Rows, places: list[int]) -> tuple[Rows, list[int]]:
    """Columns that do not count put in front of those of ``places``; and where the others are now."""
    width = rows.real.shape[1]
    order = sorted([*((place, 0) for place in places), *((column, 1) for column in range(width))])
    kept = [i for i, (_, is_token) in enumerate(order) if is_token]
    source = torch.tensor([min(column, width - 1) for column, _ in order])
    token = torch.tensor([bool(is_token) for _, is_token in order])
    seen = []
    for one in rows.seen:
        assert one.prompt is not None
        assert one.ready is not None
        counts, prompt = one.counts[:, source] & token, one.prompt[:, source] & token
        ready = (one.ready[:, source] & token).cumsum(1) > 0  # that the prompt is over is never taken back
        assert one.ids is not None
        seen.append(Seen(one.f[:, source], one.x[:, source], counts, prompt, ready, one.ids[:, source]))
    return Rows(tuple(seen), rows.real[:, source] & token), kept


@settings(max_examples=cases(1_200))
@given(st.data())
def test_rows_know_nothing_of_each_other(data):
    gate = data.draw(gates())
    rows = data.draw(rows_for(gate, most=4))
    order = data.draw(st.lists(st.integers(0, len(rows.real) - 1), min_size=1, max_size=5))

    found, whole = step(gate, rows.rows(order)), step(gate, rows)

    assert same(found, whole.of_rows(torch.tensor(order)))


@settings(max_examples=cases(1_200))
@given(st.data())
def test_gate_that_calls_itself_monotone_never_closes_again(data):
    gate = data.draw(gates())
    opened = step(gate, data.draw(rows_for(gate))).opened

    assert not gate.monotone or torch.equal(opened.cummax(1).values if opened.numel() else opened, opened)


@settings(max_examples=cases(1_200))
@given(st.data())
def test_latched_gate_opens_where_the_gate_inside_first_does_and_stays_open(data):
    gate = data.draw(gates())
    rows = data.draw(rows_for(gate))
    inside, latched = step(gate, rows), step(Latched(gate), rows)

    assert torch.equal(latched.opened, inside.opened.cumsum(1) > 0)
    assert Latched(gate).monotone


MONOTONE = [
    Always(), Watch(Hits((1,)), Peak(), 0.5), Watch(Hits((1,)), Count(), 3.0), Watch(Hits((1,)), TopKMean(2), 0.5),
    Watch(LogOdds((1,), (-1.0,)), Peak(), 0.5), Latched(Not(Watch(Hits((1,)), Rate(), 0.5))),
    PooledHead((1,), ("count", "max"), (1.0, 0.0), 0.0), And((Always(), Always())),
]  # fmt: skip
NOT_MONOTONE = [
    Watch(Hits((1,)), Rate(), 0.5), Watch(Hits((1,)), Window(2), 0.5), Watch(Hits((1,)), Cusum(0.1), 0.5),
    Watch(LogOdds((1,), (1.0,)), Count(), 0.5), Watch(LogOdds((1,), (1.0,)), TopKMean(2), 0.5), Not(Always()),
    PooledHead((1,), ("count", "max"), (1.0, -0.5), 0.0), PooledHead((1,), ("mean",), (1.0,), 0.0), Cosine((1.0,), 0.5),
    And((Always(), Watch(Hits((1,)), Rate(), 0.5))),
]  # fmt: skip


def test_gates_say_whether_they_are_monotone():
    assert [gate.monotone for gate in MONOTONE] == [True] * len(MONOTONE)
    assert [gate.monotone for gate in NOT_MONOTONE] == [False] * len(NOT_MONOTONE)


def hits(*tokens: float, counts: list[int] | None = None, prompt: int | None = None) -> Rows:
    """One row of one latent."""
    n = len(tokens)
    mask = torch.tensor([counts if counts is not None else [1] * n]).bool()
    places = torch.arange(n)[None]
    known = (None, None) if prompt is None else ((places < prompt) & mask, places >= prompt - 1)
    return Rows((Seen(torch.tensor(tokens).view(1, n, 1), torch.zeros(1, n, 0), mask, *known),), mask)


def scores(gate: Gate, rows: Rows) -> list[float]:
    return step(gate, rows).score[0].tolist()


def opened(gate: Gate, rows: Rows) -> list[bool]:
    return step(gate, rows).opened[0].tolist()


def test_rate_is_dsgs_rho_and_its_threshold_is_strict():
    """Toy data of four tokens with S = {1, 3}: rho = 2 / 4, and DSG's hook edits at a threshold of .2, not of .5."""
    row = hits(0.0, 0.76, 2.0, 0.0, prompt=4)

    assert scores(Watch(Hits((1,)), Rate("prompt"), 0.2), row)[-1] == 0.5
    assert opened(Watch(Hits((1,)), Rate("prompt"), 0.2), row) == [False, False, False, True]
    assert not any(opened(Watch(Hits((1,)), Rate("prompt"), 0.5), row))


def test_cusum_is_pages_test():
    row = hits(0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0)

    assert scores(Watch(Hits((1,)), Cusum(0.3), 1.0), row) == pytest.approx([0, 0.7, 1.4, 1.1, 1.8, 2.5, 3.2, 2.9])


@pytest.mark.parametrize("benign", [0, 1, 10, 100, 1_600])
@pytest.mark.parametrize("pool", [Cusum(0.25), Window(4), Peak(), Count(), TopKMean(3)])
def test_benign_text_in_front_of_a_hit_dilutes_only_the_rate(pool, benign):
    row = hits(*[0.0] * benign, *[1.0] * 4)
    high = {Cusum: 2.9, Window: 0.9, Peak: 0.9, Count: 3.9, TopKMean: 0.9}[type(pool)]

    assert opened(Watch(Hits((1,)), pool, high), row)[-1]
    assert opened(Watch(Hits((1,)), Rate(), 0.9), row)[-1] == (benign == 0)


def test_mean_of_the_largest_counts_a_missing_token_as_0_and_a_negative_one_as_it_is():
    """The zeros of missing tokens once stayed in the place of negative evidence for good."""
    gate = Watch(LogOdds((1,), (1.0,)), TopKMean(2), 0.0)

    assert scores(gate, hits(-4.0, -2.0, -1.0)) == [-2.0, -3.0, -1.5]


LOW = [Watch(Hits((1,)), pool, -1.0) for pool in (Rate(), Window(3), Cusum(), Count(), TopKMean(2), Peak())]


@pytest.mark.parametrize("gate", [*LOW, PooledHead((1,), ("mean",), (1.0,), 5.0), Cosine((1.0,), -2.0)])
def test_gate_with_a_threshold_below_0_is_closed_until_a_token_counts(gate):
    """A score of 0 for nothing once opened such gates at BOS, and latched ones for good."""
    row = (
        stream(0.0, 0.0, 1.0, counts=[0, 0, 1], prompt=3)
        if isinstance(gate, Cosine)
        else hits(0.0, 0.0, 0.0, counts=[0, 0, 1])
    )

    assert opened(gate, row) == [False, False, True]
    assert opened(Latched(gate), row) == [False, False, True]
    assert scores(gate, row)[:2] == [NONE, NONE]


def stream(*tokens: float, counts: list[int], prompt: int | None = 1) -> Rows:
    """One row of a stream of width 1."""
    seen = hits(*tokens, counts=counts, prompt=prompt).seen[0]
    return Rows((replace(seen, f=seen.f[..., :0], x=seen.f),), seen.counts)


@pytest.mark.parametrize("gate", [Watch(Hits((1,)), Rate("prompt"), -1.0), Cosine((1.0,), -1.0)])
def test_gate_over_the_prompt_has_no_score_before_the_prompt_is_over(gate):
    tokens = (0.0, 1.0, 1.0, 1.0)
    row = stream(*tokens, counts=[1] * 4, prompt=3) if isinstance(gate, Cosine) else hits(*tokens, prompt=3)

    assert opened(gate, row) == [False, False, True, True]
    assert opened(Not(gate), row) == [False] * 4
    assert scores(gate, row)[:2] == [NONE, NONE]


@pytest.mark.parametrize("gate", [Watch(Hits((1,)), Rate("prompt"), 0.5), Cosine((1.0,), 0.5)])
def test_gate_over_the_prompt_needs_to_know_where_it_ends(gate):
    with pytest.raises(PhaseUnknown, match="prompt_tokens=n"):
        step(gate, stream(1.0, counts=[1], prompt=None) if isinstance(gate, Cosine) else hits(1.0))


def test_not_of_a_gate_that_has_seen_nothing_is_closed_so_that_padding_latches_nothing():
    """Left padding once opened Not, and Latched kept it open for the whole row."""
    gate = Latched(Not(Watch(Hits((1,)), Peak(), 0.5)))

    assert not any(opened(gate, hits(0.0, 0.0, 1.0, 0.0, counts=[0, 0, 1, 1])))
    assert opened(gate, hits(0.0, 0.0, counts=[0, 1])) == [False, True]


def test_longer_prompt_of_a_later_call_holds_what_was_generated_before():
    """A conversation: tokens that were generated in one call belong to the prompt of the next."""
    gate = Watch(Hits((1,)), Rate("prompt"), 0.5)
    first, second = hits(0.0, 1.0, 1.0, prompt=1), hits(0.0, 1.0, 1.0, 0.0, prompt=4)
    state, early = gate.step(gate.begin(1, CPU), first.seen)
    _, late = gate.step(state, second.columns(slice(3, 4)))

    assert early.score.tolist() == [[0.0, 0.0, 0.0]]
    assert late.score.tolist() == [[0.5]] == step(gate, second).score[:, 3:].tolist()


@pytest.mark.parametrize("gate", [
    *(Watch(Hits((1,)), pool, 0.5) for pool in (Rate(), Window(3), Cusum(), Count(), Peak(), TopKMean(2))),
    *(PooledHead((1,), (way,), (1.0,), 0.0) for way in ("count", "binary", "frequency", "max", "mean")),
])  # fmt: skip
@pytest.mark.parametrize("around", [lambda gate: gate, Not, Latched, lambda gate: And((Always(), gate)),
                                    lambda gate: Or((Always(), gate))])  # fmt: skip
def test_activation_that_is_no_number_is_seen_in_the_score(gate, around):
    whole, row = around(gate), hits(0.0, math.nan)
    found = scores(whole, Rows(row.seen * len(whole.leaves), row.real))

    assert not math.isnan(found[0])
    assert math.isnan(found[1])


def plan_with(gate: Any) -> Plan:
    return Plan((Rule("tiny", (1,), Add(1.0), gate=gate),))


def text_with(entry: Any) -> str:
    document = json.loads(plan_with(Always()).to_json())
    document["rules"][0]["gate"] = entry
    return json.dumps(document)


@settings(max_examples=cases(2_000))
@given(gates())
def test_every_gate_comes_back_from_a_plan_file(gate):
    plan = plan_with(gate)
    text = plan.to_json()
    again = Plan.from_json(text)

    assert again == plan
    assert again.to_json() == text
    assert again.fingerprint() == plan.fingerprint()
    assert hash(again.rules[0].gate) == hash(gate)


def test_gate_on_another_sae_and_site_comes_back_from_a_plan_file():
    gate = And((
        Watch(Hits((1, 2), 0.5, sae="other", site=Site("resid_pre", 1), special=True), Window(3), 0.5),
        PooledHead((3,), ("max",), (1.0,), 0.0, sae="third"), Cosine((1.0, 2.0), 0.1, site=Site("mlp_out", 0)),
    ))  # fmt: skip

    assert Plan.from_json(plan_with(gate).to_json()) == plan_with(gate)


def test_gates_that_nest_as_deep_as_they_may_come_back_from_a_plan_file():
    gate: Gate = token_rate((1,), 0.5)
    for _ in range(DEEPEST - 1):
        gate = And((gate,))

    assert Plan.from_json(plan_with(gate).to_json()) == plan_with(gate)
    with pytest.raises(BadRule, match=f"more than {DEEPEST} deep"):
        plan_with(And((gate,)))


@pytest.mark.parametrize("gate", [Words((5,), (1.0,), (1.0,)), WordsCusum((5,), (1.0,))], ids=["words", "piled"])
def test_words_are_refused_where_token_ids_are_unknown(gate):
    counts = torch.ones(1, 2, dtype=torch.bool)
    seen = Seen(torch.zeros(1, 2, 0), torch.zeros(1, 2, 0), counts, None, None)

    with pytest.raises(TokensUnknown, match="a gate on words"):
        gate.step(gate.begin(1, CPU), [seen])


def test_pair_reaches_over_what_does_not_count_and_over_the_end_of_a_pass():
    gate = Words((), (), (), (5, 6), (2.0,), (1.0,), last=1)
    counts, none = torch.tensor([[True, False, True]]), torch.zeros(1, 3, 0)
    seen = Seen(none, none, counts, None, None, torch.tensor([[5, 9, 6]]))

    state, first = gate.step(gate.begin(1, CPU), [seen[:2]])
    _, second = gate.step(state, [seen[2:]])

    assert gate.step(gate.begin(1, CPU), [seen])[1].score.tolist() == [[0.0, 0.0, 2.0]]
    assert (first.score.tolist(), second.score.tolist()) == ([[0.0, 0.0]], [[2.0]])


TOKENS = st.integers(0, VOCAB - 1)


@given(gate=words_cusum(), front=st.lists(TOKENS, max_size=12), row=st.lists(TOKENS, min_size=2, max_size=12),
       behind=st.lists(TOKENS, max_size=12))  # fmt: skip
def test_no_text_around_a_row_takes_away_what_piled_words_say_of_it(gate, front, row, behind):
    latched = Latched(gate)
    ids = torch.tensor([[*front, *row, *behind]])
    none, counts = torch.zeros(*ids.shape, 0), torch.ones_like(ids, dtype=torch.bool)
    seen = Seen(none, none, counts, None, None, ids)

    alone = latched.step(latched.begin(1, CPU), [seen[len(front) : len(front) + len(row)]])[1]
    inside = latched.step(latched.begin(1, CPU), [seen])[1]

    own = inside.score[0, len(front) : len(front) + len(row)]
    assert bool((own >= alone.score[0] - 1e-9).all())
    assert bool(inside.opened[0, -1]) or not bool(alone.opened[0, -1])


def test_large_table_of_words_is_written_and_read_again_within_the_limits_of_a_plan():
    n = 200_000
    pairs = tuple(i for k in range(n) for i in (k % 49_000, k // 49_000))
    weights, squares = tuple(round(k / 7 % 9, 3) for k in range(n)), (64.25,) * n
    plan = plan_with(Latched(Blend((Words((), (), (), pairs, weights, squares),), (1.0,), 0.5)))

    text = plan.to_json()

    assert len(text) < MAX_BYTES / 2
    assert Plan.from_json(text) == plan


def test_plans_that_differ_in_a_gate_differ_in_their_fingerprint():
    plans = [plan_with(None), plan_with(token_rate((1,), 0.5)), plan_with(token_rate((1,), 0.5, latched=True))]

    assert len({plan.fingerprint() for plan in plans}) == 3
    assert '"gate"' not in plans[0].to_json()


WATCH: dict[str, Any] = json.loads(plan_with(token_rate((1, 2), 0.5)).to_json())["rules"][0]["gate"]
HITS: dict[str, Any] = WATCH["evidence"]
HEAD = {"kind": "pooled_head", "latents": [1], "pooling": ["max"], "weights": [1.0], "bias": 0.0}
PILED = {"kind": "words_cusum", "tokens": [5], "weights": [1.0]}
TABLE = {"kind": "words", "tokens": [5], "weights": [1.0], "squares": [1.0]}
HOSTILE: dict[str, tuple[Any, type[SaeguardError]]] = {
    "a list": ([WATCH], UnknownOp),
    "a name": ("watch", UnknownOp),
    "a number": (5, UnknownOp),
    "an empty object": ({}, UnknownOp),
    "unknown kind": ({"kind": "moon"}, UnknownOp),
    "kind that is a list": ({"kind": ["watch"]}, UnknownOp),
    "evidence as a gate": (HITS, UnknownOp),
    "gate as evidence": (WATCH | {"evidence": WATCH}, UnknownOp),
    "pool as a list": (WATCH | {"pool": [{"kind": "rate", "scope": "running"}]}, BadRule),
    "pool as a name": (WATCH | {"pool": "rate"}, UnknownOp),
    "unknown key": (WATCH | {"colour": 1}, BadPlanFile),
    "missing key": ({key: value for key, value in WATCH.items() if key != "pool"}, BadPlanFile),
    "threshold as a string": (WATCH | {"threshold": "0.5"}, BadRule),
    "threshold as a bool": (WATCH | {"threshold": True}, BadRule),
    "threshold as a list": (WATCH | {"threshold": [0.5]}, BadRule),
    "threshold without end": (WATCH | {"threshold": 10**400}, BadRule),
    "no threshold": (WATCH | {"threshold": None}, BadRule),
    "latents as a string": (WATCH | {"evidence": HITS | {"latents": "12"}}, BadRule),
    "latents in a list": (WATCH | {"evidence": HITS | {"latents": [[1]]}}, BadRule),
    "latents twice": (WATCH | {"evidence": HITS | {"latents": [1, 1]}}, BadRule),
    "no latents": (WATCH | {"evidence": HITS | {"latents": None}}, BadRule),
    "latents as a bool": (WATCH | {"evidence": HITS | {"latents": True}}, BadRule),
    "sae as a number": (WATCH | {"evidence": HITS | {"sae": 5}}, BadRule),
    "sae as a list": (WATCH | {"evidence": HITS | {"sae": ["a"]}}, BadRule),
    "sae without a name": (WATCH | {"evidence": HITS | {"sae": ""}}, BadRule),
    "site as a number": (WATCH | {"evidence": HITS | {"site": 5}}, BadRule),
    "site that is none": (WATCH | {"evidence": HITS | {"site": "moon.1"}}, SiteNotFound),
    "special as a string": (WATCH | {"evidence": HITS | {"special": "no"}}, BadRule),
    "special as a number": (WATCH | {"evidence": HITS | {"special": 1}}, BadRule),
    "scope": (WATCH | {"pool": {"kind": "rate", "scope": "all"}}, BadRule),
    "scope as a list": (WATCH | {"pool": {"kind": "rate", "scope": ["prompt"]}}, BadRule),
    "endless window": (WATCH | {"pool": {"kind": "window", "width": 10**15}}, BadRule),
    "window of a half": (WATCH | {"pool": {"kind": "window", "width": 0.5}}, BadRule),
    "window without a width": (WATCH | {"pool": {"kind": "window"}}, BadPlanFile),
    "not of a list": ({"kind": "not", "gate": [WATCH]}, BadRule),
    "not of nothing": ({"kind": "not", "gate": None}, UnknownOp),
    "and of nothing": ({"kind": "and", "gates": []}, BadRule),
    "and of names": ({"kind": "and", "gates": ["always"]}, UnknownOp),
    "weights as a number": (HEAD | {"weights": 1.0}, BadRule),
    "weights as a string": (HEAD | {"weights": "1"}, BadRule),
    "weights in a list": (HEAD | {"weights": [[1.0]]}, BadRule),
    "weights of another number": (HEAD | {"weights": [1.0, 2.0]}, BadRule),
    "pooling that is none": (HEAD | {"pooling": ["median"]}, BadRule),
    "pooling as a number": (HEAD | {"pooling": 1}, BadRule),
    "pooling in a list": (HEAD | {"pooling": [["max"]]}, BadRule),
    "no pooling": (HEAD | {"pooling": []}, BadRule),
    "caps of another number": (
        WATCH | {"evidence": {"kind": "log_odds", "latents": [1], "weights": [1.0], "caps": []}},
        BadRule,
    ),
    "fewer tokens than k": (WATCH | {"pool": {"kind": "top_k_mean", "k": 3, "width": 2}}, BadRule),
    "floor as a string": (WATCH | {"pool": {"kind": "top_k_mean", "k": 1, "floor": "0"}}, BadRule),
    "pair that takes away": (PILED | {"pairs": [5, 6], "pair_weights": [-0.1]}, BadRule),
    "piled words without a weight": (PILED | {"weights": []}, BadRule),
    "pair that is twice there": (PILED | {"pairs": [5, 6, 5, 6], "pair_weights": [1.0, 1.0]}, BadRule),
    "words without a weight": (TABLE | {"weights": []}, BadRule),
    "word twice": (TABLE | {"tokens": [5, 5], "weights": [1.0, 1.0], "squares": [1.0, 1.0]}, BadRule),
    "word that is no id": (TABLE | {"tokens": [-1]}, BadRule),
    "word as a string": (TABLE | {"tokens": ["a"]}, BadRule),
    "pair of three": (TABLE | {"pairs": [1, 2, 3], "pair_weights": [1.0], "pair_squares": [1.0]}, BadRule),
    "root of less than nothing": (TABLE | {"squares": [-1.0]}, BadRule),
    "root of nothing": (TABLE | {"floor": 0.0}, BadRule),
    "window of words without end": (TABLE | {"last": 10**9}, BadRule),
    "blend of heads": ({"kind": "blend", "gates": [HEAD], "weights": [1.0], "threshold": 0.0}, BadRule),
    "blend of nothing": ({"kind": "blend", "gates": [], "weights": [], "threshold": 0.0}, BadRule),
    "blend with too many weights": ({"kind": "blend", "gates": [WATCH], "weights": [1, 1], "threshold": 0.0}, BadRule),
    "direction of zeros": ({"kind": "cosine", "direction": [0.0], "threshold": 0.1}, BadRule),
    "direction of nothing": ({"kind": "cosine", "direction": [], "threshold": 0.1}, BadRule),
    "probe of nothing": (WATCH | {"evidence": {"kind": "probe", "weights": []}}, BadRule),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", HOSTILE)
def test_plan_file_with_a_gate_that_is_none_is_refused_by_name(name):
    entry, error = HOSTILE[name]

    with pytest.raises(error) as caught:
        Plan.from_json(text_with(entry))
    assert type(caught.value) is error


@pytest.mark.usefixtures("without_type_checks")
def test_plan_file_whose_gates_nest_without_end_is_refused_by_name():
    for levels in (DEEPEST, 30, 100_000):
        entry = '{"kind":"not","gate":' * levels + json.dumps(WATCH) + "}" * levels
        with pytest.raises((BadPlanFile, BadRule), match="deep"):
            Plan.from_json(text_with("GATE").replace('"GATE"', entry))


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "watch", "rate", "prompt", "hits", "resid_post.1", "a"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["kind", "latents", "gate", "gates", "pool", "site"]), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@pytest.mark.usefixtures("without_type_checks")
def test_damaged_gates_are_read_or_refused_by_name():
    @settings(max_examples=cases(5_000))
    @given(gates(), junk, st.data())
    def check(gate: Gate, value: Any, data: Any) -> None:
        entry = json.loads(plan_with(gate).to_json())["rules"][0]["gate"]
        path = data.draw(st.sampled_from(list(paths(entry))))
        with suppress(SaeguardError):
            Plan.from_json(text_with(put(entry, path, value)))

    check()


def paths(entry: Any, here: tuple[Any, ...] = ()) -> Any:
    """Where something could be put into a JSON document."""
    yield here
    pairs = entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ()
    for key, value in pairs:
        yield from paths(value, (*here, key))


def put(entry: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    inner = put(entry[path[0]], path[1:], value)
    if isinstance(entry, dict):
        return entry | {path[0]: inner}
    return [*entry[: path[0]], inner, *entry[path[0] + 1 :]]


WATCHED = Watch(Hits((1,)), Rate(), 0.5)
BAD: dict[str, Any] = {
    "negative latent": lambda: Hits((-1,)),
    "latent that is a float": lambda: LogOdds((1.0,), (1.0,)),  # type: ignore[arg-type]
    "latents that are none": lambda: Hits(None),  # type: ignore[arg-type]
    "NaN level": lambda: Hits((1,), math.nan),
    "levels": lambda: Hits((1,), (0.5,)),  # type: ignore[arg-type]
    "infinite weight": lambda: LogOdds((1,), (math.inf,)),
    "too few weights": lambda: LogOdds((1, 2), (1.0,)),
    "one weight that is no tuple": lambda: Probe(1.0),  # type: ignore[arg-type]
    "probe without weights": lambda: Probe(()),
    "evidence that is none": lambda: Watch(Peak(), Rate(), 0.5),  # type: ignore[arg-type]
    "pool that is a class": lambda: Watch(Hits((1,)), Rate, 0.5),  # type: ignore[arg-type]
    "infinite threshold": lambda: Watch(Hits((1,)), Rate(), math.inf),
    "scope": lambda: Rate("generated"),  # type: ignore[arg-type]
    "window of none": lambda: Window(0),
    "window that is a bool": lambda: Window(True),
    "window beyond the limit": lambda: Window(MOST + 1),
    "largest of none": lambda: TopKMean(0),
    "NaN drift": lambda: Cusum(math.nan),
    "head without ways": lambda: PooledHead((1,), (), (), 0.0),
    "head with another way": lambda: PooledHead((1,), ("sum",), (1.0,), 0.0),  # type: ignore[arg-type]
    "head with too many weights": lambda: PooledHead((1,), ("max",), (1.0, 1.0), 0.0),
    "direction of zeros": lambda: Cosine((0.0, 0.0), 0.5),
    "site": lambda: Hits((1,), site=3),  # type: ignore[arg-type]
    "special": lambda: Hits((1,), special=None),  # type: ignore[arg-type]
    "and of none": lambda: And(()),
    "or of no gate": lambda: Or((Hits((1,)),)),  # type: ignore[arg-type]
    "not of a class": lambda: Not(Always),  # type: ignore[arg-type]
    "latched number": lambda: Latched(3),  # type: ignore[arg-type]
    "rule with evidence for a gate": lambda: plan_with(Hits((1,))),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", BAD)
def test_gate_that_could_not_run_is_refused_when_it_is_built(name):
    with pytest.raises(BadRule):
        BAD[name]()


class Home:
    """A gate of somebody else."""

    leaves = ()
    monotone = True

    def begin(self, rows: int, device: Any) -> Any:
        return ()

    def step(self, state: Any, seen: Any) -> Any:
        raise NotImplementedError


def test_gate_of_somebody_else_is_refused_also_inside_another():
    """It has no name in a plan file, so that the plan could not be written down."""
    for gate in (Home(), Not(Home()), And((WATCHED, Latched(Home())))):
        with pytest.raises(BadRule, match="Gates: always, watch"):
            plan_with(gate)


def test_token_rate_is_short_for_a_watch():
    assert token_rate([1, 2], 0.5) == Watch(Hits((1, 2)), Rate(), 0.5)
    assert token_rate([1], 3.0, Cusum(0.25), level=0.5, latched=True) == Latched(
        Watch(Hits((1,), 0.5), Cusum(0.25), 3.0)
    )
    assert token_rate((1,), 0.5, "prompt", sae="a", site=Site("resid_pre", 0)).leaves[0].sae == "a"


def test_state_of_a_long_row_stays_as_small_as_it_began():
    for gate in (*LOW, PooledHead((1,), ("max",), (1.0,), 0.0)):
        state = gate.begin(2, CPU)
        row = hits(*[1.0] * 500).rows([0, 0])
        after, _ = gate.step(state, row.seen)

        assert sizes(after) == sizes(state)


def sizes(state: Any) -> list[int]:
    """Bytes that each tensor of a state keeps alive."""
    return [
        n for part in state for n in (sizes(part) if isinstance(part, tuple) else [part.untyped_storage().nbytes()])
    ]


def test_width_of_what_is_read_as_it_is_is_known():
    assert [
        leaf.width for leaf in And((Watch(Probe((1.0,) * D), Peak(), 0.0), Cosine((1.0,), 0.1), WATCHED)).leaves
    ] == [D, 1, None]
