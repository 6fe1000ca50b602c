"""Gates at work in models: a row opens its gates at the same tokens however the model is called.

A case is one plan with gates on one batch, computed in one pass and in another way: in chunks, with a static cache, in
a padded batch, with drafts that are thrown away, with beams that trade places. What is edited, and what the report
says of the gates, has to be the same.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from saeguard import Add, Clamp, Plan, Rule, Site, capture, steer
from saeguard.errors import (
    GateFailed,
    GuardNotApplied,
    LatentOutOfRange,
    PhaseUnknown,
    SiteNotFound,
    TokensUnknown,
    WidthMismatch,
)
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
    TopKMean,
    Watch,
    Window,
    Words,
    WordsCusum,
    token_rate,
)
from saeguard.gating import KEPT
from saeguard.reports import GateReport
from tests import laws, mutants, tiny
from tests.counts import cases

KINDS = ("relu", "jumprelu", "topk")
SAES = [tiny.tiny_sae(activation=kind, name=kind, seed=i) for i, kind in enumerate(KINDS)]
SAES.append(tiny.tiny_sae(name="early", seed=7, site=Site("resid_pre", 1)))
LOUD = Add(40.0)
MARGIN = 1e-3
"""How near to a threshold a score may come; two ways to compute a stream differ in their last bits."""


def ones(n: int = tiny.D) -> tuple[float, ...]:
    return tuple(1.0 if i % 3 else -1.0 for i in range(n))


HEAD = PooledHead((1, 2), ("count", "max", "mean"), (0.25, -0.5, 0.5, -0.25, 1.0, -1.0), -0.3)
CAPPED = Watch(LogOdds((3, 4), (1.0, -1.0), caps=(1.5, 2.5)), TopKMean(2, 4, -1.0), 0.3)
WORDS = Words(
    tuple(range(3, 40)), tuple((i % 7 - 3) / 4 for i in range(37)), (1.0,) * 37,
    tuple(i for first in range(3, 60) for i in (first, first * 5 % 57 + 3)), (0.5,) * 57, (0.5,) * 57, last=4,
    threshold=0.21,
)  # fmt: skip
PILED = WordsCusum(WORDS.tokens, WORDS.weights, WORDS.pairs, WORDS.pair_weights, 0.3, 0.6)
GATES: dict[str, Gate] = {
    "rate": token_rate((1, 2, 3), 0.45),
    "window": token_rate((1, 2), 0.4, Window(4)),
    "cusum": token_rate((1, 2), 0.9, Cusum(0.4)),
    "count": Watch(Hits((1, 2, 3, 4), special=True), Count(), 2.5),
    "log odds": Watch(LogOdds((1, 2), (1.0, -1.0), -0.2), Rate(), 0.1),
    "top k": Watch(LogOdds((3, 4), (1.0, -1.0)), TopKMean(2), 0.4),
    "peak of a probe": Watch(Probe(ones()), Peak(), 3.0),
    "head": HEAD,
    "earlier site": token_rate((1, 2, 3), 0.45, site=Site("resid_pre", 0)),
    "another SAE": token_rate((5, 6), 0.4, sae="early"),
    "latched": Latched(token_rate((1, 2), 0.5, Window(2))),
    "not": Not(token_rate((1, 2), 0.45)),
    "and": And((token_rate((1, 2), 0.3), Not(Watch(Probe(ones(), site=Site("resid_pre", 1)), Rate(), 0.5)))),
    "or": Or((HEAD, Latched(token_rate((4,), 0.6, sae="topk")))),
    "always": Always(),
    "words": WORDS,
    "piled words": PILED,
    "latched words": Latched(replace(WORDS, threshold=0.3)),
    "blend": Blend((CAPPED, WORDS), (0.5, 1.0), 0.6),
}
PROMPT_GATES: dict[str, Gate] = {
    "rate of the prompt": token_rate((1, 2, 3), 0.45, "prompt"),
    "cosine": Cosine(ones(), 0.1),
    "not cosine": Not(Cosine(ones(), 0.14, site=Site("resid_pre", 1))),
}
ALL_GATES = GATES | PROMPT_GATES


def plan_of(gate: Gate | None, sae: str = "relu", op: Any = LOUD, latent: int = 30, **more: Any) -> Plan:
    return Plan((Rule(sae, (latent,), op, gate=gate, **more),))


def full(model: nn.Module, ids: Tensor, **call: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **call).logits


def chunked(model: nn.Module, ids: Tensor, cuts: Sequence[int], cache: Any = None, **call: Any) -> Tensor:
    """Logits of a text in pieces that end at ``cuts``."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    edges = (0, *cuts, ids.shape[1])
    with torch.no_grad():
        return torch.cat([model(ids[:, a:b], past_key_values=cache, **call).logits for a, b in pairwise(edges)], 1)


