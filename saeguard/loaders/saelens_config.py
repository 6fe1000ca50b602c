"""SAELens's cfg.json, as any of its versions wrote it: in the words of the sixth, and every value checked.

    version 6    {"d_in", "d_sae", "architecture", ..., "metadata": {"hook_name", "model_name", ...}}
    before       flat, with hook_point or hook_name, activation_fn_str and activation_fn_kwargs {"k"}; what is not
                 there has SAELens's default of that time: standard, ReLU, b_dec off the input, a BOS token

A key whose value is null is not there. Settings that would change what the SAE computes, and that are not known here,
are refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from saeguard.activations import Pursuit
from saeguard.errors import SiteNotFound, UnsupportedFormat
from saeguard.loaders import transformer_lens
from saeguard.loaders.source import Hints, Source, broken
from saeguard.sites import Site

CONFIG = "cfg.json"
SCALER = "activation_scaler.json"
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
RANKED = ("topk", "abstopk")
BATCHED = ("batchtopk", "matryoshka_batchtopk")
PURSUIT = "matching_pursuit"
ARCHITECTURES = ("standard", "jumprelu", "gated", *RANKED, *BATCHED, *TRANSCODERS, PURSUIT)

_RENAMED = {
    "hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn",
    "hook_point_out": "hook_name_out", "out_hook_point": "hook_name_out",
}  # fmt: skip
_KINDS: dict[str, tuple[type, ...]] = {
    "d_in": (int,), "d_sae": (int,), "d_out": (int,), "k": (int, float), "context_size": (int,),
    "architecture": (str,), "activation_fn": (str,), "activation_fn_kwargs": (dict,), "apply_b_dec_to_input": (bool,),
    "normalize_activations": (str, bool), "norm_scaling_factor": (int, float), "reshape_activations": (str,),
    "activation_normalization_factor": (int, float), "rescale_acts_by_decoder_norm": (bool,),
    "finetuning_scaling_factor": (bool,), "residual_threshold": (int, float), "max_iterations": (int,),
    "stop_on_duplicate_support": (bool,), "hook_name": (str,), "hook_name_out": (str,), "hf_hook_name": (str,),
    "hf_hook_name_out": (str,), "model_name": (str,), "model_from_pretrained_kwargs": (dict,), "prepend_bos": (bool,),
}  # fmt: skip
_POSITIVE = ("d_in", "d_sae", "d_out", "norm_scaling_factor", "activation_normalization_factor", "max_iterations")
_HUGE = 1e30
_MAX_ROUNDS = 1 << 16
_ONE_SITE = "a transcoder reads one stream and writes another, and this architecture does not"
_ONE_HEAD = "it reads or writes one head of a site, not the site"
_NORMALIZATIONS = (
    "none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "constant_scalar_rescale",
)  # fmt: skip
_WHITENING = "the whitening that its input needs is not in its files; SAELens folds it in when a training ends"
_TEMPORAL = "its latents depend on earlier tokens, through attention"


@dataclass(frozen=True)
class Config:
    """What a cfg.json says. ``scale`` multiplies the input, None where nothing does; ``norm`` is one of each token."""

    path: Path
    name: str
    architecture: str
    d_in: int
    d_sae: int
    d_out: int
    top_k: int | None
    pursuit: Pursuit | None
    is_tanh: bool
    subtracts_b_dec: bool
    rescales: bool | None
    """Whether activations are multiplied with the norms of the decoder's rows; None where nothing is said."""
    is_finetuned: bool
    normalize: str
    factor: float | None
    """The input's scale, where a file says it."""
    model_kwargs: Mapping[str, Any]
    """How TransformerLens was asked to load the model."""
    hooks: tuple[str, ...]
    hooks_out: tuple[str, ...]
    model: str | None
    manifest: Mapping[str, Any]

    @property
    def is_transcoder(self) -> bool:
        return self.architecture in TRANSCODERS

    def refuse(self, what: str, why: str) -> UnsupportedFormat:
        """The error for what is understood and cannot be computed here."""
        return UnsupportedFormat(
            f"SAELens folder {self.name} with {what}", why, "Only what is computed exactly as SAELens does is loaded."
        )


