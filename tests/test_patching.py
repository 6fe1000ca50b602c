"""Latents of one run, put into another: row by row, token by token, in one pass or many; and gradients through edits.

The oracle is a plan with one rule per row, token and latent, whose clamp says the number; and the edit by hand.
"""

from contextlib import ExitStack, nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeguard import (
    Ablate,
    Add,
    AtLeast,
    AtMost,
    Clamp,
    Layout,
    Plan,
    Reduce,
    Rule,
    Scale,
    Site,
    SiteMap,
    capture,
    steer,
)
from saeguard.errors import (
    BadRule,
    LatentOutOfRange,
    OverlappingRules,
    PlanNeverRan,
    RowsMismatch,
    SiteNotFound,
    TokensUnknown,
    UnstableEdit,
)
from saeguard.patching import interchange, patch, read_latents
from saeguard.scoring.attribution import attribution
from saeguard.scoring.losses import Questions
from tests import laws, tiny
from tests.counts import cases
from tests.test_phase import in_chunks
from tests.traces import nothing_left

SITE = Site("resid_post", 1)
SAES = {
    "relu": tiny.tiny_sae(activation="relu", seed=1),
    "jumprelu": tiny.tiny_sae(seed=2),
    "topk": tiny.tiny_sae(activation="topk", seed=3),
    "layer_norm": replace(tiny.tiny_sae(activation="relu", seed=4), norm="layer_norm"),
    "center": replace(tiny.tiny_sae(activation="relu", seed=5), norm="center"),
    "transcoder": replace(
        tiny.tiny_sae(activation="relu", site=Site("mlp_in", 1)), site_out=Site("mlp_out", 1), norm="layer_norm"
    ),
}
MODEL = tiny.tiny_model()
IDS = tiny.prompt(2, 7)


def logits(ids: Tensor = IDS, **call) -> Tensor:
    with torch.no_grad():
        return MODEL(ids, use_cache=False, **call).logits


def padded(ids: Tensor, lengths, side: str) -> dict[str, Tensor]:
    """The rows cut to their lengths and padded to the width of all."""
    width = ids.shape[1]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = ids.masked_fill(~mask, tiny.PAD)
    if side == "left":
        ids = torch.stack([row.roll(width - n) for row, n in zip(ids, lengths, strict=True)])
        mask = mask.flip(1)
    return {"input_ids": ids, "attention_mask": mask.long()}


def as_plans(sae, values: Tensor, latents, positions, where: Tensor) -> list[Plan | None]:
    """The same as plans: a rule for each row, position and latent."""
    plans = []
    for row in range(len(values)):
        rules = [
            Rule(sae.name, (latent,), Clamp(float(values[row, i, j]), when="always"), start=p, stop=p + 1, priority=0)
            for i, p in enumerate(positions)
            for j, latent in enumerate(latents)
            if where[row, i, j]
        ]
        rules = [replace(rule, priority=number) for number, rule in enumerate(rules)]  # one latent at several tokens
        plans.append(Plan(tuple(rules)) if rules else None)
    return plans