def said(run: Any, call: int = -1) -> list[tuple[Any, ...]]:
    """Where the gates of the run opened first and how high their scores went, per row."""
    return [
        (gate.gate, gate.first[call], tuple(None if peak is None else round(peak, 3) for peak in gate.peak[call]))
        for gate in run.report.gates
    ]


def opens(run: Any, call: int = -1) -> list[tuple[int | None, ...]]:
    return [gate.first[call] for gate in run.report.gates]


def scores(run: Any) -> list[Tensor]:
    """All scores of the run's last call that decided something."""
    histories = run.calls[-1].memory.histories
    return [trace.score[trace.real] for history in histories.values() if (trace := history.trace) is not None]


def hesitates(gate: Any, run: Any) -> bool:
    """Whether a score of the run lies so near a threshold that another way to compute it may decide otherwise."""
    thresholds = [part.threshold for part in parts(gate) if hasattr(part, "threshold")]
    traced = [score for one in scores(run) for score in one.tolist()]
    return any(abs(score - threshold) < MARGIN for score in traced for threshold in thresholds)


def parts(gate: Any) -> list[Any]:
    inner = [*getattr(gate, "gates", ()), *([gate.gate] if hasattr(gate, "gate") else [])]
    return [gate, *(part for one in inner for part in parts(one))]


def words(rows: int, width: int, seed: int) -> Tensor:
    """Any ids, special ones included."""
    return torch.randint(0, tiny.VOCAB, (rows, width), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=cases(500))
@given(st.sampled_from(tiny.ARCHITECTURES), st.sampled_from(sorted(ALL_GATES)), st.sampled_from(KINDS),
       st.integers(0, 2**30), st.data())  # fmt: skip
def test_any_chunking_opens_gates_where_a_full_pass_does(architecture, name, sae, seed, data):
    model, ids = tiny.tiny_model(architecture), words(data.draw(st.integers(1, 3)), data.draw(st.integers(2, 12)), seed)
    cuts = sorted(data.draw(st.sets(st.integers(1, ids.shape[1] - 1))))
    prompts = data.draw(st.lists(st.integers(0, ids.shape[1]), min_size=len(ids), max_size=len(ids)))
    plan = plan_of(ALL_GATES[name], sae)
    assume(not laws.near_edge(model, plan, SAES, ids, prompt_tokens=prompts))

    with steer(model, plan, saes=SAES, prompt_tokens=prompts) as whole:
        expected = full(model, ids)
    assume(not hesitates(ALL_GATES[name], whole))
    with steer(model, plan, saes=SAES, prompt_tokens=prompts) as cut:
        found = chunked(model, ids, cuts)

    assert laws.edited(cut) == laws.edited(whole)
    assert opens(cut) == opens(whole)
    assert laws.distance(found, expected) <= 10 * laws.TOLERANCE


@settings(max_examples=cases(500))
@given(st.sampled_from(tiny.ARCHITECTURES), st.sampled_from(sorted(ALL_GATES)), st.sampled_from(KINDS),
       st.sampled_from(("left", "right", "inside")), st.integers(0, 2**30), st.data())  # fmt: skip
def test_padding_and_batch_mates_open_no_gate(architecture, name, sae, side, seed, data):
    model, length = tiny.tiny_model(architecture), data.draw(st.integers(1, 9))
    text, prompt = words(1, length, seed), data.draw(st.integers(0, length))
    width, plan = length + data.draw(st.integers(1, 6)), plan_of(ALL_GATES[name], sae)
    taken = {
        "left": list(range(width - length, width)), "right": list(range(length)),
        "inside": sorted(data.draw(st.permutations(range(width)))[:length]),
    }[side]  # fmt: skip
    ids, mask = words(2, width, seed + 1), torch.zeros(2, width, dtype=torch.long)
    ids[0, taken], mask[0, taken], mask[1] = text[0], 1, 1
    options: Any = {"saes": SAES, "prompt_tokens": prompt}
    assume(not laws.near_edge(model, plan, SAES, text, prompt_tokens=prompt))

    with steer(model, plan, **options) as alone:
        full(model, text)
    assume(not hesitates(ALL_GATES[name], alone))
    with steer(model, plan, **options) as batched:
        full(model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))

    assert laws.edited(batched)[plan.rules[0]][0][0] == laws.edited(alone)[plan.rules[0]][0][0]
    assert opens(batched)[0][0] == opens(alone)[0][0]


