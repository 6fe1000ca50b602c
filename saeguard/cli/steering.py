"""``saeguard steer``: prompts in, plain beside steered text out, with the report of what was edited."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from saeguard.cli.console import Json, out, progress, report_table, write_json

AMOUNTS = {"add": "Add", "scale": "Scale", "clamp": "Clamp", "at_least": "AtLeast", "at_most": "AtMost"}


class When(StrEnum):
    """Where --clamp acts."""

    always = "always"
    active = "active"


class Unit(StrEnum):
    """In what amounts are given."""

    activation = "activation"
    max = "max"
    norm = "norm"


class Phase(StrEnum):
    """Which tokens a rule is about."""

    all = "all"
    prompt = "prompt"
    generated = "generated"
    last = "last"
    newest = "newest"


def steer(
    prompts: Annotated[list[str], typer.Option("--prompt", help="A prompt; give it again for more rows in one batch.")],
    plans: Annotated[
        list[str] | None, typer.Option("--plan", help='A plan file, or "none"; once for all rows, or once per row.')
    ] = None,
    model: Annotated[
        str, typer.Option(help="A demo model's name, or the folder of a model.")
    ] = "smollm2-135m-instruct",
    sae: Annotated[
        str, typer.Option(help="A shipped SAE's name, or a file or folder; the default is the first shipped.")
    ] = "",
    latents: Annotated[
        str, typer.Option(help="Instead of plan files: latents to set in every row, such as 12,87.")
    ] = "",
    add: Annotated[float | None, typer.Option(help="Add this much to their activations.")] = None,
    scale: Annotated[float | None, typer.Option(help="Multiply their activations; negative turns them around.")] = None,
    clamp: Annotated[float | None, typer.Option(help="Set their activations to this, see --when.")] = None,
    at_least: Annotated[
        float | None, typer.Option(help="Raise their activations to this where they are below.")
    ] = None,
    at_most: Annotated[float | None, typer.Option(help="Lower their activations to this where they are above.")] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Set their activations to 0.")] = False,
    when: Annotated[When, typer.Option(help="For --clamp: everywhere, or only where the latent fires.")] = When.always,
    unit: Annotated[
        Unit, typer.Option(help="Unit of the amount: activation units, recorded maxima, norms of x.")
    ] = Unit.activation,
    phase: Annotated[Phase, typer.Option(help="Which tokens the op is about.")] = Phase.all,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to generate per row, greedily.")] = 40,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Put prompts through the model's chat template, or not.")
    ] = True,
    page: Annotated[Path | None, typer.Option(help="Also draw an HTML page there.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw a PNG there (needs matplotlib).")] = None,
    as_json: Json = False,
) -> None:
    """Generate plain and steered text for prompts in one batch, and report what was edited.

    Either plan files (--plan, repeatable) or quick flags: --latents with one of --add, --scale, --clamp, --at-least,
    --at-most, --ablate. Example: saeguard steer --prompt "Hello!" --latents 12 --at-least 1 --unit max
    """
    plans = plans or []
    amounts = {"add": add, "scale": scale, "clamp": clamp, "at_least": at_least, "at_most": at_most}
    chosen = {name: amount for name, amount in amounts.items() if amount is not None}
    if bool(plans) == bool(latents):
        raise typer.BadParameter("give either --plan or --latents with an op, such as --latents 12 --add 4")
    if latents and len(chosen) + ablate != 1:
        raise typer.BadParameter(f"--latents needs exactly one op: {_flags()} or --ablate")
    if plans and (chosen or ablate):
        raise typer.BadParameter("--plan already says what to do: leave out --add and the other ops")
    if len(plans) not in (0, 1, len(prompts)):
        raise typer.BadParameter(f"{len(plans)} plans for {len(prompts)} prompts: give one, or one per prompt")
    with progress("loading") as tick:
        if plans:
            read = [read_plan(name) for name in plans]
        else:
            op = ("ablate", None) if ablate else next(iter(chosen.items()))
            read = [quick_plan(sae, latents, op, when=when.value, unit=unit.value, phase=phase.value)]
        per_row = read * len(prompts) if len(read) == 1 else read
        scene = _perform(model, prompts, per_row, tokens=tokens, chat=chat, tick=tick)
    _deliver(scene, page, picture, as_json=as_json)


def read_plan(name: str) -> Any:
    """A plan file's plan, or None for "none"."""
    from saeguard.plans import Plan

    if name.lower() == "none":
        return None
    if not Path(name).is_file():
        raise typer.BadParameter(f'--plan {name}: there is no such file; write "none" for a row to leave alone')
    return Plan.load(name)


