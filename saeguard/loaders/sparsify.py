"""EleutherAI's sparsify (once called sae): a folder named as the module whose output it rebuilds, or which it replaces.

    layers.10/cfg.json           k d_in [num_latents expansion_factor activation signed transcode skip_connection]
    layers.10/sae.safetensors    encoder.weight (d_sae, d_in)  encoder.bias  W_dec (d_sae, d_in)  b_dec
                                 [W_skip (d_in, d_in)]
    config.json                  of the whole run, in the folder above: model dataset ctx_len [transcode]

    x - b_dec is encoded, unless cfg.json says transcode (before February 2025 transcoders subtracted it too)
    topk        the k largest of relu(p)              groupmax   the largest of each of k groups of neighbours
    signed      the k largest |p|, signs kept         W_skip     x_hat += x @ W_skip.T, of x as it is

An SAE reads and writes the module's output; a transcoder reads its input and writes its output. The module's: where
a norm follows an MLP or attention (Gemma 2), that is not what the residual stream is given, and no site of ours.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from torch import Tensor

from saeguard.activations import Activation
from saeguard.errors import MissingSite, UnsupportedFormat
from saeguard.loaders import fields
from saeguard.loaders.architectures import norm_follows
from saeguard.loaders.source import Hints, Source, broken
from saeguard.loaders.stored import Piece, Stored, check_specs, matrix
from saeguard.sites import Site

CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
_MODULE = re.compile(
    r"(?:(?:model|transformer|gpt_neox)\.)?(?:layers|h)[._](\d{1,4})(?:\.(mlp|attn|attention|self_attn))?"
)
_WRITES = {None: "resid_post", "mlp": "mlp_out", "attn": "attn_out", "attention": "attn_out", "self_attn": "attn_out"}
_READS = {None: "resid_pre", "mlp": "mlp_in"}
_EMBEDDING = re.compile(r"embed_tokens|embed_in|wte")
_RAW = "the module's own output, which is what it adds to the residual stream only where no norm follows it"


def recognises(source: Source) -> bool:
    """Whether there are a cfg.json and a sae.safetensors with a linear encoder and a W_dec."""
    if source.main not in (None, WEIGHTS) or not source.has(CONFIG, WEIGHTS):
        return False
    return {"encoder.weight", "W_dec"} <= source.keys(WEIGHTS)


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`, `MissingSite`."""
    path, config, folder = source.file(CONFIG), source.json(CONFIG), _module_folder(source)
    run, transcode = _run(folder.parent), bool(fields.flag(path, config, "transcode"))
    said, archive = run.get("model"), source.archive(WEIGHTS)
    model = hints.model or (said if type(said) is str else None)
    d_sae, d_in = matrix(archive, "encoder.weight")
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    if fields.flag(path, config, "skip_connection") or "W_skip" in archive.specs:
        shapes["W_skip"] = (d_in, d_in)
    check_specs(archive, shapes)
    if unknown := set(archive.specs) - set(shapes):
        raise broken(archive.path, f"it holds {short(', '.join(sorted(unknown)))}, which sparsify's coders do not have")
    _check_widths(path, config, d_in, d_sae)
    k = fields.whole(path, config, "k", 1, d_sae)
    if k is None:
        raise broken(path, "it does not say k")
    activation = _activation(path, config)
    transcodes = bool(transcode or "W_skip" in shapes or run.get("transcode") is True or hints.site_out)
    site, site_out, notes = _sites(folder.name, transcodes, hints, model)
    pieces = {
        "W_enc": Piece(archive, "encoder.weight", axis=0, turned=True), "b_enc": Piece(archive, "encoder.bias", axis=0),
        "W_dec": Piece(archive, "W_dec", axis=0), "b_dec": Piece(archive, "b_dec"),
    }  # fmt: skip
    if "W_skip" in shapes:
        pieces["skip"] = Piece(archive, "W_skip", turned=True)
    return Stored(
        family="sparsify", name=_name(source, folder), d_in=d_in, d_sae=d_sae, d_out=d_in, activation=activation,
        top_k=k, pieces=pieces, fold=dict if transcode else _subtract, site=site, site_out=site_out, model=model,
        manifest={"format": "sparsify", "architecture": activation, "bos": hints.overrides.get("prepend_bos"),
                  "folds": [] if transcode else ["b_dec subtracted from the input"], **notes, **_origin(run)},
    )  # fmt: skip


