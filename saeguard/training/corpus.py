"""Turn text files into chunks of token ids, each beginning with BOS, drawn evenly from the files.

A row of a ``.jsonl`` or ``.jsonl.gz`` file is a document when it has ``text``, or a conversation when it has ``prompt``
and ``response``, which goes through the tokenizer's chat template; a ``.txt`` file is one document. A document is cut
every ``context - 1`` tokens and a chunk never spans two documents.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saeguard.errors import MissingBOS, TrainError

SHORTEST_TAIL = 32
"""Tokens; what is left of a document after its last full chunk is dropped when shorter."""


@dataclass(frozen=True)
class CorpusFile:
    """What was taken from one file. ``n_tokens`` counts BOS and special tokens too."""

    name: str
    sha256: str
    n_documents: int
    n_tokens: int


@dataclass(frozen=True, eq=False)
class Chunks:
    """Rows of token ids, padded on the right; ``kept`` is true where a token is trained on."""

    ids: Int[Tensor, "chunks context"]
    kept: Bool[Tensor, "chunks context"]
    files: tuple[CorpusFile, ...]
    seed: int

    @property
    def n_tokens(self) -> int:
        """Tokens that are trained on: neither padding nor special."""
        return int(self.kept.sum())

    def fingerprint(self) -> str:
        """SHA-256 of the ids, in order, and of which of them are kept."""
        digest = hashlib.sha256(self.ids.to(torch.int32).numpy().tobytes())
        digest.update(self.kept.numpy().tobytes())
        return digest.hexdigest()


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids that stand for no text: BOS, EOS, padding, roles and every added token marked as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return tuple(sorted({*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}))


def read_corpus(
    paths: Sequence[str | Path],
    tokenizer: Any,
    *,
    context: int = 256,
    n_tokens: int | None = None,
    seed: int = 0,
) -> Chunks:
    """Cut files into shuffled chunks of ``context`` tokens; ``n_tokens`` is a budget, shared evenly by the files.

    A file shorter than its share leaves the rest to the others. Raises `MissingBOS` when the tokenizer has no BOS, and
    `TrainError` for no documents or a file that is neither text nor rows with ``text``.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        raise MissingBOS(
            f"chunks of {context} tokens that each begin with BOS",
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no BOS token",
            "Set tokenizer.bos_token to the token that the model saw first in training.",
        )
    rng = np.random.default_rng(seed)
    per_file: list[list[list[int]]] = []
    counts: list[int] = []
    for path in map(Path, paths):
        found = list(documents(path, tokenizer))
        counts.append(len(found))
        rows = _cut(found, tokenizer, bos=bos, context=context)
        per_file.append([rows[i] for i in rng.permutation(len(rows))])
    if not any(per_file):
        raise TrainError(
            f"training text from {len(per_file)} files",
            "there is no document in them",
            "Give .txt files, or .jsonl / .jsonl.gz files whose rows have a text field.",
        )
    taken = _even_shares(per_file, n_tokens)
    files = tuple(
        CorpusFile(Path(path).name, _sha256(Path(path)), count, sum(map(len, rows)))
        for path, count, rows in zip(paths, counts, taken, strict=True)
    )
    rows = [row for rows in taken for row in rows]
    return _pad([rows[i] for i in rng.permutation(len(rows))], tokenizer, context, files, seed)


def documents(path: Path, tokenizer: Any) -> Iterator[str]:
    """The documents of one file; conversations go through the tokenizer's chat template. Raises `TrainError`."""
    if not path.is_file():
        raise TrainError(f"text from {path}", "there is no such file", "Check the path.")
    if path.suffix == ".txt":
        yield path.read_text(encoding="utf-8")
        return
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield _text_of(json.loads(line), tokenizer)
    except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
        raise TrainError(
            f"text from {path}",
            f"a row could not be read ({type(error).__name__}: {error})",
            "Give .txt files, or .jsonl / .jsonl.gz files whose rows have a text field.",
        ) from error


def _text_of(row: dict[str, Any], tokenizer: Any) -> str:
    if "text" in row:
        return str(row["text"])
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    return tokenizer.apply_chat_template(turns, tokenize=False)


def _cut(documents: list[str], tokenizer: Any, *, bos: int, context: int) -> list[list[int]]:
    documents = [text for text in documents if text.strip()]
    if not documents:
        return []
    rows: list[list[int]] = []
    for ids in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids = ids[1:] if ids[0] == bos else ids
        pieces = [ids[start : start + context - 1] for start in range(0, len(ids), context - 1)]
        rows += [[bos, *piece] for piece in pieces if len(piece) >= SHORTEST_TAIL or len(pieces) == 1]
    return rows


def _even_shares(per_file: list[list[list[int]]], n_tokens: int | None) -> list[list[list[int]]]:
    """The first chunks of each file, up to an even share of the budget; smallest files first, rest passed on."""
    if n_tokens is None:
        return per_file
    sizes = [sum(map(len, rows)) for rows in per_file]
    taken: list[list[list[int]]] = [[] for _ in per_file]
    budget = n_tokens
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    for position, i in enumerate(order):
        share = budget // (len(order) - position)
        used = 0
        for row in per_file[i]:
            if used >= share:
                break
            taken[i].append(row)
            used += len(row)
        budget -= used
    return taken


def _pad(rows: list[list[int]], tokenizer: Any, context: int, files: tuple[CorpusFile, ...], seed: int) -> Chunks:
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.bos_token_id
    ids = np.full((len(rows), context), filler, dtype=np.int64)
    real = np.zeros((len(rows), context), dtype=bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        real[i, : len(row)] = True
    kept = real & ~np.isin(ids, special_ids(tokenizer))
    return Chunks(torch.from_numpy(ids), torch.from_numpy(kept), files, seed)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
