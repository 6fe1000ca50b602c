"""The ``saeguard`` command: one file per subcommand, each of which imports what it needs when it runs."""

import typer

from saeguard.cli import (
    assets,
    auditing,
    boosting,
    checking,
    console,
    demo,
    evaluating,
    exporting,
    guarding,
    judging,
    latents,
    models,
    plans,
    policies,
    profiles,
    reading,
    scoring,
    selecting,
    showing,
    sources,
    steering,
    training,
)

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
app.command("export-vector")(exporting.export_vector)
latents.app.command("show")(showing.show)
latents.app.command("contexts")(reading.contexts)
latents.app.command("label")(reading.label)
latents.app.command("profile")(profiles.profile)
app.add_typer(latents.app, name="latents")
app.command("score")(scoring.score)
app.command("select")(selecting.select)
app.add_typer(auditing.app, name="audit")
app.add_typer(policies.app, name="policy")
guarding.app.command("show")(policies.show)
app.add_typer(guarding.app, name="guard")
app.add_typer(evaluating.app, name="eval")
app.command("assets")(assets.assets)
app.command("inspect")(sources.inspect)
app.command("convert")(sources.convert)
app.command("check")(checking.check)
app.command("error")(judging.error)
app.command("compare")(judging.compare)
app.command("models")(models.models)
app.command("train")(training.train)
app.command("boost")(boosting.boost)
