"""Dense ops: splices and weighted latents, against the published numbers, and what they may stand beside."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from saeguard import (
    SAE,
    Ablate,
    Add,
    AnyActive,
    Clamp,
    Layout,
    Plan,
    Reweight,
    Rule,
    Scale,
    Site,
    Splice,
    capture,
    save_sae,
    steer,
)
from saeguard.activations import KINDS
from saeguard.errors import BadRule, NotSliceable, OpMismatch, OverlappingRules, UnstableEdit
from saeguard.kernels import dense, dense_parts
from tests import laws, slow_maths, test_kinds, tiny
from tests.counts import cases

KERNELS: tuple[Literal["sliced", "reference"], ...] = ("sliced", "reference")
IDS = tiny.prompt(3, 7)


def edited(x: Any, rules: tuple[Rule, ...], saes: Any, **options: Any) -> Tensor:
    """A stream, one row or several, after the rules; special tokens are unknown there, so rules have to take them."""
    x = torch.as_tensor(x, dtype=torch.float32)
    stack = laws.Stack(x.shape[-1])
    with steer(stack, Plan(rules), saes=saes, layout=Layout("blocks"), **options), torch.no_grad():
        return stack(inputs_embeds=x if x.ndim == 3 else x[None]).view(x.shape)


def rule(sae: str, op: Any, *latents: int, **where: Any) -> Rule:
    return Rule(sae, latents, op, **{"special": True} | where)


def after(
    sae: SAE, plan: Plan | list[Plan | None] | None, model: nn.Module | None = None, **options: Any
) -> tuple[Tensor, Tensor, Any]:
    """What flows past the SAE's site of a model before and after a plan, and the run."""
    model = model or tiny.tiny_model()
    with (
        torch.no_grad(), steer(model, plan, saes=sae, **options) as run, capture(model, sae.site, side="before") as old,
        capture(model, sae.site) as new,
    ):  # fmt: skip
        model(IDS)
    return old[sae.site], new[sae.site], run


def golden(activation: str) -> SAE:
    """Latents that are the coordinates of a stream of four."""
    eye, zero = torch.eye(4), torch.zeros(4)
    top_k = 2 if activation == "topk" else None
    return SAE("golden", eye, zero, eye, zero, activation, top_k=top_k, site=laws.STACK_SITE)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("activation", "top_k"), [("topk", None), ("topk", 2), ("relu", 2)])
def test_weight_and_swap_give_the_published_numbers(activation, top_k, kernel):
    """k = 2, pre-activations [3, 2, -1, 2.5] and scores [.1, .9, 1, .2]; a ReLU SAE ranks because it is told to."""
    pre, scores = [[3.0, 2.0, -1.0, 2.5]], (0.1, 0.9, 1.0, 0.2)
    splice = rule("golden", Splice("dropped"))
    found = {
        mode: edited(pre, (splice, rule("golden", Reweight(scores, mode=mode, top_k=top_k), 0, 1, 2, 3)),
                     golden(activation), kernel=kernel)
        for mode in ("weight", "swap")
    }  # fmt: skip
    plain = edited(pre, (splice, rule("golden", Reweight(1.0, mode="weight", top_k=2, others=1.0))),
                   golden(activation), kernel=kernel)  # fmt: skip

    assert torch.allclose(found["weight"], torch.tensor([[0.0, 1.8, 0.0, 0.5]]))
    assert torch.allclose(found["swap"], torch.tensor([[0.0, 2.0, 0.0, 2.5]]))
    assert torch.allclose(plain, torch.tensor([[3.0, 0.0, 0.0, 2.5]]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_splice_gives_the_published_reconstruction(kernel):
    W_dec = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0], [0, -0.6, 0.8]])
    sae = SAE("toy", W_dec.T.contiguous(), torch.zeros(5), W_dec, torch.tensor([0.1, 0.0, -0.1]), "jumprelu",
              torch.full((5,), 0.5), site=laws.STACK_SITE)  # fmt: skip
    x = torch.tensor([[10, 0, 0], [1, 0.2, 0], [0, 2, 0], [0.3, -1, 1]])
    recon = torch.tensor([[13.7, 4.8, -0.1], [1.556, 0.608, -0.1], [1.06, 3.28, -0.1], [0.1, -0.84, 2.02]])

    dropped, kept = (edited(x, (rule("toy", Splice(error)),), sae, kernel=kernel) for error in ("dropped", "kept"))

    assert torch.allclose(dropped, recon, atol=1e-5)
    assert laws.same_bits(kept, x)


