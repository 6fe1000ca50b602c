"""Which repository and path a published SAE's release and id stand for, and what its own files do not say.

    find("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
        Release(repo="jbloom/GPT2-Small-SAEs-Reformatted", path="blocks.8.hook_resid_pre", family="saelens",
                model="gpt2", overrides={"center_writing_weights": True})

The names, places and overrides are those of sae-lens 6.54.12 (pretrained_saes.yaml and its loaders), with models by
their names on the hub. Nothing is downloaded here.

    assets/releases.json.gz    {release: {repo, model, family, ids: [...], paths: [...] or "folder/{}",
                                          overrides: {...}, overrides_by_id: {id: {...}}}}
"""

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from saeguard.errors import UnsupportedFormat

TABLE = Path(__file__).parent.parent / "assets" / "releases.json.gz"


@dataclass(frozen=True)
class Release:
    """Where one SAE lies on the hub, and how to read it."""

    repo: str
    path: str
    """A folder or a file in ``repo``; of ``circuit_tracer_clt``, the number of a layer."""
    family: str
    """The layout of its files, whether this version reads it or not."""
    model: str | None
    """The hub's name of the model it was trained on."""
    overrides: Mapping[str, Any]
    """Facts that are in none of its files.

    ``center_writing_weights`` and ``normalize_activations`` mean what they do in a SAELens config. ``prepend_bos`` is
    what SAELens assumes of files that do not say; Qwen's tokenizers have no BOS token, so it is left out there.
    ``norm_scaling_factor`` multiplies the input where the files ask for ``expected_average_only_in``; it is left out
    where they hold the average norm themselves (``llama_scope``, ``temporal``).
    """


def releases() -> tuple[str, ...]:
    """Names of all known releases, sorted."""
    return tuple(_table())


def ids(release: str) -> tuple[str, ...]:
    """Ids of the SAEs of a release, layers in order. Raises `UnsupportedFormat` for a release not known."""
    return tuple(_entry(release, f"the ids of release {release!r}")["ids"])


def find(release: str, sae_id: str) -> Release:
    """Look up one SAE. Raises `UnsupportedFormat` when the release or the id is not known."""
    asked = f"SAE {sae_id!r} of release {release!r}"
    entry = _entry(release, asked)
    known, paths = entry["ids"], entry["paths"]
    if sae_id not in known:
        raise UnsupportedFormat(
            asked,
            f"{release} has {len(known)} SAE{'s' * (len(known) > 1)} and none with that id",
            _suggest(get_close_matches(sae_id, known, n=5), f"releases.ids({release!r})"),
        )
    path = paths.replace("{}", sae_id) if isinstance(paths, str) else paths[known.index(sae_id)]
    overrides = entry.get("overrides", {}) | entry.get("overrides_by_id", {}).get(sae_id, {})
    return Release(entry["repo"], path, entry["family"], entry["model"], MappingProxyType(overrides))


def by_place(repo: str, path: str) -> Release | None:
    """The published SAE that lies at ``path`` in ``repo``, or in a folder above it; None where none is known."""
    known = _places().get(repo, {})
    parts = path.rstrip("/").split("/")
    for end in range(len(parts), 0, -1):
        if (found := known.get("/".join(parts[:end]))) is not None:
            return find(*found)
    return None


@cache
def _places() -> dict[str, dict[str, tuple[str, str]]]:
    """Release and id by repository and path; of an SAE with two names the one about which more is known."""
    places: dict[str, dict[str, tuple[str, str]]] = {}
    for release, entry in _table().items():
        for number, sae_id in enumerate(entry["ids"]):
            paths = entry["paths"]
            path = paths.replace("{}", sae_id) if isinstance(paths, str) else paths[number]
            here = places.setdefault(entry["repo"], {})
            if path not in here or len(find(release, sae_id).overrides) > len(find(*here[path]).overrides):
                here[path] = (release, sae_id)
    return places


@cache
def _table() -> dict[str, Any]:
    return json.loads(gzip.decompress(TABLE.read_bytes()))


def _entry(release: str, asked: str) -> dict[str, Any]:
    table = _table()
    if release in table:
        return table[release]
    close = [name for name in table if table[name]["repo"] == release] or get_close_matches(release, table, n=5)
    raise UnsupportedFormat(
        asked, f"none of the {len(table)} known releases has that name", _suggest(close, "releases.releases()")
    )


def _suggest(close: Iterable[str], listing: str) -> str:
    names = ", ".join(close)
    return f"Close to it: {names}." if names else f"All are in saeguard.loaders.{listing}."
