"""Turn rules into one function per site: x, and what is known of its tokens, to what has to be added to x.

All rules at a site are joint: each SAE's latents are encoded once, from the same x, whatever the number of rules,
plans and nested contexts. Models and hooks are not known here: see engines/.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saeguard.axes import Fired, Mask, Stream
from saeguard.errors import SiteNotFound
from saeguard.kernels.parts import Part, lay_out
from saeguard.kernels.pick import KernelName, pick
from saeguard.plans import Plan, Rule, check_overlaps
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.tokens import TokenBatch


@dataclass(frozen=True)
class BoundRule:
    """A rule with its site settled, and the places in the list of plans that it came from (None: every row)."""

    rule: Rule
    site: Site
    plans: frozenset[int] | None


@dataclass(frozen=True, eq=False)
class PartEdit:
    """What one part did in one forward pass."""

    part: Part
    rules: tuple[int, ...]
    """Numbers of the part's rules among all bound rules."""
    selected: Fired
    df: Float[Tensor, "batch pos k"]


@dataclass(frozen=True, eq=False)
class Edit:
    """What to add at one site in one forward pass; tokens that are not ``changed`` keep x bit for bit."""

    dx: Stream
    changed: Mask
    parts: tuple[PartEdit, ...]


def bind(plans: Sequence[Plan | None], saes: Mapping[str, SAE], *, every_row: bool) -> tuple[BoundRule, ...]:
    """Settle sites, merge rules that several plans share, and refuse rules of one row that contradict each other.

    Raises `SiteNotFound` when neither the rule nor its SAE says where, `OverlappingRules`.
    """
    found: dict[tuple[Rule, Site], set[int]] = {}
    for index, plan in enumerate(plans):
        rules = plan.rules if plan is not None else ()
        sited = [(rule, _site(rule, saes[rule.sae])) for rule in rules]
        check_overlaps((rule, (saes[rule.sae].key, site)) for rule, site in sited)
        for rule, site in sited:
            found.setdefault((rule, site), set()).add(index)
    return tuple(
        BoundRule(rule, site, None if every_row else frozenset(owners)) for (rule, site), owners in found.items()
    )


def _site(rule: Rule, sae: SAE) -> Site:
    site = rule.site or sae.site
    if site is None:
        raise SiteNotFound(
            f"the site of rule {rule}",
            "neither the rule nor its SAE names one",
            "Give the rule a site: Rule(..., site=Site('resid_post', 12)).",
        )
    return site


class Editor:
    """The edits of one list of bound rules at one site; a pure function once built."""

    def __init__(
        self,
        site: Site,
        rules: Sequence[BoundRule],
        saes: Mapping[str, SAE],
        *,
        device: torch.device,
        kernel: KernelName | None = None,
    ):
        self.site = site
        self.rules = tuple(rules)
        self._kernel = pick(kernel)
        self._parts: list[tuple[tuple[int, ...], Tensor, Part]] = []
        self._elsewhere: dict[tuple[int, torch.device], Part] = {}
        by_sae: dict[str, list[int]] = {}
        # sums of floats depend on the order of their terms, so that order is not the one of declaration
        for index, bound in sorted(enumerate(self.rules), key=lambda numbered: repr(numbered[1].rule)):
            if bound.site == site:
                by_sae.setdefault(saes[bound.rule.sae].key, []).append(index)
        for _, members in sorted(by_sae.items()):
            mine = [self.rules[index] for index in members]
            sae = saes[mine[0].rule.sae]
            part = lay_out(sae, [bound.rule for bound in mine], [bound.plans for bound in mine])
            self._parts.append((tuple(members), torch.tensor(members), part.to(device)))

    def __call__(self, x: Stream, tokens: TokenBatch, covers: Bool[Tensor, "batch rules"]) -> Edit:
        """The edit of ``x``, in float32. ``covers`` says which bound rules a row is under."""
        with torch.autocast(x.device.type, enabled=False):
            parts = [
                self._edit(number, members, index, x.float(), tokens, covers)
                for number, (members, index, _) in enumerate(self._parts)
            ]
        dx, edits = parts[0]
        changed = (edits.df != 0).any(-1)
        for more, other in parts[1:]:
            dx = dx + more
            changed = changed | (other.df != 0).any(-1)
        return Edit(dx, changed, tuple(edit for _, edit in parts))

    def _edit(self, number: int, members: tuple[int, ...], index: Tensor, x: Stream, tokens: TokenBatch,
              covers: Bool[Tensor, "batch rules"]) -> tuple[Stream, PartEdit]:  # fmt: skip
        part = self._part_on(number, x.device)
        wheres = [self.rules[i].rule.where for i in members]
        if len(set(wheres)) == 1:
            chosen = tokens.select(wheres[0])[..., None]
        else:
            chosen = torch.stack([tokens.select(where) for where in wheres], dim=-1)
        chosen, covers = chosen.to(x.device), covers.to(x.device)  # with a device map ids and stream can part
        selected = chosen & covers[:, None, index]
        dx, df = self._kernel(x, part, selected)
        return dx, PartEdit(part, members, selected, df)

    def _part_on(self, number: int, device: torch.device) -> Part:
        part = self._parts[number][2]
        if part.W_dec.device == device:
            return part
        if (number, device) not in self._elsewhere:
            self._elsewhere[number, device] = part.to(device)
        return self._elsewhere[number, device]
