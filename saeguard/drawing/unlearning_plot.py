"""Two plots of what policies take away and leave, as SVG: topic by topic, and forgetting against keeping.

    topics     across: plain accuracy, up: guarded accuracy, one mark per topic and policy, with its 95 % interval
    policies   across: guarded accuracy on topics to forget, up: the share of plain accuracy that the others keep

Topics are red where they are to be forgotten. A policy's marks have one shape and its number.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

SIZE, EDGE = 460, 48
"""Of a plot and of the room for its scales, in pixels."""
LETTER, HIGH = 6.2, 12
"""How wide a letter and how high a line of text is, in pixels, about."""
BAD, GOOD, SOFT = "var(--bad)", "var(--edit)", "var(--soft)"


@dataclass(frozen=True)
class Shown:
    """One topic of one file, measured under the policy with this number, and whether it is to be forgotten."""

    system: int
    file: str
    part: Mapping[str, Any]
    forget: bool

    @property
    def topic(self) -> str:
        return self.part["topic"] or "no topic"

    @property
    def plain(self) -> float:
        return self.part["likelihood"]["sum"]["plain"]["share"]

    @property
    def guarded(self) -> float:
        return self.part["likelihood"]["sum"]["guarded"]["share"]


@dataclass(frozen=True)
class _Frame:
    """Which shares a plot shows, across and up."""

    left: float = 0.0
    right: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def across(self, x: float) -> float:
        """In pixels."""
        return EDGE + (x - self.left) / (self.right - self.left) * SIZE

    def down(self, y: float) -> float:
        """In pixels."""
        return EDGE + (self.high - y) / (self.high - self.low) * SIZE

    def line(self, x: float, y: float, x2: float, y2: float, dashes: str, colour: str = SOFT) -> str:
        """From one point to another."""
        ends = f'x1="{self.across(x):.1f}" y1="{self.down(y):.1f}" x2="{self.across(x2):.1f}" y2="{self.down(y2):.1f}"'
        return f'<line {ends} stroke="{colour}" stroke-dasharray="{dashes}"/>'

    def mark(self, system: int, x: float, y: float, colour: str) -> str:
        """A policy's mark at a point."""
        return _shape(system, self.across(x), self.down(y), colour)


def topics_plot(shown: Sequence[Shown]) -> str:
    """Guarded against plain accuracy."""
    frame, title = _Frame(), "Guarded against plain accuracy"
    chances = sorted({round(one.part["chance"], 2) for one in shown})
    lines = [
        frame.line(0.0, 0.0, 1.0, 1.0, "4 4"),
        *(frame.line(0.0, chance, 1.0, chance, "1 4") for chance in chances),
    ]
    marks = [_topic(frame, one) for one in shown]
    named = {(one.topic, one.file): one for one in reversed(shown) if not one.forget} | {
        (one.topic, one.file, one.system): one for one in shown if one.forget
    }
    points = [(frame.across(one.plain), frame.down(one.guarded)) for one in shown]
    names = _names([(frame.across(one.plain), frame.down(one.guarded), one.topic) for one in named.values()], points)
    axes = _axes(frame, "plain accuracy, %", "guarded accuracy, %")
    return _svg(title, [*axes, *lines, *marks, *names])


def policies_plot(shown: Sequence[Shown], names: Sequence[str]) -> str:
    """What is kept against what is left of what is to be forgotten; "" where there is nothing of either."""
    points = [(number, *found) for number in range(len(names)) if (found := _kept(shown, number)) is not None]
    if not points:
        return ""
    chance = sum(one.part["chance"] for one in shown if one.forget) / sum(one.forget for one in shown)
    frame = _Frame(
        right=min(1.0, _up(max([2 * chance, *(left for _, left, _ in points)]), 0.2)),
        low=0.95 - max(0.0, _up(0.95 - min(kept for *_, kept in points), 0.1)),
        high=1.05 + max(0.0, _up(max(kept for *_, kept in points) - 1.05, 0.1)),
    )
    lines = [frame.line(chance, frame.low, chance, frame.high, "1 4"), frame.line(0.0, 1.0, frame.right, 1.0, "4 4")]
    marks = [
        f"<g><title>{escape(f'{names[number]}: {left:.1%} of topics to forget, keeps {kept:.1%}')}</title>"
        f"{frame.mark(number, left, kept, GOOD)}</g>"
        for number, left, kept in points
    ]
    at = [(frame.across(left), frame.down(kept), f"{number + 1} {names[number]}") for number, left, kept in points]
    axes = _axes(frame, "guarded accuracy on topics to forget, %", "kept of plain accuracy elsewhere, %")
    return _svg("Keeping against forgetting", [*axes, *lines, *marks, *_names(at, [(x, y) for x, y, _ in at])])


