"""circuit-tracer's per-layer transcoders: one file for each layer, and beside them a config that names two hooks.

    config.yaml                   model_name  model_kind: transcoder_set  feature_input_hook  feature_output_hook
                                  [activation: relu | topk, k]
    wandb-config.yaml             {name: {value: ...}}, in some repositories called wanb-config.yaml
    layer_{i}.safetensors         W_enc (d_sae, d_in)  b_enc  W_dec (d_sae, d_out)  b_dec  [W_skip (d_out, d_in)]
                                  [activation_function.threshold] [k]

    f = act(x @ W_enc.T + b_enc)                          x_hat = f @ W_dec + b_dec [+ x @ W_skip.T]
    act: with a threshold p where p > threshold, with topk the k largest p, either without a ReLU, else ReLU

    mlp.hook_in -> mlp_in        ln2.hook_normalized -> mlp_normed        hook_resid_mid -> resid_mid
    hook_mlp_out -> mlp_out      mlp.hook_out -> mlp_out, where no norm follows the MLP

Older files hold W_dec transposed, which b_enc tells. Which of a folder's layers is meant, ``site=`` says.
"""

import re
from collections.abc import Mapping
from typing import Any

from saeguard.activations import Activation
from saeguard.archives import Archive
from saeguard.errors import MissingSite, SiteNotFound, UnsupportedFormat
from saeguard.loaders.architectures import norm_follows
from saeguard.loaders.fields import table, text, whole
from saeguard.loaders.source import Hints, Source, broken
from saeguard.loaders.stored import Piece, Stored, check_specs
from saeguard.sites import Site

CONFIG = "config.yaml"
FILES = r"layer_(\d{1,4})\.safetensors"
_NEEDED = {"W_enc", "b_enc", "W_dec", "b_dec"}
_THRESHOLD, _SKIP, _K = "activation_function.threshold", "W_skip", "k"
_RUN = ("wandb-config.yaml", "wanb-config.yaml")
_RUN_KEYS = ("d_model", "d_feature", "batch_size", "before_ln")
# Models with a norm between the MLP and the residual stream, where mlp.hook_out is not what the MLP adds to it.
_QWEN = re.compile(r"qwen3-(\d{1,3}(?:\.\d)?)b-transcoders(?:-\w+)?")


