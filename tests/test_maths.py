"""Every kernel computes the formula: the same tokens edited, the same numbers, whatever the ops and their company.

A case is one list of one to six rules (mixed ops, units, triggers, priorities, one to three SAEs) on one batch of up
to 3 x 4 tokens, through both kernels. Weights and streams are multiples of 1/8, so float32 sums are exact and
"edited" can be compared as a set; amounts in units of a norm are compared as numbers only where rounding decides.
"""

import random
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from saeguard import (
    SAE,
    Ablate,
    Add,
    AnyActive,
    AtLeast,
    AtMost,
    Clamp,
    Layout,
    Plan,
    Rule,
    Scale,
    Site,
    capture,
    steer,
)
from saeguard.activations import Pursuit
from saeguard.editor import BoundRule, DenseEdit, Editor
from saeguard.tokens import TokenBatch
from tests import laws, slow_maths, tiny
from tests.counts import cases

SITE = Site("resid_post", 0)
KERNELS: tuple[Literal["sliced", "reference"], ...] = ("sliced", "reference")


RANKING = ("topk", "topk_norelu", "abstopk", "groupmax")


def dyadic_sae(name: str, activation: str, d_in: int, d_sae: int, seed: int) -> SAE:
    """Weights in eighths; biases in 4096ths and all different, so that no two latents tie for a place in the top k."""
    rng = random.Random(seed)

    def eighths(*shape: int) -> torch.Tensor:
        n = 1
        for size in shape:
            n *= size
        return torch.tensor([rng.randint(-12, 12) / 8 for _ in range(n)]).view(shape)

    bias = torch.tensor([rng.randint(-8, 8) / 8 + j / 4096 for j in range(d_sae)])
    top_k = rng.randint(1, d_sae) if activation in RANKING else None
    if activation == "groupmax":
        top_k = rng.choice([k for k in range(1, d_sae + 1) if d_sae % k == 0])
    pursuit = Pursuit(2, rng.random() < 0.5, rng.choice((0.0, 0.5)), rng.random() < 0.5)
    return SAE(
        name=name, W_enc=eighths(d_in, d_sae), b_enc=bias if activation in RANKING else eighths(d_sae),
        W_dec=eighths(d_sae, d_in), b_dec=eighths(d_in), activation=activation,  # type: ignore[arg-type]
        threshold=torch.tensor([rng.randint(-2, 16) / 8 for _ in range(d_sae)]) if activation == "jumprelu" else None,
        top_k=top_k, pursuit=pursuit if activation == "pursuit" else None,
        rank_by=torch.tensor([rng.randint(1, 8) / 4 for _ in range(d_sae)])
        if activation in RANKING[:3] and rng.random() < 0.3
        else None,
        maximum=torch.tensor([rng.randint(1, 16) / 4 for _ in range(d_sae)]), site=SITE,
    )  # fmt: skip


@st.composite
def saes(draw: Any) -> list[SAE]:
    d_in = draw(st.integers(1, 5))
    exact = ("relu", "jumprelu", *RANKING, "pursuit")
    kinds = draw(st.lists(st.sampled_from(exact), min_size=1, max_size=3))
    seed = draw(st.integers(0, 2**20))
    found = [dyadic_sae(f"sae{i}", kind, d_in, 1 + (seed + 3 * i) % 9, seed + i) for i, kind in enumerate(kinds)]
    sizes = draw(st.just(()) | st.lists(st.integers(0, 3), max_size=2))
    return [laws.with_boosts(sae, sizes, seed=seed + i) for i, sae in enumerate(found)]


