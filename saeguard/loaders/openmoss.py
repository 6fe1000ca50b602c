"""What OpenMOSS's three formats share: where the weights lie, configs checked value by value, hook points as sites.

    sae_weights.safetensors | .pt {"sae": tensors} | .dcp/        or checkpoints/pruned.*, then checkpoints/final.*

An SAE whose two hook points differ is a transcoder. Keys that a config leaves out have the values of its class.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from saeguard.errors import MissingSite, SiteNotFound, UnsupportedFormat
from saeguard.loaders import fields
from saeguard.loaders.source import Hints, Source
from saeguard.sites import Site

_PLACES = ("sae_weights", "checkpoints/pruned", "checkpoints/final")
WEIGHTS = tuple(f"{place}.{ending}" for place in _PLACES for ending in ("safetensors", "pt", "dcp"))
_READ: dict[str, Callable[[Path, Mapping[str, Any], str], Any]] = {
    "sae_type": fields.text, "act_fn": fields.text, "norm_activation": fields.text, "hook_point_in": fields.text,
    "hook_point_out": fields.text, "top_k": fields.whole, "jump_relu_threshold": fields.number,
    "dataset_average_activation_norm": fields.table, "use_decoder_bias": fields.flag, "use_glu_encoder": fields.flag,
    "apply_decoder_bias_to_pre_encoder": fields.flag, "sparsity_include_decoder_norm": fields.flag,
}  # fmt: skip


def weights(source: Source) -> str | None:
    """The first of the files that may hold the weights, or None; a ``.dcp`` is a folder."""
    if source.main:
        return source.main if source.main in WEIGHTS and source.has(source.main) else None
    return next((name for name in WEIGHTS if source.file(name).exists()), None)


def prefix(name: str) -> str:
    """What stands before the names of the tensors in a file of that name."""
    return "sae." if name.endswith(".pt") else ""


def settings(path: Path, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its defaults, null being no value. Raises `BrokenFile` for values of a wrong type."""
    found = dict(defaults) | {key: value for key, value in config.items() if value is not None}
    for key, read in _READ.items():
        read(path, found, key)
    return found


def plausible(norm: Any) -> bool:
    """Whether it can be the average norm of a stream; one that was never measured is whatever memory held."""
    return type(norm) in (int, float) and 1e-3 < norm < 1e5


def refuse(name: str, found: str, proceed: str) -> UnsupportedFormat:
    """The error for an SAE that is sound and cannot be represented."""
    return UnsupportedFormat(f"SAE folder {name}", found, proceed)


def sites(
    name: str, config: Mapping[str, Any], hints: Hints, guess: tuple[Site, Site | None] | None
) -> tuple[Site | None, Site | None, dict[str, Any]]:
    """Where it reads, where it writes if it is a transcoder, and what its manifest says of that.

    ``guess`` is what the folder's name says, for a config without hook points. Raises `MissingSite` for a transcoder
    one of whose sites is not known.
    """
    hook_in = config.get("hook_point_in")
    hook_out = config.get("hook_point_out", hook_in)
    if hook_in is None and hook_out is None:
        site, site_out = guess or (None, None)
        transcodes, why = site_out is not None, "neither its config nor its folder's name says it"
    else:
        transcodes = hook_in != hook_out
        (site, why), (site_out, why_out) = _parse(hook_in), _parse(hook_out)
        site_out, why = (site_out, why or why_out) if transcodes else (None, why)
    site, site_out = hints.site or site, hints.site_out or site_out
    if (transcodes or site_out) and not (site and site_out):
        raise MissingSite(
            f"transcoder {name}, which reads {hook_in!r} and writes {hook_out!r}", why or "one of the two is not known",
            "Give site=... and site_out=....",
        )  # fmt: skip
    manifest = {"hook_point_in": hook_in, "hook_point_out": hook_out} if hook_in else {}
    return site, site_out, manifest if site else manifest | {"site_unknown": why}


def _parse(hook: str | None) -> tuple[Site | None, str]:
    if hook is None:
        return None, "its config names only one hook point"
    try:
        return Site.parse(hook), ""
    except SiteNotFound as error:
        return None, f"{error.asked}: {error.found}"


def scale_note(s_in: float) -> dict[str, float]:
    """What a manifest says of the factor that x was multiplied with in training."""
    return {} if s_in == 1.0 else {"input_scale": s_in}
