"""The seven classes of the library dictionary_learning, SAEBench's SAEs among them: one file of weights and a config.

    trainer_20/config.json    {"trainer": {"dict_class" or only "trainer_class", "lm_name", "submodule_name", "layer",
                               "k", ...}, "buffer": {"io", "ctx_len", ...}}
    trainer_20/ae.pt          encoder.weight (d_sae, d_in)  encoder.bias  decoder.weight (d_in, d_sae), and by class
                              (JumpRelu and Matryoshka instead W_enc (d_in, d_sae)  b_enc  W_dec (d_sae, d_in)  b_dec)

    AutoEncoder             bias                                 relu((x - bias) W + b)
    AutoEncoderNew          decoder.bias                         relu(x W + b)
    GatedAutoEncoder        decoder_bias r_mag gate_bias mag_bias, no encoder.bias
                            z = (x - bias) W                     (z + gate > 0) relu(e^r z + mag)
    JumpReluAutoEncoder     threshold (d_sae)                    relu(p where p > threshold), p = x W + b
    AutoEncoderTopK         b_dec k [threshold]                  the k largest of relu((x - b_dec) W + b)
    BatchTopKSAE            b_dec k threshold                    p where p > threshold, p = relu((x - b_dec) W + b)
    MatryoshkaBatchTopKSAE  k threshold group_sizes              the same

What is taken off x is folded into b_enc, and Gated is a jump: W e^r, mag, threshold mag - e^r gate. A scalar threshold
below 0 was never set, and leaves a ReLU. Activations are in the units of the stored weights: the library's own loader
rescales an AutoEncoder's to decoder rows of length 1. Without a config, the names of the tensors have to say the class.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from saeguard.activations import Activation
from saeguard.archives import Archive
from saeguard.errors import MissingSite, UnsupportedFormat
from saeguard.loaders import fields
from saeguard.loaders.architectures import norm_follows
from saeguard.loaders.source import Hints, Source, broken
from saeguard.loaders.stored import Fold, Piece, Stored, check_specs, matrix
from saeguard.sites import Site

CONFIG = "config.json"
_FILES = r".+\.(?:pth|pt|safetensors)"
_ALONE_FILE = r"(?!layer\d+\.sae\.pt).+\.(?:pth|pt)"  # the exception is Qwen-Scope's


@dataclass(frozen=True)
class Class:
    """``linear``: weights are those of torch's layers, (out, in). ``subtracts``: b_dec is taken off x first."""

    b_dec: str
    linear: bool = True
    subtracts: bool = True
    gated: bool = False
    jumps: bool = False
    ranks: bool = False
    scalar: bool = False
    groups: bool = False

    @property
    def required(self) -> frozenset[str]:
        """Names of the tensors that have to be there."""
        names = {"encoder.weight", "encoder.bias", "decoder.weight"} if self.linear else {"W_enc", "b_enc", "W_dec"}
        if self.gated:
            names = names - {"encoder.bias"} | {"r_mag", "gate_bias", "mag_bias"}
        names |= {"threshold"} if self.jumps else set()
        return frozenset(names | {self.b_dec} | ({"group_sizes"} if self.groups else set()))

    @property
    def optional(self) -> frozenset[str]:
        """Names of those that may be."""
        return frozenset({"k", "threshold"} if self.ranks or self.scalar else ())


