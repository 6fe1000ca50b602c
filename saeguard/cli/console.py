"""How the command speaks: results on standard output, all else on standard error, errors in one red line."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from saeguard.errors import SaeguardError

EXIT_ERROR = 2
"""Exit status when saeguard refuses; 1 means that something was computed and a check failed."""

Json = Annotated[bool, typer.Option("--json", help="Write JSON to standard output and nothing else.")]


class Commands(TyperGroup):
    """The subcommands, with saeguard's own errors turned into one line and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SaeguardError as error:
            if ctx.params.get("debug"):
                raise
            _tell(error)
            raise typer.Exit(EXIT_ERROR) from error
        except OSError as error:  # a folder that cannot be made, a disk that is full
            if ctx.params.get("debug") or error.filename is None:
                raise
            _tell(error)
            raise typer.Exit(EXIT_ERROR) from error


def _tell(error: Exception) -> None:
    err().print(f"[bold red]error[/] {escape(type(error).__name__)}: {escape(str(error))}", soft_wrap=True)


def out() -> Console:
    """Standard output, as it is now."""
    return Console(highlight=False)


def err() -> Console:
    """Standard error, as it is now."""
    return Console(stderr=True, highlight=False)


def write_json(document: Any) -> None:
    """One JSON document on standard output; a string is taken as JSON already."""
    typer.echo(document if isinstance(document, str) else json.dumps(document, indent=2, ensure_ascii=False))


def check_target(target: Path | None, option: str = "--out") -> None:
    """Refuse a file that could not be written, before any work; its folder is made."""
    if target is None:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{option} {target}: its folder cannot be made ({error})") from error
    if target.is_dir():
        raise typer.BadParameter(f"{option} {target}: that is a folder, name a file in it")
    if not os.access(target.parent, os.W_OK):
        raise typer.BadParameter(f"{option} {target}: nothing can be written in its folder")


@contextmanager
def progress(start: str) -> Iterator[Any]:
    """A spinner on standard error; the value sets its text. Where there is no terminal nothing is shown."""
    with err().status(start) as status:
        yield lambda text: status.update(escape(text))


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> Table:
    """A table whose cells are shown as they are, markup included; columns in ``right`` are aligned to the right."""
    made = Table(title=escape(title) or None, title_justify="left", header_style="bold", box=None, padding=(0, 2, 0, 0))
    for number, head in enumerate(heads):
        made.add_column(head, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(str(cell)) for cell in row))
    return made


def report_table(report: Any) -> Table:
    """A `Report` in the words of the README."""
    rows = [
        (r.rule, r.site, r.tokens_seen, r.tokens_edited, f"{r.mean_delta:.2f}", f"{r.mean_share:.1%}")
        for r in report.rules
    ]
    heads = ("rule", "at", "seen", "edited", "mean |dx|", "of |x|")
    return table("What was edited", heads, rows, right=(2, 3, 4, 5))
