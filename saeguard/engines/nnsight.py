"""The nnsight engine: a model whose modules hand what they read and give to the code of a trace.

nnsight puts a controller in the place of each module's ``forward``, for good. Edits stand inside of it, so that the
code of a trace comes after them, at a site and everywhere behind it:

    pre-hooks, ours among them  >  .input handed over  >  forward  >  ours  >  .output handed over

What a trace writes there is the stream from then on, and is not edited again at that site. The model's pass runs in the
thread and the context of whoever left the ``with model.trace(...)`` block; only the code of the trace runs aside, in a
greenlet with a context of its own, which is outside of every block of saeguard's.
"""

import copy
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from nnsight import Envoy
from nnsight.intervention.interleaver import EarlyStopException, Mediator
from nnsight.intervention.source import Controller
from nnsight.tracing.tracer import skip_context
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from saeguard.axes import Stream
from saeguard.engines.around import Around
from saeguard.engines.base import Model, Pass, Place, outside_graphs
from saeguard.engines.layouts import Layout
from saeguard.errors import GuardNotApplied, MetaDevice, UnsupportedMode, UnsupportedModel
from saeguard.sites import Site

Body = Callable[..., Any]
"""An unbound forward: called with the module, and with what the module is called with."""


class NNsight(Around):
    """One model that nnsight has wrapped; ``layout`` overrides the table for architectures that are not in it."""

    name = "nnsight"

    def __init__(self, wrapper: Model, layout: Layout | None = None):
        _check_statement()
        super().__init__(_accept(wrapper), layout)  # a wrapper's generate and pipe call that of its model
        self._wrapper = None if isinstance(wrapper, nn.Module) else wrapper
        self._root = _ROOTS.setdefault(self.model, Root(self.model))

    def resolve(self, site: Site) -> Place:
        place = self._wrapped.resolve(site)
        known = {part.name: getattr(place, part.name) for part in fields(Place)}
        return Handed(**known, root=self._root, wrapper=self._wrapper)

    def special_ids(self) -> frozenset[int]:
        tokenizer = getattr(self._wrapper, "tokenizer", None)
        return super().special_ids() | frozenset(getattr(tokenizer, "all_special_ids", ()))

    def read_pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        seen = self._wrapped.read_pass(args, kwargs)
        if isinstance(seen.ids, FakeTensor) or isinstance(seen.mask, FakeTensor):
            raise UnsupportedMode(
                "a scan of a steered model",
                "its tensors have shapes and no numbers, so there are no tokens to be read",
                "Scan before the block; shapes are the same inside it.",
            )
        ids, mask = (None if x is None else x.clone() for x in (seen.ids, seen.mask))
        self._root.expect(Seen(seen, ids, mask, self._wrapped.read_pass))
        return seen


@dataclass(frozen=True, eq=False)
class Seen:
    """The tokens that the edits of a pass were placed by, and how to read those that the model gets."""

    tokens: Pass
    ids: Tensor | None
    mask: Tensor | None
    read: Callable[[tuple[Any, ...], Mapping[str, Any]], Pass]

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse a pass over other tokens. Raises `UnsupportedMode`."""
        now, then = self.read(args, kwargs), self.tokens
        same = (now.rows, now.width, now.column) == (then.rows, then.width, then.column)
        if not same or not _equal(now.ids, self.ids) or not _equal(now.mask, self.mask):
            raise UnsupportedMode(
                "a trace that writes to the input of the whole model",
                "the tokens of the pass are no longer those that its edits were placed by",
                "Give the tokens to trace(...) or invoke(...), or write to the output of the embedding.",
            )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else a.shape == b.shape and torch.equal(a, b.to(a.device))


@dataclass(frozen=True, eq=False)
class Handed(Place):
    """A site at which the code of a trace is given the stream, after its edits."""

    root: "Root" = field(kw_only=True)
    wrapper: Any = field(kw_only=True)

    def attach(self, change: Callable[[Stream], Stream]) -> Any:
        """Pass the stream through ``change`` before a trace gets it; the handle's ``remove`` ends that."""

        def noted(x: Stream) -> Stream:
            self.root.passed(self.site)
            return change(x)

        handle = Handle()
        handle.undo.callback(self.root.watch(self.site, self.wrapper))
        if self.side == "output":
            change_output = outside_graphs(lambda module, args, output: self.changed(output, noted))
            handle.undo.callback(hook_inside(self.module, change_output).remove)
        else:
            handle.undo.callback(super().attach(noted).remove)
        return handle