@st.composite
def patches(draw):
    sae = SAES[draw(st.sampled_from(sorted(SAES)))]
    latents = tuple(draw(st.lists(st.integers(0, 47), min_size=1, max_size=3, unique=True)))
    positions = draw(st.lists(st.integers(0, 8), min_size=1, max_size=3, unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    values = torch.randint(-8, 33, (2, len(positions), len(latents)), generator=generator) / 4
    where = torch.rand(values.shape, generator=generator) < 0.7
    lengths = [draw(st.integers(1, 7)) for _ in range(2)]
    return sae, latents, positions, values, where, padded(IDS, lengths, draw(st.sampled_from(("left", "right"))))


@settings(max_examples=cases(300))
@given(patches())
def test_values_per_row_and_token_are_what_a_plan_with_a_rule_for_each_does(patched):
    sae, latents, positions, values, where, inputs = patched
    lengths = inputs["attention_mask"].sum(1)
    there = torch.tensor(positions) < lengths[:, None]
    where = where & (there & (torch.tensor(positions) > 0))[..., None]
    with interchange(MODEL, sae, values, latents, positions=positions, where=where) as run, torch.no_grad():
        ours = MODEL(**inputs).logits
    with steer(MODEL, as_plans(sae, values, latents, positions, where), saes=sae) as slow, torch.no_grad():
        theirs = MODEL(**inputs).logits

    real = inputs["attention_mask"].bool()
    assert laws.distance(ours[real], theirs[real]) <= laws.TOLERANCE
    wanted = [set() for _ in range(2)]
    for rule in slow.report.rules:
        for row, found in enumerate(rule.edited_positions[0] if rule.edited_positions else ()):
            wanted[row] |= set(found)
    (said,) = run.report.rules
    assert [set(row) for row in said.edited_positions[0]] == wanted


@settings(max_examples=cases(300))
@given(patches(), st.booleans())
def test_a_block_ends_without_an_error_only_if_each_value_that_counts_found_a_token(patched, special):
    sae, latents, positions, values, where, inputs = patched
    wanted = {(row, positions[i]) for row, i, _ in where.nonzero().tolist()}
    lengths = inputs["attention_mask"].sum(1).tolist()
    block = interchange(MODEL, sae, values, latents, positions=positions, where=where, special=special)

    if missed := sorted((row, p) for row, p in wanted if p >= lengths[row]):
        expected = pytest.raises(PlanNeverRan, match=r"position \d of row [01].* came in no pass of the block")
    elif any(p == 0 for _, p in wanted) and not special:
        expected = pytest.raises(BadRule, match=r"position 0 of row [01].* is a special token.*special=True")
    else:
        expected = nullcontext()
    with nothing_left(MODEL), expected as raised, block, torch.no_grad():
        MODEL(**inputs)
    if missed and len({row for row, _ in missed}) == len(missed) == 1:
        assert f"position {missed[0][1]} of row {missed[0][0]} came" in str(raised.value)


def test_a_mask_of_values_for_padding_is_refused_and_what_read_latents_knows_is_not():
    inputs = padded(IDS, (5, 7), "left")
    found = read_latents(MODEL, SAES["relu"], (3, 8), lambda: MODEL(**inputs))

    with interchange(MODEL, SAES["relu"], found.f + 1, (3, 8), where=found.known[..., None]) as run, torch.no_grad():
        MODEL(**inputs)
    assert run.report.rules[0].edited_positions == (((1, 2, 3, 4), (1, 2, 3, 4, 5, 6)),)
    for where in (None, torch.ones(2, 7, 2, dtype=torch.bool)):
        with (
            pytest.raises(PlanNeverRan, match=r"position 5 of row 0 \(and 1 more\) came in no pass"),
            interchange(MODEL, SAES["relu"], found.f + 1, (3, 8), where=where),
            torch.no_grad(),
        ):
            MODEL(**inputs)


def test_a_position_may_come_in_any_pass_of_the_block():
    values = torch.full((2, 1, 1), 6.0)

    with interchange(MODEL, SAES["relu"], values, (3,), positions=[6]) as run:
        logits(IDS[:, :5])
        logits()
    assert run.report.rules[0].edited_positions == (((), ()), ((6,), (6,)))


def test_the_stream_moves_by_the_change_of_the_latents_and_nothing_else():
    sae, values = SAES["jumprelu"], torch.tensor([[[3.0, 0.5]], [[1.0, 2.0]]])
    with (
        nothing_left(MODEL),
        interchange(MODEL, sae, values, (5, 9), positions=[4]) as run,
        capture(MODEL, SITE, side="before") as before,
        capture(MODEL, SITE) as after,
    ):
        logits()

    x, moved = before[SITE], after[SITE]
    change = values[:, 0] - sae.encode_at(x, (5, 9))[:, 4]
    assert torch.allclose(moved[:, 4], x[:, 4] + change @ sae.W_dec[[5, 9]], atol=1e-5)
    moved[:, 4] = x[:, 4]
    assert laws.same_bits(moved, x)
    assert run.report.rules[0].rule == "interchange on tiny[5, 9]"


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 5), (6,)])
def test_a_cache_changes_nothing(cuts):
    values = torch.arange(2 * 7 * 2).view(2, 7, 2) / 4
    with interchange(MODEL, SAES["relu"], values, (3, 8)):
        whole = logits()
    with interchange(MODEL, SAES["relu"], values, (3, 8)) as run:
        pieces = in_chunks(MODEL, IDS, cuts)

    assert laws.distance(pieces, whole) <= laws.TOLERANCE
    assert run.report.rules[0].edited_positions == (((1, 2, 3, 4, 5, 6),) * 2,)


