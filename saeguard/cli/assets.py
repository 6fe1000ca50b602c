"""``saeguard assets``: the SAEs and policies that come with the package, and what their cards say."""

from typing import Any

from saeguard.cli.console import Json, out, table, write_json


def assets(as_json: Json = False) -> None:
    """List the SAEs and policies that come with saeguard; --json writes their cards in full."""
    from saeguard.cards import policy_cards, shipped_cards

    saes, policies = shipped_cards(), policy_cards()
    if as_json:
        write_json(saes | {f"policy {name}": card for name, card in policies.items()})
        return
    for kind, cards in (("SAEs", saes), ("policies", policies)):
        rows = [(name, _brief(card)) for name, card in cards.items()]
        out().print(
            table(f"Shipped {kind}", ("name", "card"), rows) if rows else f"No {kind} come with this installation."
        )


def _brief(card: dict[str, Any]) -> str:
    """The card's own plain values, one per line; lists and nested objects are for --json."""
    return "\n".join(f"{key}: {value}" for key, value in card.items() if isinstance(value, str | int | float))