CLASSES = {
    "AutoEncoder": Class("bias"),
    "AutoEncoderNew": Class("decoder.bias", subtracts=False),
    "GatedAutoEncoder": Class("decoder_bias", gated=True),
    "JumpReluAutoEncoder": Class("b_dec", linear=False, subtracts=False, jumps=True),
    "AutoEncoderTopK": Class("b_dec", ranks=True),
    "BatchTopKSAE": Class("b_dec", scalar=True),
    "MatryoshkaBatchTopKSAE": Class("b_dec", linear=False, scalar=True, groups=True),
}
_TRAINERS = {
    "StandardTrainer": "AutoEncoder", "StandardTrainerAprilUpdate": "AutoEncoder", "PAnnealTrainer": "AutoEncoder",
    "GatedSAETrainer": "GatedAutoEncoder", "GatedAnnealTrainer": "GatedAutoEncoder",
    "JumpReluTrainer": "JumpReluAutoEncoder", "TopKTrainer": "AutoEncoderTopK", "BatchTopKTrainer": "BatchTopKSAE",
    "MatryoshkaBatchTopKTrainer": "MatryoshkaBatchTopKSAE",
}  # fmt: skip
_ALONE = {CLASSES[name].required: name for name in ("AutoEncoder", "GatedAutoEncoder")} | {
    CLASSES["MatryoshkaBatchTopKSAE"].required | {"k", "threshold"}: "MatryoshkaBatchTopKSAE"
}
_TOPK = CLASSES["AutoEncoderTopK"].required | {"k", "threshold"}
_PLAIN = frozenset({"W_enc", "b_enc", "W_dec", "b_dec"})
_PCA = frozenset({"W_enc", "W_dec", "mean"})
_REFUSED_ALONE = {
    _TOPK: ("AutoEncoderTopK and BatchTopKSAE have the same tensors, and only a config says which it is",
            "Put its config.json next to it."),
    _PLAIN: ("nothing says what its latents do with these weights: SAEBench's custom SAEs take b_dec off x or do not, "
             "and the identity has the same tensors", "Save it with saeguard.save_sae, which records that."),
    _PLAIN | {"threshold"}: (
        "its class and SAELens's SAEs have the same tensors, and only the first take no b_dec off x",
        "Put its config.json next to it.",
    ),
    _PCA: ("it is SAEBench's PCA, a change of basis: every latent is active at every token, and there is no gate",
           "Use an SAE."),
}  # fmt: skip

_PLACE = re.compile(r"(resid_pre|resid_post|resid_out|mlp_out|attn_out|attention_out)_layer_?(\d{1,4})")
_STREAMS = {"resid_out": "resid_post", "attention_out": "attn_out"}


def trainer(source: Source) -> dict[str, Any] | None:
    """What config.json says of how it was trained, None where there is no such config. Raises `BrokenFile`."""
    found = source.json(CONFIG).get("trainer") if source.has(CONFIG) else None
    return found if isinstance(found, dict) and ("dict_class" in found or "trainer_class" in found) else None


def recognises(source: Source) -> bool:
    """Whether there is a config of dictionary_learning beside a plain state dict, or one whose tensors say enough."""
    file = _file(source)
    if file is None:
        return False
    keys = source.keys(file)
    if trainer(source) is None:
        said = any(source.has(name) for name in (CONFIG, "cfg.json", f"{file.rpartition('.')[0]}_cfg.json"))
        alone = re.fullmatch(_ALONE_FILE, file) is not None and (keys in _ALONE or keys in _REFUSED_ALONE)
        return alone and not (said and "W_enc" in keys)
    weights = {"encoder.weight", "decoder.weight"} <= keys or {"W_enc", "W_dec"} <= keys
    return weights and "activation_mean" not in keys


def open(source: Source, hints: Hints) -> Stored:
    """Raises `BrokenFile`, `UnsupportedFormat`, `MissingSite`."""
    file = _file(source)
    assert file is not None
    archive, about = source.archive(file), trainer(source)
    name = _class(source, archive, about)
    kind = CLASSES[name]
    d_in, d_sae = _check(archive, kind)
    path, about = source.file(CONFIG), about or {}
    fields.widths(path, about, activation_dim=d_in, dict_size=d_sae)
    model = hints.model or fields.text(path, about, "lm_name")
    site, origin = _origin(source, about, model)
    activation, pieces, folds, notes = _parts(archive, kind, _threshold(archive, kind))
    return Stored(
        family="dictionary_learning", name="/".join(Path(os.path.abspath(archive.path)).parent.parts[-2:]),
        pieces=pieces, d_in=d_in, d_sae=d_sae, d_out=d_in, activation=activation, fold=_fold(kind.subtracts),
        top_k=_top_k(path, archive, about) if kind.ranks else None,
        site=hints.site or site, site_out=_site_out(source, hints), model=model,
        manifest={"format": "dictionary_learning", "architecture": name, "bos": hints.overrides.get("prepend_bos"),
                  "folds": folds} | origin | notes,
    )  # fmt: skip


