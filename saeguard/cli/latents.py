"""``saeguard latents``: search what latents are about, show one, and find where one fires."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from saeguard.cli.console import Json, out, progress, table, write_json

app = typer.Typer(
    no_args_is_help=True, help="Search and inspect the latents of an SAE.", pretty_exceptions_enable=False
)
Source = Annotated[
    str, typer.Option("--sae", help="A shipped SAE's name, or the folder of one; the default is the first shipped.")
]


def default_sae() -> str:
    """The first shipped SAE. Raises `UnsupportedFormat` when none is."""
    from saeguard.errors import UnsupportedFormat
    from saeguard.loaders import shipped

    names = list(shipped())
    if not names:
        raise UnsupportedFormat("the default SAE", "no SAE comes with this installation", "Name one with --sae.")
    return names[0]


@app.command("search")
def search(
    text: Annotated[str, typer.Argument(help="Words, such as: photosynthesis")],
    sae: Source = "",
    top: Annotated[int, typer.Option(min=1, help="How many.")] = 12,
    as_json: Json = False,
) -> None:
    """Find latents by words: in their labels, the tokens they fire on and the tokens they promote."""
    from saeguard.latents import LatentTable

    source = sae or default_sae()
    hits = LatentTable.load(source).search(text, top=top)
    if as_json:
        found = [{"score": hit.score, "where": hit.where, **asdict(hit.row)} for hit in hits]
        write_json({"sae": source, "text": text, "hits": found})
        return
    rows = [
        (hit.row.latent, hit.row.label or "-", tokens(hit.row.fires_on), tokens(hit.row.promotes),
         f"{hit.row.frequency:.2%}", f"{hit.row.maximum:.1f}")
        for hit in hits
    ]  # fmt: skip
    heads = ("latent", "label", "fires on", "promotes", "fires", "max")
    console = out()
    console.print(table(f'"{text}" in {source}', heads, rows, right=(0, 4, 5)))
    if not rows:
        console.print("Nothing found. Tables know single tokens: try a short, common word.")


@app.command("show")
def show(
    latent: Annotated[int, typer.Argument(min=0, help="A latent's number.")], sae: Source = "", as_json: Json = False
) -> None:
    """Show what the table knows of one latent."""
    from saeguard.latents import LatentTable

    source = sae or default_sae()
    row = LatentTable.load(source).row(latent)
    if as_json:
        write_json({"sae": source, **asdict(row)})
        return
    pairs = [
        ("label", row.label or "-"),
        ("fires on", tokens(row.fires_on, 20)),
        ("promotes", tokens(row.promotes, 20)),
        ("fires", f"on {row.frequency:.3%} of tokens"),
        ("maximum", f"{row.maximum:.2f} activation units"),
    ]
    out().print(table(f"latent {latent} of {source}", ("", ""), pairs))


@app.command("contexts")
def contexts(
    latent: Annotated[int, typer.Argument(min=0, help="A latent's number.")],
    corpus: Annotated[
        list[Path] | None, typer.Option("--corpus", help=".txt, .jsonl or .jsonl.gz files; may be repeated.")
    ] = None,
    self_written: Annotated[bool, typer.Option("--self-written", help="Let the model write the text.")] = False,
    sae: Source = "",
    model: Annotated[
        str, typer.Option(help="A demo model's name, or the folder of a model.")
    ] = "smollm2-135m-instruct",
    top: Annotated[int, typer.Option(min=1, help="How many contexts.")] = 10,
    budget: Annotated[int, typer.Option("--tokens", min=64, help="Tokens to read at most, or to write.")] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of the sample, or of what the model writes.")] = 0,
    as_json: Json = False,
) -> None:
    """Find where a latent fires hardest, in a corpus of yours or in text that the model writes itself."""
    if bool(corpus) == self_written:
        raise typer.BadParameter("give either --corpus FILE or --self-written")
    with progress("loading") as tick:
        from saeguard.loaders import load_sae
        from saeguard.models import load_model
        from saeguard.scoring.contexts import top_contexts, write_chunks
        from saeguard.training.corpus import read_corpus

        source = sae or default_sae()
        dictionary = load_sae(source)
        dictionary.check_latents([latent])
        tick(f"loading {model}")
        loaded = load_model(model)
        tick(f"{'writing' if self_written else 'reading'} up to {budget} tokens")
        if self_written:
            chunks = write_chunks(loaded.model, loaded.tokenizer, n_tokens=budget, seed=seed)
        else:
            read = read_corpus(corpus or (), loaded.tokenizer, context=128, n_tokens=budget, seed=seed)
            chunks = read.ids, read.kept
        tick("looking for the latent")
        found = top_contexts(loaded.model, loaded.tokenizer, dictionary, latent, *chunks, top=top)
    if as_json:
        write_json({"sae": source, "latent": latent, "contexts": [asdict(context) for context in found]})
        return
    _show_contexts(source, latent, found)


def _show_contexts(source: str, latent: int, found: Any) -> None:
    console = out()
    console.print(f"[bold]latent {latent} of {escape(source)}")
    for context in found:
        before, token, after = (part.replace("\n", "↵") for part in (context.before, context.token, context.after))
        shown = f"{escape(before)}[bold white on dark_orange3]{escape(token)}[/]{escape(after)}"
        console.print(f"{context.activation:8.2f}  {shown}", soft_wrap=True)
    if not found:
        console.print("It never fired on this text.")


def tokens(found: tuple[str, ...], most: int = 6) -> str:
    """Tokens for a table cell: quoted by bars, whitespace made visible."""
    return " ".join("▏" + token.replace("\n", "↵").strip() for token in found[:most]) or "-"
