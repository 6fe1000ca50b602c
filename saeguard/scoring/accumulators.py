"""Running sums over the latents' activations, fed with the tokens of one batch after another.

Activations are sparse, so each block of tokens is encoded once, its activations that are not zero are listed as
(token, latent, value), and every sum is a count over that list, in float64 on the CPU. Latents are encoded a slice at
a time and tokens a block at a time, so memory is bounded whatever the width of the SAE.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from saeguard.sae import SAE
from saeguard.scoring.texts import Batch

TOKENS, LATENTS = 2048, 8192
"""Tokens and latents that are encoded at a time, where latents can be encoded alone."""
MOST = 2**24
"""Activations held at a time where they cannot."""

PER_LATENT = ("active", "sum", "sum_sq", "maximum", "document_sum", "document_sq", "document_active", "special_active",
              "special_sum", "top", "grouped_sum")  # fmt: skip
COUNTS = ("n_tokens", "n_special", "n_documents", "grouped_tokens")


class Fired(NamedTuple):
    """Activations that are not zero: their tokens, in rising order, their latents, and their values in float64."""

    token: Int[Tensor, " n"]
    latent: Int[Tensor, " n"]
    value: Float64[Tensor, " n"]

    def keep(self, which: Tensor) -> "Fired":
        return Fired(self.token[which], self.latent[which], self.value[which])


@dataclass(frozen=True, eq=False)
class Piece:
    """An SAE that holds the latents from ``low`` on."""

    low: int
    sae: SAE


def pieces(sae: SAE, size: int = LATENTS) -> list[Piece]:
    """The SAE in slices of latents, which share its memory; one slice where latents depend on each other."""
    if sae.ranks or sae.d_sae <= size:
        return [Piece(0, sae)]
    found = []
    for low in range(0, sae.d_sae, size):
        part = slice(low, min(low + size, sae.d_sae))
        cut = {name: None if (t := getattr(sae, name)) is None else t[part] for name in ("threshold", "maximum")}
        held = tuple(range(part.start, part.stop))
        found.append(Piece(low, replace(
            sae, W_enc=sae.W_enc[:, part], b_enc=sae.b_enc[part], W_dec=sae.W_dec[part], held=held, total=sae.d_sae,
            **cut,
        )))  # fmt: skip
    return found


def fired(parts: list[Piece], x: Float[Tensor, "token d_in"]) -> Iterator[Fired]:
    """What fires at the tokens of ``x``, one slice of latents after another."""
    for piece in parts:
        f = piece.sae.activate(piece.sae.read(x).x)
        token, latent = f.nonzero(as_tuple=True)
        yield Fired(token.cpu(), latent.cpu() + piece.low, f[token, latent].cpu().double())


class Accumulator:
    """The sums over one text so far. ``tensors`` is all of its state, and what `from_tensors` makes it again from."""

    def __init__(self, sae: SAE, n_groups: int, *, top_n: int, per_text: bool):
        self.d_sae, self.top_n, self.per_text = sae.d_sae, top_n, per_text
        self.tensors = {name: torch.zeros(sae.d_sae, dtype=torch.float64) for name in PER_LATENT}
        self.tensors |= {name: torch.zeros((), dtype=torch.int64) for name in COUNTS}
        self.tensors |= {
            "maximum_row": torch.full((sae.d_sae,), -1),
            "maximum_position": torch.full((sae.d_sae,), -1),
            "group_sum": torch.zeros(n_groups, sae.d_sae, dtype=torch.float64),
            "group_tokens": torch.zeros(n_groups, dtype=torch.int64),
            # the document that the next batch may go on with: its number, its tokens, its sums, its top counts
            "open": torch.tensor([-1, 0]),
            "open_sums": torch.zeros(1 + per_text, sae.d_sae, dtype=torch.float64),
        }
        self._texts: list[dict[str, Tensor]] = []
        self._pieces = pieces(sae)
        self._tokens = max(MOST // sae.d_sae, 1) if sae.ranks else TOKENS

    @property
    def texts(self) -> dict[str, Tensor]:
        """Per document that was finished and per latent that fired in it: sums, and counts among the top n."""
        none = {
            "text_document": torch.zeros(0, dtype=torch.int64),
            "text_latent": torch.zeros(0, dtype=torch.int64),
            "text_sum": torch.zeros(0),
            "text_top": torch.zeros(0),
            "text_number": torch.zeros(0, dtype=torch.int64),
            "text_tokens": torch.zeros(0, dtype=torch.int64),
        }
        return {name: torch.cat([none[name], *(part[name] for part in self._texts)]) for name in none}  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """Everything, to be written to a file."""
        return self.tensors | (self.texts if self.per_text else {})

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.tensors = {name: state[name].clone() for name in self.tensors}
        self._texts = [{name: state[name] for name in self.texts}] if self.per_text else []

    def add(self, batch: Batch, x: Float[Tensor, "batch pos d_in"], special: Bool[Tensor, "batch pos"]) -> None:
        """Take a batch in: ``x`` is the stream of its rows, ``special`` more special tokens than the text knows of."""
        special = special | batch.special
        kept = batch.kept & ~special
        self._add_special(x[(batch.real & special).to(x.device)])
        row, position = kept.nonzero(as_tuple=True)
        documents, local = batch.document[row].unique_consecutive(return_inverse=True)
        sums = torch.zeros(len(documents), 1 + self.per_text, self.d_sae, dtype=torch.float64)
        tokens, member = x[kept.to(x.device)], batch.member[kept]
        for low in range(0, len(row), self._tokens):
            part = slice(low, low + self._tokens)
            places = torch.stack([row[part] + batch.rows.start, position[part]])
            self._add_block(tokens[part], places, local[part], sums, member[part])
        self.tensors["n_tokens"] += len(row)
        self.tensors["group_tokens"] += member.sum(0)
        self.tensors["grouped_tokens"] += member.any(1).sum()
        self._add_documents(documents, torch.bincount(local, minlength=len(documents)), sums)

    def finish(self) -> None:
        """Close the last document; nothing can be added after that."""
        number, count = self.tensors["open"].tolist()
        if count:
            self._close(torch.tensor([number]), torch.tensor([count]), self.tensors["open_sums"][None])
        self.tensors["open"] = torch.tensor([-1, 0])
        self.tensors["open_sums"] = torch.zeros_like(self.tensors["open_sums"])

    def _add_block(self, x: Tensor, places: Tensor, local: Tensor, sums: Tensor, member: Tensor) -> None:
        best = Fired(*(torch.zeros(0, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.float64)))
        for found in fired(self._pieces, x):
            positive = found.keep(found.value > 0)
            self._count("active", positive.latent)
            self._count("sum", found.latent, found.value)
            self._count("sum_sq", found.latent, found.value.square())
            self._add_maximum(positive, places)
            sums[:, 0] += self._by_row(local[found.token], found.latent, found.value, len(sums))
            best = _largest(best, positive, self.top_n)
            for g in range(member.shape[1]):
                inside = member[found.token, g]
                self.tensors["group_sum"][g] += self._sum(found.latent[inside], found.value[inside])
            if member.shape[1]:
                inside = member.any(1)[found.token]
                self._count("grouped_sum", found.latent[inside], found.value[inside])
        self._count("top", best.latent)
        if self.per_text:
            sums[:, 1] += self._by_row(local[best.token], best.latent, torch.ones_like(best.value), len(sums))

    def _add_special(self, x: Float[Tensor, "token d_in"]) -> None:
        self.tensors["n_special"] += len(x)
        for low in range(0, len(x), self._tokens):
            for found in fired(self._pieces, x[low : low + self._tokens]):
                self._count("special_active", found.latent[found.value > 0])
                self._count("special_sum", found.latent, found.value)

    def _add_maximum(self, found: Fired, places: Tensor) -> None:
        """The largest activation, and the first place that has it."""
        largest = torch.zeros(self.d_sae, dtype=torch.float64)
        largest.scatter_reduce_(0, found.latent, found.value, "amax")
        better = largest > self.tensors["maximum"]
        there = found.keep(better[found.latent] & (found.value == largest[found.latent]))
        first = torch.full((self.d_sae,), places.shape[1]).scatter_reduce_(0, there.latent, there.token, "amin")
        self.tensors["maximum"] = torch.where(better, largest, self.tensors["maximum"])
        for name, place in zip(("maximum_row", "maximum_position"), places, strict=True):
            self.tensors[name][better] = place[first[better]]

    def _add_documents(self, numbers: Tensor, counts: Tensor, sums: Tensor) -> None:
        """Close every document but the last, which the next batch may go on with."""
        if not len(numbers):
            return
        number, count = self.tensors["open"].tolist()
        if count and number == int(numbers[0]):
            sums[0] += self.tensors["open_sums"]
            counts[0] += count
        elif count:
            self._close(torch.tensor([number]), torch.tensor([count]), self.tensors["open_sums"][None])
        self._close(numbers[:-1], counts[:-1], sums[:-1])
        self.tensors["open"] = torch.stack([numbers[-1], counts[-1]])
        self.tensors["open_sums"] = sums[-1].clone()

    def _close(self, numbers: Tensor, counts: Tensor, sums: Tensor) -> None:
        means = sums[:, 0] / counts[:, None]
        self.tensors["n_documents"] += len(numbers)
        self.tensors["document_sum"] += means.sum(0)
        self.tensors["document_sq"] += means.square().sum(0)
        self.tensors["document_active"] += (means > 0).sum(0)
        if self.per_text:
            text, latent = (sums != 0).any(1).nonzero(as_tuple=True)
            self._texts.append({
                "text_document": numbers[text], "text_latent": latent, "text_sum": sums[text, 0, latent].float(),
                "text_top": sums[text, 1, latent].float(), "text_number": numbers, "text_tokens": counts,
            })  # fmt: skip

    def _count(self, name: str, latent: Tensor, value: Tensor | None = None) -> None:
        self.tensors[name] += self._sum(latent, value)

    def _sum(self, latent: Tensor, value: Tensor | None = None) -> Float64[Tensor, " d_sae"]:
        return torch.bincount(latent, value, minlength=self.d_sae).double()

    def _by_row(self, row: Tensor, latent: Tensor, value: Tensor, rows: int) -> Float64[Tensor, "row d_sae"]:
        flat = torch.bincount(row * self.d_sae + latent, value, minlength=rows * self.d_sae)
        return flat.double().view(rows, self.d_sae)


def _largest(a: Fired, b: Fired, n: int) -> Fired:
    """Of each token the ``n`` largest activations of both lists, the first latents among equals."""
    both = Fired(*(torch.cat(pair) for pair in zip(a, b, strict=True)))
    if n == 0 or not len(both.token):
        return both.keep(torch.zeros(0, dtype=torch.int64))
    order = both.value.argsort(descending=True, stable=True)
    order = order[both.token[order].argsort(stable=True)]
    token = both.token[order]
    first = torch.searchsorted(token, token)  # where the token's own begin
    return both.keep(order[torch.arange(len(token)) - first < n])
