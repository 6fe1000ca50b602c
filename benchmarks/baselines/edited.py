"""What edits forget behind their gate and what they cost without it: one row per edit, a table, and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.baselines.showing import COLOURS, paired


def frontier(rows: Sequence[dict[str, Any]], topic: str) -> list[dict[str, Any]]:
    """Per configuration the accuracy on the topic, and the paired difference to the plain model's on all others."""
    plain, found = rows[0]["right"], []
    others = lambda right: [one for name, some in right.items() if name != topic for one in some]
    for row in rows:
        if "refused" in row:
            found.append({"config": row["config"], "refused": row["refused"]})
            continue
        own = row["right"][topic]
        shares = {name: sum(some) / len(some) for name, some in row["right"].items()}
        opened = {"opened": sum(row["opened"]) / len(own)} if "opened" in row else {}
        retain = paired(others(plain), others(row["right"])) if others(plain) else {}
        found.append({"config": row["config"], "forget": shares[topic], "forget_change": paired(plain[topic], own),
                      "retain_change": retain, "topics": shares, **opened, "seconds": row["seconds"]})  # fmt: skip
    return found


def show(found: Sequence[dict[str, Any]], topic: str) -> None:
    """One line per configuration."""
    names = [name for name in found[0]["topics"] if name != topic]
    table = Table("selection:latents:amount", f"{topic}, gated", "gate opens", *(f"{name}, no gate" for name in names),
                  "all of these: to plain (95 %)", title="right answers, %")  # fmt: skip
    for row in found:
        if "refused" in row:
            table.add_row(row["config"], row["refused"], *["-"] * (len(names) + 2))
            continue
        change = row["retain_change"]
        points = [f"{100 * change[end]:+.1f}" for end in ("difference", "low", "high")] if change else ["-"] * 3
        table.add_row(row["config"], f"{100 * row['forget']:.1f}", f"{100 * row.get('opened', 0):.0f}",
                      *(f"{100 * row['topics'][name]:.1f}" for name in names),
                      f"{points[0]} ({points[1]} to {points[2]})")  # fmt: skip
    Console(width=190).print(table)


def draw(found: Sequence[dict[str, Any]], path: Path, topic: str) -> None:
    """What is left of the topic behind the gate, against what the edit costs elsewhere without one."""
    figure = Figure(figsize=(8.4, 5.2), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        if row.get("retain_change"):
            groups.setdefault(row["config"].partition(":")[0], []).append(row)
    for number, (name, rows) in enumerate(groups.items()):
        x, y = [100 * row["retain_change"]["difference"] for row in rows], [100 * row["forget"] for row in rows]
        axes.scatter(x, y, color=COLOURS[number % len(COLOURS)], label=name, marker="os^D"[number // len(COLOURS) % 4])
        for row, *at in zip(rows, x, y, strict=True):
            axes.annotate(
                row["config"].partition(":")[2], (at[0], at[1]), textcoords="offset points", xytext=(4, 3), size=6
            )
    axes.set(xlabel="other topics, without a gate: accuracy less that of the plain model, points",
             ylabel=f"{topic}, behind the gate: accuracy, %")  # fmt: skip
    axes.set_title("Selections; latents:amount at each dot; best is right and low", loc="left", size=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
