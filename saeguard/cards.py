"""Model cards of the SAEs that come with the package: what they were trained on and what was measured."""

import json
from typing import Any

from saeguard.errors import BrokenFile
from saeguard.loaders import shipped

NAME = "card.json"


def shipped_cards() -> dict[str, dict[str, Any]]:
    """The cards, by the name under which `load_sae` finds the SAE. Raises `BrokenFile`."""
    return {name: read_card(name) for name in shipped()}


def read_card(name: str) -> dict[str, Any]:
    """The card of one shipped SAE; empty when it has none. Raises `BrokenFile`."""
    path = shipped()[name] / NAME
    if not path.is_file():
        return {}
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrokenFile(f"card of {name}", f"it is not JSON ({error})", "Install saeguard again.") from error
    if not isinstance(card, dict):
        raise BrokenFile(f"card of {name}", "it is not a JSON object", "Install saeguard again.")
    return card