def test_tokens_that_generate_writes_have_positions_too_and_sequences_of_one_row_share_its_values():
    values = torch.full((2, 2, 1), 6.0)
    with interchange(MODEL, SAES["relu"], values, (3,), positions=[6, 8]) as run:
        MODEL.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=True,
                       num_return_sequences=2, eos_token_id=None)  # fmt: skip

    assert run.report.rules[0].edited_positions == (((6, 8),) * 4,)


def test_special_tokens_are_patched_on_request_only():
    values, plain = torch.full((2, 1, 1), 6.0), logits()
    with interchange(MODEL, SAES["relu"], values, (3,)) as without:
        assert laws.same_bits(logits(), plain)
    with interchange(MODEL, SAES["relu"], values, (3,), positions=[0], special=True) as run:
        logits()

    assert without.report.rules[0].tokens_edited == 0
    assert run.report.rules[0].edited_positions == (((0,), (0,)),)


def test_it_composes_with_steering_at_other_latents_and_is_refused_at_the_same():
    sae, plan = SAES["relu"], Plan((Rule("tiny", (3,), Clamp(2.0, when="always"), start=4, stop=5),))
    with steer(MODEL, plan, saes=sae), interchange(MODEL, sae, torch.full((2, 1, 1), 6.0), (8,), positions=[4]):
        both = logits()
    joint = Plan((*plan.rules, Rule("tiny", (8,), Clamp(6.0, when="always"), start=4, stop=5)))
    with steer(MODEL, joint, saes=sae):
        expected = logits()

    assert laws.distance(both, expected) <= laws.TOLERANCE
    with (
        pytest.raises(OverlappingRules),
        steer(MODEL, plan, saes=sae),
        interchange(MODEL, sae, torch.ones(2, 1, 1), (3,)),
    ):
        logits()


ONES = torch.ones(2, 7, 2)


def patched(values, latents, sae=SAES["relu"], **options):
    return interchange(MODEL, sae, values, latents, **options)


REFUSED = {
    "two axes": (BadRule, r"values\[:, None\] for one position", lambda: patched(ONES[:, 0], (1, 2))),
    "no tensor": (BadRule, "values of list", lambda: patched([[[1.0, 2.0]]], (1, 2))),
    "no rows": (BadRule, "rows x positions x latents", lambda: patched(ONES[:0], (1, 2))),
    "where of another shape": (BadRule, "where=shape .2, 3. .*an axis of size 1",
                               lambda: patched(ONES, (1, 2), where=torch.ones(2, 3).bool())),
    "where of numbers": (BadRule, "does not say yes or no", lambda: patched(ONES, (1, 2), where=torch.ones(2, 7, 2))),
    "where of lists": (BadRule, "where=list for values", lambda: patched(ONES, (1, 2), where=[[[True]]])),
    "no positions": (BadRule, "no ints, or none", lambda: patched(ONES[:, :0], (1, 2), positions=[])),
    "no whole positions": (BadRule, "no ints", lambda: patched(ONES[:, :1], (1, 2), positions=[1.5])),
    "endless positions": (BadRule, "from 0", lambda: patched(ONES[:, :1], (1, 2), positions=[10**12])),
    "latents": (BadRule, "for 1 latents", lambda: patched(ONES, (1,))),
    "positions": (BadRule, r"positions are \[1, 2\]", lambda: patched(ONES, (1, 2), positions=[1, 2])),
    "twice": (BadRule, "every position once", lambda: patched(ONES[:, :2], (1, 2), positions=[3, 3])),
    "negative": (BadRule, "from 0", lambda: patched(ONES[:, :1], (1, 2), positions=[-1])),
    "NaN": (BadRule, "NaN or infinite", lambda: patched(ONES * torch.nan, (1, 2))),
    "rows": (RowsMismatch, "the batch has 2 rows", lambda: patched(ONES[:1], (1, 2))),
    "range": (LatentOutOfRange, r"0\.\.47", lambda: patched(ONES, (1, 48))),
    "no site": (SiteNotFound, "Give the rule a site", lambda: patched(ONES, (1, 2), replace(SAES["relu"], site=None))),
    "too large": (UnstableEdit, "NaN or infinity", lambda: patched(ONES * 3e38, (1, 2))),
}  # fmt: skip


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    error, says, block = REFUSED[name]

    with pytest.raises(error, match=says), nothing_left(MODEL), block():
        logits()


