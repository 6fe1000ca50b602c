"""The ``saeguard`` command: one file per subcommand, each of which imports what it needs when it runs."""

import typer

from saeguard.cli import assets, console, demo, latents, models, plans, sources, steering, training

app = typer.Typer(
    name="saeguard",
    cls=console.Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Steer language models through the latents of sparse autoencoders: exact, row by row, failing closed.",
    epilog="Start with: saeguard demo",
)


@app.callback()
def main(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error instead of one line."),
) -> None:
    """Steer language models through the latents of sparse autoencoders: exact, row by row, failing closed."""


app.command("demo")(demo.demo)
app.command("steer")(steering.steer)
app.command("plan")(plans.plan)
app.add_typer(latents.app, name="latents")
app.command("assets")(assets.assets)
app.command("inspect")(sources.inspect)
app.command("convert")(sources.convert)
app.command("models")(models.models)
app.command("train")(training.train)
