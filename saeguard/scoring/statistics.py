"""What every activation-type score needs to know of some texts, gathered in one streaming pass per text.

Per latent j with activations f over the counted tokens t of a text, in float64:

    active      sum 1[f > 0]            sum     sum f           sum_sq    sum f^2         maximum   max f, and where
    documents d: m_d = mean over d of f; sum m_d, sum m_d^2, sum 1[m_d > 0]
    groups g of tokens: sum over g of f, and over the tokens in any group
    top         on how many tokens f is among the n largest (MOSAIC)
    special     sum 1[f > 0] and sum f over special tokens, which are in none of the above

Kinds whose activations have signs fire where f > 0; what is below zero counts in the sums of f and f^2 alone. The
model runs up to the SAE's site and no further. A text that was gathered before is read from the cache, and a pass that
was interrupted goes on where it was last saved. Every score of this family is a function of these numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from saeguard.engines.corrections import on_plain_weights
from saeguard.engines.layouts import Layout
from saeguard.errors import NotSliceable, ScoreMismatch
from saeguard.fingerprints import model_fingerprint
from saeguard.sae import SAE
from saeguard.scoring.accumulators import COUNTS, PER_LATENT, Accumulator
from saeguard.scoring.cache import Cache, Entry, key_of
from saeguard.scoring.reading import SiteReader, name_of
from saeguard.scoring.table import Meaning, ScoreTable
from saeguard.scoring.texts import Texts
from saeguard.tokens import is_special

SCHEMA = 1
BATCH = 16
"""Rows per forward pass."""
TOP_N = 5
"""MOSAIC's latents per token."""

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


@dataclass(frozen=True, eq=False)
class PerText:
    """Per document and latent, where not zero: the sum of activations, and on how many tokens it was among the top."""

    document: Int[Tensor, " entry"]
    latent: Int[Tensor, " entry"]
    sum: Float[Tensor, " entry"]
    top: Float[Tensor, " entry"]
    n_tokens: Int[Tensor, " document"]
    """Counted tokens of every document; some may have none."""

    def matrix(self, which: str, d_sae: int) -> Float[Tensor, "document d_sae"]:
        """``sum`` or ``top`` as a sparse matrix."""
        shape = (len(self.n_tokens), d_sae)
        return torch.sparse_coo_tensor(
            torch.stack([self.document, self.latent]), getattr(self, which), shape, check_invariants=True
        ).coalesce()


@dataclass(frozen=True, eq=False)
class CorpusStatistics:
    """The sums over one text; see the module's text. ``maximum_position`` counts the row's tokens, padding left out."""

    name: str
    fingerprint: str
    n_tokens: int
    n_special: int
    n_documents: int
    active: Float64[Tensor, " d_sae"]
    sum: Float64[Tensor, " d_sae"]
    sum_sq: Float64[Tensor, " d_sae"]
    maximum: Float64[Tensor, " d_sae"]
    maximum_row: Int[Tensor, " d_sae"]
    maximum_position: Int[Tensor, " d_sae"]
    document_sum: Float64[Tensor, " d_sae"]
    document_sq: Float64[Tensor, " d_sae"]
    document_active: Float64[Tensor, " d_sae"]
    special_active: Float64[Tensor, " d_sae"]
    special_sum: Float64[Tensor, " d_sae"]
    top: Float64[Tensor, " d_sae"]
    group_sum: Float64[Tensor, "group d_sae"]
    group_tokens: Int[Tensor, " group"]
    grouped_sum: Float64[Tensor, " d_sae"]
    grouped_tokens: int
    groups: tuple[str, ...] = ()
    texts: PerText | None = None

    @property
    def frequency(self) -> Float64[Tensor, " d_sae"]:
        """Share of the tokens on which the latent fires."""
        return self.active / self.n_tokens

    @property
    def mean(self) -> Float64[Tensor, " d_sae"]:
        """Mean activation over all tokens, those where it does not fire included."""
        return self.sum / self.n_tokens


@dataclass(frozen=True, eq=False)
class Statistics:
    """The sums over several texts for one SAE on one model, by the names that the texts were given under."""

    sae: str
    sae_fingerprint: str
    d_sae: int
    model: str
    settings: Mapping[str, Any]
    corpora: Mapping[str, CorpusStatistics] = field(default_factory=dict)

    def of(self, name: str) -> CorpusStatistics:
        """One text's. Raises `ScoreMismatch` when there is none of that name, or no token in it."""
        if name not in self.corpora or self.corpora[name].n_tokens == 0:
            raise ScoreMismatch(
                f"a score of {self.sae} over the text {name!r}",
                f"there are statistics of {', '.join(map(repr, self.corpora)) or 'no text'}"
                if name not in self.corpora else "none of its tokens counts",
                "Gather that text too." if name not in self.corpora else "Give text that is not only special tokens.",
            )  # fmt: skip
        return self.corpora[name]

    def per_text(self, name: str) -> PerText:
        """One text's sums per document. Raises `ScoreMismatch` when they were not gathered."""
        found = self.of(name).texts
        if found is None:
            raise ScoreMismatch(
                f"a score per document of the text {name!r}", "its statistics were gathered for the text as a whole",
                "Gather it with per_text=True.",
            )  # fmt: skip
        return found

    def table(
        self, score: str, columns: Mapping[str, tuple[Tensor, Meaning]], corpora: Mapping[str, str], **settings: Any
    ) -> ScoreTable:
        """A table of columns made from some of these texts: ``corpora`` says which stands for what."""
        made = {
            "score": score, "model": self.model, **self.settings, **settings,
            "texts": {role: {"name": name, "fingerprint": self.of(name).fingerprint, "n_tokens": self.of(name).n_tokens}
                      for role, name in corpora.items()},
        }  # fmt: skip
        return ScoreTable(
            self.sae, self.sae_fingerprint, self.d_sae,
            {name: column.detach().float() for name, (column, _) in columns.items()},
            {name: meaning for name, (_, meaning) in columns.items()},
            dict.fromkeys(columns, made),
        )  # fmt: skip


