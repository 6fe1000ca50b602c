"""OpenMOSS's lm-saes 2 and llamascopium: the config says what the caller has to do to x, and what the gate sees.

    config.json               sae_type hook_point_in hook_point_out act_fn norm_activation sparsity_include_decoder_norm
    sae_weights.safetensors   W_E (d_in, d_sae)  b_E  W_D (d_sae, d_in)  [b_D]      with jumprelu
                              activation_function.log_jumprelu_threshold (d_sae)    with dataset-wise
                              dataset_average_activation_norm.<hook point>, one number each

    dataset-wise    s = sqrt(d) / average norm, of input and output     W_enc s_in   W_dec / s_out   b_dec / s_out
    token-wise      s = sqrt(d) / |x|, for both                         norm="const_norm"
    inference       s = 1: folded by whoever exported it
    decoder norm    f = p where p * n passes the gate, n = |W_D| by row    threshold / n, or rank_by n

Activations are those of normed inputs, as the authors' own loader gives them. What reads or writes several streams,
or looks at other tokens, is refused by name.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeguard.activations import Activation
from saeguard.archives import Archive
from saeguard.errors import BrokenFile, MissingScale
from saeguard.loaders import fields, openmoss
from saeguard.loaders.source import Hints, Source, broken
from saeguard.loaders.stored import FLOATS, Piece, Stored, check_specs, matrix
from saeguard.norms import Norm
from saeguard.sites import Site

CONFIG = "config.json"
_DEFAULTS = {
    "sae_type": "sae", "act_fn": "relu", "top_k": 50, "norm_activation": "dataset-wise", "use_decoder_bias": True,
    "sparsity_include_decoder_norm": True, "use_glu_encoder": False, "apply_decoder_bias_to_pre_encoder": False,
}  # fmt: skip
_AVERAGE = "dataset_average_activation_norm."
_THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
_TYPES = {
    "crosscoder": "it reads and writes several streams at once",
    "mixcoder": "its latents belong to several kinds of input",
    "clt": "a latent of it writes to all later layers",
    "molt": "what a latent of it writes depends on x, as a linear map",
    "lorsa": "it stands for attention, and its latents look at earlier tokens",
}
_BATCHES = {
    "batchtopk": "which latents are active depends on the other tokens of the batch",
    "batchlayertopk": "which latents are active depends on the other tokens of the batch and on other layers",
    "layertopk": "which latents are active depends on other layers",
}


@dataclass(frozen=True)
class Layout:
    """How one generation of files calls its tensors; ``turned``: as torch's linear layers hold them."""

    family: str
    names: Mapping[str, str]
    turned: bool


_LAYOUT = Layout("lm_saes", {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}, turned=False)


def is_folder(source: Source) -> bool:
    """Whether there is a config with weights beside it, in none of the other families' ways."""
    others = source.has("cfg.json") or source.has("hyperparams.json")
    return source.has(CONFIG) and not others and openmoss.weights(source) is not None


