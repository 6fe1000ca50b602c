"""Draw what an SAE leaves unexplained: stacked shares by domain, what each part costs the model, the worst tokens.

It draws the JSON that ``saeguard error`` writes, so a picture can be made of a saved one.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saeguard.drawing.picture import EDIT, HEAT, INK, SOFT, matplotlib_classes
from saeguard.errors import UnsupportedFormat

LINEAR, NONLINEAR = HEAT[1], HEAT[3]
BOOST_ALPHA = (1.0, 0.55)
"""Of the first SAE and, where there are two, of the second."""
WIDTH_IN, DPI, ROW_IN = 13.0, 130, 0.3
MOST_TOKENS = 12
PARTS = (("sae", "SAE(x)"), ("with_linear", "+ linear part"), ("with_nonlinear", "+ nonlinear part"))


def check_drawable(path: str | Path) -> None:
    """Raise what `write_error_picture` would: `MissingExtra` without matplotlib, `UnsupportedFormat` for no PNG."""
    matplotlib_classes()
    if Path(path).suffix.lower() != ".png" or Path(path).is_dir():
        raise UnsupportedFormat(f"a picture in {path}", "that is no name of a PNG file", "Write one such as error.png.")


def write_error_picture(document: Mapping[str, Any], path: str | Path) -> Path:
    """Write the PNG to ``path``, making its folder. Raises what `check_drawable` raises."""
    check_drawable(path)
    figure_class, canvas_class, _ = matplotlib_classes()
    document = _numbers(document)
    splits = document["splits"]
    n_bars = (len(splits[0]["texts"]) + 1) * len(splits)
    height = max(2.2 + ROW_IN * n_bars, 6.4)
    figure = figure_class(figsize=(WIDTH_IN, height), dpi=DPI, facecolor="white")
    canvas_class(figure)
    first, whole = splits[-1], splits[-1]["whole"]
    figure.text(0.02, 1 - 0.32 / height, f"What {first['sae']} leaves unexplained", size=16, weight="bold", color=INK,
                va="center")  # fmt: skip
    told = (
        f"{first['model']}, {first['site']}   |   {whole['n_tokens']:,} tokens, linear map fitted to "
        f"{first['n_fitted']:,} others   |   R2 of the error {whole['r2_error']:.2f}, its norm {whole['r2_norm']:.2f}"
    )
    figure.text(0.02, 1 - 0.66 / height, told, size=10, color=SOFT, va="center")
    top, bottom = 1 - 1.25 / height, 0.75 / height
    _shares(figure.add_axes((0.14, bottom, 0.42, top - bottom)), splits)
    middle = bottom + (top - bottom) * 0.46
    _losses(figure.add_axes((0.66, middle + 0.75 / height, 0.32, top - middle - 0.75 / height)), splits)
    lower = figure.add_axes((0.66, bottom, 0.32, middle - bottom - 0.2 / height))
    if document["pursuit"]:
        _curve(lower, document["pursuit"])
    else:
        _tokens(lower, first["tokens"])
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=DPI)
    return target


def _numbers(value: Any, name: str = "") -> Any:
    """The document with NaN again where JSON has null; without losses or a curve there are none to draw."""
    if isinstance(value, Mapping):
        return {key: _numbers(inner, key) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(inner) for inner in value]
    return math.nan if value is None and name not in ("losses", "pursuit") else value


def _shares(axes: Any, splits: Sequence[Mapping[str, Any]]) -> None:
    """One bar per domain and SAE: the linear and the nonlinear share of the variance that is left."""
    names = [part["name"] for part in (*splits[0]["texts"], splits[0]["whole"])]
    thick = 0.8 / len(splits)
    for number, split in enumerate(splits):
        places = [row + (number - (len(splits) - 1) / 2) * thick for row in range(len(names))]
        parts = (*split["texts"], split["whole"])
        rest = [part["unexplained_nonlinear"] * 100 for part in parts]
        linear = [max(part["unexplained"] - part["unexplained_nonlinear"], 0.0) * 100 for part in parts]
        named = "" if len(splits) == 1 else f", {split['label']}"
        style = {"height": thick * 0.92, "alpha": BOOST_ALPHA[number]}
        axes.barh(places, rest, color=NONLINEAR, label=f"nonlinear{named}", **style)
        axes.barh(places, linear, left=rest, color=LINEAR, label=f"linear in x{named}", **style)
    axes.set_yticks(range(len(names)), [_plain(name) for name in names], size=9)
    axes.get_yticklabels()[-1].set_weight("bold")
    axes.invert_yaxis()
    axes.set_ylim(len(names) - 0.4, -0.6)
    _titled(axes, "Variance left unexplained, % of x's")
    named = axes.get_legend_handles_labels()
    axes.figure.legend(*named, loc="lower center", bbox_to_anchor=(0.35, 0.0), ncol=4, frameon=False, fontsize=8.5)


def _losses(axes: Any, splits: Sequence[Mapping[str, Any]]) -> None:
    """What the model loses with SAE(x), alone or with a part of the error, in the place of x."""
    thick = 0.8 / len(splits)
    for number, split in enumerate(splits):
        losses = split["whole"]["losses"]
        if losses is None:
            axes.text(0.5, 0.5, "cross-entropy was not measured", ha="center", color=SOFT, transform=axes.transAxes)
            continue
        gaps = [losses[name] - losses["plain"] for name, _ in PARTS]
        places = [row + (number - (len(splits) - 1) / 2) * thick for row in range(len(PARTS))]
        axes.barh(places, gaps, height=thick * 0.92, color=EDIT, alpha=BOOST_ALPHA[number])
        for place, gap in zip(places, gaps, strict=True):
            named = "" if len(splits) == 1 else f"  {split['label']}"
            axes.text(max(gap, 0.0), place, f" {gap:.4f}{named}", va="center", size=8.5, color=INK)
    axes.set_yticks(range(len(PARTS)), [name for _, name in PARTS], size=9)
    axes.invert_yaxis()
    axes.margins(x=0.28)
    _titled(axes, "Cross-entropy above the plain model, nats per token")


def _tokens(axes: Any, tokens: Sequence[Mapping[str, Any]]) -> None:
    shown = tokens[:MOST_TOKENS]
    sizes = [token["unexplained"] * 100 for token in shown]
    linear = [size * min(max(token["linear_share"], 0.0), 1.0) for size, token in zip(sizes, shown, strict=True)]
    rest = [size - part for size, part in zip(sizes, linear, strict=True)]
    axes.barh(range(len(shown)), rest, color=NONLINEAR)
    axes.barh(range(len(shown)), linear, left=rest, color=LINEAR)
    axes.set_yticks(range(len(shown)), [_plain(token["token"]) for token in shown], size=8.5)
    axes.invert_yaxis()
    _titled(axes, "Worst tokens: mean error, % of a token's mean variance")


def _curve(axes: Any, curve: Mapping[str, Any]) -> None:
    ks = [point["k"] for point in curve["points"]]
    axes.plot(ks, [point["encoder"] * 100 for point in curve["points"]], "o-", color=NONLINEAR, label="own encoder")
    axes.plot(ks, [point["pursuit"] * 100 for point in curve["points"]], "o-", color=EDIT, label="gradient pursuit")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("latents per token", color=SOFT, size=9)
    _titled(axes, "Unexplained variance, %")
    axes.legend(frameon=False, fontsize=8.5)


def _titled(axes: Any, title: str) -> None:
    axes.set_title(title, size=10.5, color=INK, loc="left")
    axes.tick_params(colors=SOFT, length=0, labelsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _plain(text: str) -> str:
    """On one line, with what would be blank made visible, and without the sign that would start a formula."""
    shown = text.replace("\n", "↵").replace("\t", "⇥").strip(" ") or "␣"
    return (shown if len(shown) < 22 else shown[:21] + "…").replace("$", r"\$")
