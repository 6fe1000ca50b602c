"""ReLU SAEs with the equations of Neel Nanda's first ones: his own, and Connor Kissane's of attention heads.

    {name}.pt          W_enc (d_in, d_sae)  b_enc  W_dec (d_sae, d_in)  b_dec
    {name}_cfg.json    {"act_name" or "site" and "layer", "act_size", "dict_size", "model_name", "head", ...}

    f = relu((x - b_dec) @ W_enc + b_enc)        x_hat = f @ W_dec + b_dec

They were trained on models as TransformerLens loads them by default, behind a BOS token; see `transformer_lens` for
what is to be put right. attn_z is all heads side by side; an SAE of one head is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saeguard.errors import UnsupportedFormat
from saeguard.loaders import fields, transformer_lens
from saeguard.loaders.source import Hints, Source
from saeguard.loaders.stored import Piece, Stored, check_specs, matrix

_KEYS = {"W_enc", "b_enc", "W_dec", "b_dec"}
_SITES = {"z": "attn.hook_z", "post": "mlp.hook_post"}  # TransformerLens's short names; others take hook_ in front


def recognises(source: Source) -> bool:
    """Whether there is a file of these four tensors with its config, or several."""
    files = _files(source)
    return bool(files) and source.keys(files[0]) == _KEYS


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`."""
    files = _files(source)
    if len(files) != 1:
        raise UnsupportedFormat(f"SAE folder {source.folder.name}", f"{len(files)} SAEs are in it", "Name the file.")
    archive, config = source.archive(files[0]), source.json(_config(files[0]))
    path = source.file(_config(files[0]))
    d_in, d_sae = matrix(archive, "W_enc")
    check_specs(archive, {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)})
    fields.widths(path, config, act_size=d_in, dict_size=d_sae)
    _check_heads(path, config, files[0])
    named, unknown = transformer_lens.site_of(_hook(path, config), "its config names no hook")
    site = hints.site or named
    centers = hints.overrides.get("center_writing_weights", True)
    return Stored(
        family="nanda", name=files[0].removesuffix(".pt"), d_in=d_in, d_sae=d_sae, d_out=d_in, activation="relu",
        pieces={"W_enc": Piece(archive, "W_enc", 1), "b_enc": Piece(archive, "b_enc", 0),
                "W_dec": Piece(archive, "W_dec", 0), "b_dec": Piece(archive, "b_dec")},
        fold=_fold, norm=transformer_lens.norm(site, hints, processed=True), site=site,
        model=hints.model or transformer_lens.hub_name(fields.text(path, config, "model_name")),
        manifest={
            "format": "nanda", "architecture": "relu", "bos": hints.overrides.get("prepend_bos", True),
            "folds": ["b_dec subtracted"], "context": fields.whole(path, config, "seq_len"),
        } | ({} if site else unknown) | transformer_lens.processing(site, centers=centers),
    )  # fmt: skip


def _files(source: Source) -> list[str]:
    return [name for name in source.matching(r".+\.pt") if source.has(_config(name))]


def _config(file: str) -> str:
    return f"{file.removesuffix('.pt')}_cfg.json"


def _check_heads(path: Path, config: Mapping[str, Any], file: str) -> None:
    if config.get("head") not in (None, "cat") or fields.flag(path, config, "concat_heads") is False:
        raise UnsupportedFormat(
            f"SAE {file} of head {config.get('head')!r}", "it reads one head of a site, not the site",
            "Use one of all heads side by side.",
        )  # fmt: skip


def _hook(path: Path, config: Mapping[str, Any]) -> str | None:
    """The name of its hook; older configs have a short name and a layer."""
    hook, short, layer = fields.text(path, config, "act_name"), fields.text(path, config, "site"), None
    layer = fields.whole(path, config, "layer")
    if hook is not None or short is None or layer is None:
        return hook
    return f"blocks.{layer}.{_SITES.get(short, f'hook_{short}')}"


def _fold(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return raw | {"b_enc": raw["b_enc"].float() - raw["b_dec"].float() @ raw["W_enc"].float()}
