"""Does choosing latents by what they do make steering work? Generation success after filtering by output score and by
change of token confidence, against latents that nobody chose.

    python benchmarks/generation_success.py [--n 60] [--out success.png] [--work FOLDER]

SmolLM2-135M-Instruct, the shipped SAE of layer 20, and the fifty neutral prefixes. Each latent's factor is the one that
works best on the first ``--choose`` prefixes, and its success is counted on the others, so that no group gains from
having more luck with its factors:

    factor_j = argmax over factors of the mean of GenSuccess@20 over the first prefixes
    success_j = mean of GenSuccess@20 over the others, at factor_j

A filter is a set of latents, and a group is ``--n`` of them drawn at random: all take the first of one shuffled order,
so latents that pass several filters are steered once. Intervals are 95 % bootstrap intervals over the latents of all
groups together, which keeps what groups share. Filters: Arad et al. 2025 (arXiv 2505.20063): output score of at
least 0.01, and the best by rank; Wang et al. 2025 (arXiv 2510.03659): the tails of the change of token confidence,
which is positive where the moved model is less sure.
Every latent is kept in ``--work``: an interrupted run goes on there, and more latents cost only what is new. Sixty per
group are about 270 latents, and half an hour on two idle cores. The last line is JSON.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from saeguard import SAE, load_model, load_sae
from saeguard.latents import LatentTable
from saeguard.scoring.cache import Cache, key_of
from saeguard.scoring.generation_success import Writing, successes
from saeguard.scoring.logit_lens import top_tokens
from saeguard.scoring.output_score import output_score
from saeguard.scoring.prefixes import NEUTRAL
from saeguard.scoring.table import ScoreTable
from saeguard.scoring.token_confidence import token_confidence

MODEL, SHIPPED = "smollm2-135m-instruct", "smollm2-135m-instruct/resid_post.20"
FACTORS = (0.4, 0.8, 1.6, 3.0, 6.0, 10.0)
THRESHOLD, TAILS = 0.01, (0.95, 0.99)
CUTS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SCORE, CHANGE = "output_score", "confidence_change_1"
ROWS, DRAWS, FEWEST = 252, 4000, 5
Filters = list[tuple[str, frozenset[int]]]


@dataclass(frozen=True)
class Group:
    """A filter by name, the latents that pass it, and those of them that were drawn."""

    name: str
    passing: frozenset[int]
    latents: tuple[int, ...]


@dataclass(frozen=True)
class Estimate:
    """A mean or a ratio with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"

    def rounded(self) -> list[float]:
        return [round(number, 3) for number in (self.value, self.low, self.high)]


def reporter(what: str) -> Callable[[int, int], None]:
    """Say every half a minute how far a piece of work is."""
    said = [time.monotonic()]

    def report(done: int, total: int) -> None:
        if time.monotonic() - said[0] > 30 or done == total:
            said[0] = time.monotonic()
            print(f"{what}: {done} of {total} latents", flush=True)

    return report


def score_all(model: Any, tokenizer: Any, sae: SAE, work: Path) -> ScoreTable:
    """Output score and change of token confidence of every latent, behind the published prefix."""
    path = work / "scores.safetensors"
    if path.is_file() and (kept := ScoreTable.load(path)).sae_fingerprint == sae.fingerprint():
        return kept
    scores = output_score(model, tokenizer, sae, progress=reporter(SCORE), checkpoint=work / "output.part")
    change = token_confidence(model, tokenizer, sae, progress=reporter(CHANGE), checkpoint=work / "change.part")
    table = scores.join(change)
    table.save(path)
    return table


def filters(table: ScoreTable, live: Sequence[int]) -> list[Filters]:
    """Names and the latents that pass, among the live ones; filters of one list are nested, the loosest first."""
    score, change = (table.column(name)[list(live)].double() for name in (SCORE, CHANGE))

    def passing(keep: Tensor) -> frozenset[int]:
        return frozenset(latent for latent, kept in zip(live, keep.tolist(), strict=True) if kept)

    tails = {f"{100 * (1 - tail):.0f} %": tail for tail in TAILS}
    return [
        [("all live latents", frozenset(live))],
        [(f"output score >= {THRESHOLD}", passing(score >= THRESHOLD))],
        [(f"output score, best {share}", passing(score >= score.quantile(tail))) for share, tail in tails.items()],
        [(f"least sure {share} by change", passing(change >= change.quantile(tail))) for share, tail in tails.items()],
        [(f"surest {share} by change", passing(change <= change.quantile(1 - tail))) for share, tail in tails.items()],
    ]