def test_a_block_in_which_nothing_ran_raises_and_values_that_do_not_count_may_be_anything():
    values, where = ONES.clone(), torch.ones(2, 7, 2, dtype=torch.bool)
    values[0, 2, 1], where[0, 2, 1] = torch.nan, False

    with (
        pytest.raises(PlanNeverRan, match="2 latents of tiny to be patched"),
        interchange(MODEL, SAES["relu"], values, (1, 2), where=where),
    ):
        pass
    with interchange(MODEL, SAES["relu"], values, (1, 2), where=where):
        assert torch.isfinite(logits()).all()


# between two runs


@pytest.mark.parametrize("kind", sorted(SAES))
@pytest.mark.parametrize("side", ["left", "right"])
def test_latents_are_read_by_absolute_position_whatever_the_padding(kind, side):
    sae, inputs = SAES[kind], padded(IDS, (5, 7), side)
    found = read_latents(MODEL, sae, (3, 8), lambda: MODEL(**inputs))

    assert found.known.tolist() == [[True] * 5 + [False] * 2, [True] * 7]
    for row, n in enumerate((5, 7)):
        alone = read_latents(MODEL, sae, (3, 8), lambda row=row, n=n: logits(IDS[row : row + 1, :n]))
        assert torch.allclose(found.f[row, :n], alone.f[0], atol=1e-4)
        assert not found.f[row, n:].any()


def test_patching_from_the_same_text_changes_nothing_and_from_another_what_its_latents_say():
    sae, latents, other = SAES["jumprelu"], (3, 8, 21), tiny.prompt(2, 7, seed=9)
    plain = logits()
    with torch.no_grad():
        same = patch(MODEL, sae, {"input_ids": IDS}, {"input_ids": IDS}, latents).logits
        patched = patch(MODEL, sae, {"input_ids": IDS}, {"input_ids": other}, latents, positions=[2, 5]).logits
    theirs = read_latents(MODEL, sae, latents, lambda: logits(other))
    with steer(MODEL, as_plans(sae, theirs.f, latents, range(7), torch.ones(2, 7, 3, dtype=torch.bool)
                               & torch.isin(torch.arange(7), torch.tensor([2, 5]))[:, None]), saes=sae):  # fmt: skip
        expected = logits()

    assert laws.distance(same, plain) <= laws.TOLERANCE
    assert laws.distance(patched, expected) <= laws.TOLERANCE
    assert laws.distance(patched, plain) > 1e-3


def test_texts_that_do_not_belong_together_are_refused():
    ours, short = {"input_ids": IDS}, padded(IDS, (5, 7), "right")

    with pytest.raises(BadRule, match=r"rows have \[7, 7\] tokens and are patched from \[5, 7\]"):
        patch(MODEL, SAES["relu"], ours, short, (3,))
    with pytest.raises(BadRule, match=r"positions \[5\]: the shortest row has 5 real tokens"):
        patch(MODEL, SAES["relu"], ours, short, (3,), positions=[4, 5])
    with pytest.raises(RowsMismatch, match="2 rows patched from 1"):
        patch(MODEL, SAES["relu"], ours, {"input_ids": IDS[:1]}, (3,))


def test_embeddings_are_patched_where_special_tokens_need_not_be_known():
    ours, other = {"inputs_embeds": MODEL.get_input_embeddings()(IDS)}, {"input_ids": tiny.prompt(2, 7, seed=9)}

    with torch.no_grad():
        expected = patch(MODEL, SAES["relu"], {"input_ids": IDS}, other, (3, 8), special=True).logits
        found = patch(MODEL, SAES["relu"], ours, other, (3, 8), special=True).logits
    assert torch.equal(found, expected)
    with pytest.raises(TokensUnknown, match="given embeddings"):
        patch(MODEL, SAES["relu"], ours, other, (3, 8))
    with pytest.raises(TokensUnknown, match="neither input_ids nor inputs_embeds"):
        patch(MODEL, SAES["relu"], {}, other, (3, 8))
    with pytest.raises(BadRule, match="positions are no ints, or none"):
        patch(MODEL, SAES["relu"], {"input_ids": IDS}, other, (3, 8), positions=[])


