"""What a fitted policy does where its gate opens: the latents, by `saeguard.scoring.selections`, and how strongly.

The strength is what was asked for, or that at which the edit alone, at every token of questions to forget, moves the
next-token predictions by so many nats (`saeguard.scoring.kl_strength`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from saeguard.cli.texts import within as some_of

KL_TOKENS = 2_000
"""Tokens of questions to forget on which a KL is measured, at most."""
DEFAULT, AMOUNT = "dsg", -1.0
Lists = list[str] | None

Select = Annotated[
    str, typer.Option(help="How latents are chosen, see saeguard guard selections.", show_default=DEFAULT)
]
Latents = Annotated[str, typer.Option(help="Instead of --select: these latents, such as 12,87.")]
LatentsFrom = Annotated[
    Path | None, typer.Option(help="Instead of --select: the .selection.json that saeguard select wrote.")
]
Floor = Annotated[
    float, typer.Option("--floor", help="dsg, ratio, attribution: the share of tokens to forget that it fires on.")
]
Bounds = Annotated[Lists, typer.Option("--bound", help="Keep latents in 'retain_frequency<=0.1'; repeatable.")]
Percentiles = Annotated[
    Lists, typer.Option("--percentile-bound", help="The same in percentiles: 'dsg_ratio>=99'; repeatable.")
]
Within = Annotated[
    Lists, typer.Option("--within", help="Keep the first so many of another column: dsg_ratio=500; repeatable.")
]
Value = Annotated[float | None, typer.Option(help="The op's amount.", show_default="-1")]
AlsoEdit = Annotated[bool, typer.Option("--also-edit", help="With --refuse: edit too, behind the same gate.")]
KL = Annotated[
    float | None, typer.Option(help="Instead of --value: set it so that predictions move by so many nats per token.")
]


@dataclass(frozen=True)
class Wanted:
    """The options: ``latents`` or ``file`` in place of ``select``; ``kl`` where the op's amounts are a beginning."""

    op: Any
    select: str = DEFAULT
    top: int = 20
    floor: float = 0.0
    bounds: tuple[Any, ...] = ()
    within: Mapping[str, int] = field(default_factory=dict)
    latents: tuple[int, ...] = ()
    file: Path | None = None
    kl: float | None = None

    def settings(self) -> dict[str, Any]:
        """What a policy says of how it was fitted; what was not asked for is left out."""
        from saeguard.scoring.select import spelled

        if self.latents or self.file is not None:
            return {"select": "listed"}
        told: dict[str, Any] = {"select": self.select, "top": self.top, "floor": self.floor}
        told |= {"bounds": [spelled(bound) for bound in self.bounds]} if self.bounds else {}
        return told | ({"within": dict(self.within)} if self.within else {})


@dataclass(frozen=True, eq=False)
class Edit:
    """What came of it: ``selection`` and ``strength`` are for the document, ``figures`` for the policy."""

    latents: tuple[int, ...]
    op: Any
    selection: Mapping[str, Any]
    strength: Mapping[str, Any]
    figures: Mapping[str, Any]


def wanted(
    op: str, value: float | None, kl: float | None, *, unit: str, when: str, select: str, latents: str,
    latents_from: Path | None, refuse: str, also_edit: bool, bounds: Sequence[Lists], **more: Any,
) -> Wanted:  # fmt: skip
    """The options as they were given; ``bounds`` are plain ones, percentiles, and places. Raises `BadParameter`."""
    from saeguard.cli.latents import latent_numbers
    from saeguard.cli.selecting import bounds_of, firsts_of
    from saeguard.cli.steering import make_op
    from saeguard.plans import Rule
    from saeguard.scoring.kl_strength import scaled
    from saeguard.scoring.selections import find

    plain, percentiles, places = bounds
    ways = {"--select": select, "--latents": latents, "--latents-from": latents_from}
    given = [name for name, one in ways.items() if one]
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)}: give one of them")
    if value is not None and kl is not None:
        raise typer.BadParameter("--value and --kl: give one of them")
    edits = [*given, *(["--kl"] if kl is not None else []), *(["bounds"] if any(bounds) else [])]
    if also_edit and not refuse:
        raise typer.BadParameter("--also-edit goes with --refuse: without it a policy edits and does nothing else")
    if refuse and not also_edit and edits:
        raise typer.BadParameter(f"--refuse edits nothing: leave out {edits[0]}")
    if (latents or latents_from) and any(bounds):
        raise typer.BadParameter("bounds are for --select: a list is taken as it is")
    find(select or DEFAULT)
    own = make_op(op, AMOUNT if value is None and op != "ablate" else value, unit=unit, when=when)
    if kl is not None:
        scaled(Rule("sae", (0,), own), 1.0)  # refused before anything is loaded
    return Wanted(
        own, select or DEFAULT, latents=tuple(latent_numbers(latents)) if latents else (), file=latents_from, kl=kl,
        bounds=(*bounds_of(plain or [], percentile=False), *bounds_of(percentiles or [], percentile=True)),
        within=firsts_of(places or []), **more,
    )  # fmt: skip


