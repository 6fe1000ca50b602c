"""Published actions, each as the rule that says it.

DSG's hot-token clamp, Clamp Prime and the refusal clamp, SpARE's last position, RMU at run time, projection removal.
"""

import random
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache

from saeguard import (
    SAE,
    Add,
    AnyActive,
    AtLeast,
    Clamp,
    ClampAbove,
    Layout,
    Misdirect,
    Plan,
    Project,
    Reduce,
    Reweight,
    Rule,
    Scale,
    Site,
    Splice,
    capture,
    save_sae,
    steer,
)
from saeguard.errors import BadRule, OverlappingRules, PhaseUnknown, UnstableEdit
from saeguard.gates import Count, Hits, Latched, Watch
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy
from saeguard.kernels.stream_parts import orthonormal
from tests import laws, mutants, tiny
from tests.counts import cases
from tests.words import word_tokenizer

KERNELS: tuple[Literal["sliced", "reference"], ...] = ("sliced", "reference")
RAW: Any = tiny.tiny_sae()
TOKENIZER = word_tokenizer()
IDS = tiny.prompt(3, 9)
S = (12, 13, 20)
ANSWER = 30


def streams(model: nn.Module, plan: Any, ids: Tensor = IDS, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """What flows past the SAE's site before and after a plan, and the run."""
    call = {name: options.pop(name) for name in ("attention_mask", "position_ids") if name in options}
    with (
        torch.no_grad(), steer(model, plan, saes=RAW, **options) as run, capture(model, RAW.site, side="before") as old,
        capture(model, RAW.site) as new,
    ):  # fmt: skip
        model(ids, **call)
    return old[RAW.site], new[RAW.site], run


def by_mutant(mutant: Any, *arguments: Any) -> Tensor:
    """The stream behind a block that was hooked by hand."""
    model = tiny.tiny_model()
    with torch.no_grad(), mutant(model.model.layers[1], RAW, *arguments), capture(model, RAW.site) as tape:
        model(IDS)
    return tape[RAW.site]


# --- latents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_dense_hot_token_clamp_of_dsg_is_a_trigger_and_a_clamp(kernel):
    """methods.md 1.3: at a hot token all N latents become -c, also the silent ones; the error is kept."""
    dsg = Plan((Rule("tiny", S, Clamp(-7.0, when="always"), trigger=AnyActive(S), special=True),))

    x, found, _ = streams(tiny.tiny_model(), dsg, kernel=kernel)

    hot = (RAW.encode(x)[..., list(S)] > 0).any(-1)
    assert laws.distance(found, by_mutant(mutants.hot_tokens, S, -7.0, "")) <= laws.TOLERANCE
    assert laws.same_bits(found[~hot], x[~hot])
    assert hot.any()
    assert not hot.all()


def test_law_catches_a_dense_clamp_that_clamps_only_the_active():
    dsg = Plan((Rule("tiny", S, Clamp(-7.0, when="always"), trigger=AnyActive(S), special=True),))
    farrell = Plan((Rule("tiny", S, Clamp(-7.0, when="active"), special=True),))
    wrong = by_mutant(mutants.hot_tokens, S, -7.0, "only the active")

    assert laws.distance(streams(tiny.tiny_model(), dsg)[1], wrong) > 1e-2
    assert laws.distance(streams(tiny.tiny_model(), farrell)[1], wrong) <= laws.TOLERANCE


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("unit", ["activation", "max", "norm"])
def test_clamp_prime_sets_what_is_above_its_threshold_and_nothing_else(unit, kernel):
    """methods.md 8.2: f > thr becomes c; what is active but faint stays."""
    above = {"activation": (20.0, 10.0, 9.0), "max": (2.0, 1.0, 1.5), "norm": (0.4, 0.3, 0.2)}[unit]
    plan = Plan((Rule("tiny", S, ClampAbove(-3.0, above=above, unit=unit), special=True),))

    x, found, _ = streams(tiny.tiny_model(), plan, kernel=kernel)

    f = RAW.encode(x)[..., list(S)]
    of = {"activation": 1.0, "max": RAW.maximum[list(S)], "norm": x.norm(dim=-1, keepdim=True)}[unit]
    set_ = f > torch.tensor(above) * of
    expected = x + torch.where(set_, -3.0 * of - f, 0.0) @ RAW.W_dec[list(S)]
    assert laws.distance(found, expected) <= laws.TOLERANCE
    assert set_.any()
    assert ((f > 0) & ~set_).any()


def test_clamp_above_zero_is_the_clamp_of_what_is_active():
    prime = Plan((Rule("tiny", S, ClampAbove((1.0, 2.0, -3.0), above=0.0)),))
    active = Plan((Rule("tiny", S, Clamp((1.0, 2.0, -3.0), when="active")),))

    assert laws.same_bits(streams(tiny.tiny_model(), prime)[1], streams(tiny.tiny_model(), active)[1])


@pytest.mark.parametrize("kernel", KERNELS)
def test_refusal_clamp_sets_another_latent_and_leaves_the_watched_ones(kernel):
    """methods.md 8.2: where any of S is above thr, the refusal latent becomes v; S is not touched."""
    refusal = Clamp(40.0, when="always")
    plan = Plan((Rule("tiny", (ANSWER,), refusal, trigger=AnyActive(S, 1.5), special=True),))

    x, found, _ = streams(tiny.tiny_model(), plan, kernel=kernel)

    f = RAW.encode(x)
    hot = (f[..., list(S)] > 1.5).any(-1, keepdim=True)
    assert laws.distance(found, x + torch.where(hot, 40.0 - f[..., [ANSWER]], 0.0) * RAW.W_dec[ANSWER]) <= 1e-5
    assert laws.same_bits(found[~hot[..., 0]], x[~hot[..., 0]])
    assert hot.any()
    assert not hot.all()


def test_reduce_takes_off_no_more_than_there_is():
    plan = Plan((Rule("tiny", S, Reduce((1.0, 100.0, 0.0)), special=True),))

    x, found, _ = streams(tiny.tiny_model(), plan)
    f = RAW.encode(x)[..., list(S)]

    expected = x - f.minimum(torch.tensor((1.0, 100.0, 0.0))) @ RAW.W_dec[list(S)]
    assert laws.distance(found, expected) <= laws.TOLERANCE


def test_reduce_leaves_negative_activations_alone():
    """Under kinds whose activations can be negative "not below 0" once would have raised them to 0."""
    eye, zero = torch.eye(2), torch.zeros(2)
    sae = SAE("signed", eye, zero, eye, zero, "topk_norelu", top_k=2, site=laws.STACK_SITE)
    stack = laws.Stack(2)

    with steer(stack, Plan((Rule("signed", (0, 1), Reduce(2.0), special=True),)), saes=sae, layout=Layout("blocks")):
        found = stack(inputs_embeds=torch.tensor([[[-1.0, 1.0], [3.0, -4.0]]]))

    assert found.tolist() == [[[-1.0, 0.0], [1.0, -4.0]]]


# --- the last position ------------------------------------------------------------------------------------------------

SPARE = Plan(
    (Rule("tiny", S, Reduce(2.0), phase="last"), Rule("tiny", (ANSWER, 31), AtLeast((90.0, 80.0)), phase="last"))
)  # fmt: skip
EVERY = Plan((Rule("tiny", (ANSWER,), Add(3.0), phase="newest", special=True),))
AT_LAST = Plan((Rule("tiny", (ANSWER,), Add(3.0), phase="last", special=True),))


def padded(lengths: tuple[int, ...], side: str) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(lengths), max(lengths) + 2), tiny.PAD)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        at = slice(0, n) if side == "right" else slice(ids.shape[1] - n, ids.shape[1])
        ids[row, at], mask[row, at] = IDS[0, :n], 1
    return ids, mask


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def where_edited(run: Any) -> tuple[Any, ...]:
    return run.report.rules[0].edited_positions[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_spare_edits_the_last_token_of_each_prompt_whatever_the_padding(side):
    ids, mask = padded((9, 4, 6), side)
    with steer(tiny.tiny_model(), SPARE, saes=RAW, prompt_tokens=(9, 4, 6)) as run, torch.no_grad():
        found = tiny.tiny_model()(ids, attention_mask=mask, position_ids=places(mask)).logits

    for row, n in enumerate((9, 4, 6)):
        with steer(tiny.tiny_model(), SPARE, saes=RAW, prompt_tokens=n) as alone, torch.no_grad():
            logits = tiny.tiny_model()(IDS[:1, :n]).logits
        real = mask[row].bool()
        assert laws.distance(found[row, real], logits[0]) <= laws.TOLERANCE
        assert all({*rule.edited_positions[0][0]} <= {n - 1} for rule in alone.report.rules)
        assert alone.report.rules[1].edited_positions[0][0] == (n - 1,)
        assert [rule.edited_positions[0][row] for rule in run.report.rules] == [
            rule.edited_positions[0][0] for rule in alone.report.rules
        ]


def test_law_catches_a_last_position_that_is_counted_by_index():
    """Column -1 of a prompt that is padded on the right is padding: an edit there changes nothing that counts."""
    model, plan = tiny.tiny_model(), Plan((Rule("tiny", S, Clamp(-9.0, when="active"), phase="last", special=True),))
    edits = lambda n: streams(model, plan, IDS[:1, :n], prompt_tokens=n)[2].report.rules[0].tokens_edited
    n = next(n for n in range(2, 10) if edits(n))
    ids, mask = padded((n,), "right")

    def logits(block: Any, ids: Tensor, **call: Tensor) -> Tensor:
        with torch.no_grad(), block:
            return model(ids, **call).logits[0, :n]

    call = {"attention_mask": mask, "position_ids": places(mask)}
    by_index = lambda: mutants.last_column(model.model.layers[1], RAW, S, -9.0)
    ours = lambda: steer(model, plan, saes=RAW, prompt_tokens=n)
    assert laws.distance(logits(by_index(), ids, **call), logits(by_index(), IDS[:1, :n])) > 1e-2
    assert laws.distance(logits(ours(), ids, **call), logits(ours(), IDS[:1, :n])) <= laws.TOLERANCE
    assert laws.distance(logits(ours(), IDS[:1, :n]), logits(by_index(), IDS[:1, :n])) <= laws.TOLERANCE


WAYS: dict[str, dict[str, Any]] = {
    "dynamic cache": {}, "no cache": {"use_cache": False}, "static cache": {"cache_implementation": "static"},
    "prompt in chunks": {"prefill_chunk_size": 2}, "drafts": {"prompt_lookup_num_tokens": 2},
}  # fmt: skip
WRITE = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tiny.PAD, "suppress_tokens": [tiny.EOS, tiny.PAD]}