@st.composite
def batches(draw: Any, d_in: int, n_rules: int) -> tuple[torch.Tensor, TokenBatch, torch.Tensor, list[list[Any]]]:
    """A stream, what is known of its tokens, who has which rule, and the same knowledge token by token."""
    rows, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    rng = random.Random(draw(st.integers(0, 2**30)))
    share = draw(st.sampled_from((0.0, 0.3, 1.0)))  # all tokens real, some, none
    quiet = draw(st.sampled_from((0.0, 0.5)))
    x = [
        [[0.0 if rng.random() < quiet else rng.randint(-16, 16) / 8 for _ in range(d_in)] for _ in range(width)]
        for _ in range(rows)
    ]
    column, prompt = rng.randint(0, 3), rng.randint(0, 5)
    tokens = []
    for _ in range(rows):
        row, position = [], rng.randint(0, column)
        covers = [rng.random() < 0.8 for _ in range(n_rules)]
        for t in range(width):
            real = rng.random() >= share
            row.append(
                {"real": real, "special": rng.random() < 0.2, "covers": covers, "absolute": position if real else 0,
                 "since": column + t - prompt}
            )  # fmt: skip
            position += real
        tokens.append(row)
    known = {name: torch.tensor([[t[name] for t in row] for row in tokens]) for name in tokens[0][0]}
    last = known["real"] & (known["since"] == -1)
    batch = TokenBatch(known["real"], known["absolute"], known["special"], known["since"], column, last=last)
    covers = known["covers"][:, 0].view(rows, n_rules)
    return torch.tensor(x), batch, covers, tokens


def check(rules: Sequence[Rule], found: Sequence[SAE], batch: Any) -> None:
    """Both kernels against the slow loop."""
    x, tokens, covers, told_of = batch
    by_name = {sae.name: sae for sae in found}
    truth = [
        [slow_maths.tell(x[r, t].tolist(), told_of[r][t], rules, by_name) for t in range(x.shape[1])]
        for r in range(x.shape[0])
    ]
    bound = [BoundRule(rule, SITE, None, SITE) for rule in rules]
    for kernel in KERNELS:
        edit = Editor(SITE, bound, by_name, device=torch.device("cpu"), kernel=kernel)(x, tokens, covers)
        after = torch.where(edit.changed[..., None], x + edit.dx, x)
        sets, wanted_sets = [], []
        for r, row in enumerate(truth):
            for t, told in enumerate(row):
                wanted = torch.tensor(told.x, dtype=torch.float64)
                assert laws.distance(after[r, t], wanted) <= 1e-5, (kernel, r, t, rules)
                if not told.doubtful:
                    sets.append((r, t, bool(edit.changed[r, t]), edited_columns(edit, r, t, len(rules))))
                    columns = [changed_columns(rule, df) for rule, df in zip(rules, told.df, strict=True)]
                    wanted_sets.append((r, t, any(map(any, columns)), columns))
        assert sets == wanted_sets, (kernel, rules)


def changed_columns(rule: Rule, df: Sequence[float]) -> tuple[bool, ...]:
    """Which latents are changed, or, by a dense op, whether the stream is."""
    return (any(d != 0 for d in df),) if rule.is_dense else tuple(d != 0 for d in df)


def edited_columns(edit: Any, row: int, token: int, n_rules: int) -> list[tuple[bool, ...]]:
    found: list[list[bool]] = [[] for _ in range(n_rules)]
    for piece in edit.parts:
        if isinstance(piece, DenseEdit):
            for local, rule in enumerate(piece.rules):
                found[rule].append(bool(piece.edited[row, token, local]))
            continue
        for column, local in enumerate(piece.part.rule.tolist()):
            found[piece.rules[local]].append(bool(piece.df[row, token, column] != 0))
    return [tuple(columns) for columns in found]


@settings(max_examples=cases(20_000))
@given(st.data())
def test_kernels_compute_the_formula_for_any_joint_rules(data):
    found = data.draw(saes())
    rule = st.one_of(*(laws.rules(sae, where=laws.wheres(longest=5)) for sae in found))
    rules = laws.compatible(data.draw(st.lists(rule, min_size=1, max_size=6)), found)
    batch = data.draw(batches(found[0].d_in, len(rules)))

    check(rules, found, batch)


EDGES = {
    "one token": ((1, 1), (0, 1), False),
    "all padding": ((2, 3), (0, 1), True),
    "no latents": ((2, 3), (), False),
    "one latent": ((2, 3), (2,), False),
    "all of many latents": ((2, 2), tuple(range(300)), False),
}
OPS = (
    Clamp(2.0, when="always"), Clamp(-2.0, when="active"), Scale(-0.5), Add(1.5), Ablate(), AtLeast(1.0), AtMost(0.5),
    Clamp(0.5, when="always", unit="max"), Add(0.25, unit="norm"), AtMost(0.25, unit="norm"), AtLeast(0.0, unit="norm"),
)  # fmt: skip


