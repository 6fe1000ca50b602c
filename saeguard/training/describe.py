"""Say in words what each latent reads and writes: the words it fires on, the tokens it promotes, a short label.

A latent's ``fires_on`` lists, in this order, the words with the largest share of its summed activation, words that it
has more to itself (value / word's total is high too), and words that have no closer latent: every frequent word stands
with the two latents with the largest value^2 / (latent's total * word's total). A word is the firing token joined with
the pieces of the same word before it ("phot", "osynthesis" -> "photosynthesis"): the model has seen those and not what
follows. ``promotes`` is the logit lens by cosine: the decoder row times the final norm's weight, with the token's
centred unembedding row, because rare word pieces have long rows and would fill every list. Where the cosine is no more
than the best of a vocabulary of random rows reaches, the label leaves it out. Tokens with a massive norm do not count:
they fire many latents at ten to a hundred times the usual height. Only single words and tokens are kept, no passage.
"""

import gzip
import json
import math
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
from saeguard.training.corpus import special_ids
from saeguard.training.evaluate import MASSIVE

FILE = "latents.jsonl.gz"
N_MOST, N_OWN, N_CLOSEST, N_PROMOTED = 8, 8, 12, 10
CLOSEST_PER_WORD = 2
FREQUENT = 8
"""Occurrences of a word in the text described, from which on it is listed with its closest latents."""
OWN_SHARE = 0.001
"""Of a latent's summed activation; a word below it is not listed as the latent's own."""
LONGEST_WORD = 32
_VISIBLE = {ord(" "): "␣", ord("\n"): "↵", ord("\r"): "↵", ord("\t"): "⇥"}
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
        self._texts = [text.strip() or text.translate(_VISIBLE) for text in texts]
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
    occurrences: np.ndarray
    words: Words


def describe_latents(
    sae: SAE, model: Any, tokenizer: Any, store: ActivationStore, *, max_shards: int = 8
) -> tuple[LatentNote, ...]:
    """Notes on every latent, from the first ``max_shards`` shards of stored activations. Raises `TrainError`."""
    n_vocab = model.get_input_embeddings().weight.shape[0]
    sums = _sum_up(sae, tokenizer, store, max_shards=max_shards, n_vocab=n_vocab)
    promoted = promoted_tokens(sae, model, tokenizer)
    latent_of, word_of = np.divmod(sums.keys, len(sums.words.names))
    starts = np.searchsorted(latent_of, np.arange(sae.d_sae + 1))
    of_word = np.bincount(word_of, weights=sums.values, minlength=len(sums.words.names))
    closest = _closest_words(latent_of, word_of, sums, of_word)
    chance = math.sqrt(2 * math.log(n_vocab) / sae.d_in)
    notes = []
    for latent in range(sae.d_sae):
        rows = slice(starts[latent], starts[latent + 1])
        total = float(sums.values[rows].sum())
        listed, ranked = _choose_words(word_of[rows], sums.values[rows], of_word, closest.get(latent, ()))
        strong = [token for token, cosine in promoted[latent] if cosine > chance]
        share = dict(zip(word_of[rows].tolist(), (sums.values[rows] / max(total, 1e-12)).tolist(), strict=True))
        notes.append(
            LatentNote(
                latent=latent,
                frequency=round(float(sums.fired[latent]) / max(sums.n_tokens, 1), 7),
                maximum=round(float(sums.maximum[latent]), 4),
                fires_on=tuple(sums.words.names[word] for word in listed),
                shares=tuple(round(share[word], 4) for word in listed),
                promotes=tuple(token for token, _ in promoted[latent]),
                label=label_of([sums.words.names[word] for word in ranked], strong),
            )
        )
    return tuple(notes)


