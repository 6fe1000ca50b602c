"""The BatchTopK SAEs of jkminder's fork of dictionary_learning, which carry the statistics of their input with them.

    config.json           {"activation_dim", "dict_size", "k", ...}
    model.safetensors     encoder.weight (d_sae, d_in)  encoder.bias  decoder.weight (d_in, d_sae)  b_dec  k  threshold
                          activation_mean (d_in)  activation_std (d_in)  activation_global_scale  target_rms

    xn = (x - mean) * s        f = relu((xn - b_dec) W + b), where it is above the threshold
    x_hat = (f W_dec + b_dec) / (s + 1e-8) + mean

so that   W_enc = s W    b_enc = b - (b_dec + s mean) W    W_dec / (s + 1e-8)    b_dec / (s + 1e-8) + mean
A mean or std of NaN stands for no normalisation. Activations are those of the normalised input.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from saeguard.errors import UnsupportedFormat
from saeguard.loaders import fields
from saeguard.loaders.source import Hints, Source, broken
from saeguard.loaders.stored import Piece, Stored, check_specs, matrix

CONFIG = "config.json"
_FILES = r".+\.(?:pth|pt|safetensors)"
_STATISTICS = {"activation_mean", "activation_std", "activation_global_scale", "target_rms"}
_NAMES = {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold"} | _STATISTICS
_EPS = 1e-8


def recognises(source: Source) -> bool:
    """Whether the file, or the folder's only file of tensors, has an encoder and statistics of activations."""
    names = source.matching(_FILES)
    if len(names) != 1 or not _STATISTICS | {"encoder.weight", "decoder.weight"} <= source.keys(names[0]):
        return False
    return len(source.archive(names[0]).specs["encoder.weight"].shape) == 2  # a crosscoder's has 3 axes


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`."""
    archive = source.archive(source.one(_FILES))
    if set(archive.specs) != _NAMES:
        raise UnsupportedFormat(
            f"dictionary {archive.path.name} of jkminder's fork",
            f"its tensors are {sorted(archive.specs)}, and only those of its BatchTopKSAE are known",
            "Use a BatchTopKSAE.",
        )
    d_sae, d_in = matrix(archive, "encoder.weight")
    check_specs(archive, {
        "encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "decoder.weight": (d_in, d_sae), "b_dec": (d_in,),
        "threshold": (), "activation_mean": (d_in,), "activation_std": (d_in,), "activation_global_scale": (),
    })  # fmt: skip
    config, path = (source.json(CONFIG), source.file(CONFIG)) if source.has(CONFIG) else ({}, archive.path)
    fields.widths(path, config, activation_dim=d_in, dict_size=d_sae)
    threshold, scale = (float(archive.read(name)) for name in ("threshold", "activation_global_scale"))
    statistics = [archive.read(name) for name in ("activation_mean", "activation_std")]
    normalised = not any(bool(torch.isnan(tensor).any()) for tensor in statistics)
    if not math.isfinite(threshold) or normalised and not (math.isfinite(scale) and scale > 0):
        raise broken(archive.path, f"threshold is {threshold}, activation_global_scale {scale}")
    pieces = {
        "W_enc": Piece(archive, "encoder.weight", 0, turned=True), "b_enc": Piece(archive, "encoder.bias", 0),
        "W_dec": Piece(archive, "decoder.weight", 1, turned=True), "b_dec": Piece(archive, "b_dec"),
    }  # fmt: skip
    if threshold >= 0:
        pieces["threshold"] = Piece(archive, "threshold")
    if normalised:
        pieces |= {"mean": Piece(archive, "activation_mean"), "scale": Piece(archive, "activation_global_scale")}
    return Stored(
        family="jkminder", name=_name(source.folder.absolute()), pieces=pieces,
        d_in=d_in, d_sae=d_sae, d_out=d_in, activation="jumprelu" if threshold >= 0 else "relu", fold=_fold,
        site=hints.site, model=hints.model,
        manifest={
            "format": "dictionary_learning (jkminder)", "architecture": "BatchTopKSAE",
            "bos": hints.overrides.get("prepend_bos"), "folds": ["b_dec subtracted", *["statistics"] * normalised],
            "threshold": threshold if threshold >= 0 else f"never set ({threshold:g}), so it is a plain ReLU",
        } | ({} if hints.site else {"site_unknown": "its files name no site"}),
    )  # fmt: skip


def _name(folder: Path) -> str:
    """The folder's name, or its repository's in the hub's cache."""
    cached = (part for part in reversed(folder.parts) if part.startswith("models--"))
    return next(cached, folder.name).rpartition("--")[2]


def _fold(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    t = {name: raw[name].float() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    t["b_enc"] = t["b_enc"] - t["b_dec"] @ t["W_enc"]
    if "mean" in raw:
        mean, scale = raw["mean"].float(), raw["scale"].float()
        t["W_enc"] = t["W_enc"] * scale
        t["b_enc"] = t["b_enc"] - mean @ t["W_enc"]
        t["W_dec"], t["b_dec"] = t["W_dec"] / (scale + _EPS), t["b_dec"] / (scale + _EPS) + mean
    if "threshold" in raw:
        t["threshold"] = raw["threshold"].float().expand(t["b_enc"].shape[0]).clone()
    return t