WAYS: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt in chunks of 2": {"prefill_chunk_size": 2},
}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [tiny.PAD, tiny.BOS, tiny.EOS]}


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, **({"attention_mask": torch.ones_like(ids)} | GREEDY | options))


@pytest.mark.parametrize("name", ALL_GATES)
@pytest.mark.parametrize("way", WAYS)
def test_generation_opens_gates_where_a_full_pass_over_its_text_does(name, way):
    model, plan, ids = tiny.tiny_model(), plan_of(ALL_GATES[name]), tiny.prompt(2, 6, seed=3)
    with steer(model, plan, saes=SAES) as run:
        sequences = generate(model, ids, **WAYS[way])
    with steer(model, plan, saes=SAES, prompt_tokens=6) as whole:
        full(model, sequences[:, :-1])

    assert laws.edited(run) == laws.edited(whole)
    assert said(run) == said(whole)


def test_gates_of_these_tests_open_and_close():
    """The laws above would hold too if nothing ever opened, or closed."""
    model, ids = tiny.tiny_model(), words(12, 12, 0)
    for name, gate in ALL_GATES.items():
        with steer(model, plan_of(gate), saes=SAES, prompt_tokens=6) as run:
            full(model, ids)
        edits = [len(row) for row in run.report.rules[0].edited_positions[0]]
        with steer(model, plan_of(None), saes=SAES, prompt_tokens=6) as always:
            full(model, ids)
        total = [len(row) for row in always.report.rules[0].edited_positions[0]]

        assert sum(edits) > 0, name
        assert name == "always" or sum(edits) < sum(total), name


def test_left_padded_generation_says_what_each_row_alone_says():
    model, ids = tiny.tiny_model(), tiny.prompt(1, 8, seed=5)
    padded, mask = torch.full((2, 10), tiny.PAD), torch.zeros(2, 10, dtype=torch.long)
    lengths = (8, 3)
    for row, length in enumerate(lengths):
        padded[row, 10 - length :], mask[row, 10 - length :] = ids[0, :length], 1
    for name, gate in ALL_GATES.items():
        with steer(model, plan_of(gate), saes=SAES) as batched:
            generate(model, padded, attention_mask=mask, max_new_tokens=5)
        for row, length in enumerate(lengths):
            with steer(model, plan_of(gate), saes=SAES) as alone:
                generate(model, ids[:, :length], max_new_tokens=5)

            assert laws.edited_by_row(batched)[row : row + 1] == (laws.edited_by_row(alone) or [{}]), name
            assert opens(batched)[0][row] == opens(alone)[0][0], name


def test_row_that_ended_says_nothing_more():
    """What follows the end of a row in its batch, filler that is no special token here, opens no gate of it."""
    model, ids = tiny.tiny_model(), tiny.prompt(2, 5, seed=1)
    plan = plan_of(Watch(Probe(ones(), special=True), Peak(), 1e9), special=True)
    with steer(model, plan, saes=SAES, special_ids=()) as free:
        first = generate(model, ids)
    end = int(first[0, 7])
    for row in range(2):
        with steer(model, plan, saes=SAES, special_ids=()) as alone:
            generate(model, ids[row : row + 1], eos_token_id=end, pad_token_id=9)
        with steer(model, plan, saes=SAES, special_ids=()) as run:
            generate(model, ids, eos_token_id=end, pad_token_id=9)

        assert said(run)[0][2][row] == said(alone)[0][2][0]
    assert free.report.gates[0].fired == 0


@pytest.mark.parametrize("name", ["rate", "head", "earlier site", "another SAE"])
def test_closed_gate_leaves_rows_bit_for_bit(name):
    model, ids = tiny.tiny_model(), tiny.prompt(3, 8, seed=2)
    gate = And((GATES[name], Watch(Hits((1,)), Count(), 1e6)))
    with steer(model, plan_of(gate), saes=SAES) as run:
        found = full(model, ids)

    assert laws.same_bits(found, full(model, ids))
    assert run.report.rules[0].tokens_edited == 0


def test_every_row_has_its_own_gates_by_its_own_plan():
    model, ids = tiny.tiny_model(), words(4, 10, 4)
    plans = [plan_of(GATES["rate"]), None, plan_of(GATES["window"], latent=31), plan_of(GATES["rate"])]
    with steer(model, plans, saes=SAES) as run:
        found = full(model, ids)

    assert laws.same_bits(found[1], full(model, ids)[1])
    for row in (0, 2, 3):
        with steer(model, plans[row], saes=SAES) as alone:
            full(model, ids[row : row + 1])
        assert laws.edited_by_row(run)[row] == (laws.edited_by_row(alone) or [{}])[0]


