"""SAELens folders, from the first versions to the sixth: the config says how to fold the tensors into our equations.

    cfg.json                   d_in d_sae architecture apply_b_dec_to_input normalize_activations metadata{...}
    sae_weights.safetensors    W_enc (d_in, d_sae)  b_enc  W_dec (d_sae, d_in)  b_dec, and by architecture
                               jumprelu threshold | gated b_gate b_mag r_mag | batchtopk topk_threshold

    gated       (x W + b_gate > 0) relu(x W e^r + b_mag)   W_enc = W e^r, b_enc = b_mag, threshold = b_mag - e^r b_gate
    apply b_dec (x - b_dec) @ W_enc + b_enc                b_enc - b_dec @ W_enc
    rescale     gate sees pre * n, n = |W_dec| by row      W_enc n, b_enc n, W_dec / n
    finetuning  (f * s) @ W_dec                            s W_dec

What does not fold exactly (norms taken from each token, other activations, two sites) is refused by name. Configs
written before version 6 are flat and have older names for some keys.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from torch import Tensor

from saeguard.errors import SiteNotFound, UnsupportedFormat
from saeguard.loaders import headers
from saeguard.sae import SAE
from saeguard.sites import Site

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_DEFAULTS = {
    "architecture": "standard",
    "activation_fn": "relu",
    "apply_b_dec_to_input": True,
    "prepend_bos": True,
    "finetuning_scaling_factor": False,
    "normalize_activations": "none",
}
# A value of null is as good as no value.
_KINDS: dict[str, tuple[type, ...]] = {
    "d_in": (int,), "d_sae": (int,), "k": (int, float), "context_size": (int,), "architecture": (str,),
    "activation_fn": (str,), "activation_fn_kwargs": (dict,), "hook_name": (str,), "model_name": (str,),
    "apply_b_dec_to_input": (bool,), "prepend_bos": (bool,), "finetuning_scaling_factor": (bool,),
    "rescale_acts_by_decoder_norm": (bool,), "normalize_activations": (str, bool),
    "model_from_pretrained_kwargs": (dict,),
}  # fmt: skip
_TRANSCODER = "a transcoder reads one stream and writes another"
_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "normalize_activations": (
        ("none", False, None),
        "the scale is taken from each token, or is not in the file, and cannot be folded into the weights",
    ),
    "reshape_activations": (("none", "hook_z", None), "only heads side by side are known"),
    "hook_head_index": ((None,), "it reads one head of a site, not the site"),
    "d_out": ((None,), _TRANSCODER),
    "hook_name_out": ((None,), _TRANSCODER),
    "hook_point_out": ((None,), _TRANSCODER),
    "is_transcoder": ((None, False), _TRANSCODER),
}
_BASE = frozenset({"W_enc", "b_enc", "W_dec", "b_dec"})
_JUMPRELU, _THRESHOLDED = _BASE | {"threshold"}, _BASE | {"topk_threshold"}
_LAYOUTS = {
    "standard": (_BASE,),
    "jumprelu": (_JUMPRELU,),
    "topk": (_BASE,),
    "gated": (frozenset({"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}),),
    "batchtopk": (_JUMPRELU, _THRESHOLDED),
    "matryoshka_batchtopk": (_JUMPRELU, _THRESHOLDED),
}
_NO_RECORD = {
    "transcoder": _TRANSCODER,
    "skip_transcoder": _TRANSCODER,
    "jumprelu_transcoder": _TRANSCODER,
    "jumprelu_skip_transcoder": _TRANSCODER,
    "abstopk": "it keeps the largest |pre| with their signs",
    "matching_pursuit": "its latents are found one after another, not by one encoder",
    "temporal": "its latents depend on earlier tokens",
}
_FINETUNING = {"scaling_factor", "finetuning_scaling_factor"}
_MODELS = {"gpt2-small": "gpt2"}  # TransformerLens's own name; its other names end as those of the hub do


def recognises(source: Path) -> bool:
    """Whether the folder holds SAELens's two files."""
    return source.is_dir() and (source / CONFIG).is_file() and (source / WEIGHTS).is_file()


