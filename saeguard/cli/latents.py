"""``saeguard latents``: search what latents are about, show one, and find where one fires."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from saeguard.cli.console import Json, out, progress, table, write_json

app = typer.Typer(no_args_is_help=True, help="Search and inspect the latents of an SAE.", pretty_exceptions_enable=False)
Source = typer.Option("", "--sae", help="A shipped SAE's name, or the folder of one; the default is the first shipped.")


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
    text: str = typer.Argument(..., help="Words, such as: photosynthesis"),
    sae: str = Source,
    top: int = typer.Option(12, min=1, help="How many."),
    as_json: bool = Json,
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
    latent: int = typer.Argument(..., min=0, help="A latent's number."), sae: str = Source, as_json: bool = Json
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
    latent: int = typer.Argument(..., min=0, help="A latent's number."),
    corpus: list[Path] = typer.Option([], "--corpus", help=".txt, .jsonl or .jsonl.gz files; may be repeated."),
    self_written: bool = typer.Option(False, "--self-written", help="Let the model write the text."),
    sae: str = Source,
    model: str = typer.Option("smollm2-135m-instruct", help="A demo model's name, or the folder of a model."),
    top: int = typer.Option(10, min=1, help="How many contexts."),
    budget: int = typer.Option(20_000, "--tokens", min=64, help="Tokens to read at most, or to write."),
    seed: int = typer.Option(0, help="Seed of the sample, or of what the model writes."),
    as_json: bool = Json,
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
            read = read_corpus(corpus, loaded.tokenizer, context=128, n_tokens=budget, seed=seed)
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