def test_a_site_map_says_where_as_for_steering():
    """With tokens as with a layout; without, every position is patched, and sources have as many."""
    told, layout = SiteMap({"resid_post": "blocks.{}"}, width=tiny.D), Layout("blocks")
    sae, model = replace(SAES["relu"], site=laws.STACK_SITE), laws.Stack(tiny.D)
    x, y = (torch.randn(2, 5, tiny.D, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))

    def both(wanted, **options):
        return patch(model, sae, {"inputs_embeds": x}, {"inputs_embeds": y}, (3, 8), layout=wanted, **options)

    assert torch.equal(both(told), both(layout, special=True))
    assert torch.equal(both(told, positions=[0, 3]), both(layout, positions=[0, 3], special=True))
    assert not torch.equal(both(told, positions=[0, 3]), both(told))
    for positions, says in ((None, "5, 5. tokens and are patched from .4, 4"), ([4], "the shortest row has 4")):
        with pytest.raises(BadRule, match=says):
            patch(model, sae, {"inputs_embeds": x}, {"inputs_embeds": y[:, :4]}, (3, 8), layout=told,
                  positions=positions)  # fmt: skip
    with interchange(model, sae, torch.ones(2, 5, 2), (3, 8), layout=told) as run:
        model(inputs_embeds=x)
    assert run.report.rules[0].tokens_edited == 10


def test_one_latent_per_row_of_a_batch_is_one_latent_at_a_time():
    sae, latents = SAES["jumprelu"], (3, 8, 21, 30)
    theirs = read_latents(MODEL, sae, latents, lambda: logits(tiny.prompt(1, 7, seed=9)))
    k = len(latents)
    where = torch.eye(k, dtype=torch.bool)[:, None]
    with interchange(MODEL, sae, theirs.f.expand(k, 7, k), latents, where=where):
        together = logits(IDS[:1].expand(k, 7))
    alone = []
    for j, latent in enumerate(latents):
        with interchange(MODEL, sae, theirs.f[..., j : j + 1], (latent,)):
            alone.append(logits(IDS[:1]))

    assert laws.distance(together, torch.cat(alone)) <= laws.TOLERANCE


# capture and steer


@pytest.mark.parametrize("order", ["steer first", "capture first"])
def test_one_pass_records_before_and_after_an_edit_in_whatever_order_the_blocks_were_opened(order):
    sae, plan = SAES["jumprelu"], Plan((Rule("tiny", (5,), Add(2.0)),))
    plain = logits()
    with capture(MODEL, SITE) as unedited:
        assert laws.same_bits(logits(), plain)
    with ExitStack() as stack:
        enter = [lambda: stack.enter_context(steer(MODEL, plan, saes=sae)),
                 lambda: stack.enter_context(capture(MODEL, SITE, side="before")),
                 lambda: stack.enter_context(capture(MODEL, SITE))]  # fmt: skip
        found = [open_block() for open_block in (enter if order == "steer first" else enter[::-1])]
        logits()
    before, after = found[1:] if order == "steer first" else found[1::-1]

    assert laws.same_bits(before[SITE], unedited[SITE])
    assert torch.allclose((after[SITE] - before[SITE])[:, 1:], 2.0 * sae.W_dec[5], atol=1e-5)
    assert laws.same_bits(after[SITE][:, 0], before[SITE][:, 0])


# gradients


def by_hand(rule: Rule, sae, x: Tensor) -> Tensor:
    """x' of one elementwise rule, in plain torch."""
    f = (x @ sae.W_enc + sae.b_enc).relu() if sae.activation == "relu" else sae.encode(x)
    f, low = f[..., list(rule.latents)], rule.op.lower()
    changed = torch.where(f > low.floor, (low.scale * f + low.shift).clamp(low.lo, low.hi), f)
    return x + (changed - f) @ sae.W_dec[list(rule.latents)]


