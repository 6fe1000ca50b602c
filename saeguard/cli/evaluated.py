"""The tables of ``saeguard eval``, from what its commands measure; shares in per cent."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from saeguard.cli.console import table


def unlearning_table(document: dict[str, Any]) -> Table:
    """A row per file and topic: plain accuracy, then guarded, by log-likelihood and in writing."""
    heads = ("file", "topic", "n", "chance", "sum", "guarded, 95 %", "bytes", "PMI", "refused", "edits alone",
             "options", "open", "triggered", "rest identical")  # fmt: skip
    rows = []
    for file in document["files"]:
        for part in file["topics"]:
            told, written = part["likelihood"], part["written"]
            guarded = told["sum"]["guarded"]
            rows.append((
                file["file"].removesuffix(".gz").removesuffix(".jsonl"), part["topic"] or "-", part["n"],
                percent(part["chance"]), _change(told["sum"]),
                f"{percent(guarded['low'])} to {percent(guarded['high'])}", _change(told["bytes"]),
                _change(told["pmi"]), told["sum"]["refused"], percent(told["sum"]["edits_alone"]["share"]),
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


def sequence_table(steps: Sequence[dict[str, Any]]) -> Table:
    """A row per topic, a column per step; those of the topics to forget first."""
    last = {part["topic"]: part for part in steps[-1]["topics"]}
    order = [*steps[-1]["forgets"], *(topic for topic in last if topic not in steps[-1]["forgets"])]
    rows = []
    for topic in order:
        parts = [next(part for part in step["topics"] if part["topic"] == topic) for step in steps]
        cells = [f"{percent(one['guarded']['share'])} ({percent(one['triggered']['share'])})" for one in parts]
        end = parts[-1]
        kept = ("yes" if end["forgotten"] else "NO") if topic in steps[-1]["forgets"] else f"{end['loss']:+.1f}"
        rows.append((topic, end["n"], percent(end["chance"]), percent(end["plain"]["share"]), *cells, kept))
    losses = [step["loss"] for step in steps]
    told = ["-" if one["points"] is None else f"{one['points']:+.1f} ({one['low']:+.1f} to {one['high']:+.1f})"
            for one in losses]  # fmt: skip
    rows.append(("never forgotten: points lost", losses[-1]["n"], "", "", *told, ""))
    heads = ("topic", "n", "chance", "plain", *(step["policy"] for step in steps), "forgotten / points lost")
    return table("Accuracy (triggered) after each step, in %", heads, rows, right=range(1, len(heads)))


def recovery_table(found: Any) -> Table:
    """What the attacks of a `Recovery` bring back."""
    each, one_for_all = found.each, found.universal
    counted = [
        ("a push per question, right choice", [one.recovered for one in each], [one.norm for one in each]),
        ("the same towards a wrong choice", [one.wrong for one in each], [one.wrong_norm for one in each]),
        ("a random push of the same length", [one.random for one in each], [one.norm for one in each]),
    ]
    rows = [
        (name, f"{sum(some)} of {len(some)}", f"{sum(norms) / len(norms):.2f}" if norms else "-")
        for name, some, norms in counted
    ]
    for name, count in (("one push for all, on other questions", one_for_all.recovered),
                        ("random ones of its length, on average", one_for_all.random_recovered)):  # fmt: skip
        rows.append((name, f"{count:.3g} of {one_for_all.suppressed}", f"{one_for_all.norm:.2f}"))
    title = (
        f"{found.n} questions: {found.plain} right plainly, {found.guarded} under guard. On {one_for_all.n} others: "
        f"plainly {one_for_all.plain}, under guard {one_for_all.guarded}, with the push for all "
        f"{one_for_all.attacked}. Guarded latents woke up at {percent(found.woken)} % of tokens, and changed by "
        f"{percent(found.change)} %"
    )
    return table(title, ("attack", "suppressed answers right again", "mean length, of |x|"), rows, right=(1, 2))


def relearning_table(found: dict[str, Any]) -> Table:
    """A row per tuning and topic, with the guardrail off and on."""
    rows = []
    for name, part in found.items():
        losses = part["losses"]
        loss = f"{losses[0]:.2f} > {losses[-1]:.2f}" if losses else "-"
        attaches = "-" if part["refused"] is None else "refused" if part["refused"] else "YES"
        rows += [
            (name if number == 0 else "", topic, off["n"], percent(off["share"]), percent(part["on"][topic]["share"]),
             loss if number == 0 else "", attaches if number == 0 else "")
            for number, (topic, off) in enumerate(part["off"].items())
        ]  # fmt: skip
    heads = ("tuned", "topic", "n", "guardrail off", "on", "loss", "attaches afterwards")
    return table("Right answers after fine-tuning, in %", heads, rows, right=range(2, 6))