def load(source: Path) -> SAE:
    """Read a folder; what is folded is float32. Raises `BrokenFile`, `UnsupportedFormat`."""
    path = source / WEIGHTS
    cfg = _config(source / CONFIG)
    name = os.path.basename(os.path.abspath(source))
    _refuse(name, cfg)
    shapes = headers.safetensors_shapes(path, headers.safetensors_header(path))
    _check_tensors(name, path, cfg, shapes)
    tensors = {key: tensor.float() for key, tensor in headers.safetensors_tensors(path, sorted(shapes)).items()}
    top_k = cfg["k"] if cfg["architecture"] == "topk" else None
    weights, folded = _fold(path, cfg, tensors)
    headers.check_finite(path, weights)
    site, manifest = _origin(cfg)
    return SAE(
        name=name,
        activation="topk" if top_k is not None else "jumprelu" if "threshold" in weights else "relu",
        top_k=top_k,
        site=site,
        model=_MODELS.get(cfg.get("model_name") or "", cfg.get("model_name")),
        manifest=manifest | {"folded": folded},
        **weights,
    )


def _config(path: Path) -> dict[str, Any]:
    """The config in the words of version 6, flat, with the defaults that SAELens gives to older files."""
    raw = headers.json_file(path)
    metadata = raw.pop("metadata", {})
    if not isinstance(metadata, dict):
        raise headers.broken(path, f"metadata is {short(metadata)}")
    given = metadata | raw
    cfg = _DEFAULTS | {_RENAMED.get(key, key): value for key, value in given.items() if value is not None}
    for key, kinds in _KINDS.items():
        if key in cfg and type(cfg[key]) not in kinds:  # not isinstance: true is no number
            raise headers.broken(path, f"{key} is {short(cfg[key])}")
    for key in ("d_in", "d_sae"):
        if cfg.get(key, 0) <= 0:
            raise headers.broken(path, f"{key} is {cfg.get(key)}")
    if cfg["activation_fn"] == "topk" and cfg["architecture"] == "standard":  # before version 5 had the architecture
        cfg["architecture"] = "topk"
    if cfg["architecture"] == "topk":
        k = cfg.get("k", cfg.get("activation_fn_kwargs", {}).get("k"))
        if type(k) is not int:
            raise headers.broken(path, f"k is {short(k)}")
        cfg["k"] = k
    return cfg


def _refuse(name: str, cfg: Mapping[str, Any]) -> None:
    architecture, activation = cfg["architecture"], cfg["activation_fn"]
    if architecture in _NO_RECORD:
        raise _unsupported(name, f"architecture {architecture}", _NO_RECORD[architecture])
    if architecture not in _LAYOUTS:
        raise _unsupported(name, f"architecture {short(architecture)}", f"known are {', '.join(_LAYOUTS)}")
    for key, (neutral, why) in _NEUTRAL.items():
        if cfg.get(key) not in neutral:
            raise _unsupported(name, f"{key} {short(cfg[key])}", why)
    if activation != "relu" and not (activation == "topk" and architecture == "topk"):
        raise _unsupported(name, f"activation_fn {short(activation)} with {architecture}", "known are relu and topk")
    if cfg.get("rescale_acts_by_decoder_norm") and architecture in ("standard", "jumprelu", "gated"):
        raise _unsupported(
            name, f"rescale_acts_by_decoder_norm with {architecture}", "only TopK families have it in SAELens"
        )
    if cfg.get("model_from_pretrained_kwargs", {}).get("center_writing_weights"):
        raise _unsupported(
            name,
            "center_writing_weights True",
            "it was trained on a stream without its mean over the width, which the model as published does not have",
        )


def _unsupported(name: str, what: str, why: str) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"SAELens folder {name} with {what}", why, "Only what folds exactly into an SAE's equations is loaded."
    )