def test_gate_that_two_sites_share_is_stepped_once_per_pass(monkeypatch):
    gate = token_rate((1, 2, 3), 0.45, sae="early", site=Site("resid_pre", 1))
    plan = Plan(
        (Rule("relu", (30,), LOUD, gate=gate), Rule("relu", (31,), LOUD, gate=gate, site=Site("resid_post", 2)))
    )
    model, ids, steps = tiny.tiny_model(), tiny.prompt(2, 6), []
    step = Watch.step
    monkeypatch.setattr(Watch, "step", lambda self, *args: steps.append(1) or step(self, *args))
    with steer(model, plan, saes=SAES) as run:
        sequences = generate(model, ids)

    assert len(steps) == sequences.shape[1] - 6
    assert len(run.report.gates) == 1
    assert run.report.rules[0].edited_positions == run.report.rules[1].edited_positions


def test_gates_of_nested_blocks_are_those_of_one_plan():
    model, ids = tiny.tiny_model(), words(2, 10, 6)
    outer, inner = plan_of(GATES["rate"]), plan_of(GATES["window"], latent=31)
    with steer(model, outer, saes=SAES) as first, steer(model, inner, saes=SAES) as second:
        nested = chunked(model, ids, (3, 4))
    with steer(model, Plan((*outer.rules, *inner.rules)), saes=SAES) as both:
        joint = chunked(model, ids, (3, 4))

    assert laws.edited(first) | laws.edited(second) == laws.edited(both)
    assert opens(first) + opens(second) == opens(both)
    assert laws.distance(nested, joint) <= laws.TOLERANCE


def test_rule_that_yields_acts_where_the_gate_of_the_other_is_closed():
    model, ids = tiny.tiny_model(), words(4, 10, 0)
    gated = Rule("relu", (30,), Clamp(50.0, when="always"), gate=GATES["window"], priority=1)
    other = Rule("relu", (30,), Clamp(-50.0, when="always"), priority=0)
    with steer(model, Plan((gated, other)), saes=SAES) as run:
        full(model, ids)
    by_rule = {bound.rule: entry.edited_positions[0] for bound, entry in zip(run.rules, run.report.rules, strict=True)}

    for row in range(4):
        assert not set(by_rule[gated][row]) & set(by_rule[other][row])
    assert all(any(rows) for rows in by_rule.values())


@pytest.mark.parametrize("name", PROMPT_GATES)
def test_gate_over_the_prompt_is_refused_where_nobody_says_where_it_ends(name):
    refused = pytest.raises(PhaseUnknown, match="prompt_tokens=n")

    with refused, steer(tiny.tiny_model(), plan_of(PROMPT_GATES[name]), saes=SAES):
        full(tiny.tiny_model(), tiny.prompt(1, 4))


def test_gate_that_reads_behind_the_edit_is_refused():
    gate = token_rate((1, 2), 0.4, site=Site("resid_post", 2))
    refused = pytest.raises(GuardNotApplied, match="has to write behind what it reads")

    with refused, steer(tiny.tiny_model(), plan_of(gate), saes=SAES):
        full(tiny.tiny_model(), tiny.prompt(1, 4))


def test_gate_that_leaves_special_tokens_out_is_refused_where_ids_are_unknown():
    model = tiny.tiny_model()
    embeds = model.get_input_embeddings()(tiny.prompt(1, 4))
    refused = pytest.raises(TokensUnknown, match="special=True")

    with refused, steer(model, plan_of(GATES["rate"], special=True), saes=SAES):
        model(inputs_embeds=embeds)


BOUND: dict[str, tuple[Gate, type[Exception]]] = {
    "probe of another width": (Watch(Probe((1.0,) * 16), Peak(), 0.5), WidthMismatch),
    "direction of another width": (Cosine((1.0,) * 33, 0.5), WidthMismatch),
    "latent that is not there": (token_rate((48,), 0.5), LatentOutOfRange),
    "latent that another SAE does not have": (token_rate((48,), 0.5, sae="early"), LatentOutOfRange),
    "SAE of another width": (token_rate((1,), 0.5, sae="narrow"), WidthMismatch),
    "layer that is not there": (token_rate((1,), 0.5, site=Site("resid_pre", 3)), SiteNotFound),
    "SAE without a site": (token_rate((1,), 0.5, sae="anywhere"), SiteNotFound),
}