def read(source: Source, name: str, hints: Hints) -> Config:
    """The config of a folder. Raises `BrokenFile`, `UnsupportedFormat`."""
    path = source.file(CONFIG)
    raw = source.json(CONFIG)
    cfg = _flat(path, raw)
    cfg |= {key: value for key, value in hints.overrides.items() if key == "normalize_activations"}
    _check_values(path, cfg)
    architecture = _architecture(cfg)
    normalize = cfg.get("normalize_activations", "none")
    if isinstance(normalize, bool):
        normalize = "expected_average_only_in" if normalize else "none"
    config = Config(
        path=path, name=name, architecture=architecture, d_in=cfg["d_in"], d_sae=cfg["d_sae"],
        d_out=cfg.get("d_out", cfg["d_in"]),
        top_k=_top_k(path, cfg) if architecture in RANKED else None,
        pursuit=_pursuit(path, cfg) if architecture == PURSUIT else None,
        is_tanh=cfg.get("activation_fn") == "tanh-relu",
        subtracts_b_dec=cfg.get("apply_b_dec_to_input", architecture not in TRANSCODERS),
        rescales=cfg.get("rescale_acts_by_decoder_norm"),
        is_finetuned=cfg.get("finetuning_scaling_factor", False),
        normalize=normalize, factor=_factor(source, cfg, normalize),
        model_kwargs=cfg.get("model_from_pretrained_kwargs", {}),
        hooks=_texts(cfg, "hook_name", "hf_hook_name"), hooks_out=_texts(cfg, "hook_name_out", "hf_hook_name_out"),
        model=hints.model or transformer_lens.hub_name(cfg.get("model_name")),
        manifest=_manifest(cfg, architecture, cfg.get("prepend_bos", _bos(raw, hints))),
    )  # fmt: skip
    _refuse(config, cfg)
    return config


def site(hooks: tuple[str, ...]) -> tuple[Site | None, str]:
    """The first hook that is a stream of ours, or None and why none is."""
    why = f"{CONFIG} names no hook"
    for i, hook in enumerate(hooks):
        try:
            return Site.parse(hook), ""
        except SiteNotFound as error:
            why = why if i else str(error)
    return None, why


