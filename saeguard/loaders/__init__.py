"""One file per checkpoint family, each saying how its files become an `SAE`."""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from saeguard.boosted import Boosted
from saeguard.errors import MissingSite, UnsupportedFormat
from saeguard.loaders import (
    apollo_e2e,
    bussmann,
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    itda,
    jkminder,
    linear_relu,
    llama_scope,
    llama_scope_r1,
    lm_saes,
    mistral_sae,
    nanda,
    native,
    openai,
    qwen_scope,
    refused,
    saelens,
    sparsify,
    vectors,
)  # fmt: skip
from saeguard.loaders.places import parts, resolve, shipped, shipped_boosts
from saeguard.loaders.source import Hints, Source
from saeguard.loaders.stored import Stored
from saeguard.sae import SAE
from saeguard.sites import Site

__all__ = ["LOADERS", "Hints", "Loader", "load_sae", "open_sae", "open_source", "shipped", "shipped_boosts"]


@runtime_checkable
class Loader(Protocol):
    """What a family's module offers."""

    def recognises(self, source: Source) -> bool:
        """Whether the files look like this family, judged by headers only."""
        ...

    def open(self, source: Source, hints: Hints) -> Stored:
        """What the SAE is and where its weights lie; no weight is read. Raises `LoadError`."""
        ...


LOADERS: dict[str, Loader] = {
    "saeguard": native,
    "saelens": saelens,
    "goodfire": goodfire,
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
    "circuit_tracer": circuit_tracer,
    "dictionary_learning": dictionary_learning,
    "jkminder": jkminder,
    "linear_relu": linear_relu,
    "openai": openai,
    "nanda": nanda,
    "apollo_e2e": apollo_e2e,
    "mistral_sae": mistral_sae,
    "bussmann": bussmann,
    "itda": itda,
    "llama_scope": llama_scope,
    "llama_scope_r1": llama_scope_r1,
    "lm_saes": lm_saes,
    "qwen_scope": qwen_scope,
    "sparsify": sparsify,
    "vectors": vectors,
    "refused": refused,
}


def open_sae(
    source: str | Path | tuple[str, str],
    site: Site | str | None = None,
    *,
    site_out: Site | str | None = None,
    model: str | None = None,
    top_k: int | None = None,
    input_scale: float | None = None,
) -> Stored:
    """What is at ``source``, with no weight read yet; see `load_sae`."""
    _check_numbers(top_k, input_scale)
    place = resolve(source)
    hints = Hints(
        _site(site) or place.site, _site(site_out), model or place.model, top_k,
        place.input_scale if input_scale is None else input_scale, place.overrides, place.origin,
    )  # fmt: skip
    stored = open_source(Source(place.path), hints)
    if place.site is not None and (stored.family != "vectors" or hints.site != place.site):
        raise UnsupportedFormat(
            f"SAE {str(source)!r}" + (f" at {hints.site}" if hints.site != place.site else ""),
            f"the @ names {place.site} of a file of vectors, and this is of {stored.family}",
            "Leave the @ or site= away.",
        )
    asked = {"top_k": (top_k, stored.top_k), "input_scale": (input_scale, stored.manifest.get("input_scale"))}
    for name, (wanted, used) in asked.items():
        if wanted is not None and wanted != used:
            raise UnsupportedFormat(
                f"SAE {stored.name} with {name}={wanted}",
                f"its files say {name} {used}" if used is not None else f"an SAE of its kind has no {name}",
                f"Leave {name} away.",
            )
    return stored


def _site(site: Site | str | None) -> Site | None:
    if site is None or isinstance(site, Site):
        return site
    return Site.parse(str(site))


def _check_numbers(top_k: object, input_scale: object) -> None:
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise UnsupportedFormat(f"top_k={top_k!r}", "that is no count of latents", "Give an int from 1 upwards.")
    is_number = type(input_scale) in (int, float) and 0 < float(str(input_scale)) < math.inf
    if input_scale is not None and not is_number:
        raise UnsupportedFormat(f"input_scale={input_scale!r}", "that is no factor", "Give a float above 0.")


def open_source(source: Source, hints: Hints) -> Stored:
    """What the one family that recognises ``source`` says it is. Raises `LoadError`."""
    families = [name for name, loader in LOADERS.items() if loader.recognises(source)]
    if len(families) != 1:
        raise UnsupportedFormat(
            f"SAE {str(source.path)!r}",
            "no loader recognises it" if not families else f"{' and '.join(families)} both recognise it",
            f"Families of this version: {', '.join(name for name in LOADERS if name != 'refused')}.",
        )
    loader = LOADERS[families[0]]
    if hints.site_out is not None:
        _check_writes(loader, source, hints)
    stored = loader.open(source, hints)
    return replace(stored, manifest=dict(stored.manifest) | {"origin": dict(hints.origin)}) if hints.origin else stored


def _check_writes(loader: Loader, source: Source, hints: Hints) -> None:
    """Refuse a second site for an SAE that writes where it reads: its norm would not be undone any more."""
    try:
        plain = loader.open(source, replace(hints, site=None, site_out=None))
    except (MissingSite, UnsupportedFormat):  # a transcoder whose files do not say where, or one of many layers
        return
    if plain.site is not None and plain.site_out is None:
        raise UnsupportedFormat(
            f"SAE {plain.name} with site_out {hints.site_out}",
            "its files hold an SAE, which writes where it reads",
            "Leave site_out away; a rule can still write elsewhere: Rule(..., site_out=...).",
        )


def load_sae(
    source: str | Path | tuple[str, str],
    site: Site | str | None = None,
    *,
    latents: Iterable[int] | None = None,
    site_out: Site | str | None = None,
    model: str | None = None,
    top_k: int | None = None,
    input_scale: float | None = None,
) -> SAE:
    """Load an SAE from a shipped name, a folder, a file, ``hf://owner/repo/path`` or a pair (release, id).

    ``control.gguf@12`` are the vectors of a file at one of its sites, see `saeguard.loaders.vectors`.
    ``base+domain`` is the SAE ``base`` with the boost in its folder ``boosts/domain`` behind it.

    ``load_sae("smollm2-135m-instruct/resid_post.20")``, ``load_sae(("gpt2-small-res-jb", "blocks.8.hook_resid_pre"))``.
    With ``latents`` only these are read, and they keep their numbers; kinds that rank still need their whole encoder.
    The other arguments say what the files do not: ``site`` (and ``site_out`` of a transcoder) also replace what they
    say, ``top_k`` and ``input_scale`` are asked for by name where a family leaves them out.

    Raises `UnsupportedFormat` when nothing is there or no family, or more than one, recognises it, `BrokenFile` and
    `UnsafePickle` when the content cannot be trusted, `MissingSite` and `MissingScale` when files do not say enough,
    `ModelUnavailable` when the hub does not give what an address or a release names, `BoostMismatch` when a boost was
    trained on another base.
    """
    found = parts(source)
    if found is None:
        stored = open_sae(source, site, site_out=site_out, model=model, top_k=top_k, input_scale=input_scale)
        return stored.sae(latents)
    base = load_sae(found[0], site, site_out=site_out, model=model, top_k=top_k, input_scale=input_scale)
    boosted = Boosted(base, [load_sae(boost) for boost in found[1]], name=str(source))
    return boosted if latents is None else boosted.narrow(list(latents))
