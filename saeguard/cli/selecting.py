"""``saeguard select``: from scores to latents, and to a plan that says where they came from."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.console import Json, check_target, out, table, write_json
from saeguard.cli.latents import Labels, labels_for
from saeguard.cli.steering import AMOUNTS, Phase, Unit, When, make_op

_BOUND = re.compile(r"\s*(\w+)\s*(>=|<=)\s*([-+0-9.eE]+)\s*")
_WITHIN = re.compile(r"\s*(\w+)\s*=\s*(\d+)\s*")


def select(
    scores: Annotated[Path, typer.Argument(help="What `saeguard score` wrote.")],
    by: Annotated[str, typer.Option(help="The column to rank by; its best latents are chosen.")],
    top: Annotated[int, typer.Option(min=1, help="How many, at most.")] = 20,
    bound: Annotated[
        list[str] | None, typer.Option(help="Keep only 'frequency>=1e-4' or 'fake_ratio<=0.1'; repeatable.")
    ] = None,
    percentile_bound: Annotated[
        list[str] | None, typer.Option(help="The same in percentiles, such as 'output_score>=95'; repeatable.")
    ] = None,
    within: Annotated[
        list[str] | None, typer.Option(help="Keep the first so many of another column: topic=500; repeatable.")
    ] = None,
    op: Annotated[str, typer.Option(help=f"What a plan does with them: {', '.join(AMOUNTS)} or ablate.")] = "",
    value: Annotated[float | None, typer.Option(help="The op's amount.")] = None,
    unit: Annotated[Unit, typer.Option(help="Unit of the amount.")] = Unit.activation,
    when: Annotated[When, typer.Option(help="For clamp: everywhere, or only where the latent fires.")] = When.always,
    phase: Annotated[Phase, typer.Option(help="Which tokens the op is about.")] = Phase.all,
    target: Annotated[Path | None, typer.Option("--out", help="Write the plan there, its origin beside it.")] = None,
    labels: Labels = None,
    as_json: Json = False,
) -> None:
    """Choose latents by one score, within bounds on others, and write a plan for them.

    Example: saeguard select s.safetensors --by output_score --bound 'frequency>=1e-4' --op at_least --value 1
    --unit max --out plan.json
    """
    if target is not None and not op:
        raise typer.BadParameter("--out writes a plan, which needs --op, such as --op at_least --value 1 --unit max")
    if value is not None and not op:
        raise typer.BadParameter("--value needs --op")
    check_target(target)
    from saeguard.scoring.select import select as choose
    from saeguard.scoring.table import ScoreTable

    made = make_op(op, value, unit=unit.value, when=when.value) if op else None
    bounds = [*bounds_of(bound or [], percentile=False), *bounds_of(percentile_bound or [], percentile=True)]
    first = firsts_of(within or [])
    chosen = choose(ScoreTable.load(scores), by, top=top, bounds=bounds, within=first)
    plan = None if made is None else chosen.plan(made, phase=phase.value)
    written = [] if target is None or plan is None else _write(plan, chosen, target)
    if as_json:
        spelled = None if plan is None else json.loads(plan.to_json())
        write_json({"selection": json.loads(chosen.to_json()), "plan": spelled, "written": written})
        return
    shown = list(dict.fromkeys([by, *first, *(one.column for one in bounds)]))
    said = labels_for(chosen.sae, labels)
    rows = [
        (latent, *(_number(chosen.scores[name][place]) for name in shown), said.get(latent, "-"))
        for place, latent in enumerate(chosen.latents)
    ]
    title = f"{len(rows)} of {chosen.provenance['n_left']} latents of {chosen.sae} inside the bounds, by {by}"
    out().print(table(title, ("latent", *shown, "label"), rows, right=tuple(range(len(shown) + 1))))
    if plan is None:
        out().print(f"As a list: {','.join(map(str, chosen.latents))}", style="dim", soft_wrap=True)
    for path in written:
        out().print(f"Wrote {path}", style="dim")


def bounds_of(given: list[str], *, percentile: bool) -> list[Any]:
    """The `Bound` of each text, such as ``frequency>=1e-4``."""
    from saeguard.scoring.select import Bound

    found = []
    for text in given:
        match = _BOUND.fullmatch(text)
        try:
            number = float(match[3]) if match else None
        except ValueError:
            number = None
        if match is None or number is None:
            raise typer.BadParameter(f"the bound {text!r}: write COLUMN>=NUMBER or COLUMN<=NUMBER")
        end = "least" if match[2] == ">=" else "most"
        found.append(Bound(match[1], percentile=percentile, **{end: number}))
    return found


def firsts_of(given: list[str]) -> dict[str, int]:
    """A number of latents per column, from texts such as ``topic=500``."""
    found = {}
    for text in given:
        match = _WITHIN.fullmatch(text)
        if match is None:
            raise typer.BadParameter(f"--within {text}: write COLUMN=NUMBER, such as topic=500")
        found[match[1]] = int(match[2])
    return found


def _write(plan: Any, chosen: Any, target: Path) -> list[str]:
    """The plan, and the selection with its provenance beside it."""
    origin = target.with_name(f"{target.stem}.selection.json")
    plan.save(target)
    origin.write_text(chosen.to_json() + "\n", encoding="utf-8")
    return [str(target), str(origin)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