def made(asked: Wanted, read: Any, topic: str, *, tokens: int, seed: int, folder: Path, say: Any) -> Edit:
    """The edit, chosen on questions as a model reads them; ``read`` has them, the model, the tokenizer and the SAE.

    Raises `ScoreMismatch` where no latent is left or a list is of another SAE, `BrokenFile`, `StrengthUnreachable`.
    """
    from saeguard.plans import Rule
    from saeguard.scoring.cache import Cache
    from saeguard.scoring.catalogue import Job
    from saeguard.scoring.selections import choose, listed, read_selection

    if asked.file is not None:
        chosen = read_selection(asked.file, read.sae)
    elif asked.latents:
        chosen = listed(read.sae, asked.latents)
    else:
        told = lambda stage, done, total: say(f"choosing latents: {stage}", done, total, "rows")
        texts = _texts(read, topic, tokens=tokens, seed=seed)
        job = Job(read.model, read.tokenizer, read.sae, texts, seed=seed, cache=Cache(folder / "statistics"),
                  progress=told)  # fmt: skip
        chosen = choose(asked.select, job, top=asked.top, floor=asked.floor, bounds=asked.bounds, within=asked.within)
    rule, figures = Rule(read.sae.name, chosen.latents, asked.op), {}
    if "file" in chosen.provenance:
        figures["selection"] = chosen.provenance["file"]
    found = None
    if asked.kl is not None:
        some = _texts(read, topic, tokens=min(tokens, KL_TOKENS), seed=seed, sides=("forget",))["forget"]
        found = _at_kl(asked.kl, rule, read, some, folder, say)
        rule = found.rule
        measured = {name: value for name, value in found.figures().items() if name not in ("tried", "kappa")}
        figures["strength"] = {"asked_kl": found.kappa, **measured}
    return Edit(chosen.latents, rule.op, _told(chosen), _strength(rule, found), figures)


def said(document: Mapping[str, Any]) -> str:
    """What a fit's document says of the edit, in a line."""
    refuses = "Refuses" if document["refuses"] else ""
    if not document["latents"]:
        return refuses
    selection, strength = document["selection"], document["strength"]
    op = " ".join(str(part) for part in strength["op"].values())
    kl = f", {strength['kl']['kl']:.3g} nats per token" if strength["kl"] else ""
    edits = f"Edits latents {','.join(map(str, document['latents']))} (by {selection['name']}): {op}{kl}"
    return f"{edits}. {refuses}".rstrip(". ")


def _texts(
    read: Any, topic: str, *, tokens: int, seed: int, sides: Sequence[str] = ("forget", "retain")
) -> dict[str, Any]:
    from saeguard.scoring.texts import Texts

    texts = {}
    for side in sides:
        asked = [q for q in read.questions if (q.topic == topic) == (side == "forget")]
        written = [f"Question: {question.text}\nAnswer:" for question in asked]
        kept = some_of({side: written}, read.tokenizer, n_tokens=tokens, seed=seed)
        texts[side] = Texts.from_text(kept, read.tokenizer, read.sae, name=side)
    return texts


def _at_kl(kl: float, rule: Any, read: Any, text: Any, folder: Path, say: Any) -> Any:
    """The rule at that KL, without its gate: how strong an edit is does not depend on when it is made.

    What was found is kept in ``folder``, so that a command that was interrupted later does not search again.
    """
    from saeguard.cli.kept import Kept
    from saeguard.fingerprints import model_fingerprint
    from saeguard.plans import Plan
    from saeguard.scoring.kl_strength import KLStrength, kl_strength, scaled

    folder.mkdir(parents=True, exist_ok=True)
    of = [model_fingerprint(read.model), read.sae.fingerprint(), Plan((rule,)).to_json(), text.fingerprint, kl]
    kept = Kept(folder / "strength", of)
    if "found" not in kept:
        told = lambda done, total: say("strength of the edit", done, total, "rows")
        found = kl_strength(read.model, read.tokenizer, read.sae, rule, text, kappa=kl, progress=told)
        kept["found"] = found.figures()
    figures = dict(kept["found"])
    tried = tuple((factor, nats) for factor, nats in figures.pop("tried"))
    return KLStrength(scaled(rule, figures["factor"]), **figures, tried=tried)


def _told(chosen: Any) -> dict[str, Any]:
    """The selection as JSON, one object per latent."""
    document = json.loads(chosen.to_json())
    scores, made = document["scores"], document["provenance"]
    per_latent = [
        {"latent": latent, **{name: column[place] for name, column in scores.items()}}
        for place, latent in enumerate(document["latents"])
    ]
    meanings = made.pop("meanings", {})
    return {"name": made["selection"], "by": made.get("by"), "latents": per_latent, "meanings": meanings,
            "provenance": made}  # fmt: skip


def _strength(rule: Any, found: Any) -> dict[str, Any]:
    """The op as a plan spells it, and what was found on the way to a KL."""
    from saeguard.plans import Plan

    (spelled,) = json.loads(Plan((replace(rule, site=None),)).to_json())["rules"]
    return {"op": spelled["op"], "kl": None if found is None else json.loads(json.dumps(found.figures()))}
