"""Gates at work: from the streams of a pass to where each rule's gate is open, with a memory per call.

A gate is stepped once per pass, whatever the number of rules and sites that it belongs to. Its memory keeps the state
before and after the latest passes, so that it can go back when draft tokens are thrown away or the model computes a
row again, and follows the rows when beams trade places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saeguard.axes import Mask
from saeguard.errors import GateFailed
from saeguard.gates.base import Gate, Seen, State, Verdict, over_state
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.tokens import TokenBatch, Where

KEPT = 64
"""Passes that can be gone back over one by one; further back, a row has to be computed from its beginning."""


@dataclass(frozen=True)
class BoundLeaf:
    """Where a leaf reads; ``sae`` is the name of its SAE, or None for the stream itself."""

    site: Site
    sae: str | None
    latents: tuple[int, ...]
    special: bool
    width: int | None = None
    """Of the stream that it was fitted on, where it reads that and not an SAE."""


@dataclass(frozen=True)
class BoundGate:
    """A gate with the places of its leaves settled."""

    gate: Gate
    leaves: tuple[BoundLeaf, ...]

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(leaf.site for leaf in self.leaves)


@dataclass(frozen=True, eq=False)
class Step:
    """One pass: the state before and after it, what was seen, and the verdict."""

    tokens: TokenBatch
    before: State
    after: State
    seen: tuple[Seen, ...]
    verdict: Verdict

    @property
    def end(self) -> int:
        return self.tokens.column + self.verdict.opened.shape[1]


@dataclass(frozen=True, eq=False)
class Trace:
    """What a gate said over a call: ``row column`` each. ``absolute`` counts the row's real tokens."""

    absolute: Int[Tensor, "row column"]
    real: Bool[Tensor, "row column"]
    opened: Bool[Tensor, "row column"]
    score: Float[Tensor, "row column"]

    @property
    def fired(self) -> Bool[Tensor, " row"]:
        """Rows in which it was open at some real token."""
        return (self.opened & self.real).any(1)

    @property
    def peak(self) -> Float[Tensor, " row"]:
        """The largest score of each row; -inf for a row of no tokens."""
        return self.score.masked_fill(~self.real, -torch.inf).amax(1)

    @property
    def first(self) -> Int[Tensor, " row"]:
        """The absolute position at which it first was open; -1 where it never was."""
        opened = self.opened & self.real
        place = opened.int().argmax(1, keepdim=True)
        return torch.where(opened.any(1), self.absolute.gather(1, place)[:, 0], -1)


@dataclass(eq=False)
class History:
    """One gate's memory of one call."""

    steps: list[Step] = field(default_factory=list)
    forgotten: list[Step] = field(default_factory=list)
    """Steps that can no longer be gone back over one by one; only their verdicts are kept."""

    def back_to(self, column: int, bound: BoundGate, rows: int, device: torch.device) -> State:
        """The state of all tokens before ``column``; what was remembered of later ones is forgotten."""
        if column == 0:
            self.steps, self.forgotten = [], []
            return bound.gate.begin(rows, device)
        while self.steps and self.steps[-1].tokens.column >= column:
            self.steps.pop()
        if not self.steps or self.steps[-1].end < column:
            raise GateFailed(
                f"{type(bound.gate).__name__} from column {column} on",
                "it has not seen the tokens before, which the cache holds already",
                "Begin with an empty cache inside the block, or go on with one that was filled in this block.",
            )
        if self.steps[-1].end > column:
            self.steps[-1] = _cut(self.steps[-1], column, bound.gate)
        return self.steps[-1].after

    def add(self, step: Step) -> None:
        """Remember a pass."""
        self.steps.append(step)
        if len(self.steps) > KEPT:
            old = self.steps.pop(0)
            self.forgotten.append(replace(old, before=(), after=(), seen=()))

    def reorder(self, rows: Int[Tensor, " row"]) -> None:
        """Row i goes on from what row ``rows[i]`` was."""
        if self.steps:
            *earlier, last = self.steps
            self.forgotten += [replace(step, before=(), after=(), seen=()) for step in earlier]
            after = over_state(lambda state: state[rows.to(state.device)], last.after)
            self.steps = [replace(last, before=(), after=after, seen=())]

    @property
    def trace(self) -> Trace | None:
        """All verdicts so far."""
        steps = [*self.forgotten, *self.steps]
        if not steps:
            return None
        join = lambda parts: torch.cat([part.detach().cpu() for part in parts], 1)
        return Trace(
            join([s.tokens.absolute for s in steps]), join([s.tokens.real for s in steps]),
            join([s.verdict.opened for s in steps]), join([s.verdict.score for s in steps]),
        )  # fmt: skip


