"""A folder or a file that may hold an SAE: which files are there, and each of them opened and checked once."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from saeguard import strict_json
from saeguard.archives import Archive, open_archive
from saeguard.errors import BrokenFile, UnsupportedFormat
from saeguard.sites import Site

MAX_TEXT_BYTES = 250_000
MAX_YAML_BYTES = 32_768  # its parser takes a second for 64 kB of brackets
MAX_DEPTH = 40


@dataclass(frozen=True)
class Hints:
    """What the caller knows; files that do not say it need it, and a site takes the place of the one they name.

    ``input_scale`` multiplies x where a config asks for an average norm that its files do not hold. ``overrides`` are
    the keys of a published release that are in none of its files: ``center_writing_weights``, ``prepend_bos``,
    ``normalize_activations``.
    """

    site: Site | None = None
    site_out: Site | None = None
    model: str | None = None
    top_k: int | None = None
    input_scale: float | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    """Where on the hub the files came from, for the manifest."""


class Source:
    """See the module's text. ``main`` is the name of the file that was given, or None for a folder.

    ``legacy`` admits pickles of before torch 1.6, which only a process with limits should read.
    """

    def __init__(self, path: Path, *, legacy: bool = False):
        self.path = path
        self._legacy = legacy
        self.folder = path if path.is_dir() else path.parent
        self.main = None if path.is_dir() else path.name
        self._archives: dict[str, Archive] = {}
        self._texts: dict[str, dict[str, Any]] = {}

    def has(self, *names: str) -> bool:
        """Whether these files are there; beside a file that was given, only what is next to it."""
        return all(os.path.isfile(self.file(name)) for name in names)  # False also where nobody may look

    def file(self, name: str) -> Path:
        """A file of the folder, never one outside of it."""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BrokenFile(f"SAE folder {self.folder.name}", f"it names the file {name!r}", "Do not trust it.")
        return self.folder / name

    def matching(self, pattern: str) -> list[str]:
        """Names that match a regular expression wholly: the file that was given, or those of the folder."""
        names = [self.main] if self.main else self._names()
        return [name for name in names if re.fullmatch(pattern, name)]

    def _names(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.folder) if os.path.isfile(self.folder / name))
        except OSError as error:
            raise broken(self.folder, str(error)) from error

    def one(self, pattern: str, layer: int | None = None) -> str:
        """The one name that matches; ``layer`` chooses among several by the pattern's first group.

        Raises `UnsupportedFormat` when none or several are left.
        """
        names = self.matching(pattern)
        if layer is not None and self.main is None:
            there = [re.fullmatch(pattern, name) for name in names]
            names = [match[0] for match in there if match and (not match.re.groups or int(match[1]) == layer)]
        if len(names) != 1:
            raise UnsupportedFormat(
                f"SAE folder {self.folder.name}",
                f"{len(names)} files of it match {pattern}" + ("" if layer is None else f" and are of layer {layer}"),
                "Name the file, or say site=... with the layer.",
            )
        return names[0]

    def archive(self, name: str) -> Archive:
        """A file of tensors, opened. Raises `BrokenFile`, `UnsafePickle`, `UnsupportedFormat`."""
        if name not in self._archives:
            self._archives[name] = open_archive(self.file(name), legacy=self._legacy)
        return self._archives[name]

    def keys(self, name: str) -> frozenset[str]:
        """Names of the tensors of a file, empty where there is no such file."""
        return frozenset(self.archive(name).specs) if self.has(name) else frozenset()

    def json(self, name: str) -> dict[str, Any]:
        """A file as a JSON object. Raises `BrokenFile`."""
        return self._text(name, strict_json.parse, "JSON", MAX_TEXT_BYTES)

    def yaml(self, name: str) -> dict[str, Any]:
        """A file as a YAML mapping without aliases or tags. Raises `BrokenFile`."""
        return self._text(name, _parse_yaml, "YAML", MAX_YAML_BYTES)

    def _text(self, name: str, parse: Any, what: str, limit: int) -> dict[str, Any]:
        if name not in self._texts:
            self._texts[name] = _mapping(self.file(name), parse, what, limit)
        return self._texts[name]


def _mapping(path: Path, parse: Any, what: str, limit: int) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > limit:
            raise broken(path, f"it has {size} bytes and {limit} are allowed")
        found = parse(path.read_bytes())
    except (ValueError, OSError, RecursionError, yaml.YAMLError) as error:
        raise broken(path, f"it is not {what} ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise broken(path, f"it is not {what} that maps names to values")
    if depth(found) > MAX_DEPTH:
        raise broken(path, f"it nests deeper than {MAX_DEPTH} levels")
    return found


def depth(found: Any) -> int:
    """Levels of dicts and lists in each other; beyond ``MAX_DEPTH`` they are not counted on."""
    level, count = [found], 0
    while level and count <= MAX_DEPTH:
        count += 1
        inside = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        level = [child for children in inside for child in children]
    return count


class _PlainYaml(yaml.SafeLoader):
    """YAML of plain values: an alias can make ten lines stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias")
        if self.peek_event().tag is not None:  # what a tag asks for can fail in any way
            raise ValueError("it has a tag")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len({repr(key) for key in keys}) != len(keys):
            raise ValueError("a key stands twice in one mapping")
        return super().construct_mapping(node, deep=deep)


def _parse_yaml(text: bytes) -> Any:
    return yaml.load(text, Loader=_PlainYaml)  # noqa: S506  a SafeLoader with fewer powers


def broken(path: Path, found: str) -> BrokenFile:
    """The error for a file whose content cannot be trusted."""
    return BrokenFile(f"SAE file {path.name}", found, "Fetch or export the file again.")