def _choose_words(
    words: np.ndarray, values: np.ndarray, of_word: np.ndarray, closest: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The words to list, and those that the latent fires on most or has to itself, in a label's order."""
    specific = values / of_word[words]
    most = words[np.argsort(-values, kind="stable")[:N_MOST]].tolist()
    heavy = values >= OWN_SHARE * values.sum()
    own = words[heavy][np.argsort(-(values * specific)[heavy], kind="stable")[:N_OWN]].tolist()
    order = dict(zip(words.tolist(), (values * np.sqrt(specific)).tolist(), strict=True))
    ranked = sorted(dict.fromkeys([*most, *own]), key=lambda word: -order[word])
    return list(dict.fromkeys([*most, *own, *closest])), ranked


def _closest_words(
    latent_of: np.ndarray, word_of: np.ndarray, sums: _Sums, of_word: np.ndarray
) -> dict[int, tuple[int, ...]]:
    """Per latent, the frequent words that it is among the closest latents of, closest first."""
    names = sums.words.names
    lettered = np.array([len(name) > 3 and name.isalpha() for name in names], dtype=bool)
    chosen = np.flatnonzero((lettered & (sums.occurrences >= FREQUENT))[word_of])
    latent, word, value = latent_of[chosen], word_of[chosen], sums.values[chosen]
    of_latent = np.bincount(latent_of, weights=sums.values)
    score = value**2 / (of_latent[latent] * of_word[word])
    order = np.lexsort((-score, word))
    place = np.arange(len(order)) - np.searchsorted(word[order], word[order])
    best = order[place < CLOSEST_PER_WORD]
    best = best[np.argsort(-score[best], kind="stable")]
    found: dict[int, tuple[int, ...]] = {}
    for i in best:
        have = found.get(int(latent[i]), ())
        if len(have) < N_CLOSEST:
            found[int(latent[i])] = (*have, int(word[i]))
    return found


def _sum_up(sae: SAE, tokenizer: Any, store: ActivationStore, *, max_shards: int, n_vocab: int) -> _Sums:
    if sae.site is None:
        raise TrainError(f"a description of {sae.name}", "it names no site", "Give an SAE with a site.")
    words = Words(tokenizer, n_vocab)
    fired, maximum = np.zeros(sae.d_sae, dtype=np.int64), np.zeros(sae.d_sae, dtype=np.float32)
    latents, numbers, values, seen = [], [], [], []
    for shard in range(min(max_shards, store.n_shards)):
        rows, x = store.rows(shard), store.read(shard, sae.site)
        ids, kept = store.chunks.ids[rows], store.chunks.kept[rows]
        word_rows = [words.number(row) for row in ids.tolist()]
        word = torch.tensor(word_rows)[kept].numpy().astype(np.int64)
        norms = x.float().norm(dim=-1)
        usual = norms <= MASSIVE * norms.median()
        x, word = x[usual], word[usual.numpy()]
        token, latent, value = _firings(sae, x)
        fired += np.bincount(latent, minlength=sae.d_sae)
        np.maximum.at(maximum, latent, value)
        pair, total = _add_up(latent, word[token], value)
        latents.append(pair >> 32)
        numbers.append(pair & 0xFFFFFFFF)
        values.append(total)
        seen.append(word)
    pair, total = _add_up(np.concatenate(latents), np.concatenate(numbers), np.concatenate(values))
    keys = (pair >> 32) * len(words.names) + (pair & 0xFFFFFFFF)
    occurrences = np.bincount(np.concatenate(seen), minlength=len(words.names))
    return _Sums(int(occurrences.sum()), fired, maximum, keys, total, occurrences, words)


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
def promoted_tokens(
    sae: SAE, model: Any, tokenizer: Any, *, n: int = N_PROMOTED
) -> tuple[tuple[tuple[str, float], ...], ...]:
    """Per latent, the tokens whose centred unembedding rows its decoder row points to most, each with the cosine.

    Rows shorter than half the median count as if they were that long. Special tokens are left out.
    """
    rows = model.get_output_embeddings().weight.detach().float()
    rows = rows - rows.mean(0)
    length = rows.norm(dim=-1, keepdim=True)
    unembed = rows / torch.maximum(length, length.median() / 2)
    directions = torch.nn.functional.normalize(sae.W_dec.float() * final_norm_weight(model), dim=-1)
    tops: list[tuple[list[float], list[int]]] = []
    for part in directions.split(256):
        top = (part @ unembed.T).topk(2 * n, dim=-1)
        tops += zip(top.values.tolist(), top.indices.tolist(), strict=True)
    used = sorted({i for _, places in tops for i in places} - set(special_ids(tokenizer)))
    texts = dict(zip(used, tokenizer.batch_decode([[i] for i in used]), strict=True))
    shown = {i: text.strip() for i, text in texts.items() if text.strip() and _printable(text)}
    result = []
    for cosines, places in tops:
        found: dict[str, float] = {}
        for cosine, i in zip(cosines, places, strict=True):
            if i in shown:
                found.setdefault(shown[i], round(cosine, 4))
        result.append(tuple(found.items())[:n])
    return tuple(result)


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
    """A label made by rule: up to three words it fires on and, after an arrow, up to three tokens it promotes."""
    reads = _readable(words)
    writes = [token for token in _readable(promoted) if token.lower() not in {word.lower() for word in reads}]
    if not words:
        return "(silent on the training sample)"
    return ", ".join(reads[:3]) + (f" -> {', '.join(writes[:3])}" if writes else "")


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
