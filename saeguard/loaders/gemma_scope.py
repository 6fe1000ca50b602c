"""Gemma Scope 1: an archive without a config, whose path is all that says which model and site it is for.

    gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82/params.npz
        W_enc (d_in, d_sae)  b_enc  W_dec (d_sae, d_out)  b_dec  threshold  [scaling_factor (d_sae)]     or w_enc, w_dec

    f = relu(p) where p > threshold, p = x @ W_enc + b_enc           x_hat = (f * scaling_factor) @ W_dec + b_dec

    res -> resid_post      mlp -> mlp_out, after the post-norm       att -> attn_z
    embedding, in res -> resid_pre.0                                 transcoders -> mlp_normed to mlp_out

Gemma multiplies its embeddings e by sqrt(d), and their SAE was trained on e. In x = sqrt(d) * e it is W_enc / sqrt(d),
W_dec * sqrt(d) and b_dec * sqrt(d); its activations stay as they are.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from saeguard.errors import MissingSite
from saeguard.loaders.source import Hints, Source, broken
from saeguard.loaders.stored import Fold, Piece, Stored, check_specs, matrix
from saeguard.sites import Site

ARCHIVE = "params.npz"
_AXES = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "b_dec": None, "threshold": 0, "scaling_factor": 0}
_OPTIONAL = {"scaling_factor"}
_ALIASES = {"w_enc": "W_enc", "w_dec": "W_dec"}
_STREAMS = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}
# Whole folder names only; the hub's cache puts models--google-- in front of a repository's.
_REPOSITORY = re.compile(
    r"(?<![^/])(?:models--google--)?(gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)(?:-canonical)?)(?![^/])"
)
_PLACE = re.compile(r"(?<![^/])((?:layer_(\d{1,3})|embedding)/width_\w+/(?:average_l0_(\d{1,9})|canonical))$")


@dataclass(frozen=True)
class _Origin:
    """What a path says; ``missing`` is which part of it does not."""

    name: str
    model: str | None = None
    site: Site | None = None
    site_out: Site | None = None
    is_transcoder: bool = False
    is_embedding: bool = False
    missing: str = ""
    found: dict[str, Any] = field(default_factory=dict)


def recognises(source: Source) -> bool:
    """Whether it is ``params.npz``, any .npz file that was given, or a folder with one, and it has an encoder."""
    name = source.main or ARCHIVE
    return name.endswith(".npz") and bool(source.keys(name) & {"W_enc", "w_enc"})


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`; `MissingSite` for a transcoder outside of its folders."""
    archive = source.archive(source.main or ARCHIVE)
    names = {_ALIASES.get(name, name): name for name in archive.specs}
    if len(names) != len(archive.specs) or not set(_AXES) - _OPTIONAL <= set(names) <= set(_AXES):
        raise broken(archive.path, f"tensors {sorted(archive.specs)}, not {sorted(set(_AXES) - _OPTIONAL)}")
    (d_in, d_sae), (_, d_out) = matrix(archive, names["W_enc"]), matrix(archive, names["W_dec"])
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    check_specs(archive, {name: shapes.get(key, (d_sae,)) for key, name in names.items()})
    origin = _origin(archive.path)
    site, site_out = _sites(origin, hints, d_in != d_out)
    folds = [f"scale of embeddings: {d_in} ** 0.5"] if origin.is_embedding else []
    folds += ["scaling_factor"] if "scaling_factor" in names else []
    manifest = {"format": "gemma_scope", "architecture": "jumprelu", "folds": folds} | origin.found
    manifest["bos"] = hints.overrides.get("prepend_bos", True)
    if site is None:
        manifest["site_unknown"] = f"the path has no {origin.missing} in it"
    return Stored(
        family="gemma_scope", name=origin.name, d_in=d_in, d_sae=d_sae, d_out=d_out, activation="jumprelu",
        pieces={key: Piece(archive, name, _AXES[key]) for key, name in sorted(names.items())},
        fold=_fold(d_in**0.5 if origin.is_embedding else 1.0), site=site, site_out=site_out,
        model=hints.model or origin.model, manifest=manifest,
    )  # fmt: skip


def _origin(path: Path) -> _Origin:
    where = Path(os.path.abspath(path.parent)).as_posix()  # not resolve(): the hub's cache keeps files behind links
    place, repository = _PLACE.search(where), next(reversed(list(_REPOSITORY.finditer(where))), None)
    name = "/".join(match[1] for match in (repository, place) if match) or Path(where).name
    found = {"l0": int(place[3])} if place and place[3] else {}
    is_embedding = bool(place and place[2] is None)
    if repository is None:
        site = Site("resid_pre", 0) if is_embedding else None
        missing = "folder gemma-scope-...-res, -mlp, -att or -transcoders"
        return _Origin(name, site=site, is_embedding=is_embedding, missing=missing, found=found)
    model = f"google/gemma-2-{repository[2]}{'-it' if repository[3] == 'it' else ''}"
    is_transcoder = repository[4] == "transcoders"
    if place is None or is_transcoder and is_embedding:
        return _Origin(name, model, is_transcoder=is_transcoder, missing="folder layer_.../width_.../average_l0_...")
    if is_embedding:
        return _Origin(name, model, Site("resid_pre", 0), is_embedding=True, found=found)
    layer = int(place[2])
    if is_transcoder:
        return _Origin(name, model, Site("mlp_normed", layer), Site("mlp_out", layer), True, found=found)
    return _Origin(name, model, Site(_STREAMS[repository[4]], layer), found=found)


def _sites(origin: _Origin, hints: Hints, changes_width: bool) -> tuple[Site | None, Site | None]:
    site, site_out = hints.site or origin.site, hints.site_out or origin.site_out
    is_transcoder = origin.is_transcoder or changes_width or site_out is not None
    if is_transcoder and (site is None or site_out is None):
        raise MissingSite(
            f"Gemma Scope transcoder {origin.name}",
            f"the path has no {origin.missing or 'folder gemma-scope-...-transcoders'} in it, so nothing says what it "
            "reads and what it writes",
            "Say site=... and site_out=..., such as mlp_normed.12 and mlp_out.12.",
        )
    return site, site_out


def _fold(scale: float) -> Fold:
    def fold(raw: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = dict(raw)
        tensors["threshold"] = raw["threshold"].float().clamp_min(0.0)  # relu(p) where p > threshold
        if scale != 1.0:
            tensors["W_enc"] = raw["W_enc"].float() / scale
            tensors["W_dec"], tensors["b_dec"] = raw["W_dec"].float() * scale, raw["b_dec"].float() * scale
        factor = tensors.pop("scaling_factor", None)
        if factor is not None:
            tensors["W_dec"] = tensors["W_dec"].float() * factor.float()[:, None]
        return tensors

    return fold
