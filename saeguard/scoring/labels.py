"""Labels: what somebody, or some rule, says a latent is about; read from others' exports and from our own files.

    Neuronpedia   JSON list, JSONL or JSONL.gz: index or feature, description, explanationModelName, modelId, layer;
                  also a feature with its list of ``explanations``, and a folder of batch-*.jsonl.gz
    Delphi        a folder of <module>_latent<number>.txt, one explanation each; JSONL or a JSON object
                  {"feature_12": "text"}
    ours          JSONL or JSONL.gz, one line per label: latent, text, source, score

Files are data of strangers: their size is limited, also after unpacking, texts become one printable line, and other
layouts are refused by the names of their keys. Labels are hints for people, not claims.
"""

import gzip
import io
import json
import math
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saeguard import strict_json
from saeguard.errors import BrokenFile, LatentOutOfRange, ScoreMismatch, UnsupportedFormat
from saeguard.latents import LatentTable
from saeguard.scoring.contexts import Context

MAX_BYTES = 1_000_000_000
"""Of a file after unpacking, and of a folder's files together."""
MAX_LABELS = 4_000_000
MAX_TEXT = 10_000
"""Characters of one label."""
SOURCE = "saeguard"
"""Who labels made by rule are from."""
WORDS = 3
"""Words of a label made by rule, and promoted tokens behind them."""

_LATENT = ("latent", "index", "feature", "feature_index", "latent_index", "feature_id", "latent_id")
_TEXT = ("text", "description", "explanation", "label", "interpretation")
_SOURCE = ("source", "explanationModelName", "explanation_model", "explainer")
_MODEL = ("modelId", "model_id")
_PLACE = ("layer", "saeId", "sae_id", "hookpoint", "module")
_NUMBERED = re.compile(r"(?:(?P<module>.*?)[_ ]?(?:latent|feature|neuron)[_ ]?)?(?P<number>\d{1,12})")
_FILE = re.compile(r".*(latent|feature)_?\d{1,12}\.txt")


@dataclass(frozen=True)
class Label:
    """What one latent is about, who says so, and how good that is in the source's own measure, if it has one."""

    latent: int
    text: str
    source: str = ""
    score: float | None = None

    def __post_init__(self):
        if self.latent < 0 or not self.text or (self.score is not None and not math.isfinite(self.score)):
            raise ScoreMismatch(
                f"a label of latent {self.latent}", f"its text is {self.text[:40]!r} and its score {self.score}",
                "A label has a latent from 0 on, a text, and a finite score or none.",
            )  # fmt: skip


class _Found(NamedTuple):
    """A label and which SAE its file says it belongs to."""

    label: Label
    sae: str


def read_labels(source: str | Path, *, of: str | None = None, d_sae: int | None = None) -> list[Label]:
    """The labels in a file or folder, by latent; entries without a text are left out.

    Where a source holds several SAEs' labels, ``of`` says whose to read: ``"modelId/layer"``, or Delphi's module.
    Raises `UnsupportedFormat`, `BrokenFile`, and `LatentOutOfRange` for a latent from ``d_sae`` on.
    """
    path = Path(source)
    found = list(_read(path))
    saes = sorted({entry.sae for entry in found})
    if of is not None:
        found = [entry for entry in found if entry.sae == of]
    if (of is None and len(saes) > 1) or (of is not None and not found):
        raise UnsupportedFormat(
            f"labels in {path.name}" if of is None else f"labels of {of} in {path.name}",
            f"it has those of {len(saes)} SAEs: {', '.join(map(repr, saes[:8]))}",
            "Say with of=... whose to read: latent 7 of one SAE is not latent 7 of another.",
        )
    labels = sorted((entry.label for entry in found), key=_order)
    if d_sae is not None and labels and labels[-1].latent >= d_sae:
        raise LatentOutOfRange(
            f"labels in {path.name} for an SAE of {d_sae} latents", f"one is of latent {labels[-1].latent}",
            "These are another SAE's labels.",
        )  # fmt: skip
    return labels


