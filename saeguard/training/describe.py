"""Say in words what each latent reads and writes: the words it fires on, the tokens it promotes, a short label.

A latent's ``fires_on`` lists words by their share of its summed activation. A word is the firing token joined with the
pieces of the same word before it ("phot", "osynthesis" -> "photosynthesis"): the model has seen those and not what
follows. ``promotes`` is the logit lens: the decoder row through the final norm's weight and the unembedding. Only
single words and tokens are kept, never a passage of the text.
"""

import gzip
import json
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from saeguard.errors import TrainError
from saeguard.sae import SAE
from saeguard.training.activations import ActivationStore

FILE = "latents.jsonl.gz"
N_WORDS = 10
LONGEST_WORD = 32
_SPACE_MARKS = ("Ġ", "▁", "Ċ", " ", "\n", "\t", "ĉ")


@dataclass(frozen=True)
class LatentNote:
    """One row of the file. ``frequency`` is the share of tokens it fires on, ``maximum`` its largest activation there;
    ``shares`` has, for each word of ``fires_on``, its part of the latent's summed activation.
    """

    latent: int
    frequency: float
    maximum: float
    fires_on: tuple[str, ...]
    shares: tuple[float, ...]
    promotes: tuple[str, ...]
    label: str


class Words:
    """Turns rows of token ids into one word per token, and words into numbers."""

    def __init__(self, tokenizer: Any, n_vocab: int):
        pieces = tokenizer.convert_ids_to_tokens(list(range(n_vocab)))
        texts = tokenizer.batch_decode([[i] for i in range(n_vocab)])
        self._texts = [text.strip() for text in texts]
        self._joins = [
            bool(piece) and not piece.startswith(_SPACE_MARKS) and bool(text) and text[0].isalnum()
            for piece, text in zip(pieces, texts, strict=True)
        ]
        self._ends = [bool(text) and text[-1].isalnum() for text in texts]
        self._numbers: dict[str, int] = {}
        self.names: list[str] = []

    def number(self, ids: Sequence[int]) -> list[int]:
        """The number of every token's word; ``names`` holds the words."""
        numbers, word, open_word = [], "", False
        for i in ids:
            word = word + self._texts[i] if open_word and self._joins[i] else self._texts[i]
            word = word[:LONGEST_WORD]
            open_word = self._ends[i]
            if word not in self._numbers:
                self._numbers[word] = len(self.names)
                self.names.append(word)
            numbers.append(self._numbers[word])
        return numbers


@dataclass(eq=False)
class _Sums:
    """Per latent: firings, largest activation, summed activation; per (latent, word) pair its summed activation."""

    n_tokens: int
    fired: np.ndarray
    maximum: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    words: Words


