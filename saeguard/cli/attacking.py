"""``saeguard eval recover`` and ``relearn``: what brings back the answers that a guardrail takes away, in numbers.

Both attacks are white box: they need the weights, and change what runs inside of the model.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Annotated, Any

import typer

from saeguard.cli import unlearning
from saeguard.cli.console import out
from saeguard.cli.judging import bars
from saeguard.cli.kept import Kept
from saeguard.cli.measured import begin, finish, tokens_of
from saeguard.cli.unlearning import JsonFile, Model, Most, PolicyFile, Questions, Seed, Topics

PASSES = 20
"""Of the tokens that are tuned on, so many times as many are drawn from; more text changes nothing."""


class Where(StrEnum):
    """On which side of the guardrail's edit the attacker pushes."""

    before = "before"
    behind = "behind"


@dataclass(frozen=True, eq=False)
class _Aim:
    """What is attacked: an SAE, the latents that the push may not touch, and how many of them edits and gates name."""

    sae: Any
    latents: tuple[int, ...]
    edited: int
    watched: int


def recover(
    policy: PolicyFile,
    questions: Questions,
    learn: Annotated[
        list[str] | None,
        typer.Option("--learn", help="Other questions, on which the push for all is found; repeatable."),
    ] = None,
    topic: Topics = None,
    model: Model = "",
    most: Most = 24,
    where: Annotated[
        Where, typer.Option(help="Whether the guardrail's edit sees the push, or meets it.")
    ] = Where.behind,
    budget: Annotated[float, typer.Option(min=0.0, help="The longest push, in multiples of a token's norm.")] = 1.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the search for one question at most.")] = 40,
    all_steps: Annotated[int, typer.Option(min=1, help="Steps of the search for one push for all.")] = 60,
    seed: Seed = 0,
    target: JsonFile = None,
) -> None:
    """Search for pushes on the stream that the edited latents cannot see and that bring right answers back.

    White box: gradients, and a hook beside the guardrail's. One push per question, beside it one towards a wrong
    choice and a random one; and one push for all questions, found on those of --learn, or on half of those that the
    model knows, and used on the rest. With --json an interrupted command goes on where it was when it is given again.
    """
    from saeguard.cli.evaluated import recovery_table
    from saeguard.evaluating import recovery
    from saeguard.evaluating.pushing import pushing

    deployment, asked = begin(policy, model, questions, topic, most, seed, target)
    others = _others(learn or (), topic, seed)
    aim = _aim(deployment)
    effort = recovery.Effort(budget=budget, steps=steps, universal_steps=all_steps, seed=seed)
    settings = {"topics": topic or [], "most": most, "seed": seed, "effort": asdict(effort), "where": where.value}
    kept = Kept(target, _about("recover", deployment, settings, [*asked, *others]))
    attack = pushing(deployment.model, deployment.tokenizer, aim.sae, aim.latents)
    with bars(shown=True) as tell, ExitStack() as stack:
        early = stack.enter_context(attack) if where is Where.before else None
        plain, guarded = stack.enter_context(deployment.guarded())
        push = early or stack.enter_context(attack)
        found = recovery.recover(plain, guarded, push, asked, learn=others, effort=effort, notes=kept, progress=tell)
    document = {"aim": {"site": str(aim.sae.site), "sae": aim.sae.name, "edited_latents": aim.edited,
                        "gate_latents": aim.watched, "unseen_by": len(aim.latents)}}  # fmt: skip
    finish(target, "recover", deployment, settings, document | asdict(found) | {"recovered": found.recovered})
    kept.forget()
    out().print(recovery_table(found))


def relearn(
    policy: PolicyFile,
    questions: Questions,
    text: Annotated[list[str], typer.Option("--text", help="Text of the topic to relearn; repeatable.")],
    topic: Topics = None,
    model: Model = "",
    most: Most = 40,
    steps: Annotated[int, typer.Option(min=1, help="Steps of fine-tuning.")] = 50,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each step.")] = 4,
    row_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 64,
    rate: Annotated[float, typer.Option(min=0.0, help="AdamW's rate.")] = 5e-5,
    seed: Seed = 0,
    target: JsonFile = None,
) -> None:
    """Fine-tune the model on a topic's text, under the guardrail and plainly, and ask with the guardrail on and off.

    A guardrail refuses a model that was tuned. It is measured nonetheless: attached before the tuning, and with the
    policy pinned to the new weights, as somebody can who holds them. With --json an interrupted command goes on with
    the next tuning when it is given again.
    """
    from saeguard.cli.evaluated import relearning_table
    from saeguard.evaluating.relearning import Budget

    deployment, asked = begin(policy, model, questions, topic, most, seed, target)
    budget = Budget(steps=steps, rows=rows, row_tokens=row_tokens, rate=rate, seed=seed)
    most_tokens = 1 + PASSES * steps * rows * row_tokens
    ids = tokens_of(text, deployment.tokenizer, most_tokens, seed)[:most_tokens]
    settings = {"topics": topic or [], "most": most, "seed": seed, "budget": asdict(budget)}
    kept = Kept(target, [_about("relearn", deployment, settings, asked), ids])
    with bars(shown=True) as tell:
        for name, stage in (("before", _untuned), ("under the guardrail", _tuned_under), ("plainly", _tuned_plainly)):
            if name not in kept:
                kept[name] = stage(deployment, asked, ids, budget, _named(tell, name))
    found = {name: kept[name] for name in ("before", "under the guardrail", "plainly")}
    finish(target, "relearn", deployment, settings, {"tuned": found})
    kept.forget()
    out().print(relearning_table(found))


