"""Draw how strongly one latent fires over a text: counts of tokens by activation, on a logarithmic scale."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from saeguard.drawing.picture import EDIT, HEAT, INK, SOFT, matplotlib_classes

BINS = 48
SIZE_IN, DPI = (9.0, 4.6), 130


def write_histogram(
    f: Float[Tensor, " token"],
    path: str | Path,
    *,
    title: str,
    maximum: float | None = None,
    examples: Sequence[tuple[float, str]] = (),
) -> Path:
    """Write a PNG of the activations ``f`` that are above 0; tokens on which the latent is silent are told in words.

    ``maximum`` is the recorded largest activation, drawn as a line; ``examples`` are activations and their tokens,
    written where they stand. Raises `MissingExtra` without matplotlib.
    """
    figure_class, canvas_class, _ = matplotlib_classes()
    fires = f[f > 0].numpy()
    top = max(float(fires.max(initial=0.0)), maximum or 0.0) or 1.0
    figure = figure_class(figsize=SIZE_IN, dpi=DPI, facecolor="white")
    canvas_class(figure)
    axes = figure.add_axes((0.085, 0.13, 0.885, 0.64))
    counts, edges = np.histogram(fires, bins=BINS, range=(0.0, top))
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=HEAT[2], edgecolor="white", linewidth=0.6)
    if counts.any():
        axes.set_yscale("log")
    else:
        axes.text(0.5, 0.5, "it never fires here", transform=axes.transAxes, color=SOFT, size=11, ha="center")
    axes.set_ylim(0.7, max(10.0, counts.max(initial=1) * 2.5))
    axes.set_xlim(0.0, top * 1.04)
    axes.set_xlabel("activation", color=SOFT)
    axes.set_ylabel("tokens", color=SOFT)
    axes.tick_params(colors=SOFT, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if maximum:
        axes.axvline(maximum, color=EDIT, linewidth=1.2, linestyle="--")
        axes.text(
            maximum, axes.get_ylim()[1], f"recorded maximum {maximum:.1f} ", color=EDIT, size=8.5, ha="right", va="top"
        )
    _write_examples(axes, examples, counts, edges)
    figure.text(0.02, 0.945, _plain(title), size=13, weight="bold", color=INK, va="center")
    share = len(fires) / len(f) if len(f) else 0.0
    mean = f", mean {fires.mean():.2f} there" if len(fires) else ""
    told = f"fires on {len(fires):,} of {len(f):,} tokens ({share:.2%}){mean}; silent tokens are not drawn"
    figure.text(0.02, 0.875, told, size=9.5, color=SOFT, va="center")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=DPI, format="png")
    return target


def _write_examples(axes: object, examples: Sequence[tuple[float, str]], counts: np.ndarray, edges: np.ndarray) -> None:
    """Tokens above the bars of their activations, at most one per bar, the hardest ones first."""
    taken: set[int] = set()
    for value, token in sorted(examples, reverse=True):
        place = min(int(np.searchsorted(edges, value, side="right")) - 1, len(counts) - 1)
        if any(abs(place - other) < 2 for other in taken):
            continue
        taken.add(place)
        middle = (edges[place] + edges[place + 1]) / 2
        axes.text(  # type: ignore[attr-defined]  matplotlib is an extra
            middle, max(float(counts[place]), 0.9) * 1.25, _plain(token), size=8, color=INK, rotation=60, va="bottom"
        )


def _plain(text: str) -> str:
    """On one line, and without the sign that would start a formula."""
    return " ".join(text.split()).replace("$", r"\$") or "␣"
