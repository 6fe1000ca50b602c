"""Token rows for a check: the text that comes with the package, or the caller's, cut short and behind a BOS."""

from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saeguard.errors import MissingBOS, TokensUnknown
from saeguard.sae import SAE

ROW = 128
"""Tokens per row at most, special ones included; an SAE whose manifest names a shorter context gets that."""
_SHORTEST = 8


class Rows(NamedTuple):
    """Token ids padded on the right, which of them are tokens, which of those are special, and which are measured."""

    ids: Int[Tensor, "row column"]
    real: Bool[Tensor, "row column"]
    special: Bool[Tensor, "row column"]
    measured: Bool[Tensor, "row column"]


@cache
def prose() -> str:
    """About 440 tokens of plain English with dialogue, a letter, numbers and a little code."""
    return (files("saeguard") / "assets" / "prose.txt").read_text(encoding="utf-8").strip()


def token_rows(sae: SAE, tokenizer: Any, text: Sequence[str] | None, ids: Any, special_ids: Iterable[int]) -> Rows:
    """Rows of ``ids`` as they are, or of ``text`` behind the BOS that ``sae`` was trained with.

    Special tokens are not measured, nor is the first token of a row without BOS: models treat it like one. Raises
    `TokensUnknown` without tokens and `MissingBOS` without the BOS that the SAE's manifest asks for.
    """
    rows = _given(ids) if ids is not None else _tokenised(sae, tokenizer, [prose()] if text is None else text)
    if not rows:
        raise TokensUnknown(f"a self-check of SAE {sae.name}", "there is no token in its text", "Give ordinary text.")
    width = max(map(len, rows))
    padded = torch.tensor([row + row[-1:] * (width - len(row)) for row in rows], dtype=torch.long)
    real = torch.tensor([[column < len(row) for column in range(width)] for row in rows], dtype=torch.bool)
    special = real & torch.isin(padded, torch.tensor(sorted(special_ids), dtype=torch.long))
    measured = real & ~special
    measured[:, :1] = False
    return Rows(padded, real, special, measured)


def _given(ids: Any) -> list[list[int]]:
    listed: list[Any] = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    rows = listed if listed and isinstance(listed[0], list | tuple | Tensor) else [listed]
    return [[int(token) for token in row] for row in rows if len(row)]


def _tokenised(sae: SAE, tokenizer: Any, text: Sequence[str]) -> list[list[int]]:
    if tokenizer is None:
        raise TokensUnknown(
            f"a self-check of SAE {sae.name}",
            "it was given neither a tokenizer nor ids",
            "Pass the model's tokenizer, or ids=... with a few hundred tokens of ordinary text.",
        )
    bos = tokenizer.bos_token_id
    if sae.manifest.get("bos") and bos is None:
        raise MissingBOS(
            f"SAE {sae.name} with a {type(tokenizer).__name__}",
            "the SAE was trained on text behind a BOS token, and this tokenizer has none",
            "Use the model's own tokenizer, or pass ids=... with a BOS in front yourself.",
        )
    front = [] if bos is None or sae.manifest.get("bos") is False else [bos]
    context = sae.manifest.get("context")
    step = (min(ROW, context) if isinstance(context, int) and context > _SHORTEST else ROW) - len(front)
    rows = []
    for part in [text] if isinstance(text, str) else text:
        tokens = list(tokenizer(part, add_special_tokens=False)["input_ids"])
        rows += [front + tokens[start : start + step] for start in range(0, len(tokens), step)]
    return [row for row in rows if len(row) >= _SHORTEST]
