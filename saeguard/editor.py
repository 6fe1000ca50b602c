"""Turn rules into one function per site: x, and what is known of its tokens, to what has to be added to x.

All rules at a site are joint: each SAE's latents are encoded once, from the same x, whatever the number of rules,
plans and nested contexts. Models and hooks are not known here: see engines/.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saeguard.axes import Fired, Mask, Stream
from saeguard.errors import OpMismatch, SiteNotFound
from saeguard.gating import BoundGate, BoundLeaf, Gating, Memory
from saeguard.kernels.dense_parts import DensePart, lay_out_dense
from saeguard.kernels.parts import Part, lay_out
from saeguard.kernels.pick import KernelName, pick
from saeguard.kernels.stream_parts import StreamPart, lay_out_stream
from saeguard.plans import Plan, Rule, check_overlaps
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.tokens import TokenBatch

AnyPart = Part | DensePart | StreamPart


@dataclass(frozen=True)
class BoundRule:
    """A rule with its sites settled, and the places in the list of plans that it came from (None: every row).

    ``site`` is edited and ``reads`` is read; they differ where the SAE is a transcoder.
    """

    rule: Rule
    site: Site
    plans: frozenset[int] | None
    reads: Site
    gate: BoundGate | None = None

    @property
    def sites(self) -> frozenset[Site]:
        """All sites that it needs."""
        return frozenset({self.site, self.reads}) | (self.gate.sites if self.gate is not None else frozenset())


@dataclass(frozen=True, eq=False)
class PartEdit:
    """What one part did in one forward pass."""

    part: Part
    rules: tuple[int, ...]
    """Numbers of the part's rules among all bound rules."""
    selected: Fired
    df: Float[Tensor, "batch pos k"]
    scale: Float[Tensor, "batch pos 1"] | None
    """By what each token's change was multiplied on its way out of the SAE; None stands for 1."""

    @property
    def changed(self) -> Mask:
        """Tokens where any rule changed an activation."""
        return (self.df != 0).any(-1)

    def sizes(self) -> tuple[Fired, Float[Tensor, "batch pos rules"]]:
        """Per rule of the part, which tokens it changed and the norm of its change, on the CPU."""
        df, owner = self.df.detach().cpu(), self.part.rule.cpu()
        W_dec = self.part.W_dec.detach().cpu()
        scale = 1.0 if self.scale is None else self.scale.detach().cpu()[..., 0]
        edited, norms = [], []
        for mine in (owner == local for local in range(len(self.rules))):
            edited.append((df[..., mine] != 0).any(-1))
            norms.append(torch.linalg.vector_norm(df[..., mine] @ W_dec[mine], dim=-1) * scale)
        return torch.stack(edited, -1), torch.stack(norms, -1)


@dataclass(frozen=True, eq=False)
class DenseEdit:
    """The same of a part of dense rules, whose changes are too wide to keep."""

    part: DensePart | StreamPart
    rules: tuple[int, ...]
    selected: Fired
    edited: Fired
    norm: Float[Tensor, "batch pos rules"]

    @property
    def changed(self) -> Mask:
        """Tokens where any rule changed x."""
        return self.edited.any(-1)

    def sizes(self) -> tuple[Fired, Float[Tensor, "batch pos rules"]]:
        """Per rule of the part, which tokens it changed and the norm of its change, on the CPU."""
        return self.edited.cpu(), self.norm.detach().cpu()


@dataclass(frozen=True, eq=False)
class Edit:
    """What to add at one site in one forward pass; tokens that are not ``changed`` keep it bit for bit."""

    dx: Stream
    changed: Mask
    parts: tuple[PartEdit | DenseEdit, ...]

    def detached(self) -> "Edit":
        """The same without what autograd keeps alive through it, for the ledger."""
        if not self.dx.requires_grad:
            return self
        parts = (
            replace(part, df=part.df.detach(), scale=None if part.scale is None else part.scale.detach())
            if isinstance(part, PartEdit)
            else part
            for part in self.parts
        )
        return replace(self, dx=self.dx.detach(), parts=tuple(parts))


