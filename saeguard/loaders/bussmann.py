"""Bart Bussmann's SAEs, of the code that BatchTopK was published with.

    config.json     {"sae_type", "input_unit_norm", "top_k", "hook_point", "model_name", "act_size", "dict_size", ...}
    sae.pt          W_enc (d_in, d_sae)  b_enc  W_dec (d_sae, d_in)  b_dec  [jumprelu.log_threshold (d_sae)]

    vanilla     relu((x - b_dec) W + b_enc)
    jumprelu    p = relu(x W + b_enc), where p > exp(log_threshold)
    topk        the k largest of relu((x - b_dec) W)                    b_enc is there and not used
    batchtopk   refused: it ranks all latents of a batch and stores no threshold to do without

    input_unit_norm     x becomes (x - mean) / (std + 1e-5) first, and x_hat goes back

Trained on models as TransformerLens loads them by default, see `transformer_lens`; behind the norm that makes no
difference to a stream.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from saeguard.activations import Activation
from saeguard.errors import UnsupportedFormat
from saeguard.loaders import fields, transformer_lens
from saeguard.loaders.source import Hints, Source, broken
from saeguard.loaders.stored import Fold, Piece, Stored, check_specs, matrix

FILE, CONFIG = "sae.pt", "config.json"
_KEYS = {"W_enc", "b_enc", "W_dec", "b_dec"}
_LOG = "jumprelu.log_threshold"


def recognises(source: Source) -> bool:
    """Whether sae.pt has these tensors, and the config beside it a type and says whether the input is normalised."""
    if source.main not in (None, FILE) or not source.has(FILE, CONFIG):
        return False
    return source.keys(FILE) >= _KEYS and {"sae_type", "dict_size"} <= source.json(CONFIG).keys()


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`."""
    archive, config, path = source.archive(FILE), source.json(CONFIG), source.file(CONFIG)
    kind = fields.text(path, config, "sae_type")
    d_in, d_sae = matrix(archive, "W_enc")
    activation, fold, note = _kind(source.folder.name, kind)
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in),
                                          "b_dec": (d_in,)}  # fmt: skip
    if activation == "jumprelu":
        shapes[_LOG] = (d_sae,)
    check_specs(archive, shapes)
    if set(shapes) != set(archive.specs):
        raise broken(archive.path, f"its tensors are {sorted(archive.specs)}, and of {kind} {sorted(shapes)}")
    fields.widths(path, config, act_size=d_in, dict_size=d_sae)
    named, unknown = transformer_lens.site_of(fields.text(path, config, "hook_point"), "its config names no hook_point")
    site, is_normed = hints.site or named, fields.flag(path, config, "input_unit_norm")
    if is_normed and (site is None or site.stream == "attn_z"):
        raise UnsupportedFormat(
            f"SAE {source.folder.name} with input_unit_norm at {site or 'an unknown site'}",
            "TransformerLens took the values' bias off attn_z, and it would have to go before the norm of each token",
            "Say site=... if it was trained at another stream.",
        )
    return Stored(
        family="bussmann", name=source.folder.name, d_in=d_in, d_sae=d_sae, d_out=d_in, activation=activation,
        pieces={"W_enc": Piece(archive, "W_enc", 1), "b_enc": Piece(archive, "b_enc", 0),
                "W_dec": Piece(archive, "W_dec", 0), "b_dec": Piece(archive, "b_dec")}
        | ({"threshold": Piece(archive, _LOG, 0)} if activation == "jumprelu" else {}),
        fold=fold, top_k=_top_k(path, config) if activation == "topk" else None,
        norm="layer_norm" if is_normed else transformer_lens.norm(site, hints, processed=True), eps=1e-5,
        site=site, model=hints.model or transformer_lens.hub_name(fields.text(path, config, "model_name")),
        manifest={
            "format": "bussmann", "architecture": kind, "bos": hints.overrides.get("prepend_bos", True),
            "folds": [note], "context": fields.whole(path, config, "seq_len"),
            "dataset": fields.text(path, config, "dataset_path"),
        } | ({} if site else unknown) | transformer_lens.processing(site, centers=not is_normed),
    )  # fmt: skip


def _kind(name: str, kind: str | None) -> tuple[Activation, Fold, str]:
    kinds: dict[str, tuple[Activation, Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
        "vanilla": ("relu", _vanilla, "b_dec subtracted"),
        "topk": ("topk", _topk, "b_dec subtracted, b_enc ignored"),
        "jumprelu": ("jumprelu", _jumprelu, "exp of log_threshold"),
    }
    if kind == "batchtopk":
        raise UnsupportedFormat(
            f"SAE folder {name} of sae_type batchtopk",
            "it keeps the largest activations of a whole batch and stores no threshold, so that a latent depends on "
            "the other tokens",
            "Use one of another type.",
        )
    if kind is None or kind not in kinds:
        raise UnsupportedFormat(
            f"SAE folder {name} of sae_type {kind!r}", "this version does not know what it computes",
            f"It reads {', '.join(kinds)}.",
        )  # fmt: skip
    return kinds[kind]


def _top_k(path: Path, config: dict[str, Any]) -> int:
    top_k = fields.whole(path, config, "top_k", low=1)
    if top_k is None:
        raise broken(path, "top_k is not there")
    return top_k


def _vanilla(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return raw | {"b_enc": raw["b_enc"].float() - raw["b_dec"].float() @ raw["W_enc"].float()}


def _topk(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return raw | {"b_enc": -(raw["b_dec"].float() @ raw["W_enc"].float())}


def _jumprelu(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return raw | {"threshold": raw["threshold"].float().exp()}
