"""Layouts that are known and not read, so that the error says why instead of that nobody knows them.

    params_layer_{i}.safetensors    w_dec with 3 axes                         Gemma Scope 2 crosscoder or CLT
    W_enc_{i} and W_dec_{i}.safetensors                                       circuit-tracer's cross-layer transcoder
    config.yaml alone               model_kind                                circuit-tracer's list of other files
    cfg.json, cc_weights.pt         W_enc with 3 axes                         crosscoder between two models
    config.json, model.safetensors  encoder.weight with 3 axes                crosscoder of dictionary_learning's heirs
    conf.yaml, latest_ckpt.safetensors    D b attn_layers.*                   temporal SAE
    cfg.json, sae.safetensors       xs ys                                     ITDA transcoder
    ae.pt                           step ae.* optimizer.*                     a training run that was interrupted
    *.pkl, *.pkl.gz                                                           a pickle without torch's file around it

The archives themselves refuse pickles that name code, whichever family looks into them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from saeguard.errors import UnsupportedFormat
from saeguard.loaders.source import Hints, Source
from saeguard.loaders.stored import Stored

_SEVERAL = "Use an SAE or a transcoder of one site."
_WEIGHTS = r".+\.(?:safetensors|pt|pth|npz)"
_PICKLES = r".+\.(?:pkl|pickle)(?:\.gz)?"


@dataclass(frozen=True)
class Refusal:
    """One layout: the test that it is this one, why it is not read, and what to do instead."""

    name: str
    test: Callable[[Source], bool]
    found: str
    proceed: str


def recognises(source: Source) -> bool:
    """Whether it is one of these layouts."""
    return any(refusal.test(source) for refusal in REFUSALS)


def open(source: Source, hints: Hints) -> Stored:
    """Raises `UnsupportedFormat`, always."""
    refusal = next(refusal for refusal in REFUSALS if refusal.test(source))
    raise UnsupportedFormat(f"{refusal.name} {source.path.name}", refusal.found, refusal.proceed)


def _axes(source: Source, file: str, tensor: str) -> int:
    """How many axes a tensor has, 0 where it is not there."""
    return len(source.archive(file).specs[tensor].shape) if tensor in source.keys(file) else 0


def _gemma_scope_2(source: Source) -> bool:
    names = [source.main] if source.main else source.matching(r"params(?:_layer_\d+)?\.safetensors")[:1]
    if not names or not names[0].endswith(".safetensors"):
        return False
    return bool(_axes(source, names[0], "w_enc")) and (
        re.fullmatch(r"params_layer_\d+\.safetensors", names[0]) is not None or _axes(source, names[0], "w_dec") == 3
    )


def _circuit_tracer(source: Source) -> bool:
    names = source.matching(r"W_(?:enc|dec)_\d+\.safetensors")
    return bool(names) and names[0].removesuffix(".safetensors") in source.keys(names[0])


def _circuit_tracer_list(source: Source) -> bool:
    if source.main or not source.has("config.yaml") or source.matching(_WEIGHTS):
        return False
    return "model_kind" in source.yaml("config.yaml")


def _two_models(source: Source) -> bool:
    return source.has("cfg.json") and any(
        _axes(source, name, "W_enc") == 3 for name in source.matching(r"cc_weights\.pt")
    )


def _several_layers(source: Source) -> bool:
    return any(_axes(source, name, "encoder.weight") == 3 for name in source.matching(r"model\.safetensors"))


def _temporal(source: Source) -> bool:
    return any(
        {"D", "b"} <= source.keys(name) and any(key.startswith("attn_layers.") for key in source.keys(name))
        for name in source.matching(r"latest_ckpt\.safetensors")
    )


def _itda_transcoder(source: Source) -> bool:
    return any({"xs", "ys"} <= source.keys(name) for name in source.matching(r"sae\.safetensors"))


def _interrupted(source: Source) -> bool:
    names = [source.main] if source.main and source.main.endswith(".pt") else source.matching(r"ae\.pt")
    tops = {key.partition(".")[0] for name in names for key in (*source.keys(name), *source.archive(name).values)}
    return {"step", "ae", "optimizer"} <= tops


def _pickle(source: Source) -> bool:
    return bool(source.matching(_PICKLES)) and not source.matching(_WEIGHTS)


REFUSALS = (
    Refusal("Gemma Scope 2 crosscoder or CLT", _gemma_scope_2, "it reads or writes several layers at once", _SEVERAL),
    Refusal(
        "circuit-tracer CLT", _circuit_tracer,
        "it is a cross-layer transcoder: a latent writes to its own layer and to all that follow",
        "Use per-layer transcoders (model_kind: transcoder_set).",
    ),
    Refusal(
        "circuit-tracer folder", _circuit_tracer_list, "its config.yaml lists weights that lie elsewhere",
        "Load one of the files that it lists, as hf://owner/repo/path.",
    ),
    Refusal("crosscoder", _two_models, "it reads and writes two models at once", "Use an SAE of one model."),
    Refusal("crosscoder", _several_layers, "it reads and writes several models or layers at once", _SEVERAL),
    Refusal(
        "temporal SAE", _temporal,
        "what it predicts at a token depends on all tokens before it, through attention of its own",
        "Use an SAE that looks at one token at a time.",
    ),
    Refusal(
        "ITDA transcoder", _itda_transcoder, "its activations are found by gradient pursuit, which is not read",
        "Use ITDA dictionaries with atoms.pt.",
    ),
    Refusal(
        "dictionary_learning backup", _interrupted,
        "a training run saved it midway, with its optimizer and before the scale of its inputs was folded in",
        "Use the ae.pt that the run saves at its end, or between its checkpoints.",
    ),
    Refusal(
        "pickle", _pickle, "only code can read it, and code in files is never run",
        "Where its maker can be trusted, save its plain tensors again with torch.save, or as safetensors.",
    ),
)  # fmt: skip