def _file(source: Source) -> str | None:
    if source.main is None and source.has("ae.pt"):
        return "ae.pt"
    names = source.matching(_FILES)
    return names[0] if len(names) == 1 else None


def _class(source: Source, archive: Archive, about: Mapping[str, Any] | None) -> str:
    keys = frozenset(archive.specs)
    if about is None:
        if keys in _REFUSED_ALONE:
            raise UnsupportedFormat(f"SAE file {archive.path.name} alone", *_REFUSED_ALONE[keys])
        return _ALONE[keys]
    path = source.file(CONFIG)
    trained_by = fields.text(path, about, "trainer_class")
    name = fields.text(path, about, "dict_class") or _TRAINERS.get(trained_by or "", trained_by)
    if name not in CLASSES:
        raise UnsupportedFormat(
            f"dictionary {archive.path.name} of class {short(name)}", "this version does not know what it computes",
            f"It reads {', '.join(CLASSES)}.",
        )  # fmt: skip
    if CLASSES[name].scalar and "threshold" not in keys:
        raise UnsupportedFormat(
            f"dictionary {archive.path.name} of class {name}",
            "it stores no threshold, and without one a latent depends on the other tokens of its batch",
            "Use one that was saved with its threshold.",
        )
    return name


def _check(archive: Archive, kind: Class) -> tuple[int, int]:
    """d_in and d_sae of weights that are those of the class."""
    names = set(archive.specs)
    if not kind.required <= names <= kind.required | kind.optional:
        raise broken(archive.path, f"its tensors are {short(sorted(names))}, not {sorted(kind.required)}")
    shape = matrix(archive, "encoder.weight" if kind.linear else "W_enc")
    d_in, d_sae = reversed(shape) if kind.linear else shape
    special: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae), "W_enc": (d_in, d_sae),
        "W_dec": (d_sae, d_in), kind.b_dec: (d_in,), "threshold": (d_sae,) if kind.jumps else (),
    }  # fmt: skip
    floats = names - {"k", "group_sizes"}
    check_specs(archive, {name: special.get(name, (d_sae,)) for name in floats})
    if kind.groups and sum(_integers(archive, "group_sizes")) != d_sae:
        raise broken(archive.path, f"group_sizes do not add up to {d_sae} latents")
    return d_in, d_sae


def _integers(archive: Archive, name: str) -> list[int]:
    spec = archive.specs[name]
    if spec.dtype not in (torch.int32, torch.int64) or len(spec.shape) > 1 or spec.n_bytes > 65536:
        raise broken(archive.path, f"{name} is {spec.shape} {spec.dtype}, not whole numbers")
    return archive.read(name).reshape(-1).tolist()


def _top_k(path: Path, archive: Archive, about: Mapping[str, Any]) -> int:
    stored = _integers(archive, "k") if "k" in archive.specs else []
    said = fields.whole(path, about, "k", low=1)
    found = {*stored, *([] if said is None else [said])}
    if len(stored) > 1 or len(found) != 1:
        raise broken(archive.path, f"k is {stored or 'not there'}, and {said} in {CONFIG}")
    return found.pop()


def _threshold(archive: Archive, kind: Class) -> float | None:
    """The one threshold of all latents, where there is one."""
    if kind.jumps or "threshold" not in archive.specs:
        return None
    value = float(archive.read("threshold"))
    if not math.isfinite(value):
        raise broken(archive.path, f"threshold is {value}")
    return value


