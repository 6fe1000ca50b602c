"""``saeguard export-vector``: a plan that only adds, as a file of control vectors for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from saeguard.cli.console import Json, check_target, out, table, write_json


def export_vector(
    plan: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A plan file whose rules are all Add.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write: .gguf or .safetensors.")],
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="Special tokens too, which a control vector cannot leave alone.")
    ] = False,
    model_type: Annotated[str, typer.Option(help='What a .gguf says of its model, such as "llama".')] = "",
    as_json: Json = False,
) -> None:
    """Write what a plan adds at every token as control vectors, for llama.cpp, repeng and EasySteer.

    A rule that depends on the text or the token is refused by name: clamps, gates, triggers, phases, norm units.
    """
    from saeguard.exporting import constant_vectors, export_vectors
    from saeguard.plans import Plan

    check_target(target, "OUT")
    found = constant_vectors(Plan.load(plan), everywhere=everywhere)
    export_vectors(found, target, model_type=model_type)
    rows = [(str(site), len(vector), f"{float(vector.norm()):.4g}") for site, vector in found.items()]
    if as_json:
        names = ("site", "width", "norm")
        write_json({"file": str(target), "vectors": [dict(zip(names, row, strict=True)) for row in rows]})
        return
    out().print(table("Added at every token", ("site", "width", "norm"), rows, right=(1, 2)))
    out().print(f"Wrote {target}", style="dim")