def legend(names: Sequence[str]) -> str:
    """Shapes and numbers of the policies."""
    marks = "".join(
        f'<span><svg viewBox="0 0 16 16" width="16">{_shape(number, 8.0, 8.0, "currentColor")}</svg> '
        f"{number + 1} {escape(name)}</span> "
        for number, name in enumerate(names)
    )
    return f'<div class="legend">{marks}</div>'


def _kept(shown: Sequence[Shown], system: int) -> tuple[float, float] | None:
    """Of one policy: right answers on topics to forget, and of the others relative to plain; by questions."""
    own = [one for one in shown if one.system == system]
    count = lambda forget, side: sum(
        one.part["likelihood"]["sum"][side]["count"] for one in own if one.forget is forget
    )
    n = sum(one.part["n"] for one in own if one.forget)
    if not n or not count(False, "plain"):
        return None
    return count(True, "guarded") / n, count(False, "guarded") / count(False, "plain")


def _up(share: float, step: float) -> float:
    """To the next multiple of ``step``."""
    return math.ceil(round(share / step, 6)) * step


def _topic(frame: _Frame, one: Shown) -> str:
    told = one.part["likelihood"]["sum"]["guarded"]
    colour = BAD if one.forget else GOOD
    tip = f"{one.system + 1}, {one.file}, {one.topic}: {one.plain:.1%} > {one.guarded:.1%} of {one.part['n']}"
    whisker = frame.line(one.plain, told["low"], one.plain, told["high"], "", colour)
    return f"<g><title>{escape(tip)}</title>{whisker}{frame.mark(one.system, one.plain, one.guarded, colour)}</g>"


def _axes(frame: _Frame, across: str, up: str) -> Iterator[str]:
    """A box, five numbers along two of its sides, and what they are."""
    yield f'<rect x="{EDGE}" y="{EDGE}" width="{SIZE}" height="{SIZE}" fill="none" stroke="var(--line)"/>'
    for i in range(5):
        x, y = (low + i / 4 * (high - low) for low, high in ((frame.left, frame.right), (frame.low, frame.high)))
        yield _text(frame.across(x), EDGE + SIZE + 20, f"{100 * x:.4g}")
        yield _text(EDGE - 8, frame.down(y) + 4, f"{100 * y:.4g}", anchor="end")
    yield _text(EDGE + SIZE / 2, EDGE + SIZE + 40, across)
    yield _text(EDGE, EDGE - 14, up, anchor="start")


def _names(places: Sequence[tuple[float, float, str]], points: Sequence[tuple[float, float]]) -> Iterator[str]:
    """Names beside their points, in pixels, each moved down until it covers neither a point nor another name."""
    taken: list[tuple[float, float, float]] = []
    for x, y, name in sorted(places, key=lambda one: (one[1], one[0])):
        wide = LETTER * len(name)
        left = x + 9 if x + 9 + wide < EDGE + SIZE else x - 9 - wide
        at = y + 4
        while any(left - 7 < a < left + wide + 7 and abs(b + 4 - at) < 9 for a, b in points if (a, b) != (x, y)) or any(
            a < left + wide and left < a + w and abs(b - at) < HIGH for a, b, w in taken
        ):
            at += 3
        taken.append((left, at, wide))
        yield _text(left, at, name, anchor="start")


def _svg(title: str, parts: Sequence[str]) -> str:
    whole = SIZE + 2 * EDGE
    return (
        f'<svg viewBox="0 0 {whole} {whole}" width="{whole}" style="max-width:100%" role="img" font-size="11" '
        f'fill="currentColor"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )


def _shape(system: int, x: float, y: float, colour: str) -> str:
    """A disc, a square, a diamond, a triangle, and the same hollow."""
    paint = f'fill="{colour}"' if system % 8 < 4 else f'fill="none" stroke="{colour}" stroke-width="2"'
    if system % 4 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {paint}/>'
    if system % 4 == 1:
        return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" {paint}/>'
    corners = ((0, -6), (6, 0), (0, 6), (-6, 0)) if system % 4 == 2 else ((0, -6), (6, 5), (-6, 5))
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
    return f'<polygon points="{points}" {paint}/>'


def _text(x: int | float, y: int | float, text: str, *, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
