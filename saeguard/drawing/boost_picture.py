"""Draw a boost as one PNG: what it explains, where its latents fire, and what the model writes when they are pushed.

bars        a number per topic before and after, in as many panels as there are such numbers
strips      activations over the tokens of a sentence, a row per latent
answers     a prompt with what the model writes behind it, plain and steered; marked words are coloured
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saeguard.drawing.picture import EDIT, GRID, HEAT, INK, SOFT, matplotlib_classes

BEFORE, AFTER = "#c9c6bd", "#e0691f"
WIDTH_IN, DPI = 13.0, 130
HEAD_IN, BARS_IN, ANSWER_IN, PART_IN = 0.95, 3.6, 0.86, 0.42
ROW_IN, WORDS_IN = 0.3, 0.75
"""One latent of a strip, and its tokens."""
LEFT, RIGHT = 0.03, 0.98
LABELS = 0.115
"""Where strips and answers begin, behind their labels; a share of the width."""


@dataclass(frozen=True)
class Bar:
    """A number, such as unexplained variance, of one topic before and after."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Strip:
    """One sentence: its tokens, and per latent its name and its activation at each of them."""

    title: str
    tokens: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]


@dataclass(frozen=True)
class Answer:
    """A prompt and two continuations."""

    prompt: str
    plain: str
    steered: str


@dataclass(frozen=True)
class BoostPicture:
    """All that is drawn. ``bars`` has panels by their titles; ``names`` says what is before and what after.

    Panels stand side by side, and so do strips. ``marked`` are the words to look for in answers, whatever their case.
    """

    title: str
    told: str
    names: tuple[str, str]
    bars: Mapping[str, tuple[Bar, ...]]
    strips_title: str
    strips: tuple[Strip, ...]
    answers_title: str
    answers: tuple[Answer, ...]
    marked: Collection[str] = ()


def write_boost_picture(picture: BoostPicture, path: str | Path) -> Path:
    """Write the PNG to ``path``, making its folder. Raises `MissingExtra` without matplotlib."""
    figure_class, canvas_class, colormap_class = matplotlib_classes()
    strips_in = 2 * PART_IN + WORDS_IN + ROW_IN * max((len(strip.rows) for strip in picture.strips), default=0)
    height = HEAD_IN + BARS_IN + strips_in + PART_IN + ANSWER_IN * len(picture.answers)
    figure = figure_class(figsize=(WIDTH_IN, height), dpi=DPI, facecolor="white")
    canvas_class(figure)
    sheet = _Sheet(figure, height)
    sheet.write(LEFT, 0.32, picture.title, size=17, weight="bold", color=INK)
    sheet.write(LEFT, 0.66, picture.told, size=10, color=SOFT)
    _bars(sheet, picture)
    _strips(sheet, picture, colormap_class.from_list("heat", HEAT))
    top = HEAD_IN + BARS_IN + strips_in
    sheet.write(LEFT, top + 0.1, picture.answers_title, size=10.5, color=INK)
    for number, answer in enumerate(picture.answers):
        _answer(sheet, answer, top + PART_IN + ANSWER_IN * number, {word.lower() for word in picture.marked})
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=DPI)
    return target


@dataclass(frozen=True, eq=False)
class _Sheet:
    """A figure on which heights are inches from its top, and the rest shares of its width."""

    figure: Any
    height: float

    def write(self, left: float, top: float, text: str, **style: Any) -> Any:
        """One line of text, centred at ``top``. A dollar sign would start a formula."""
        return self.figure.text(left, 1 - top / self.height, text.replace("$", r"\$"), va="center", **style)

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        return self.figure.add_axes((left, 1 - (top + height) / self.height, width, height / self.height))


