"""Steer a model: apply plans to every forward pass inside a ``with`` block, and report what was really edited."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, ParamSpec, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saeguard.axes import Stream
from saeguard.canary import canary as try_canary
from saeguard.editor import BoundRule, Edit, Editor, bind
from saeguard.engines import engine_for
from saeguard.engines.base import Engine, Model, Place, Request, places_of
from saeguard.engines.calls import View
from saeguard.engines.corrections import on_plain_weights
from saeguard.engines.fit import check_model, check_positions
from saeguard.engines.layouts import Layout
from saeguard.engines.placement import check_ranks
from saeguard.engines.session import bind as bind_to
from saeguard.engines.session import join, leave, participants
from saeguard.engines.sitemaps import SiteMap
from saeguard.errors import (
    AmbiguousSAE,
    BadRule,
    MissingBOS,
    OverlappingRules,
    PlanNeverRan,
    RowsMismatch,
    WidthMismatch,
)
from saeguard.kernels.pick import KernelName
from saeguard.ledger import CallRecord, Entry
from saeguard.loaders.live import SAEs
from saeguard.naming import are_one, load_all
from saeguard.plans import Plan, check_dense
from saeguard.reports import Report, report
from saeguard.sae import SAE
from saeguard.sites import Site

_MOST = 2**62
"""Tokens that a prompt may have: positions are int64."""

_GUIDED = " If classifier-free guidance passes each row twice, those without a condition first: [None] * n + plans."

Plans = Plan | None | Sequence[Plan | None]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Ready:
    """Plans, bound to a model: what `prepare` found."""

    engine: Engine
    places: dict[Site, Place]
    rules: tuple[BoundRule, ...]
    editors: dict[Site, Editor]
    saes: Mapping[str, SAE]
    special_ids: frozenset[int]


class Run:
    """A steer block: what is applied, and after or during it, `report`."""

    def __init__(
        self,
        plans: Sequence[Plan | None],
        ready: Ready,
        *,
        every_row: bool,
        prompt_tokens: int | tuple[int, ...] | None,
    ):
        self.plans = tuple(plans)
        self.rules = ready.rules
        self.editors = ready.editors
        self.saes = ready.saes
        self.sites = frozenset(self.editors).union(*(editor.reads for editor in self.editors.values()))
        self.special_ids: Int[Tensor, " n"] = torch.tensor(sorted(ready.special_ids), dtype=torch.long)
        self.prompt_tokens = prompt_tokens
        self.calls: list[CallRecord] = []
        self.engine = ready.engine.name
        """Which engine steers the model: "transformers", "TransformerLens", "nnsight", ..."""
        self.canary = "not asked for"
        """What came of the probe before the block: "passed", or why there was none; see `saeguard.canary`."""
        self._every_row = every_row
        self._covers: dict[tuple[int, int], Bool[Tensor, "batch rules"]] = {}

    @property
    def report(self) -> Report:
        """What was edited so far, per rule."""
        return report(self.rules, self.calls)

    def bind(self, function: Callable[P, T]) -> Callable[P, T]:
        """``function`` for another thread: there it counts as called inside this block, while the block is open."""
        return bind_to(self, function)

    def cover(self, rows: int, request: Request | None) -> Bool[Tensor, "batch rules"]:
        """Which rules each forward row is under. Raises `RowsMismatch`."""
        copies = request.copies if request is not None else 1
        if (rows, copies) not in self._covers:
            if not self._every_row and rows != len(self.plans) * copies:
                raise RowsMismatch(
                    f"{len(self.plans)} plans, one per row",
                    f"the batch has {rows} rows" + (f" for {copies} sequences per request" if copies > 1 else ""),
                    "Give as many plans as rows (None for a row to leave alone), or one plan for all rows. What makes "
                    "batches by itself, such as a pipeline, has to make them of that batch_size."
                    + (_GUIDED if rows == 2 * len(self.plans) else ""),
                )
            owner = torch.arange(rows) // copies
            columns = [
                torch.ones(rows, dtype=torch.bool)
                if bound.plans is None
                else torch.isin(owner, torch.tensor(sorted(bound.plans)))
                for bound in self.rules
            ]
            self._covers[rows, copies] = torch.stack(columns, dim=1) if columns else torch.zeros(rows, 0).bool()
        return self._covers[rows, copies]

    def open_record(self, request: Request | None) -> CallRecord:
        """A fresh record of a call."""
        record = CallRecord(request.copies if request is not None and request.reorders else 1)
        self.calls.append(record)
        return record

    def see(self, site: Site, before: Stream, after: Stream, view: View, edit: Edit | None) -> None:
        """Write a pass into the ledger."""
        if edit is not None:
            norm = torch.linalg.vector_norm(before.detach().float(), dim=-1)
            moved = (before != after).any(-1)
            view.record.track(site).add(Entry(view.tokens, view.covers, edit.detached(), norm, moved))


@contextmanager
def steer(
    model: Model,
    plan: Plans,
    *,
    saes: SAEs = (),
    tokenizer: Any = None,
    special_ids: Iterable[int] | None = None,
    prompt_tokens: int | Sequence[int] | None = None,
    layout: Layout | SiteMap | None = None,
    kernel: KernelName | None = None,
    canary: bool = True,
) -> Iterator[Run]:
    """Apply ``plan`` to every forward pass of ``model`` inside the block, and leave no trace after it.

    A list gives one plan per row of the batch, None for rows that stay bit-identical to the plain model. Rules find
    their SAE by name among ``saes``, ours or live ones of sae_lens, or else through `load_sae`. Special tokens are
    those of ``special_ids`` or ``tokenizer``, and else of the SAEs' manifests and the model's configuration. Outside
    ``generate`` rules for the prompt or for generated tokens need ``prompt_tokens``, the number of real prompt tokens.
    Blocks nest: the rules of all open blocks are joint, as if they stood in one plan. ``layout`` says where the sites
    of a model are that no table knows: a `Layout` if it is called as those of transformers are, else a `SiteMap`.

    Before the first block on a model two passes of eight tokens show that edits arrive where they should, unless
    ``canary`` is False: `saeguard.canary` says what they see, and ``run.canary`` what came of it.

    Whatever the model's dtype, activations and edits are computed in float32 from the stream as it is, and the edited
    stream is rounded to its own dtype once. They run where the stream is: SAEs follow the layers of a device map.

    Raises `BindError` before the model is touched when anything does not fit, `CanaryFailed`, `ModelBusy` when another
    thread has a block open, `GuardError` from a pass whose edits cannot be exact, and `PlanNeverRan` at the end of a
    block in which the model was never called.
    """
    run, ready = start(model, plan, saes=saes, tokenizer=tokenizer, special_ids=special_ids,
                       prompt_tokens=prompt_tokens, layout=layout, kernel=kernel)  # fmt: skip
    if canary:
        run.canary = try_canary(ready.engine, ready.places, kernel)
    session = join(ready.engine, run, ready.places)
    try:
        yield run
    finally:
        leave(session, run)
    if run.rules and not run.calls:
        raise PlanNeverRan(
            f"a plan of {len(run.rules)} rules",
            "the block ended and the model was not called inside it",
            "Call the model inside the block; a compiled or wrapped copy made before it does not count.",
        )


def start(
    model: Model,
    plan: Plans,
    *,
    saes: SAEs = (),
    tokenizer: Any = None,
    special_ids: Iterable[int] | None = None,
    prompt_tokens: int | Sequence[int] | None = None,
    layout: Layout | SiteMap | None = None,
    kernel: KernelName | None = None,
) -> tuple[Run, Ready]:
    """A run of ``plan``, one for all rows or one per row, that nothing of the model knows of yet; see `steer`.

    Raises `BindError`, and `BadRule` for ``prompt_tokens`` that are no counts, or not as many as plans per row.
    """
    every_row = plan is None or isinstance(plan, Plan)
    plans: list[Plan | None] = [plan] if plan is None or isinstance(plan, Plan) else list(plan)
    counts = prompt_counts(prompt_tokens, None if every_row else len(plans))
    ready = prepare(model, plans, every_row=every_row, saes=saes, tokenizer=tokenizer, special_ids=special_ids,
                    layout=layout, kernel=kernel)  # fmt: skip
    return Run(plans, ready, every_row=every_row, prompt_tokens=counts), ready


def prepare(
    model: Model,
    plans: Sequence[Plan | None],
    *,
    every_row: bool,
    saes: SAEs = (),
    tokenizer: Any = None,
    special_ids: Iterable[int] | None = None,
    layout: Layout | SiteMap | None = None,
    kernel: KernelName | None = None,
    replaces: Run | None = None,
) -> Ready:
    """All that can be settled, and refused, before the model is touched; see `steer`.

    The plans will not meet those of ``replaces``. Raises `BindError`.
    """
    engine = engine_for(model, layout)
    loaded = load_all(plans, saes)
    rules = bind(plans, loaded, every_row=every_row)
    places = places_of(engine, [site for bound in rules for site in bound.sites])
    for bound in rules:
        _check_fit(loaded[bound.rule.sae], places[bound.reads], places[bound.site], engine)
        _check_gate(bound, loaded, places, engine)
        check_positions(bound, places[bound.site])
    loaded = {name: _corrected(name, sae, rules, engine) for name, sae in loaded.items()}
    _check_nesting([outer for outer in participants(engine.model) if outer is not replaces], rules, loaded)
    editors = {
        site: Editor(site, rules, loaded, device=places[site].device, kernel=kernel)
        for site in dict.fromkeys(bound.site for bound in rules)
    }
    check_ranks(engine.model, repr((plans, sorted(sae.key for sae in loaded.values()))))
    return Ready(engine, places, rules, editors, loaded, _special_ids(special_ids, tokenizer, engine, loaded))


def _check_fit(sae: SAE, place: Place, out: Place, engine: Engine, *, only_reads: bool = False) -> None:
    for verb, width, there in (("reads", sae.d_in, place), ("writes", sae.d_out, out))[: 1 if only_reads else 2]:
        if width != there.width:
            raise WidthMismatch(
                f"SAE {sae.name} at {there.site}",
                f"it {verb} vectors of width {width}, and {there.site} carries width {there.width}",
                "Was this SAE trained on another model or another stream?",
            )
    check_model(sae, place.site, engine)


def _check_gate(bound: BoundRule, saes: Mapping[str, SAE], places: Mapping[Site, Place], engine: Engine) -> None:
    for leaf in bound.gate.leaves if bound.gate is not None else ():
        if leaf.sae is not None:
            _check_fit(saes[leaf.sae], places[leaf.site], places[bound.site], engine, only_reads=True)
        elif leaf.width is not None and leaf.width != places[leaf.site].width:
            raise WidthMismatch(
                f"a gate at {leaf.site}",
                f"it has {leaf.width} weights, and {leaf.site} carries width {places[leaf.site].width}",
                "Was it fitted on another model or another stream?",
            )


def _corrected(name: str, sae: SAE, rules: Sequence[BoundRule], engine: Engine) -> SAE:
    """``sae`` for the model's plain weights, at the sites of its rules and gates."""
    places = {(bound.reads, bound.site) for bound in rules if bound.rule.sae == name}
    leaves = [leaf for bound in rules if bound.gate is not None for leaf in bound.gate.leaves]
    read = {reads for reads, _ in places}
    places |= {(leaf.site, leaf.site) for leaf in leaves if leaf.sae == name and leaf.site not in read}
    if len(places) > 1 and sae.manifest.get("processing"):
        raise AmbiguousSAE(
            f"rules on {sae.name} at {' and '.join(sorted(str(reads) for reads, _ in places))}",
            "it was trained on processed weights, and what that changes depends on the site",
            "Give it under two names, saes={'a': sae, 'b': sae}, and name 'a' and 'b' in the rules.",
        )
    reads, writes = next(iter(places), (None, None))
    return on_plain_weights(sae, engine, reads, writes)