@pytest.mark.parametrize("name", BOUND)
def test_gate_that_does_not_fit_is_refused_before_the_model_is_touched(name):
    gate, error = BOUND[name]
    others = [tiny.tiny_sae(d_in=16, name="narrow"), replace(tiny.tiny_sae(name="anywhere", seed=4), site=None)]

    with pytest.raises(error):
        steer(tiny.tiny_model(), plan_of(And((Always(), gate))), saes=[*SAES, *others]).__enter__()


def test_gate_over_no_latents_of_another_sae_needs_none():
    with steer(tiny.tiny_model(), plan_of(Not(token_rate((), 0.5, sae="elsewhere"))), saes=SAES) as run:
        full(tiny.tiny_model(), tiny.prompt(1, 4))

    assert opens(run) == [(1,)]


# Caches


@contextmanager
def columns_passed(model: nn.Module) -> Iterator[list[int]]:
    """How many columns each pass of the model has."""
    widths: list[int] = []
    handle = model.get_submodule("model.layers.0").register_forward_pre_hook(
        lambda module, args: widths.append(args[0].shape[1])
    )
    try:
        yield widths
    finally:
        handle.remove()


def test_prompt_lookup_goes_back_over_rejected_drafts():
    """The prompt repeats itself, so drafts are made; the edits make some of them wrong."""
    model, ids, rejected = tiny.tiny_model(), tiny.prompt(1, 5, seed=1).repeat(1, 4), 0
    for name, gate in ALL_GATES.items():
        with steer(model, plan_of(gate), saes=SAES) as plain:
            expected = generate(model, ids, max_new_tokens=10)
        with steer(model, plan_of(gate), saes=SAES) as drafted, columns_passed(model) as widths:
            found = generate(model, ids, max_new_tokens=10, prompt_lookup_num_tokens=3)
        rejected += sum(widths) > found.shape[1] - 1

        assert torch.equal(found, expected), name
        assert laws.edited(drafted) == laws.edited(plain), name
        assert said(drafted) == said(plain), name
    assert rejected, "no draft was thrown away"


def test_assistant_s_drafts_leave_no_trace_in_a_gate():
    model, assistant, ids = tiny.tiny_model(), tiny.fresh_model(seed=1), tiny.prompt(1, 6, seed=4)
    for gate in ALL_GATES.values():
        with steer(model, plan_of(gate), saes=SAES) as plain:
            expected = generate(model, ids, max_new_tokens=8)
        with steer(model, plan_of(gate), saes=SAES) as drafted:
            found = generate(model, ids, max_new_tokens=8, assistant_model=assistant)

        assert torch.equal(found, expected)
        assert said(drafted) == said(plain)


BEAMS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3}


@pytest.mark.parametrize(("architecture", "name"), [*(("llama", name) for name in ALL_GATES), ("gpt2", "top k")])
def test_gates_follow_beams_that_trade_places(architecture, name):
    """Without a cache every step computes its rows again, so that no memory has to follow anything."""
    model, plan, ids = tiny.tiny_model(architecture), plan_of(ALL_GATES[name]), tiny.prompt(2, 6, seed=8)
    with steer(model, plan, saes=SAES):
        expected = generate(model, ids, use_cache=False, **BEAMS)
    with steer(model, plan, saes=SAES, prompt_tokens=6) as whole:
        full(model, expected[:, :-1])
    for way in ({}, {"prefill_chunk_size": 4}):
        with steer(model, plan, saes=SAES) as followed:
            found = generate(model, ids, **BEAMS, **way)

        assert torch.equal(found, expected)
        assert by_request(opens(followed)[0]) == by_request(opens(whole)[0])


def by_request(first: Sequence[int | None]) -> list[list[int]]:
    """Where the beams of each request opened, in no order: that of what is returned is not that of the last pass."""
    places = [-1 if place is None else place for place in first]
    return [sorted(places[i : i + 3]) for i in range(0, len(places), 3)]


def test_beams_whose_reordering_nobody_saw_are_refused(monkeypatch):
    """A model may have a method of its own for it."""
    model = tiny.fresh_model()
    reorder = lambda cache, rows: [layer.reorder_cache(rows) for layer in cache.layers] and cache
    model._reorder_cache = reorder  # type: ignore[attr-defined]

    refused = pytest.raises(GateFailed, match="not reordered where saeguard could see it")

    with refused, steer(model, plan_of(GATES["rate"]), saes=SAES):
        generate(model, tiny.prompt(1, 6), **BEAMS)


