"""``saeguard error`` and ``saeguard compare``: what an SAE leaves unexplained, and two SAEs side by side."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.console import Json, out, write_json

Files = Annotated[
    list[str] | None, typer.Option("--text", help="A text file or a quoted pattern: a domain by its name; repeatable.")
]
Domains = Annotated[
    list[str] | None, typer.Option("--domain", help="NAME=FILE: a domain by another name, or of several files.")
]
Model = Annotated[str, typer.Option(help="A demo model's name, or the folder of a model.")]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Tokens of each domain at most.")]
Rows = Annotated[int, typer.Option("--ce-rows", min=0, help="Token rows of each domain for cross-entropy; 0: none.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of what is drawn from the files.")]
DEMO = "smollm2-135m-instruct"
PURSUED_AT = (1, 2, 4, 8, 16, 32)
"""Latents per token on the curve of --pursuit, beside the SAE's own L0."""


def error(
    sae: Annotated[str, typer.Option("--sae", help="A shipped SAE's name, or the folder of one.")] = "",
    boost: Annotated[
        list[str] | None, typer.Option("--boost", help="A boost of that SAE: shows before and after; repeatable.")
    ] = None,
    text: Files = None,
    domain: Domains = None,
    model: Model = DEMO,
    tokens: Tokens = 12_000,
    ce_rows: Rows = 8,
    fit_share: Annotated[float, typer.Option(min=0.05, max=0.95, help="Share of the rows to fit on.")] = 0.6,
    pursuit: Annotated[bool, typer.Option("--pursuit", help="Also encode by gradient pursuit.")] = False,
    pursuit_tokens: Annotated[int, typer.Option(min=1, help="Tokens for that.")] = 512,
    top: Annotated[int, typer.Option(min=0, help="Tokens of the vocabulary to list.")] = 15,
    picture: Annotated[Path | None, typer.Option(help="Also draw a PNG there (needs matplotlib).")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Split what an SAE leaves unexplained into the part that follows linearly from x and the rest.

    Shares of variance by domain and by token, how well the error's norm is predicted, and the model's cross-entropy
    with each part restored; for a boosted SAE, or with --boost, before and after.
    """
    from saeguard.evaluating.error_split import split_error
    from saeguard.evaluating.passes import Passes
    from saeguard.evaluating.pursuit import pursuit_curve

    if picture is not None:  # before it is measured, not after
        from saeguard.drawing.error_picture import check_drawable

        check_drawable(picture)
    with bars(shown=not as_json) as progress:
        saes, loaded, texts = _load(sae, boost or [], model, _domains(text, domain), tokens, seed)
        splits = []
        for label, one in saes.items():
            split = split_error(
                loaded.model, one, texts, tokenizer=loaded.tokenizer, fit_share=fit_share, n_ce_rows=ce_rows, n_top=top,
                progress=_labelled(progress, label),
            )  # fmt: skip
            splits.append({"label": label, **asdict(split)})
        curve = None
        if pursuit:
            passes = Passes(loaded.model, list(saes.values())[-1])
            at = (*PURSUED_AT, max(round(splits[-1]["whole"]["l0"]), 1))
            fitted, measured = zip(*(one.split(fit_share) for one in texts), strict=True)
            x = passes.sample(measured, pursuit_tokens, longest=passes.massive_from(fitted))
            curve = asdict(pursuit_curve(passes.sae, x, at))
    document = {"splits": splits, "pursuit": curve}
    if picture is not None:
        from saeguard.drawing.error_picture import write_error_picture

        write_error_picture(document, picture)
    if as_json:
        write_json(finite(document))
        return
    _show_error(document, picture)


def compare(
    a: Annotated[str, typer.Argument(help="An SAE: a shipped name, a folder, a file, hf://owner/repo/path.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    text: Files = None,
    domain: Domains = None,
    model: Model = DEMO,
    anyway: Annotated[bool, typer.Option("--anyway", help="Also where their sites or models differ.")] = False,
    least: Annotated[float, typer.Option(min=0.0, max=1.0, help="Cosine of a shared pair, at least.")] = 0.7,
    fake_above: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of random tokens that is too many.")] = 0.1,
    tokens: Tokens = 6_000,
    ce_rows: Rows = 8,
    random_rows: Annotated[int, typer.Option(min=1, help="Rows of 128 random tokens for fake latents.")] = 32,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare two SAEs: the latents that they share and, with --text, how well each does at its own site.

    Shared are decoder rows paired one to one (Hungarian method) at a cosine of at least --least: between seeds, a base
    and its extended form, or dictionaries of two domains.
    """
    from saeguard.evaluating.overlap import check_comparable, overlap
    from saeguard.loaders import load_sae

    with bars(shown=not as_json) as progress:
        pair = load_sae(a), load_sae(b)
        check_comparable(*pair, anyway=anyway)
        domains = _domains(text, domain)
        found: dict[str, Any] = {"a": pair[0].name, "b": pair[1].name}
        found["overlap"] = _overlap_document(overlap(*pair, least=least, anyway=anyway))
        if domains:
            found["portraits"] = _portraits(
                pair, model, domains, progress, tokens=tokens, ce_rows=ce_rows, random_rows=random_rows, seed=seed,
                fake_above=fake_above,
            )  # fmt: skip
    write_json(finite(found)) if as_json else _show_comparison(found)


@contextmanager
def bars(*, shown: bool) -> Iterator[Any]:
    """One bar per stage on standard error; the value takes a stage, rows done and rows in all, and is None unshown."""
    from saeguard.cli.training import progress_bars

    with progress_bars(shown=shown) as tell:
        yield None if tell is None else lambda stage, done, total: tell(stage, done, total, "")


def _labelled(progress: Any, label: str) -> Any:
    return None if progress is None else lambda stage, done, total: progress(f"{label}: {stage}", done, total)


def _domains(text: Sequence[str] | None, domain: Sequence[str] | None) -> dict[str, list[str]]:
    """Files by domain: those of --text by their names up to the first dot, those of --domain as they say."""
    from saeguard.cli.training import expand

    found: dict[str, list[str]] = {}
    for path in expand(list(text or ())):
        found.setdefault(path.name.partition(".")[0] or path.name, []).append(str(path))
    for entry in domain or ():
        name, equals, file = entry.partition("=")
        if not (name and equals and file):
            raise typer.BadParameter(f"--domain {entry}: write NAME=FILE, such as law=government.jsonl")
        found.setdefault(name, []).extend(map(str, expand([file])))
    return found


def _load(
    source: str, boosts: Sequence[str], model: str, domains: dict[str, list[str]], tokens: int, seed: int
) -> tuple[dict[str, Any], Any, list[Any]]:
    """The SAE, or its base and its boosted form, by what they are called; the model; and the texts."""
    from saeguard.boosted import Boosted, base_of
    from saeguard.cli.latents import default_sae
    from saeguard.loaders import load_sae
    from saeguard.models import load_model

    if not domains:
        raise typer.BadParameter("give text to measure on: --text FILE, or --domain NAME=FILE")
    sae = load_sae(source or default_sae())
    sae = Boosted(sae, [load_sae(boost) for boost in boosts]) if boosts else sae
    saes = {"SAE": sae} if sae.n_base is None else {"base": base_of(sae), "boosted": sae}
    loaded = load_model(model)
    return saes, loaded, _texts(domains, loaded.tokenizer, sae, tokens, seed)


def _texts(domains: dict[str, list[str]], tokenizer: Any, sae: Any, tokens: int, seed: int) -> list[Any]:
    from saeguard.cli.texts import token_rows
    from saeguard.evaluating.passes import Text

    read = token_rows(domains, tokenizer, sae, n_tokens=tokens, seed=seed)
    return [Text(name, rows.ids, rows.mask, rows.kept) for name, rows in read.items()]


def _portraits(
    pair: Sequence[Any], model: str, domains: dict[str, list[str]], progress: Any, *, tokens: int, ce_rows: int,
    random_rows: int, seed: int, fake_above: float,
) -> list[dict[str, Any]]:  # fmt: skip
    from saeguard.evaluating.passes import Text
    from saeguard.evaluating.portrait import portrait
    from saeguard.models import load_model
    from saeguard.scoring.texts import Texts

    loaded, found = load_model(model), []
    live: Any = loaded.model
    vocabulary = min(live.get_input_embeddings().weight.shape[0], len(loaded.tokenizer))
    for label, sae in zip("AB", pair, strict=True):
        texts = _texts(domains, loaded.tokenizer, sae, tokens, seed)
        drawn = Texts.random(vocabulary, sae, loaded.tokenizer, rows=random_rows, seed=seed)
        made = portrait(
            live, sae, texts, random=Text(drawn.name, drawn.ids, drawn.mask, drawn.kept), n_ce_rows=ce_rows,
            fake_above=fake_above, progress=_labelled(progress, label),
        )  # fmt: skip
        document = asdict(made)
        for part, measures in ((document["whole"], made.whole), *zip(document["texts"], made.texts, strict=True)):
            part["ce_recovered"] = measures.ce_recovered
        found.append(document)
    return found


def _overlap_document(found: Any) -> dict[str, Any]:
    return asdict(found) | {"share_a": found.share_a, "share_b": found.share_b}


def finite(value: Any) -> Any:
    """The same document with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _show_error(document: dict[str, Any], picture: Path | None) -> None:
    from saeguard.cli.judged import change_table, curve_table, split_table, token_table

    console = out()
    for split in document["splits"]:
        console.print(split_table(split))
    if len(document["splits"]) == 2:
        console.print(change_table(*document["splits"]))
    console.print(token_table(document["splits"][-1]))
    if document["pursuit"]:
        console.print(curve_table(document["pursuit"]))
    if picture is not None:
        console.print(f"Wrote {picture}", style="dim", soft_wrap=True)


def _show_comparison(found: dict[str, Any]) -> None:
    from saeguard.cli.judged import domain_table, overlap_table, portrait_table

    console = out()
    console.print(overlap_table(found))
    if "portraits" in found:
        console.print(portrait_table(found["portraits"]))
        if len(found["portraits"][0]["texts"]) > 1:
            console.print(domain_table(found["portraits"]))
