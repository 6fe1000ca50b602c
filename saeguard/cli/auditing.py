"""``saeguard audit``: whether an audit log is the chain that was written, and what it says in numbers."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.console import Json, out, progress, table, write_json

app = typer.Typer(
    no_args_is_help=True, help="Verify and read the log of guarded requests.", pretty_exceptions_enable=False
)
Log = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="An audit log, as a guarded model writes it.")]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", dir_okay=False, help="The deployment's key, to check every line's seal.")
]
KeyVariable = Annotated[str, typer.Option("--key-env", help="The environment variable that holds the key.")]
HeadText = Annotated[str, typer.Option("--head", help="NUMBER:SHA256 of a line that was there once.")]
HeadFile = Annotated[
    Path | None,
    typer.Option("--head-file", exists=True, dir_okay=False, help="The file with a head, instead of --head."),
]
COUNTS = ("requests", "allow", "steer", "refuse", "error", "ran", "partial", "not_run", "bypassed", "lost_bytes")


class By(StrEnum):
    """How long a row's time is."""

    minute = "minute"
    hour = "hour"
    day = "day"
    month = "month"


@app.command("verify")
def verify(
    file: Log,
    key_file: KeyFile = None,
    key_env: KeyVariable = "",
    head: HeadText = "",
    head_file: HeadFile = None,
    as_json: Json = False,
) -> None:
    """Read a log to its first line that is not what was written.

    Exit status 0: every line stands. 1: a line does not, or the last one is unfinished. 2: it cannot be read. Without
    the key a chain that was written anew from an edit on is not noticed; without a head, neither are lines missing at
    the end.
    """
    from saeguard.guarding import verify as verifying

    key, known = _key(key_file, key_env), _head(head, head_file)
    with progress("verifying") as tick:
        found = verifying.verify(
            file, key=key, head=known, progress=lambda done, size: tick(f"verifying, {done / size:.0%}")
        )
    if as_json:
        write_json({"ok": found.ok, **asdict(found), "head": str(found.head), "head_checked": known is not None})
    else:
        _tell(file, found, known is not None)
    if not found.ok:
        raise typer.Exit(1)


@app.command("show")
def show(
    file: Log,
    key_file: KeyFile = None,
    key_env: KeyVariable = "",
    by: Annotated[By, typer.Option(help="One row per minute, hour, day or month, in UTC.")] = By.day,
    as_json: Json = False,
) -> None:
    """Count the requests of a log by decision and by guard status, over time.

    Every line is verified on the way. Exit status 2 at the first that does not stand.
    """
    from saeguard.guarding import summary
    from saeguard.guarding import verify as verifying

    key = _key(key_file, key_env)
    with progress("reading"):
        found = summary.summarise(verifying.read(file, key=key), by=by.value)
    total = sum(found.values(), summary.Counts())
    if as_json:
        periods = [{by.value: period, **_counts(counts)} for period, counts in found.items()]
        write_json({"file": str(file), "keyed": key is not None, "total": _counts(total), "periods": periods})
        return
    rows = [(period, *_counts(counts).values()) for period, counts in [*found.items(), ("all", total)]]
    heads = (by.value, *(name.replace("_", " ") for name in COUNTS))
    out().print(table(f"Requests in {file.name}", heads, rows, right=range(1, len(heads))))


def _key(path: Path | None, variable: str) -> Any:
    from saeguard.guarding.keys import AuditKey

    if path is not None and variable:
        raise typer.BadParameter("--key-file and --key-env: give one of them")
    if path is not None:
        return AuditKey.from_file(path)
    return AuditKey.from_environment(variable) if variable else None


def _head(text: str, path: Path | None) -> Any:
    from saeguard.guarding.chain import Head

    if text and path is not None:
        raise typer.BadParameter("--head and --head-file: give one of them")
    if path is not None:
        return Head.load(path)
    return Head.parse(text) if text else None


def _counts(counts: Any) -> dict[str, int]:
    return {name: getattr(counts, name) for name in COUNTS}


def _tell(file: Path, found: Any, head_checked: bool) -> None:
    console = out()
    console.print(f"{file}: {found.records:,} records stand", markup=False, soft_wrap=True)
    if found.why is not None:
        console.print(f"line {found.bad_line:,} does not: {found.why}", markup=False, soft_wrap=True)
    elif found.torn_bytes:
        console.print(f"behind them are {found.torn_bytes} bytes of an unfinished line, whose writer died")
    console.print(f"head {found.head}", soft_wrap=True)
    if not found.keyed:
        seals = "the lines' seals were not checked" if found.seals else "the lines have no seals"
        console.print(f"{seals}: an edit with all later lines written anew would not show", style="dim")
    if not head_checked:
        console.print("no head was given: lines missing at the end would not show", style="dim")
