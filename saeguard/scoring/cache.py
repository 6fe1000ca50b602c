"""Numbers on disk by what they were made from, so that a second score of the same text costs nothing.

A key is the SHA-256 of everything that the numbers depend on: the model's and the SAE's weights, the token ids, the
settings. A file is written whole or not at all; one that cannot be read counts as not there.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from saeguard import strict_json
from saeguard.archives import open_archive
from saeguard.errors import LoadError
from saeguard.wheels import cache_folder

logger = logging.getLogger("saeguard.scoring")


class Entry(NamedTuple):
    """What one file holds."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Cache:
    """One folder of such files."""

    folder: Path

    @classmethod
    def default(cls) -> "Cache":
        """The one of this user: ``scores`` in the folder where models are kept."""
        return cls(cache_folder() / "scores")

    def read(self, key: str) -> Entry | None:
        """What was written under ``key``, or None."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            archive = open_archive(path)
            meta = strict_json.parse(archive.values["saeguard"])
            return Entry({name: archive.read(name).clone() for name in archive.specs}, meta)
        except (LoadError, KeyError, ValueError, OSError) as error:
            logger.warning("%s cannot be read (%s) and is made again", path, error)
            return None

    def write(self, key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        """Put ``tensors`` under ``key``, in place of what was there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(key)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial,
                      metadata={"saeguard": json.dumps(dict(meta), sort_keys=True)})  # fmt: skip
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def drop(self, key: str) -> None:
        """Remove what was written under ``key``."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def key_of(**parts: Any) -> str:
    """The key of numbers that depend on ``parts`` and on nothing else."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