OPS = (Clamp(2.0, when="always"), Clamp(2.0, when="active"), Scale(-1.5), Add(3.0), Ablate(), AtLeast(1.5), AtMost(0.5),
       Reduce(0.25))  # fmt: skip


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_the_gradient_of_x_is_that_of_the_formula(op, kind):
    sae, model = replace(SAES[kind], site=laws.STACK_SITE), laws.Stack(tiny.D)
    rule = Rule("tiny", (3, 8, 21), op, special=True)
    x = torch.randn(2, 5, tiny.D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.randn(2, 5, tiny.D, generator=torch.Generator().manual_seed(2))
    with steer(model, Plan((rule,)), saes=sae, layout=Layout("blocks")):
        (ours,) = torch.autograd.grad((model(inputs_embeds=x) * weights).sum(), x)

    (expected,) = torch.autograd.grad((by_hand(rule, sae, x) * weights).sum(), x)
    assert torch.allclose(ours, expected, atol=1e-5)
    if isinstance(op, Add):
        assert torch.equal(ours, weights), "it passes as it is"


def test_a_clamp_to_the_activation_itself_keeps_the_bits_and_still_has_its_gradient():
    sae, model = replace(SAES["relu"], site=laws.STACK_SITE), laws.Stack(tiny.D)
    x = torch.randn(1, 4, tiny.D, generator=torch.Generator().manual_seed(1))
    x[0, :, 0] = -0.0
    f = sae.encode_at(x, (3, 8))
    leaf, values = x.clone().requires_grad_(), f.clone().requires_grad_()
    with interchange(model, sae, values, (3, 8), special=True, layout=Layout("blocks")):
        out = model(inputs_embeds=leaf)
        to_x, to_values = torch.autograd.grad(out.sum(), (leaf, values))

    on = (f > 0).float()
    assert laws.same_bits(out.detach(), x)
    assert torch.allclose(to_values, sae.W_dec[[3, 8]].sum(-1).expand(1, 4, 2))
    assert torch.allclose(to_x, 1.0 - (on * sae.W_dec[[3, 8]].sum(-1)) @ sae.W_enc[:, [3, 8]].T, atol=1e-5)


def test_a_plan_that_clamps_to_the_activation_itself_has_its_gradient_too():
    sae, model = replace(SAES["relu"], site=laws.STACK_SITE), laws.Stack(tiny.D)
    x = torch.randn(1, 1, tiny.D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    latent = int(sae.encode(x)[0, 0].argmax())
    f = sae.encode_at(x, (latent,)).detach()
    plan = Plan((Rule("tiny", (latent,), Clamp(float(f), when="always"), special=True),))
    with steer(model, plan, saes=sae, layout=Layout("blocks")):
        out = model(inputs_embeds=x)
        (found,) = torch.autograd.grad(out.sum(), x)

    assert laws.same_bits(out.detach(), x.detach())
    assert torch.allclose(found[0, 0], 1.0 - sae.W_dec[latent].sum() * sae.W_enc[:, latent], atol=1e-5)


def test_gradients_at_latents_times_activations_are_the_scores_of_attribution():
    sae, row = SAES["jumprelu"], IDS[:1]
    latents = tuple(range(sae.d_sae))
    f = read_latents(MODEL, sae, latents, lambda: logits(row)).f
    values = f.clone().requires_grad_()
    with interchange(MODEL, sae, values, latents):
        last = MODEL(row, use_cache=False).logits[0, -1]
    (g,) = torch.autograd.grad(last[40] - last[[5, 6]].mean(), values)

    questions = Questions((tuple(row[0].tolist()),), ((5, 40, 6),), (1,), frozenset(tiny.SPECIAL.values()))
    scores = attribution(MODEL, sae, questions).columns["attribution"]
    fires = ~torch.isnan(scores)
    assert torch.equal(fires, (f[0, 1:] > 0).any(0))
    assert torch.allclose((f * g)[0, 1:].sum(0)[fires], scores[fires], rtol=1e-4, atol=1e-6)
    assert not g[0, 0].any(), "a special token is not patched"


def test_parameters_below_an_edit_learn_through_it_and_the_ledger_keeps_no_graph():
    model, sae = tiny.fresh_model(), SAES["relu"]
    with steer(model, Plan((Rule("tiny", (3, 8), Scale(2.0)),)), saes=sae) as run:
        model(IDS, use_cache=False).logits.sum().backward()
        entries = [entry for call in run.calls for track in call.tracks.values() for entry in track.entries]

    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    assert entries
    for entry in entries:
        assert not entry.edit.dx.requires_grad
        assert not any(part.df.requires_grad for part in entry.edit.parts)


def test_rows_without_a_plan_keep_their_bits_where_gradients_flow():
    plain = MODEL(IDS, use_cache=False).logits
    with steer(MODEL, [Plan((Rule("tiny", (3, 8), Scale(2.0)),)), None], saes=SAES["relu"]):
        steered = MODEL(IDS, use_cache=False).logits

    assert plain.requires_grad
    assert laws.same_bits(steered[1].detach(), plain[1].detach())
    assert not torch.equal(steered[0], plain[0])
