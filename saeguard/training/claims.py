"""A folder of unfinished work says what it is for, so that work on something else is not mixed into it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeguard.errors import TrainError


def claim(manifest: Path, what: str, wanted: Mapping[str, Any]) -> None:
    """Write what the folder of ``manifest`` is for, or compare with what is written there. Raises `TrainError`.

    ``what`` names the work in the plural, such as activations.
    """
    if not manifest.exists():
        partial = manifest.with_suffix(".partial")
        partial.write_text(json.dumps(dict(wanted), indent=2), encoding="utf-8")
        os.replace(partial, manifest)
        return
    try:
        found = dict(json.loads(manifest.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise TrainError(
            f"{what} in {manifest.parent}",
            f"{manifest.name} cannot be read ({error})",
            "Remove the folder, or give another.",
        ) from error
    for key, value in wanted.items():
        if found.get(key) != value:
            raise TrainError(
                f"{what} in {manifest.parent} with {key} {value!s:.200}",
                f"the folder holds {what} with {key} {found.get(key)!s:.200}",
                "Give another folder, or remove this one to compute them again.",
            )
