"""The hooks of one model, shared by every steer and capture block that is open on it.

A session places one hook on the model's root before each pass, one per site, and one on the root after each pass.
The first reads what the tokens are, the second edits, the third refuses a pass in which an edit did not run. It is
opened by the first block and closed by the last; what a pass needs to know is kept per thread.
"""

import contextvars
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from saeguard.axes import Stream
from saeguard.engines import inside
from saeguard.engines.base import Engine, Pass, Place, Reader, outside_graphs
from saeguard.engines.calls import (
    Call,
    Forward,
    Participant,
    View,
    check_numbers,
    check_ran,
    check_reruns,
    misplaced,
    needed_later,
    stream_at,
    tokens_of,
    unseen,
    views_at,
)
from saeguard.engines.memories import Memories
from saeguard.engines.watched import Watched, redirected, restore, stops_watched
from saeguard.errors import GuardNotApplied, ModelBusy, UnsupportedMode
from saeguard.sites import Site

P = ParamSpec("P")
T = TypeVar("T")

_OPEN: "weakref.WeakKeyDictionary[nn.Module, Session]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()
_NUMBERS = itertools.count()


class Session:
    """See the module's text. Made by `join`, never directly."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.number = next(_NUMBERS)
        self.participants: list[Participant] = []
        self.places: dict[Site, Place] = {}
        self._needed: frozenset[Site] = frozenset()
        self._handles: dict[Site, Any] = {}
        self._root = ExitStack()
        self._method = ExitStack()
        self._local = threading.local()
        self._memories = Memories()
        self._running = 0
        """Generate calls and forward passes that have begun and not ended, in all threads."""
        self._counting = threading.Lock()

    @property
    def sites(self) -> frozenset[Site]:
        """Sites at which some participant edits, reads or looks, and the sites that those are built on."""
        asked = frozenset().union(*(participant.sites for participant in self.participants))
        bases = {self.places[site].base for site in asked if site in self.places}
        return asked | {site for site in bases if site is not None}

    def add(self, participant: Participant, places: dict[Site, Place]) -> None:
        """Place the hooks that are missing, all or none."""
        with ExitStack() as undo:
            if not self.participants:
                undo.callback(self._root.close)
                undo.callback(self._method.close)
                self._watch_root()
            for site, place in places.items():
                if site not in self._handles:
                    self._attach(site, place)
                    undo.callback(self._detach, site)
            undo.pop_all()
        self.participants.append(participant)
        self._needed = needed_later(self.participants, self.places)
        inside.enter(self.number)

    def remove(self, participant: Participant) -> None:
        """Remove exactly the hooks that nobody else needs."""
        self._forget()  # a pass of this thread that an interrupt ended
        self.participants = [other for other in self.participants if other is not participant]
        for site in set(self._handles) - self.sites:
            self._detach(site)
        self._needed = needed_later(self.participants, self.places)
        if not self.participants:
            self._method.close()
            self._memories.close()
            self._close_when_idle()
            inside.leave(self.number)

    @contextmanager
    def muted(self) -> Iterator[None]:
        """This thread's passes run as if no block were open. For a guardrail whose policy says so, and nothing else."""
        before, self._local.muted = self._is_muted, True
        try:
            yield
        finally:
            self._local.muted = before

    @property
    def _is_muted(self) -> bool:
        return getattr(self._local, "muted", False)

    def _begin(self) -> None:
        with self._counting:
            self._running += 1

    def _end(self) -> None:
        with self._counting:
            self._running -= 1
        if not self.participants:
            self._close_when_idle()

    def _close_when_idle(self) -> None:
        """Let go of the model; the root hooks stay until what ran when the last block ended has been refused."""
        with self._counting:
            if self._running == 0:
                self._root.close()
                self._local = threading.local()

    def _attach(self, site: Site, place: Place) -> None:
        """Hook a site, and put behind it the hooks of streams that come after it in the same module."""
        self._handles[site] = place.attach(self._change_at(site, place))
        self.places[site] = place
        for other, later in sorted(self.places.items(), key=lambda item: item[1].rank):
            if later.follows(place):
                self._handles[other].remove()
                self._handles[other] = later.attach(self._change_at(other, later))

    def _detach(self, site: Site) -> None:
        self._handles.pop(site).remove()
        self.places.pop(site, None)

    def _watch_root(self) -> None:
        model = self.engine.model
        before = model.register_forward_pre_hook(outside_graphs(self._before), with_kwargs=True)
        self._root.callback(before.remove)
        after = model.register_forward_hook(outside_graphs(self._after), always_call=True)
        self._root.callback(after.remove)
        self._root.enter_context(redirected(self.engine))
        self._root.enter_context(stops_watched(self.engine, self._check_stopped))
        for owner, reader in self.engine.entrances():
            generate: Any = getattr(owner, "generate", None)
            if callable(generate):
                watched = Watched(owner, self._watched(generate, reader))
                self._method.callback(restore, owner, watched, owner.__dict__.get("generate"))
                owner.__dict__["generate"] = watched

    def _watched(self, generate: Callable[..., Any], reader: Reader) -> Callable[..., Any]:
        """``generate`` with its request read before the first pass."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self.participants or self._is_muted:  # somebody kept ``model.generate`` from inside the block
                return generate(*args, **kwargs)
            self._check_caller()
            request = reader.read_request(args, kwargs)
            call = Call(request, blocks=tuple(self.participants))
            outer, self._local.call = getattr(self._local, "call", None), call
            self._begin()
            try:
                output = generate(*args, **kwargs)
                self._check_open(call.blocks)
            finally:
                self._forget()
                self._local.call = outer
                self._end()
            self._check_ran(call)
            outcome = reader.read_outcome(output, request)
            if outcome is not None:
                if (call.reached or 0) < outcome.columns:
                    raise unseen(call, outcome.columns)
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
        running = getattr(self._local, "call", None)
        if running is not None:
            self._check_open(running.blocks)
        self._check_open(getattr(self._local, "bound", ()))
        if not self.participants or self._is_muted:
            return
        self._check_caller()
        self._check_original(module)
        self._forget()
        check_reruns(module, self.participants, self.places)
        seen = self.engine.read_pass(args, kwargs)
        call = self._call_for(seen)
        if call.reached is not None and seen.column > call.reached:
            raise unseen(call, seen.column)
        self._memories.check(call.records, call.request, seen)
        call.reached, call.rows = seen.column + seen.width, seen.rows
        views = {}
        for participant in self.participants:
            if participant not in call.records:
                call.records[participant] = participant.open_record(call.request)
            self._memories.resume(participant, call.records[participant], seen)
            covers = participant.cover(seen.rows, call.request).to(seen.device)
            views[participant] = View(tokens_of(seen, participant, call.request), covers, call.records[participant])
        self._local.forward = Forward(call, views, seen.rows, seen.width if seen.are_tokens else None, self.sites)
        self._begin()

    def _forget(self) -> Forward | None:
        """The pass that ran in this thread, which has ended now."""
        forward, self._local.forward = getattr(self._local, "forward", None), None
        if forward is not None:
            self._end()
        return forward

    def _check_open(self, blocks: Sequence[Participant]) -> None:
        """Refuse to go on when a block that was open at the beginning has ended: its edits would be missing."""
        if any(block not in self.participants for block in blocks):
            raise GuardNotApplied(
                "a generate call, or a bound function, that goes on",
                "a block that it began in ended while it ran, so that edits would be missing from here on",
                "End the block after it has returned; what it has shown so far was edited.",
            )

    def run_bound(self, participant: Participant, function: Callable[[], Any]) -> Any:
        """Call ``function`` in this thread as a part of a block: once the block has ended, passes are refused."""
        outer = getattr(self._local, "bound", ())
        self._begin()
        self._local.bound = (*outer, participant)
        try:
            return function()
        finally:
            self._local.bound = outer
            self._end()

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

    def _change_at(self, site: Site, place: Place) -> Callable[[Stream], Stream]:
        def change(carried: Stream) -> Stream:
            if not self.participants or self._is_muted:  # a compiled graph may call this hook after the block
                return carried
            forward = self._forward_at(site, carried)
            base = None if place.base is None else stream_at(forward, place.base, site)
            x = place.value(carried, base)
            dx, changed, edits, views = None, None, {}, views_at(forward, x)
            for participant, view in views.items():
                if site in participant.editors:
                    editor = participant.editors[site]
                    streams = {other: stream_at(forward, other, site, x) for other in editor.reads}
                    memory = view.record.memory
                    edit = edits[participant] = editor(x, view.tokens, view.covers, streams, memory)
                    dx = edit.dx if dx is None else dx + edit.dx
                    changed = edit.changed if changed is None else changed | edit.changed
            after, x_after = carried, x
            if dx is not None and changed is not None:
                after = torch.where(changed[..., None], place.add(carried, dx), carried)
                x_after = after if x is carried else place.value(after, base)
                forward.unstable.append((changed & ~torch.isfinite(after).all(-1)).any())
            for participant, view in views.items():
                if site in participant.sites:
                    participant.see(site, x, x_after, view, edits.get(participant))
            if site in self._needed:
                forward.streams[site] = x_after.clone()
            forward.ran.add(site)
            return after

        return change

    def _forward_at(self, site: Site, x: Stream) -> Forward:
        forward = getattr(self._local, "forward", None)
        if forward is None:
            self._check_caller()
        if forward is None or site in forward.ran or not forward.fits(x):
            raise misplaced(forward, site, x)
        return forward

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        forward = self._forget()
        if forward is None or output is None:  # None: the pass raised, and this hook only cleans up
            return
        check_ran(forward)
        check_numbers(forward)
        cache = self.engine.read_cache(output)
        forward.call.cache = None if cache is None else weakref.ref(cache)
        self._memories.keep(forward.call.records, cache)

    def _check_stopped(self) -> None:
        """A framework ends the pass here, by an exception, and will take it for a whole one."""
        forward = getattr(self._local, "forward", None)
        if forward is not None:
            check_ran(forward)
            check_numbers(forward)

    def _check_caller(self) -> None:
        if self.participants and not inside.is_inside(self.number):
            raise ModelBusy(
                f"a call of {type(self.engine.model).__name__} from another thread or task",
                "a steer or capture block is open on it elsewhere, and this caller is not inside it",
                "Start the thread with run.bind(model.generate), or give each thread its own model.",
            )


def join(engine: Engine, participant: Participant, places: dict[Site, Place]) -> Session:
    """Open a session on the engine's model, or join the one that is open. Raises `ModelBusy`."""
    with _LOCK:
        session = _OPEN.get(engine.model)
        if session is not None and not inside.is_inside(session.number):
            raise ModelBusy(
                f"steering {type(engine.model).__name__}",
                "another thread or task has a steer or capture block open on it",
                "Wait until that block has ended, run both inside one block with a plan per row, or copy the model.",
            )
        inside.check_apart(engine.model, [one.engine.model for one in _OPEN.values()])
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


