"""Gates at work: from the streams of a pass to where each rule's gate is open, with a memory per call.

A gate is stepped once per pass, whatever the number of rules and sites that it belongs to. Its memory keeps the state
before and after the latest passes, so that it can go back when draft tokens are thrown away or the model computes a
row again, and follows the rows when beams trade places.
"""

from collections.abc import Callable, Mapping, Sequence
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

LARGEST = 1e18
"""What a gate's encoder may hold: sums of larger numbers overflow to NaN, and a threshold makes 0 of that."""


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
        """The column after its last one."""
        return self.tokens.column + self.verdict.opened.shape[1]

    @property
    def trace(self) -> "Trace":
        """What it said."""
        tokens, verdict = self.tokens, self.verdict
        return Trace(tokens.column, tokens.absolute, tokens.real, verdict.opened, verdict.score)

    @property
    def broken(self) -> Bool[Tensor, ""]:
        """Whether a score is NaN, or a number that it was made of is no finite one."""
        found = (self.verdict.score.isnan() & self.tokens.real).any()
        for seen in self.seen:
            finite = seen.f.isfinite().all(-1) & seen.x.isfinite().all(-1)
            found = found | (seen.counts & ~finite).any()
        return found

    def upto(self, column: int, gate: Gate) -> "Step":
        """Its part before ``column``."""
        seen = tuple(one[: column - self.tokens.column] for one in self.seen)
        after, verdict = gate.step(self.before, seen)
        return Step(self.tokens.upto(column), self.before, after, seen, verdict)

    def of_rows(self, rows: Int[Tensor, " row"]) -> "Step":
        """Row i is what row ``rows[i]`` was."""
        rows = rows.to(self.tokens.real.device)
        before, after = (over_state(lambda part: part[rows], state) for state in (self.before, self.after))
        seen = tuple(one.of_rows(rows) for one in self.seen)
        return Step(self.tokens.of_rows(rows), before, after, seen, self.verdict.of_rows(rows))


