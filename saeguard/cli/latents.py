"""``saeguard latents search``: find latents by words, by the meaning of their labels, or by topic."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.console import Json, out, progress, table, write_json

app = typer.Typer(
    no_args_is_help=True, help="Search, inspect and label the latents of an SAE.", pretty_exceptions_enable=False
)
Source = Annotated[
    str, typer.Option("--sae", help="A shipped SAE's name, or the folder of one; the default is the first shipped.")
]
Labels = Annotated[Path | None, typer.Option("--labels", help="Labels to use: ours, Neuronpedia's or Delphi's.")]


class By(StrEnum):
    """What a search compares with the text."""

    words = "words"
    labels = "labels"
    topic = "topic"
    all = "all"


class Rank(StrEnum):
    """Which topic similarity ranks."""

    centred = "centred"
    cosine = "cosine"
    published = "published"


def default_sae() -> str:
    """The first shipped SAE. Raises `UnsupportedFormat` when none is."""
    from saeguard.errors import UnsupportedFormat
    from saeguard.loaders import shipped

    names = list(shipped())
    if not names:
        raise UnsupportedFormat("the default SAE", "no SAE comes with this installation", "Name one with --sae.")
    return names[0]


def latent_numbers(text: str) -> list[int]:
    """Whole numbers parted by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--latents {text}: write integers with commas, such as 12,87") from error


def labels_for(source: str, labels: Path | None) -> dict[int, str]:
    """A label per latent, from a file or else from the SAE's table; empty where there is neither."""
    from saeguard.errors import LoadError
    from saeguard.latents import LatentTable
    from saeguard.scoring.labels import best_labels, labels_of, read_labels

    if labels is not None:
        return {latent: label.text for latent, label in best_labels(read_labels(labels)).items()}
    try:
        return {label.latent: label.text for label in labels_of(LatentTable.load(source))}
    except LoadError:
        return {}  # a table is a convenience: most SAEs have none


@app.command("search")
def search(
    text: Annotated[str, typer.Argument(help="Words, such as: photosynthesis")],
    by: Annotated[
        By, typer.Option(help="words: tokens it fires on and promotes; labels, topic: by meaning; all: each in turn.")
    ] = By.words,
    sae: Source = "",
    labels: Labels = None,
    rank: Annotated[
        Rank,
        typer.Option(
            help="For topic: as published, or less what all texts have in common; cosine: its direction alone."
        ),
    ] = Rank.centred,
    least: Annotated[int, typer.Option("--texts", min=1, help="For topic: reference texts it fires on, at least.")] = 3,
    embedder: Annotated[
        str, typer.Option(help="For labels and topic: a folder or name; the default is all-MiniLM-L6-v2.")
    ] = "",
    top: Annotated[int, typer.Option(min=1, help="How many.")] = 12,
    as_json: Json = False,
) -> None:
    """Find latents by words, by the meaning of their labels, or by the topic of the texts on which they fire.

    Labels and topics are compared by sentence embeddings; the embedder (90 MB) is fetched once.
    """
    if not text.strip():
        raise typer.BadParameter("there is nothing to search for: give words")
    source = sae or default_sae()
    found = {}
    if by in (By.words, By.all):
        found["words"] = _by_words(source, text, top)
    if by is not By.words:
        with progress("comparing meanings") as tick:
            found |= _by_meaning(source, text, by, labels, embedder, rank.value, least, top, tick)
    if as_json:
        hits = [{"by": kind, **hit} for kind, several in found.items() for hit in several]
        write_json({"sae": source, "text": text, "hits": hits})
        return
    said = labels_for(source, labels)
    for kind, hits in found.items():
        rows = [_cells(hit, said) for hit in hits]
        heads = ("latent", "score", "label", "fires on", "promotes", "fires", "max")
        out().print(table(f'"{text}" by {kind} in {source}', heads, rows, right=(0, 1, 5, 6)))
        if not rows:
            out().print("Nothing found. Tables know single tokens: try a short, common word, or --by topic.")


def _by_words(source: str, text: str, top: int) -> list[dict[str, Any]]:
    from saeguard.latents import LatentTable

    hits = LatentTable.load(source).search(text, top=top)
    return [{"score": hit.score, "where": hit.where, **asdict(hit.row)} for hit in hits]


def _by_meaning(
    source: str, text: str, by: By, labels: Path | None, embedder: str, rank: str, least: int, top: int, tick: Any
) -> dict[str, list[dict[str, Any]]]:
    from saeguard.cli.profiles import make_embedder
    from saeguard.latents import LatentTable
    from saeguard.loaders import load_sae
    from saeguard.scoring.cache import Cache
    from saeguard.scoring.labels import labels_of, read_labels
    from saeguard.scoring.select import Bound, select
    from saeguard.scoring.topic import label_similarity
    from saeguard.scoring.topic_profile import TopicProfile

    sae, means, found = load_sae(source), make_embedder(embedder), {}
    if by in (By.labels, By.all):
        tick("comparing labels")
        known = labels_of(LatentTable.load(source)) if labels is None else read_labels(labels, d_sae=sae.d_sae)
        cosines = label_similarity(sae, known, text, embedder=means, cache=Cache.default())
        found["labels"] = _rows(source, select(cosines, "label_similarity", top=top), "label_similarity")
    if by in (By.topic, By.all):
        tick("comparing topics")
        scores = TopicProfile.load(source, sae=sae).scores([text], embedder=means)
        column = "topic" if rank == "published" else f"topic_{rank}"
        chosen = select(scores, column, top=top, bounds=(Bound("topic_texts", least=least),))
        found["topic"] = _rows(source, chosen, column)
    return found


def _rows(source: str, chosen: Any, column: str) -> list[dict[str, Any]]:
    """What the table knows of each chosen latent, with its scores; the table may be missing."""
    from saeguard.errors import LoadError
    from saeguard.latents import LatentTable

    try:
        known = {row.latent: asdict(row) for row in LatentTable.load(source).rows}
    except LoadError:
        known = {}
    return [
        {"score": chosen.scores[column][place], "scores": {name: chosen.scores[name][place] for name in chosen.scores},
         **known.get(latent, {"latent": latent})}
        for place, latent in enumerate(chosen.latents)
    ]  # fmt: skip


def _cells(hit: dict[str, Any], said: dict[int, str]) -> tuple[Any, ...]:
    fires = "-" if hit.get("frequency") is None else f"{hit['frequency']:.2%}"
    most = "-" if hit.get("maximum") is None else f"{hit['maximum']:.1f}"
    return (
        hit["latent"], f"{hit['score']:.3f}", said.get(hit["latent"], "-"), tokens(hit.get("fires_on", ())),
        tokens(hit.get("promotes", ())), fires, most,
    )  # fmt: skip


def tokens(found: tuple[str, ...], most: int = 6) -> str:
    """Tokens for a table cell: quoted by bars, whitespace made visible."""
    return " ".join("▏" + token.replace("\n", "↵").strip() for token in found[:most]) or "-"