def test_swap_under_a_negative_weight_writes_a_negative_activation():
    """As published: who fires is decided by the weighted value, and what is written is the own one."""
    swap, weight = (rule("golden", Reweight((-1.0,), mode=mode, others=1.0), 2) for mode in ("swap", "weight"))
    x = [[3.0, 0.0, -1.0, -2.0]]

    assert edited(x, (rule("golden", Splice()), swap), golden("relu")).tolist() == [[3.0, 0.0, -1.0, 0.0]]
    assert edited(x, (rule("golden", Splice()), weight), golden("relu")).tolist() == [[3.0, 0.0, 1.0, 0.0]]


def test_latents_that_tie_with_the_last_of_top_k_are_all_kept():
    keep = rule("golden", Reweight(1.0, mode="weight", top_k=1, others=1.0))

    found = edited([[2.0, 2.0, 1.0, 0.0]], (rule("golden", Splice()), keep), golden("relu"))

    assert found.tolist() == [[2.0, 2.0, 0.0, 0.0]]


def test_rules_beside_a_splice_are_added_to_the_reconstruction():
    sae = tiny.tiny_sae()
    clamp = rule("tiny", Clamp(9.0, when="always"), 3, 8)
    x, found, _ = after(sae, Plan((rule("tiny", Splice()), clamp)))
    f = sae.encode(x)
    f[..., [3, 8]] = 9.0

    assert laws.distance(found, sae.decode(f)) <= 1e-5


def test_trigger_of_a_dense_rule_reads_the_stream_before_all_edits():
    sae = tiny.tiny_sae()
    x, found, run = after(sae, Plan((rule("tiny", Splice(), trigger=AnyActive((5,))), rule("tiny", Ablate(), 5))))
    fires = sae.encode(x)[..., 5] > 0

    splice = run.report.rules[0].edited_positions[0]
    assert splice == tuple(tuple(row.nonzero()[:, 0].tolist()) for row in fires)
    assert laws.same_bits(found[~fires], x[~fires])
    assert fires.any()
    assert not fires.all()


def test_report_of_dense_rules_gives_the_size_of_what_each_added():
    sae = tiny.tiny_sae()
    double = rule("tiny", Reweight(2.0, mode="weight", others=0.0), *range(48))
    x, _, run = after(sae, Plan((rule("tiny", Splice()), double)))
    error = torch.linalg.vector_norm(sae.decode(sae.encode(x)) - x, dim=-1)
    pre = x @ sae.W_enc + sae.b_enc
    moved = (torch.where(2 * pre > sae.threshold, 2 * pre, 0.0) - sae.encode(x)) @ sae.W_dec
    sizes = torch.linalg.vector_norm(moved, dim=-1)

    splice, weighed = run.report.rules
    assert splice.mean_delta == pytest.approx(float(error.mean()), rel=1e-5)
    assert splice.tokens_edited == splice.tokens_selected == IDS.numel()
    assert weighed.mean_delta == pytest.approx(float(sizes[sizes > 0].mean()), rel=1e-5)
    assert splice.mean_share == pytest.approx(float((error / torch.linalg.vector_norm(x, dim=-1)).mean()), rel=1e-5)


def test_special_tokens_and_rows_without_a_plan_keep_their_bits():
    sae, plan = tiny.tiny_sae(), Plan((Rule("tiny", (), Splice()),))

    x, y, _ = after(sae, [plan, None, plan])

    assert laws.same_bits(x[1], y[1])
    assert laws.same_bits(x[:, 0], y[:, 0])
    assert laws.distance(y[0, 1:], sae.decode(sae.encode(x[0, 1:]))) <= 1e-5


