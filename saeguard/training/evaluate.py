"""Measure an SAE on text it has not seen, in the form in which it will be used, with the model in float32.

FVU           sum |x - x_hat|^2 / sum |x - mean|^2      over tokens that are neither special nor padding
L0            latents active per such token
CE recovered  (CE_zero - CE_spliced) / (CE_zero - CE)   x_hat, or zero, put in the place of x at such tokens
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from saeguard.errors import TrainError
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.training.activations import Reader, find_blocks
from saeguard.training.corpus import Chunks

MASSIVE = 4.0
"""Times the median norm; a token beyond it is left out of ``fvu_typical``."""


ZEROED = "zeroed"
Splice = SAE | Literal["zeroed"] | None
"""What stands in the place of x: a reconstruction, zero, or x itself."""


@dataclass(frozen=True)
class Evaluation:
    """``fvu_typical`` leaves out massive tokens, whose variance is large and easy to explain; ``dead`` counts latents
    that fired on none of ``n_tokens``; the CE numbers are nats per token over ``n_ce_tokens``.
    """

    n_tokens: int
    fvu: float
    fvu_typical: float
    n_massive: int
    l0: float
    dead: int
    n_ce_tokens: int
    ce: float
    ce_spliced: float
    ce_zeroed: float
    ce_recovered: float

    def rounded(self) -> dict[str, Any]:
        """As JSON numbers with five decimals."""
        return {key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(self).items()}


def evaluate_sae(
    sae: SAE,
    model: nn.Module,
    chunks: Chunks,
    *,
    batch_rows: int = 8,
    n_ce_chunks: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure ``sae`` at its site; cross-entropy on the first ``n_ce_chunks`` chunks, the rest on all of them.

    Raises `TrainError` when there is no text or the SAE names no site.
    """
    (found,) = evaluate_saes([sae], model, chunks, batch_rows=batch_rows, n_ce_chunks=n_ce_chunks, progress=progress)
    return found


def evaluate_saes(
    saes: Sequence[SAE],
    model: nn.Module,
    chunks: Chunks,
    *,
    batch_rows: int = 8,
    n_ce_chunks: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Evaluation]:
    """Measure several SAEs of one site on the same tokens, such as a base with and without its boosts.

    Each gets the numbers that `evaluate_sae` gives it, and what does not depend on the SAE is computed once. Raises
    `TrainError` when there is no text, an SAE names no site, or they differ in it.
    """
    site = saes[0].site if saes else None
    if site is None or not len(chunks.ids) or any(sae.site != site for sae in saes):
        raise TrainError(
            f"an evaluation of {', '.join(sae.name for sae in saes) or 'no SAEs'}",
            "there is no text to measure on" if site else "it names no site",
            "Give SAEs of one site, and held-out text.",
        )
    n_ce = len(chunks.ids) if n_ce_chunks is None else min(n_ce_chunks, len(chunks.ids))
    total = len(chunks.ids) + n_ce
    tallies = [_Tally(sae) for sae in saes]
    with Reader(model, [site], exact=True) as reader:
        for start in range(0, len(chunks.ids), batch_rows):
            rows = slice(start, start + batch_rows)
            x = reader.read(chunks.ids[rows])[site][chunks.kept[rows]]
            for tally in tallies:
                tally.add(x)
            if progress is not None:
                progress(min(start + batch_rows, len(chunks.ids)), total)
    sums, n_ce_tokens = torch.zeros(2 + len(saes), dtype=torch.float64), 0
    for start in range(0, n_ce, batch_rows):
        rows = slice(start, min(start + batch_rows, n_ce))
        ids, kept = chunks.ids[rows], chunks.kept[rows]
        each: list[Splice] = [None, ZEROED, *saes]
        sums += torch.stack([_summed_ce(model, ids, kept, site, splice) for splice in each])
        n_ce_tokens += int(kept[:, 1:].sum())
        if progress is not None:
            progress(len(chunks.ids) + min(start + batch_rows, n_ce), total)
    ce, zeroed, *spliced = (sums / max(n_ce_tokens, 1)).tolist()
    return [
        Evaluation(
            **tally.result(), n_ce_tokens=n_ce_tokens, ce=ce, ce_spliced=mine, ce_zeroed=zeroed,
            ce_recovered=(zeroed - mine) / (zeroed - ce) if zeroed != ce else float("nan"),
        )
        for tally, mine in zip(tallies, spliced, strict=True)
    ]  # fmt: skip


def reconstruction(sae: SAE, x: Float[Tensor, "tokens d_in"]) -> dict[str, float | int]:
    """FVU, L0 and the dead of an SAE on activations already at hand, under `Evaluation`'s names."""
    tally = _Tally(sae)
    for part in x.split(4096):
        tally.add(part.float())
    return tally.result()


class _Tally:
    """Running sums for FVU and L0, in float64, over all tokens and over those that are not massive."""

    def __init__(self, sae: SAE):
        self.sae = sae
        self.counts, self.errors = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
        self.squares = torch.zeros(2, dtype=torch.float64)
        self.totals = torch.zeros(2, sae.d_in, dtype=torch.float64)
        self.active, self.fired = 0, torch.zeros(sae.d_sae, dtype=torch.bool)
        self.limit: float | None = None

    def add(self, x: Float[Tensor, "tokens d_in"]) -> None:
        norms = x.norm(dim=-1)
        self.limit = MASSIVE * float(norms.median()) if self.limit is None else self.limit
        f = self.sae.encode(x)
        error = (x - self.sae.decode(f, x)).double().square().sum(-1)
        self.active += int((f > 0).sum())
        self.fired |= (f > 0).any(0)
        for i, mask in enumerate((torch.ones_like(norms, dtype=torch.bool), norms <= self.limit)):
            self.counts[i] += mask.sum()
            self.errors[i] += error[mask].sum()
            self.squares[i] += x[mask].double().square().sum()
            self.totals[i] += x[mask].double().sum(0)

    def result(self) -> dict[str, Any]:
        spread = self.squares - self.totals.square().sum(-1) / self.counts.clamp(min=1)
        fvu, typical = (self.errors / spread).tolist()
        n, n_typical = (int(count) for count in self.counts)
        return {
            "n_tokens": n,
            "fvu": fvu,
            "fvu_typical": typical,
            "n_massive": n - n_typical,
            "l0": self.active / max(n, 1),
            "dead": int((~self.fired).sum()),
        }


@torch.no_grad()
def _summed_ce(
    model: nn.Module,
    ids: Int[Tensor, "batch pos"],
    kept: Bool[Tensor, "batch pos"],
    site: Site,
    splice: Splice,
) -> Float[Tensor, ""]:
    """Summed loss of predicting the kept tokens, with x left alone, replaced by x_hat or zeroed where kept."""
    with contextlib.ExitStack() as stack:
        if splice is not None:
            hook = _replacing(splice, kept)
            stack.callback(find_blocks(model)[site.layer].register_forward_hook(hook).remove)
        logits = model(input_ids=ids, use_cache=False).logits
    wanted = kept[:, 1:]
    return F.cross_entropy(logits[:, :-1][wanted].float(), ids[:, 1:][wanted], reduction="sum").double()


def _replacing(splice: Splice, kept: Bool[Tensor, "batch pos"]) -> Callable[..., Any]:
    def replace(block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        new, old = x.clone(), x[kept]
        new[kept] = splice.decode(splice.encode(old), old).to(x.dtype) if isinstance(splice, SAE) else 0.0
        return new if isinstance(output, Tensor) else (new, *output[1:])

    return replace
