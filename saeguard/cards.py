"""Cards of the SAEs and policies that come with the package: what they were made from and what was measured."""

import json
from pathlib import Path
from typing import Any

from saeguard.errors import BrokenFile
from saeguard.loaders import shipped

NAME = "card.json"
POLICIES = Path(__file__).parent / "assets" / "policies"


def shipped_cards() -> dict[str, dict[str, Any]]:
    """The cards, by the name under which `load_sae` finds the SAE. Raises `BrokenFile`."""
    return {name: read_card(name) for name in shipped()}


def read_card(name: str) -> dict[str, Any]:
    """The card of one shipped SAE; empty when it has none. Raises `BrokenFile`."""
    path = shipped()[name] / NAME
    return _read(path, name) if path.is_file() else {}


def policy_cards() -> dict[str, dict[str, Any]]:
    """The cards of shipped policies, by name. Raises `BrokenFile`."""
    return {path.name.removesuffix(f".{NAME}"): _read(path, path.name) for path in sorted(POLICIES.glob(f"*.{NAME}"))}


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenFile(f"card of {name}", f"it is not JSON ({error})", "Install saeguard again.") from error
    if not isinstance(card, dict):
        raise BrokenFile(f"card of {name}", "it is not a JSON object", "Install saeguard again.")
    return card