def _parts(
    archive: Archive, kind: Class, threshold: float | None
) -> tuple[Activation, dict[str, Piece], list[str], dict[str, Any]]:
    """Activation, pieces, what their fold does, and what the manifest says of a scalar threshold."""
    if kind.linear:
        pieces = {"W_enc": Piece(archive, "encoder.weight", 0, turned=True),
                  "W_dec": Piece(archive, "decoder.weight", 1, turned=True)}  # fmt: skip
    else:
        pieces = {"W_enc": Piece(archive, "W_enc", 1), "W_dec": Piece(archive, "W_dec", 0)}
    pieces["b_dec"] = Piece(archive, kind.b_dec)
    folds = [f"{kind.b_dec} subtracted"] if kind.subtracts else []
    if kind.gated:
        pieces |= {key: Piece(archive, key, 0) for key in ("r_mag", "gate_bias", "mag_bias")}
        return "jumprelu", pieces, [*folds, "gate"], {}
    pieces["b_enc"] = Piece(archive, "encoder.bias" if kind.linear else "b_enc", 0)
    if kind.jumps:
        pieces["threshold"] = Piece(archive, "threshold", 0)
        return "jumprelu", pieces, folds, {}
    if threshold is None:
        return "topk" if kind.ranks else "relu", pieces, folds, {}
    is_set = threshold >= 0
    notes: dict[str, Any] = {"threshold": threshold if is_set else "never set"}
    if kind.ranks:
        return "topk", pieces, folds, notes
    if not is_set:
        return "relu", pieces, folds, notes | {"threshold": f"never set ({threshold:g}), so it is a plain ReLU"}
    pieces["threshold"] = Piece(archive, "threshold")
    return "jumprelu", pieces, folds, notes


def _fold(subtracts: bool) -> Fold:
    def fold(raw: dict[str, Tensor]) -> dict[str, Tensor]:
        t = {name: raw[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold") if name in raw}
        if "r_mag" in raw:
            gain = raw["r_mag"].float().exp()
            t["W_enc"], t["b_enc"] = raw["W_enc"].float() * gain, raw["mag_bias"].float()
            t["threshold"] = t["b_enc"] - gain * raw["gate_bias"].float()
        if "threshold" in t:
            t["threshold"] = t["threshold"].float().clamp_min(0.0).expand(t["b_enc"].shape[0]).clone()
        if subtracts:
            t["b_enc"] = t["b_enc"].float() - t["b_dec"].float() @ t["W_enc"].float()
        return t

    return fold


def _origin(source: Source, about: Mapping[str, Any], model: str | None) -> tuple[Site | None, dict[str, Any]]:
    """Where it reads, and what the manifest says of its training; the path speaks where the config does not."""
    path, buffer = source.file(CONFIG), _buffer(source)
    notes = {"trainer": fields.text(path, about, "trainer_class"), "context": fields.whole(path, buffer, "ctx_len")}
    notes = {key: value for key, value in notes.items() if value is not None}
    named, layer = fields.text(path, about, "submodule_name"), fields.whole(path, about, "layer")
    folders = [] if named is not None else [*reversed(Path(os.path.abspath(source.folder)).parts)]
    place = next((match for text in [named or "", *folders] if (match := _PLACE.fullmatch(text))), None)
    if place is None:
        why = f"submodule_name is {short(named)}" if named else "neither config.json nor the path names a submodule"
        return None, notes | {"site_unknown": why}
    if named is not None and layer not in (None, int(place[2])):
        raise broken(path, f"submodule_name is {short(named)}, and layer is {layer}")
    stream = _STREAMS.get(place[1], place[1])
    if fields.text(path, buffer, "io") == "in" and stream != "resid_post":
        return None, notes | {"site_unknown": f"it reads the input of the module {place[0]}"}
    if stream in ("mlp_out", "attn_out") and norm_follows(model):
        return None, notes | {"site_unknown": f"{place[0]} of {model} is before the norm behind the module"}
    return Site("resid_pre" if buffer.get("io") == "in" else stream, int(place[2])), notes


def _buffer(source: Source) -> dict[str, Any]:
    return fields.table(source.file(CONFIG), source.json(CONFIG), "buffer") if source.has(CONFIG) else {}


def _site_out(source: Source, hints: Hints) -> Site | None:
    if _buffer(source).get("io") == "in_and_out" and not (hints.site and hints.site_out):
        raise MissingSite(
            f"dictionary {source.folder.name}",
            "it was trained from the input of a module to its output, and which streams these are is not said",
            "Give both: load_sae(..., site=..., site_out=...).",
        )
    return hints.site_out
