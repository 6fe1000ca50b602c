"""The hooks of one model, shared by every steer and capture block that is open on it.

A session places one hook on the model's root before each pass, one per site, and one on the root after each pass.
The first reads what the tokens are, the second edits, the third refuses a pass in which an edit did not run. It is
opened by the first block and closed by the last; what a pass needs to know is kept per thread.
"""

import contextvars
import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from saeguard.axes import Stream
from saeguard.editor import Edit, Editor
from saeguard.engines.base import Engine, Pass, Place, Request, outside_graphs
from saeguard.errors import GuardNotApplied, ModelBusy, RowsMismatch, TokensUnknown, UnstableEdit, UnsupportedMode
from saeguard.ledger import CallRecord
from saeguard.sites import Site
from saeguard.tokens import TokenBatch, is_special, read_mask

_INSIDE: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar("saeguard_sessions", default=frozenset())
_OPEN: "weakref.WeakKeyDictionary[nn.Module, Session]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()
_NUMBERS = itertools.count()


@dataclass(frozen=True, eq=False)
class View:
    """One participant's knowledge of one forward pass."""

    tokens: TokenBatch
    covers: Bool[Tensor, "batch rules"]
    record: CallRecord


@runtime_checkable
class Participant(Protocol):
    """A block that is open on a model: it edits at some sites, looks at some, or both."""

    sites: frozenset[Site]
    editors: dict[Site, Editor]
    special_ids: Int[Tensor, " n"]
    prompt_tokens: int | tuple[int, ...] | None

    def cover(self, rows: int, request: Request | None) -> Bool[Tensor, "batch rules"]:
        """Which rules each forward row is under. Raises `RowsMismatch`."""
        ...

    def open_record(self, request: Request | None) -> CallRecord:
        """A fresh record of a call."""
        ...

    def see(self, site: Site, before: Stream, after: Stream, view: View, edit: Edit | None) -> None:
        """Told of every pass at every one of its sites."""
        ...


@dataclass(eq=False)
class Call:
    """A generate call, or the forward passes that share one cache."""

    request: Request | None
    records: dict[Participant, CallRecord] = field(default_factory=dict)
    cache: Any = None
    reached: int | None = None
    """The column after the last one that was passed."""
    rows: int | None = None

    def continues(self, seen: Pass) -> bool:
        """Whether a pass belongs to this call: an empty cache, or another number of rows, starts another one."""
        ours = self.cache is not None and seen.cache is not None and self.cache() is seen.cache
        return ours and seen.column > 0 and seen.rows == self.rows


@dataclass(eq=False)
class Forward:
    """The pass that runs now in this thread."""

    call: Call
    views: dict[Participant, View]
    rows: int
    width: int
    ran: set[Site] = field(default_factory=set)
    unstable: list[Tensor] = field(default_factory=list)