def test_splice_writes_the_reconstruction_in_the_models_dtype():
    sae, model = tiny.tiny_sae(), tiny.fresh_model(dtype=torch.bfloat16)
    x, found, _ = after(sae, Plan((rule("tiny", Splice()),)), model=model)

    assert found.dtype == torch.bfloat16
    assert laws.distance(found, sae.decode(sae.encode(x))) <= 2**-8


BOOSTABLE = [kind for kind in sorted(KINDS) if kind != "pursuit"]


def boosted(kind: str, norm: str = "none", *, seed: int = 0, rank_by: bool = False, d_out: int | None = None) -> SAE:
    """Eight latents of a kind and four boosts."""
    sae = test_kinds.random_sae(kind, norm, seed=seed, rank_by=rank_by, d_out=d_out)
    limits = torch.rand(12, generator=torch.Generator().manual_seed(seed))
    return replace(sae, n_base=8, threshold=limits if sae.threshold is None else sae.threshold)


@settings(max_examples=cases(1_000))
@given(st.data())
def test_dense_kernels_compute_the_formula_on_boosted_saes(data):
    kind, norm = data.draw(st.sampled_from(BOOSTABLE)), data.draw(st.sampled_from(("none", "layer_norm", "const_norm")))
    sae = boosted(kind, norm, seed=data.draw(st.integers(0, 999)), rank_by=data.draw(st.booleans()),
                  d_out=data.draw(st.sampled_from((None, 5))))  # fmt: skip
    latents = data.draw(st.lists(st.integers(0, 11), max_size=5, unique=True).map(tuple))
    rules = (
        Rule("random", (), data.draw(laws.splices(sae)), special=True, trigger=data.draw(st.none() | TRIGGERS)),
        Rule("random", latents, data.draw(laws.reweights(sae, k=len(latents))), special=True),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9999)))
    x = torch.randn(1, 2, sae.d_in, generator=generator)
    y = torch.randn(1, 2, sae.d_out, generator=generator) if sae.is_transcoder else x
    others = (sae, laws.weighted(rules[1], sae))
    assume(not any(test_kinds.hesitates(token.tolist(), other) for token in x[0] for other in others))
    token = {"real": True, "special": False, "covers": [True, True], "absolute": 0, "since": 0}

    told = [slow_maths.tell(x[0, t].tolist(), token, rules, {"random": sae}, y[0, t].tolist()) for t in range(2)]

    for kernel in KERNELS:
        found = y + test_kinds.changed(sae, list(rules), x, y, kernel)
        assert laws.distance(found[0], torch.tensor([t.x for t in told], dtype=torch.float64)) <= 2e-5, kernel


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_reconstruction_of_a_boosted_sae_is_what_it_decodes(kind, norm):
    sae = boosted(kind, norm)
    x = torch.randn(1, 5, sae.d_in, generator=torch.Generator().manual_seed(1))

    moved = test_kinds.changed(sae, [Rule("random", (), Splice("boosted"), special=True)], x, x, "sliced")

    assert laws.distance(x + moved, sae.decode(sae.encode(x), x)) <= 1e-5


TRIGGERS = st.builds(AnyActive, st.lists(st.integers(0, 11), min_size=1, max_size=3, unique=True).map(tuple))


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropped_error_is_that_of_the_base_and_boosted_error_that_of_all(kernel):
    whole = tiny.tiny_sae()
    base = replace(
        whole, name="base", W_enc=whole.W_enc[:, :30], b_enc=whole.b_enc[:30], W_dec=whole.W_dec[:30],
        threshold=whole.threshold[:30], maximum=whole.maximum[:30],
    )  # fmt: skip
    sae = replace(whole, n_base=30)

    x, dropped, _ = after(sae, Plan((rule("tiny", Splice("dropped")),)), kernel=kernel)
    _, all_of_it, _ = after(sae, Plan((rule("tiny", Splice("boosted")),)), kernel=kernel)
    _, kept, _ = after(sae, Plan((rule("tiny", Splice("kept")),)), kernel=kernel)

    assert laws.distance(dropped, base.decode(base.encode(x))) <= 1e-5
    assert laws.distance(all_of_it, whole.decode(whole.encode(x))) <= 1e-5
    assert laws.distance(dropped, all_of_it) > 1e-2
    assert laws.same_bits(kept, x)


