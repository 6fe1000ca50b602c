"""What is known of each latent of an SAE: how often it fires, on which tokens, and which tokens it makes likelier.

    latents.jsonl.gz   one JSON object per line, in the order of the latents:
                       latent, frequency, maximum, fires_on, shares, promotes, label

The numbers were measured once, on the text that the SAE's card names. Labels are hints for people, not claims.
"""

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saeguard.errors import BrokenFile, LatentOutOfRange, UnsupportedFormat
from saeguard.loaders import shipped, shipped_boosts
from saeguard.loaders.places import parts

NAMES = ("latents.jsonl.gz", "latents.json.gz", "latents.jsonl", "latents.json")
MAX_BYTES = 256_000_000
_WEIGHTS = {"fires_on": 1.0, "promotes": 0.25, "label": 0.25}
"""What a word found in a field counts; labels are made from the other two, so they only break ties."""
_BY_SHARE = 4.0
"""How much more a word counts that is all that a latent fires on than one that is only listed."""
_SHORTEST_PIECE = 4
"""Letters; shorter tokens are not taken for a part of a longer word."""


@dataclass(frozen=True)
class LatentRow:
    """One latent. ``frequency`` is the share of tokens on which it fires; ``maximum`` is in activation units."""

    latent: int
    frequency: float
    maximum: float
    fires_on: tuple[str, ...] = ()
    """Words on which it fires, the one with the largest share of its activation first."""
    shares: tuple[float, ...] = ()
    """Per word of ``fires_on``, its share of the latent's summed activation; empty where that was not measured."""
    promotes: tuple[str, ...] = ()
    """Tokens whose logits its decoder direction raises most, most raised first."""
    label: str = ""


@dataclass(frozen=True)
class Hit:
    """A row that a search found. ``where`` says in which fields, ``score`` is for ranking only."""

    row: LatentRow
    score: float
    where: tuple[str, ...]


class LatentTable:
    """The rows of one SAE, by latent."""

    def __init__(self, rows: Iterable[LatentRow], *, source: str = ""):
        self.rows = tuple(rows)
        self.source = source
        self._by_latent = {row.latent: row for row in self.rows}

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def load(cls, source: str | Path) -> "LatentTable":
        """Read the table beside a shipped SAE, in a folder, or from a file; of ``base+domain`` both, renumbered.

        Raises `UnsupportedFormat` when there is none and `BrokenFile` when a row cannot be read.
        """
        if (found := parts(source)) is not None:
            return cls(_behind_each_other([cls.load(found[0]), *map(cls.load, found[1])]), source=str(source))
        path = _find(source)
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                text = file.read(MAX_BYTES)
            return cls([_row(entry) for entry in _entries(path, text)], source=str(source))
        except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
            raise BrokenFile(
                f"latent table {path.name}",
                f"a row could not be read ({type(error).__name__}: {error})",
                "Fetch the file again, or write it again with the training command.",
            ) from error

    def row(self, latent: int) -> LatentRow:
        """What is known of one latent. Raises `LatentOutOfRange`."""
        if latent not in self._by_latent:
            raise LatentOutOfRange(
                f"latent {latent} of {self.source or 'this table'}",
                f"the table has {len(self)} rows, latents {min(self._by_latent)} to {max(self._by_latent)}"
                if self.rows
                else "the table is empty",
                "Search the table by words to find latents.",
            )
        return self._by_latent[latent]

    def search(self, text: str, *, top: int = 20) -> list[Hit]:
        """The rows that have something to do with the words of ``text``, best first.

        A word that the latent fires on counts most, the more the larger its share; less one that it promotes, by its
        place there; and a token that is only a piece of the word counts by its length.
        """
        words = _words(text)
        hits = [hit for row in self.rows if (hit := _hit(row, words)) is not None]
        return sorted(hits, key=lambda hit: (-hit.score, hit.row.latent))[:top]


def _behind_each_other(tables: Iterable[LatentTable]) -> Iterator[LatentRow]:
    """The rows of a base and its boosts, numbered as the latents of the boosted SAE."""
    start = 0
    for table in tables:
        for row in table.rows:
            yield replace(row, latent=row.latent + start)
        start += len(table)


def _find(source: str | Path) -> Path:
    place = {**shipped(), **shipped_boosts()}.get(str(source), Path(source))
    if place.is_file() and place.suffix == ".safetensors":
        place = place.parent
    candidates = [place] if place.is_file() else [place / name for name in NAMES]
    found = [path for path in candidates if path.is_file()]
    if not found:
        raise UnsupportedFormat(
            f"the latent table of {str(source)!r}",
            f"there is no {' or '.join(NAMES[:2])} there",
            f"Shipped are: {', '.join(shipped()) or 'none'}; other SAEs get one from `saeguard train`.",
        )
    return found[0]


def _entries(path: Path, text: str) -> Sequence[Any]:
    if ".jsonl" in path.name:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    document = json.loads(text)
    return document["latents"] if isinstance(document, dict) else document


def _row(entry: dict[str, Any]) -> LatentRow:
    return LatentRow(
        latent=int(entry["latent"]),
        frequency=float(entry["frequency"]),
        maximum=float(entry["maximum"]),
        fires_on=tuple(str(word) for word in entry.get("fires_on", ())),
        shares=tuple(float(share) for share in entry.get("shares", ())),
        promotes=tuple(str(token) for token in entry.get("promotes", ())),
        label=str(entry.get("label") or ""),
    )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _hit(row: LatentRow, words: Sequence[str]) -> Hit | None:
    shares = row.shares if len(row.shares) == len(row.fires_on) else _fading(len(row.fires_on))
    shares = [1.0 + _BY_SHARE * share for share in shares]
    scores = {
        "fires_on": _sum(words, row.fires_on, shares),
        "promotes": _sum(words, row.promotes, _fading(len(row.promotes))),
        "label": max((_match(word, _words(row.label)) for word in words), default=0.0),
    }
    found = tuple(name for name in _WEIGHTS if scores[name] > 0)
    total = sum(_WEIGHTS[name] * scores[name] for name in found)
    return Hit(row, round(total, 4), found) if found else None


def _sum(words: Sequence[str], tokens: Sequence[str], weights: Sequence[float]) -> float:
    """Matches of every word with its best token, weighted; a word counts once."""
    pairs = [(token.strip().lower(), weight) for token, weight in zip(tokens, weights, strict=True)]
    best = [max((_match(word, [token]) * weight for token, weight in pairs), default=0.0) for word in words]
    return float(sum(best))


def _fading(n: int) -> list[float]:
    return [1 / (1 + place / 4) for place in range(n)]


def _match(word: str, others: Sequence[str]) -> float:
    """1 for the word itself, less for a longer form of it, and less again for a piece of it; else 0."""
    best = 0.0
    for other in others:
        if other == word:
            return 1.0
        short, long = sorted((word, other), key=len)
        if len(short) >= _SHORTEST_PIECE and short in long:
            share = len(short) / len(long)
            best = max(best, 0.8 * share if long.startswith(short) else 0.5 * share)
    return best
