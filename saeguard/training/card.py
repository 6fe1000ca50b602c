"""The card of an SAE: everything needed to judge it and to make it again, as JSON beside the weights."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from saeguard.sae import SAE
from saeguard.training.corpus import Chunks, CorpusFile
from saeguard.training.evaluate import Evaluation
from saeguard.training.trainer import TrainConfig

FILE = "card.json"


def make_card(
    sae: SAE,
    config: TrainConfig,
    *,
    chunks: Chunks,
    held_out: Chunks,
    evaluation: Evaluation,
    model_source: Mapping[str, Any],
    origins: Mapping[str, Mapping[str, Any]],
    attribution: Sequence[str] = (),
    command: str,
) -> dict[str, Any]:
    """The card as a JSON object; ``origins`` has, per file name, the sources and licences of the text in it, and
    ``attribution`` the lines in which their authors want to be named.
    """
    assert sae.threshold is not None
    return {
        "name": sae.name,
        "site": str(sae.site),
        "model": sae.model,
        "fvu": round(evaluation.fvu, 4),
        "fvu_typical": round(evaluation.fvu_typical, 4),
        "l0": round(evaluation.l0, 2),
        "ce_recovered": round(evaluation.ce_recovered, 4),
        "dead": evaluation.dead,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "activation": f"{sae.activation}, one threshold for all latents: {float(sae.threshold[0]):.6g}",
        "evaluation": {"form": "jumprelu, float32 model", **evaluation.rounded(), "data": data_of(held_out, origins)},
        "training": {
            **asdict(config),
            "prefixes": list(config.prefixes),
            "tokens_seen": config.steps * config.batch,
            "optimizer": "Adam, beta 0.9 and 0.999, gradient norm clipped at 1, unit decoder rows",
            "precision": "bfloat16 matmuls, float32 master weights; activations stored in bfloat16",
            "method": "BatchTopK with aux-k, then a threshold calibrated to the training L0",
        },
        "data": data_of(chunks, origins),
        **shared_facts(command, model_source, attribution),
    }


def shared_facts(command: str, model_source: Mapping[str, Any], attribution: Sequence[str]) -> dict[str, Any]:
    """What every card says: how to make it again, of which model, under which licence, with which versions."""
    return {
        "bos": "Every chunk begins with BOS. BOS and other special tokens were neither trained on nor measured.",
        "command": command,
        "model_weights": dict(model_source),
        "licence": "The weights and these lists are released under Apache-2.0; the texts they were derived from "
        "keep their own licences and are not included.",
        "attribution": list(attribution),
        "versions": {"python": platform.python_version(), **_versions("torch", "transformers", "saeguard")},
    }


def data_of(chunks: Chunks, origins: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What was read: how much, and of each file its hash, sources and licences."""
    return {
        "n_tokens": chunks.n_tokens,
        "context": chunks.ids.shape[1],
        "seed": chunks.seed,
        "fingerprint": _fingerprint(chunks.files),
        "files": [{**asdict(file), **origins.get(file.name, {})} for file in chunks.files],
    }


def _fingerprint(files: Sequence[CorpusFile]) -> str:
    """SHA-256 of the list of files: their names and contents, in order."""
    return hashlib.sha256("".join(f"{file.name} {file.sha256}\n" for file in files).encode()).hexdigest()


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def read_origins(paths: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """Sources and licences of corpus files, from a ``MANIFEST.json`` in their folder or the one above, if there is one.

    The manifest is a list of objects with ``path``, and ``sources`` and ``licences`` as lists of names.
    """
    origins: dict[str, dict[str, Any]] = {}
    for path in map(Path, paths):
        for folder in (path.parent, path.parent.parent):
            manifest = folder / "MANIFEST.json"
            if not manifest.is_file():
                continue
            wanted = path.relative_to(folder).as_posix()
            for row in json.loads(manifest.read_text(encoding="utf-8")):
                if row.get("path") == wanted:
                    origins[path.name] = {key: row[key] for key in ("sources", "licences") if key in row}
            break
    return origins


def read_attribution(paths: Sequence[str | Path]) -> tuple[str, ...]:
    """The list items of an ``ATTRIBUTION.md`` in the files' folder or the one above: all, as it may use other names."""
    lines: dict[str, None] = {}
    for folder in {parent for path in map(Path, paths) for parent in (path.parent, path.parent.parent)}:
        note = folder / "ATTRIBUTION.md"
        if note.is_file():
            text = note.read_text(encoding="utf-8")
            lines |= {line[2:]: None for line in text.splitlines() if line.startswith("- ")}
    return tuple(lines)


def save_card(card: Mapping[str, Any], folder: str | Path) -> Path:
    """Write ``card.json``, whole or not at all."""
    target = Path(folder) / FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, target)
    return target
