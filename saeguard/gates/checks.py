"""What the fields of a gate have to be, so that a gate that was built can be run."""

from collections.abc import Iterable
from typing import Any

from saeguard.errors import BadRule
from saeguard.ops import as_amount
from saeguard.sites import Site

MOST = 65_536
"""Tokens that a pool may remember one by one."""


def one_number(what: str, value: Any) -> float:
    """``value`` as a finite float. Raises `BadRule`."""
    found = as_amount(what, value)
    if not isinstance(found, float):
        raise BadRule(f"{what}={value!r:.40}", "that is not one number", "Give one finite number.")
    return found


def as_weights(what: str, weights: Any, n: int | None = None) -> tuple[float, ...]:
    """``weights`` as finite floats, ``n`` of them. Raises `BadRule`."""
    if not isinstance(weights, Iterable):
        raise BadRule(f"{what} with weights={weights!r:.40}", "that is no list of numbers", "Give a tuple of floats.")
    found = as_amount(f"{what} weights", tuple(weights))
    assert isinstance(found, tuple)
    if n is not None and len(found) != n:
        raise BadRule(f"{what} with {len(found)} weights", f"it needs {n}", "Give one per latent and way of pooling.")
    return found


def whole(what: str, value: Any) -> None:
    """Raises `BadRule` unless ``value`` is a number of tokens that can be remembered."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise BadRule(f"{what}({value!r:.40})", f"that is no whole number from 1 to {MOST}", "Give one.")


def check_source(leaf: Any) -> None:
    """Settle where a leaf reads: ``sae`` is a name or None, ``site`` a `Site`, its name or None, ``special`` a bool.

    Raises `BadRule`, `SiteNotFound`.
    """
    what, sae, site, special = type(leaf).__name__, leaf.sae, leaf.site, leaf.special
    if sae is not None and (not isinstance(sae, str) or not sae):
        raise BadRule(f"{what} with sae={sae!r:.40}", "a gate names its SAE by a string", "Use sae.name, or None.")
    if not isinstance(special, bool):
        raise BadRule(f"{what} with special={special!r:.40}", "that is neither True nor False", "Give a bool.")
    if isinstance(site, str):
        object.__setattr__(leaf, "site", Site.parse(site))
    elif site is not None and not isinstance(site, Site):
        raise BadRule(f"{what} with site={site!r:.40}", "that is not a site", "Use Site('resid_post', 12).")
