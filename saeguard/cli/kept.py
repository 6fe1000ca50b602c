"""What a long command has done, one JSON file per part, beside the file that it will write in the end.

Parts are kept under a hash of all that the command depends on: given again, it goes on with what is missing; with other
settings it begins anew. They go when the command has ended.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeguard.cli.unlearning import write_document
from saeguard.errors import BrokenFile


@dataclass
class Kept(MutableMapping[str, Any]):
    """Parts by name; in memory alone where there is no ``target`` to keep them beside."""

    target: Path | None
    about: Any
    parts: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        if name not in self.parts:
            self.parts[name] = self._read(name)
        return self.parts[name]

    def __setitem__(self, name: str, part: Any) -> None:
        part = json.loads(json.dumps(part, allow_nan=False))  # as it will be read when the command goes on
        if self.target is not None:
            path = self._path(name)
            path.parent.mkdir(exist_ok=True)
            write_document(path, part)
        self.parts[name] = part

    def __delitem__(self, name: str) -> None:
        del self.parts[name]

    def __contains__(self, name: object) -> bool:
        return name in self.parts or self.target is not None and self._path(str(name)).is_file()

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def forget(self) -> None:
        """The command has ended, and its file is written."""
        if self.target is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        assert self.target is not None
        return self.target.with_name(f"{self.target.name}.unfinished")

    def _path(self, name: str) -> Path:
        text = json.dumps([self.about, name], sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

    def _read(self, name: str) -> Any:
        """Raises `BrokenFile` for what is no JSON, KeyError where nothing is kept."""
        if self.target is None or not self._path(name).is_file():
            raise KeyError(name)
        try:
            return json.loads(self._path(name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise BrokenFile(
                f"the unfinished evaluation in {self._path(name)}", f"it is not JSON ({error})",
                "Delete it, and begin anew.",
            ) from error  # fmt: skip
