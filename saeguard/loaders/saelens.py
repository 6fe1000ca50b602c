"""SAELens folders, from the first versions to the sixth: the config says how the tensors fold into our equations.

    cfg.json                   see `saeguard.loaders.saelens_config`
    sae_weights.safetensors    W_enc (d_in, d_sae)  b_enc  W_dec (d_sae, d_out)  b_dec, and by architecture
                               jumprelu threshold or log_threshold | gated b_gate b_mag r_mag, no b_enc
                               batchtopk threshold or topk_threshold | skip W_skip (d_out, d_in)
                               matching_pursuit W_dec and b_dec only

    published     norm_in(x) - b_dec -> p -> f        x_hat = norm_out(f @ W_dec + b_dec) + x @ W_skip.T
    gated         (p + b_gate > 0) relu(p e^r + b_mag)     W_enc = W e^r, b_enc = b_mag, threshold = b_mag - e^r b_gate
    apply b_dec   (x - b_dec) @ W_enc + b_enc              b_enc - b_dec @ W_enc, with both as they are in the file
    input scale   x s, and x_hat / s                       W_enc s, W_dec / s, b_dec / s; a transcoder's output stays
    rescale       f = act(p n), n = |W_dec| by row         W_enc n, b_enc n, W_dec / n; topk_threshold is in these units
    finetuning    (f s) @ W_dec                            W_dec s

A transcoder has neither b_dec on its input nor norm_out. Published activations are those after all of these folds,
which is what SAELens itself gives out.
"""

import os
from collections.abc import Mapping
from functools import partial
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from saeguard.activations import Activation
from saeguard.archives import Archive
from saeguard.errors import MissingScale, MissingSite
from saeguard.loaders import saelens_config, transformer_lens
from saeguard.loaders.saelens_config import BATCHED, CONFIG, PURSUIT, RANKED, Config
from saeguard.loaders.source import Hints, Source, broken
from saeguard.loaders.stored import Piece, Stored, check_specs
from saeguard.norms import Norm
from saeguard.sites import Site

WEIGHTS = "sae_weights.safetensors"

_BASE = frozenset({"W_enc", "b_enc", "W_dec", "b_dec"})
_THRESHOLD, _TOPK_THRESHOLD, _SKIP = frozenset({"threshold"}), frozenset({"topk_threshold"}), frozenset({"W_skip"})
_LAYOUTS: dict[str, tuple[frozenset[str], ...]] = {
    "jumprelu": (_BASE | _THRESHOLD, _BASE | {"log_threshold"}),
    "gated": (frozenset({"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"}),),
    "skip_transcoder": (_BASE | _SKIP,),
    "jumprelu_transcoder": (_BASE | _THRESHOLD,),
    "jumprelu_skip_transcoder": (_BASE | _THRESHOLD | _SKIP,),
    PURSUIT: (frozenset({"W_dec", "b_dec"}),),
} | dict.fromkeys(BATCHED, (_BASE | _THRESHOLD, _BASE | _TOPK_THRESHOLD))
_FINETUNING = frozenset({"scaling_factor", "finetuning_scaling_factor"})
_AXES = {"W_enc": 1, "W_dec": 0, "b_dec": None, "W_skip": None, "topk_threshold": None}
_NORMS: dict[str, Norm] = {"layer_norm": "layer_norm", "constant_norm_rescale": "const_norm"}
_SCALED = ("expected_average_only_in", "constant_scalar_rescale")