@dataclass(eq=False)
class Memory:
    """What the gates of one block remember of one call."""

    histories: dict[BoundGate, History] = field(default_factory=dict)
    suspects: list[Tensor] = field(default_factory=list)
    """Of the pass that runs now: whether a score is NaN."""

    def check(self) -> None:
        """Raise `GateFailed` where a score of this pass is NaN: such a gate counts as neither open nor closed."""
        suspects, self.suspects = self.suspects, []
        if suspects and bool(torch.stack([flag.cpu() for flag in suspects]).any()):
            raise GateFailed(
                "the gates of a pass", "a score is NaN, so that nobody knows whether it is open",
                "Check the SAE and the gate's weights; nothing was sampled from this pass.",
            )  # fmt: skip

    def reorder(self, rows: Int[Tensor, " row"]) -> None:
        """Follow beams that traded places."""
        for history in self.histories.values():
            history.reorder(rows)


class Gating:
    """The gates of a list of rules; ``gates`` has one per rule, None where a rule has none."""

    def __init__(self, gates: Sequence[BoundGate | None], saes: Mapping[str, SAE], device: torch.device):
        self.gates = tuple(gates)
        self._slices: dict[tuple[BoundLeaf, torch.device], SAE] = {}
        for leaf in {leaf for bound in gates if bound is not None for leaf in bound.leaves}:
            if leaf.sae is not None:
                sae = saes[leaf.sae]
                sae.check_latents(leaf.latents)
                narrowed = sae.narrow(list(leaf.latents)).to(device=device)
                self._slices[leaf, device] = narrowed if sae.ranks else narrowed.to(dtype=torch.float32)

    @torch.no_grad()
    def masks(
        self, rules: Sequence[int], streams: Mapping[Site, Tensor], tokens: TokenBatch, memory: Memory
    ) -> Bool[Tensor, "batch pos rules"] | None:
        """Where the gates of ``rules`` are open, in their order; None where none of them has one.

        Raises `PhaseUnknown`, `TokensUnknown`, `GateFailed`.
        """
        if all(self.gates[rule] is None for rule in rules):
            return None
        everywhere: Mask | None = None
        masks = []
        for rule in rules:
            bound = self.gates[rule]
            if bound is None:
                everywhere = torch.ones_like(tokens.real) if everywhere is None else everywhere
                masks.append(everywhere)
            else:
                masks.append(self._opened(bound, streams, tokens, memory))
        device = masks[0].device
        return torch.stack([mask.to(device) for mask in masks], -1)

    def _opened(self, bound: BoundGate, streams: Mapping[Site, Tensor], tokens: TokenBatch, memory: Memory) -> Mask:
        history = memory.histories.setdefault(bound, History())
        if history.steps and history.steps[-1].tokens is tokens:  # another site of the same pass has asked
            return history.steps[-1].verdict.opened
        before = history.back_to(tokens.column, bound, tokens.real.shape[0], tokens.real.device)
        seen = tuple(self._seen(leaf, streams[leaf.site], tokens) for leaf in bound.leaves)
        after, verdict = bound.gate.step(before, seen)
        history.add(Step(tokens, before, after, seen, verdict))
        memory.suspects.append((verdict.score.isnan() & tokens.real).any())
        return verdict.opened

    def _seen(self, leaf: BoundLeaf, x: Tensor, tokens: TokenBatch) -> Seen:
        x = x.detach().float()
        home = tokens.real.device  # with a device map the streams of two leaves can be apart
        f, raw = x[..., :0], x
        if leaf.sae is not None:
            with torch.autocast(x.device.type, enabled=False):
                sae = self._slice_on(leaf, x.device)
                f, raw = sae.activate(sae.read(x).x), x[..., :0]
        since = tokens.since_prompt
        prompt, ready = (None, None) if since is None else (since < 0, since >= -1)
        return Seen(f.to(home), raw.to(home), tokens.select(Where(special=leaf.special)), prompt, ready)

    def _slice_on(self, leaf: BoundLeaf, device: torch.device) -> SAE:
        if (leaf, device) not in self._slices:
            known = next(sae for (other, _), sae in self._slices.items() if other == leaf)
            self._slices[leaf, device] = known.to(device=device)
        return self._slices[leaf, device]


def _cut(step: Step, column: int, gate: Gate) -> Step:
    """The part of a step before ``column``. Raises `GateFailed` for one whose rows have traded places since."""
    if not step.seen:
        raise GateFailed(
            f"{type(gate).__name__} from column {column} on", "beams have traded places since, and it cannot go back",
            "Use beams without an assistant.",
        )  # fmt: skip
    seen = tuple(one[: column - step.tokens.column] for one in step.seen)
    after, verdict = gate.step(step.before, seen)
    return Step(step.tokens.upto(column), step.before, after, seen, verdict)