def write_labels(labels: Iterable[Label], path: str | Path) -> Path:
    """Write JSON lines, packed if the name ends on .gz, whole or not at all; the same labels give the same bytes."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(label), sort_keys=True, ensure_ascii=False) for label in sorted(labels, key=_order)]
    data = "".join(f"{line}\n" for line in lines).encode()
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(gzip.compress(data, mtime=0) if target.suffix == ".gz" else data)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def best_labels(labels: Iterable[Label]) -> dict[int, Label]:
    """One label per latent: the one with the largest score, one without a score last, then by source and text."""
    ranked = sorted(labels, key=lambda label: (-(label.score if label.score is not None else -math.inf), _order(label)))
    found: dict[int, Label] = {}
    for label in ranked:
        found.setdefault(label.latent, label)
    return dict(sorted(found.items()))


def labels_of(table: LatentTable) -> list[Label]:
    """Labels by rule from the rows of a table: its label, else what the latent fires on and promotes.

    The score is the share of the latent's summed activation that falls on the words named, where that was measured.
    Latents that never fired have none.
    """
    found = []
    for row in table.rows:
        shares = dict(zip(row.fires_on, row.shares, strict=True)) if len(row.shares) == len(row.fires_on) else {}
        text, reads = row.label, row.label.split(" -> ")[0].split(", ")
        if not text:
            text, reads = _phrase(row.fires_on, row.promotes)
        if text and row.frequency > 0:
            score = math.fsum(shares.get(word, 0.0) for word in reads) if shares else None
            found.append(Label(row.latent, printable(text), SOURCE, score))
    return found


def label_from(latent: int, contexts: Sequence[Context], promoted: Sequence[str] = ()) -> Label | None:
    """A label by rule: the words that hold most of the activation in its top contexts, then tokens it promotes.

    A word is the firing token joined with the pieces of it that stand before and behind. The score is the share of the
    contexts' summed activation that falls on the words named. None where there is nothing to say.
    """
    sums: dict[str, float] = defaultdict(float)
    spelling: dict[str, str] = {}
    for context in contexts:
        word = _word(context)
        if word:
            sums[word.lower()] += context.activation
            spelling.setdefault(word.lower(), word)
    ranked = sorted(sums, key=lambda word: (-sums[word], word))
    text, reads = _phrase([spelling[word] for word in ranked], promoted)
    if not text:
        return None
    total = sum(context.activation for context in contexts)
    score = math.fsum(sums[word.lower()] for word in reads) / total if total else None
    return Label(latent, text, SOURCE, score)


def printable(text: str) -> str:
    """``text`` on one line, without control, direction and other unprintable characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _order(label: Label) -> tuple[int, str, str, float]:
    return label.latent, label.source, label.text, -math.inf if label.score is None else label.score


def _word(context: Context) -> str:
    token = printable(context.token)
    if not any(letter.isalnum() for letter in token):
        return token
    front = re.search(r"\w*$", context.before) if re.match(r"\w", context.token) else None
    back = re.match(r"\w*", context.after) if re.search(r"\w$", context.token) else None
    return (front.group() if front else "") + token + (back.group() if back else "")


def _phrase(fires_on: Sequence[str], promotes: Sequence[str]) -> tuple[str, list[str]]:
    """``a, b, c -> x, y, z``, each once whatever its case and words before signs, and the words on its left."""
    reads = _once(fires_on, ())
    writes = _once(promotes, {word.lower() for word in reads})
    left, right = ", ".join(reads), ", ".join(writes)
    return (f"{left} -> {right}" if left and right else left or (f"-> {right}" if right else "")), reads


def _once(words: Sequence[str], without: Iterable[str]) -> list[str]:
    seen, found = set(without), []
    for word in map(printable, words):
        if word and "\ufffd" not in word and word.lower() not in seen:
            seen.add(word.lower())
            found.append(word)
    lettered = [word for word in found if len(word) > 1 and any(letter.isalnum() for letter in word)]
    return (lettered or found)[:WORDS]


def _read(path: Path) -> Iterator[_Found]:
    if not path.exists():
        raise UnsupportedFormat(f"labels in {str(path)!r}", "there is no such file or folder", "Check the path.")
    files = [path] if path.is_file() else sorted((p for p in path.iterdir() if _is_ours(p)), key=_natural)
    if not files:
        raise UnsupportedFormat(
            f"labels in the folder {path.name}", "it has no *.jsonl, *.jsonl.gz, *.json or *_latent<number>.txt",
            "Give the folder that the explanations were written to.",
        )  # fmt: skip
    budget, n = MAX_BYTES, 0
    for file in files:
        data = _unpacked(file, budget)
        budget -= len(data)
        try:
            text = data.decode("utf-8-sig")
            found = [_from_txt(file, text)] if _FILE.fullmatch(file.name) else _from_json(file, text)
            for entry in found:
                n += entry is not None
                if n > MAX_LABELS:
                    raise ValueError(f"it has more than {MAX_LABELS} labels")
                if entry is not None:
                    yield entry
        except (ValueError, TypeError) as error:
            raise BrokenFile(
                f"labels in {file.name}", f"{type(error).__name__}: {str(error)[:200]}", "Export or fetch them again."
            ) from error


