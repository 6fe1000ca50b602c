"""The tables and the two pictures of the comparison, from the numbers of `measuring` and `frontier`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.baselines.frontier import ROLES, Roles
from saeguard.evaluating.multiple_choice import Reading
from saeguard.evaluating.unlearning import share

WIDTH = 190
NAMES = {"retain": "other topics", "neighbour": "neighbours"}
INK, GREY, WARM, COLD = "#1c1d21", "#6a6d76", "#e0691f", "#2f6fdb"
COLOURS = (COLD, "#3a9d5d", "#8f2f0b", "#b58900", "#7a4fbf", GREY, WARM)


def summary(results: Mapping[str, Mapping[str, Any]], roles: Roles, gated: Mapping[str, bool]) -> list[dict[str, Any]]:
    """One object per system: per group of topics the accuracies, the paired difference to the first, and what fired."""
    plain = next(iter(results.values()))
    rows = []
    for name, found in results.items():
        groups = {role: _group(plain, found, roles, role, gated=gated[name]) for role in ROLES}
        topics = {topic: _group(plain, found, roles, topic, gated=gated[name]) for topic in _topics(found)}
        rest = {task: found[task] for task in ("decoding", "padding", "benign") if task in found}
        rows.append({"system": name, **{role: one for role, one in groups.items() if one}, "topics": topics, **rest})
    return rows


def paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, float]:
    """The difference of two shares of the same questions, with the 95 % interval of Bonett and Price (2012)."""
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    n = len(before)
    p, q = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = 1.959963984540054 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    middle = q - p
    return {"difference": (gained - lost) / n, "low": max(-1.0, middle - half), "high": min(1.0, middle + half),
            "lost": lost, "gained": gained}  # fmt: skip


def _topics(found: Mapping[str, Any]) -> list[str]:
    return [task.removeprefix("topic ") for task in found if task.startswith("topic ")]


def _group(plain: Mapping[str, Any], found: Mapping[str, Any], roles: Roles, group: str, *, gated: bool) -> dict:
    """``group`` is a role or a topic."""
    mine = [f"topic {topic}" for topic in _topics(found) if group in (topic, roles.of(topic))]
    if not mine:
        return {}
    joined = lambda side, reading: [one for task in mine for one in side[task]["right"][reading]]
    told: dict[str, Any] = {}
    for reading in get_args(Reading):
        before, after = joined(plain, reading), joined(found, reading)
        told[reading] = share(sum(after), len(after)) | {"paired": paired(before, after)}
        told[reading]["kept"] = sum(after) / sum(before) if sum(before) else math.nan
    fired = [one for task in mine for one in found[task]["opened"]]
    return told | ({"fires": share(sum(fired), len(fired))} if gated else {})


def show(rows: Sequence[Mapping[str, Any]], gates: Sequence[Mapping[str, Any]], topic: str) -> None:
    """Three tables."""
    console = Console(width=WIDTH)
    console.print(_accuracies(rows, topic))
    console.print(_behaviour(rows))
    console.print(_gates(gates, topic))


def _accuracies(rows: Sequence[Mapping[str, Any]], topic: str) -> Table:
    heads = ("system", f"{topic}: sum", "per byte", "PMI", "fires", "retain: sum", "to plain (95 %)", "PMI, to plain",
             "fires", "neighbours: sum", "to plain (95 %)", "fires")  # fmt: skip
    table = Table(
        *heads, title="accuracy, % (paired differences to no guard in points); rows on which the gate opens, %"
    )
    for row in rows:
        cells = [
            row["system"],
            *(_percent(row["forget"][reading]["share"]) for reading in get_args(Reading)),
            _fires(row, "forget"),
        ]
        for role in ROLES[1:]:
            if role not in row:
                cells += ["-"] * (4 if role == "retain" else 3)
                continue
            cells += [_percent(row[role]["sum"]["share"]), _difference(row[role]["sum"]["paired"])]
            cells += [_difference(row[role]["pmi"]["paired"])] if role == "retain" else []
            cells.append(_fires(row, role))
        table.add_row(*cells)
    return table


def _behaviour(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("system", "decoded tokens edited", "cache = no cache", "decisions flipped by padding right, left",
                  "KL, nats per token", "perplexity ratio", "benign rows on which it opens",
                  title="decoding, padding, and text about other things")  # fmt: skip
    for row in rows:
        decoding, benign, padding = row["decoding"], row["benign"], row.get("padding")
        flips = f"{padding['right']}, {padding['left']} of {padding['n']}" if padding else "-"
        opened = f"{benign['opened']} of {benign['rows']}" if padding else "-"
        table.add_row(row["system"], _percent(decoding["edited"]), f"{decoding['equal']} of {decoding['n']}", flips,
                      f"{benign['kl']:.4f}", f"{benign['ratio']:.3f}", opened)  # fmt: skip
    return table


def _gates(gates: Sequence[Mapping[str, Any]], topic: str) -> Table:
    levels = [f"{100 * one['level']:g} %" for one in gates[0]["at"]]
    table = Table("gate", "area", *levels, "neighbours at 1 %", "deployed: recall", "false positives", "neighbours",
                  title=f"recall of {topic} questions at these false-positive rates, and as calibrated, %")  # fmt: skip
    for gate in gates:
        at_1 = next(one for one in gate["at"] if one["level"] == 0.01)
        own = [_rate(gate["deployed"][role]) if role in gate["deployed"] else "-" for role in ROLES]
        table.add_row(gate["gate"], f"{gate['area']:.3f}", *(_percent(one["recall"]) for one in gate["at"]),
                      _percent(at_1["neighbours"]), *own)  # fmt: skip
    return table


def draw_frontier(gates: Sequence[Mapping[str, Any]], path: Path, topic: str) -> None:
    """Recall against the false-positive rate of every gate; a dot where its own threshold puts it."""
    figure = Figure(figsize=(7.2, 4.8), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for gate, colour in zip(gates, COLOURS * 3, strict=False):
        at = [(100 * x, 100 * y) for x, y in gate["curve"] if x <= 0.12]
        axes.step([x for x, _ in at], [y for _, y in at], color=colour, where="post", label=gate["gate"])
        x, y = (100 * gate["deployed"][role]["share"] for role in ("retain", "forget"))
        axes.plot([max(x, 0.07)], [y], color=colour, marker="o", markeredgecolor=INK)
    axes.set_xscale("log")
    axes.set(xlim=(0.06, 12), ylim=(0, 102), xlabel="harmless questions on which it opens, %",
             ylabel=f"{topic} questions on which it opens, %")  # fmt: skip
    axes.set_xticks([0.1, 0.5, 1, 5, 10], ["0.1", "0.5", "1", "5", "10"])
    axes.set_title("Recall against false positives; dots: as calibrated on training questions", loc="left", size=10)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, [axes], path)


def draw_forget_retain(rows: Sequence[Mapping[str, Any]], path: Path, topic: str) -> None:
    """Every system: what is left of the topic, against what was lost elsewhere."""
    figure = Figure(figsize=(12.5, 5.2), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    both = figure.subplots(1, 2, sharey=True)
    for axes, role in zip(both, ROLES[1:], strict=True):
        for place, row in enumerate(rows):
            if role not in row:
                continue
            x, y = row[role]["sum"], row["forget"]["sum"]
            difference = x["paired"]
            colour = WARM if row["system"] == "ours" else GREY if place == 0 else COLD
            spans = {"xerr": _arms(difference["difference"], difference), "yerr": _arms(y["share"], y)}
            at = (100 * difference["difference"], 100 * y["share"])
            axes.errorbar(*[[one] for one in at], **spans, color=colour, marker="o", elinewidth=0.4, alpha=0.9)
            axes.annotate(str(place), at, textcoords="offset points", xytext=(4, 3), size=8, color=INK)
        axes.axvline(0, color=GREY, linewidth=0.6, linestyle=":")
        axes.set(xlabel=f"{NAMES[role]}: accuracy less that of the plain model, points")
    both[0].set(ylabel=f"{topic}: accuracy, %")
    names = "\n".join(f"{place}  {row['system']}" for place, row in enumerate(rows))
    figure.text(0.84, 0.5, names, size=8, color=INK, va="center", linespacing=1.6)
    both[0].set_title("Forget and retain: best is right and low (95 % intervals)", loc="left", size=10)
    _save(figure, [*both], path, right=0.83)


def _arms(middle: float, found: Mapping[str, float]) -> list[list[float]]:
    """How far an interval reaches to either side, in points; it can lie beside its estimate, and no arm is negative."""
    return [[100 * max(0.0, middle - found["low"])], [100 * max(0.0, found["high"] - middle)]]


def _save(figure: Any, plots: Sequence[Any], path: Path, *, right: float = 1.0) -> None:
    """``right`` is where the plots end, as a share of the width."""
    for axes in plots:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout(rect=(0, 0, right, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _fires(row: Mapping[str, Any], role: str) -> str:
    return _percent(row[role]["fires"]["share"]) if "fires" in row.get(role, {}) else "-"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _rate(found: Mapping[str, float]) -> str:
    return f"{100 * found['share']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def _difference(found: Mapping[str, float]) -> str:
    return f"{100 * found['difference']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"
