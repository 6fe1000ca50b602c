"""``saeguard latents contexts`` and ``label``: where latents fire in text of yours or of the model."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from saeguard.cli.console import Json, check_target, out, progress, write_json
from saeguard.cli.latents import Source, default_sae, latent_numbers

Corpus = Annotated[
    list[Path] | None, typer.Option("--corpus", help=".txt, .jsonl or .jsonl.gz files; may be repeated.")
]
SelfWritten = Annotated[bool, typer.Option("--self-written", help="Let the model write the text.")]
Model = Annotated[str, typer.Option(help="A demo model's name, or the folder of a model.")]
Budget = Annotated[int, typer.Option("--tokens", min=64, help="Tokens to read at most, or to write.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all that is drawn or written.")]
DEMO = "smollm2-135m-instruct"


def read_or_write(loaded: Any, corpus: list[Path] | None, self_written: bool, budget: int, seed: int) -> Any:
    """Token rows and which of their tokens count, from files or from the model itself."""
    from saeguard.scoring.contexts import write_chunks
    from saeguard.training.corpus import read_corpus

    if self_written:
        return write_chunks(loaded.model, loaded.tokenizer, n_tokens=budget, seed=seed)
    read = read_corpus(corpus or (), loaded.tokenizer, context=128, n_tokens=budget, seed=seed)
    return read.ids, read.kept


def contexts(
    latent: Annotated[int, typer.Argument(min=0, help="A latent's number.")],
    corpus: Corpus = None,
    self_written: SelfWritten = False,
    sae: Source = "",
    model: Model = DEMO,
    top: Annotated[int, typer.Option(min=1, help="How many contexts.")] = 10,
    budget: Budget = 20_000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Find where a latent fires hardest, in a corpus of yours or in text that the model writes itself."""
    if bool(corpus) == self_written:
        raise typer.BadParameter("give either --corpus FILE or --self-written")
    with progress("loading") as tick:
        from saeguard.loaders import load_sae
        from saeguard.models import load_model
        from saeguard.scoring.contexts import top_contexts

        source = sae or default_sae()
        dictionary = load_sae(source)
        dictionary.check_latents([latent])
        tick(f"loading {model}")
        loaded = load_model(model)
        tick(f"{'writing' if self_written else 'reading'} up to {budget} tokens")
        chunks = read_or_write(loaded, corpus, self_written, budget, seed)
        tick("looking for the latent")
        found = top_contexts(loaded.model, loaded.tokenizer, dictionary, latent, *chunks, top=top)
    if as_json:
        write_json({"sae": source, "latent": latent, "contexts": [asdict(context) for context in found]})
        return
    out().print(f"[bold]latent {latent} of {escape(source)}")
    show_contexts(found)


def show_contexts(found: Any) -> None:
    """One line per context, the firing token marked."""
    console = out()
    for context in found:
        before, token, after = (part.replace("\n", "↵") for part in (context.before, context.token, context.after))
        shown = f"{escape(before)}[bold white on dark_orange3]{escape(token)}[/]{escape(after)}"
        console.print(f"{context.activation:8.2f}  {shown}", soft_wrap=True)
    if not found:
        console.print("It never fired on this text.")


def label(
    target: Annotated[Path, typer.Option("--out", help="Where the labels go: .jsonl or .jsonl.gz.")],
    latents: Annotated[str, typer.Option(help="Latents to label, such as 12,87; all by default.")] = "",
    corpus: Corpus = None,
    self_written: SelfWritten = False,
    sae: Source = "",
    model: Model = DEMO,
    top: Annotated[int, typer.Option(min=1, help="Contexts per latent.")] = 10,
    budget: Budget = 50_000,
    seed: Seed = 0,
    explainer: Annotated[
        str, typer.Option(help="Address of an OpenAI-compatible endpoint, up to /v1: contexts are sent there.")
    ] = "",
    explainer_model: Annotated[str, typer.Option(help="The model to ask there.")] = "",
    key_env: Annotated[str, typer.Option("--explainer-key-env", help="Variable that holds the endpoint's key.")] = "",
    as_json: Json = False,
) -> None:
    """Label latents from their top contexts and the tokens they promote: by rule, or by a model behind an endpoint.

    Labels of other latents and from other sources that --out holds already are kept, and what an endpoint has
    answered is not asked again.
    """
    if bool(corpus) == self_written:
        raise typer.BadParameter("give either --corpus FILE or --self-written")
    if bool(explainer) != bool(explainer_model):
        raise typer.BadParameter("--explainer and --explainer-model go together")
    check_target(target)
    from saeguard.cli.training import progress_bars
    from saeguard.loaders import load_sae
    from saeguard.models import load_model
    from saeguard.scoring.explainer import Explainer
    from saeguard.scoring.sweep import chosen

    asked = Explainer(explainer, explainer_model, key_env or None) if explainer else None
    with progress_bars(shown=not as_json) as bars:
        dictionary, loaded = load_sae(sae or default_sae()), load_model(model)
        wanted = chosen(dictionary, latent_numbers(latents) if latents else None)
        chunks = read_or_write(loaded, corpus, self_written, budget, seed)
        made, kept = _label(dictionary, loaded, wanted, chunks, target, asked, top=top, bars=bars)
    if as_json:
        write_json({"written": str(target), "labels": [asdict(one) for one in made], "kept": kept})
        return
    for one in made[:20]:
        out().print(f"{one.latent:>7}  {escape(one.text)}")
    out().print(f"Wrote {target}: {len(made)} labels, and kept {kept} that were there.")


def _label(
    sae: Any, loaded: Any, latents: list[int], chunks: Any, target: Path, explainer: Any, *, top: int, bars: Any
) -> tuple[list[Any], int]:
    """The labels of ``latents`` from one source, and how many others the file keeps. Written every few answers."""
    from saeguard.scoring.contexts import contexts_of
    from saeguard.scoring.labels import SOURCE, label_from, read_labels, write_labels
    from saeguard.scoring.logit_lens import top_tokens

    source = SOURCE if explainer is None else explainer.model
    there = read_labels(target, d_sae=sae.d_sae) if target.is_file() else []
    mine = {one.latent: one for one in there if one.source == source and one.latent in set(latents)}
    others = [one for one in there if one.source != source or one.latent not in mine]
    made = {} if explainer is None else dict(mine)
    left = [latent for latent in latents if latent not in made]
    tell = (lambda stage: None) if bars is None else (lambda stage: lambda done, total: bars(stage, done, total, ""))
    found = contexts_of(loaded.model, loaded.tokenizer, sae, left, *chunks, top=top, progress=tell("contexts"))
    promoted = top_tokens(loaded.model, sae, k=8)
    for number, latent in enumerate(left, start=1):
        tokens = [loaded.tokenizer.decode([int(token)]) for token in promoted[latent]]
        if explainer is None:
            one = label_from(latent, found[latent], tokens)
        else:
            one = explainer.explain(latent, found[latent], tokens) if found[latent] else None
        if one is not None:
            made[latent] = one
        if number == len(left) or (explainer is not None and number % 10 == 0):
            write_labels([*others, *made.values()], target)
            if bars is not None:
                bars("labels", number, len(left), "")
    if not left:
        write_labels([*others, *made.values()], target)
    return [made[latent] for latent in sorted(made)], len(others)
