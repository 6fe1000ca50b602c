"""``saeguard latents show``: all that is known of one latent, from its table, scores, and text on which it fires."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.console import Json, check_target, out, progress, table, write_json
from saeguard.cli.latents import Labels, Source, default_sae, labels_for, tokens
from saeguard.cli.reading import DEMO, Budget, Corpus, Model, Seed, SelfWritten, read_or_write, show_contexts


def show(
    latent: Annotated[int, typer.Argument(min=0, help="A latent's number.")],
    sae: Source = "",
    labels: Labels = None,
    scores: Annotated[list[Path] | None, typer.Option(help="Files of `saeguard score`; repeatable.")] = None,
    corpus: Corpus = None,
    self_written: SelfWritten = False,
    picture: Annotated[
        Path | None, typer.Option(help="Draw a histogram of its activations there (needs text and matplotlib).")
    ] = None,
    model: Model = DEMO,
    top: Annotated[int, typer.Option(min=1, help="How many contexts.")] = 8,
    budget: Budget = 20_000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Show what is known of one latent: its table row, its scores, and with text where it fires and how hard.

    Text comes from --corpus FILE, or with --self-written from the model itself.
    """
    if corpus and self_written:
        raise typer.BadParameter("give either --corpus FILE or --self-written")
    if picture is not None and not (corpus or self_written):
        raise typer.BadParameter("--picture draws activations on text: give --corpus FILE or --self-written")
    check_target(picture, "--picture")
    source = sae or default_sae()
    told: dict[str, Any] = {"sae": source, **_row(source, latent, needed=not (scores or corpus or self_written))}
    if labels is not None:
        told["label"] = labels_for(source, labels).get(latent, told.get("label", ""))
    if scores:
        told["scores"] = _scores(source, latent, scores)
    found = None
    if corpus or self_written:
        with progress("loading") as tick:
            title = ": ".join(filter(None, [f"latent {latent} of {source}", told.get("label")]))
            told |= _seen(source, model, latent, corpus, self_written, budget, seed, top, picture, title, tick)
        found = told["contexts"]
        told["contexts"] = [asdict(context) for context in found]
    if as_json:
        write_json(told)
        return
    out().print(table(f"latent {latent} of {source}", ("", ""), _pairs(told)))
    for name, each in told.get("scores", {}).items():
        rows = [
            (column, f"{value:.4g}" if isinstance(value, float) else value or "-", unit)
            for column, (value, unit) in each.items()
        ]
        out().print(table(f"scores in {name}", ("score", "value", "unit"), rows, right=(1,)))
    if found is not None:
        out().print(f"[bold]hardest of {told['text']['n_tokens']:,} tokens")
        show_contexts(found)
    if picture is not None:
        out().print(f"Wrote {picture}", style="dim")


def _row(source: str, latent: int, *, needed: bool) -> dict[str, Any]:
    """The table's row; where nothing else is asked for, a missing table is an error."""
    from saeguard.errors import UnsupportedFormat
    from saeguard.latents import LatentTable

    try:
        return asdict(LatentTable.load(source).row(latent))
    except UnsupportedFormat:
        if needed:
            raise
        return {"latent": latent}


def _scores(source: str, latent: int, files: list[Path]) -> dict[str, dict[str, tuple[float | str | None, str]]]:
    """Per file the latent's value in every column, and its unit. Raises `ScoreMismatch` for another SAE's scores."""
    from saeguard.errors import ScoreMismatch
    from saeguard.loaders import load_sae
    from saeguard.scoring.table import ScoreTable, as_json

    sae = load_sae(source)
    sae.check_latents([latent])
    found = {}
    for path in files:
        scores = ScoreTable.load(path)
        if scores.sae_fingerprint != sae.fingerprint():
            raise ScoreMismatch(
                f"scores in {path.name} of latent {latent} of {sae.name}",
                f"they are of {scores.sae}, whose weights differ", "Score this SAE.",
            )  # fmt: skip
        name = path.name if path.name not in found else str(path)
        found[name] = {
            column: (as_json(value), scores.meanings[column].unit) for column, value in scores.row(latent).items()
        }
    return found


def _seen(
    source: str, model: str, latent: int, corpus: list[Path] | None, self_written: bool, budget: int, seed: int,
    top: int, picture: Path | None, title: str, tick: Any,
) -> dict[str, Any]:  # fmt: skip
    """Contexts, promoted tokens and how often it fires on the text; also draws the picture."""
    from saeguard.loaders import load_sae
    from saeguard.models import load_model
    from saeguard.scoring.contexts import activations, top_contexts
    from saeguard.scoring.logit_lens import top_tokens

    sae = load_sae(source)
    sae.check_latents([latent])
    tick(f"loading {model}")
    loaded = load_model(model)
    tick(f"{'writing' if self_written else 'reading'} up to {budget} tokens")
    chunks = read_or_write(loaded, corpus, self_written, budget, seed)
    tick("looking for the latent")
    f = activations(loaded.model, sae, latent, *chunks)
    found = top_contexts(loaded.model, loaded.tokenizer, sae, latent, *chunks, top=top)
    promoted = top_tokens(loaded.model, sae.narrow([latent]))[latent].tolist()
    fires = f[f > 0]
    if picture is not None:
        from saeguard.drawing.histogram import write_histogram

        most = None if sae.maximum is None else float(sae.narrow([latent]).maximum[0])  # type: ignore[index]
        write_histogram(
            f, picture, title=title, maximum=most,
            examples=[(context.activation, context.token) for context in found],
        )  # fmt: skip
    told = {"n_tokens": len(f), "fires": len(fires), "mean": float(fires.mean()) if len(fires) else None}
    promotes = tuple(loaded.tokenizer.decode([token]) for token in promoted)
    return {"text": told, "promotes": promotes, "contexts": found}


def _pairs(told: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [("label", told.get("label") or "-")]
    if "fires_on" in told:
        pairs.append(("fires on", tokens(told["fires_on"], 20)))
    if "promotes" in told:
        pairs.append(("promotes", tokens(told["promotes"], 20)))
    if "frequency" in told:
        pairs.append(("fires", f"on {told['frequency']:.3%} of tokens"))
        pairs.append(("maximum", f"{told['maximum']:.2f} activation units"))
    if "text" in told:
        share = told["text"]["fires"] / max(told["text"]["n_tokens"], 1)
        pairs.append(("on this text", f"fires on {told['text']['fires']:,} tokens ({share:.3%})"))
    return pairs
