"""Qwen-Scope: TopK without a ReLU, one file per layer, with names of one orientation and tensors of the other.

    SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/config.json      {"model_type": "topk_sae", "base_model", "k", "hook_point", ...}
    SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer3.sae.pt    W_enc (d_sae, d_in)  b_enc  W_dec (d_in, d_sae)  b_dec

    f = the k largest of x @ W_enc.T + b_enc, signs kept      x_hat = f @ W_dec.T + b_dec      resid_post of the layer

That is what the model card says. SAELens applies a ReLU after it: they differ where fewer than k are positive.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from saeguard.errors import UnsupportedFormat
from saeguard.loaders import fields
from saeguard.loaders.source import Hints, Source, broken
from saeguard.loaders.stored import Piece, Stored, check_specs, matrix
from saeguard.sites import STREAMS, Site

CONFIG = "config.json"
_FILES = r"layer(\d{1,4})\.sae\.pt"
_REPOSITORY = re.compile(r"(?:models--Qwen--)?(SAE-Res-(.+)-W(\d+)K-L0_(\d{1,6}))")
_GATE = "the k largest as they are, as its model card says; SAELens sets those below 0 to 0"


def recognises(source: Source) -> bool:
    """Whether there are files named layer<n>.sae.pt."""
    return bool(source.matching(_FILES))


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`; of a folder with several layers, ``site`` says which."""
    file = source.one(_FILES, hints.site.layer if hints.site else None)
    layer = int((re.fullmatch(_FILES, file) or [0, 0])[1])
    path, config = source.file(CONFIG), source.json(CONFIG) if source.has(CONFIG) else {}
    _check_type(path, config)
    repository = _repository(source.folder)
    archive = source.archive(file)
    d_sae, d_in = matrix(archive, "W_enc")
    check_specs(archive, {"W_enc": (d_sae, d_in), "b_enc": (d_sae,), "W_dec": (d_in, d_sae), "b_dec": (d_in,)})
    if unknown := set(archive.specs) - {"W_enc", "b_enc", "W_dec", "b_dec"}:
        raise broken(archive.path, f"it holds {short(', '.join(sorted(unknown)))}, which Qwen-Scope's SAEs do not have")
    fields.widths(path, config, d_model=d_in, d_sae=d_sae)
    said = fields.whole(path, config, "k", 1, d_sae)
    k = said or (int(repository[4]) if repository else hints.top_k)
    if k is None:
        raise UnsupportedFormat(
            f"SAE file {file}", "no config.json beside it says how many latents are active", "Give top_k=...."
        )
    site, why = _site(fields.text(path, config, "hook_point") or "resid_post", layer)
    base = fields.text(path, config, "base_model")
    name = f"{repository[1]}/{file.removesuffix('.sae.pt')}" if repository else file.removesuffix(".sae.pt")
    return Stored(
        family="qwen_scope", name=name, d_in=d_in, d_sae=d_sae, d_out=d_in, activation="topk_norelu", top_k=k,
        pieces={
            "W_enc": Piece(archive, "W_enc", axis=0, turned=True), "b_enc": Piece(archive, "b_enc", axis=0),
            "W_dec": Piece(archive, "W_dec", axis=1, turned=True), "b_dec": Piece(archive, "b_dec"),
        },
        site=hints.site or site, site_out=hints.site_out,
        model=hints.model or base or (f"Qwen/{repository[2]}" if repository else None),
        manifest={"format": "qwen_scope", "architecture": "topk", "bos": hints.overrides.get("prepend_bos", False),
                  "folds": [], "gate": _GATE} | ({"site_unknown": why} if why and not hints.site else {}),
    )  # fmt: skip


def _check_type(path: Path, config: Mapping[str, Any]) -> None:
    kind = fields.text(path, config, "model_type")
    if kind not in (None, "topk_sae"):
        raise UnsupportedFormat(
            f"SAE folder {path.parent.name}", f"its model_type is {kind!r}", "Only topk_sae is known."
        )


def _repository(folder: Path) -> re.Match[str] | None:
    """The repository's name in the path; the hub's cache puts models--Qwen-- in front of it."""
    return next((found for part in reversed(folder.absolute().parts) if (found := _REPOSITORY.fullmatch(part))), None)


def _site(stream: str, layer: int) -> tuple[Site | None, str]:
    if stream in STREAMS:
        return Site(stream, layer), ""
    return None, f"config.json names the hook point {short(stream)}, which is not a stream"