def describe_latents(
    sae: SAE, model: Any, tokenizer: Any, store: ActivationStore, *, max_shards: int = 8
) -> tuple[LatentNote, ...]:
    """Notes on every latent, from the first ``max_shards`` shards of stored activations. Raises `TrainError`."""
    sums = _sum_up(sae, tokenizer, store, max_shards=max_shards, n_vocab=model.get_input_embeddings().weight.shape[0])
    promoted = promoted_tokens(sae, model, tokenizer)
    order = np.lexsort((-sums.values, sums.keys // len(sums.words.names)))
    keys, values = sums.keys[order], sums.values[order]
    latent_of, word_of = np.divmod(keys, len(sums.words.names))
    starts = np.searchsorted(latent_of, np.arange(sae.d_sae + 1))
    notes = []
    for latent in range(sae.d_sae):
        rows = slice(starts[latent], starts[latent + 1])
        total = float(values[rows].sum())
        top = [
            (sums.words.names[word], round(float(value) / total, 4))
            for word, value in zip(word_of[rows][:N_WORDS], values[rows][:N_WORDS], strict=True)
        ]
        notes.append(
            LatentNote(
                latent=latent,
                frequency=round(float(sums.fired[latent]) / max(sums.n_tokens, 1), 7),
                maximum=round(float(sums.maximum[latent]), 4),
                fires_on=tuple(word for word, _ in top),
                shares=tuple(share for _, share in top),
                promotes=promoted[latent],
                label=label_of([word for word, _ in top], promoted[latent]),
            )
        )
    return tuple(notes)


def _sum_up(sae: SAE, tokenizer: Any, store: ActivationStore, *, max_shards: int, n_vocab: int) -> _Sums:
    if sae.site is None:
        raise TrainError(f"a description of {sae.name}", "it names no site", "Give an SAE with a site.")
    words = Words(tokenizer, n_vocab)
    fired, maximum = np.zeros(sae.d_sae, dtype=np.int64), np.zeros(sae.d_sae, dtype=np.float32)
    n_tokens, latents, numbers, values = 0, [], [], []
    for shard in range(min(max_shards, store.n_shards)):
        rows, x = store.rows(shard), store.read(shard, sae.site)
        ids, kept = store.chunks.ids[rows], store.chunks.kept[rows]
        word_rows = [words.number(row) for row in ids.tolist()]
        word = torch.tensor(word_rows)[kept].numpy().astype(np.int64)
        token, latent, value = _firings(sae, x)
        fired += np.bincount(latent, minlength=sae.d_sae)
        np.maximum.at(maximum, latent, value)
        pair, total = _add_up(latent, word[token], value)
        latents.append(pair >> 32)
        numbers.append(pair & 0xFFFFFFFF)
        values.append(total)
        n_tokens += len(x)
    pair, total = _add_up(np.concatenate(latents), np.concatenate(numbers), np.concatenate(values))
    keys = (pair >> 32) * len(words.names) + (pair & 0xFFFFFFFF)
    return _Sums(n_tokens, fired, maximum, keys, total, words)


def _firings(sae: SAE, x: Float[Tensor, "tokens d_in"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token, latent and activation of every firing."""
    tokens, latents, values = [], [], []
    for start in range(0, len(x), 4096):
        f = sae.encode(x[start : start + 4096])
        token, latent = torch.nonzero(f > 0, as_tuple=True)
        tokens.append((token + start).numpy())
        latents.append(latent.numpy())
        values.append(f[token, latent].numpy())
    return np.concatenate(tokens), np.concatenate(latents), np.concatenate(values)


def _add_up(latent: np.ndarray, word: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (latent << 32 | word) pairs in rising order, and the sum of their values."""
    pair = latent.astype(np.int64) << 32 | word.astype(np.int64)
    order = np.argsort(pair, kind="stable")
    pair, value = pair[order], value[order].astype(np.float64)
    firsts = np.flatnonzero(np.r_[True, pair[1:] != pair[:-1]]) if len(pair) else np.zeros(0, dtype=np.int64)
    return pair[firsts], np.add.reduceat(value, firsts) if len(pair) else value


@torch.no_grad()
def promoted_tokens(sae: SAE, model: Any, tokenizer: Any, *, n: int = N_WORDS) -> tuple[tuple[str, ...], ...]:
    """Per latent, the tokens whose logits its decoder row raises most, through the final norm's weight."""
    unembed = model.get_output_embeddings().weight.detach().float()
    norm = final_norm_weight(model)
    tops = []
    for rows in sae.W_dec.float().split(256):
        tops += ((rows * norm) @ unembed.T).topk(2 * n, dim=-1).indices.tolist()
    used = sorted({i for top in tops for i in top})
    texts = dict(zip(used, (text.strip() for text in tokenizer.batch_decode([[i] for i in used])), strict=True))
    shown = {i: text for i, text in texts.items() if text and _printable(text)}
    return tuple(tuple(dict.fromkeys(shown[i] for i in top if i in shown))[:n] for top in tops)


def final_norm_weight(model: nn.Module) -> Float[Tensor, " d_in"] | float:
    """The weight of the norm before the unembedding (Gemma stores it minus one), or 1.0 when there is none."""
    inner = getattr(model, "model", getattr(model, "transformer", getattr(model, "gpt_neox", None)))
    for name in ("norm", "ln_f", "final_layer_norm"):
        norm = getattr(inner, name, None)
        if norm is not None and getattr(norm, "weight", None) is not None:
            weight = norm.weight.detach().float()
            return weight + 1.0 if type(norm).__name__.startswith("Gemma") else weight
    return 1.0


def label_of(words: Sequence[str], promoted: Sequence[str]) -> str:
    """A label made by rule: up to three words it fires on, an arrow, up to three tokens it promotes."""
    reads = _readable(words)
    writes = [token for token in _readable(promoted) if token.lower() not in {word.lower() for word in reads}]
    if not words:
        return "(silent on the training sample)"
    return f"{', '.join(reads[:3])} -> {', '.join(writes[:3])}"


def _readable(words: Sequence[str]) -> list[str]:
    """Words of letters first, each in one spelling; anything else when there is none."""
    spellings: dict[str, str] = {}
    for word in words:
        if len(word) > 1 and any(letter.isalnum() for letter in word) and _printable(word):
            spellings.setdefault(word.lower(), word)
    return list(spellings.values()) or [word for word in words if _printable(word)][:3]


def _printable(text: str) -> bool:
    return "\ufffd" not in text and not any(unicodedata.category(letter) in ("Cc", "Cn") for letter in text.strip())


def save_notes(notes: Sequence[LatentNote], folder: str | Path) -> Path:
    """Write ``latents.jsonl.gz``, one row per latent; the same notes give the same bytes."""
    target = Path(folder) / FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps(asdict(note), ensure_ascii=False) + "\n" for note in notes)
    partial = target.with_suffix(".partial")
    partial.write_bytes(gzip.compress(rows.encode("utf-8"), mtime=0))
    os.replace(partial, target)
    return target
