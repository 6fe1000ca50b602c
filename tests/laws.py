"""What the laws share: random rules, what a run edited, and whether a case lies too near an edge to be compared.

Two ways to compute one activation differ in the last bits of float32. Where an activation lies within `MARGIN` of a
number at which a rule changes its mind, the two may disagree in what they edit and both be right, so such a case is
rejected; in all other cases the edited sets have to be the same.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from saeguard import (
    SAE,
    Ablate,
    Add,
    AnyActive,
    AtLeast,
    AtMost,
    Boosted,
    Clamp,
    ClampAbove,
    Misdirect,
    Plan,
    Project,
    Reduce,
    Reweight,
    Rule,
    Run,
    Scale,
    Site,
    Splice,
    capture,
    steer,
)
from saeguard.errors import OverlappingRules
from saeguard.gates import Count, Cusum, Gate, Hits, Latched, Not, Peak, Rate, TopKMean, Watch, Window
from saeguard.plans import check_overlaps

MARGIN = 1e-4
TOLERANCE = 1e-5
STACK_SITE = Site("resid_post", 0)

Edited = dict[Rule, tuple[tuple[tuple[int, ...], ...], ...]]


def bits(x: Tensor) -> Tensor:
    """``x`` as integers: the signs of zeros and the payloads of NaNs count."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest number of ``b``."""
    if not b.numel():
        return 0.0
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


def edited(run: Run) -> Edited:
    """``[rule][call][row]``: the absolute positions that the rule edited."""
    return {bound.rule: entry.edited_positions for bound, entry in zip(run.rules, run.report.rules, strict=True)}


def edited_by_row(run: Run) -> list[dict[Rule, tuple[int, ...]]]:
    """Per row of the run's only call, what each rule edited; rules that edited nothing are left out."""
    found = edited(run)
    rows = max((len(row) for (row,) in found.values()), default=0)
    return [{rule: calls[0][row] for rule, calls in found.items() if calls[0][row]} for row in range(rows)]


def near_edge(model: nn.Module, plan: Any, saes: Sequence[SAE], ids: Tensor, **call: Any) -> bool:
    """Whether any activation that decides something lies within `MARGIN` of where the decision changes.

    The streams are those of a full pass over ``ids`` under ``plan``; padding counts too, which only rejects more.
    """
    kwargs = {name: call.pop(name) for name in ("special_ids", "prompt_tokens") if name in call}
    plans = [plan] if plan is None or isinstance(plan, Plan) else list(plan)
    by_name = {sae.name: sae for sae in saes}
    rules = {rule for plan in plans if plan is not None for rule in plan.rules}
    sites = {rule.site or by_name[rule.sae].site for rule in rules}
    if not sites:
        return False
    with steer(model, plan, saes=saes, **kwargs), capture(model, sites, side="before") as tape, torch.no_grad():
        model(ids, **call)
    return any(rule_near_edge(rule, by_name[rule.sae], tape[rule.site or by_name[rule.sae].site]) for rule in rules)


def rule_near_edge(rule: Rule, sae: SAE, x: Tensor) -> bool:
    """Whether ``rule`` hesitates anywhere in ``x``."""
    sae = sae.to(dtype=torch.float32)
    if rule.is_dense:
        return dense_near_edge(rule, sae, x)
    latents = list(rule.latents)
    watched = list(rule.trigger.latents) if rule.trigger else []
    watched += [latent for leaf in (rule.gate.leaves if rule.gate else ()) for latent in leaf.latents]
    pre = x.float() @ sae.W_enc + sae.b_enc
    f = sae.encode(x)
    near = MARGIN * (1 + pre.abs())
    n = sae.n_base or sae.d_sae
    if sae.ranks:
        top = pre[..., :n].topk(min((sae.top_k or 1) + 1, n), dim=-1).values
        close = (top[..., :-1] - top[..., 1:])[..., -1:] < 2 * near if n > (sae.top_k or 1) else near < 0
        close = close & (top[..., min(sae.top_k or 1, n) - 1, None].abs() > MARGIN)  # who ties with 0 loses nothing
        close = close | (pre.abs() < near)
        if sae.threshold is not None:
            close[..., n:] = ((pre - sae.threshold).abs() < near)[..., n:]
    else:
        close = (pre - (0.0 if sae.threshold is None else sae.threshold)).abs() < near
    if close[..., latents + watched].any():
        return True
    if rule.trigger and ((f - rule.trigger.threshold).abs() < near)[..., watched].any() and rule.trigger.threshold:
        return True
    lowered = rule.op.lower()
    if lowered.scale == 1.0 and lowered.lo == -torch.inf and lowered.hi == torch.inf:
        return False
    unit: Any = 1.0
    if lowered.unit == "norm":
        unit = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    elif lowered.unit == "max" and sae.maximum is not None:
        unit = sae.maximum[latents]
    for amount in (lowered.shift, lowered.floor, lowered.lo, lowered.hi):
        goal = torch.as_tensor(amount) * unit
        if ((f[..., latents] - goal).abs() < near[..., latents]).logical_and(goal != 0).any():
            return True
    return False