def test_sampled_sequences_of_a_row_have_a_gate_each():
    model, ids = tiny.tiny_model(), tiny.prompt(2, 5, seed=1)
    torch.manual_seed(0)
    with steer(model, plan_of(GATES["window"]), saes=SAES) as run:
        sequences = generate(model, ids, do_sample=True, num_return_sequences=3)
    with steer(model, plan_of(GATES["window"]), saes=SAES) as whole:
        full(model, sequences[:, :-1])

    assert laws.edited(run) == laws.edited(whole)
    assert said(run) == said(whole)
    assert len(set(opens(run)[0])) > 1


@pytest.mark.parametrize("name", ALL_GATES)
def test_cache_that_goes_on_in_a_second_call_is_remembered(name):
    """A conversation; and the report of the first call does not change when the second one goes on."""
    model, ids, more = tiny.tiny_model(), tiny.prompt(2, 5, seed=3), words(2, 4, 11)
    cache = DynamicCache(config=model.config)
    with steer(model, plan_of(ALL_GATES[name]), saes=SAES) as run:
        first = generate(model, ids, past_key_values=cache)
        before = said(run, 0)
        turn = torch.cat([first, more], 1)
        second = generate(model, turn, past_key_values=cache)
    with steer(model, plan_of(ALL_GATES[name]), saes=SAES, prompt_tokens=turn.shape[1]) as whole:
        full(model, second[:, :-1])

    assert said(run, 0) == before
    start = first.shape[1] - 1
    late = [tuple(at for at in row if at >= start) for row in whole.report.rules[0].edited_positions[0]]
    assert list(run.report.rules[0].edited_positions[1]) == late


def test_cache_that_was_filled_outside_of_the_block_is_refused():
    model, ids, cache = tiny.tiny_model(), tiny.prompt(1, 6), DynamicCache()
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)

    with (
        pytest.raises(GateFailed, match="has not seen the tokens before"),
        steer(model, plan_of(GATES["rate"]), saes=SAES),
    ):
        generate(model, ids, past_key_values=cache)


def test_cache_of_an_earlier_block_is_refused():
    model, ids, cache = tiny.tiny_model(), tiny.prompt(1, 6), DynamicCache()
    with steer(model, plan_of(GATES["rate"]), saes=SAES), torch.no_grad():
        model(ids[:, :4], past_key_values=cache)

    with (
        pytest.raises(GateFailed, match="has not seen the tokens before"),
        steer(model, plan_of(GATES["rate"]), saes=SAES),
    ):
        model(ids[:, 4:], past_key_values=cache)
    assert not {"reorder_cache", "batch_select_indices", "batch_repeat_interleave"} & set(vars(cache))


Change = Callable[[Any, Tensor], tuple[Any, Tensor]]


def cropped(cache: Any, ids: Tensor) -> tuple[Any, Tensor]:
    cache.crop(-3)
    return cache, ids[:, :-3]


def reordered(cache: Any, ids: Tensor) -> tuple[Any, Tensor]:
    rows = torch.tensor([2, 0, 0])
    cache.reorder_cache(rows)
    return cache, ids[rows]


def selected(cache: Any, ids: Tensor) -> tuple[Any, Tensor]:
    rows = torch.tensor([1, 2])
    cache.batch_select_indices(rows)
    return cache, ids[rows]


def repeated(cache: Any, ids: Tensor) -> tuple[Any, Tensor]:
    cache.batch_repeat_interleave(2)
    return cache, ids.repeat_interleave(2, 0)


def copied(cache: Any, ids: Tensor) -> tuple[Any, Tensor]:
    other = copy.deepcopy(cache)
    other.reorder_cache(torch.tensor([1, 1, 1]))  # the first one must not notice
    return cache, ids


def copy_of(cache: Any, ids: Tensor) -> tuple[Any, Tensor]:
    return copy.deepcopy(cache), ids


def copied_and_reordered(cache: Any, ids: Tensor) -> tuple[Any, Tensor]:
    return reordered(copy.deepcopy(cache), ids)


def reordered_and_cropped(cache: Any, ids: Tensor) -> tuple[Any, Tensor]:
    return cropped(*reordered(cache, ids))


