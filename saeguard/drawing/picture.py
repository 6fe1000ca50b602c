"""Draw a scene as one PNG: a panel per row, tokens along the axis, what fired as a heat strip, edits as marks."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from saeguard.drawing.scene import Line, Scene, Token
from saeguard.errors import MissingExtra

INK, SOFT, EDIT, GRID = "#1c1d21", "#6a6d76", "#2f6fdb", "#ffffff"
HEAT = ("#f4f2ec", "#fbd9b5", "#f3a261", "#e0691f", "#8f2f0b")
WIDTH_IN, HEAD_IN, PANEL_IN, DPI = 15.0, 1.0, 2.8, 130
MOST_TOKENS = 64
"""Shown per row: the end of the prompt and the beginning of the answer."""
PROMPT_TOKENS = 14


def write_picture(scene: Scene, path: str | Path) -> Path:
    """Write the PNG to ``path``, making its folder. Raises `MissingExtra` without matplotlib."""
    figure_class, canvas_class, colormap_class = matplotlib_classes()
    heat = colormap_class.from_list("heat", HEAT)
    height = HEAD_IN + PANEL_IN * len(scene.lines)
    figure = figure_class(figsize=(WIDTH_IN, height), dpi=DPI, facecolor="white")
    canvas_class(figure)
    figure.text(0.02, 1 - 0.32 / height, scene.title, size=18, weight="bold", color=INK, va="center")
    figure.text(0.02, 1 - 0.66 / height, _subtitle(scene), size=10.5, color=SOFT, va="center")
    columns = max([40, *(len(_shown(line)) for line in scene.lines)])
    for number, line in enumerate(scene.lines):
        top = 1 - (HEAD_IN + PANEL_IN * number) / height
        _panel(figure, line, top, height, columns, heat)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=DPI)
    return target


def matplotlib_classes() -> tuple[Any, Any, Any]:
    """The classes that are needed; pyplot, its global state and its windows are not."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(
            "a picture",
            f"drawing one needs matplotlib, which cannot be imported here ({error})",
            "Run pip install 'saeguard[demo]', or draw the HTML page, which needs nothing.",
        ) from error
    return Figure, FigureCanvasAgg, LinearSegmentedColormap


def _subtitle(scene: Scene) -> str:
    held = sum(proof.holds for proof in scene.proofs)
    checks = f"   |   {held} of {len(scene.proofs)} checks hold" if scene.proofs else ""
    return f"{scene.model}   |   upper strip: activation that the edit found, lower strip: what it left{checks}"


def _panel(figure: Any, line: Line, top: float, height: float, columns: int, heat: Any) -> None:
    inch = 1 / height
    figure.text(0.02, top, line.title, size=13, weight="bold", color=INK, va="top")
    rules = "; ".join(line.rules) if line.rules else "no plan"
    figure.text(0.98, top, _short(rules, 120), size=9, color=EDIT if line.rules else SOFT, va="top", ha="right")
    below = top - 0.27 * inch
    for name, text, color in (("plain", line.plain_text, SOFT), ("steered", line.steered_text, INK)):
        wrapped = _wrapped(text)
        figure.text(0.02, below, name, size=9, color=color, va="top", style="italic")
        figure.text(0.075, below, "\n".join(wrapped), size=9, color=color, va="top", linespacing=1.3)
        below -= (0.175 * len(wrapped) + 0.03) * inch
    axes = figure.add_axes((0.075, top - 1.72 * inch, 0.905, 0.5 * inch))
    _strip(axes, line, columns, heat)


def _strip(axes: Any, line: Line, columns: int, heat: Any) -> None:
    tokens = _shown(line)
    values = np.array([[token.before for token in tokens], [token.after for token in tokens]]).reshape(2, -1)
    axes.pcolormesh(values, cmap=heat, vmin=0, vmax=line.peak, edgecolors=GRID, linewidth=1.2)
    axes.invert_yaxis()
    axes.set_xlim(0, columns)
    axes.set_yticks([0.5, 1.5], [f"found, max {values[0].max():.1f}", f"left, max {values[1].max():.1f}"], size=8)
    axes.set_xticks(np.arange(len(tokens)) + 0.5, [_label(token) for token in tokens], rotation=90, size=8.5)
    axes.tick_params(length=0, colors=SOFT, pad=2)
    for tick, token in zip(axes.get_xticklabels(), tokens, strict=True):
        tick.set_color(INK if token.kind == "generated" else SOFT)
        if token.edited:
            tick.set_fontweight("bold")
    marks = [place + 0.5 for place, token in enumerate(tokens) if token.edited]
    axes.plot(marks, [-0.22] * len(marks), "v", color=EDIT, markersize=5, clip_on=False)
    first = next((place for place, token in enumerate(tokens) if token.kind == "generated"), 0)
    if first:
        axes.plot([first, first], [-1.15, 2.25], color=INK, linewidth=1.2, clip_on=False)
        axes.text(first - 0.2, -0.72, "asked", ha="right", size=8, color=SOFT)
        axes.text(first + 0.2, -0.72, "answered", ha="left", size=8, color=SOFT)
    if not line.rules:
        axes.text(columns / 2, 1, "nothing is read or edited here", ha="center", va="center", size=9.5, color=SOFT)
    for side in axes.spines.values():
        side.set_visible(False)


def _shown(line: Line) -> list[Token]:
    """The end of the prompt and the beginning of the answer."""
    prompt = [token for token in line.steered if token.kind == "prompt"][-PROMPT_TOKENS:]
    generated = [token for token in line.steered if token.kind == "generated"]
    return (prompt + generated)[:MOST_TOKENS]


def _label(token: Token) -> str:
    text = token.text.replace("\n", "↵").strip() or "␣"
    # A dollar sign would start a formula.
    return _short(text, 13).replace("$", r"\$")


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _wrapped(text: str) -> list[str]:
    flat = " ".join(text.split()).replace("$", r"\$") or "(nothing)"
    return textwrap.wrap(flat, width=190, max_lines=2, placeholder=" …")