def dense_near_edge(rule: Rule, sae: SAE, x: Tensor) -> bool:
    """Whether a dense rule hesitates anywhere in ``x``, which any latent can make it do."""
    if not rule.needs_all:
        return rule_near_edge(Rule(rule.sae, (), Ablate(), trigger=rule.trigger, gate=rule.gate), sae, x)
    everybody = tuple(range(sae.d_sae))
    if rule_near_edge(Rule(rule.sae, everybody, Ablate(), trigger=rule.trigger), sae, x):
        return True
    if not isinstance(rule.op, Reweight):
        return False
    other = weighted(rule, sae)
    loud = other.W_enc.any(0).nonzero()[:, 0].tolist()  # the others are exactly 0 whatever x is, and do not hesitate
    return rule_near_edge(Rule(rule.sae, tuple(loud), Ablate()), other, x)


def weighted(rule: Rule, sae: SAE) -> SAE:
    """An SAE whose activations are those that a `Reweight` by weight makes: pre * w = x @ (W_enc * w) + b_enc * w."""
    op: Any = rule.op
    weight = torch.full((sae.d_sae,), op.others)
    weight[list(rule.latents)] = torch.tensor(op.weights)
    kind: dict[str, Any] = {}
    if op.top_k is not None:
        kind = {"activation": sae.activation if sae.ranks else "topk", "top_k": op.top_k}
        kind |= {"threshold": None, "n_base": None}
    return replace(sae, W_enc=sae.W_enc * weight, b_enc=sae.b_enc * weight, **kind)


def with_boosts(sae: SAE, sizes: Sequence[int], *, seed: int = 0) -> SAE:
    """``sae`` with random boosts behind it, of so many latents each; weights in eighths, so that sums are exact."""
    generator = torch.Generator().manual_seed(seed)

    def eighths(*shape: int) -> Tensor:
        return torch.randint(-12, 13, shape, generator=generator) / 8

    said = {"base": sae.fingerprint()}
    boosts = [
        replace(
            sae, name=f"boost {i}", W_enc=eighths(sae.d_in, n), b_enc=eighths(n), W_dec=eighths(n, sae.d_out),
            b_dec=torch.zeros(sae.d_out), activation="jumprelu", threshold=eighths(n).abs(), top_k=None, pursuit=None,
            skip=None, rank_by=None, maximum=eighths(n).abs() + 1, manifest={"boost": said | {"domain": str(i)}},
        )
        for i, n in enumerate(sizes)
    ]  # fmt: skip
    return Boosted(sae, boosts, name=sae.name)


PHASES = ("all", "prompt", "generated", "last", "newest")
amounts = st.integers(-32, 32).map(lambda n: n / 4)
units = st.sampled_from(("activation", "max", "norm"))


@cache
def ops(*, k: int, unit: st.SearchStrategy[str] = units, amount: st.SearchStrategy[float] = amounts) -> Any:
    """Any op on ``k`` latents, with one amount for all or one for each."""
    value = amount | st.lists(amount, min_size=k, max_size=k).map(tuple)
    return st.one_of(
        st.builds(Clamp, value, when=st.sampled_from(("always", "active")), unit=unit),
        st.builds(Scale, value),
        st.builds(Add, value, unit=unit),
        st.builds(Ablate),
        st.builds(AtLeast, value, unit=unit),
        st.builds(AtMost, value, unit=unit),
        st.builds(ClampAbove, value, above=value, unit=unit),
        st.builds(Reduce, (amount | st.lists(amount, min_size=k, max_size=k).map(tuple)).map(_positive), unit=unit),
    )


def _positive(value: Any) -> Any:
    return tuple(map(abs, value)) if isinstance(value, tuple) else abs(value)


@st.composite
def wheres(draw: Any, *, longest: int = 12, phases: Sequence[str] = PHASES) -> dict[str, Any]:
    """The arguments of a rule that say which tokens it is about."""
    start = draw(st.just(0) | st.integers(0, longest))
    return {
        "phase": draw(st.sampled_from(phases)),
        "first": draw(st.none() | st.integers(0, longest)),
        "start": start,
        "stop": draw(st.none() | st.integers(start, longest + 2)),
        "special": draw(st.booleans()),
    }


