"""The work of ``saeguard plan --kl``: every rule of a plan at one KL, each alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saeguard.cli.texts import token_rows


@dataclass(frozen=True)
class Asked:
    """The options of the command."""

    kl: float
    text: Sequence[str]
    model: str
    tokens: int
    seed: int


def strengthened(plan: Any, asked: Asked, tell: Any) -> tuple[Any, list[Any]]:
    """``plan`` with its rules at ``asked.kl`` nats, and what was found for each. Raises what `kl_strength` raises."""
    from saeguard.loaders import load_sae
    from saeguard.models import load_model
    from saeguard.scoring.kl_strength import kl_strength, scaled

    for rule in plan.rules:
        scaled(rule, 1.0)  # refused before anything is loaded
    model, tokenizer = load_model(asked.model)
    saes = {name: load_sae(name) for name in _named(plan)}
    found = []
    for number, rule in enumerate(plan.rules, start=1):
        rows = token_rows({"text": asked.text}, tokenizer, saes[rule.sae], n_tokens=asked.tokens, seed=asked.seed)
        say = lambda done, total, number=number: tell(f"rule {number} of {len(plan.rules)}", done, total, "rows")
        found.append(
            kl_strength(model, tokenizer, saes, rule, rows["text"], kappa=asked.kl, progress=say if tell else None)
        )
    return replace(plan, rules=tuple(one.rule for one in found)), found


def _named(plan: Any) -> dict[str, None]:
    """The SAEs that rules and the leaves of their gates name."""
    leaves = [leaf for rule in plan.rules if rule.gate is not None for leaf in rule.gate.leaves]
    return dict.fromkeys([*(rule.sae for rule in plan.rules), *(leaf.sae for leaf in leaves if leaf.sae is not None)])


def origin_of(target: Path) -> Path:
    """Where the figures stand beside the plan."""
    return target.with_name(f"{target.stem}.strength.json")