def bind(participant: Participant, function: Callable[P, T]) -> Callable[P, T]:
    """``function`` for another thread: there it counts as called inside the block of ``participant``.

    Raises `GuardNotApplied` where the block has ended, before the function or at its next pass of the model.
    """
    context = contextvars.copy_context()

    def bound(*args: P.args, **kwargs: P.kwargs) -> T:
        with _LOCK:
            session = next((one for one in _OPEN.values() if participant in one.participants), None)
        if session is None:
            raise GuardNotApplied(
                f"a call of {getattr(function, '__name__', 'a function')} bound to a block",
                "the block has ended, so that the call would run without its edits",
                "Call it while the block is open, or call the function itself.",
            )
        # a copy of the context: several threads may be in here at once
        return context.copy().run(session.run_bound, participant, lambda: function(*args, **kwargs))

    return bound


def participants(model: nn.Module) -> Sequence[Participant]:
    """The blocks that are open on ``model``, or on the model inside of it, outermost first."""
    parts = {id(module) for module in model.modules()}
    with _LOCK:
        found = [one for one in _OPEN.values() if id(one.engine.model) in parts]
        found += [one for one in _OPEN.values() if any(owner is model for owner, _ in one.engine.entrances())]
    return tuple(participant for session in dict.fromkeys(found) for participant in session.participants)