CHANGES: list[Change] = [
    cropped, reordered, selected, repeated, copied, copy_of, copied_and_reordered, reordered_and_cropped,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_gate_knows_what_is_done_to_a_cache_between_two_passes(change):
    model, ids, more = tiny.tiny_model(), words(3, 9, 2), words(6, 7, 3)
    for name in ("count", "window", "top k", "peak of a probe", "head", "latched", "another SAE"):
        gate = GATES[name]
        with steer(model, plan_of(gate), saes=SAES) as run:
            cache = DynamicCache(config=model.config)
            chunked(model, ids, (4,), cache)
            cache, past = change(cache, ids)
            now = torch.cat([past, more[: len(past)]], 1)
            logits = chunked(model, now[:, past.shape[1] :], (1, 3), cache)
        with steer(model, plan_of(gate), saes=SAES) as whole:
            expected = full(model, now)

        assert said(run) == said(whole), name
        assert laws.distance(logits, expected[:, past.shape[1] :]) <= 10 * laws.TOLERANCE, name


def test_cache_that_another_call_went_on_with_is_followed():
    model, ids, other = tiny.tiny_model(), words(1, 9, 2), words(1, 5, 7)
    with steer(model, plan_of(GATES["count"]), saes=SAES) as run, torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :6], past_key_values=cache)
        cache.crop(-3)
        text = torch.cat([ids[:, :3], other], 1)
        longer = generate(model, text, past_key_values=cache, max_new_tokens=2)
        cache.crop(-(cache.get_seq_length() - 6))
        model(ids[:, 6:], past_key_values=cache)
    with steer(model, plan_of(GATES["count"]), saes=SAES) as whole:
        full(model, torch.cat([longer[:, :6], ids[:, 6:]], 1))

    assert said(run, 2 if len(run.report.gates[0].first) > 2 else 0) == said(whole)


def test_static_cache_in_a_loop_is_remembered():
    model, ids = tiny.tiny_model(), words(2, 8, 5)
    for gate in (GATES["window"], GATES["or"], GATES["and"]):
        with steer(model, plan_of(gate), saes=SAES) as run:
            chunked(model, ids, (3, 4, 5), StaticCache(config=model.config, max_cache_len=16))
        with steer(model, plan_of(gate), saes=SAES) as whole:
            full(model, ids)

        assert said(run) == said(whole)


def test_gate_goes_back_no_further_than_it_remembers():
    model, ids = tiny.tiny_model(), words(1, KEPT + 20, 5)
    with steer(model, plan_of(GATES["rate"]), saes=SAES), torch.no_grad():
        cache = DynamicCache(config=model.config)
        chunked(model, ids, range(1, ids.shape[1]), cache)
        cache.crop(-(KEPT - 2))
        model(ids[:, -3:-1], past_key_values=cache)
        cache.crop(-8)
        with pytest.raises(GateFailed, match=f"before its latest {KEPT} passes"):
            model(ids[:, :1], past_key_values=cache)


def test_memory_of_a_gate_stays_bounded_over_500_steps():
    model, gate = tiny.tiny_model(), And((GATES["rate"], GATES["peak of a probe"]))
    with steer(model, plan_of(gate), saes=SAES) as run:
        chunked(model, words(2, 500, 1), range(1, 500))
    (history,) = run.calls[0].memory.histories.values()

    assert len(history.steps) == KEPT
    assert len(history.past) <= KEPT
    assert history.trace is not None
    assert history.trace.absolute.tolist() == [list(range(500))] * 2


# Failing closed


READ_NO_STREAM = {"always", "words", "piled words", "latched words"}


@pytest.mark.parametrize("name", sorted(set(GATES) - READ_NO_STREAM))
def test_gate_without_a_score_fails_before_a_token_is_sampled(name):
    model, sampled = tiny.fresh_model(), []
    with torch.no_grad():
        model.get_input_embeddings().weight[11] = float("nan")
    ids = torch.tensor([[tiny.BOS, 5, 6, 11, 7]])
    stop = [lambda ids, scores, **_: bool(sampled.append(1))]

    with pytest.raises(GateFailed, match="nothing was sampled"), steer(model, plan_of(GATES[name]), saes=SAES):
        generate(model, ids, stopping_criteria=stop)
    assert not sampled


@pytest.mark.parametrize("value", [float("nan"), 3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_gate_whose_sae_overflows_fails(value, kind):
    base = tiny.tiny_sae(activation=kind, name="broken", seed=5)
    W_enc = base.W_enc.clone()
    W_enc[:, 1] = value
    gate = Watch(LogOdds((1,), (-1.0,), sae="broken"), Rate(), 0.5)

    with pytest.raises(GateFailed), steer(tiny.tiny_model(), plan_of(gate), saes=[*SAES, replace(base, W_enc=W_enc)]):
        full(tiny.tiny_model(), tiny.prompt(1, 6))


# Threads, dtypes and SAEs of other kinds


def test_threads_of_one_block_have_memories_of_their_own():
    model = tiny.tiny_model()
    texts = [tiny.prompt(1, 5 + i, seed=i) for i in range(4)]
    alone = []
    for text in texts:
        with steer(model, plan_of(GATES["window"]), saes=SAES) as run:
            alone.append(generate(model, text).tolist())
    with steer(model, plan_of(GATES["window"]), saes=SAES) as run, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run.bind(lambda text: generate(model, text).tolist()), texts))

    assert found == alone
    assert len(run.report.gates[0].first) == 4