def recognises(source: Source) -> bool:
    """Whether the weights have an encoder W_E, or the config a sae_type, with no linear layers in the file."""
    if not is_folder(source):
        return False
    file = openmoss.weights(source) or ""
    keys = frozenset() if file.endswith(".dcp") else source.keys(file)
    prefix = openmoss.prefix(file)
    return f"{prefix}W_E" in keys or f"{prefix}encoder.weight" not in keys and "sae_type" in source.json(CONFIG)


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`, `MissingSite`, `MissingScale`."""
    return stored(source, hints, _LAYOUT, name=source.folder.absolute().name)


def stored(
    source: Source, hints: Hints, layout: Layout, *, name: str, site: Site | None = None, model: str | None = None,
    bos: bool | None = None,
) -> Stored:  # fmt: skip
    """What is in files of that layout; ``site``, ``model`` and ``bos`` are what is known of them from elsewhere."""
    file, path = openmoss.weights(source) or "", source.file(CONFIG)
    config = openmoss.settings(path, source.json(CONFIG), _DEFAULTS)
    _refuse(name, file, config)
    archive = source.archive(file)
    names = _names(name, archive, openmoss.prefix(file), layout, config)
    d_in, d_sae = _widths(archive, names, layout)
    fields.widths(path, config, d_model=d_in)
    activation = _activation(name, path, config, "threshold" in names)
    site, site_out, where = openmoss.sites(name, config, hints, (site, None) if site else None)
    average = partial(_average, archive, f"{openmoss.prefix(file)}{_AVERAGE}", name, d_in)
    norm, s_in, s_out = _scales(name, config, average, hints.input_scale, site_out is not None)
    folds = [key for key in ("sparsity_include_decoder_norm", "apply_decoder_bias_to_pre_encoder") if config[key]]
    folds = [_AVERAGE.removesuffix(".")] * (s_in != 1 or s_out != 1) + folds
    axes = {"W_enc": 0 if layout.turned else 1, "W_dec": 1 if layout.turned else 0, "b_dec": None}
    pieces = {key: Piece(archive, tensor, axes.get(key, 0), layout.turned and key in ("W_enc", "W_dec"))
              for key, tensor in names.items()}  # fmt: skip
    return Stored(
        family=layout.family, name=name, d_in=d_in, d_sae=d_sae, d_out=d_in, activation=activation, pieces=pieces,
        fold=partial(_fold, s_in=s_in, s_out=s_out, activation=activation, config=config),
        top_k=config["top_k"] if activation == "topk" else None, norm=norm, site=site, site_out=site_out,
        model=hints.model or model,
        manifest={"format": layout.family, "architecture": activation, "bos": hints.overrides.get("prepend_bos", bos),
                  "act_fn": config["act_fn"], "folds": folds, "units": _units(config, s_in),
                  **openmoss.scale_note(s_in), **where},
    )  # fmt: skip


def _refuse(name: str, file: str, config: Mapping[str, Any]) -> None:
    kind = config["sae_type"]
    if kind != "sae":
        why = _TYPES.get(kind, "which this version does not know")
        raise openmoss.refuse(name, f"its sae_type is {kind!r}: {why}", "Use an SAE or transcoder of sae_type 'sae'.")
    if file.endswith(".dcp"):
        raise openmoss.refuse(
            name, f"its weights are {file}/, a distributed checkpoint in pickled parts",
            "Load it with llamascopium and save_pretrained it without a device mesh.",
        )  # fmt: skip
    if config["use_glu_encoder"]:
        raise openmoss.refuse(name, "its encoder is gated by a second one (use_glu_encoder)", "Use an SAE without it.")


def _names(name: str, archive: Archive, prefix: str, layout: Layout, config: Mapping[str, Any]) -> dict[str, str]:
    needed = {key: tensor for key, tensor in layout.names.items() if key != "b_dec" or config["use_decoder_bias"]}
    names = {key: prefix + tensor for key, tensor in needed.items()}
    thresholds = [prefix + tensor for tensor in _THRESHOLDS if prefix + tensor in archive.specs]
    if len(thresholds) > 1:
        raise broken(archive.path, "it holds two thresholds")
    names |= dict(zip(("threshold",), thresholds, strict=False))
    known = {tensor for tensor in archive.specs if tensor.startswith(prefix + _AVERAGE)} | set(names.values())
    if unknown := set(archive.specs) - known:
        raise openmoss.refuse(name, f"it holds {', '.join(sorted(unknown)[:5])}", "SAEs of this format have no such.")
    return names


def _widths(archive: Archive, names: Mapping[str, str], layout: Layout) -> tuple[int, int]:
    turn = -1 if layout.turned else 1
    d_in, d_sae = matrix(archive, names["W_enc"])[::turn]
    shapes = {"W_enc": (d_in, d_sae)[::turn], "b_enc": (d_sae,), "W_dec": (d_sae, d_in)[::turn], "b_dec": (d_in,),
              "threshold": (d_sae,)}  # fmt: skip
    check_specs(archive, {tensor: shapes[key] for key, tensor in names.items()})
    return d_in, d_sae


def _activation(name: str, path: Path, config: Mapping[str, Any], has_threshold: bool) -> Activation:
    kind = config["act_fn"].lower()
    if kind in _BATCHES and not has_threshold:
        raise openmoss.refuse(
            name, f"its act_fn is {kind!r}, {_BATCHES[kind]}, and it stores no threshold",
            "Convert it to jumprelu with its authors' tools.",
        )  # fmt: skip
    if kind not in ("relu", "topk", "jumprelu", *_BATCHES):
        raise openmoss.refuse(name, f"its act_fn is {kind!r}", "Known are relu, jumprelu and topk.")
    if has_threshold == (kind in ("relu", "topk")):
        raise broken(path, f"act_fn is {kind!r} and the weights hold {'a' if has_threshold else 'no'} threshold")
    return "relu" if kind == "relu" else "topk" if kind == "topk" else "jumprelu"


def _scales(
    name: str, config: Mapping[str, Any], average: Callable[[str | None, float | None], float],
    input_scale: float | None, transcodes: bool,
) -> tuple[Norm, float, float]:  # fmt: skip
    """The norm that is taken from each token, and what input and output were multiplied with in training."""
    how = config["norm_activation"]
    if how == "inference":
        return "none", 1.0, 1.0
    if how == "token-wise" and not transcodes:
        return "const_norm", 1.0, 1.0
    if how == "dataset-wise":
        hook_in = config.get("hook_point_in")
        hook_out = config.get("hook_point_out", hook_in)
        s_in = average(hook_in, input_scale)
        if not transcodes or hook_out == hook_in and hook_in is not None:
            return "none", s_in, s_in
        return "none", s_in, average(hook_out, None)
    why = {"token-wise": "and the norm of a token's true output is not known when a transcoder runs",
           "batch-wise": "which depends on the other tokens"}.get(how, "which is not known here")  # fmt: skip
    raise openmoss.refuse(name, f"its norm_activation is {how!r}, {why}", "Use one with dataset-wise or inference.")


def _average(archive: Archive, prefix: str, name: str, width: int, hook: str | None, given: float | None) -> float:
    """sqrt(width) over the average norm that the file holds for a hook point, else what the caller gave."""
    tensor = f"{prefix}{hook}"
    proceed = "Give input_scale=..., the square root of the width over the average norm of the stream; the output's "
    proceed += "has to be in the files, or folded by its authors' tools (norm_activation inference)."
    spec = archive.specs.get(tensor)
    if spec is None:
        if given is None:
            raise MissingScale(f"SAE folder {name} with norm_activation dataset-wise", f"it has no {tensor}", proceed)
        return given
    if math.prod(spec.shape) != 1 or spec.dtype not in FLOATS:
        raise broken(archive.path, f"{tensor} is {spec.shape} {spec.dtype}, not one number")
    norm = float(archive.read(tensor).reshape(()))
    if openmoss.plausible(norm):
        return math.sqrt(width) / norm
    if given is None:
        found = f"{tensor} is {norm:.3g}, which is no stream's norm: it was saved without being set"
        raise BrokenFile(f"SAE file {archive.path.name}", found, proceed)
    return given


def _units(config: Mapping[str, Any], s_in: float) -> dict[str, Any]:
    """What the activations are times; ``raw_factor`` brings them to those of its authors' fold_activation_scale."""
    how = config["norm_activation"]
    if how == "dataset-wise":
        return {"name": "official, of normed inputs", "raw_factor": 1 / s_in}
    return {"name": "official, raw" if how == "inference" else "official, of tokens with norm sqrt(d)"}


def _fold(
    raw: dict[str, Tensor], *, s_in: float, s_out: float, activation: Activation, config: Mapping[str, Any]
) -> dict[str, Tensor]:
    w = dict(raw)
    if "b_dec" not in w:
        w["b_dec"] = w["W_dec"].new_zeros(w["W_dec"].shape[1])
    if config["use_decoder_bias"] and config["apply_decoder_bias_to_pre_encoder"]:
        w["b_enc"] = w["b_enc"].float() - w["b_dec"].float() @ w["W_enc"].float()
    if activation == "jumprelu":
        w["threshold"] = w["threshold"].float().exp()
    if config["sparsity_include_decoder_norm"] and activation != "relu":
        norms = torch.linalg.vector_norm(w["W_dec"].float(), dim=1)
        if activation == "topk":
            w["rank_by"] = norms
        else:
            w["threshold"] = w["threshold"] / norms
    for key, factor in (("W_enc", s_in), ("W_dec", 1 / s_out), ("b_dec", 1 / s_out)):
        if factor != 1:
            w[key] = w[key].float() * factor
    return w
