"""One SAE in a few numbers, on text and on tokens drawn at random, so that two can be set side by side.

    FVU            sum |x - x_hat|^2 / sum |x - mean|^2       counted tokens; the typical ones among them apart
    L0             latents active per token                   dead: those that were active on none
    CE recovered   (CE_zero - CE_sae) / (CE_zero - CE)        x_hat, or zero, in the place of x
    fake           share of latents that are active on more than ``fake_above`` of random tokens

FaithfulSAE (arXiv 2506.17673) has the last one as Fake Feature Ratio and does not say what it takes for too often.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from saeguard.engines.layouts import Layout
from saeguard.evaluating.moments import Spread, share_of
from saeguard.evaluating.passes import Passes, Progress, Replace, Text, code, cross_entropies, n_predicted
from saeguard.sae import SAE

FAKE_ABOVE = 0.1


@dataclass(frozen=True)
class Measures:
    """What an SAE does on one text. The losses are in nats per token, None where none was taken."""

    name: str
    n_tokens: int
    n_massive: int
    fvu: float
    fvu_typical: float
    l0: float
    dead: int
    n_ce_tokens: int
    ce: float | None = None
    ce_spliced: float | None = None
    ce_zeroed: float | None = None

    @property
    def ce_recovered(self) -> float | None:
        """1 where x_hat costs nothing, 0 where zero in its place would cost the same; None where zero costs nothing."""
        if self.ce is None or self.ce_spliced is None or self.ce_zeroed is None or self.ce_zeroed <= self.ce:
            return None
        return (self.ce_zeroed - self.ce_spliced) / (self.ce_zeroed - self.ce)


@dataclass(frozen=True)
class Portrait:
    """One SAE over all texts and by text. ``fake`` is None without random tokens."""

    sae: str
    model: str
    site: str
    d_sae: int
    whole: Measures
    texts: tuple[Measures, ...]
    fake: float | None
    fake_above: float


def portrait(
    model: nn.Module,
    sae: SAE,
    texts: Sequence[Text],
    *,
    random: Text | None = None,
    fake_above: float = FAKE_ABOVE,
    n_ce_rows: int | None = None,
    batch_rows: int = 8,
    progress: Progress | None = None,
    layout: Layout | None = None,
) -> Portrait:
    """Measure ``sae`` at its site; cross-entropy on ``n_ce_rows`` rows of each text at most (0: none).

    Raises what `Passes` raises, and `ScoreMismatch` for texts without a token.
    """
    passes = Passes(model, sae, layout=layout)
    massive = passes.massive_from(texts)
    tallies = [_Tally(sae, massive) for _ in texts]
    for read in passes.stream(texts, batch_rows=batch_rows, stage="reading", progress=progress):
        tallies[read.text].add(passes.sae, read.x)
    fake = None
    if random is not None:
        rare = _Tally(sae, massive)
        for read in passes.stream([random], batch_rows=batch_rows, stage="random tokens", progress=progress):
            rare.add(passes.sae, read.x)
        fake = float((rare.fired > fake_above * rare.all_x.n).double().mean())
    losses = _losses(passes, [text.rows(slice(n_ce_rows)) for text in texts], progress)
    whole = _Tally(sae, massive)
    for tally in tallies:
        whole = whole.plus(tally)
    return Portrait(
        sae.name, passes.model_name, str(passes.site), sae.d_sae, whole.measures("all", *_mean(losses)),
        tuple(tally.measures(text.name, *loss) for tally, text, loss in zip(tallies, texts, losses, strict=True)),
        fake, fake_above,
    )  # fmt: skip


def _losses(
    passes: Passes, texts: Sequence[Text], progress: Progress | None
) -> list[tuple[int, dict[str, float] | None]]:
    """Per text, over how many tokens, and the mean losses."""
    variants: dict[str, Replace | None] = {
        "ce": None, "ce_spliced": lambda x: code(passes.sae, x).x_hat, "ce_zeroed": torch.zeros_like,
    }  # fmt: skip
    found = cross_entropies(passes, texts, variants, progress=progress)
    return [(n_predicted(text), loss) for text, loss in zip(texts, found, strict=True)]


def _mean(losses: Sequence[tuple[int, dict[str, float] | None]]) -> tuple[int, dict[str, float] | None]:
    """Over the tokens of all texts."""
    known = [(n, loss) for n, loss in losses if loss is not None]
    total = sum(n for n, _ in known)
    return total, {name: sum(n * loss[name] for n, loss in known) / total for name in known[0][1]} if known else None


class _Tally:
    """Sums over the counted tokens of one text, and over the typical ones among them."""

    def __init__(self, sae: SAE, massive: float):
        self.sae, self.massive = sae, massive
        self.all_x, self.typical_x = Spread(sae.d_in), Spread(sae.d_in)
        self.error, self.typical_error, self.active = 0.0, 0.0, 0
        self.fired: Int64[Tensor, " d_sae"] = torch.zeros(sae.d_sae, dtype=torch.int64)

    def add(self, sae: SAE, x: Tensor) -> None:
        coded = code(sae, x)
        typical = torch.linalg.vector_norm(x, dim=-1) <= self.massive
        error = (x - coded.x_hat).double().square().sum(-1)
        self.all_x.add(x)
        self.typical_x.add(x[typical])
        self.error += float(error.sum())
        self.typical_error += float(error[typical].sum())
        self.active += int(coded.active.sum())
        self.fired += coded.fired

    def plus(self, other: "_Tally") -> "_Tally":
        both = _Tally(self.sae, self.massive)
        for name in ("all_x", "typical_x", "error", "typical_error", "active", "fired"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def measures(self, name: str, n_ce_tokens: int, losses: dict[str, float] | None) -> Measures:
        return Measures(
            name=name, n_tokens=self.all_x.n, n_massive=self.all_x.n - self.typical_x.n,
            fvu=share_of(self.error, self.all_x.variance),
            fvu_typical=share_of(self.typical_error, self.typical_x.variance),
            l0=share_of(self.active, self.all_x.n), dead=int((self.fired == 0).sum()), n_ce_tokens=n_ce_tokens,
            **(losses or {}),
        )  # fmt: skip