def _bars(sheet: _Sheet, picture: BoostPicture) -> None:
    share = (RIGHT - LEFT) / max(len(picture.bars), 1)
    for number, (title, bars) in enumerate(picture.bars.items()):
        axes = sheet.axes(LEFT + share * number + LABELS - LEFT, HEAD_IN + 0.35, share - LABELS, BARS_IN - 1.1)
        values = [(bar.before, bar.after) for bar in bars]
        for place, pair in enumerate(values):
            for value, color, shift, name in zip(pair, (BEFORE, AFTER), (-0.2, 0.2), picture.names, strict=True):
                axes.barh(place + shift, value, height=0.37, color=color, label=name if not place else None)
        most = max((max(pair) for pair in values), default=0.0) or 1.0
        for place, (before, after) in enumerate(values):
            fell = f"  {(after - before) / before:+.0%}" if before > 0 else ""
            axes.text(max(before, after, 0.0), place, fell, va="center", size=9.5, color=INK)
        axes.set_yticks(range(len(bars)), [bar.name.replace("$", r"\$") for bar in bars], size=10)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(min(0.0, *(min(pair) for pair in values), 0.0), most * 1.14)
        axes.tick_params(colors=SOFT, length=0, labelsize=9.5)
        axes.set_title(title, size=10.5, color=INK, loc="left")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        if not number and bars:
            axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.08), ncol=2, frameon=False, fontsize=9.5)


def _strips(sheet: _Sheet, picture: BoostPicture, heat: Any) -> None:
    top, share = HEAD_IN + BARS_IN, (RIGHT - LEFT) / max(len(picture.strips), 1)
    sheet.write(LEFT, top + 0.1, picture.strips_title, size=10.5, color=INK)
    peak = max((value for strip in picture.strips for _, values in strip.rows for value in values), default=0.0)
    for number, strip in enumerate(picture.strips):
        left = LEFT + share * number
        sheet.write(left + LABELS - LEFT, top + PART_IN, strip.title, size=9.5, color=SOFT)
        axes = sheet.axes(left + LABELS - LEFT, top + PART_IN + 0.17, share - LABELS, ROW_IN * len(strip.rows))
        _strip(axes, strip, heat, peak or 1.0)


def _strip(axes: Any, strip: Strip, heat: Any, peak: float) -> None:
    values = np.array([row for _, row in strip.rows], dtype=float).reshape(len(strip.rows), len(strip.tokens))
    axes.pcolormesh(values, cmap=heat, vmin=0, vmax=peak, edgecolors=GRID, linewidth=1.2)
    axes.set_xlim(0, max(len(strip.tokens), 1))
    axes.set_ylim(max(len(strip.rows), 1), 0)
    axes.set_yticks(np.arange(len(strip.rows)) + 0.5, [name.replace("$", r"\$") for name, _ in strip.rows], size=9)
    tokens = [_visible(token) for token in strip.tokens]
    axes.set_xticks(np.arange(len(tokens)) + 0.5, tokens, rotation=60, ha="right", rotation_mode="anchor", size=9)
    axes.tick_params(length=0, colors=SOFT, pad=3)
    for tick, column in zip(axes.get_xticklabels(), values.T, strict=True):
        tick.set_color(INK if (column > 0).any() else SOFT)
    for side in axes.spines.values():
        side.set_visible(False)


def _answer(sheet: _Sheet, answer: Answer, top: float, marked: Collection[str]) -> None:
    sheet.write(LEFT, top + 0.08, f"{answer.prompt} …", size=10, weight="bold", color=INK)
    for line, (name, text, color) in enumerate((("plain", answer.plain, SOFT), ("steered", answer.steered, INK))):
        place = top + 0.31 + 0.23 * line
        sheet.write(LEFT, place, name, size=9, color=color, style="italic")
        _flow(sheet, _pieces(text), place, color, marked)


def _flow(sheet: _Sheet, pieces: Iterable[str], top: float, color: str, marked: Collection[str]) -> None:
    """Words one behind the other on one line, marked ones in colour, until the line is full."""
    renderer, left = sheet.figure.canvas.get_renderer(), LABELS
    for piece in pieces:
        found = {"color": EDIT, "weight": "bold"} if piece.strip().lower() in marked else {"color": color}
        drawn = sheet.write(left, top, piece.strip() or " ", size=9.5, **found)
        wide = drawn.get_window_extent(renderer).width / (WIDTH_IN * DPI) if piece.strip() else 0.0035
        if left + wide > RIGHT - 0.012:
            drawn.set_text("…")
            return
        left += wide


def _pieces(text: str) -> Iterator[str]:
    """Words, what stands between them, and blanks, in order."""
    yield from re.findall(r"\w+|\s|[^\w\s]+", " ".join(text.split()))


def _visible(token: str) -> str:
    return (token.replace("\n", "↵").strip() or "␣")[:14].replace("$", r"\$")