def bind(plans: Sequence[Plan | None], saes: Mapping[str, SAE], *, every_row: bool) -> tuple[BoundRule, ...]:
    """Settle sites, merge rules that several plans share, and refuse rules of one row that contradict each other.

    Raises `SiteNotFound` when neither the rule nor its SAE says where, `OverlappingRules`, and `OpMismatch` for rules
    that read activations of plain vectors.
    """
    found: dict[tuple[Rule, Site, Site], set[int]] = {}
    for index, plan in enumerate(plans):
        rules = plan.rules if plan is not None else ()
        for rule in rules:
            _check_vectors(rule, saes)
        sited = [(rule, *_sites(rule, saes[rule.sae])) for rule in rules]
        check_overlaps((rule, (saes[rule.sae].key, reads, site)) for rule, reads, site in sited)
        for key in sited:
            found.setdefault(key, set()).add(index)
    return tuple(
        BoundRule(rule, site, None if every_row else frozenset(owners), reads, _bound_gate(rule, reads, saes))
        for (rule, reads, site), owners in found.items()
    )


def _check_vectors(rule: Rule, saes: Mapping[str, SAE]) -> None:
    """Raise `OpMismatch` where a rule, its trigger or its gate reads activations of plain vectors, which have none."""
    watched = [leaf.sae or rule.sae for leaf in (rule.gate.leaves if rule.gate is not None else ()) if leaf.latents]
    reads = rule.needs_all if rule.is_dense else rule.lowered.reads
    asked = {rule.sae: rule.trigger or (rule.op if reads else None), **dict.fromkeys(watched, "a gate")}
    for name, reader in asked.items():
        if reader is not None and saes[name].is_vectors:
            raise OpMismatch(
                f"{reader} on {name}", "its latents are plain vectors, which have no activations",
                "Use Add, and let a gate watch an SAE: Hits(latents, sae=...).",
            )  # fmt: skip


def _bound_gate(rule: Rule, reads: Site, saes: Mapping[str, SAE]) -> BoundGate | None:
    """The rule's gate, whose leaves read what the rule reads where they do not say otherwise."""
    if rule.gate is None:
        return None
    leaves = []
    for leaf in rule.gate.leaves:
        sae = None if not leaf.latents else leaf.sae or rule.sae
        own = saes[leaf.sae].site if leaf.sae is not None and leaf.latents else reads
        if (site := leaf.site or own) is None:
            raise SiteNotFound(
                f"the site of a gate of rule {rule}", f"neither the gate nor its SAE {leaf.sae} names one",
                "Give it one: Hits(..., site=Site('resid_post', 9)).",
            )  # fmt: skip
        leaves.append(BoundLeaf(site, sae, leaf.latents, leaf.special, leaf.width))
    return BoundGate(rule.gate, tuple(leaves))


def _sites(rule: Rule, sae: SAE) -> tuple[Site, Site]:
    """Where a rule reads, and where it writes."""
    reads = rule.site or sae.site
    if reads is None:
        raise SiteNotFound(
            f"the site of rule {rule}",
            "neither the rule nor its SAE names one",
            "Give the rule a site: Rule(..., site=Site('resid_post', 12)).",
        )
    if sae.is_transcoder and rule.site_out is None and reads != sae.site:
        raise SiteNotFound(
            f"the sites of rule {rule}",
            f"its SAE is a transcoder from {sae.site} to {sae.site_out}, and the rule names only where it reads",
            "Give both: Rule(..., site=Site('mlp_in', 12), site_out=Site('mlp_out', 12)).",
        )
    return reads, rule.site_out or sae.site_out or reads


def _lay_out(sae: SAE, rules: Sequence[BoundRule]) -> AnyPart:
    """The part for rules of one kind on one SAE."""
    wanted = [bound.rule for bound in rules]
    if wanted[0].needs_all:
        return lay_out_dense(sae, wanted)
    return lay_out_stream(sae, wanted) if wanted[0].is_dense else lay_out(sae, wanted, [b.plans for b in rules])


