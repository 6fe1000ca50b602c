"""A tokenizer of whole words, made in memory, and a tiny model saved with it: what a local model folder looks like."""

import gzip
import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saeguard import SAE
from saeguard.loaders.native import save_sae
from tests.tiny import VOCAB, fresh_model, tiny_sae

WORDS = ("<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB)))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the word ``w<i>``; 0, 1 and 2 are padding, BOS and EOS."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def save_model(folder: Path) -> Path:
    """A tiny llama and its tokenizer, as ``from_pretrained`` reads them."""
    fresh_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_described_sae(folder: Path) -> SAE:
    """A tiny SAE with a latent table and a card beside it, named by its folder."""
    sae = tiny_sae(name=str(folder))
    save_sae(sae, folder)
    rows = [
        {"latent": i, "frequency": 0.3, "maximum": 5.0, "fires_on": [f"w{i}"], "shares": [0.5], "promotes": ["w9"],
         "label": f"w{i} -> w9"}
        for i in range(sae.d_sae)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "latents.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "card.json").write_text(json.dumps({"name": sae.name, "site": str(sae.site), "l0": 16.0}))
    return sae