def _check_tensors(name: str, path: Path, cfg: Mapping[str, Any], shapes: Mapping[str, headers.Shape]) -> None:
    architecture, names = cfg["architecture"], set(shapes) - _FINETUNING
    layouts = _LAYOUTS[architecture]
    if architecture not in ("batchtopk", "matryoshka_batchtopk"):
        needed = layouts[0]
    elif {"threshold", "topk_threshold"} & names:
        needed = layouts["topk_threshold" in names]
    else:
        raise _unsupported(
            name,
            f"architecture {architecture}",
            "it stores no threshold, and without one its activations depend on the other tokens of the batch",
        )
    if missing := needed - names:
        raise headers.broken(path, f"{', '.join(sorted(missing))} of architecture {architecture} not there")
    if unknown := names - needed:
        raise _unsupported(name, f"tensor {short(', '.join(sorted(unknown)))}", f"{architecture} SAEs have none")
    rescaled = cfg.get("rescale_acts_by_decoder_norm")
    if "topk_threshold" in names and rescaled is None or "threshold" in names and rescaled:
        raise _unsupported(
            name,
            f"architecture {architecture} and rescale_acts_by_decoder_norm {rescaled}",
            "whether the decoder's norms are in the threshold is not said",
        )
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    special: dict[str, headers.Shape] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,),
                                         "topk_threshold": ()}  # fmt: skip
    headers.check_shapes(path, shapes, {key: special.get(key, (d_sae,)) for key in shapes})


def _fold(path: Path, cfg: Mapping[str, Any], t: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of our equations, and what had to be folded for them."""
    scale, folded = _finetuning(path, cfg, t), [cfg["architecture"]] if "r_mag" in t else []
    w = {key: tensor for key, tensor in t.items() if key in _JUMPRELU}
    if "r_mag" in t:
        gain = t["r_mag"].exp()
        w["W_enc"], w["b_enc"], w["threshold"] = t["W_enc"] * gain, t["b_mag"], t["b_mag"] - gain * t["b_gate"]
    if "topk_threshold" in t:
        w["threshold"] = t["topk_threshold"].expand(cfg["d_sae"]).clone()
        folded.append("topk_threshold")
    if cfg["apply_b_dec_to_input"]:
        w["b_enc"] = w["b_enc"] - w["b_dec"] @ w["W_enc"]
        folded.append("apply_b_dec_to_input")
    if cfg.get("rescale_acts_by_decoder_norm"):  # the stored threshold, if there is one, is in rescaled units already
        norms = w["W_dec"].norm(dim=1)
        if not norms.all():
            raise headers.broken(path, "a decoder row of norm 0 under rescale_acts_by_decoder_norm")
        w["W_enc"], w["b_enc"], w["W_dec"] = w["W_enc"] * norms, w["b_enc"] * norms, w["W_dec"] / norms[:, None]
        folded.append("rescale_acts_by_decoder_norm")
    if scale is not None:
        w["W_dec"] = w["W_dec"] * scale[:, None]
        folded.append("finetuning_scaling_factor")
    if "threshold" in w:
        w["threshold"] = w["threshold"].clamp_min(0.0)  # SAELens: relu(pre) where pre > threshold
    return w, folded


def _finetuning(path: Path, cfg: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor | None:
    stored = [tensors[name] for name in sorted(_FINETUNING & set(tensors))]
    scales = [scale for scale in stored if not bool((scale == 1).all())]
    if len(stored) > 1 or bool(scales) and not cfg["finetuning_scaling_factor"]:
        raise headers.broken(path, f"{len(stored)} scaling factors, and the config does not say to use one")
    if cfg["finetuning_scaling_factor"] and not stored:
        raise headers.broken(path, "the config says finetuning_scaling_factor and the file has no such tensor")
    return scales[0] if scales else None


def _origin(cfg: Mapping[str, Any]) -> tuple[Site | None, dict[str, Any]]:
    hook = cfg.get("hook_name")
    manifest = {"format": "saelens", "architecture": cfg["architecture"], "hook_name": hook, "bos": cfg["prepend_bos"]}
    for key, ours in {"context_size": "context", "model_name": "model_name", "dataset_path": "dataset",
                      "neuronpedia_id": "neuronpedia_id", "sae_lens_version": "sae_lens_version"}.items():  # fmt: skip
        if type(cfg.get(key)) in (str, int):
            manifest[ours] = cfg[key]
    if hook is None:
        return None, manifest | {"site_unknown": "cfg.json names no hook"}
    try:
        return Site.parse(hook), manifest
    except SiteNotFound as error:
        return None, manifest | {"site_unknown": str(error)}
