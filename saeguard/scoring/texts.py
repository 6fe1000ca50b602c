"""Token rows that scores are computed over, and which of their tokens count.

Padding and special tokens are named by mask and by id, never by position: rows may be padded on either side, and the
same text has the same fingerprint whichever side that is.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saeguard.errors import MissingBOS, ScoreMismatch
from saeguard.sae import SAE
from saeguard.tokens import is_special

CONTEXT = 256
"""Tokens per row at most, BOS included, unless the SAE was trained on shorter ones."""
BEFORE, AFTER = 2, 3
"""Tokens around a group's token that count as the group's (ReasonScore, arXiv 2503.18878)."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows of a text, pushed to the left and cut to the longest of them."""

    rows: range
    ids: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    kept: Bool[Tensor, "batch pos"]
    special: Bool[Tensor, "batch pos"]
    document: Int[Tensor, " batch"]
    member: Bool[Tensor, "batch pos group"]


@dataclass(frozen=True, eq=False)
class Texts:
    """``mask`` says which columns are tokens, ``special`` which of those stand for no text, ``kept`` which count.

    ``document`` numbers the document of each row, from 0 and never going down. ``member[..., g]`` says which tokens
    belong to the group ``groups[g]``. Raises `ScoreMismatch` when shapes disagree or a document is torn apart.
    """

    name: str
    ids: Int[Tensor, "row column"]
    mask: Bool[Tensor, "row column"]
    kept: Bool[Tensor, "row column"]
    special: Bool[Tensor, "row column"]
    document: Int[Tensor, " n_rows"]
    groups: tuple[str, ...] = ()
    member: Bool[Tensor, "row column group"] | None = None

    def __post_init__(self):
        shape, wrong = tuple(self.ids.shape), ""
        member = (*shape, len(self.groups))
        others = [tuple(getattr(self, name).shape) for name in ("mask", "kept", "special")]
        if any(other != shape for other in others) or len(self.document) != shape[0]:
            wrong = f"ids are {shape}, mask, kept and special {others}, with {len(self.document)} document numbers"
        elif bool((self.kept & ~self.mask).any()) or bool((self.kept & self.special).any()):
            wrong = "a token counts that is padding or special"
        elif bool((self.document.diff() < 0).any()) or bool((self.document < 0).any()):
            wrong = "the document numbers go down"
        elif (tuple(self.member.shape) if self.member is not None else (*shape, 0)) != member:
            wrong = f"there are {len(self.groups)} groups of tokens and no mask of each"
        if wrong:
            raise ScoreMismatch(f"the text {self.name!r}", wrong, "Rows of one document are neighbours, in order.")

    @classmethod
    def from_ids(
        cls,
        ids: Int[Tensor, "row column"],
        *,
        special_ids: Iterable[int] = (),
        mask: Tensor | None = None,
        document: Int[Tensor, " row"] | None = None,
        name: str = "text",
    ) -> "Texts":
        """Rows of ``ids`` as they are; every row is a document of its own unless ``document`` says otherwise."""
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        special = torch.tensor(sorted(set(special_ids)), dtype=torch.long)
        document = torch.arange(len(ids)) if document is None else document
        found = real & is_special(ids, special)
        return cls(name, ids, real, real & ~found, found, document)

    @classmethod
    def from_chunks(
        cls, ids: Int[Tensor, "row column"], kept: Bool[Tensor, "row column"], *, name: str = "text"
    ) -> "Texts":
        """Rows padded on the right, of which only the counted tokens are known, as the training corpus has them.

        What stands behind a row's last counted token is taken for padding; it could not change what stands before.
        """
        real = kept.flip(1).cumsum(1).flip(1) > 0
        return cls(name, ids, real, kept, real & ~kept, torch.arange(len(ids)))

    @classmethod
    def from_text(
        cls,
        texts: Sequence[str],
        tokenizer: Any,
        sae: SAE,
        *,
        prompts: Sequence[str] | None = None,
        context: int = CONTEXT,
        name: str = "text",
    ) -> "Texts":
        """One document per text, cut into rows of ``context`` tokens that begin with BOS unless the SAE wants none.

        ``prompts`` are put in front of the texts and do not count, so that only the answers to them do; together they
        are one row, cut at its end. Raises `MissingBOS`.
        """
        bos, limit = _bos(tokenizer, sae), sae.manifest.get("context")
        width = max((min(context, limit) if isinstance(limit, int) else context) - len(bos), 1)
        special = special_ids_of(tokenizer, sae)
        rows: list[list[int]] = []
        leads, documents = [], []
        for number, text in enumerate(texts):
            lead = _ids(prompts[number], tokenizer, bos) if prompts is not None else []
            tokens = lead + _ids(text, tokenizer, bos)
            starts = range(0, max(len(tokens), 1) if prompts is None else 1, width)
            rows += [bos + tokens[start : start + width] for start in starts]
            leads += [len(bos) + len(lead) if prompts is not None else 0 for _ in starts]
            documents += [number for _ in starts]
        columns = torch.arange(max(map(len, rows), default=0))
        ids = torch.zeros(len(rows), len(columns), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask = columns < torch.tensor([len(row) for row in rows], dtype=torch.long)[:, None]
        numbers = torch.tensor(documents, dtype=torch.long)
        found = cls.from_ids(ids, special_ids=special, mask=mask, document=numbers, name=name)
        return replace(found, kept=found.kept & (columns >= torch.tensor(leads, dtype=torch.long)[:, None]))

    @classmethod
    def random(
        cls, vocabulary: int, sae: SAE, tokenizer: Any, *, rows: int = 64, columns: int = 128, seed: int = 0
    ) -> "Texts":
        """Rows of tokens drawn evenly from the ``vocabulary`` first ids without the special ones: text of no language.

        Raises `MissingBOS`.
        """
        bos, special = _bos(tokenizer, sae), special_ids_of(tokenizer, sae)
        plain = torch.tensor([token for token in range(vocabulary) if token not in special], dtype=torch.long)
        generator = torch.Generator().manual_seed(seed)
        drawn = plain[torch.randint(len(plain), (rows, columns), generator=generator)]
        front = torch.tensor([bos] * rows, dtype=torch.long).view(rows, len(bos))
        return cls.from_ids(torch.cat([front, drawn], dim=1), special_ids=special, name="random tokens")

    def with_groups(self, groups: Mapping[str, Iterable[int]], *, before: int = BEFORE, after: int = AFTER) -> "Texts":
        """The same text where a token also belongs to each group of ``groups`` whose token ids stand around it.

        A group's window reaches ``before`` tokens back and ``after`` on; tokens that do not count stay out of it.
        """
        text = self.packed
        member = torch.zeros(*text.ids.shape, len(groups), dtype=torch.bool)
        for g, ids in enumerate(groups.values()):
            hit = is_special(text.ids, torch.tensor(sorted(set(ids)), dtype=torch.long)) & text.mask
            for shift in range(-before, after + 1):
                member[..., g] |= _shifted(hit, shift)
        return replace(text, groups=tuple(groups), member=member & text.kept[..., None])

    @cached_property
    def packed(self) -> "Texts":
        """The same rows without padding in front of or between their tokens."""
        order = (~self.mask).to(torch.uint8).argsort(dim=1, stable=True)
        width = int(self.mask.sum(1).max()) if self.mask.numel() else 0
        order = order[:, :width]
        mask = self.mask.gather(1, order)
        member = self.member
        if member is not None:
            member = member.gather(1, order[..., None].expand(*order.shape, len(self.groups)))
        return replace(
            self, ids=torch.where(mask, self.ids.gather(1, order), 0), mask=mask, kept=self.kept.gather(1, order),
            special=self.special.gather(1, order), member=member,
        )  # fmt: skip

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the token ids, of which of them count, and of their documents and groups."""
        text = self.packed
        digest = hashlib.sha256(f"{tuple(text.ids.shape)} {self.groups}".encode())
        for tensor in (text.ids.long(), text.mask, text.kept, text.special, text.document.long(), text.member):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def n_documents(self) -> int:
        """How many document numbers there are, those of texts without a counted token included."""
        return int(self.document[-1]) + 1 if len(self.document) else 0

    def batches(self, rows: int, *, start: int = 0) -> Iterator[Batch]:
        """Rows from ``start`` on, ``rows`` at a time."""
        text = self.packed
        for low in range(start, len(text.ids), rows):
            part = slice(low, min(low + rows, len(text.ids)))
            real = text.mask[part]
            width = int(real.sum(1).max())
            member = torch.zeros(*real.shape, 0, dtype=torch.bool) if text.member is None else text.member[part]
            yield Batch(
                range(part.start, part.stop), text.ids[part, :width], real[:, :width], text.kept[part, :width],
                text.special[part, :width], text.document[part], member[:, :width],
            )  # fmt: skip


def special_ids_of(tokenizer: Any, sae: SAE) -> frozenset[int]:
    """Ids that stand for no text: those the tokenizer calls special, and those of the SAE's manifest."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {token for token, what in added.items() if what.special}
    return frozenset({*tokenizer.all_special_ids, *marked, *sae.manifest.get("special_ids", ())})


def _bos(tokenizer: Any, sae: SAE) -> list[int]:
    bos = tokenizer.bos_token_id
    if sae.manifest.get("bos") and bos is None:
        raise MissingBOS(
            f"SAE {sae.name} with a {type(tokenizer).__name__}",
            "the SAE was trained on text behind a BOS token, and this tokenizer has none",
            "Use the model's own tokenizer, or build Texts.from_ids with a BOS in front yourself.",
        )
    return [] if bos is None or sae.manifest.get("bos") is False else [bos]


def _ids(text: str, tokenizer: Any, bos: list[int]) -> list[int]:
    """Token ids of ``text``, without a BOS that it begins with already."""
    found = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found[1:] if bos and found[:1] == bos else found


def _shifted(hit: Bool[Tensor, "row column"], by: int) -> Bool[Tensor, "row column"]:
    """``hit`` moved to the right, or to the left where ``by`` is negative; nothing comes in at the ends."""
    moved = torch.zeros_like(hit)
    if by >= 0:
        moved[:, by:] = hit[:, : max(hit.shape[1] - by, 0)]
    else:
        moved[:, :by] = hit[:, -by:]
    return moved
