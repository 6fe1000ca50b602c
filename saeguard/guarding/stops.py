"""Stops: gates that end a row instead of editing it, and what stands in place of its answer."""

from dataclasses import dataclass
from typing import Any

from saeguard.errors import BadPolicy
from saeguard.gates.base import Gate
from saeguard.gates.written import check_gate
from saeguard.guarding.figures import check_text
from saeguard.guarding.records import CODE
from saeguard.sites import Site

MAX_TEXT = 2_000
"""Characters of a refusal."""


@dataclass(frozen=True)
class Refuse:
    """Where ``gate`` opens in a row, the row is stopped and ``text`` returned in place of its answer.

    ``sae`` names the policy's SAE that the gate reads where it names none itself; ``site`` is the stream, that SAE's by
    default. ``reason`` is a code for the audit log, of letters, digits and . _ : - only. Raises `BadPolicy`,
    `BadRule` for what is no gate.
    """

    gate: Gate
    sae: str
    site: Site | None
    text: str
    reason: str

    def __post_init__(self):
        _check(self)
        check_text("the text of a refusal", self.text, most=MAX_TEXT)


@dataclass(frozen=True)
class Halt:
    """Where ``gate`` opens in a row, the row is stopped; what was written before stands. Otherwise as `Refuse`."""

    gate: Gate
    sae: str
    site: Site | None
    reason: str

    def __post_init__(self):
        _check(self)


STOPS: dict[str, Any] = {"refuse": Refuse, "halt": Halt}
"""Names of the stops in a policy file."""


def _check(stop: Refuse | Halt) -> None:
    what = type(stop).__name__
    check_gate(stop.gate)
    if not isinstance(stop.sae, str) or not stop.sae:
        raise BadPolicy(f"{what} with sae={stop.sae!r:.60}", "that names no SAE", "Use sae.name.")
    if not isinstance(stop.reason, str) or CODE.fullmatch(stop.reason) is None:
        raise BadPolicy(
            f"{what} with reason={stop.reason!r:.60}", "it is not 1 to 128 letters, digits and . _ : -",
            'Give a code, such as "biology.gate".',
        )  # fmt: skip
    if isinstance(stop.site, str):
        object.__setattr__(stop, "site", Site.parse(stop.site))
    elif stop.site is not None and not isinstance(stop.site, Site):
        raise BadPolicy(f"{what} with site={stop.site!r:.60}", "that is not a site", "Use Site('resid_post', 12).")
