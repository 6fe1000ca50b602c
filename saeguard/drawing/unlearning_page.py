"""Draw what policies take away and what they leave: one HTML page with plots, a table and what got through.

It draws the JSON that ``saeguard eval unlearn`` writes, of one policy or of several; see
`saeguard.drawing.unlearning_plot` for the plots.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from saeguard.drawing.page import STYLE
from saeguard.drawing.unlearning_plot import Shown, legend, policies_plot, topics_plot

Document = Mapping[str, Any]
READINGS = (("sum", "by log-likelihood"), ("bytes", "per byte"), ("pmi", "PMI"))
FORMS = (("options", "in writing, from options"), ("open", "in writing, open"))
MOST_THROUGH = 40
ABOUT_ALL = (
    "Right answers by log-likelihood; intervals are Wilson's, 95 %. A stopped question counts as wrong. Triggered: by "
    "the question / with some choice behind it / in writing, with the options / open. Broken lines: nothing lost; "
    "dotted lines: chance."
)
BY_GATE = "A topic counts as one to forget where a gate opened in at least half of its questions. "


def write_unlearning_page(
    documents: Document | Sequence[Document], path: str | Path, *, forget: Sequence[str] = ()
) -> Path:
    """Write the page of one document or several to ``path``, making its folder."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(documents, forget=forget), encoding="utf-8")
    return target


def render(documents: Document | Sequence[Document], *, forget: Sequence[str] = ()) -> str:
    """The page as a string; all text of the documents is escaped.

    ``forget`` names the topics that are to be forgotten; without it they are told by the gates that opened.
    """
    listed = [documents] if isinstance(documents, Mapping) else list(documents)
    names = _names([one["policy"] for one in listed])
    shown = [
        Shown(number, file["file"], part, part["topic"] in forget if forget else is_forgotten(part))
        for number, one in enumerate(listed) for file in one["files"] for part in file["topics"]
    ]  # fmt: skip
    title = f"Policy {names[0]}" if len(listed) == 1 else f"{len(listed)} policies"
    told = f"To forget: {', '.join(forget)}. " if forget else BY_GATE
    body = [
        f"<h1>{escape(title)}</h1>", *_leads(listed, names),
        "<h2>Forget and retain</h2>", legend(names) if len(listed) > 1 else "",
        f'<section class="row"><div class="pair">{topics_plot(shown)}{policies_plot(shown, names)}</div></section>',
        f"<p>{escape(told + ABOUT_ALL)}</p>",
        "<h2>By topic, plain and guarded</h2>", _table(shown, names),
        "<h2>What got through</h2>", *(_through(shown, names) or ["<p>Nothing.</p>"]),
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


def _names(policies: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the policies, with as much of serial and fingerprint as it takes to tell them apart."""
    ways = (
        lambda one: one["name"],
        lambda one: f"{one['name']}, serial {one['serial']}",
        lambda one: f"{one['name']}, serial {one['serial']}, {one['fingerprint'][:8]}",
    )
    several = ([way(one) for one in policies] for way in ways[1 if len(policies) == 1 else 0 :])
    return next((names for names in several if len(set(names)) == len(names)), [ways[2](one) for one in policies])


def _leads(documents: Sequence[Document], names: Sequence[str]) -> Iterator[str]:
    """On which model each was measured."""
    for one, name in zip(documents, names, strict=True):
        own = "" if len(documents) == 1 else f"{name}: "
        text = f"{own}on {one['model']['name']}; fingerprint {one['policy']['fingerprint'][:16]}"
        yield f'<p class="lead">{escape(text)}</p>'


def _table(shown: Sequence[Shown], names: Sequence[str]) -> str:
    written = [(form, name) for form, name in FORMS if any(form in one.part["written"] for one in shown)]
    policy = ["policy"] if len(names) > 1 else []
    heads = [*policy, "file", "topic", "n", "chance", *(name for _, name in READINGS), "refused",
             *(name for _, name in written), "triggered", "the rest identical"]  # fmt: skip
    rows = "".join(f"<tr>{''.join(_cells(one, names, written))}</tr>" for one in shown)
    head = "".join(
        f"<th{' class=n' if i > heads.index('topic') else ''}>{escape(name)}</th>" for i, name in enumerate(heads)
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cells(one: Shown, names: Sequence[str], written: Sequence[tuple[str, str]]) -> Iterator[str]:
    part, policy = one.part, names[one.system : one.system + 1] if len(names) > 1 else ()
    topic = f"{part['topic'] or '-'}{' (to forget)' if one.forget else ''}"
    yield from (f"<td>{escape(text)}</td>" for text in (*policy, one.file, topic))
    told, same = part["likelihood"], part["identical"].values()
    numbers = [str(part["n"]), _percent(part["chance"]), *(_change(told[name]) for name, _ in READINGS)]
    numbers.append(str(told["sum"]["refused"]))
    numbers += [_change(part["written"][form]) if form in part["written"] else "-" for form, _ in written]
    shares = (*part["triggered"].values(), *(one["triggered"] for one in part["written"].values()))
    numbers.append(" / ".join(_percent(one["share"]) for one in shares))
    numbers.append("yes" if all(a == b for a, b in same) else "NO")
    yield from (f'<td class="n">{escape(text)}</td>' for text in numbers)


def _through(shown: Sequence[Shown], names: Sequence[str]) -> list[str]:
    """Questions of topics to forget whose right choice was still the likeliest."""
    found = []
    for one in shown:
        questions = one.part["through"]
        if not questions:
            continue
        items = "".join(f"<li>{escape(question)}</li>" for question in questions[:MOST_THROUGH])
        more = f"<p>and {len(questions) - MOST_THROUGH} more</p>" if len(questions) > MOST_THROUGH else ""
        policy = "" if len(names) == 1 else f"{names[one.system]}, "
        told = f"{policy}{one.file}, {one.topic}: {len(questions)} of {one.part['n']}, chance {one.part['chance']:.0%}"
        found.append(f"<details><summary>{escape(told)}</summary><ul>{items}</ul>{more}</details>")
    return found


def _change(part: Mapping[str, Any]) -> str:
    return f"{_percent(part['plain']['share'])} → {_percent(part['guarded']['share'])}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share in (0.0, 1.0) else f"{share:.1%}"
