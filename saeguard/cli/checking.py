"""``saeguard check``: prove on this machine that steering a model through an SAE does what it says."""

from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.console import Json, out, progress, write_json


def check(
    model: Annotated[str, typer.Argument(help="A demo model's name, or the folder of a model.")],
    sae: Annotated[str, typer.Option("--sae", help="Whatever load_sae reads; the first shipped SAE by default.")] = "",
    plan: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A plan file: the laws are checked under it too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check engine, site, fit, where edits arrive, what they do to the logits, and every law, on built-in text.

    Exit status 1 when a claim does not hold, 2 when model, SAE or plan are refused before anything is computed.
    """
    from saeguard.checking.check import check_steering
    from saeguard.cli.latents import default_sae
    from saeguard.loaders import load_sae
    from saeguard.models import load_model
    from saeguard.plans import Plan

    asked = None if plan is None else Plan.load(plan)
    with progress("Loading the model and the SAE") as tell:
        read = load_sae(sae or default_sae())
        loaded: Any = load_model(model)
        found = check_steering(
            loaded.model, read, loaded.tokenizer, plan=asked, progress=lambda stage: tell(f"Checking {stage}")
        )
    if as_json:
        write_json(found.to_json())
    else:
        out().print(str(found), markup=False, soft_wrap=True)
    if not found.passed:
        raise typer.Exit(1)