@st.composite
def rules(
    draw: Any, sae: SAE, *, most: int = 5, where: st.SearchStrategy[dict[str, Any]] | None = None,
    unit: st.SearchStrategy[str] = units, site: Site | None = None, gated: bool = False,
) -> Rule:  # fmt: skip
    """One rule on an SAE, dense or not, with or without a trigger, a priority, a choice of tokens and a gate."""
    latents = draw(_latents(sae.d_sae, most))
    trigger = None
    if draw(st.integers(0, 3)) == 0:
        trigger = AnyActive(draw(_latents(sae.d_sae, 4)), draw(st.integers(-4, 40)) / 4)
    options: dict[str, Any] = {"site": site, "trigger": trigger, **(draw(where) if where is not None else {})}
    if gated and draw(st.booleans()):
        options["gate"] = draw(gates(sae))
    match draw(st.integers(0, 19)):
        case 0 | 4:
            return Rule(sae.name, (), draw(splices(sae)), **options)
        case 1 | 5 if sae.pursuit is None:
            return Rule(sae.name, latents, draw(reweights(sae, k=len(latents))), **options)
        case 2:
            return Rule(sae.name, (), draw(MISDIRECTS), **options)
        case 3:
            return Rule(sae.name, latents, draw(PROJECTS), **options)
    priority = draw(st.none() | st.integers(-3, 3))
    return Rule(sae.name, latents, draw(ops(k=len(latents), unit=unit)), priority=priority, **options)


@st.composite
def gates(draw: Any, sae: SAE) -> Gate:
    """A gate on hits of the rule's own SAE, whose scores are never equal to its threshold."""
    evidence = Hits(draw(_latents(sae.d_sae, 4)), special=draw(st.booleans()))
    pool = draw(st.sampled_from((Rate(), Window(3), Cusum(0.25), Count(), Peak(), TopKMean(2))))
    watch = Watch(evidence, pool, draw(st.integers(-1, 8)) / 8 + 0.0137)
    return draw(st.sampled_from((watch, Not(watch), Latched(watch), Latched(Not(watch)))))


MISDIRECTS = st.builds(Misdirect, amounts, seed=st.integers(0, 2**63 - 1), unit=st.sampled_from(("stream", "norm")))
PROJECTS = st.builds(Project, amounts)


def splices(sae: SAE) -> st.SearchStrategy[Splice]:
    """Any `Splice` that ``sae`` can make."""
    return st.builds(Splice, st.sampled_from(("dropped", "kept", *(("boosted",) if sae.n_base is not None else ()))))


def reweights(sae: SAE, *, k: int) -> st.SearchStrategy[Reweight]:
    """Any `Reweight` of ``k`` latents of ``sae``; the weights are in quarters, so that products are exact."""
    weight = st.integers(-8, 8).map(lambda n: n / 4)
    top_k = st.none() if sae.activation == "groupmax" else st.none() | st.integers(1, sae.d_sae)
    weights = weight | st.lists(weight, min_size=k, max_size=k).map(tuple)
    mode, others = st.sampled_from(("weight", "swap")), st.sampled_from((0.0, 1.0, 1.0, 0.5))
    return st.builds(Reweight, weights, mode=mode, top_k=top_k, others=others)


@cache
def _latents(d_sae: int, most: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, d_sae - 1), max_size=min(most, d_sae), unique=True).map(tuple)


def compatible(found: Iterable[Rule], saes: Sequence[SAE] = ()) -> tuple[Rule, ...]:
    """Those of the rules that can stand in one plan, taken greedily; ``saes`` say where they are."""
    sites = {sae.name: sae.site for sae in saes}
    kept: list[Rule] = []
    for rule in found:
        try:
            check_overlaps((other, (other.sae, other.site or sites.get(other.sae))) for other in [*kept, rule])
        except OverlappingRules:
            continue
        kept.append(rule)
    return tuple(dict.fromkeys(kept))


@st.composite
def plans(draw: Any, saes: Sequence[SAE], *, most: int = 4, **options: Any) -> Plan:
    """One to ``most`` rules on some of the SAEs."""
    one = st.one_of(*(rules(sae, **options) for sae in saes))
    return Plan(compatible(draw(st.lists(one, min_size=1, max_size=most)), saes))


def steering(model: nn.Module, plan: Any, saes: Sequence[SAE], **options: Any) -> AbstractContextManager[Run]:
    """`steer` with the SAEs at hand."""
    return steer(model, plan, saes=saes, **options)


class Stack(nn.Module):
    """Blocks that return what they get, so that a site carries exactly the numbers that a test chose."""

    def __init__(self, width: int, layers: int = 1):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(layers))
        for block in self.blocks:
            block.register_parameter("width", nn.Parameter(torch.zeros(width)))

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The stream after the last block."""
        for block in self.blocks:
            inputs_embeds = block(inputs_embeds)
        return inputs_embeds