@pytest.mark.parametrize("way", WAYS)
def test_generation_edits_the_last_prompt_token_or_every_newest_one(way):
    """The newest tokens are those at which the next one is chosen: the prompt's last and all that were written."""
    ids, mask = (IDS[:1], torch.ones_like(IDS[:1])) if way == "drafts" else padded((9, 4, 6), "left")
    lengths = mask.sum(1).tolist()

    for plan, expected in ((AT_LAST, lambda n: (n - 1,)), (EVERY, lambda n: tuple(range(n - 1, n + 4)))):
        with steer(tiny.tiny_model(), plan, saes=RAW) as run:
            tiny.tiny_model().generate(ids, attention_mask=mask, **WRITE, **WAYS[way])
        assert where_edited(run) == tuple(expected(n) for n in lengths)


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 8), (4, 9)])
def test_last_and_newest_tokens_do_not_depend_on_how_the_text_is_cut(cuts):
    model, ids = tiny.tiny_model(), tiny.prompt(2, 12)
    for plan in (AT_LAST, EVERY, SPARE):
        with steer(model, plan, saes=RAW, prompt_tokens=(5, 9)) as whole, torch.no_grad():
            expected = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        with steer(model, plan, saes=RAW, prompt_tokens=(5, 9)) as run, torch.no_grad():
            ends = pairwise((0, *cuts, 12))
            found = torch.cat([model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ends], 1)
        assert laws.edited(run) == laws.edited(whole)
        assert laws.distance(found, expected) <= laws.TOLERANCE


