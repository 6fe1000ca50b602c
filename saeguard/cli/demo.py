"""``saeguard demo``: four rows in one batch, four plans, then a guardrail; every promise checked, a page, a picture."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from saeguard.cli.console import Json, err, out, progress, report_table, write_json


def demo(
    folder: Annotated[Path, typer.Option("--out", help="Where report.json, demo.html and demo.png go.")] = Path(
        "out/demo"
    ),
    tokens: Annotated[int, typer.Option("--tokens", min=2, max=400, help="Tokens to generate per row.")] = 40,
    picture: Annotated[bool, typer.Option(help="Draw the PNG, which needs matplotlib.")] = True,
    as_json: Json = False,
) -> None:
    """Steer a real model, one plan per row, put it behind a guardrail, and check every promise while at it.

    The model (SmolLM2-135M-Instruct, Apache-2.0) is fetched once and kept. Exit status 1 when a check does not hold.
    """
    with progress("starting") as tick:
        import torch

        from saeguard.demo import run_demo

        torch.set_num_threads(1)  # for a small model a second thread gains little, and on a busy machine costs minutes
        result = run_demo(folder, max_new_tokens=tokens, picture=picture, tick=tick)
    if as_json:
        write_json(result.to_json())
    else:
        _show(result)
    if not result.holds:
        err().print("[bold red]A check does not hold: see above. Please report it with report.json.[/]")
        raise typer.Exit(1)


def _show(result: Any) -> None:
    console = out()
    for number, line in enumerate(result.scene.lines, start=1):
        console.rule(f"[bold]Row {number}: {escape(line.title)}", align="left", style="dim")
        console.print(f"[dim]asked  [/] {escape(line.prompt)}")
        for rule in line.rules or ("none",):
            console.print(f"[dim]plan   [/] [blue]{escape(rule)}[/]")
        console.print(f"[dim]plain  [/] {escape(line.plain_text)}")
        edits = sum(token.edited for token in line.steered)
        console.print(f"[dim]steered[/] [bold]{escape(line.steered_text)}[/]  [dim]({edits} tokens edited)[/]\n")
    console.print(report_table(result.scene.report))
    if result.guard is not None:
        _show_guard(result.guard)
    console.print("\n[bold]What was checked, just now, on this machine")
    for proof in (*result.scene.proofs, *(result.guard.proofs if result.guard is not None else ())):
        mark = "[green]holds[/]" if proof.holds else "[bold red]FAILS[/]"
        console.print(f"  {mark}  {escape(proof.claim)}: [dim]{escape(proof.found)}[/]")
    console.print(f"\nWrote {', '.join(str(path) for path in result.files)} in {result.seconds:.0f} s.")
    console.print("[bold]Try next[/]")
    for command, why in NEXT:
        console.print(f"  [cyan]{escape(command)}[/]\n      {why}", soft_wrap=True)


def _show_guard(guard: Any) -> None:
    console = out()
    console.print()
    console.rule("[bold]Behind a guardrail, which is to forget biology", align="left", style="dim")
    for answer in guard.answers:
        console.print(f"[dim]asked  [/] {escape(answer.question)}")
        console.print(f"[dim]plain  [/] {escape(answer.plain)}")
        for one in answer.under:
            did = f", {one.tokens_edited} tokens edited" if one.decision == "steer" else ""
            said = f"{one.policy}: {one.decision}, gate's score {one.score:.2f}{did}"
            console.print(f"[dim]guarded[/] [bold]{escape(one.text)}[/]  [dim]({escape(said)})[/]")
        console.print()


NEXT = (
    ('saeguard latents search "Earth"', "find latents by what they fire on"),
    ("saeguard latents show 273", "what one of them reads and writes"),
    (
        'saeguard steer --prompt "Tell me one interesting fact." --latents 2574 --at-least 1.8 --unit max'
        " --phase generated --page out/mine.html",
        "push a latent of your own and look at the page",
    ),
    ("saeguard policy show biology", "what that guardrail watches and edits, and how often it is wrong"),
    ("saeguard steer --help", "plans from files, one per row; clamp, scale, ablate"),
)
