"""Draw what a policy takes away and what it leaves: one HTML page with a plot, a table and what got through.

It draws the JSON that ``saeguard eval unlearn`` writes. Every topic is a point: across, the plain model's accuracy; up,
the guarded one's, with its 95 % interval. On the diagonal nothing was lost, on the line of chance nothing is left.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from saeguard.drawing.page import STYLE

SIZE, EDGE = 460, 48
"""Of the plot and of the room for its scales, in pixels."""
READINGS = (("sum", "by log-likelihood"), ("bytes", "per byte"), ("pmi", "PMI"))
FORMS = (("options", "in writing, from options"), ("open", "in writing, open"))
MOST_THROUGH = 40
HOW = (
    "A topic counts as one to forget where a gate opened in at least half of its questions. Right answers by "
    "log-likelihood; intervals are Wilson's, 95 %. A stopped question counts as wrong. Triggered: by the question / "
    "with some choice behind it / in writing, with the options / open."
)


def write_unlearning_page(document: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page to ``path``, making its folder."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(document), encoding="utf-8")
    return target


def render(document: Mapping[str, Any]) -> str:
    """The page as a string; all text of the document is escaped."""
    policy, model = document["policy"], document["model"]["name"]
    title = f"Policy {policy['name']}, serial {policy['serial']}"
    parts = [(file["file"], part) for file in document["files"] for part in file["topics"]]
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">on {escape(model)}; fingerprint {escape(policy["fingerprint"][:16])}</p>',
        "<h2>Forget and retain</h2>", f'<section class="row">{_plot(parts)}</section>', f"<p>{escape(HOW)}</p>",
        "<h2>By topic, plain and guarded</h2>", _table(parts),
        "<h2>What got through</h2>", *(_through(parts) or ["<p>Nothing.</p>"]),
        "<footer>Drawn by saeguard. This file loads nothing from anywhere.</footer>",
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(body)}\n</main>\n</body>\n</html>\n"
    )


def is_forgotten(part: Mapping[str, Any]) -> bool:
    """Whether a gate opened in at least half of a topic's questions."""
    return 2 * part["triggered"]["question"]["count"] >= part["n"]


def _plot(parts: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    whole = SIZE + 2 * EDGE
    chances = sorted({round(part["chance"], 2) for _, part in parts})
    lines = [_line(0.0, 0.0, 1.0, 1.0, "4 4"), *(_line(0.0, chance, 1.0, chance, "1 4") for chance in chances)]
    ticks = [f"{_text(x / 4, -0.05, f'{25 * x}')}{_text(-0.055, x / 4, f'{25 * x}')}" for x in range(5)]
    names = [_text(0.5, -0.09, "plain accuracy, %"), _text(0.02, 1.03, "guarded accuracy, %", anchor="start")]
    points = [_point(file, part) for file, part in parts]
    return (
        f'<svg viewBox="0 0 {whole} {whole}" width="{whole}" style="max-width:100%" role="img" '
        f'font-size="11" fill="currentColor"><title>Guarded against plain accuracy</title>'
        f'<rect x="{EDGE}" y="{EDGE}" width="{SIZE}" height="{SIZE}" fill="none" stroke="var(--line)"/>'
        f"{''.join(lines + ticks + names + points)}</svg>"
    )


def _point(file: str, part: Mapping[str, Any]) -> str:
    told = part["likelihood"]["sum"]
    x, guarded = told["plain"]["share"], told["guarded"]
    colour = "var(--bad)" if is_forgotten(part) else "var(--edit)"
    tip = f"{file}, {part['topic'] or 'no topic'}: {_percent(x)} > {_percent(guarded['share'])} of {part['n']}"
    whisker = _line(x, guarded["low"], x, guarded["high"], "", colour)
    return (
        f"<g><title>{escape(tip)}</title>{whisker}"
        f'<circle cx="{_across(x):.1f}" cy="{_down(guarded["share"]):.1f}" r="5" fill="{colour}"/>'
        f"{_text(x + 0.015, guarded['share'] + 0.012, part['topic'] or file, anchor='start')}</g>"
    )


def _across(share: float) -> float:
    return EDGE + share * SIZE


def _down(share: float) -> float:
    return EDGE + (1 - share) * SIZE


def _line(x: float, y: float, x2: float, y2: float, dashes: str, colour: str = "var(--soft)") -> str:
    ends = f'x1="{_across(x):.1f}" y1="{_down(y):.1f}" x2="{_across(x2):.1f}" y2="{_down(y2):.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-dasharray="{dashes}"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{_across(x):.1f}" y="{_down(y):.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _table(parts: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    written = [(form, name) for form, name in FORMS if any(form in part["written"] for _, part in parts)]
    heads = ["file", "topic", "n", "chance", *(name for _, name in READINGS), "refused", *(name for _, name in written),
             "triggered", "the rest identical"]  # fmt: skip
    rows = "".join(f"<tr>{''.join(_cells(file, part, written))}</tr>" for file, part in parts)
    head = "".join(f"<th{' class=n' if i > 1 else ''}>{escape(name)}</th>" for i, name in enumerate(heads))
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cells(file: str, part: Mapping[str, Any], written: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield from (f"<td>{escape(text)}</td>" for text in (file, part["topic"] or "-"))
    told, same = part["likelihood"], part["identical"].values()
    numbers = [str(part["n"]), _percent(part["chance"]), *(_change(told[name]) for name, _ in READINGS)]
    numbers.append(str(told["sum"]["refused"]))
    numbers += [_change(part["written"][form]) if form in part["written"] else "-" for form, _ in written]
    shares = (*part["triggered"].values(), *(one["triggered"] for one in part["written"].values()))
    numbers.append(" / ".join(_percent(one["share"]) for one in shares))
    numbers.append("yes" if all(a == b for a, b in same) else "NO")
    yield from (f'<td class="n">{escape(text)}</td>' for text in numbers)


def _through(parts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Questions of topics to forget whose right choice was still the likeliest."""
    found = []
    for file, part in parts:
        questions = part["through"]
        if not questions:
            continue
        items = "".join(f"<li>{escape(one)}</li>" for one in questions[:MOST_THROUGH])
        more = f"<p>and {len(questions) - MOST_THROUGH} more</p>" if len(questions) > MOST_THROUGH else ""
        told = f"{file}, {part['topic'] or 'no topic'}: {len(questions)} of {part['n']}, chance {part['chance']:.0%}"
        found.append(f"<details><summary>{escape(told)}</summary><ul>{items}</ul>{more}</details>")
    return found


def _change(part: Mapping[str, Any]) -> str:
    return f"{_percent(part['plain']['share'])} → {_percent(part['guarded']['share'])}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share in (0.0, 1.0) else f"{share:.1%}"
