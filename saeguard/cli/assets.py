"""``saeguard assets``: the SAEs that come with the package, and what their cards say."""

from typing import Any

from saeguard.cli.console import Json, out, table, write_json


def assets(as_json: Json = False) -> None:
    """List the SAEs that come with saeguard; --json writes their cards in full."""
    from saeguard.cards import shipped_cards

    cards = shipped_cards()
    if as_json:
        write_json(cards)
        return
    rows = [(name, _brief(card)) for name, card in cards.items()]
    out().print(table("Shipped SAEs", ("name", "card"), rows) if rows else "No SAE comes with this installation.")


def _brief(card: dict[str, Any]) -> str:
    """The card's own plain values, one per line; lists and nested objects are for --json."""
    return "\n".join(f"{key}: {value}" for key, value in card.items() if isinstance(value, str | int | float))
