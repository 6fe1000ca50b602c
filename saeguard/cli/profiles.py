"""``saeguard latents profile``: from a model, an SAE and reference texts to the file that topics are searched in."""

from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.console import Json, check_target, out, write_json
from saeguard.cli.latents import Source, default_sae
from saeguard.cli.reading import DEMO, Model, Seed


def profile(
    reference: Annotated[list[str], typer.Option(help="Texts of many topics (.txt, .jsonl, .jsonl.gz); repeatable.")],
    target: Annotated[Path, typer.Option("--out", help="Where the profile goes, such as topics.safetensors.")],
    sae: Source = "",
    model: Model = DEMO,
    texts: Annotated[int, typer.Option(min=1, help="Passages to draw, evenly from the files.")] = 6000,
    words: Annotated[int, typer.Option(min=8, max=150, help="Words of a passage, at most.")] = 60,
    seed: Seed = 0,
    embedder: Annotated[
        str, typer.Option(help="A folder or a sentence-transformers name; the default is all-MiniLM-L6-v2.")
    ] = "",
    cache: Annotated[Path | None, typer.Option(help="Folder of computed numbers; an interrupted pass goes on.")] = None,
    as_json: Json = False,
) -> None:
    """Describe every latent by the mean sentence embedding of the texts on which it fires, weighted by activation.

    With it `saeguard latents search --by topic` needs no corpus. Takes one pass of the model over the passages.
    """
    from saeguard.cli.texts import documents_of, names_of
    from saeguard.cli.training import progress_bars
    from saeguard.loaders import load_sae
    from saeguard.models import load_model
    from saeguard.scoring.cache import Cache
    from saeguard.scoring.statistics import gather
    from saeguard.scoring.texts import Texts
    from saeguard.scoring.topic_profile import draw_passages, topic_profile

    check_target(target)
    store = Cache(cache) if cache is not None else Cache.default()
    with progress_bars(shown=not as_json) as bars:
        source = sae or default_sae()
        dictionary, loaded = load_sae(source), load_model(model)
        found = documents_of(reference, loaded.tokenizer)
        drawn = draw_passages(list(found.values()), texts, words=words, seed=seed)
        rows = Texts.from_text(drawn, loaded.tokenizer, dictionary, name="reference")
        tell = None if bars is None else lambda done, total: bars("passages", done, total, "rows")
        statistics = gather(loaded.model, dictionary, {"reference": rows}, per_text=True, cache=store, progress=tell)
        made = topic_profile(
            statistics, drawn, embedder=make_embedder(embedder), cache=store, files=names_of(list(found)), words=words,
            seed=seed,
        )  # fmt: skip
        made.save(target)
    told = {"written": str(target), "sae": made.sae, "embedder": made.embedder, **made.provenance,
            "n_live": int((made.texts > 0).sum())}  # fmt: skip
    if as_json:
        write_json(told)
        return
    out().print(f"Wrote {target}: {told['n_live']} of {len(made.mean)} latents fire on {len(drawn)} passages.")


def make_embedder(name: str = "") -> Any:
    """all-MiniLM-L6-v2, a copy of it in a folder, or one of the sentence-transformers library by name."""
    from saeguard.scoring.sentences import minilm, sentence_transformer

    if not name:
        return minilm()
    return minilm(name) if Path(name).is_dir() else sentence_transformer(name)
