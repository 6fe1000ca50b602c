"""Gemma Scope 2, one layer: the config beside the weights, or else the path, says the model and the site.

    gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium/
        params.safetensors    w_enc (d_in, d_sae)  b_enc  threshold  w_dec (d_sae, d_out)  b_dec
                              [affine_skip_connection (d_in, d_out)]
        config.json           architecture model_name l0 type affine_connection hf_hook_point_in hf_hook_point_out

    f = relu(p) where p > threshold, p = x @ w_enc + b_enc
    x_hat = f @ w_dec + b_dec [+ x @ affine_skip_connection]

    folder          hook points, after model.layers.N.                    streams
    resid_post      output                                                resid_post
    mlp_out         post_feedforward_layernorm.output                     mlp_out
    attn_out        self_attn.o_proj.input                                attn_z
    transcoder      pre_ and post_feedforward_layernorm.output            mlp_in to mlp_out

The skip is not transposed. Where config and folder disagree the config holds, and the manifest says so.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saeguard.errors import MissingSite, UnsupportedFormat
from saeguard.loaders.fields import flag, number, text
from saeguard.loaders.source import Hints, Source, broken
from saeguard.loaders.stored import Piece, Stored, check_specs, matrix
from saeguard.sites import Site

WEIGHTS, CONFIG = "params.safetensors", "config.json"
SKIP = "affine_skip_connection"
_PIECES = {"w_enc": ("W_enc", 1), "b_enc": ("b_enc", 0), "threshold": ("threshold", 0), "w_dec": ("W_dec", 0),
           "b_dec": ("b_dec", None), SKIP: ("skip", None)}  # fmt: skip
_MANY = re.compile(r"params_layer_\d+\.safetensors")
_HOOK = re.compile(r"model\.(?:language_model\.)?layers\.(\d{1,4})\.(.+)")
_STREAMS = {
    "output": "resid_post", "post_feedforward_layernorm.output": "mlp_out", "self_attn.o_proj.input": "attn_z",
    "pre_feedforward_layernorm.output": "mlp_in",
}  # fmt: skip
_FOLDERS = {"resid_post": ("resid_post", None), "mlp_out": ("mlp_out", None), "attn_out": ("attn_z", None),
            "transcoder": ("mlp_in", "mlp_out")}  # fmt: skip
# Whole folder names only; the hub's cache puts models--google-- in front of a repository's.
_REPOSITORY = re.compile(r"(?<![^/])(?:models--google--)?(gemma-scope-2-((?:270m|1b|4b|12b|27b)-(?:pt|it)))(?![^/])")
_PLACE = re.compile(r"(?<![^/])((resid_post|mlp_out|attn_out|transcoder)(?:_all)?/layer_(\d{1,3})_width_\w+)$")


@dataclass(frozen=True)
class _Sites:
    """What the config or the path says; ``why`` is what is missing."""

    site: Site | None = None
    site_out: Site | None = None
    is_transcoder: bool = False
    why: str = ""

    def __str__(self) -> str:
        return f"{self.site} to {self.site_out}" if self.site_out else str(self.site)


def recognises(source: Source) -> bool:
    """Whether the file, or ``params.safetensors`` in the folder, has Gemma Scope's tensors, for one layer."""
    name = source.main or WEIGHTS
    if not name.endswith(".safetensors") or _MANY.fullmatch(name) or not set(_PIECES) - {SKIP} <= source.keys(name):
        return False
    return len(source.archive(name).specs["w_dec"].shape) != 3


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`; `MissingSite` for a transcoder of unknown sites."""
    archive = source.archive(source.main or WEIGHTS)
    if unknown := sorted(set(archive.specs) - set(_PIECES)):
        raise broken(archive.path, f"tensors {unknown}, which Gemma Scope 2 does not have")
    (d_in, d_sae), (_, d_out) = matrix(archive, "w_enc"), matrix(archive, "w_dec")
    shapes = {"w_enc": (d_in, d_sae), "w_dec": (d_sae, d_out), "b_dec": (d_out,), SKIP: (d_in, d_out)}
    check_specs(archive, {name: shapes.get(name, (d_sae,)) for name in archive.specs})
    config = source.json(CONFIG) if source.has(CONFIG) else {}
    manifest = _checked(source, config, SKIP in archive.specs)
    where = Path(os.path.abspath(source.folder)).as_posix()  # not resolve(): the hub's cache keeps files behind links
    place, repository = _PLACE.search(where), next(reversed(list(_REPOSITORY.finditer(where))), None)
    name = "/".join(match[1] for match in (repository, place) if match) or Path(where).name
    by_path = _by_path(place)
    found = _by_config(source, config) or by_path
    if place and found.site and (found.site, found.site_out) != (by_path.site, by_path.site_out):
        manifest["path_disagrees"] = f"the folder says {by_path}, {CONFIG} {found}, and that holds"
    is_transcoder = found.is_transcoder or d_in != d_out or SKIP in archive.specs or hints.site_out is not None
    site, site_out = hints.site or found.site, hints.site_out or found.site_out
    if is_transcoder and (site is None or site_out is None):
        raise MissingSite(
            f"Gemma Scope 2 transcoder {name}", found.why or f"nothing says where what it reads from {site} goes",
            "Say site=... and site_out=..., such as mlp_in.12 and mlp_out.12.",
        )  # fmt: skip
    if site is None:
        manifest["site_unknown"] = found.why
    manifest["bos"] = hints.overrides.get("prepend_bos", True)
    said = text(source.file(CONFIG), config, "model_name") or (f"gemma-3-{repository[2]}" if repository else None)
    return Stored(
        family="gemma_scope_2", name=name, d_in=d_in, d_sae=d_sae, d_out=d_out, activation="jumprelu",
        pieces={key: Piece(archive, name, axis) for name, (key, axis) in _PIECES.items() if name in archive.specs},
        fold=_fold, site=site, site_out=site_out, model=hints.model or (_model(said) if said else None),
        manifest=manifest,
    )  # fmt: skip


def _checked(source: Source, config: Mapping[str, Any], has_skip: bool) -> dict[str, Any]:
    """The manifest, once the config is one of an SAE for one layer that agrees with the tensors."""
    manifest = {"format": "gemma_scope_2", "architecture": "jumprelu", "folds": []}
    if not config:
        return manifest
    path = source.file(CONFIG)
    architecture, kind = text(path, config, "architecture"), text(path, config, "type")
    if architecture != "jump_relu":
        raise _refused(source, f"its architecture is {architecture!r}", "Read is jump_relu.")
    if kind in ("crosscoder", "clt"):
        raise _refused(source, f"it is a {kind}, which reads or writes several sites", "Use an SAE of one site.")
    affine = flag(path, config, "affine_connection")
    if affine is not None and affine != has_skip:
        there = "there" if has_skip else "not there"
        raise broken(path, f"affine_connection is {affine} and the tensor {SKIP} is {there}")
    if (l0 := number(path, config, "l0")) is not None:
        manifest["l0"] = l0
    return manifest


def _by_config(source: Source, config: Mapping[str, Any]) -> _Sites | None:
    path = source.file(CONFIG)
    hook, hook_out = text(path, config, "hf_hook_point_in"), text(path, config, "hf_hook_point_out")
    if hook is None:
        return None
    if hook_out is None or hook_out == hook:
        site = _site(source, hook)
        is_transcoder = bool(site and site.stream == "mlp_in") or config.get("type") == "transcoder"
        why = f"hf_hook_point_out is {hook_out!r}" if site else f"hf_hook_point_in {hook!r} is no stream"
        return _Sites(site, None, is_transcoder, f"{CONFIG}: {why}")
    why = f"{CONFIG}: hf_hook_point_in {hook!r} or hf_hook_point_out {hook_out!r} is no stream"
    return _Sites(_site(source, hook), _site(source, hook_out), True, why)


def _by_path(place: re.Match[str] | None) -> _Sites:
    if place is None:
        return _Sites(why="there is no config.json, and the path does not end in resid_post/layer_..._width_..., or so")
    stream, stream_out = _FOLDERS[place[2]]
    return _Sites(
        Site(stream, int(place[3])), Site(stream_out, int(place[3])) if stream_out else None, bool(stream_out)
    )


def _site(source: Source, hook: str) -> Site | None:
    if "{" in hook:
        raise _refused(source, f"it reads or writes the sites {hook!r} at once", "Use an SAE of one site.")
    found = _HOOK.fullmatch(hook)
    return Site(_STREAMS[found[2]], int(found[1])) if found and found[2] in _STREAMS else None


def _model(said: str) -> str:
    """The hub's name: some configs write gemma-v3, and 270m has no -pt there."""
    name = (said if "/" in said else f"google/{said}").replace("-v3", "-3")
    return name.removesuffix("-pt") if "270m" in name else name


def _refused(source: Source, found: str, proceed: str) -> UnsupportedFormat:
    return UnsupportedFormat(f"Gemma Scope 2 SAE {source.folder.name}", found, proceed)


def _fold(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return raw | {"threshold": raw["threshold"].float().clamp_min(0.0)}  # relu(p) where p > threshold
