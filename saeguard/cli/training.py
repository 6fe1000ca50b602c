"""``saeguard train``: hand over to the trainer's own command line, which is read only when it is asked for."""

from typing import Annotated

import typer

CONTEXT = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def train(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Train an SAE on a model's activations over text that you name; see: saeguard train --help"""
    from saeguard.cli.train_command import train_command

    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command()(train_command)
    typer.main.get_command(alone).main(args=arguments or ["--help"], prog_name="saeguard train", standalone_mode=False)
