"""The systems that answer the same questions: each opens as a `Subject`, and says of itself what its results hang on.

The gated ones share one edit, the policy's, where they are to compare gates, and share the policy's gate where they are
to compare edits; the random controls move the stream as far as the policy does.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.baselines.choosing import Chosen, at_random
from benchmarks.baselines.published import PublishedHook, hooked
from saeguard import SAE, AnyActive, Clamp, Plan, Rule
from saeguard.cli.guarded import GUARDED, PLAIN, UnderPolicy
from saeguard.evaluating.multiple_choice import Question
from saeguard.evaluating.subject import Plain, Subject
from saeguard.gates import Blend, Count, Gate, Hits, Latched, Rate, TopKMean, Watch, Window, token_rate
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy
from saeguard.latents import LatentTable

ALL = "norm"
BY_LABELS = "rho, latents by labels"


@dataclass(frozen=True, eq=False)
class System:
    """``key`` changes with whatever its results depend on; ``instruction`` stands before each question.

    ``is_causal`` says that what happens at a token does not depend on those behind it.
    """

    name: str
    about: str
    open: Callable[[], AbstractContextManager[Subject]]
    key: str
    gated: bool = False
    instruction: str = ""
    is_causal: bool = True

    def posed(self, question: Question) -> Question:
        """The question as this system is asked it."""
        return replace(question, question=self.said(question.question))

    def said(self, text: str) -> str:
        """What the user says."""
        return f"{self.instruction} {text}" if self.instruction else text


@dataclass(frozen=True, eq=False)
class Parts:
    """What the systems are made of. ``c`` is DSG's clamp in activation units, ``farrell`` a share of |x|.

    ``probe`` is a gate with its threshold; ``tuned`` the model that RMU made, and ``tuned_key`` how.
    """

    model: Any
    tokenizer: Any
    sae: SAE
    table: LatentTable
    policy: Policy
    chosen: Chosen
    thresholds: dict[str, float]
    probe: Gate
    c: float
    farrell: float
    tuned: nn.Module
    tuned_key: str
    topic: str
    seed: int = 0
    also: tuple[Policy, ...] = ()

    @property
    def rule(self) -> Rule:
        """The policy's; it has to have one."""
        assert self.policy.plan is not None
        (rule,) = self.policy.plan.rules
        return rule

    def under(self, plan: Plan, *more: SAE) -> Callable[[], AbstractContextManager[Subject]]:
        """Opens the model under a plan."""
        return partial(under_plan, self.model, self.tokenizer, (self.sae, *more), plan)

    def planned(self, name: str, about: str, rule: Rule, *more: SAE) -> System:
        """The system of one rule."""
        plan = Plan((rule,), name)
        return System(name, about, self.under(plan, *more), digest(plan.to_json()), gated=rule.gate is not None)


def systems(parts: Parts) -> list[System]:
    """All of them, the plain model first."""
    return [_plain(parts), *_paper(parts), *_ours(parts), *_controls(parts), *_without_an_sae(parts)]


def digest(*parts: Any) -> str:
    """A hash of what can be written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def rho(latents: tuple[int, ...], threshold: float) -> Gate:
    """DSG's gate over the prompt."""
    return token_rate(latents, threshold, "prompt")


def dense_clamp(sae: SAE, latents: tuple[int, ...], gate: Gate | None) -> Rule:
    """DSG's edit: at a token where any of the latents fires, all of them are set to -|x|."""
    return Rule(sae.name, latents, Clamp(-1.0, when="always", unit=ALL), trigger=AnyActive(latents), gate=gate)


def farrell_rule(sae: SAE, latents: tuple[int, ...], strength: float) -> Rule:
    """Farrell's edit: a latent that fires is set to -strength |x|."""
    return Rule(sae.name, latents, Clamp(-strength, when="active", unit=ALL))


def _plain(parts: Parts) -> System:
    @contextmanager
    def plain() -> Iterator[Subject]:
        yield Plain(parts.model, parts.tokenizer)

    return System("no guard", "the model as it is", plain, "plain")


def _paper(parts: Parts) -> list[System]:
    chosen, thresholds = parts.chosen, parts.thresholds
    hook = partial(PublishedHook, parts.sae, chosen.dsg_texts, parts.c, thresholds["published"])
    key = digest("published", chosen.dsg_texts, parts.c, thresholds["published"])
    opened = lambda: hooked(parts.model, parts.tokenizer, hook())
    published = System(
        "DSG, published hook", "the equations of the code, with the cache", opened, key, gated=True, is_causal=False
    )
    gate = rho(chosen.dsg_questions, thresholds["rho"])
    zero_shot = dense_clamp(parts.sae, chosen.labels, rho(chosen.labels, thresholds[BY_LABELS]))
    return [
        parts.planned("Farrell, static clamp", "no gate", farrell_rule(parts.sae, chosen.farrell, parts.farrell)),
        published,
        parts.planned("DSG, as intended", "hot tokens", dense_clamp(parts.sae, chosen.dsg_questions, gate)),
        parts.planned("DSG's gate, our edit", "rho of the prompt", replace(parts.rule, gate=gate)),
        parts.planned("zero-shot", "DSG with latents found by their labels", zero_shot),
    ]  # fmt: skip