def _check_nesting(outside: Sequence[Any], rules: Sequence[BoundRule], saes: Mapping[str, SAE]) -> None:
    for outer in outside:
        if not isinstance(outer, Run):
            continue
        for theirs, ours in product(outer.rules, rules):
            same_rows = theirs.plans is None or ours.plans is None or theirs.plans & ours.plans
            if not same_rows or theirs.site != ours.site:
                continue
            one_place = theirs.reads == ours.reads and are_one(outer.saes[theirs.rule.sae], saes[ours.rule.sae])
            check_dense(theirs.rule, ours.rule, one_place=one_place, one_site=True)
            shared = set(theirs.rule.latents) & set(ours.rule.latents)
            if one_place and shared:
                raise OverlappingRules(
                    f"latents {sorted(shared)} of {ours.rule.sae} set in two nested blocks",
                    f"the outer block has {theirs.rule.op}, the inner one {ours.rule.op}",
                    "Put both into one plan and give the rules priorities, or end the outer block.",
                )


def prompt_counts(given: Any, rows: int | None, of: str = "plans") -> int | tuple[int, ...] | None:
    """Counts of real prompt tokens: one for all rows, or one for each; None for ``rows`` is as many as a pass has.

    Raises `BadRule` for what is no count, and for another number of them than rows.
    """
    if given is None:
        return None
    is_listed = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    counts: tuple[Any, ...] = tuple(given) if is_listed else (given,)
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= _MOST for n in counts):
        raise BadRule(f"prompt_tokens={given!r}", "that is not a count of tokens", "Give one int, or one per row.")
    if is_listed and rows not in (None, len(counts)):
        raise BadRule(
            f"prompt_tokens={given!r}", f"there are {rows} {of}, one per row", f"Give one int, or as many as {of}."
        )
    return counts if is_listed else counts[0]


def _check_bos(tokenizer: Any, saes: Mapping[str, SAE]) -> None:
    for sae in saes.values():
        if sae.manifest.get("bos") and tokenizer.bos_token_id is None:  # an id of 0 is a BOS like any other
            raise MissingBOS(
                f"SAE {sae.name} with a {type(tokenizer).__name__}",
                "the SAE was trained on text behind a BOS token, and this tokenizer has none",
                "Use the model's own tokenizer, or say special_ids=... and put a BOS in front yourself.",
            )


def _special_ids(
    given: Iterable[int] | None, tokenizer: Any, engine: Engine, saes: Mapping[str, SAE]
) -> frozenset[int]:
    if given is not None:
        return frozenset(given)
    if tokenizer is not None:
        _check_bos(tokenizer, saes)
        return frozenset(tokenizer.all_special_ids)
    return frozenset(engine.special_ids()).union(*(sae.manifest.get("special_ids", ()) for sae in saes.values()))