def test_first_counts_the_tokens_of_its_phase():
    first = lambda phase, n: Plan((Rule("tiny", (ANSWER,), Add(3.0), phase=phase, first=n, special=True),))

    for phase, n, expected in (("newest", 3, (3, 4, 5)), ("newest", 0, ()), ("last", 7, (3,)), ("last", 0, ())):
        run = streams(tiny.tiny_model(), first(phase, n), IDS[:1], prompt_tokens=4)[2]
        assert where_edited(run) == (expected,)


def test_generation_behind_padding_on_the_right_edits_the_last_real_token():
    ids, mask = padded((9, 4, 6), "right")
    with steer(tiny.tiny_model(), AT_LAST, saes=RAW) as run:
        tiny.tiny_model().generate(ids, attention_mask=mask, **WRITE)

    assert where_edited(run) == ((8,), (3,), (5,))


def test_a_prompt_whose_end_went_by_unseen_is_refused():
    """Read in pieces, a prompt that is padded on the right ends in a piece of which nobody knew that it is the last."""
    ids, mask = padded((9, 4, 6), "right")
    refused = pytest.raises(PhaseUnknown, match="Pad on the left")

    with refused, steer(tiny.tiny_model(), AT_LAST, saes=RAW):
        tiny.tiny_model().generate(ids, attention_mask=mask, **WRITE, prefill_chunk_size=3)