class Session:
    """See the module's text. Made by `join`, never directly."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.number = next(_NUMBERS)
        self.participants: list[Participant] = []
        self.places: dict[Site, Place] = {}
        self._handles: dict[Site, Any] = {}
        self._root = ExitStack()
        self._local = threading.local()

    @property
    def sites(self) -> frozenset[Site]:
        """Sites at which some participant edits or looks."""
        return frozenset().union(*(participant.sites for participant in self.participants))

    def add(self, participant: Participant, places: dict[Site, Place]) -> None:
        """Place the hooks that are missing, all or none."""
        with ExitStack() as undo:
            if not self.participants:
                self._root = ExitStack()
                undo.callback(self._root.close)
                self._watch_root()
            for site, place in places.items():
                if site not in self._handles:
                    self._handles[site] = place.attach(self._change_at(site))
                    undo.callback(self._detach, site)
                    self.places[site] = place
            undo.pop_all()
        self.participants.append(participant)
        _INSIDE.set(_INSIDE.get() | {self.number})

    def remove(self, participant: Participant) -> None:
        """Remove exactly the hooks that nobody else needs."""
        self.participants = [other for other in self.participants if other is not participant]
        for site in set(self._handles) - self.sites:
            self._detach(site)
        if not self.participants:
            self._root.close()
            self._local = threading.local()
            _INSIDE.set(_INSIDE.get() - {self.number})

    def _detach(self, site: Site) -> None:
        self._handles.pop(site).remove()
        self.places.pop(site, None)

    def _watch_root(self) -> None:
        model = self.engine.model
        before = model.register_forward_pre_hook(outside_graphs(self._before), with_kwargs=True)
        self._root.callback(before.remove)
        after = model.register_forward_hook(outside_graphs(self._after), always_call=True)
        self._root.callback(after.remove)
        generate: Any = getattr(model, "generate", None)
        if callable(generate):
            watched = _Generate(model, self._watched(generate))
            self._root.callback(_restore, model, watched, model.__dict__.get("generate"))
            model.__dict__["generate"] = watched

    def _watched(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """``generate`` with its request read before the first pass."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self.participants:  # somebody kept ``model.generate`` from inside the block
                return generate(*args, **kwargs)
            self._check_caller()
            request = self.engine.read_request(args, kwargs)
            call = Call(request)
            outer, self._local.call = getattr(self._local, "call", None), call
            try:
                output = generate(*args, **kwargs)
            finally:
                self._local.call, self._local.forward = outer, None
            self._check_ran(call)
            outcome = self.engine.read_outcome(output, request)
            if outcome is not None:
                if (call.reached or 0) < outcome.columns:
                    raise _unseen(call, outcome.columns)
                for record in call.records.values():
                    record.ends = outcome.ends
            return output

        return watched

    def _check_ran(self, call: Call) -> None:
        if self.participants and not call.records:
            raise GuardNotApplied(
                "edits in a generate call",
                "it returned and no forward pass had gone through saeguard's hooks",
                "Somebody removed them, or a compiled copy of the model ran: its output must not be used.",
            )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.participants:
            return
        self._check_caller()
        self._check_original(module)
        self._local.forward = None
        seen = self.engine.read_pass(args, kwargs)
        call = self._call_for(seen)
        if call.reached is not None and seen.column > call.reached:
            raise _unseen(call, seen.column)
        call.reached, call.rows = seen.column + seen.width, seen.rows
        views = {}
        for participant in self.participants:
            if participant not in call.records:
                call.records[participant] = participant.open_record(call.request)
            covers = participant.cover(seen.rows, call.request).to(seen.device)
            views[participant] = View(_tokens(seen, participant, call.request), covers, call.records[participant])
        self._local.forward = Forward(call, views, seen.rows, seen.width)

    def _check_original(self, module: nn.Module) -> None:
        if module is not self.engine.model:
            raise GuardNotApplied(
                f"a call of a copy of {type(module).__name__}",
                "the copy was made inside a block on the original, and shares its hooks",
                "Copy the model before entering, or call the copy after the block has ended.",
            )

    def _call_for(self, seen: Pass) -> Call:
        if (call := getattr(self._local, "call", None)) is not None:
            expected = call.request.rows * call.request.copies
            if seen.rows != expected:
                raise UnsupportedMode(
                    f"a generate call for {call.request.rows} rows",
                    f"a pass has {seen.rows} rows instead of {expected}",
                    "This decoding strategy mixes rows: use greedy, sampling, beams or assisted decoding.",
                )
            return call
        if self.engine.is_generating():
            raise UnsupportedMode(
                "a generate call that went around saeguard",
                "how its rows belong to the request and where its prompt ends is unknown",
                "Call model.generate(...), not the class's function or one that was kept from before the block.",
            )
        last = getattr(self._local, "loose", None)
        if last is None or not last.continues(seen):
            last = self._local.loose = Call(None)
        return last

    def _change_at(self, site: Site) -> Callable[[Stream], Stream]:
        def change(x: Stream) -> Stream:
            if not self.participants:  # a compiled graph may call this hook after the block has ended
                return x
            forward = self._forward_at(site, x)
            dx, changed, edits = None, None, {}
            for participant, view in forward.views.items():
                if site in participant.editors:
                    edit = edits[participant] = participant.editors[site](x, view.tokens, view.covers)
                    dx = edit.dx if dx is None else dx + edit.dx
                    changed = edit.changed if changed is None else changed | edit.changed
            after = x
            if dx is not None and changed is not None:
                after = torch.where(changed[..., None], (x + dx).to(x.dtype), x)
                forward.unstable.append((changed & ~torch.isfinite(after).all(-1)).any())
            for participant, view in forward.views.items():
                if site in participant.sites:
                    participant.see(site, x, after, view, edits.get(participant))
            forward.ran.add(site)
            return after

        return change

    def _forward_at(self, site: Site, x: Stream) -> Forward:
        forward = getattr(self._local, "forward", None)
        if forward is None:
            self._check_caller()
        if forward is None or site in forward.ran or x.shape[:2] != (forward.rows, forward.width):
            raise GuardNotApplied(
                f"an edit at {site}",
                "its block ran outside a call of the steered model, or twice in one call",
                "Call the model itself, as model(...) or model.generate(...), not model.forward or a part of it.",
            )
        return forward

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        forward, self._local.forward = getattr(self._local, "forward", None), None
        if forward is None or output is None:  # None: the pass raised, and this hook only cleans up
            return
        missing = sorted(map(str, self.sites - forward.ran))
        if missing:
            raise GuardNotApplied(
                f"edits at {', '.join(missing)}",
                "the forward pass ended and they had not run",
                "A block was replaced, skipped or called through .forward: restore it, and enter steer again.",
            )
        if forward.unstable and bool(torch.stack([flag.cpu() for flag in forward.unstable]).any()):
            raise UnstableEdit(
                f"edits at {', '.join(sorted(map(str, forward.ran)))}",
                "an edited vector holds NaN or infinity",
                "Use smaller amounts, or a dtype with more range; nothing was sampled from this pass.",
            )
        cache = self.engine.read_cache(output)
        forward.call.cache = None if cache is None else weakref.ref(cache)

    def _check_caller(self) -> None:
        if self.participants and self.number not in _INSIDE.get():
            raise ModelBusy(
                f"a call of {type(self.engine.model).__name__} from another thread or task",
                "a steer or capture block is open on it elsewhere, and this caller is not inside it",
                "Start the thread with run.bind(model.generate), or give each thread its own model.",
            )