class Editor:
    """The edits of one list of bound rules at one site; a pure function once built.

    ``reads`` are the other sites whose streams it needs, for transcoders and gates.
    """

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
        self._kernels = pick(kernel)
        self._parts: list[tuple[Site, tuple[int, ...], Tensor, AnyPart]] = []
        self._elsewhere: dict[tuple[int, torch.device], AnyPart] = {}
        by_sae: dict[tuple[str, str, bool, bool], list[int]] = {}
        # sums of floats depend on the order of their terms, so that order is not the one of declaration
        for index, bound in sorted(enumerate(self.rules), key=lambda numbered: repr(numbered[1].rule)):
            if bound.site == site:
                kind = (saes[bound.rule.sae].key, str(bound.reads), bound.rule.is_dense, bound.rule.needs_all)
                by_sae.setdefault(kind, []).append(index)
        for _, members in sorted(by_sae.items()):
            mine = [self.rules[index] for index in members]
            part = _lay_out(saes[mine[0].rule.sae], mine).to(device)
            self._parts.append((mine[0].reads, tuple(members), torch.tensor(members), part))
        gates = [bound.gate if bound.site == site else None for bound in self.rules]
        self._gating = Gating(gates, saes, device)
        watched = [gate.sites for gate in gates if gate is not None]
        self.reads = frozenset(reads for reads, *_ in self._parts).union(*watched) - {site}

    def __call__(self, y: Stream, tokens: TokenBatch, covers: Bool[Tensor, "batch rules"],
                 streams: Mapping[Site, Tensor] | None = None, memory: Memory | None = None) -> Edit:  # fmt: skip
        """The edit of ``y``, in float32. ``covers`` says which bound rules a row is under.

        ``streams`` holds what flowed past the sites of `reads` in this pass, ``memory`` what the gates remember of the
        call; without one, its tokens are the first.
        """
        with torch.autocast(y.device.type, enabled=False):
            seen = {**(streams or {}), self.site: y}
            memory = memory or Memory()
            parts = [
                self._edit(
                    number,
                    seen[reads].to(y.device).float(),
                    y.float(),
                    tokens,
                    covers,
                    self._gating.masks(self._parts[number][1], seen, tokens, memory),
                )
                for number, (reads, *_) in enumerate(self._parts)
            ]
        dx, edits = parts[0]
        changed = edits.changed
        for more, other in parts[1:]:
            dx = dx + more
            changed = changed | other.changed
        if dx.requires_grad:  # an edit that is 0 here and now can have a gradient, as a clamp to f itself does
            dx = -(0.0 - dx)  # its zeros become -0.0, and x + -0.0 has the bits of x
            for edit in (edits, *(other for _, other in parts[1:])):
                changed = changed | edit.selected.any(-1)
        return Edit(dx, changed, tuple(edit for _, edit in parts))

    def _edit(self, number: int, x: Tensor, y: Stream, tokens: TokenBatch,
              covers: Bool[Tensor, "batch rules"],
              opened: Bool[Tensor, "batch pos mine"] | None) -> tuple[Stream, PartEdit | DenseEdit]:  # fmt: skip
        part, (_, members, index, _) = self._part_on(number, y.device), self._parts[number]
        wheres = [self.rules[i].rule.where for i in members]
        if len(set(wheres)) == 1:
            chosen = tokens.select(wheres[0])[..., None]
        else:
            chosen = torch.stack([tokens.select(where) for where in wheres], dim=-1)
        chosen, covers = chosen.to(y.device), covers.to(y.device)  # with a device map ids and stream can part
        selected = chosen & covers[:, None, index]
        if opened is not None:
            selected = selected & opened.to(y.device)
        if isinstance(part, DensePart | StreamPart):
            whole = self._kernels.dense if isinstance(part, DensePart) else self._kernels.stream
            dx, edited, norm = whole(x, y, part, selected)  # type: ignore[arg-type]
            return dx, DenseEdit(part, members, selected, edited, norm.detach())
        dx, df, scale = self._kernels.sliced(x, y, part, selected)
        return dx, PartEdit(part, members, selected, df, scale)

    def _part_on(self, number: int, device: torch.device) -> AnyPart:
        part = self._parts[number][3]
        if part.sae.W_dec.device == device:
            return part
        if (number, device) not in self._elsewhere:
            self._elsewhere[number, device] = part.to(device)
        return self._elsewhere[number, device]