def _flat(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    metadata = raw.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise broken(path, f"metadata is {short(metadata)}")
    given = metadata | {key: value for key, value in raw.items() if key != "metadata"}
    return {_RENAMED.get(key, key): value for key, value in given.items() if value is not None}


def _check_values(path: Path, cfg: Mapping[str, Any]) -> None:
    for key, kinds in _KINDS.items():
        if key in cfg and type(cfg[key]) not in kinds:  # not isinstance: true is no number
            raise broken(path, f"{key} is {short(cfg[key])}")
    for key in ("d_in", "d_sae"):
        if key not in cfg:
            raise broken(path, f"{key} is not there")
    for key in _POSITIVE:
        if not 0 < cfg.get(key, 1) < _HUGE:
            raise broken(path, f"{key} is {short(cfg[key])}")


def _architecture(cfg: Mapping[str, Any]) -> str:
    architecture = cfg.get("architecture", "standard")
    if cfg.get("activation_fn") == "topk" and architecture == "standard":  # before version 5 had the architecture
        return "topk"
    return architecture


def _top_k(path: Path, cfg: Mapping[str, Any]) -> int:
    k = cfg.get("k", cfg.get("activation_fn_kwargs", {}).get("k"))
    if type(k) is not int or not 0 < k <= cfg["d_sae"]:
        raise broken(path, f"k is {short(k)} of {cfg['d_sae']} latents")
    return k


def _pursuit(path: Path, cfg: Mapping[str, Any]) -> Pursuit:
    rounds, residual = cfg.get("max_iterations", cfg["d_in"]), cfg.get("residual_threshold", 1e-2)
    if rounds > _MAX_ROUNDS or not -_HUGE < residual < _HUGE:
        raise broken(path, f"max_iterations is {short(rounds)} and residual_threshold {short(residual)}")
    return Pursuit(rounds, residual=float(residual), stops_on_repeat=cfg.get("stop_on_duplicate_support", True))


def _factor(source: Source, cfg: Mapping[str, Any], normalize: str) -> float | None:
    """The scale of the input that a file says: the config, or what a training run leaves beside its checkpoints."""
    if normalize == "constant_scalar_rescale":
        factor = cfg.get("activation_normalization_factor")
    elif normalize == "expected_average_only_in":
        factor = cfg.get("norm_scaling_factor")
        if factor is None and source.has(SCALER):
            factor = source.json(SCALER).get("scaling_factor")
            if factor is not None and (type(factor) not in (int, float) or not 0 < factor < _HUGE):
                raise broken(source.file(SCALER), f"scaling_factor is {short(factor)}")
    else:
        return None
    return None if factor is None else float(factor)


def _texts(cfg: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    return tuple(cfg[key] for key in keys if key in cfg)


def _bos(raw: Mapping[str, Any], hints: Hints) -> bool | None:
    """What holds where the config says nothing: before version 6, SAELens prepended a BOS token."""
    return hints.overrides.get("prepend_bos", None if raw.get("metadata") is not None else True)


def _manifest(cfg: Mapping[str, Any], architecture: str, bos: bool | None) -> dict[str, Any]:
    manifest = {"format": "saelens", "architecture": architecture, "hook_name": cfg.get("hook_name"), "bos": bos}
    for key, ours in {"hook_name_out": "hook_name_out", "context_size": "context", "model_name": "model_name",
                      "dataset_path": "dataset", "neuronpedia_id": "neuronpedia_id",
                      "sae_lens_version": "sae_lens_version"}.items():  # fmt: skip
        if type(cfg.get(key)) in (str, int):
            manifest[ours] = cfg[key]
    return manifest


def _refuse(config: Config, cfg: Mapping[str, Any]) -> None:
    architecture, normalize = config.architecture, config.normalize
    if architecture == "temporal":
        raise config.refuse("architecture temporal", _TEMPORAL)
    if architecture not in ARCHITECTURES:
        raise config.refuse(f"architecture {short(architecture)}", f"known are {', '.join(ARCHITECTURES)}")
    activation = cfg.get("activation_fn", "relu")
    known = {"standard": ("relu", "tanh-relu"), "topk": ("relu", "topk")}.get(architecture, ("relu",))
    if activation not in known:
        raise config.refuse(f"activation_fn {short(activation)}", f"{architecture} SAEs have {' or '.join(known)}")
    if normalize == "covariance_whitening":
        raise config.refuse("normalize_activations covariance_whitening", _WHITENING)
    if normalize not in _NORMALIZATIONS:
        raise config.refuse(f"normalize_activations {short(normalize)}", f"known are {', '.join(_NORMALIZATIONS)}")
    if config.rescales and architecture not in (*RANKED, *BATCHED):
        raise config.refuse(
            f"rescale_acts_by_decoder_norm with {architecture}", "only TopK families have it in SAELens"
        )
    if config.is_transcoder and config.subtracts_b_dec:
        raise config.refuse(f"apply_b_dec_to_input with {architecture}", "its b_dec is of the stream that it writes")
    reshape = cfg.get("reshape_activations", "none")
    if reshape not in ("none", "hook_z"):
        raise config.refuse(f"reshape_activations {short(reshape)}", "only heads side by side are known")
    if reshape == "hook_z" and config.hooks and not config.hooks[0].endswith("_z"):
        raise broken(config.path, f"reshape_activations is hook_z at {short(config.hooks[0])}")
    if not config.is_transcoder:
        for key in ("d_out", "hook_name_out", "hf_hook_name_out", "is_transcoder"):
            if cfg.get(key):
                raise config.refuse(f"{key} {short(cfg[key])}", _ONE_SITE)
    for key in ("hook_head_index", "hook_head_index_out"):
        if key in cfg:
            raise config.refuse(f"{key} {short(cfg[key])}", _ONE_HEAD)