def recognises(source: Source) -> bool:
    """Whether the file, or the folder's first, is ``layer_{i}.safetensors`` with two matrices and their biases."""
    names = source.matching(FILES)
    return bool(names) and source.keys(names[0]) >= _NEEDED and "saeguard" not in source.archive(names[0]).values


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`; `MissingSite` where no config names two streams."""
    wanted = hints.site or hints.site_out
    file = source.one(FILES, wanted.layer if wanted else None)
    layer, archive = int((re.fullmatch(FILES, file) or [0, 0])[1]), source.archive(file)
    d_in, d_sae, d_out, turned = _shapes(archive)
    config = source.yaml(CONFIG) if source.has(CONFIG) else {}
    kind = text(source.file(CONFIG), config, "model_kind")
    if kind not in (None, "transcoder_set"):
        raise UnsupportedFormat(
            f"circuit-tracer folder {_folder(source)}", f"its model_kind is {kind!r}", "Read is transcoder_set."
        )
    model = hints.model or text(source.file(CONFIG), config, "model_name") or _named(source)
    site, site_out = _sites(source, config, hints, layer, model)
    activation, top_k = _activation(source, config, archive, hints)
    pieces = {
        "W_enc": Piece(archive, "W_enc", axis=0, turned=True), "b_enc": Piece(archive, "b_enc", axis=0),
        "W_dec": Piece(archive, "W_dec", axis=1 if turned else 0, turned=turned), "b_dec": Piece(archive, "b_dec"),
    }  # fmt: skip
    if activation == "jumprelu":
        pieces["threshold"] = Piece(archive, _THRESHOLD, axis=0)
    if _SKIP in archive.specs:
        pieces["skip"] = Piece(archive, _SKIP, turned=True)
    return Stored(
        family="circuit_tracer", name=f"{_folder(source)}/layer_{layer}", pieces=pieces,
        d_in=d_in, d_sae=d_sae, d_out=d_out, activation=activation, top_k=top_k,
        site=site, site_out=site_out, model=model, manifest=_manifest(source, hints, activation),
    )  # fmt: skip


def _shapes(archive: Archive) -> tuple[int, int, int, bool]:
    """d_in, d_sae, d_out, and whether W_dec is transposed; a square W_dec is as the format is now."""
    if unknown := sorted(set(archive.specs) - _NEEDED - {_THRESHOLD, _SKIP, _K}):
        raise broken(archive.path, f"tensors {unknown}, which circuit-tracer's transcoders do not have")
    shapes = {name: archive.specs[name].shape for name in _NEEDED}
    if any(len(shapes[name]) != axes for name, axes in (("W_enc", 2), ("b_enc", 1), ("b_dec", 1))):
        raise broken(archive.path, f"W_enc, b_enc and b_dec are {[shapes[n] for n in ('W_enc', 'b_enc', 'b_dec')]}")
    d_in, d_sae, d_out = shapes["W_enc"][1], shapes["b_enc"][0], shapes["b_dec"][0]
    turned = shapes["W_dec"] != (d_sae, d_out) and shapes["W_dec"] == (d_out, d_sae)
    expected = {"W_enc": (d_sae, d_in), "b_enc": (d_sae,), "W_dec": (d_out, d_sae) if turned else (d_sae, d_out),
                "b_dec": (d_out,), _THRESHOLD: (d_sae,), _SKIP: (d_out, d_in)}  # fmt: skip
    check_specs(archive, {name: shape for name, shape in expected.items() if name in archive.specs})
    return d_in, d_sae, d_out, turned


def _sites(source: Source, config: Mapping[str, Any], hints: Hints, layer: int, model: str | None) -> tuple[Site, Site]:
    reads = hints.site or _site(layer, text(source.file(CONFIG), config, "feature_input_hook"))
    hook_out = text(source.file(CONFIG), config, "feature_output_hook")
    writes = hints.site_out or _site(layer, hook_out)
    if writes is None and hook_out == "mlp.hook_out" and model and not norm_follows(model):
        writes = Site("mlp_out", layer)
    if reads and writes:
        return reads, writes
    hooks = [f"{key} {config.get(key)!r}" for key in ("feature_input_hook", "feature_output_hook")]
    after = " (mlp.hook_out is one only where no norm follows the MLP)" if hook_out == "mlp.hook_out" else ""
    raise MissingSite(
        f"circuit-tracer transcoder of layer {layer} in {_folder(source)}",
        f"{CONFIG} has {' and '.join(hooks)}, not two streams of ours{after}" if config else f"there is no {CONFIG}",
        f"Say site=... and site_out=..., such as mlp_in.{layer} and mlp_out.{layer}.",
    )


def _site(layer: int, hook: str | None) -> Site | None:
    try:
        return Site.parse(f"blocks.{layer}.{hook}") if hook else None
    except SiteNotFound:
        return None


def _activation(
    source: Source, config: Mapping[str, Any], archive: Archive, hints: Hints
) -> tuple[Activation, int | None]:
    said, has_threshold = text(source.file(CONFIG), config, "activation"), _THRESHOLD in archive.specs
    asked = f"circuit-tracer transcoder {archive.path.name} in {_folder(source)}"
    top_k = _top_k(source, config, archive)
    if said not in (None, "relu", "topk", "jumprelu", "jump_relu"):
        raise UnsupportedFormat(asked, f"its activation is {said!r}", "Read are relu, topk and jumprelu.")
    ranks = said == "topk" or said is None and not has_threshold and (_K in archive.specs or hints.top_k is not None)
    if has_threshold and said in ("relu", "topk") or not has_threshold and said in ("jumprelu", "jump_relu"):
        there = "there" if has_threshold else "not there"
        raise broken(archive.path, f"its activation is {said}, and {_THRESHOLD} is {there}")
    if said is None and top_k is not None and not ranks:
        raise UnsupportedFormat(
            asked, f"it says k {top_k} and no activation, so whether it ranks is open",
            "Say it in config.yaml, activation: topk or relu, or with top_k=....",
        )  # fmt: skip
    if not ranks:
        return ("jumprelu" if has_threshold else "relu"), None
    if top_k is None and hints.top_k is None:
        raise UnsupportedFormat(asked, "its activation is topk, and nothing says k", "Say it: top_k=....")
    return "topk_norelu", top_k or hints.top_k


def _top_k(source: Source, config: Mapping[str, Any], archive: Archive) -> int | None:
    said = whole(source.file(CONFIG), config, "k", low=1)
    if said is None and _K in archive.specs:
        tensor = archive.read(_K) if archive.specs[_K].shape in ((), (1,)) else None
        if tensor is None or tensor.is_floating_point() or not 0 < int(tensor) < 1 << 31:
            raise broken(archive.path, f"k is {archive.specs[_K]}, not one whole number from 1")
        return int(tensor)
    return said


def _manifest(source: Source, hints: Hints, activation: Activation) -> dict[str, Any]:
    manifest = {"format": "circuit_tracer", "architecture": activation, "folds": [],
                "bos": hints.overrides.get("prepend_bos")}  # fmt: skip
    for name in _RUN:
        run = source.yaml(name) if source.has(name) else {}
        values = {key: table(source.file(name), run, key).get("value") for key in _RUN_KEYS}
        manifest |= {key: value for key, value in values.items() if type(value) in (bool, int)}
    return manifest


def _folder(source: Source) -> str:
    """The repository's name, which the hub's cache has above a snapshot, or the folder's."""
    parts = source.folder.absolute().parts
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    return cached[-1] if cached else parts[-1]


def _named(source: Source) -> str | None:
    """Some repositories have no config, and only their name says the model."""
    found = _QWEN.fullmatch(_folder(source))
    return f"Qwen/Qwen3-{found[1]}B" if found else None