def gather(
    model: nn.Module,
    sae: SAE,
    corpora: Mapping[str, Texts],
    *,
    top_n: int = TOP_N,
    per_text: bool = False,
    batch_rows: int = BATCH,
    cache: Cache | None = None,
    save_every: int = 50,
    progress: Progress | None = None,
    layout: Layout | None = None,
) -> Statistics:
    """One pass of ``model`` over each text, up to the SAE's site; texts that ``cache`` has are not passed again.

    ``per_text`` keeps sums per document too, as many numbers as latents fire in each. With a cache the state is
    saved every ``save_every`` batches, and an interrupted pass goes on from there. ``batch_rows`` changes speed and
    memory only. Raises `NotSliceable` for an SAE that was read in part, and what `SiteReader` raises.
    """
    if sae.held is not None:
        raise NotSliceable(
            f"statistics of all {sae.d_sae} latents of {sae.name}", f"only {len(sae.held)} of them were read",
            "Load it without latents=...",
        )  # fmt: skip
    reader = SiteReader(model, sae, layout=layout)
    special = sorted(reader.engine.special_ids() | set(sae.manifest.get("special_ids", ())))
    made_of = {
        "schema": SCHEMA, "sae": sae.fingerprint(), "site": str(sae.site), "special_ids": special, "top_n": top_n,
        "per_text": per_text, "model": model_fingerprint(model) if cache is not None else None,
    }  # fmt: skip
    walk = _Walk(
        reader, on_plain_weights(sae, reader.engine).to(device=reader.device), made_of, batch_rows, cache, save_every
    )
    total, done = sum(len(text.ids) for text in corpora.values()), 0
    found = {}
    for name, text in corpora.items():

        def report(rows: int, before: int = done) -> None:
            if progress is not None:
                progress(before + rows, total)

        found[name] = walk.over(text, report)
        done += len(text.ids)
    settings = {"site": str(sae.site), "top_n": top_n}
    return Statistics(sae.name, made_of["sae"], sae.d_sae, name_of(reader), settings, found)


@dataclass(frozen=True, eq=False)
class _Walk:
    """One SAE on one model, over one text after another."""

    reader: SiteReader
    sae: SAE
    made_of: Mapping[str, Any]
    batch_rows: int
    cache: Cache | None
    save_every: int

    def over(self, text: Texts, report: Callable[[int], None]) -> CorpusStatistics:
        key = key_of(**self.made_of, text=text.fingerprint)
        entry = self.cache.read(key) if self.cache is not None else None
        if entry is None:
            state = self._pass(text, f"{key}.unfinished", report)
            entry = Entry(state, {"groups": list(text.groups)})
            if self.cache is not None:
                self.cache.write(key, *entry)
                self.cache.drop(f"{key}.unfinished")
        report(len(text.ids))
        return _statistics(text, entry)

    def _pass(self, text: Texts, key: str, report: Callable[[int], None]) -> dict[str, Tensor]:
        sums = Accumulator(self.sae, len(text.groups), top_n=self.made_of["top_n"], per_text=self.made_of["per_text"])
        start, saved = 0, self.cache.read(key) if self.cache is not None else None
        if saved is not None:
            sums.load(saved.tensors)
            start = saved.meta["rows"]
        special_ids = torch.tensor(self.made_of["special_ids"], dtype=torch.long)
        for number, batch in enumerate(text.batches(self.batch_rows, start=start), 1):
            if batch.ids.numel():
                special = is_special(batch.ids, special_ids)
                x = self.reader.read(batch.ids)
                _check_finite(text, f"the stream at {self.sae.site}", x)  # some kinds take NaN for silence
                sums.add(batch, x, special)
            report(batch.rows.stop)
            if self.cache is not None and number % self.save_every == 0:
                self.cache.write(key, sums.state(), {"rows": batch.rows.stop})
        sums.finish()
        return sums.state()


def _statistics(text: Texts, entry: Entry) -> CorpusStatistics:
    state = entry.tensors
    _check_finite(text, "what some latents give", state["sum_sq"])
    names = (*PER_LATENT, "maximum_row", "maximum_position", "group_sum", "group_tokens")
    sums: dict[str, Any] = {name: int(state[name]) for name in COUNTS} | {name: state[name] for name in names}
    found = CorpusStatistics(text.name, text.fingerprint, groups=text.groups, **sums)
    if "text_sum" not in state:
        return found
    n_tokens = torch.zeros(text.n_documents, dtype=torch.int64)
    n_tokens[state["text_number"]] = state["text_tokens"]
    document, latent, total, top = (state[f"text_{name}"] for name in ("document", "latent", "sum", "top"))
    return replace(found, texts=PerText(document, latent, total, top, n_tokens))


def _check_finite(text: Texts, what: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ScoreMismatch(
            f"statistics of the text {text.name!r}", f"{what} is NaN or infinite",
            "Run the model in float32 or bfloat16, and check the SAE with saeguard's self-check.",
        )  # fmt: skip