DENSE_PLAN = Plan(
    (
        Rule("wide", (), Splice(), first=5), Rule("wide", (1, 40), Reweight((2.0, -1.0), mode="swap", others=1.0)),
    )
)  # fmt: skip


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
@pytest.mark.parametrize("at_a_time", [1, 300, 3 * 300])
def test_stretches_of_any_size_edit_alike(at_a_time, activation, monkeypatch):
    sae = tiny.tiny_sae(d_sae=300, activation=activation, name="wide")
    _, whole, run = after(sae, DENSE_PLAN)

    monkeypatch.setattr(dense, "AT_A_TIME", at_a_time)
    _, found, again = after(sae, DENSE_PLAN)

    assert laws.distance(found, whole) <= 1e-6
    assert laws.edited(again) == laws.edited(run)


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_an_encoder_that_is_too_wide_for_float32_edits_alike(activation, monkeypatch):
    sae = tiny.tiny_sae(d_sae=300, activation=activation, name="wide").to(dtype=torch.bfloat16)
    _, whole, _ = after(sae, DENSE_PLAN)

    monkeypatch.setattr(dense_parts, "KEPT_FLOAT32", 1)
    monkeypatch.setattr(dense, "CHUNK", 128)
    _, found, _ = after(sae, DENSE_PLAN)

    assert laws.distance(found, whole) <= 1e-6


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_dense_kernel_never_holds_more_than_its_stretch(activation, monkeypatch):
    """No tensor that is made on the way is larger than the stretch, or a chunk of the encoder in float32."""
    sae = tiny.tiny_sae(d_sae=65_536, d_in=8, activation=activation, name="wide", site=laws.STACK_SITE)
    sae = sae.to(dtype=torch.bfloat16)
    monkeypatch.setattr(dense_parts, "KEPT_FLOAT32", 1)
    monkeypatch.setattr(dense, "AT_A_TIME", 1 << 20)
    part = dense_parts.lay_out_dense(sae, [replace(each, special=True) for each in DENSE_PLAN.rules])
    x = torch.randn(1, 512, 8)
    seen: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            views = func in (torch.ops.aten.transpose.int, torch.ops.aten.slice.Tensor, torch.ops.aten.t.default)
            parts = out if isinstance(out, tuple | list) else (out,)
            seen.extend(t.numel() for t in parts if isinstance(t, Tensor) and not views)
            return out

    with Watch():
        dense.edit(x, x, part, torch.ones(1, 512, 2, dtype=torch.bool))

    assert max(seen) <= 1 << 20


def test_an_sae_that_a_dense_op_needs_is_loaded_whole(tmp_path):
    sae = tiny.tiny_sae()
    source = str(save_sae(sae, tmp_path / "sae"))
    rules = (Rule(source, (), Splice()), Rule(source, (3,), Add(2.0)))
    model = tiny.tiny_model()

    with torch.no_grad(), steer(model, Plan(rules)) as run:
        found = model(IDS).logits
    with torch.no_grad(), steer(model, Plan(rules), saes={source: sae}):
        expected = model(IDS).logits

    assert laws.same_bits(found, expected)
    assert run.saes[source].held is None


SPLICE, SWAP = Rule("tiny", (), Splice()), Rule("tiny", (1, 2), Reweight(0.5, mode="swap"))
OTHER = tiny.tiny_sae(name="other", seed=9)
ELSEWHERE = tiny.tiny_sae(name="elsewhere", site=Site("resid_post", 2))
SAES = [tiny.tiny_sae(), OTHER, ELSEWHERE]
CLASHES = {
    "two splices": (SPLICE, Rule("tiny", (), Splice("kept"), first=3)),
    "two splices of two SAEs": (SPLICE, Rule("other", (), Splice())),
    "reweight and clamp": (SWAP, Rule("tiny", (7,), Clamp(1.0, when="always"))),
    "reweight and a clamp with a priority": (SWAP, Rule("tiny", (7,), Clamp(1.0, when="always"), priority=3)),
    "two reweights": (SWAP, Rule("tiny", (7,), Reweight(2.0, mode="weight"))),
}
COMPANY = {
    "splice and clamp": (SPLICE, Rule("tiny", (7,), Clamp(1.0, when="always"))),
    "splice and reweight": (SPLICE, SWAP),
    "reweights of two SAEs": (SWAP, Rule("other", (7,), Reweight(2.0, mode="weight"))),
    "splice, and another SAE's clamp and reweight": (SPLICE, replace(SWAP, sae="other")),
    "splices at two sites": (SPLICE, Rule("elsewhere", (), Splice())),
    "reweight and an op on no latents": (SWAP, Rule("tiny", (), Scale(2.0))),
}