def quick_plan(sae: str, latents: str, op: tuple[str, float | None], *, when: str, unit: str, phase: str) -> Any:
    """The plan that the quick flags spell. Raises `BadRule` for values that no rule may have."""
    from saeguard.cli.latents import default_sae, latent_numbers
    from saeguard.plans import Plan, Rule

    made = make_op(*op, unit=unit, when=when)
    rule = Rule(sae or default_sae(), tuple(latent_numbers(latents)), made, phase=phase)  # type: ignore[arg-type]
    return Plan((rule,))


def make_op(name: str, amount: float | None, *, unit: str, when: str) -> Any:
    """The op of that name. Raises `BadRule` for values that no rule may have."""
    from saeguard import ops

    if name != "ablate" and name not in AMOUNTS:
        raise typer.BadParameter(f"--op {name}: ops are {', '.join(AMOUNTS)} and ablate")
    if (amount is None) != (name == "ablate"):
        raise typer.BadParameter("ablate takes no amount" if name == "ablate" else f"{name} needs an amount: --value")
    if name == "ablate":
        return ops.Ablate()
    options: dict[str, Any] = {} if name == "scale" else {"unit": unit}
    if name == "clamp":
        options["when"] = when
    return getattr(ops, AMOUNTS[name])(amount, **options)


def _perform(name: str, prompts: list[str], plans: list[Any], *, tokens: int, chat: bool, tick: Any) -> Any:
    from saeguard.drawing.scene import Scene, encode, make_lines, play, reads, sites_of
    from saeguard.errors import LoadError
    from saeguard.latents import LatentTable
    from saeguard.loaders import load_sae
    from saeguard.models import load_model

    rules = [rule for plan in plans if plan is not None for rule in plan.rules]
    saes = {rule.sae: load_sae(rule.sae) for rule in rules}
    tick(f"loading {name}")
    model, tokenizer = load_model(name)
    batch = encode(tokenizer, prompts, chat=chat)
    options: dict[str, Any] = {
        "tokenizer": tokenizer, "saes": saes, "sites": sites_of(plans, saes), "max_new_tokens": tokens,
    }  # fmt: skip
    tick("plain")
    plain = play(model, batch, None, **options)
    tick("steered")
    steered = play(model, batch, plans, **options)
    labels: dict[int, str] = {}
    for rule in rules:
        try:
            table = LatentTable.load(rule.sae)
        except LoadError:
            continue  # a table is a convenience: most SAEs have none
        labels |= {latent: table.row(latent).label for latent in reads(rule)}
    lines = make_lines(plain, steered, plans, saes, tokenizer)
    return Scene("Plain beside steered", Path(name).name, lines, steered.run.report, labels=labels)


def _deliver(scene: Any, page: Path | None, picture: Path | None, *, as_json: bool) -> None:
    from saeguard.drawing.page import write_page
    from saeguard.drawing.picture import write_picture

    written = [] if page is None else [write_page(scene, page)]
    written += [] if picture is None else [write_picture(scene, picture)]
    if as_json:
        write_json(scene.to_json())
        return
    console = out()
    for number, line in enumerate(scene.lines, start=1):
        edits = sum(token.edited for token in line.steered)
        console.rule(f"[bold]{number}. {escape(line.prompt)}", align="left", style="dim")
        console.print(f"[dim]plain[/]    {escape(line.plain_text)}")
        console.print(f"[dim]steered[/]  [bold]{escape(line.steered_text)}[/]  [dim]({edits} tokens edited)[/]\n")
    console.print(report_table(scene.report))
    for path in written:
        console.print(f"Wrote {path}", style="dim")


def _flags() -> str:
    return ", ".join("--" + name.replace("_", "-") for name in AMOUNTS)