def test_outside_generate_somebody_has_to_say_where_the_prompt_ends():
    with pytest.raises(PhaseUnknown, match="prompt_tokens=n"), steer(tiny.tiny_model(), AT_LAST, saes=RAW):
        tiny.tiny_model()(IDS)


# --- the stream as a whole --------------------------------------------------------------------------------------------

GATE = Latched(Watch(Hits(S), Count(), 2.0))
WHOLE = {
    "misdirect": Rule("tiny", (), Misdirect(20.0, seed=7)),
    "misdirect by norm": Rule("tiny", (), Misdirect(0.5, unit="norm")),
    "project": Rule("tiny", S, Project()), "project too far": Rule("tiny", S, Project(2.0)),
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("unit", ["stream", "norm"])
def test_misdirect_puts_one_direction_in_the_place_of_x_where_its_gate_is_open(unit, kernel):
    rule = Rule("tiny", (), Misdirect(3.0, seed=5, unit=unit), gate=GATE)

    x, found, run = streams(tiny.tiny_model(), Plan((rule,)), kernel=kernel)

    where = torch.zeros(x.shape[:2], dtype=torch.bool)
    for row, places_ in enumerate(where_edited(run)):
        where[row, list(places_)] = True
    u = torch.tensor(Misdirect(1.0, seed=5).direction(tiny.D))
    length = 3.0 * (x.norm(dim=-1, keepdim=True) if unit == "norm" else torch.ones(*x.shape[:2], 1))
    assert laws.distance(found[where], (length * u)[where]) <= laws.TOLERANCE
    assert laws.same_bits(found[~where], x[~where])
    assert where.any()
    assert not where[:, 1:].all()


def test_misdirect_says_the_same_direction_everywhere_and_for_ever():
    """Written out: a saved policy has to point to the same direction on another machine."""
    assert Misdirect(1.0, seed=3).direction(3) == pytest.approx((0.3400607205, 0.7777247599, 0.5286803422))
    assert Misdirect(1.0, seed=3).direction(3) == Misdirect(9.0, seed=3).direction(3)
    assert Misdirect(1.0, seed=3).direction(3) != Misdirect(1.0, seed=4).direction(3)
    assert sum(v * v for v in Misdirect(1.0).direction(500)) == pytest.approx(1.0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("strength", [1.0, 0.25, 2.0])
def test_project_takes_out_the_span_of_rows_that_are_not_orthogonal(strength, kernel):
    latents = (3, 8, 12, 20, 31)
    rule = Rule("tiny", latents, Project(strength), special=True)

    x, found, _ = streams(tiny.tiny_model(), Plan((rule,)), kernel=kernel)

    rows = RAW.W_dec[list(latents)].double()
    span = torch.linalg.pinv(rows) @ rows
    assert laws.distance(found, x.double() - strength * x.double() @ span) <= laws.TOLERANCE
    if strength == 1.0:
        assert float((found.double() @ rows.T).abs().max() / (x.double() @ rows.T).abs().max()) <= 1e-5


def test_law_catches_directions_that_are_taken_out_one_after_the_other():
    latents = (3, 8, 12, 20, 31)
    rows = RAW.W_dec[list(latents)]
    ours = streams(tiny.tiny_model(), Plan((Rule("tiny", latents, Project(), special=True),)))[1]
    in_turn = by_mutant(mutants.takes_out_in_turn, latents)

    assert float((in_turn @ rows.T).abs().max()) > 1e-2
    assert float((ours @ rows.T).abs().max()) <= 1e-3


@settings(max_examples=cases(2_000))
@given(st.integers(1, 7), st.integers(1, 6), st.integers(0, 2**30))
def test_basis_spans_what_the_rows_span_also_where_they_depend_on_each_other(n, d, seed):
    rng = random.Random(seed)
    rows = torch.tensor([[float(rng.randint(-3, 3)) for _ in range(d)] for _ in range(n)])
    rows = torch.cat([rows, rows[:1] * 0.5, rows.sum(0, keepdim=True) * 1e3, torch.zeros(1, d)])

    basis = orthonormal(rows)

    assert basis.shape == (d, int(torch.linalg.matrix_rank(rows.double())))
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5)
    assert torch.allclose(rows @ basis @ basis.T, rows, atol=1e-4 * float(rows.abs().max() + 1))


def test_projecting_twice_is_projecting_once():
    model, plan = tiny.tiny_model(), Plan((Rule("tiny", S, Project(), special=True),))
    after = Plan((Rule("tiny", S, Project(), site=Site("resid_pre", 2), special=True),))

    with torch.no_grad(), steer(model, plan, saes=RAW):
        once = model(IDS).logits
    with torch.no_grad(), steer(model, Plan((*plan.rules, *after.rules)), saes=RAW):
        twice = model(IDS).logits

    assert laws.distance(twice, once) <= laws.TOLERANCE


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_stream_ops_keep_the_models_dtype(name, dtype):
    model = tiny.fresh_model(dtype=dtype)

    x, found, _ = streams(model, Plan((WHOLE[name],)))
    wide, expected, _ = streams(tiny.fresh_model(), Plan((WHOLE[name],)))

    assert found.dtype == dtype
    assert laws.same_bits(found[:, 0], x[:, 0]), "BOS is left alone"
    assert laws.distance(found.float() - x.float(), expected - wide) <= 5e-2


def test_whole_stream_ops_need_a_few_latents_of_an_sae_only(tmp_path):
    source = str(save_sae(RAW, tmp_path / "sae"))
    rule = Rule(source, (3, 8), Project(), trigger=AnyActive((12,)))
    clamp = Rule(source, (5,), Scale(2.0))

    with torch.no_grad(), steer(tiny.tiny_model(), Plan((rule, clamp))) as run:
        found = tiny.tiny_model()(IDS).logits
    with torch.no_grad(), steer(tiny.tiny_model(), Plan((rule, clamp)), saes={source: RAW}):
        expected = tiny.tiny_model()(IDS).logits

    assert laws.same_bits(found, expected)
    assert set(run.saes[source].held or ()) == {3, 8, 12, 5}


def test_ops_beside_a_whole_stream_op_are_added_to_it():
    misdirect, add = Rule("tiny", (), Misdirect(5.0), special=True), Rule("tiny", (4,), Add(2.0), special=True)

    found = streams(tiny.tiny_model(), Plan((misdirect, add)))[1]

    expected = 5.0 * torch.tensor(Misdirect(1.0).direction(tiny.D)) + 2.0 * RAW.W_dec[4]
    assert laws.distance(found, expected.expand_as(found)) <= laws.TOLERANCE


CLASHES = {
    "misdirect twice": (WHOLE["misdirect"], WHOLE["misdirect by norm"], "the sum of both is neither"),
    "misdirect and project": (WHOLE["misdirect"], WHOLE["project"], "the sum of both is neither"),
    "project twice": (WHOLE["project"], Rule("tiny", (1,), Project(), phase="last"), "the sum of both is neither"),
    "misdirect and splice": (WHOLE["misdirect"], Rule("tiny", (), Splice()), "the sum of both is neither"),
    "project and clamp one latent": (WHOLE["project"], Rule("tiny", (12,), Scale(2.0), priority=1), "Keep one of them"),
    "project and reweight": (WHOLE["project"], Rule("tiny", (9,), Reweight(2.0, mode="swap")), "sets every latent"),
}


@pytest.mark.parametrize("name", CLASHES)
@pytest.mark.parametrize("nested", [False, True])
def test_rules_that_contradict_a_whole_stream_op_are_refused(name, nested):
    first, second, message = CLASHES[name]
    model = tiny.tiny_model()

    if nested:
        with steer(model, Plan((first,)), saes=RAW):
            model(IDS)
            with pytest.raises(OverlappingRules), steer(model, Plan((second,)), saes=RAW):
                pass
    else:
        with pytest.raises(OverlappingRules, match=message), steer(model, Plan((first, second)), saes=RAW):
            pass


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("where", [{"gate": GATE}, {"phase": "generated"}, {"trigger": AnyActive(S)}], ids=str)
def test_whole_stream_ops_edit_alike_in_any_pieces_padding_and_company(name, where):
    model, plan = tiny.tiny_model(), Plan((replace(WHOLE[name], **where),))
    ids, mask = padded((9, 4, 9), "right")
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, position_ids=places(mask)).logits
        with steer(model, [plan, plan, None], saes=RAW, prompt_tokens=3) as batch:
            found = model(ids, attention_mask=mask, position_ids=places(mask)).logits
        with steer(model, plan, saes=RAW, prompt_tokens=3) as alone:
            expected = model(IDS[:1]).logits
        cache = DynamicCache(config=model.config)
        with steer(model, plan, saes=RAW, prompt_tokens=3) as cut:
            pieces = [
                model(IDS[:1, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 2), (2, 3), (3, 9))
            ]

    assert laws.edited(cut) == laws.edited(alone)
    assert laws.distance(torch.cat(pieces, 1), expected) <= laws.TOLERANCE
    assert laws.distance(found[0, :9], expected[0]) <= laws.TOLERANCE
    assert laws.distance(found[1, :4], expected[0, :4]) <= laws.TOLERANCE
    assert laws.same_bits(found[2], plain[2])
    assert where_edited(batch)[0] == where_edited(alone)[0] != ()
    assert where_edited(batch)[2] == ()


