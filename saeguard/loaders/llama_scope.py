"""Llama Scope, first version: trained on normed activations, published for raw ones and with unit decoder rows.

    Llama3_1-8B-Base-L15R-8x/hyperparams.json               R resid_post  A attn_out  M mlp_out  TC mlp_normed, mlp_out
    Llama3_1-8B-Base-L15R-8x/checkpoints/final.safetensors  encoder.weight (d_sae, d_in)   encoder.bias   bfloat16
                                                            decoder.weight (d_out, d_sae)  decoder.bias

    dataset-wise    s = sqrt(d) / average norm, of input and output   b_enc / s_in   W_dec s_in / s_out   b_dec / s_out
    decoder norm    n = |W_dec| by row, after that                    W_enc n   b_enc n   W_dec / n
    pre-encoder     (x - b_dec) @ W_enc + b_enc, after that           b_enc - b_dec @ W_enc

    f = p where p > jump_relu_threshold, one number, in raw units; TopK with such a number is JumpReLU

SAELens has the same SAEs in the normed units and without the decoder's norms: its f is ours times s_in / n.
"""

import math
import re
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saeguard.activations import Activation
from saeguard.errors import MissingScale, MissingSite
from saeguard.loaders import fields, openmoss
from saeguard.loaders.source import Hints, Source, broken
from saeguard.loaders.stored import Piece, Stored, check_specs, matrix
from saeguard.norms import Norm
from saeguard.sites import Site

CONFIG = "hyperparams.json"
_DEFAULTS = {
    "act_fn": "relu", "jump_relu_threshold": 0.0, "top_k": 50, "norm_activation": "token-wise",
    "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": True, "sparsity_include_decoder_norm": True,
}  # fmt: skip
_NAMED = re.compile(r"Llama3_1.*-L(\d{1,3})(R|A|M|TC)-\d+x")
_STREAMS = {"R": ("resid_post", None), "A": ("attn_out", None), "M": ("mlp_out", None), "TC": ("mlp_normed", "mlp_out")}
_NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}


