"""The tables of ``saeguard eval``, from what its commands measure; shares in per cent."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from saeguard.cli.console import table


def unlearning_table(document: dict[str, Any]) -> Table:
    """A row per file and topic: plain accuracy, then guarded, by log-likelihood and in writing."""
    heads = ("file", "topic", "n", "chance", "sum", "guarded, 95 %", "bytes", "PMI", "refused", "options", "open",
             "triggered", "rest identical")  # fmt: skip
    rows = []
    for file in document["files"]:
        for part in file["topics"]:
            told, written = part["likelihood"], part["written"]
            guarded = told["sum"]["guarded"]
            rows.append((
                file["file"].removesuffix(".gz").removesuffix(".jsonl"), part["topic"] or "-", part["n"],
                percent(part["chance"]), _change(told["sum"]),
                f"{percent(guarded['low'])} to {percent(guarded['high'])}", _change(told["bytes"]),
                _change(told["pmi"]), told["sum"]["refused"],
                *(_change(written[form]) if form in written else "-" for form in ("options", "open")),
                " / ".join(percent(one["share"]) for one in triggered(part)),
                "yes" if all(same == of for same, of in part["identical"].values()) else "NO",
            ))  # fmt: skip
    policy = document["policy"]
    title = (
        f"Policy {policy['name']}, serial {policy['serial']}, on {document['model']['name']}: plain > guarded, in %; "
        "triggered: by the question / with some choice / in writing with options / open"
    )
    return table(title, heads, rows, right=range(2, len(heads) - 1))


def triggered(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Shares of a topic's questions: by the question alone, with some choice behind it, in each form of writing."""
    return [*part["triggered"].values(), *(one["triggered"] for one in part["written"].values())]


def dilution_table(found: Any) -> Table:
    """The curve of a `Dilution`."""
    rows = [("alone", 0, f"{found.opened_alone} of {found.n}", "-", "-", found.disagreeing_alone, "-")]
    rows += [
        (point.place, f"{point.length:,}", f"{point.opened} of {point.n}", point.lost, point.gained, point.disagreeing,
         "opens" if point.benign_opens else "-")
        for point in found.points
    ]  # fmt: skip
    heads = ("benign text", "tokens", "open", "lost", "gained", "forms disagree", "benign alone")
    return table(f"Dilution: {found.flips} flips; forms: {'; '.join(found.forms)}", heads, rows, right=range(1, 6))


def transform_table(found: Sequence[Any]) -> Table:
    """A row per `Transformed`."""
    rows = [
        (one.name, *(percent(part.share) for part in (one.triggered, one.asked, one.plain, one.guarded)))
        for one in found
    ]
    heads = ("transform", "triggered in chat", "as Question:", "plain accuracy", "guarded")
    n = found[0].triggered.n if found else 0
    return table(f"{n} questions in another dress, in %", heads, rows, right=range(1, 5))


def benign_table(found: Sequence[Any]) -> Table:
    """A row per `Benign`."""
    rows = [
        (one.name, f"{one.tokens:,}", f"{one.triggered.right} of {one.triggered.n}", f"{one.per_tokens:.3f}",
         f"{one.kl:.2e}", f"{one.kl_triggered:.3f}", f"{one.perplexity:.2f}", f"{one.perplexity_ratio:.4f}",
         one.changed_untriggered)
        for one in found
    ]  # fmt: skip
    heads = ("text", "tokens", "rows triggered", "per 1,600 tokens", "KL", "KL where triggered", "perplexity",
             "guarded / plain", "changed untriggered")  # fmt: skip
    return table("Benign text; KL in nats per token", heads, rows, right=range(1, len(heads)))


def percent(value: float | None) -> str:
    """With one digit; a dash where there is no number."""
    return "-" if value is None else f"{100 * value:.1f}"


def _change(part: dict[str, Any]) -> str:
    return f"{percent(part['plain']['share'])} > {percent(part['guarded']['share'])}"