def join(engine: Engine, participant: Participant, places: dict[Site, Place]) -> Session:
    """Open a session on the engine's model, or join the one that is open. Raises `ModelBusy`."""
    with _LOCK:
        session = _OPEN.get(engine.model)
        if session is not None and session.number not in _INSIDE.get():
            raise ModelBusy(
                f"steering {type(engine.model).__name__}",
                "another thread or task has a steer or capture block open on it",
                "Wait until that block has ended, run both inside one block with a plan per row, or copy the model.",
            )
        session = session or Session(engine)
        session.add(participant, places)
        _OPEN[engine.model] = session
    return session


def leave(session: Session, participant: Participant) -> None:
    """End a participant's part in a session; doing it twice does nothing."""
    with _LOCK:
        session.remove(participant)
        if not session.participants:
            _OPEN.pop(session.engine.model, None)


def participants(model: nn.Module) -> Sequence[Participant]:
    """The blocks that are open on ``model``, outermost first."""
    session = _OPEN.get(model)
    return () if session is None else tuple(session.participants)


class _Generate:
    """What stands for ``model.generate`` inside a block; a copy of the model made there gets its own method back."""

    def __init__(self, model: nn.Module, watched: Callable[..., Any]):
        self._model, self._watched = model, watched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._watched(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        kind: Any = type(self._model)
        return MethodType(kind.generate, memo.get(id(self._model), self._model))


def _restore(model: nn.Module, watched: Any, before: Any) -> None:
    if model.__dict__.get("generate") is not watched:  # somebody else's by now: theirs stays, ours inside it is inert
        return
    del model.__dict__["generate"]
    if before is not None:
        model.__dict__["generate"] = before


def _unseen(call: Call, column: int) -> GuardNotApplied:
    return GuardNotApplied(
        f"edits up to column {column}",
        f"only the passes up to column {call.reached} went through saeguard's hooks",
        "The block ended before the call did, or a compiled copy of the model ran: its output must not be used.",
    )


def _tokens(seen: Pass, participant: Participant, request: Request | None) -> TokenBatch:
    found = read_mask(seen.mask, seen.rows, seen.width, seen.column)
    if found is None:
        raise TokensUnknown(
            f"a pass of {seen.rows} x {seen.width} tokens after {seen.column} in the cache",
            f"its attention mask is {tuple(seen.mask.shape) if seen.mask is not None else None}",
            "Give a mask of rows x (cached + new) columns.",
        )
    real, absolute = (tensor.to(seen.device) for tensor in found)
    special = None
    if seen.ids is not None:
        special = is_special(seen.ids, participant.special_ids.to(seen.ids.device))
    since = None
    if request is not None:
        columns = torch.arange(seen.column, seen.column + seen.width, device=seen.device)
        since = (columns - request.prompt_columns).expand(seen.rows, seen.width)
    elif participant.prompt_tokens is not None:
        given = participant.prompt_tokens
        if isinstance(given, tuple) and len(given) != seen.rows:
            raise RowsMismatch(
                f"prompt_tokens for {len(given)} rows",
                f"the batch has {seen.rows} rows",
                "Give one number per row, or one for all.",
            )
        lengths = torch.tensor(given, device=seen.device).view(-1, 1)
        since = absolute - lengths
    return TokenBatch(real, absolute, special, since, seen.column)
