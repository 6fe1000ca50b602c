"""Where commands find a policy: a file, or the name of one that comes with the package."""

from pathlib import Path

import typer

HELP = "A policy file, as Policy.save writes, or the name of a shipped one: biology, biology-edits."


def named_policy(given: str) -> Path:
    """The file. A file of that name comes first. Raises `typer.BadParameter` where there is neither."""
    from saeguard.guarding.shipped import shipped_policies

    path, shipped = Path(given), shipped_policies()
    if path.is_dir():
        raise typer.BadParameter(f"{given} is a directory")
    if not path.is_file() and given not in shipped:
        raise typer.BadParameter(f"there is no file {given}; shipped policies: {', '.join(shipped) or 'none'}")
    return path if path.is_file() else shipped[given]
