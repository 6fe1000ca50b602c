"""``saeguard plan``: read a plan file, say what it does, and give its canonical text and fingerprint."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.console import Json, out, table, write_json

SHOWN = 12
"""Latents of a rule that are written out."""


def plan(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A plan file, as Plan.save writes it.")],
    canonical: Annotated[bool, typer.Option("--canonical", help="Write the canonical text and nothing else.")] = False,
    bind: Annotated[
        bool, typer.Option("--bind", help="Also load its SAEs and check latents, maxima and sites.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a plan file and show its rules, its canonical text's length and its fingerprint.

    Two plans with one fingerprint do the same; names and the order of rules do not count. Exit status 2 when the file
    is not a plan.
    """
    from saeguard.plans import Plan

    found = Plan.load(file)
    if bind:
        _check(found)
    if canonical:
        typer.echo(found.to_json())
    elif as_json:
        write_json({"fingerprint": found.fingerprint(), "bound": bind, "plan": json.loads(found.to_json())})
    else:
        _show(found, bind)


def _check(found: Any) -> None:
    """Build the editors without a model. Raises what `steer` would raise for the SAEs."""
    import torch

    from saeguard.editor import Editor, bind
    from saeguard.loaders import load_sae

    saes = {rule.sae: load_sae(rule.sae) for rule in found.rules}
    rules = bind([found], saes, every_row=True)
    for site in dict.fromkeys(bound.site for bound in rules):
        Editor(site, rules, saes, device=torch.device("cpu"))


def _some(rule: Any) -> str:
    """The latents of a rule, as many as a line can show."""
    if rule.is_dense and not rule.latents:
        return "all latents"
    more = f", ... {len(rule.latents)} in all" if len(rule.latents) > SHOWN else ""
    return f"[{', '.join(map(str, rule.latents[:SHOWN]))}{more}]"


def _show(found: Any, bound: bool) -> None:
    rows = [
        (
            rule.op,
            f"{rule.sae}: {_some(rule)}",
            rule.site or "the SAE's",
            rule.phase,
            rule.trigger or "-",
            "-" if rule.priority is None else rule.priority,
        )
        for rule in found.rules
    ]
    console = out()
    console.print(table(found.name or "unnamed plan", ("op", "latents", "site", "tokens", "trigger", "priority"), rows))
    checked = "rules and SAEs fit together" if bound else "a valid plan; --bind also checks its SAEs"
    console.print(f"{checked}, {len(found.to_json())} bytes in canonical form")
    console.print(f"fingerprint {found.fingerprint()}", soft_wrap=True)
