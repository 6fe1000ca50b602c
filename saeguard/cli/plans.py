"""``saeguard plan``: read a plan file, say what it does, give its canonical text and fingerprint, set its strength."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.console import Json, check_target, out, table, write_json
from saeguard.cli.reading import DEMO, Model, Seed
from saeguard.cli.strengths import Asked, origin_of, strengthened
from saeguard.cli.training import progress_bars

SHOWN = 12
"""Latents of a rule that are written out."""


def plan(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A plan file, as Plan.save writes it.")],
    canonical: Annotated[bool, typer.Option("--canonical", help="Write the canonical text and nothing else.")] = False,
    bind: Annotated[
        bool, typer.Option("--bind", help="Also load its SAEs and check latents, maxima and sites.")
    ] = False,
    kl: Annotated[
        float | None, typer.Option(help="Scale each rule's amounts until its edits move predictions by so many nats.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="For --kl: text files to edit; repeatable.")] = None,
    model: Model = DEMO,
    tokens: Annotated[int, typer.Option(min=1, help="For --kl: tokens of the text at most.")] = 2_000,
    seed: Seed = 0,
    target: Annotated[Path | None, typer.Option("--out", help="For --kl: where the new plan goes.")] = None,
    as_json: Json = False,
) -> None:
    """Check a plan file and show its rules, its canonical text's length and its fingerprint.

    Two plans with one fingerprint do the same; names and the order of rules do not count. Exit status 2 when the file
    is not a plan. With --kl the amounts are calibrated: saeguard plan p.json --kl 0.1 --text bio.jsonl --out new.json
    """
    from saeguard.plans import Plan

    for option, given in (("--text", text), ("--out", target)):
        if given is not None and kl is None:
            raise typer.BadParameter(f"{option} needs --kl")
    if kl is not None and not text:
        raise typer.BadParameter("--kl needs --text: predictions are moved on some text")
    found = Plan.load(file)
    if kl is not None:
        check_target(target)
        _set_strength(found, Asked(kl, text or [], model, tokens, seed), target, as_json=as_json)
        return
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


def _set_strength(plan: Any, asked: Asked, target: Path | None, *, as_json: bool) -> None:
    with progress_bars(shown=not as_json) as tell:
        new, found = strengthened(plan, asked, tell)
    document = {"plan": json.loads(new.to_json()), "strength": [one.figures() for one in found]}
    if target is not None:
        new.save(target)
        origin_of(target).write_text(json.dumps({"of": plan.fingerprint()} | document) + "\n", encoding="utf-8")
    if as_json:
        write_json(document)
        return
    named = [(one.rule.op, f"{one.rule.sae}: {_some(one.rule)}") for one in found]
    figures = [(f"{one.factor:.4g}", f"{one.kl:.4g}", one.edited, one.tokens) for one in found]
    rows = [(*name, *numbers) for name, numbers in zip(named, figures, strict=True)]
    heads = ("op", "latents", "times", "KL in nats", "edited", "of tokens")
    out().print(table(f"Strength at {asked.kl:g} nats", heads, rows, right=(2, 3, 4, 5)))
    if target is not None:
        out().print(f"Wrote {target} and {origin_of(target)}", style="dim")


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