@pytest.mark.parametrize("name", CLASHES)
def test_rules_that_contradict_a_dense_op_are_refused(name):
    refused = pytest.raises(OverlappingRules, match="two reconstructions" if "splice" in name else "sets every latent")

    with refused, steer(tiny.tiny_model(), Plan(CLASHES[name]), saes=SAES):
        pass


@pytest.mark.parametrize("name", CLASHES)
def test_rules_that_contradict_a_dense_op_of_an_outer_block_are_refused(name):
    (first, second), model = CLASHES[name], tiny.tiny_model()
    refused = pytest.raises(OverlappingRules, match="two reconstructions" if "splice" in name else "sets every latent")

    with steer(model, Plan((second,)), saes=SAES):
        model(IDS)
        with refused, steer(model, Plan((first,)), saes=SAES):
            pass


@pytest.mark.parametrize("name", COMPANY)
def test_rules_that_go_with_a_dense_op_are_joint_in_any_order_and_nesting(name):
    first, second = COMPANY[name]
    model = tiny.tiny_model()

    with torch.no_grad():
        with steer(model, Plan((first, second)), saes=SAES):
            expected = model(IDS).logits
        with steer(model, Plan((second, first)), saes=SAES):
            turned = model(IDS).logits
        with steer(model, Plan((second,)), saes=SAES), steer(model, Plan((first,)), saes=SAES):
            nested = model(IDS).logits

    assert laws.same_bits(turned, expected)
    assert laws.distance(nested, expected) <= 1e-5


def test_contradictions_in_different_rows_are_none():
    model = tiny.tiny_model()
    plans = [Plan((SPLICE,)), Plan((Rule("other", (), Splice()),)), Plan((SWAP,))]

    with torch.no_grad(), steer(model, plans, saes=SAES) as run:
        found = model(IDS).logits

    assert [[bool(row) for row in entry.edited_positions[0]] for entry in run.report.rules] == torch.eye(
        3
    ).bool().tolist()
    for row, plan in enumerate(plans):
        with torch.no_grad(), steer(model, plan, saes=SAES):
            assert laws.distance(model(IDS[row : row + 1]).logits[0], found[row]) <= 1e-5