@dataclass(frozen=True, eq=False)
class Trace:
    """What a gate said over a call: ``row column`` each, from column ``start`` on. ``absolute`` counts real tokens."""

    start: int
    absolute: Int[Tensor, "row column"]
    real: Bool[Tensor, "row column"]
    opened: Bool[Tensor, "row column"]
    score: Float[Tensor, "row column"]

    def upto(self, ends: Int[Tensor, " row"] | None) -> "Trace":
        """Without each row's tokens from its end on, which were thrown away; None where that is unknown."""
        if ends is None:
            return self
        kept = self.start + torch.arange(self.real.shape[1]) < ends[:, None]
        return replace(self, real=self.real & kept)

    def of_rows(self, rows: Int[Tensor, " row"]) -> "Trace":
        """Row i is what row ``rows[i]`` was."""
        rows = rows.to(self.real.device)
        return Trace(self.start, self.absolute[rows], self.real[rows], self.opened[rows], self.score[rows])

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
    """The latest passes, oldest first."""
    past: list[Trace] = field(default_factory=list)
    """What was said before them."""

    def during(self, tokens: TokenBatch) -> Step | None:
        """The step of the pass of these very tokens, if it has been made."""
        return self.steps[-1] if self.steps and self.steps[-1].tokens is tokens else None

    def back_to(self, column: int, bound: BoundGate, rows: int, device: torch.device) -> State:
        """The state of all tokens before ``column``; what was remembered of later ones is forgotten.

        Raises `GateFailed`.
        """
        if column == 0:
            self.steps, self.past = [], []
            return bound.gate.begin(rows, device)
        while self.steps and self.steps[-1].tokens.column >= column:
            self.steps.pop()
        if not self.steps or self.steps[-1].end < column:
            raise GateFailed(
                f"{type(bound.gate).__name__} from column {column} on",
                f"that lies before its latest {KEPT} passes, or before beams traded places"
                if self.past
                else "it has not seen the tokens before, which the cache holds already",
                "Begin with an empty cache inside the block, or go on with one that was filled in this block.",
            )
        if len(self.steps[-1].tokens.real) != rows:
            raise GateFailed(
                f"{type(bound.gate).__name__} from column {column} on",
                f"it remembers {len(self.steps[-1].tokens.real)} rows, and the pass has {rows}",
                "Change the rows of a cache by its own methods, inside the block.",
            )
        if self.steps[-1].end > column:
            self.steps[-1] = self.steps[-1].upto(column, bound.gate)
        return self.steps[-1].after

    def add(self, step: Step) -> None:
        """Remember a pass."""
        self.steps.append(step)
        if len(self.steps) > KEPT:
            self.past.append(self.steps.pop(0).trace)
            if len(self.past) > KEPT:
                self.past = [_joined(self.past)]

    def reorder(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Row i goes on from what the i-th of the rows that ``choose`` takes was; further back there is no way."""
        if self.steps:
            *earlier, last = self.steps
            rows = choose(torch.arange(len(last.tokens.real)))
            said = [*self.past, *(step.trace for step in earlier)]
            self.past = [_joined(said).of_rows(rows)] if said else []
            self.steps = [last.of_rows(rows)]

    def copy(self) -> "History":
        """One that goes its own way from here."""
        return History(list(self.steps), list(self.past))

    @property
    def trace(self) -> Trace | None:
        """All verdicts so far."""
        said = [*self.past, *(step.trace for step in self.steps)]
        return _joined(said) if said else None


def _joined(traces: Sequence[Trace]) -> Trace:
    """One after the other, on the CPU."""
    join = lambda name: torch.cat([getattr(trace, name).detach().cpu() for trace in traces], 1)
    return Trace(traces[0].start, join("absolute"), join("real"), join("opened"), join("score"))


@dataclass(eq=False)
class Memory:
    """What the gates of one block remember of one call."""

    histories: dict[BoundGate, History] = field(default_factory=dict)

    def check(self, tokens: TokenBatch) -> None:
        """Raise `GateFailed` where a gate has no number to go by in this pass: it is neither open nor closed."""
        steps = [step for history in self.histories.values() if (step := history.during(tokens)) is not None]
        if steps and bool(torch.stack([step.broken.cpu() for step in steps]).any()):
            raise GateFailed(
                "the gates of a pass", "a score, or what it is made of, is NaN or infinite, so that nobody knows "
                "whether it is open", "Check the SAE and the gate's weights; nothing was sampled from this pass.",
            )  # fmt: skip

    def reorder(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Follow rows that traded places: ``choose`` takes the new ones from the old."""
        for history in self.histories.values():
            history.reorder(choose)

    def copy(self) -> "Memory":
        """One that goes its own way from here."""
        return Memory({bound: history.copy() for bound, history in self.histories.items()})


class Gating:
    """The gates of a list of rules; ``gates`` has one per rule, None where a rule has none."""

    def __init__(self, gates: Sequence[BoundGate | None], saes: Mapping[str, SAE], device: torch.device):
        self.gates = tuple(gates)
        self._slices: dict[tuple[BoundLeaf, torch.device], SAE] = {}
        for leaf in {leaf for bound in gates if bound is not None for leaf in bound.leaves}:
            if leaf.sae is not None:
                sae = saes[leaf.sae]
                sae.check_latents(leaf.latents)
                self._slices[leaf, device] = _slice(sae, leaf.latents).to(device=device)

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
        if (step := history.during(tokens)) is not None:  # another site of the same pass has asked
            return step.verdict.opened
        before = history.back_to(tokens.column, bound, tokens.real.shape[0], tokens.real.device)
        seen = tuple(self._seen(leaf, streams[leaf.site], tokens) for leaf in bound.leaves)
        after, verdict = bound.gate.step(before, seen)
        history.add(Step(tokens, before, after, seen, verdict))
        return verdict.opened

    def _seen(self, leaf: BoundLeaf, x: Tensor, tokens: TokenBatch) -> Seen:
        home = tokens.real.device  # with a device map the streams of two leaves can be apart
        f = raw = torch.zeros(*x.shape[:2], 0, device=home)
        if leaf.sae is not None:
            with torch.autocast(x.device.type, enabled=False):
                sae = self._slice_on(leaf, x.device)
                f = sae.activate(sae.read(x.detach().float()).x)
                # what an SAE makes of a vector that is none may look like silence
                f = f.masked_fill(~x.isfinite().all(-1, keepdim=True), torch.nan).to(home)
        elif leaf.width is not None:  # a copy, to go back to: a model may write into its own stream
            raw = x.detach().to(home, torch.float32, copy=True)
        since, prompt, ready = tokens.since_prompt, None, None
        if since is not None:
            prompt, ready = (since < 0) & tokens.real, since >= -1
        ids = None if tokens.ids is None else tokens.ids.to(home)
        return Seen(f, raw, tokens.select(Where(special=leaf.special)), prompt, ready, ids)

    def _slice_on(self, leaf: BoundLeaf, device: torch.device) -> SAE:
        if (leaf, device) not in self._slices:
            known = next(sae for (other, _), sae in self._slices.items() if other == leaf)
            self._slices[leaf, device] = known.to(device=device)
        return self._slices[leaf, device]


def _slice(sae: SAE, latents: tuple[int, ...]) -> SAE:
    """``sae`` with these latents. Raises `GateFailed`."""
    narrowed = sae.narrow(list(latents))
    if sae.ranks:  # its encoder is whole, and is made float32 a chunk at a time
        return narrowed
    if not all((tensor.abs() < LARGEST).all() for tensor in (narrowed.W_enc, narrowed.b_enc)):
        raise GateFailed(
            f"a gate on {sae.name}",
            f"the encoder of its latents holds NaN, infinity or more than {LARGEST:g}, which can look like silence",
            "Fetch or export the SAE again.",
        )
    return narrowed.to(dtype=torch.float32)
