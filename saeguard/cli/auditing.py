"""``saeguard audit``: whether an audit log is the chain that was written, what it says in numbers, and its rotation."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.console import Json, out, progress, table, write_json

app = typer.Typer(
    no_args_is_help=True, help="Verify, read and rotate the log of guarded requests.", pretty_exceptions_enable=False
)
Log = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="An audit log, as a guarded model writes it.")]
Logs = Annotated[
    list[Path],
    typer.Argument(exists=True, dir_okay=False, help="An audit log, with the segments beside it; or all files of one."),
]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", dir_okay=False, help="The deployment's key, to check every line's seal.")
]
KeyVariable = Annotated[str, typer.Option("--key-env", help="The environment variable that holds the key.")]
HeadText = Annotated[str, typer.Option("--head", help="NUMBER:SHA256 of a line that was there once.")]
HeadFile = Annotated[
    Path | None,
    typer.Option("--head-file", exists=True, dir_okay=False, help="The file with a head, instead of --head."),
]
Behind = Annotated[
    str, typer.Option("--behind", help="NUMBER:SHA256 of the last line of segments that are no longer kept.")
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
    files: Logs,
    key_file: KeyFile = None,
    key_env: KeyVariable = "",
    head: HeadText = "",
    head_file: HeadFile = None,
    behind: Behind = "",
    as_json: Json = False,
) -> None:
    """Read a log to its first line that is not what was written, over all its segments.

    Segments are found beside a log, or given in their order with the log at the end. Exit status 0: every line
    stands. 1: a line does not, a segment is missing or not in its place, or the last line is unfinished. 2: a file
    cannot be read. Without the key a chain that was written anew from an edit on is not noticed; without a head,
    neither are lines missing at the end.
    """
    from saeguard.guarding import verify as verifying

    key, known = _key(key_file, key_env), _head(head, head_file)
    with progress("verifying") as tick:
        found = verifying.verify(
            _files(files), key=key, head=known, behind=_behind(behind),
            progress=lambda done, size: tick(f"verifying, {done / size:.0%}"),
        )  # fmt: skip
    if as_json:
        write_json({"ok": found.ok, **asdict(found), "head": str(found.head), "head_checked": known is not None})
    else:
        _tell(files[-1], found, known is not None)
    if not found.ok:
        raise typer.Exit(1)


@app.command("show")
def show(
    files: Logs,
    key_file: KeyFile = None,
    key_env: KeyVariable = "",
    behind: Behind = "",
    by: Annotated[By, typer.Option(help="One row per minute, hour, day or month, in UTC.")] = By.day,
    as_json: Json = False,
) -> None:
    """Count the requests of a log by decision and by guard status, over time and over all its segments.

    Every line is verified on the way. Exit status 2 at the first that does not stand.
    """
    from saeguard.guarding import summary
    from saeguard.guarding import verify as verifying

    key, file = _key(key_file, key_env), files[-1]
    with progress("reading"):
        entries = verifying.read(_files(files), key=key, behind=_behind(behind))
        found = summary.summarise(entries, by=by.value)
    total = sum(found.values(), summary.Counts())
    if as_json:
        periods = [{by.value: period, **_counts(counts)} for period, counts in found.items()]
        write_json({"file": str(file), "keyed": key is not None, "total": _counts(total), "periods": periods})
        return
    rows = [(period, *_counts(counts).values()) for period, counts in [*found.items(), ("all", total)]]
    heads = (by.value, *(name.replace("_", " ") for name in COUNTS))
    out().print(table(f"Requests in {file.name}", heads, rows, right=range(1, len(heads))))


@app.command("rotate")
def rotate(
    file: Log,
    key_file: KeyFile = None,
    key_env: KeyVariable = "",
    head_file: HeadFile = None,
    as_json: Json = False,
) -> None:
    """Close a log as a segment beside it, and begin its next file; writers go on, none has to be stopped.

    For a timer: no other tool may move a log away, or its writers refuse. Move segments only when every writer has
    written since. Exit status 0, also for a log without new records, which stays; 2: it is not what was written, or
    cannot be.
    """
    from saeguard.guarding.audit import AuditLog

    log = AuditLog(file, key=_key(key_file, key_env), head_file=head_file)
    segment = log.rotate()
    if as_json:
        write_json({"file": str(file), "segment": None if segment is None else str(segment), "head": str(log.head)})
    elif segment is None:
        out().print(f"{file} has no new records", markup=False, soft_wrap=True)
    else:
        out().print(f"{segment} ends with line {log.head.seq - 1:,}, which {file} continues", markup=False,
                    soft_wrap=True)  # fmt: skip


def _files(given: list[Path]) -> Any:
    """A log alone stands for its segments too."""
    return given[0] if len(given) == 1 else given


def _behind(text: str) -> Any:
    from saeguard.guarding.chain import START, Head

    return Head.parse(text) if text else START


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
    console, over = out(), f" in {found.files} files" if found.files > 1 else ""
    console.print(f"{file}: {found.records:,} records stand{over}", markup=False, soft_wrap=True)
    if found.why is not None:
        where = f" ({found.bad_file})" if found.files > 1 else ""
        console.print(f"line {found.bad_line:,}{where} does not: {found.why}", markup=False, soft_wrap=True)
    elif found.torn_bytes:
        console.print(f"behind them are {found.torn_bytes} bytes of an unfinished line, whose writer died")
    elif found.ended:
        console.print("the last of them says that the log goes on in another file, which is not among these")
    console.print(f"head {found.head}", soft_wrap=True)
    if not found.keyed:
        seals = "the lines' seals were not checked" if found.seals else "the lines have no seals"
        console.print(f"{seals}: an edit with all later lines written anew would not show", style="dim")
    if not head_checked:
        console.print("no head was given: lines missing at the end would not show", style="dim")