class Handle:
    """What takes an edit off again."""

    def __init__(self) -> None:
        self.undo = ExitStack()

    def remove(self) -> None:
        """Take it off; doing it twice does nothing."""
        self.undo.close()


def hook_inside(module: nn.Module, hook: Callable[[nn.Module, Any, Any], Any]) -> Handle:
    """A forward hook that runs before a trace is given the output; around a forward without controller, torch's own."""
    handle, controller = Handle(), vars(module).get("forward")
    if not isinstance(controller, Controller):
        handle.undo.callback(module.register_forward_hook(hook).remove)
        return handle

    def hooked(body: Body) -> Body:
        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            output = body(module, *args, **kwargs)
            changed = hook(module, args, output)
            return output if changed is None else changed

        return run

    handle.undo.callback(wrap(controller, hooked))
    return handle


class Root:
    """The whole model's pass, seen from between what nnsight hands over and its forward.

    There a trace has had its way with the input, and what ends a pass early goes through. One per model.
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        self._watched: list[tuple[Site, Any]] = []
        self._undo: dict[int | None, Callable[[], None]] = {}
        """How to end the guard (None), and the refusals of wrappers, by their id."""
        self._local = threading.local()

    def watch(self, site: Site, wrapper: Any) -> Callable[[], None]:
        """Look after a site in every pass; what is returned ends that, in any order."""
        entry = (site, wrapper)
        if not self._watched:
            self._local = threading.local()  # a pass that was refused before it began leaves its tokens
            model = self._model()
            controller = None if model is None else vars(model).get("forward")
            if isinstance(controller, Controller):
                self._undo[None] = wrap(controller, self._guarded)
        if hasattr(wrapper, "_remote_backend") and id(wrapper) not in self._undo:
            self._undo[id(wrapper)] = refuse_remote(wrapper)
        self._watched.append(entry)

        def end() -> None:
            self._watched = [other for other in self._watched if other is not entry]
            keys: set[int | None] = {id(of) for _, of in self._watched}
            for key in self._undo.keys() - (keys | {None} if self._watched else keys):
                self._undo.pop(key)()

        return end

    def expect(self, seen: "Seen") -> None:
        """A pass begins now, and its tokens have been read."""
        self._local.seen, self._local.passed = seen if self._watched else None, set()

    def passed(self, site: Site) -> None:
        """The pass has come through a site."""
        getattr(self._local, "passed", set()).add(site)

    def _guarded(self, body: Body) -> Body:
        def guarded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            expected, self._local.seen = getattr(self._local, "seen", None), None
            if expected is not None:
                expected.check(args, kwargs)
            try:
                return body(module, *args, **kwargs)
            except EarlyStopException as stop:
                if expected is None:  # no block took part in the pass
                    raise
                missing = sorted(map(str, {site for site, _ in self._watched} - self._local.passed))
                if missing:
                    raise GuardNotApplied(
                        f"edits at {', '.join(missing)}",
                        "tracer.stop() ended the pass before they ran",
                        "Stop behind the last site of the plan, or run the pass to its end.",
                    ) from stop
                raise

        return torch.compiler.disable(guarded, recursive=False)


_ROOTS: "weakref.WeakKeyDictionary[nn.Module, Root]" = weakref.WeakKeyDictionary()


class Between:
    """What stands for a controller's state while a block is open: the same, with something around its body.

    The body is asked for at every call, since ``.source`` puts another one in its place.
    """

    def __init__(self, state: Any):
        self.state = state
        self.wraps: list[Callable[[Body], Body]] = []

    @property
    def body(self) -> Body:
        """The forward, with what was put around it, the latest outermost."""
        body = self.state.body
        for around in self.wraps:
            body = around(body)
        return body

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.state, memo)  # a copy of the model made inside a block is not in the block

    def __reduce__(self) -> Any:
        return _itself, (self.state,)


def wrap(controller: Any, around: Callable[[Body], Body]) -> Callable[[], None]:
    """Put ``around`` around what a controller runs; what is returned takes it off again."""
    between: Any = controller.state
    if not isinstance(between, Between):
        between = controller.state = Between(controller.state)
    between.wraps.append(around)

    def unwrap() -> None:
        between.wraps.remove(around)
        if not between.wraps and controller.state is between:
            controller.state = between.state

    return unwrap


def refuse_remote(wrapper: Any) -> Callable[[], None]:
    """Let nothing of ``wrapper`` run on another machine, where no block is open; what is returned ends that."""
    before, is_open = wrapper.__dict__.get("_remote_backend"), True
    usual = wrapper._remote_backend

    def refuse(remote: Any, *args: Any, **kwargs: Any) -> Any:
        if is_open:
            raise UnsupportedMode(
                f"a trace with remote={remote!r}",
                "it runs on another machine, or on a copy of the trace as one would, where nothing is edited",
                "Leave remote out inside the block.",
            )
        return usual(remote, *args, **kwargs)

    wrapper.__dict__["_remote_backend"] = refuse

    def allow() -> None:
        nonlocal is_open
        is_open = False  # for copies of the wrapper that were made meanwhile
        if wrapper.__dict__.get("_remote_backend") is refuse:
            del wrapper.__dict__["_remote_backend"]
            if before is not None:
                wrapper.__dict__["_remote_backend"] = before

    return allow


def _check_statement() -> None:
    """Refuse ``with model.trace(...), steer(...):``, whose body runs when the second of the two has ended.

    What tells is how nnsight keeps a body from running at once: until its first line the frame has a trace function.
    """
    frame = sys._getframe(2)
    while frame is not None:
        if getattr(frame.f_trace, "__module__", None) == skip_context.__module__:
            raise UnsupportedMode(
                "a block that begins in the with statement of a trace, behind the trace",
                "nnsight runs the code of a trace when everything behind it in its statement has ended",
                "Put it in front: with steer(model, plan), model.trace(prompt): ...",
            )
        frame = frame.f_back


def rows_of_invoke(wrapper: Any) -> int | None:
    """How many rows of a batch the code that calls this is about; None for all of them."""
    group, batcher = Mediator.current("edits").batch_group, wrapper.interleaver.batcher
    return group[1] if group is not None and batcher.batching else None


def _itself(state: Any) -> Any:
    return state


def _accept(wrapper: Model) -> nn.Module:
    kind = type(wrapper).__name__
    if isinstance(wrapper, nn.Module):  # the model itself, which somebody wrapped before
        return wrapper
    if not isinstance(wrapper, Envoy) or any(".vllm" in one.__module__ for one in type(wrapper).__mro__):
        raise UnsupportedModel(
            f"steering {kind}",
            "its passes run in a process of vLLM" if isinstance(wrapper, Envoy) else "it is none of nnsight's models",
            "Use TransformersModel(name, dispatch=True), or NNsight(model).",
        )
    if not getattr(wrapper, "dispatched", True):
        raise MetaDevice(
            f"steering {kind}",
            "it has not been dispatched, so that its parameters are on the meta device",
            "Call dispatch() first, or make it with dispatch=True.",
        )
    return wrapper._module