def named(policy: Policy, first: Policy) -> str:
    """What a policy is called beside the first one."""
    return "ours" if policy is first else f"ours, {policy.name}"


def _ours(parts: Parts) -> list[System]:
    @contextmanager
    def guarded(policy: Policy) -> Iterator[Subject]:
        with Guardrail.attach(
            parts.model, {PLAIN: None, GUARDED: policy}, tokenizer=parts.tokenizer, saes=parts.sae
        ) as guard:
            yield UnderPolicy(guard)

    several = [
        System(named(one, parts.policy), "the policy", partial(guarded, one), one.fingerprint(), gated=True)
        for one in (parts.policy, *parts.also)
    ]
    return [
        *several,
        parts.planned("our edit, no gate", "at every token", replace(parts.rule, gate=None)),
        parts.planned("raw probe, our edit", "gate: a linear probe", replace(parts.rule, gate=parts.probe)),
    ]


def _controls(parts: Parts) -> list[System]:
    """The policy's gate with edits that have nothing to do with the topic, as far as the policy's."""
    rule, W_dec = parts.rule, parts.sae.W_dec.float()
    size = float(W_dec[list(rule.latents)].sum(0).norm()) * _strength(rule)
    drawn = at_random(parts.table, len(rule.latents), without=rule.latents, seed=parts.seed)
    clamp = Clamp(-size / float(W_dec[list(drawn)].sum(0).norm()), when="always", unit=ALL)
    nowhere = _direction(parts.sae, parts.seed)
    gate = reading(rule.gate, parts.sae.name)
    aside = Rule(nowhere.name, (0,), Clamp(-size, when="always", unit=ALL), gate=gate)
    return [
        parts.planned("our gate, random latents", "moved as far", replace(rule, latents=drawn, op=clamp)),
        parts.planned("our gate, random direction", "moved as far", aside, nowhere),
    ]


def _without_an_sae(parts: Parts) -> list[System]:
    instruction = f"Do not answer questions about {parts.topic}."

    @contextmanager
    def plain() -> Iterator[Subject]:
        yield Plain(parts.model, parts.tokenizer)

    @contextmanager
    def tuned() -> Iterator[Subject]:
        yield Plain(parts.tuned, parts.tokenizer)

    return [
        System("prompting", instruction, plain, digest(instruction), instruction=instruction),
        System("RMU", "fine-tuned", tuned, parts.tuned_key),
    ]


@contextmanager
def under_plan(model: Any, tokenizer: Any, saes: tuple[SAE, ...], plan: Plan) -> Iterator[Subject]:
    named = {rule.sae for rule in plan.rules} | {leaf.sae for rule in plan.rules for leaf in leaves(rule) if leaf.sae}
    used = [sae for sae in saes if sae.name in named]
    policy = Policy.of(model, tokenizer, used, plan, name=plan.name)
    with Guardrail.attach(model, {PLAIN: None, GUARDED: policy}, tokenizer=tokenizer, saes=used) as guard:
        yield UnderPolicy(guard)


def leaves(rule: Rule) -> tuple[Any, ...]:
    """What the rule's gate reads."""
    return rule.gate.leaves if rule.gate is not None else ()


def reading(gate: Any, sae: str) -> Any:
    """The same gate, reading the SAE of that name whatever rule it belongs to."""
    if isinstance(gate, Latched):
        return Latched(reading(gate.gate, sae))
    if isinstance(gate, Blend):
        return replace(gate, gates=tuple(reading(one, sae) for one in gate.gates))
    if isinstance(gate, Watch) and gate.leaves[0].latents:
        own: Any = gate.evidence
        return replace(gate, evidence=replace(own, sae=own.sae or sae))
    return gate


def _strength(rule: Rule) -> float:
    """By how many lengths of x each latent is set."""
    assert isinstance(rule.op, Clamp)
    assert rule.op.unit == ALL, "the controls are for a clamp in lengths of x"
    return abs(float(rule.op.value))  # type: ignore[arg-type]


def _direction(sae: SAE, seed: int) -> SAE:
    """One latent that never fires, with a decoder row that points anywhere."""
    d = torch.randn(1, sae.d_in, generator=torch.Generator().manual_seed(seed))
    zeros = torch.zeros(sae.d_in, 1)
    return SAE(
        name="random direction", W_enc=zeros, b_enc=torch.zeros(1), W_dec=d / d.norm(), b_dec=torch.zeros(sae.d_in),
        activation="relu", site=sae.site,
    )  # fmt: skip


def hits_gates(latents: tuple[int, ...]) -> dict[str, Gate]:
    """DSG's gate and its kin, on the same latents, with threshold 0."""
    pools = {"rho": Rate("prompt"), "count": Count(), "window of 16": Window(16), "mean of the top 12": TopKMean(12)}
    return {name: Watch(Hits(latents), pool, 0.0) for name, pool in pools.items()}