def _is_ours(path: Path) -> bool:
    return path.is_file() and (
        path.name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")) or bool(_FILE.fullmatch(path.name))
    )


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _unpacked(path: Path, limit: int) -> bytes:
    """The file's bytes, unpacked if they are packed, and never more than ``limit`` of them."""
    try:
        with path.open("rb") as stream:
            packed = stream.read(2) == b"\x1f\x8b"
            stream.seek(0)
            source: Any = gzip.GzipFile(fileobj=stream) if packed else stream
            data = source.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BrokenFile(f"labels in {path.name}", str(error), "Export or fetch them again.") from error
    if len(data) > limit:
        raise BrokenFile(
            f"labels in {path.name}", f"there are more than {MAX_BYTES:,} bytes", "Split them, or read one batch."
        )
    return data


def _from_txt(file: Path, text: str) -> _Found | None:
    """One of Delphi's files: a JSON string, or plain text, under a name that says which latent."""
    text = strict_json.parse(text) if text.lstrip().startswith('"') else text
    return _entry(file.name.removesuffix(".txt"), text, "", None, "")


def _from_json(file: Path, text: str) -> Iterator[_Found | None]:
    if text[:1].strip() and text[0] not in "[{":
        raise UnsupportedFormat(
            f"labels in {file.name}", f"it begins with {text[:24]!r}, which is neither a JSON object nor a list",
            "Readable are JSON and JSON lines; a Git LFS pointer stands for a file that still has to be fetched.",
        )  # fmt: skip
    for number, row in enumerate(_rows(text), 1):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {number} is not an object")
        yield from _from_row(file, row)


def _rows(text: str) -> Iterator[Any]:
    """The objects of a JSON list, of a single object, or of JSON lines."""
    lines = io.StringIO(text)
    first = next((line for line in lines if line.strip()), "")
    try:
        row = strict_json.parse(first)
    except ValueError:  # one document on several lines
        row, lines = strict_json.parse(text) if text.strip() else [], io.StringIO("")
    if isinstance(row, list):
        yield from row
    else:
        yield row
    yield from (strict_json.parse(line) for line in lines if line.strip())


def _from_row(file: Path, row: Mapping[str, Any]) -> Iterator[_Found | None]:
    nested = row.get("explanations")
    if isinstance(nested, list):
        shared = {name: value for name, value in row.items() if name != "explanations"}
        for inner in nested:
            if not isinstance(inner, Mapping) or "explanations" in inner:
                raise ValueError("an entry of explanations is not an explanation")
            yield from _from_row(file, {**shared, **inner})
        return
    latent, text = _first(row, _LATENT), _first(row, _TEXT)
    if latent is not None and any(name in row for name in _TEXT):
        score = row.get("score")
        score = float(score) if isinstance(score, int | float) and not isinstance(score, bool) else None
        sae = "/".join(str(part) for names in (_MODEL, _PLACE) if (part := _first(row, names)) is not None)
        yield _entry(latent, text, str(_first(row, _SOURCE) or ""), score, sae)
    elif row and all(_NUMBERED.fullmatch(name) for name in row):
        for name, value in row.items():
            yield _entry(name, _first(value, _TEXT) if isinstance(value, Mapping) else value, "", None, "")
    else:
        raise UnsupportedFormat(
            f"labels in {file.name}",
            f"a row has the keys {', '.join(map(repr, sorted(row)[:12])) or 'of an empty object'}",
            f"Readable are rows with one of {', '.join(_LATENT)} and one of {', '.join(_TEXT)}, "
            'and objects like {"feature_12": "text"}.',
        )


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _entry(latent: Any, text: Any, source: str, score: float | None, sae: str) -> _Found | None:
    """A label, or None where there is no text. Raises ValueError."""
    if isinstance(latent, bool) or not isinstance(latent, int | str):
        raise ValueError(f"{latent!r} is no latent")
    match = _NUMBERED.fullmatch(str(latent))
    if match is None:
        raise ValueError(f"{str(latent)[:40]!r} is no latent")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"the text of latent {latent} is a {type(text).__name__}")
    text = text or ""
    if len(text) > MAX_TEXT:
        raise ValueError(f"the text of latent {latent} has {len(text)} characters, and the limit is {MAX_TEXT}")
    if score is not None and not math.isfinite(score):
        raise ValueError(f"the score of latent {latent} is {score}")
    line = printable(text)
    module = match["module"] or ""
    return _Found(Label(int(match["number"]), line, printable(source), score), sae or module) if line else None