BAD: dict[str, Any] = {
    "unknown error": (lambda: Splice("lost"), "error='lost'"),  # type: ignore[arg-type]
    "splice on latents": (lambda: Rule("a", (1,), Splice()), "whole reconstruction"),
    "splice with a priority": (lambda: Rule("a", (), Splice(), priority=1), "none can yield"),
    "unknown mode": (lambda: Reweight(1.0, mode="mix"), "mode='mix'"),  # type: ignore[arg-type]
    "weights that are not numbers": (lambda: Reweight((1.0, float("nan")), mode="swap"), "nan is not a finite"),
    "weights beyond float32": (lambda: Reweight((1.0, 1e39), mode="swap"), "float32 ends"),
    "several others": (lambda: Reweight(1.0, mode="swap", others=(1.0, 2.0)), "not one number"),  # type: ignore[arg-type]
    "too few weights": (lambda: Rule("a", (1, 2), Reweight((1.0,), mode="swap")), "1 weights were given"),
    "no top_k": (lambda: Reweight(1.0, mode="swap", top_k=0), "top_k=0"),
    "top_k True": (lambda: Reweight(1.0, mode="swap", top_k=True), "top_k=True"),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", BAD)
def test_bad_dense_ops_are_refused_by_name(name):
    make, message = BAD[name]

    with pytest.raises(BadRule, match=message):
        make()


MISMATCHES = {
    "boosts that are not there": ("relu", Splice("boosted"), (), OpMismatch, "has no boosts"),
    "pre-activations of pursuit": ("pursuit", Reweight(1.0, mode="swap"), (), OpMismatch, "no pre-activations"),
    "a rank in groups": ("groupmax", Reweight(1.0, mode="swap", top_k=2), (), OpMismatch, "each of 4 groups"),
    "a rank of more than there are": ("relu", Reweight(1.0, mode="swap", top_k=13), (), OpMismatch, "1 to 12"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_what_an_sae_cannot_do_is_refused_before_the_model_is_touched(name):
    kind, op, latents, error, message = MISMATCHES[name]
    sae = test_kinds.random_sae(kind)

    with pytest.raises(error, match=message):
        dense_parts.lay_out_dense(sae, [Rule("random", latents, op)])


@pytest.mark.parametrize("rule_", [SPLICE, SWAP])
def test_an_sae_that_was_read_in_part_is_refused(rule_):
    part = tiny.tiny_sae().narrow((1, 2))

    with pytest.raises(NotSliceable, match="2 of its 48 latents"), steer(tiny.tiny_model(), Plan((rule_,)), saes=part):
        pass


def test_weights_that_overflow_are_refused_and_nothing_is_sampled():
    plan = Plan((Rule("tiny", (), Reweight(1.0, mode="weight", others=3e38)),))

    with pytest.raises(UnstableEdit), torch.no_grad(), steer(tiny.tiny_model(), plan, saes=tiny.tiny_sae()):
        tiny.tiny_model()(IDS)


def test_dense_rules_have_a_canonical_text():
    """Written out, because signatures of saved plans depend on every byte of it."""
    plan = Plan((Rule("a", (), Splice("boosted")), Rule("a", (3, 1), Reweight((2, 0.5), mode="swap", top_k=32))), "n")
    rest = '"phase":"all","priority":null,"sae":"a","site":null,"special":false,"start":0,"stop":null,"trigger":null}'

    assert plan.to_json() == (
        '{"name":"n","rules":[{"first":null,"latents":[],"op":{"error":"boosted","kind":"splice"},' + rest + ","
        '{"first":null,"latents":[3,1],"op":{"kind":"reweight","mode":"swap","others":0.0,"top_k":32,'
        '"weights":[2.0,0.5]},' + rest + '],"saeguard":"plan","schema":1}'
    )
    assert Plan.from_json(plan.to_json()) == plan
    assert str(plan.rules[1]) == "Reweight((2.0, 0.5), mode='swap', top_k=32, others=0) on a[3, 1]"
    assert str(plan.rules[0]) == "Splice(error='boosted') on a"


def test_many_weights_are_summed_up_where_people_read(tmp_path: Path):
    from typer.testing import CliRunner

    from saeguard.cli import app

    plan = Plan((Rule("a", tuple(range(500)), Reweight(tuple(i / 500 for i in range(500)), mode="swap")),))
    plan.save(tmp_path / "plan.json")

    shown = " ".join(
        CliRunner().invoke(app, ["plan", str(tmp_path / "plan.json")], env={"COLUMNS": "400"}).output.split()
    )

    assert "500 weights from 0 to 0.998" in str(plan.rules[0])
    assert "500 weights from 0 to 0.998" in shown
    assert "500 in all" in shown


def test_one_sae_under_two_names_is_still_one():
    """A copy with another name was once another SAE: what one rule set the other one set again."""
    saes, model = [tiny.tiny_sae(), tiny.tiny_sae(name="copy")], tiny.tiny_model()
    clash = (SWAP, Rule("copy", (7,), Clamp(1.0, when="always")))
    twice = (Rule("tiny", (7,), Add(1.0)), Rule("copy", (7,), Add(2.0)))

    for first, second in (clash, twice):
        with pytest.raises(OverlappingRules), steer(model, Plan((first, second)), saes=saes):
            pass
        with steer(model, Plan((first,)), saes=saes):
            model(IDS)
            with pytest.raises(OverlappingRules), steer(model, Plan((second,)), saes=saes):
                pass
