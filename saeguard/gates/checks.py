"""What the numbers of a gate have to be, so that a gate that was built can be run."""

from collections.abc import Sequence
from typing import Any

from saeguard.errors import BadRule
from saeguard.ops import as_amount
from saeguard.sites import Site


def one_number(what: str, value: Any) -> float:
    """``value`` as a finite float. Raises `BadRule`."""
    found = as_amount(what, value)
    if not isinstance(found, float):
        raise BadRule(f"{what}={value!r:.40}", "that is not one number", "Give one finite number.")
    return found


def as_weights(what: str, weights: Sequence[float], n: int | None = None) -> tuple[float, ...]:
    """``weights`` as finite floats, ``n`` of them. Raises `BadRule`."""
    found = as_amount(f"{what} weights", tuple(weights))
    assert isinstance(found, tuple)
    if n is not None and len(found) != n:
        raise BadRule(f"{what} with {len(found)} weights", f"it has {n} latents", "Give one weight per latent.")
    return tuple(float(weight) for weight in found)


def whole(what: str, value: Any, least: int = 1) -> int:
    """``value`` as an integer from ``least`` upwards. Raises `BadRule`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadRule(f"{what}={value!r}", f"that is no whole number from {least} upwards", "Give one.")
    return value


def as_site(site: Any) -> Site | None:
    """A `Site`, also from its name. Raises `BadRule`, `SiteNotFound`."""
    if site is None or isinstance(site, Site):
        return site
    if isinstance(site, str):
        return Site.parse(site)
    raise BadRule(f"a gate with site={site!r}", "that is not a site", "Use Site('resid_post', 12).")
