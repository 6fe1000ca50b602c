"""What a check found: one claim after another, each with its numbers, and whether it holds.

A claim that cannot be decided here (a model that cannot generate, a plan that found nothing to edit) is open: it is
shown as such, and neither passes nor fails.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from saeguard.errors import SaeguardError

Found = tuple[bool | None, str, dict[str, int | float]]
"""Whether a claim holds, what was found, and the numbers behind it."""
_MARKS = {True: "ok", False: "FAILED", None: "open"}


@dataclass(frozen=True)
class Claim:
    """One promise: its ``name``, what it says, what was found, and whether it holds (None: it could not be decided)."""

    name: str
    promise: str
    found: str
    holds: bool | None
    numbers: dict[str, int | float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{_MARKS[self.holds]:>6}  {self.name:<22}{self.promise}\n{'':30}{self.found}"


@dataclass(frozen=True)
class Checked:
    """What was checked, and what was found."""

    model: str
    engine: str
    sae: str
    site: str
    module: str
    dtype: str
    stream_dtype: str
    compute_dtype: str
    plan: str
    claims: tuple[Claim, ...]
    seconds: float

    @property
    def failed(self) -> tuple[Claim, ...]:
        """The claims that do not hold."""
        return tuple(claim for claim in self.claims if claim.holds is False)

    @property
    def passed(self) -> bool:
        """Whether no claim failed."""
        return not self.failed

    def to_json(self) -> str:
        """Everything, with ``passed``."""
        return json.dumps({"passed": self.passed, **asdict(self)}, indent=2)

    def __str__(self) -> str:
        open_ = sum(claim.holds is None for claim in self.claims)
        verdict = "passed" if self.passed else "FAILED: " + ", ".join(claim.name for claim in self.failed)
        head = [
            f"{self.sae} at {self.site} of {self.model}",
            f"{self.engine}, {self.module}" + (f", plan {self.plan}" if self.plan else ""),
            f"{self.dtype} model, {self.stream_dtype} stream, edits computed in {self.compute_dtype}",
        ]
        count = f"{len(self.claims)} claims, {open_} open, {self.seconds:.0f} s"
        return "\n".join([*head, *map(str, self.claims), f"{verdict} ({count})"])


def claim(name: str, promise: str, check: Callable[[], Found]) -> Claim:
    """Run ``check``. What saeguard refuses while it runs is a failed claim that says why, not the end of the others."""
    try:
        holds, found, numbers = check()
    except SaeguardError as error:
        return Claim(name, promise, f"{type(error).__name__}: {error}", False)
    return Claim(name, promise, found, holds, numbers)
