"""Stops: gates that end a row instead of editing it, and what stands in place of its answer.

A stop's gate reads streams as the edits have left them, if they flow past behind the edits. So a policy can edit first
and refuse where that does not help: `escalate` makes the stop for it.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from saeguard.errors import BadPolicy
from saeguard.gates.base import Gate
from saeguard.gates.combined import And
from saeguard.gates.written import check_gate
from saeguard.guarding.figures import check_text
from saeguard.guarding.records import CODE
from saeguard.plans import Rule
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.tokens import Where

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


def escalate(rule: Rule, sae: SAE, *, text: str, reason: str, gate: Gate | None = None) -> Refuse:
    """Refuse where ``rule`` has edited a row and its gate, which now reads the edited stream, opens all the same.

    The edited resid_post.l is read as resid_pre.l+1, which is the same stream behind the edit. Before the rule's gate
    opens both streams are one, and so are the scores: the stop never comes before the edit. Parts of a gate that read
    earlier sites, or words, see no edit and say what they said, so a gate that words can open alone needs another one
    here: ``gate``, written as if it read where the rule reads. It stands for the rule's own, or, where no edit changes
    that one, joins it: the stop opens where both do. What it has piled up before the edit counts; a `Window` forgets
    it. Raises `BadPolicy` where there is nothing to move, or where the rule leaves tokens unedited at which the gate
    looks.
    """
    what, site = f"escalation of {rule}", rule.site or sae.site
    own = rule.gate if gate is None else gate
    if own is None or rule.gate is None:
        raise BadPolicy(what, "the rule has no gate, so nothing says when it has not helped", "Give it a gate.")
    check_gate(own)
    if site is None or site.stream != "resid_post" or (rule.site_out or sae.site_out or site) != site:
        raise BadPolicy(
            what, f"it edits {rule.site_out or sae.site_out or site}, and no site behind it carries the same stream",
            "Write the Refuse by hand, with a gate on an SAE of a later site.",
        )  # fmt: skip
    if replace(rule.where, special=False) != Where() or any(leaf.special for leaf in own.leaves) > rule.special:
        raise BadPolicy(
            what, "it leaves tokens unedited at which its gate looks, and these would be refused at once",
            "Leave out phase, first, start and stop, and take special tokens in both or in neither.",
        )  # fmt: skip
    after = Site("resid_pre", site.layer + 1)
    moved = _moved(own, rule.sae, site, after)
    if moved == own:
        raise BadPolicy(what, f"no part of its gate reads {site}", "Give a gate that reads where the rule reads.")
    if gate is not None and _moved(rule.gate, rule.sae, site, after) == rule.gate:
        moved = And((rule.gate, moved))
    return Refuse(moved, rule.sae, after, text, reason)


def _moved(part: Any, sae: str, before: Site, after: Site) -> Any:
    """``part``, a gate or a part of one, with what reads ``before`` reading ``after``."""
    if isinstance(part, tuple):
        return tuple(_moved(one, sae, before, after) for one in part)
    if not is_dataclass(part) or isinstance(part, type | Site):
        return part
    changes = {field.name: _moved(getattr(part, field.name), sae, before, after) for field in fields(part)}
    if "site" in changes:
        reads_here = changes["site"] == before or changes["site"] is None and getattr(part, "sae", None) in (None, sae)
        changes["site"] = after if reads_here else changes["site"]
    return replace(part, **changes)


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