def draw(nested: Sequence[Filters], live: Sequence[int], n: int, seed: int) -> list[Group]:
    """The first ``n`` that pass a filter, in one order for all; of a tighter filter only those drawn by a looser one,
    so that it costs no steering of its own."""
    order = torch.randperm(len(live), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = []
    for tier in nested:
        pool = [live[place] for place in order]
        for name, passing in tier:
            pool = [latent for latent in pool if latent in passing][:n]
            groups.append(Group(name, passing, tuple(pool)))
    return [group for group in groups if group.latents]


class Steering:
    """Counts of the model, kept on disk latent by latent, so that more latents cost what is new and nothing else."""

    def __init__(self, model: Any, tokenizer: Any, sae: SAE, work: Path, seed: int):
        self._given, self._cache, self._own = (model, tokenizer, sae), Cache(work), top_tokens(model, sae)
        self._how, self._sae = Writing(seed=seed), sae.fingerprint()

    def counts(self, latents: Sequence[int], factors: Sequence[float], prefixes: Sequence[str], what: str) -> Tensor:
        """Hits per latent, factor, prefix and k."""
        how = replace(self._how, factors=tuple(factors))
        asked = {"how": repr(how), "prefixes": list(prefixes), "sae": self._sae, "model": MODEL}
        keys = {latent: key_of(latent=latent, **asked) for latent in latents}
        found = {latent: kept.tensors["counts"] for latent in latents if (kept := self._cache.read(keys[latent]))}
        report, missing = reporter(what), [latent for latent in latents if latent not in found]
        size = max(1, ROWS // (len(factors) * len(prefixes)))
        for start in range(0, len(missing), size):
            some = missing[start : start + size]
            given = successes(*self._given, some, how=how, own=self._own, prefixes=prefixes, batch=ROWS)
            for latent, counts in zip(some, given, strict=True):
                found[latent] = counts
                self._cache.write(keys[latent], {"counts": counts}, {})
            report(start + len(some), len(missing))
        return torch.stack([found[latent] for latent in latents])


def measure(steering: Steering, latents: Sequence[int], choose: int) -> dict[str, dict[int, float]]:
    """Per latent: its ``factor``, its success at each k on the other prefixes, and what the ``plain`` model gives."""
    first, others = NEUTRAL[:choose], NEUTRAL[choose:]
    search = steering.counts(latents, (0.0, *FACTORS), first, "choosing factors").mean(2)
    best = search[:, 1:, -1].argmax(1).tolist()
    found: dict[str, dict[int, float]] = {name: {} for name in ("factor", "plain", "@1", "@5", "@20")}
    found["plain"] = dict(zip(latents, search[:, 0, -1].tolist(), strict=True))
    for place, factor in enumerate(FACTORS):
        some = [latent for latent, chosen in zip(latents, best, strict=True) if chosen == place]
        if not some:
            continue
        counts = steering.counts(some, (factor,), others, f"writing at factor {factor}").mean((1, 2))
        for latent, row in zip(some, counts.tolist(), strict=True):
            found["factor"][latent] = factor
            found["@1"][latent], found["@5"][latent], found["@20"][latent] = row
    return found


class Bootstrap:
    """Resampled latents: every draw says how often each latent counts, in all groups that have it alike."""

    def __init__(self, latents: Sequence[int], values: Mapping[int, float], seed: int):
        self._place = {latent: i for i, latent in enumerate(latents)}
        self._values = torch.tensor([values[latent] for latent in latents], dtype=torch.float64)
        drawn = torch.randint(len(latents), (DRAWS, len(latents)), generator=torch.Generator().manual_seed(seed))
        ones = torch.ones(drawn.shape, dtype=torch.float64)
        self._weights = torch.zeros(DRAWS, len(latents), dtype=torch.float64).scatter_add_(1, drawn, ones)

    def mean(self, latents: Sequence[int]) -> Estimate:
        """The mean over some latents."""
        return self._estimate(*self._means(latents))

    def ratio(self, latents: Sequence[int], base: Sequence[int]) -> Estimate:
        """The mean over ``latents`` over the mean over ``base``."""
        (above, draws_above), (below, draws_below) = self._means(latents), self._means(base)
        return self._estimate(above / below if below else math.nan, draws_above / draws_below)

    def _means(self, latents: Sequence[int]) -> tuple[float, Tensor]:
        places = [self._place[latent] for latent in latents]
        weights, values = self._weights[:, places], self._values[places]
        return float(values.mean()), weights @ values / weights.sum(1)

    @staticmethod
    def _estimate(value: float, draws: Tensor) -> Estimate:
        low, high = draws[draws.isfinite()].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return Estimate(value, low, high)


def frontier(
    table: ScoreTable, live: Sequence[int], groups: Sequence[Group], sure: Bootstrap
) -> list[tuple[float, float, int, Estimate]]:
    """Per quantile of the output score: the score there, how many latents were steered, and their mean success.

    A group counts for a cut when its filter lets everything above the cut through, as it is then a fair draw of it.
    Cuts with fewer than ``FEWEST`` latents are left out.
    """
    score = table.column(SCORE).double()
    rows = []
    for cut in CUTS:
        bound = float(score[list(live)].quantile(cut))
        above = {latent for latent in live if float(score[latent]) >= bound}
        fair = [group for group in groups if above <= group.passing]
        latents = sorted({latent for group in fair for latent in group.latents if latent in above})
        if len(latents) >= FEWEST:
            rows.append((cut, bound, len(latents), sure.mean(latents)))
    return rows


def picture(path: Path, rows: Sequence[tuple], bars: Sequence[tuple[Group, Estimate]], plain: float) -> None:
    """Left: success against the quantile of the output score. Right: every group's mean."""
    figure = Figure(figsize=(13, 4.6), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    cuts, means = [100 * row[0] for row in rows], [row[3].value for row in rows]
    left.fill_between(cuts, [row[3].low for row in rows], [row[3].high for row in rows], color="#e0691f", alpha=0.2)
    left.plot(cuts, means, color="#8f2f0b", marker="o", label="steered")
    left.axhline(plain, color="#6a6d76", linestyle=":", label="plain model, same tokens")
    left.set(xlabel="latents above this percentile of output score", ylabel="own tokens among 20 written")
    left.set_ylim(0, None)
    left.set_title("Generation success and output score", loc="left", size=11)
    left.legend(frameon=False)
    places = range(len(bars))[::-1]
    values = [estimate.value for _, estimate in bars]
    spans = [[e.value - e.low for _, e in bars], [e.high - e.value for _, e in bars]]
    colors = ["#6a6d76" if group is bars[0][0] else "#2f6fdb" for group, _ in bars]
    right.barh(list(places), values, xerr=spans, color=colors, alpha=0.85, ecolor="#1c1d21", capsize=3)
    right.set_yticks(list(places), [f"{group.name}\n{len(group.latents)} of {len(group.passing)}" for group, _ in bars],
                     size=8)  # fmt: skip
    right.axvline(2 * values[0], color="#e0691f", linestyle="--", label="twice the unfiltered mean")
    right.set(xlabel="own tokens among 20 written, 95 % interval")
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def show(
    groups: Sequence[Group], found: Mapping[str, Mapping[int, float]], sure: Bootstrap, rows: Sequence[tuple]
) -> None:
    """The table of groups and the table of cuts."""
    base = groups[0]
    table = Table("group", "steered / pass", "@20 (95 %)", "ratio (95 %)", "@1", "@5", "plain", "median factor")
    for group in groups:
        mean = {name: sum(found[name][latent] for latent in group.latents) / len(group.latents) for name in found}
        middle = sorted(found["factor"][latent] for latent in group.latents)[len(group.latents) // 2]
        table.add_row(
            group.name, f"{len(group.latents)} / {len(group.passing)}", str(sure.mean(group.latents)),
            str(sure.ratio(group.latents, base.latents)), f"{mean['@1']:.2f}", f"{mean['@5']:.2f}",
            f"{mean['plain']:.2f}", f"{middle:g}",
        )  # fmt: skip
    cuts = Table("output-score percentile", "output score", "steered", "@20 (95 %)")
    for cut, bound, n, mean in rows:
        cuts.add_row(f"{100 * cut:.0f}", f"{bound:.4f}", str(n), str(mean))
    console = Console(width=150)
    console.print(table)
    console.print(cuts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=60, help="latents per group")
    parser.add_argument("--choose", type=int, default=5, help="prefixes on which factors are chosen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/generation_success/success.png"))
    parser.add_argument("--work", type=Path, default=Path("out/generation_success"), help="what is done already")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(MODEL)
    sae = load_sae(SHIPPED).to(dtype=torch.float32)
    live = [row.latent for row in LatentTable.load(SHIPPED).rows if row.frequency > 0]
    table = score_all(model, tokenizer, sae, given.work)
    groups = draw(filters(table, live), live, given.n, given.seed)
    latents = sorted({latent for group in groups for latent in group.latents})
    print(f"{len(latents)} latents in {len(groups)} groups", flush=True)
    found = measure(Steering(model, tokenizer, sae, given.work, given.seed), latents, given.choose)
    sure = Bootstrap(latents, found["@20"], given.seed)
    rows = frontier(table, live, groups, sure)
    show(groups, found, sure, rows)
    base = groups[0].latents
    plain = sum(found["plain"][latent] for latent in base) / len(base)
    picture(given.out, rows, [(group, sure.mean(group.latents)) for group in groups], plain)
    print(json.dumps({
        "n": given.n, "latents_steered": len(latents), "prefixes_to_choose": given.choose,
        "prefixes_to_report": len(NEUTRAL) - given.choose, "factors": FACTORS, "k": 20,
        "success": {group.name: sure.mean(group.latents).rounded() for group in groups},
        "ratio_to_unfiltered": {group.name: sure.ratio(group.latents, base).rounded() for group in groups[1:]},
        "frontier": {str(cut): mean.rounded() for cut, _, _, mean in rows}, "picture": given.out.name,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