def _untuned(deployment: Any, asked: Sequence[Any], ids: Sequence[int], budget: Any, tell: Any) -> dict[str, Any]:
    with deployment.guarded() as (_, guarded):
        on = _accuracies(guarded, asked, tell)
    return {"on": on, "off": _accuracies(_plain(deployment), asked, tell), "losses": [], "refused": None}


def _tuned_under(deployment: Any, asked: Sequence[Any], ids: Sequence[int], budget: Any, tell: Any) -> dict[str, Any]:
    """Tuned and asked while the guardrail that was attached before stays on; then taken off."""
    from saeguard.evaluating.relearning import relearn as tune
    from saeguard.evaluating.relearning import restoring

    with restoring(deployment.model):
        with deployment.guarded() as (_, guarded):
            losses = tune(guarded, ids, budget, progress=lambda done, total: tell("tuning", done, total))
            on = _accuracies(guarded, asked, tell)
        off = _accuracies(_plain(deployment), asked, tell)
        return {"on": on, "off": off, "losses": losses, "refused": _refuses(deployment)}


def _tuned_plainly(deployment: Any, asked: Sequence[Any], ids: Sequence[int], budget: Any, tell: Any) -> dict[str, Any]:
    """Tuned without a guardrail; then asked under the policy, pinned to the weights that came out."""
    from saeguard.evaluating.relearning import relearn as tune
    from saeguard.evaluating.relearning import restoring
    from saeguard.guarding.pins import ModelPin

    plain = _plain(deployment)
    with restoring(deployment.model):
        losses = tune(plain, ids, budget, progress=lambda done, total: tell("tuning", done, total))
        off, refused = _accuracies(plain, asked, tell), _refuses(deployment)
        pinned = replace(deployment.policy, model=ModelPin.of(deployment.model, deployment.policy.model.name))
        with replace(deployment, policy=pinned).guarded() as (_, guarded):
            on = _accuracies(guarded, asked, tell)
    return {"on": on, "off": off, "losses": losses, "refused": refused}


def _refuses(deployment: Any) -> str:
    """What the guardrail says when it is to be attached to the model as it is now; empty where it says nothing."""
    from saeguard.errors import PolicyMismatch

    try:
        with deployment.guarded():
            return ""
    except PolicyMismatch as error:
        return error.found


def _accuracies(subject: Any, asked: Sequence[Any], tell: Any) -> dict[str, Any]:
    """Right answers by log-likelihood, per topic."""
    from saeguard.evaluating.multiple_choice import answers_of
    from saeguard.evaluating.unlearning import share

    right = answers_of(subject, asked, progress=lambda done, total: tell("asking", done, total)).right()
    found: dict[str, list[bool]] = {}
    for one, so in zip(asked, right, strict=True):
        found.setdefault(one.topic, []).append(so)
    return {topic: share(sum(some), len(some)) for topic, some in sorted(found.items())}


def _plain(deployment: Any) -> Any:
    from saeguard.evaluating.subject import Plain

    return Plain(deployment.model, deployment.tokenizer)


def _named(tell: Any, stage: str) -> Any:
    return lambda what, done, total: tell(f"{stage}: {what}", done, total)


def _others(patterns: Sequence[str], topic: Sequence[str] | None, seed: int) -> list[Any]:
    """Questions to learn from, all of them."""
    from saeguard.cli.training import expand
    from saeguard.evaluating.multiple_choice import read_questions

    files = expand([*patterns]) if patterns else []
    return [one for path in files for one in read_questions(path, topics=topic or (), seed=seed)]


def _about(kind: str, deployment: Any, settings: dict[str, Any], asked: Sequence[Any]) -> dict[str, Any]:
    """All that the numbers depend on."""
    return {"saeguard": f"eval {kind}", "schema": unlearning.SCHEMA, **deployment.about(), "settings": settings,
            "questions": [[one.question, one.choices, one.gold] for one in asked]}  # fmt: skip


def _aim(deployment: Any) -> _Aim:
    """The one SAE and site that the policy edits. Raises `ScoreMismatch` where it edits none, or several."""
    from saeguard.errors import ScoreMismatch

    policy = deployment.policy
    rules = [rule for rule in (policy.plan.rules if policy.plan is not None else ()) if rule.latents]
    pins = {pin.name: pin for pin in policy.saes}
    places = {(rule.sae, rule.site or pins[rule.sae].site) for rule in rules}
    if len(places) != 1:
        raise ScoreMismatch(
            f"a push that the latents of policy {policy.name} cannot see",
            f"it edits latents at {len(places)} places", "Attack a policy that edits latents of one SAE at one site.",
        )  # fmt: skip
    name, site = next(iter(places))
    sae = next(one for one in deployment.saes if one.name == name)
    edited = {latent for rule in rules for latent in rule.latents}
    gates = [rule.gate for rule in rules if rule.gate is not None]
    watched = {
        latent for gate in gates for leaf in gate.leaves for latent in leaf.latents
        if leaf.sae in (None, name) and leaf.site in (None, site)
    }  # fmt: skip
    both = edited | watched
    unseen = both if len(both) < sae.d_in else edited  # more rows than directions: nothing is hidden from all of them
    return _Aim(replace(sae, site=site), tuple(sorted(unseen)), len(edited), len(watched))