def _module_folder(source: Source) -> Path:
    """The folder named as a module; runs with several seeds have one folder for each in it."""
    folder = source.folder.absolute()
    return folder.parent if re.fullmatch(r"seed\d+", folder.name) else folder


def _name(source: Source, folder: Path) -> str:
    """The run and the module; the hub's cache has the run's name above a folder named by a commit."""
    cached = [part.split("--")[-1] for part in folder.parts if part.startswith("models--")]
    seed = source.folder.absolute().name if source.folder.absolute() != folder else ""
    return "/".join(filter(None, (cached[-1] if cached else folder.parent.name, folder.name, seed)))


def _run(folder: Path) -> dict[str, Any]:
    run = Source(folder).json(RUN) if (folder / RUN).is_file() else {}
    return run if "sae" in run or "ctx_len" in run else {}  # another config.json is none of ours


def _origin(run: Mapping[str, Any]) -> dict[str, Any]:
    named = {"dataset": (run.get("dataset"), str), "context": (run.get("ctx_len"), int)}
    return {key: value for key, (value, kind) in named.items() if type(value) is kind}


def _check_widths(path: Path, config: Mapping[str, Any], d_in: int, d_sae: int) -> None:
    fields.widths(path, config, d_in=d_in)
    factor = fields.whole(path, config, "expansion_factor", 1)
    said = fields.whole(path, config, "num_latents") or d_in * (factor or 32)
    if said != d_sae:
        raise broken(path, f"it says {said} latents, and the encoder has {d_sae}")


def _activation(path: Path, config: Mapping[str, Any]) -> Activation:
    kind, signed = fields.text(path, config, "activation") or "topk", fields.flag(path, config, "signed")
    if kind not in ("topk", "groupmax") or kind == "groupmax" and signed:
        raise UnsupportedFormat(
            f"sparsify folder {path.parent.name}", f"its activation is {short(kind)}{', signed' * bool(signed)}",
            "Known are topk, signed or not, and groupmax.",
        )  # fmt: skip
    return "groupmax" if kind == "groupmax" else "abstopk" if signed else "topk"


def _sites(
    name: str, transcodes: bool, hints: Hints, model: str | None
) -> tuple[Site | None, Site | None, dict[str, Any]]:
    """Where it reads, where it writes if it is a transcoder, and what its manifest says of that."""
    module = _MODULE.fullmatch(name)
    layer = int(module[1]) if module else 0
    normed = bool(module and module[2] and norm_follows(model))
    writes = Site(_WRITES[module[2]], layer) if module and not normed else None
    reads = Site(_READS[module[2]], layer) if module and module[2] in _READS else None
    manifest: dict[str, Any] = {"hookpoint": name} | ({"site_note": _RAW} if module and module[2] else {})
    if transcodes:
        site, site_out = hints.site or reads, hints.site_out or writes
        if site is None or site_out is None:
            raise MissingSite(
                f"transcoder of sparsify folder {name}",
                f"in {model} a norm follows that module, and what is between them is no site" if normed
                else "its name does not say a known site for both its ends",
                "Give site=... and site_out=....",
            )  # fmt: skip
        return site, site_out, manifest
    site = hints.site or writes
    if site is None:
        why = "its name is not that of a block, its MLP or its attention"
        if normed:
            why = f"in {model} a norm follows that module, and what is between them is no site"
        elif _EMBEDDING.fullmatch(name):
            why = "it reads token embeddings; where nothing is added to them or scales them, that is resid_pre.0"
        manifest["site_unknown"] = why
    return site, None, manifest


def _subtract(raw: dict[str, Tensor]) -> dict[str, Tensor]:
    return raw | {"b_enc": raw["b_enc"].float() - raw["b_dec"].float() @ raw["W_enc"].float()}