def test_model_that_is_compiled_inside_the_block_opens_the_same_gates():
    model, ids = tiny.fresh_model(), words(2, 9, 2)
    plan = plan_of(GATES["or"])
    with steer(model, plan, saes=SAES) as run:
        expected = full(model, ids)
    with steer(model, plan, saes=SAES) as compiled:
        found = full(torch.compile(model, backend="eager"), ids)  # type: ignore[arg-type]
    torch.compiler.reset()  # its graphs would keep later tests from hooking models of this class

    assert said(compiled) == said(run)
    assert laws.distance(found, expected) <= laws.TOLERANCE


def test_bfloat16_model_opens_its_gates_by_float32_scores():
    model, ids = tiny.fresh_model(dtype=torch.bfloat16), tiny.prompt(2, 6, seed=3)
    for name, gate in ALL_GATES.items():
        with steer(model, plan_of(gate), saes=SAES) as run:
            generate(model, ids)

        assert all(score.dtype == torch.float64 for score in scores(run)), name


def test_gate_reads_a_transcoder_and_an_sae_on_a_stream_of_another_layer():
    early = replace(tiny.tiny_sae(name="coder", seed=3, site=Site("mlp_in", 1)), site_out=Site("mlp_out", 1))
    plan = plan_of(token_rate((1, 2, 3), 0.3, sae="coder"), sae="relu", site=Site("resid_post", 2))
    model, ids = tiny.tiny_model(), words(3, 9, 3)
    with steer(model, plan, saes=[*SAES, early]) as run:
        chunked(model, ids, (2, 6))
    with capture(model, "mlp_in.1") as tape:
        full(model, ids)
    hit = (early.encode(tape["mlp_in.1"])[..., [1, 2, 3]] > 0).any(-1) & (ids > tiny.EOS)
    n = (ids > tiny.EOS).cumsum(1)
    open_ = (hit.cumsum(1) / n.clamp(min=1) > 0.3) & (ids > tiny.EOS)

    assert [list(row) for row in run.report.rules[0].edited_positions[0]] == [
        row.nonzero()[:, 0].tolist() for row in open_
    ]


def test_report_of_a_gate_is_written_down():
    model, ids = tiny.tiny_model(), tiny.prompt(2, 6)
    with steer(model, plan_of(GATES["rate"]), saes=SAES) as run:
        generate(model, ids)
    (gate,) = run.report.gates

    assert isinstance(gate, GateReport)
    assert gate.fired == sum(place is not None for place in gate.first[0])
    assert f"open in {gate.fired} of 2 rows: Watch(" in str(run.report)
    assert '"gates"' in run.report.to_json()


# Faults that are known from elsewhere


def disagrees(enter: Callable[[], Any], one: Callable[[], Tensor], other: Callable[[], Tensor]) -> float:
    with enter():
        a = one()
    with enter():
        b = other()
    return laws.distance(a, b)


FAULTS = ("pools over padding", "decides by width", "shares its state", "never goes back", "zeroes column 0")


@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_laws_catch_faults_of_published_gates_and_pass_the_same_gate_without_one(fault):
    """Each fault breaks one of: chunks, padding, rows, going back over drafts; the right gate breaks none."""
    model, block = tiny.tiny_model(), tiny.tiny_model().get_submodule("model.layers.1")
    ids, found = words(3, 9, 3).clamp(min=3), []
    padded, mask = torch.cat([ids[:, :1], ids[:, :1], ids[:, :1], ids], 1), torch.ones(3, 12, dtype=torch.long)
    mask[:, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    enter = lambda: mutants.gates(model, block, SAES[0], (1, 2, 3), 40.0, rate=0.45, fault=fault)
    whole = lambda: full(model, ids)
    found.append(disagrees(enter, whole, lambda: chunked(model, ids, (4, 5, 6, 7))))
    found.append(
        disagrees(enter, whole, lambda: full(model, padded, attention_mask=mask, position_ids=positions)[:, 3:])
    )
    found.append(disagrees(enter, lambda: whole()[1:], lambda: full(model, ids[1:])))
    found.append(disagrees(enter, lambda: whole()[:, 5:], lambda: drafts(model, ids)))

    assert (max(found) > 1e-2) == bool(fault), found


def drafts(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of the last tokens, after other ones were tried in their place and thrown away."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        model(ids[:, 1:5].flip(0), past_key_values=cache)
        cache.crop(-4)
        return model(ids[:, 5:], past_key_values=cache).logits