def recognises(source: Source) -> bool:
    """Whether SAELens's two files are there."""
    return source.main in (None, WEIGHTS) and source.has(CONFIG, WEIGHTS)


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`, `MissingSite`, `MissingScale`."""
    name = os.path.basename(os.path.abspath(source.folder))
    cfg = saelens_config.read(source, name, hints)
    archive = source.archive(WEIGHTS)
    names = _check_tensors(cfg, archive)
    scale = _input_scale(cfg, hints)
    site, site_out, unknown = _sites(cfg, hints)
    norm = _norm(cfg, site, hints, "W_skip" in names)
    return Stored(
        family="saelens", name=name, d_in=cfg.d_in, d_sae=cfg.d_sae, d_out=cfg.d_out,
        activation=_activation(cfg, names), pieces=_pieces(archive, names, cfg),
        fold=partial(_fold_pursuit if cfg.pursuit else _fold, cfg, scale),
        top_k=cfg.top_k, pursuit=cfg.pursuit, norm=norm, site=site, site_out=site_out, model=cfg.model,
        manifest={**cfg.manifest, **unknown, **_processing(cfg, site, norm),
                  **({} if scale is None else {"input_scale": scale}), "folds": _folds(cfg, names, scale)},
    )  # fmt: skip


def _check_tensors(cfg: Config, archive: Archive) -> frozenset[str]:
    """Names of the tensors, of which none is missing or unknown and all have their shapes."""
    names = frozenset(archive.specs)
    finetuning = _FINETUNING if cfg.architecture != PURSUIT else frozenset()
    needed = _layout(cfg, names)
    if missing := needed - names:
        raise broken(archive.path, f"{', '.join(sorted(missing))} of architecture {cfg.architecture} not there")
    if unknown := names - needed - finetuning:
        raise cfg.refuse(f"tensor {short(', '.join(sorted(unknown)))}", f"{cfg.architecture} SAEs have none")
    scales = names & finetuning
    if len(scales) > 1 or cfg.is_finetuned and not scales:
        raise broken(
            archive.path,
            f"it has {len(scales)} scaling factors and finetuning_scaling_factor of the config is {cfg.is_finetuned}",
        )
    shapes = {"W_enc": (cfg.d_in, cfg.d_sae), "W_dec": (cfg.d_sae, cfg.d_out), "b_dec": (cfg.d_out,),
              "W_skip": (cfg.d_out, cfg.d_in), "topk_threshold": ()}  # fmt: skip
    check_specs(archive, {name: shapes.get(name, (cfg.d_sae,)) for name in sorted(names)})
    return names


def _layout(cfg: Config, names: frozenset[str]) -> frozenset[str]:
    layouts = _LAYOUTS.get(cfg.architecture, (_BASE,))
    if cfg.architecture not in BATCHED:
        return next((layout for layout in layouts if layout <= names), layouts[0])
    by_row, by_batch = "threshold" in names, "topk_threshold" in names
    if not by_row and not by_batch:
        raise cfg.refuse(
            f"architecture {cfg.architecture}",
            "it stores no threshold, and without one its activations depend on the other tokens of the batch",
        )
    if by_batch and cfg.rescales is None or by_row and cfg.rescales:
        raise cfg.refuse(
            f"architecture {cfg.architecture} and rescale_acts_by_decoder_norm {cfg.rescales}",
            "whether the decoder's norms are in the threshold is not said",
        )
    return layouts[by_batch]


def _input_scale(cfg: Config, hints: Hints) -> float | None:
    if cfg.normalize not in _SCALED:
        return None
    if cfg.pursuit:
        raise cfg.refuse(
            f"normalize_activations {cfg.normalize}",
            "atoms have one length, and a scaled input would need two",
        )
    scale = hints.input_scale if hints.input_scale is not None else cfg.factor
    if scale is None:
        raise MissingScale(
            f"SAELens folder {cfg.name}",
            f"its input is normalised by {cfg.normalize}, and the factor is not in its files",
            "Give input_scale=..., which x is multiplied with: sqrt(d_in) / the mean norm of x over the training text.",
        )
    return float(scale)


def _sites(cfg: Config, hints: Hints) -> tuple[Site | None, Site | None, dict[str, str]]:
    """Where it reads and writes, and what the manifest says of a site that is not known."""
    (site, why), (site_out, why_out) = saelens_config.site(cfg.hooks), saelens_config.site(cfg.hooks_out)
    if site is not None and site.stream == "mlp_in" and cfg.model_kwargs.get("fold_ln") is True:
        site = Site("mlp_normed", site.layer)  # the norm's gain is in the weights behind it
    site, site_out = hints.site or site, hints.site_out or site_out
    if not cfg.is_transcoder:
        return site, None, {} if site else {"site_unknown": why}
    if site is None or site_out is None:
        raise MissingSite(
            f"SAELens transcoder {cfg.name}",
            f"where it {'reads' if site is None else 'writes'} is not known: {why if site is None else why_out}",
            "Give site=... and site_out=....",
        )
    return site, site_out, {}


def _norm(cfg: Config, site: Site | None, hints: Hints, skips: bool) -> Norm:
    """The norm of each token, from the config's and from what TransformerLens did to the stream."""
    norm = _NORMS.get(cfg.normalize, "none")
    processed = cfg.model_kwargs.get("center_writing_weights") is True
    if site is None and hints.overrides.get("center_writing_weights", processed):
        raise MissingSite(
            f"SAELens folder {cfg.name}",
            "center_writing_weights is True, so whether its stream had a mean depends on which stream that is",
            "Give site=....",
        )
    if transformer_lens.norm(site, hints, processed=processed) == "none":
        return norm
    if skips or norm == "const_norm":
        what = "a skip" if skips else "constant_norm_rescale"
        raise cfg.refuse(
            f"center_writing_weights True and {what}", f"{what} reads the stream without its mean, and here it has one"
        )
    return "center" if norm == "none" else norm


def _processing(cfg: Config, site: Site | None, norm: Norm) -> dict[str, Any]:
    """What has to be undone when the model is there, see `saeguard.engines.corrections`."""
    # SAELens loads models without processing, so that what is not named was not done.
    value_biases, fold_ln = (cfg.model_kwargs.get(key) is True for key in ("fold_value_biases", "fold_ln"))
    found = transformer_lens.processing(site, value_biases=value_biases, fold_ln=fold_ln, centers=False)
    if found and value_biases and norm != "none":
        raise cfg.refuse(
            f"fold_value_biases True and normalize_activations {cfg.normalize}",
            "the values' bias would have to go before the norm",
        )
    return found


def _activation(cfg: Config, names: frozenset[str]) -> Activation:
    if cfg.pursuit:
        return "pursuit"
    if cfg.architecture in RANKED:
        return "abstopk" if cfg.architecture == "abstopk" else "topk"
    if cfg.is_tanh:
        return "tanh_relu"
    return "jumprelu" if names & {"threshold", "log_threshold", "topk_threshold", "r_mag"} else "relu"


def _pieces(archive: Archive, names: frozenset[str], cfg: Config) -> dict[str, Piece]:
    pieces = {
        "scaling_factor" if name in _FINETUNING else name: Piece(archive, name, _AXES.get(name, 0), name == "W_skip")
        for name in sorted(names)
    }
    return pieces | {"W_enc": Piece(archive, "W_dec", 0, turned=True)} if cfg.pursuit else pieces


def _folds(cfg: Config, names: frozenset[str], scale: float | None) -> list[str]:
    done = {
        **{name: name in names for name in ("log_threshold", "topk_threshold")}, "gated": "r_mag" in names,
        "apply_b_dec_to_input": cfg.subtracts_b_dec and not cfg.pursuit, cfg.normalize: scale is not None,
        "rescale_acts_by_decoder_norm": bool(cfg.rescales), "finetuning_scaling_factor": cfg.is_finetuned,
    }  # fmt: skip
    return [fold for fold, is_done in done.items() if is_done]


def _fold(cfg: Config, scale: float | None, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    w = _gate(raw)
    if cfg.subtracts_b_dec:
        w["b_enc"] = w["b_enc"].float() - w["b_dec"].float() @ w["W_enc"].float()
    if scale is not None:
        w["W_enc"] = w["W_enc"].float() * scale
    if scale is not None and not cfg.is_transcoder:
        w["W_dec"], w["b_dec"] = w["W_dec"].float() / scale, w["b_dec"].float() / scale
        if cfg.rescales and "threshold" in w:  # it is compared with pre-activations times these norms
            w["threshold"] = w["threshold"].float() / scale
    if cfg.rescales:
        norms = w["W_dec"].float().norm(dim=1)
        if not norms.all():
            raise broken(cfg.path, "rescale_acts_by_decoder_norm is True and a row of the decoder has norm 0")
        w["W_enc"], w["b_enc"] = w["W_enc"].float() * norms, w["b_enc"].float() * norms
        w["W_dec"] = w["W_dec"].float() / norms[:, None]
    if cfg.is_finetuned:
        w["W_dec"] = w["W_dec"].float() * raw["scaling_factor"].float()[:, None]
    elif "scaling_factor" in raw and not torch.allclose(raw["scaling_factor"].float(), torch.ones(())):
        raise broken(cfg.path, "scaling factors other than 1 are there, and finetuning_scaling_factor is not True")
    if "threshold" in w:
        w["threshold"] = w["threshold"].clamp_min(0)  # SAELens: relu(pre) where pre > threshold
    return w | ({"skip": raw["W_skip"]} if "W_skip" in raw else {})


def _gate(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder with its bias, the decoder with its own, and a threshold where there is one."""
    w = {key: tensor for key, tensor in raw.items() if key in _BASE | _THRESHOLD}
    if "r_mag" in raw:
        gain, b_mag = raw["r_mag"].float().exp(), raw["b_mag"].float()
        w["W_enc"], w["b_enc"] = raw["W_enc"].float() * gain, b_mag
        w["threshold"] = b_mag - gain * raw["b_gate"].float()
    if "log_threshold" in raw:
        w["threshold"] = raw["log_threshold"].float().exp()
    if "topk_threshold" in raw:
        w["threshold"] = raw["topk_threshold"].float().expand(len(raw["b_enc"])).clone()
    return w


def _fold_pursuit(cfg: Config, scale: None, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    b_dec = raw["b_dec"] if cfg.subtracts_b_dec else torch.zeros_like(raw["b_dec"])
    return dict(raw) | {"b_enc": torch.zeros(cfg.d_sae), "b_dec": b_dec}
