"""Which latents a policy edits: each published way to choose them by its name, and lists that were made elsewhere.

    choose("dsg", job, top=20, floor=0.01)      a `Selection`: latents, best first, with the scores that they had

A way is one row of `SELECTIONS`: a name, the column to rank by, and what makes the table. ``job.texts`` are what is to
be ``forget`` and ``retain``; both are read in one streaming pass, which the cache keeps, whatever is chosen from it.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from saeguard import strict_json
from saeguard.errors import BrokenFile, ScoreMismatch
from saeguard.sae import SAE
from saeguard.scoring import controls, forget_retain
from saeguard.scoring.attribution import loss_attribution
from saeguard.scoring.catalogue import Job
from saeguard.scoring.forget_retain import Importance
from saeguard.scoring.select import Bound, Selection, select
from saeguard.scoring.table import ScoreTable, pick

FREQUENCIES = ("forget_frequency", "retain_frequency")
"""Columns that every way has, so that bounds can be set on them."""


@dataclass(frozen=True)
class Way:
    """``make`` is given the job and the floor: a share of forget tokens to fire on, for the ways that know one.

    ``floors``: ``make`` takes no notice of the floor, which then is a bound on ``forget_frequency``.
    """

    name: str
    by: str
    about: str
    make: Callable[[Job, float], ScoreTable]
    floors: bool = False


def _dsg(reading: Importance, job: Job, floor: float) -> ScoreTable:
    return forget_retain.dsg(job.statistics, reading=reading, floor=floor)


def _farrell(job: Job, floor: float) -> ScoreTable:
    return forget_retain.farrell(job.statistics)


def _crisp(job: Job, floor: float) -> ScoreTable:
    return forget_retain.crisp(job.statistics)


def _attribution(job: Job, floor: float) -> ScoreTable:
    texts = (job.texts["forget"], job.texts["retain"])
    return loss_attribution(job.model, job.sae, *texts, **job.walk("loss attribution"))


def _random(job: Job, floor: float) -> ScoreTable:
    """Drawn from the latents that fire on either text: one that never fires is no control."""
    active = job.statistics.of("forget").active + job.statistics.of("retain").active
    return controls.random_control(job.sae, seed=job.seed, among=active.nonzero()[:, 0].tolist())


SELECTIONS = (
    Way("dsg", "dsg", "DSG as its code has it: squared means", partial(_dsg, "squared_mean")),
    Way("dsg_mean_square", "dsg", "DSG as its paper has it: mean squares", partial(_dsg, "mean_square")),
    Way("dsg_frequency", "dsg", "DSG's rule, of frequencies", partial(_dsg, "frequency")),
    Way("dsg_document", "dsg", "DSG's rule, of squared means per document", partial(_dsg, "document")),
    Way("ratio", "dsg_ratio", "the ratio of squared means alone, above the floor", partial(_dsg, "squared_mean"), True),
    Way("squared_mean", "forget_importance", "no filter: the largest on forget text", partial(_dsg, "squared_mean")),
    Way("mean_square", "forget_importance", "no filter, mean squares", partial(_dsg, "mean_square")),
    Way("frequency", "forget_importance", "no filter, frequencies", partial(_dsg, "frequency")),
    Way("farrell", "farrell", "rare on retain text, then frequent on forget text", _farrell),
    Way("crisp", "crisp", "CRISP: more often, and three times as much", _crisp),
    Way("attribution", "loss_attribution", "the loss of forget text, less that of retain text", _attribution, True),
    Way("random", "random", "the control: any that fire", _random),
)  # fmt: skip
"""A new way is a new row."""


def find(name: str) -> Way:
    """The way of that name. Raises `ScoreMismatch`."""
    for way in SELECTIONS:
        if way.name == name:
            return way
    known = ", ".join(way.name for way in SELECTIONS)
    raise ScoreMismatch(f"latents by {name!r}", "there is no selection of that name", f"Known are: {known}.")


def choose(
    name: str, job: Job, *, top: int, floor: float = 0.0, bounds: Sequence[Bound] = (),
    within: Mapping[str, int] | None = None,
) -> Selection:  # fmt: skip
    """The ``top`` latents by that way, inside all ``bounds`` on its columns and on both frequencies.

    ``within`` is that of `select`. Fewer where fewer are left. Raises `ScoreMismatch` where none is, and what making
    the table raises.
    """
    way = find(name)
    table = way.make(job, floor).join(pick(forget_retain.farrell(job.statistics), FREQUENCIES))
    if not table.ranked(way.by):
        raise ScoreMismatch(
            f"latents of {job.sae.name} by {name}", "the rule rejects all of them",
            "Choose in another way; where there is a floor, set a lower one.",
        )  # fmt: skip
    own = [Bound("forget_frequency", least=floor)] if way.floors else []
    found = select(table, way.by, top=top, bounds=(*own, *bounds), within=within)
    meanings = {column: asdict(meaning) for column, meaning in table.meanings.items()}
    return replace(found, provenance={**found.provenance, "selection": name, "floor": floor, "meanings": meanings})


def listed(sae: SAE, latents: Sequence[int]) -> Selection:
    """These latents, whose scores are not known. Raises `LatentOutOfRange`, and `ScoreMismatch` unless each is one."""
    sae.check_latents(latents)
    if not latents or len(set(latents)) != len(latents):
        raise ScoreMismatch(f"latents of {sae.name} by a list", "there is none in it, or one twice", "Name each once.")
    return Selection(sae.name, tuple(latents), {}, {"sae_fingerprint": sae.fingerprint(), "selection": "listed"})


def read_selection(path: str | Path, sae: SAE) -> Selection:
    """What `Selection.to_json` wrote, as ``saeguard select --out`` does beside a plan, for this very SAE.

    ``provenance["file"]`` is the file's SHA-256. Raises `BrokenFile`, `ScoreMismatch`, `LatentOutOfRange`.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
        document = strict_json.parse(content.decode())
        latents, made = tuple(document["latents"]), dict(document["provenance"])
        scores = {name: tuple(map(_number, column)) for name, column in document["scores"].items()}
        if any(type(latent) is not int for latent in latents) or any(len(c) != len(latents) for c in scores.values()):
            raise TypeError("its latents are no whole numbers, or do not have a score each")
        fingerprint = made["sae_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenFile(
            f"the selection in {file.name}", f"it cannot be read ({type(error).__name__}: {error})",
            "Give the .selection.json that saeguard select --out writes beside a plan.",
        ) from error  # fmt: skip
    if fingerprint != sae.fingerprint():
        raise ScoreMismatch(
            f"the selection in {file.name} for {sae.name}", "it was made from an SAE whose weights differ",
            "Select from scores of this SAE: latent numbers mean nothing in another.",
        )  # fmt: skip
    digest = hashlib.sha256(content).hexdigest()
    return replace(listed(sae, latents), scores=scores, provenance={**made, "selection": "listed", "file": digest})


def _number(value: Any) -> float | None:
    """The inverse of `table.as_json`, for the scores of a `Selection`. Raises `TypeError`."""
    if value in ("inf", "-inf"):
        return math.inf if value == "inf" else -math.inf
    if value is not None and type(value) not in (int, float):
        raise TypeError(f"a score is {value!r:.40}")
    return None if value is None else float(value)