@pytest.mark.parametrize("activation", ["relu", "jumprelu", *RANKING])
@pytest.mark.parametrize("edge", EDGES)
def test_kernels_compute_the_formula_at_the_edges_of_shape(edge, activation):
    (rows, width), latents, padding = EDGES[edge]
    sae = dyadic_sae("sae", activation, 4, 300, seed=3)
    rng = random.Random(1)
    x = torch.tensor([[[rng.randint(-16, 16) / 8 for _ in range(4)] for _ in range(width)] for _ in range(rows)])
    real = torch.full((rows, width), not padding)
    place = torch.zeros(rows, width, dtype=torch.long)
    batch = TokenBatch(real, place, ~real, place, 0)
    token = {"real": not padding, "special": padding, "covers": [True], "absolute": 0, "since": 0}
    for op in OPS:
        check([Rule("sae", latents, op)], [sae], (x, batch, torch.ones(rows, 1).bool(), [[token] * width] * rows))


def test_kernels_compute_the_formula_where_x_is_zero():
    """The norm of x is 0 there, and 0 times an absent bound, which is infinite, must not become NaN."""
    sae = dyadic_sae("sae", "relu", 3, 5, seed=5)
    one = torch.ones(1, 1, dtype=torch.bool)
    batch = TokenBatch(one, torch.zeros(1, 1, dtype=torch.long), ~one, torch.zeros(1, 1, dtype=torch.long), 0)
    token = {"real": True, "special": False, "covers": [True], "absolute": 0, "since": 0}
    for op in OPS:
        check([Rule("sae", (0, 1, 2, 3, 4), op)], [sae], (torch.zeros(1, 1, 3), batch, one, [[token]]))


def test_threshold_and_trigger_are_strict():
    sae = SAE(
        "sae",
        torch.eye(2),
        torch.zeros(2),
        torch.eye(2),
        torch.zeros(2),
        "jumprelu",
        torch.tensor([0.5, 0.5]),
        site=SITE,
    )
    x = torch.tensor([[[0.5, 0.0], [0.625, 0.0], [0.75, 0.0]]])
    plan = Plan(
        (
            Rule("sae", (0,), Clamp(9.0, when="active"), special=True),
            Rule("sae", (1,), Clamp(9.0, when="always"), special=True, trigger=AnyActive((0,), 0.625)),
        )
    )
    stack = laws.Stack(2)

    with steer(stack, plan, saes=sae, layout=Layout("blocks")):
        after = stack(inputs_embeds=x)

    assert after.tolist() == [[[0.5, 0.0], [9.0, 0.0], [9.0, 9.0]]]


@settings(max_examples=cases(1_000))
@given(st.data())
def test_stream_of_a_running_model_changes_by_the_formula(data):
    """A case is one plan on one pass of a real architecture, the stream captured on both sides of the hook."""
    model = tiny.tiny_model(data.draw(st.sampled_from(tiny.ARCHITECTURES)))
    found = [tiny.tiny_sae(activation=kind, name=kind, seed=i) for i, kind in enumerate(("relu", "jumprelu", "topk"))]
    plan = data.draw(laws.plans(found, where=laws.wheres(longest=6, phases=("all",))))
    ids = tiny.prompt(2, 6, seed=data.draw(st.integers(0, 9999)))
    site, by_name = found[0].site, {sae.name: sae for sae in found}

    before, after = capture(model, site, side="before"), capture(model, site)
    with torch.no_grad(), steer(model, plan, saes=found), before as x, after as tape:
        model(ids)

    assume(not any(laws.rule_near_edge(rule, by_name[rule.sae], x[site]) for rule in plan.rules))
    for r in range(2):
        for t in range(6):
            token = {"real": True, "special": t == 0, "covers": [True] * len(plan.rules), "absolute": t, "since": 0}
            told = slow_maths.tell(x[site][r, t].tolist(), token, plan.rules, by_name)
            assert laws.distance(tape[site][r, t], torch.tensor(told.x)) <= 1e-5
