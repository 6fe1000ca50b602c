"""Steering vectors: SAEs whose latents nothing activates, so that a rule adds a vector that no SAE has.

    control.gguf         direction.1 (d)  direction.2 (d) ...      repeng, llama.cpp, EasySteer
    happy.safetensors    resid_post.12 (d) or (n, d) ...           saeguard; other spellings of a site are read too
    weight.pt            one tensor (d) or (n, d), of no site      AxBench, pyvene: the caller says the site

    W_enc = 0   b_enc = 0   W_dec = the vectors   b_dec = 0          x' = x + amount * W_dec[n]

Blocks are counted from 0, and ``direction.N`` is added to what leaves block N: resid_post.N. So does llama.cpp, which
has no direction.0 (the loader of common.cpp puts direction.N at (N - 1) d, llama-adapter.cpp takes block il's from
(il - 1) d, and build_cvec adds it where block il ends), and repeng, which trains direction N on hidden_states[N + 1].
A file of several sites is one SAE for each: ``control.gguf@12``, or site=.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from saeguard.archives import Archive, is_archive
from saeguard.errors import SiteNotFound, UnsupportedFormat
from saeguard.loaders.source import Hints, Source, broken
from saeguard.loaders.stored import FLOATS, Piece, Stored
from saeguard.sites import Site

ARCHITECTURES = ("controlvector", "steervector")
"""What ``general.architecture`` of a GGUF file of vectors is; the second is EasySteer's."""
SITELESS = {"", "weight", "proj.weight", "source_representation", "vector", "steering_vector", "vectors"}
"""Names of the only tensor of a file that does not say where it belongs; a bare tensor has none."""
_DESCRIPTIONS = r".+\.(?:json|ya?ml)"
_FILES = r".+\.(?:gguf|safetensors|pth|pt|bin)"
_DIRECTION = re.compile(r"direction\.(0|[1-9]\d{0,3})")


@dataclass(frozen=True, eq=False)
class _Rows(Piece):
    """A vector, or a matrix of one per row: always a matrix, whatever it is in the file."""

    def read(self, latents: Any) -> Tensor:
        """The vectors, or some of them."""
        whole = len(self.archive.specs[self.name].shape) == 1
        found = super().read(None if whole else latents)
        found = found[None] if whole else found
        return found[list(latents)] if whole and latents is not None else found


def recognises(source: Source) -> bool:
    """Whether the one file of tensors holds floats by site and nothing else, or one of no site."""
    if (file := _file(source)) is None:
        return False
    archive = source.archive(file)
    if "general.architecture" in archive.values:
        return True
    is_siteless = len(archive.specs) == 1 and set(archive.specs) <= SITELESS
    return is_siteless or bool(archive.specs) and None not in _sites(archive)


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`, where the file has several sites and none of them was named."""
    file = _file(source)
    assert file is not None
    archive = source.archive(file)
    named = sites(source)
    name, site = _choose(archive, named, hints.site) if named else (next(iter(archive.specs)), hints.site)
    shape = archive.specs[name].shape
    if archive.specs[name].dtype not in FLOATS or len(shape) not in (1, 2) or 0 in shape:
        raise broken(archive.path, f"{short(name)} is {archive.specs[name]}, not one vector or a matrix of them")
    n, d = (1, shape[0]) if len(shape) == 1 else shape
    hint = archive.values.get("controlvector.model_hint")
    return Stored(
        family="vectors", name=f"{file}@{spelled(site)}" if site else file, d_in=d, d_sae=n, d_out=d,
        activation="relu", pieces={"W_dec": _Rows(archive, name, 0)}, fold=_fold, site=site, model=hints.model,
        manifest={"format": "vectors", "architecture": "vectors", "vectors": True, "bos": None, "folds": []}
        | ({"model_hint": hint} if isinstance(hint, str) else {})
        | ({} if site else {"site_unknown": "the file holds a tensor and no site"}),
    )  # fmt: skip


def sites(source: Source) -> dict[Site, str]:
    """The sites of a file of vectors, each with its tensor; empty where the file names none.

    Raises `UnsupportedFormat` for a GGUF file of another kind.
    """
    file = _file(source)
    if file is None:
        raise UnsupportedFormat(f"vectors {str(source.path)!r}", "no file of tensors is there", "Name the file.")
    archive = source.archive(file)
    kind = archive.values.get("general.architecture")
    if kind is not None and kind not in ARCHITECTURES:
        raise UnsupportedFormat(
            f"vectors {archive.path.name}", f"its general.architecture is {short(kind)}",
            f"Read are GGUF files of {' and '.join(ARCHITECTURES)}.",
        )  # fmt: skip
    found: dict[Site, str] = {}
    for site, name in zip(_sites(archive), archive.specs, strict=True):
        if site is None and (kind is not None or len(archive.specs) > 1):
            raise broken(archive.path, f"{short(name)} names no site")
        if site is not None and found.setdefault(site, name) != name:
            raise broken(archive.path, f"{found[site]} and {name} are both of {site}")
    if kind is not None and not found:
        raise broken(archive.path, "it holds no direction")
    return dict(sorted(found.items(), key=lambda item: (item[0].layer, item[0].stream)))


def at_site(text: str) -> tuple[str, Site] | None:
    """The file and the site that ``control.gguf@12`` or ``x.safetensors@attn_out.3`` names, where that is no file."""
    path, at, where = text.rpartition("@")
    if not at or Path(text).exists() or not Path(path).is_file():
        return None
    try:
        return path, Site("resid_post", int(where)) if re.fullmatch(r"\d{1,4}", where) else Site.parse(where)
    except SiteNotFound:
        return None


def _file(source: Source) -> str | None:
    """The one file of tensors; none where a description lies beside it, which makes it an SAE of some kind."""
    names = [] if source.matching(_DESCRIPTIONS) else source.matching(_FILES)
    return names[0] if len(names) == 1 and is_archive(source.file(names[0])) else None


def _sites(archive: Archive) -> list[Site | None]:
    return [_site(name) for name in archive.specs]


def _site(name: str) -> Site | None:
    if match := _DIRECTION.fullmatch(name):
        return Site("resid_post", int(match[1]))
    try:
        return Site.parse(name)
    except SiteNotFound:
        return None


def _choose(archive: Archive, named: dict[Site, str], wanted: Site | None) -> tuple[str, Site]:
    """The tensor for the site that was asked for, or the only one."""
    if wanted is None and len(named) == 1:
        site = next(iter(named))
        return named[site], site
    if wanted not in named:
        shown = ", ".join(map(spelled, named))
        raise UnsupportedFormat(
            f"vectors {archive.path.name}" + (f" at {wanted}" if wanted else ""), f"it has vectors at {shown}",
            f"Name one of them: {archive.path.name}@{spelled(next(iter(named)))}, or site=...; a rule can put it "
            "elsewhere.",
        )  # fmt: skip
    return named[wanted], wanted


def spelled(site: Site) -> str:
    """How a site is written behind the @: what leaves a block is a bare number."""
    return str(site.layer) if site.stream == "resid_post" else str(site)


def _fold(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    n, d = raw["W_dec"].shape
    return {"W_enc": torch.zeros(d, n), "b_enc": torch.zeros(n), "W_dec": raw["W_dec"], "b_dec": torch.zeros(d)}