def recognises(source: Source) -> bool:
    """Whether there is a hyperparams.json with weights where Llama Scope has them."""
    return source.has(CONFIG) and openmoss.weights(source) is not None


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`, `MissingSite`, `MissingScale`."""
    file, path, name = openmoss.weights(source) or "", source.file(CONFIG), source.folder.absolute().name
    config = openmoss.settings(path, source.json(CONFIG), _DEFAULTS)
    activation, threshold = _activation(name, config)
    archive, prefix = source.archive(file), openmoss.prefix(file)
    names = {key: prefix + tensor for key, tensor in _NAMES.items() if key != "b_dec" or config["use_decoder_bias"]}
    if unknown := set(archive.specs) - set(names.values()):
        raise openmoss.refuse(name, f"it holds {', '.join(sorted(unknown)[:5])}", "Llama Scope's SAEs have no such.")
    d_sae, d_in = matrix(archive, names["W_enc"])
    fields.widths(path, config, d_model=d_in, d_sae=d_sae)
    shapes = {"W_enc": (d_sae, d_in), "b_enc": (d_sae,), "W_dec": (d_in, d_sae), "b_dec": (d_in,)}
    check_specs(archive, {tensor: shapes[key] for key, tensor in names.items()})
    site, site_out, where = openmoss.sites(name, config, hints, _guess(name))
    if site_out and config["use_decoder_bias"] and config["apply_decoder_bias_to_pre_encoder"]:
        raise openmoss.refuse(
            name, "it is a transcoder that takes its output's bias off its input (apply_decoder_bias_to_pre_encoder), "
            "which its authors' training and loading scale differently", "Use a transcoder without it.",
        )  # fmt: skip
    norm, s_in, s_out = _scales(source, name, config, hints, d_in, site_out is not None)
    folds = [key for key in ("sparsity_include_decoder_norm", "apply_decoder_bias_to_pre_encoder") if config[key]]
    folds = ["dataset_average_activation_norm"] * (s_in != 1 or s_out != 1) + folds
    axes = {"W_enc": (0, True), "b_enc": (0, False), "W_dec": (1, True), "b_dec": (None, False)}
    return Stored(
        family="llama_scope", name=name, d_in=d_in, d_sae=d_sae, d_out=d_in, activation=activation,
        pieces={key: Piece(archive, tensor, *axes[key]) for key, tensor in names.items()},
        fold=partial(_fold, s_in=s_in, s_out=s_out, threshold=threshold, config=config),
        top_k=config["top_k"] if activation == "topk" else None, norm=norm, site=site, site_out=site_out,
        model=hints.model or ("meta-llama/Llama-3.1-8B" if name.startswith("Llama3_1") else None),
        manifest={"format": "llama_scope", "architecture": activation, "bos": hints.overrides.get("prepend_bos", True),
                  "act_fn": config["act_fn"], "folds": folds, "units": _units(config, norm, s_in),
                  **openmoss.scale_note(s_in), **where},
    )  # fmt: skip


def _activation(name: str, config: dict[str, Any]) -> tuple[Activation, float | None]:
    kind, threshold = config["act_fn"].lower(), float(config["jump_relu_threshold"])
    if config.get("use_glu_encoder"):
        raise openmoss.refuse(name, "its encoder is gated by a second one (use_glu_encoder)", "Use an SAE without it.")
    if kind == "jumprelu" or kind == "topk" and threshold > 0:
        return "jumprelu", threshold
    if kind not in ("relu", "topk"):
        raise openmoss.refuse(name, f"its act_fn is {kind!r}", "Known are relu, jumprelu and topk.")
    return ("topk" if kind == "topk" else "relu"), None


def _guess(name: str) -> tuple[Site, Site | None] | None:
    named = _NAMED.fullmatch(name)
    if named is None:
        return None
    reads, writes = _STREAMS[named[2]]
    return Site(reads, int(named[1])), Site(writes, int(named[1])) if writes else None


def _scales(
    source: Source, name: str, config: dict[str, Any], hints: Hints, d_in: int, transcodes: bool
) -> tuple[Norm, float, float]:
    """The norm that is taken from each token, and what input and output were multiplied with in training."""
    how = config["norm_activation"]
    if how in ("none", "inference"):
        return "none", 1.0, 1.0
    if how == "token-wise" and not transcodes:
        return "const_norm", 1.0, 1.0
    if how == "token-wise":
        raise openmoss.refuse(
            name, "its output is scaled by the norm of each token's true output (token-wise), which is not known when "
            "it runs", "Use a transcoder with norm_activation dataset-wise.",
        )  # fmt: skip
    if how != "dataset-wise":
        why = "which depends on the other tokens" if how == "batch-wise" else "which is not known here"
        raise openmoss.refuse(
            name, f"its norm_activation is {how!r}, {why}", "Use one with dataset-wise or token-wise."
        )
    norms = config.get("dataset_average_activation_norm")
    if norms is None:
        if hints.input_scale is None or transcodes:
            raise MissingScale(
                f"SAE folder {name} with norm_activation dataset-wise", "it has no dataset_average_activation_norm",
                "Give input_scale=..., the square root of the width over the average norm of the stream; a transcoder "
                "needs the norms of both its streams in its config.",
            )  # fmt: skip
        return "none", hints.input_scale, hints.input_scale
    average = {end: norms.get(end) for end in ("in", "out")}
    if not all(openmoss.plausible(norm) for norm in average.values()):
        raise broken(source.file(CONFIG), f"dataset_average_activation_norm is {average}")
    if average["in"] != average["out"] and not transcodes:
        raise MissingSite(
            f"SAE folder {name}", f"average norms {average} are those of two streams, and only one site is known",
            "Give site=... and site_out=....",
        )  # fmt: skip
    return "none", math.sqrt(d_in) / average["in"], math.sqrt(d_in) / average["out"]


def _units(config: dict[str, Any], norm: Norm, s_in: float) -> dict[str, Any]:
    if norm != "none":
        return {"name": "official, of tokens with norm sqrt(d)"}
    return {
        "name": "official, raw",
        "saelens_factor": s_in,
        "saelens_divides_by_decoder_norm": config["sparsity_include_decoder_norm"],
    }


def _fold(
    raw: dict[str, Tensor], *, s_in: float, s_out: float, threshold: float | None, config: dict[str, Any]
) -> dict[str, Tensor]:
    w = {key: tensor.float() for key, tensor in raw.items()}
    w["b_dec"] = w["b_dec"] / s_out if "b_dec" in w else w["W_dec"].new_zeros(w["W_dec"].shape[1])
    w["b_enc"], w["W_dec"] = w["b_enc"] / s_in, w["W_dec"] * (s_in / s_out)
    if config["sparsity_include_decoder_norm"]:
        norms = torch.linalg.vector_norm(w["W_dec"], dim=1)
        w["W_enc"], w["b_enc"], w["W_dec"] = w["W_enc"] * norms, w["b_enc"] * norms, w["W_dec"] / norms[:, None]
    if config["use_decoder_bias"] and config["apply_decoder_bias_to_pre_encoder"]:
        w["b_enc"] = w["b_enc"] - w["b_dec"] @ w["W_enc"]
    return w if threshold is None else w | {"threshold": torch.full_like(w["b_enc"], threshold)}
