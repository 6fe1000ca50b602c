"""Files cut short: whatever is left of them must end in an error of ours, or change nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeguard import load_sae
from saeguard.errors import LoadError
from tests.lookalikes.base import LookAlike

LENGTHS = 30


def surprises(like: LookAlike, folder: Path, options: Mapping[str, Any] | None = None) -> list[str]:
    """What loading ``like`` raised, besides `LoadError`, with any of its files cut at any of many lengths."""
    source = like.write(folder)
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for length in sorted({len(whole) * i // LENGTHS for i in range(LENGTHS)} | {1, 8, 64, len(whole) - 1}):
            path.write_bytes(whole[:length])
            try:
                load_sae(source, **(options or like.options))
            except LoadError:
                pass
            except Exception as error:
                found.append(f"{path.name} cut at {length} of {len(whole)}: {error!r}")
        path.write_bytes(whole)
    return found


def refused(source: Path, **options: Any) -> bool:
    """Whether loading ends in a `LoadError`; anything else that it raises goes on."""
    try:
        load_sae(source, **options)
    except LoadError:
        return True
    return False