def test_a_guardrail_says_of_a_row_under_a_whole_stream_op_that_it_was_steered():
    model = tiny.fresh_model()
    never = replace(GATE, gate=replace(GATE.gate, threshold=99.0))
    rule = Rule("tiny", (), Misdirect(0.5, unit="norm"))
    gated = {"open": Plan((replace(rule, gate=GATE),)), "shut": Plan((replace(rule, gate=never),))}
    policies = {name: Policy.of(model, TOKENIZER, RAW, plan, name=name) for name, plan in gated.items()}
    plain = model.generate(IDS, **WRITE)

    with Guardrail.attach(model, policies, tokenizer=TOKENIZER, saes=RAW) as guard:
        found = guard.generate(IDS, rows=["open", "shut", "open"], **WRITE)

    assert [one.decision for one in found.decisions] == ["steer", "allow", "steer"]
    assert torch.equal(found.sequences[1], plain[1])


def test_a_direction_that_is_too_long_for_the_models_dtype_is_refused():
    with pytest.raises(UnstableEdit), torch.no_grad():
        streams(tiny.fresh_model(dtype=torch.float16), Plan((Rule("tiny", (), Misdirect(1e9)),)))


BAD: dict[str, Any] = {
    "misdirect some latents": (lambda: Rule("a", (1,), Misdirect(1.0)), "replaces the whole stream"),
    "misdirect with a priority": (lambda: Rule("a", (), Misdirect(1.0), priority=1), "none can yield"),
    "misdirect by several": (lambda: Misdirect((1.0, 2.0)), "not one number"),  # type: ignore[arg-type]
    "misdirect beyond float32": (lambda: Misdirect(1e39), "float32 ends"),
    "misdirect in maxima": (lambda: Misdirect(1.0, unit="max"), "no such unit"),  # type: ignore[arg-type]
    "a negative seed": (lambda: Misdirect(1.0, seed=-1), "no seed"),
    "a seed that is no int": (lambda: Misdirect(1.0, seed=1.5), "no seed"),  # type: ignore[arg-type]
    "project by nan": (lambda: Project(float("nan")), "not a finite number"),
    "project by several": (lambda: Project((1.0,)), "not one number"),  # type: ignore[arg-type]
    "reduce by less than nothing": (lambda: Reduce((1.0, -1.0)), "is negative"),
    "clamp above nan": (lambda: ClampAbove(1.0, above=float("nan")), "not a finite number"),
    "too few thresholds": (lambda: Rule("a", (1, 2), ClampAbove(1.0, above=(1.0,))), "1 amounts were given"),
    "an unknown phase": (lambda: Rule("a", (1,), Add(1.0), phase="final"), "no such phase"),  # type: ignore[arg-type]
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", BAD)
def test_bad_actions_are_refused_by_name(name):
    make, message = BAD[name]

    with pytest.raises(BadRule, match=message):
        make()


def test_actions_have_a_canonical_text():
    """Written out, because signatures of saved plans depend on every byte of it."""
    ops = (
        Rule("a", (1,), ClampAbove(-2, above=0.05)), Rule("a", (2,), Reduce(1)), Rule("a", (), Misdirect(20, seed=3)),
        Rule("b", (4,), Project()),
    )  # fmt: skip
    texts = [
        '{"above":0.05,"kind":"clamp_above","unit":"activation","value":-2.0}',
        '{"amount":1.0,"kind":"reduce","unit":"activation"}',
        '{"amount":20.0,"kind":"misdirect","seed":3,"unit":"stream"}', '{"kind":"project","strength":1.0}',
    ]  # fmt: skip
    plan = Plan(ops)

    assert [text in plan.to_json() for text in texts] == [True] * 4
    assert Plan.from_json(plan.to_json()) == plan
    assert str(ops[2]) == "Misdirect(amount=20.0, seed=3, unit='stream') on a"
    assert str(ops[3]) == "Project(strength=1.0) on b[4]"
