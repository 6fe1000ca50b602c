"""``saeguard score``: numbers per latent by which to choose them, named and joined in one file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.console import Json, check_target, out, table, write_json
from saeguard.cli.jobs import Asked, make_job
from saeguard.cli.latents import Source, default_sae, labels_for, latent_numbers
from saeguard.cli.reading import DEMO, Model, Seed
from saeguard.cli.texts import merged, named_files
from saeguard.cli.training import progress_bars

Files = list[str] | None


def score(
    scores: Annotated[Files, typer.Option("--score", help="A score by name, see --list; repeatable.")] = None,
    sets: Annotated[Files, typer.Option("--set", help="All of output, activation, gradient or topic.")] = None,
    target: Annotated[
        Path | None, typer.Option("--out", help="Where the scores go (.safetensors); joined to what is there.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="List all scores and what they need, and stop.")] = False,
    sae: Source = "",
    model: Model = DEMO,
    text: Annotated[Files, typer.Option(help="NAME=FILE, such as positive=a.jsonl; FILE alone is the text.")] = None,
    forget: Annotated[Files, typer.Option(help="Text to forget: .txt, .jsonl, .jsonl.gz; repeatable.")] = None,
    retain: Annotated[Files, typer.Option(help="Text to keep; repeatable.")] = None,
    questions: Annotated[Files, typer.Option(help="JSON lines with question, choices, gold; repeatable.")] = None,
    about: Annotated[Files, typer.Option(help="A topic in words, beside or instead of --aligned; repeatable.")] = None,
    aligned: Annotated[Files, typer.Option(help="Texts of the topic; repeatable.")] = None,
    opposed: Annotated[Files, typer.Option(help="Texts that the topic is contrasted with; repeatable.")] = None,
    reference: Annotated[Files, typer.Option(help="Texts of many topics, for the score topic; repeatable.")] = None,
    labels: Annotated[Path | None, typer.Option(help="For label_similarity; the SAE's table by default.")] = None,
    groups: Annotated[Path | None, typer.Option(help='For reason: JSON, {"group": ["word", ...]}.')] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per text at most, shared evenly by its files.")] = 100_000,
    passages: Annotated[int, typer.Option(min=1, help="Passages to draw from --reference.")] = 6000,
    ask: Annotated[int, typer.Option(min=1, help="Questions to draw.")] = 200,
    prefix: Annotated[Files, typer.Option(help="For output scores: texts behind which to push; repeatable.")] = None,
    latents: Annotated[str, typer.Option(help="Only these, where latents are gone through: 12,87.")] = "",
    sample: Annotated[int, typer.Option(min=0, help="Only so many, drawn by --seed.")] = 0,
    keep: Annotated[int | None, typer.Option("--top-k", min=1, help="g-SAE's k where the SAE has none.")] = None,
    seed: Seed = 0,
    cache: Annotated[Path | None, typer.Option(help="Folder of computed numbers: a second score is free.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of unfinished work; beside --out otherwise.")] = None,
    embedder: Annotated[str, typer.Option(help="A folder or name; the default is all-MiniLM-L6-v2.")] = "",
    as_json: Json = False,
) -> None:
    """Score the latents of an SAE. An interrupted command goes on where it was when it is given again.

    Examples: saeguard score --set output --out scores.safetensors;
    saeguard score --score dsg --score farrell --forget a.jsonl --retain b.jsonl --out scores.safetensors
    """
    if listing:
        _list(as_json)
        return
    check_target(target)
    asked = Asked(
        names=_names(scores or [], sets or []), sae=sae or default_sae(), model=model, questions=questions or [],
        texts=merged(named_files(text or []), _roles(forget=forget, retain=retain)),
        documents=_roles(aligned=aligned, opposed=opposed, reference=reference), about=about or [], labels=labels,
        groups=groups, tokens=tokens, passages=passages, ask=ask, latents=latent_numbers(latents) if latents else None,
        sample=sample, prefixes=prefix, keep=keep, seed=seed, cache=cache, embedder=embedder,
        folder=checkpoint or (target.with_name(target.name + ".unfinished") if target is not None else None),
    )  # fmt: skip
    with progress_bars(shown=not as_json) as bars:
        made, joined = _run(asked, target, None if bars is None else lambda *told: bars(*told, ""))
    if as_json:
        write_json(_document(made, joined, target))
    else:
        _show(made, joined, target, labels_for(asked.sae, labels))


def _names(scores: list[str], wanted: list[str]) -> list[str]:
    from saeguard.scoring.catalogue import sets

    known = sets()
    for name in wanted:
        if name not in known:
            raise typer.BadParameter(f"--set {name}: sets are {', '.join(known)}")
    if not scores and not wanted:
        raise typer.BadParameter("name a --score or a --set; --list shows them all")
    return [*scores, *(score for name in wanted for score in known[name])]


def _roles(**given: Files) -> dict[str, list[str]]:
    return {role: files for role, files in given.items() if files}


def _run(asked: Asked, target: Path | None, tell: Any) -> tuple[Any, Any]:
    """The new table, and the same joined to what ``target`` holds. Raises `ScoreMismatch` before any work."""
    from saeguard.scoring.catalogue import compute
    from saeguard.scoring.table import ScoreTable

    job = make_job(asked, tell)
    there = ScoreTable.load(target) if target is not None and target.is_file() else None
    if there is not None:
        there.join(ScoreTable.of(job.sae, {}))
    made = compute(asked.names, job)
    joined = made if there is None else there.join(made)
    if target is not None:
        joined.save(target)
    if asked.folder is not None and asked.folder.is_dir() and not any(asked.folder.iterdir()):
        asked.folder.rmdir()
    return made, joined


def _list(as_json: bool) -> None:
    from saeguard.scoring.catalogue import SCORES

    if as_json:
        write_json([
            {"name": s.name, "family": s.family, "in_set": s.usual and s.family != "control", "needs": s.needs,
             "columns": s.columns, "unit": s.meaning.unit, "source": s.meaning.source, "higher": s.meaning.higher}
            for s in SCORES
        ])  # fmt: skip
        return
    rows = [
        (s.name, s.family if s.usual and s.family != "control" else f"({s.family})", ", ".join(s.needs) or "-",
         s.meaning.unit, "higher" if s.meaning.higher else "lower", s.meaning.source)
        for s in SCORES
    ]  # fmt: skip
    heads = ("score", "set", "needs", "unit of its first column", "better", "source")
    out().print(table("Scores", heads, rows))
    out().print("In brackets: by --score only. positive and negative are forget and retain unless given.", style="dim")


def _document(made: Any, joined: Any, target: Path | None) -> dict[str, Any]:
    from saeguard.scoring.table import as_json

    columns = {
        name: {"unit": made.meanings[name].unit, "source": made.meanings[name].source,
               "higher": made.meanings[name].higher, "provenance": dict(made.provenance[name]),
               "values": [as_json(value) for value in column.tolist()]}
        for name, column in made.columns.items()
    }  # fmt: skip
    return {"sae": made.sae, "sae_fingerprint": made.sae_fingerprint, "columns": columns,
            "written": None if target is None else str(target), "in_file": list(joined.columns)}  # fmt: skip


def _show(made: Any, joined: Any, target: Path | None, labels: dict[int, str]) -> None:
    rows = []
    for name, meaning in made.meanings.items():
        ranked = made.ranked(name)
        best = f"{made.row(ranked[0])[name]:.4g}" if ranked else "-"
        first = f"{ranked[0]}  {labels.get(ranked[0], '')}" if ranked else "-"
        rows.append((name, len(ranked), best, first, "higher" if meaning.higher else "lower", meaning.unit))
    heads = ("column", "latents", "best", "which", "better", "unit")
    out().print(table(f"Scores of {made.sae}", heads, rows, right=(1, 2)))
    if target is not None:
        out().print(f"Wrote {target}, which has {len(joined.columns)} columns. Choose with: saeguard select {target}")
