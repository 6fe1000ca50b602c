"""The sites that an SAE could have been meant for: beside its own, one layer off, or another stream of its width."""

from collections.abc import Iterator
from typing import NamedTuple

from saeguard.engines.base import Engine, Place
from saeguard.errors import SiteNotFound, WidthMismatch
from saeguard.sae import SAE
from saeguard.sites import STREAMS, Site

RESIDUAL = ("resid_pre", "resid_mid", "resid_post")


class Pair(NamedTuple):
    """Where something reads and where it writes; the same site unless it is a transcoder."""

    read: Site
    write: Site

    def __str__(self) -> str:
        return str(self.read) if self.read == self.write else f"{self.read} -> {self.write}"


def own_pair(sae: SAE, engine: Engine) -> Pair:
    """The sites that ``sae`` names. Raises `SiteNotFound`, `WidthMismatch`."""
    if sae.site is None:
        raise SiteNotFound(
            f"SAE {sae.name} on a model",
            "it does not say at which site it belongs",
            "Load it with site=..., or set it with dataclasses.replace.",
        )
    pair = Pair(sae.site, sae.site_out or sae.site)
    for verb, width, site in (("reads", sae.d_in, pair.read), ("writes", sae.d_out, pair.write)):
        place = engine.resolve(site)
        if place.width != width:
            raise WidthMismatch(
                f"SAE {sae.name} at {site}",
                f"it {verb} vectors of width {width}, and {site} carries width {place.width}",
                "Was this SAE trained on another model or another stream?",
            )
    return pair


def other_pairs(own: Pair, sae: SAE, engine: Engine) -> list[Pair]:
    """Places of the same widths that the model has, streams that are one and the same left out."""
    found = {_plain(own): own}
    for pair in _candidates(own):
        read, write = _place(pair.read, engine), _place(pair.write, engine)
        if sae.norm != "none" and "mlp_normed" in (pair.read.stream, pair.write.stream):
            continue  # an SAE that norms each token cannot tell it from resid_mid
        fits = read is not None and write is not None and (read.width, write.width) == (sae.d_in, sae.d_out)
        if fits and (pair.read == pair.write) == (own.read == own.write):
            found.setdefault(_plain(pair), pair)
    return [pair for pair in found.values() if pair != own]


def _candidates(own: Pair) -> Iterator[Pair]:
    for step in (-1, 1):
        if own.read.layer + step >= 0 and own.write.layer + step >= 0:
            yield Pair(Site(own.read.stream, own.read.layer + step), Site(own.write.stream, own.write.layer + step))
    if own.read != own.write:
        for stream in STREAMS:
            yield Pair(Site(stream, own.read.layer), own.write)
            yield Pair(own.read, Site(stream, own.write.layer))
        return
    layer = own.read.layer
    if own.read.stream in RESIDUAL:
        for there in range(max(layer - 1, 0), layer + 2):
            for stream in RESIDUAL:
                yield Pair(Site(stream, there), Site(stream, there))
    for stream in STREAMS:
        yield Pair(Site(stream, layer), Site(stream, layer))


def _plain(pair: Pair) -> Pair:
    """With what enters a block named as what leaves the one before: they are one stream."""
    return Pair(*(Site("resid_post", s.layer - 1) if s.stream == "resid_pre" and s.layer else s for s in pair))


def _place(site: Site, engine: Engine) -> Place | None:
    try:
        return engine.resolve(site)
    except SiteNotFound:
        return None
