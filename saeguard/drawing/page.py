"""Draw a scene as one HTML page that needs nothing else: no script, no font, no request.

Every text on it is escaped; a token's shade is its largest activation relative to the largest in its row.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from saeguard.drawing.scene import Fired, Kind, Line, Proof, Scene, Token
from saeguard.reports import Report

STYLE = Path(__file__).with_name("page.css")
LEGEND = (
    '<span><i class="scale"></i>activation of the rule\'s latents, as the edit found it</span>'
    '<span><span class="t e">&nbsp;token&nbsp;</span>&ensp;edited here</span>'
    "<span>hover over a token for latents and values</span>"
)


def write_page(scene: Scene, path: str | Path) -> Path:
    """Write the page to ``path``, making its folder."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(scene), encoding="utf-8")
    return target


def render(scene: Scene) -> str:
    """The page as a string."""
    labels = scene.labels or {}
    body = [
        f"<h1>{escape(scene.title)}</h1>",
        f'<p class="lead">{escape(scene.model)}, {len(scene.lines)} rows in one batch</p>',
        f'<div class="legend">{LEGEND}</div>',
        *(_row(line, labels) for line in scene.lines),
        "<h2>What was edited</h2>",
        _report(scene.report),
    ]
    if scene.proofs:
        body += ["<h2>What was checked</h2>", _proofs(scene.proofs)]
    body.append("<footer>Drawn by saeguard. This file loads nothing from anywhere.</footer>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(scene.title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(body)}\n</main>\n</body>\n</html>\n"
    )


def _row(line: Line, labels: Mapping[int, str]) -> str:
    chips = [f'<span class="chip">{escape(rule)}</span>' for rule in line.rules]
    chips += [f'<span class="name">{i}: {escape(labels[i])}</span>' for i in line.latents if labels.get(i)]
    head = "".join(chips) or '<span class="chip none">no plan: left alone</span>'
    sides = "".join(
        f'<div class="side"><h4>{name}</h4><div class="text">{_spans(tokens, "generated", line, labels)}</div></div>'
        for name, tokens in (("plain", line.plain), ("steered", line.steered))
    )
    asked = _spans(line.steered, "prompt", line, labels) or escape(line.prompt)
    return (
        f'<section class="row">\n<div class="head"><h3>{escape(line.title)}</h3>{head}</div>\n'
        f'<p class="prompt">asked: <b class="text">{asked}</b></p>\n<div class="pair">{sides}</div>\n'
        f"{_frame(line, labels)}</section>"
    )


def _frame(line: Line, labels: Mapping[int, str]) -> str:
    """The chat template around the prompt, folded away."""
    tokens = [token for token in line.steered if token.kind == "frame"]
    if not tokens:
        return ""
    edits = sum(token.edited for token in tokens)
    return (
        f"<details><summary>the {len(tokens)} tokens of the chat template, {edits} of them edited</summary>"
        f'<div class="text">{_spans(tokens, "frame", line, labels)}</div></details>\n'
    )


def _spans(tokens: Sequence[Token], kind: Kind, line: Line, labels: Mapping[int, str]) -> str:
    return "".join(_span(token, line.peak_found, labels) for token in tokens if token.kind == kind)


def _span(token: Token, peak: float, labels: Mapping[int, str]) -> str:
    classes = "t e" if token.edited else "t"
    share = min(token.before / peak, 1.0)
    style = f' style="background:rgba(var(--heat),{0.06 + 0.74 * share:.2f})"' if share > 0 else ""
    tip = "\n".join(_tip(latent, labels) for latent in token.fired)
    hint = f' data-tip="{escape(tip)}"' if tip else ""
    space = token.text[: len(token.text) - len(token.text.lstrip(" "))]
    text = escape(token.text[len(space) :]).replace("\n", '<span class="nl">↵</span>\n')
    return f'{space}<span class="{classes}"{style}{hint}>{text}</span>' if text else space


def _tip(latent: Fired, labels: Mapping[int, str]) -> str:
    name = f" {labels[latent.latent]}" if labels.get(latent.latent) else ""
    return f"latent {latent.latent}{name}: {latent.before:.2f} → {latent.after:.2f}"


def _report(report: Report) -> str:
    heads = ("rule", "at", "tokens seen", "edited", "mean |Δx|", "share of |x|")
    rows = [
        f"<tr><td>{escape(rule.rule)}</td><td>{escape(rule.site)}</td>"
        f'<td class="n">{rule.tokens_seen}</td><td class="n">{rule.tokens_edited}</td>'
        f'<td class="n">{rule.mean_delta:.2f}</td><td class="n">{rule.mean_share:.1%}</td></tr>'
        for rule in report.rules
    ]
    head = "".join(f"<th{' class=n' if i > 1 else ''}>{escape(name)}</th>" for i, name in enumerate(heads))
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _proofs(proofs: Sequence[Proof]) -> str:
    items = [
        f'<li class="{"holds" if proof.holds else "fails"}"><span class="mark">{"✓" if proof.holds else "✗"}</span>'
        f'<div><b>{escape(proof.claim)}</b><span class="found">{escape(proof.found)}</span></div></li>'
        for proof in proofs
    ]
    return f'<ul class="proofs">{"".join(items)}</ul>'
