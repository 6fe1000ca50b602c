"""Two passes of eight tokens before a block begins: an edit of our own has to arrive where the next module reads.

One pass is plain. In the other one a probe stands at every site that the block needs: it adds a random direction, a
quarter of a typical |x| long, to the second of two rows of random tokens. What has to hold, at each site:

    row 0:  after = before, bit for bit          row 1:  after = before + dx, and before = the plain pass at the first

``before`` is what the site carries ahead of saeguard's hook, ``after`` what the next block reads, both seen by hooks
that know nothing of saeguard's. The probe goes the way of every edit: place, hook, session, editor, kernel.

Seen so: hooks that do not fire, or fire on another module, what they return being lost, edits of another row or of
another size. Not seen: the weights of the SAE, gates, phases, padding, decoding. `saeguard check` looks at those.
"""

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saeguard.axes import Stream
from saeguard.editor import Edit, Editor, bind
from saeguard.engines.base import Engine, Place, Request
from saeguard.engines.calls import View
from saeguard.engines.module import Module
from saeguard.engines.readers import Reader, reader_of
from saeguard.engines.session import join, leave, participants
from saeguard.errors import CanaryFailed, SaeguardError
from saeguard.kernels.pick import KernelName
from saeguard.ledger import CallRecord
from saeguard.ops import Add
from saeguard.plans import Plan, Rule
from saeguard.sae import SAE
from saeguard.sites import Site

logger = logging.getLogger("saeguard.canary")

LENGTH = 4
"""Tokens of each of the two rows."""
PUSH = 0.25
RELATIVE, ULPS = 1e-3, 4.0
"""How far off an edit may be: of its largest number, and units in the last place of the stream."""
NOISE = 64.0
"""Units in the last place of the largest number: what two equal passes may differ by on an accelerator."""
_FRAMEWORKS = {"torch", "transformers", "accelerate", "peft", "torchao", "transformer_lens", "nnsight", "saeguard"}
_WITHOUT = "canary=False enters without this probe."
_PASSED: "weakref.WeakKeyDictionary[nn.Module, set[int]]" = weakref.WeakKeyDictionary()


def canary(
    engine: Engine, places: Mapping[Site, Place], kernel: KernelName | None = None, *, again: bool = False
) -> str:
    """Try an edit at each of ``places``, and say in a few words what came of it: "passed", or why it was not tried.

    It is tried once, and ``again`` if that is asked for, or when a module of the model, its ``forward``, a framework's
    hook on it, a dtype or a device is another one than at the last time; what stays the same object, such as a class
    that was patched, goes unseen then. Not tried: where a block is open on the model, whose records it would get into;
    on models without token ids, or under a `SiteMap`; and on compiled ones, where it would start a compilation.

    Random states, gradients, modes and caches stay as they are. Hooks of others are off meanwhile, but for those of
    torch and the frameworks, and calls from other threads are refused. It costs two passes: 0.35 s of one core
    on a model of 135M parameters; a later block only looks whether the model is the same.

    Raises `CanaryFailed`, and what a pass that cannot be edited raises.
    """
    model = engine.model
    reason = _why_not(engine, places)
    if reason:
        logger.info("no canary on %s: %s", type(model).__name__, reason)
        return reason
    state = _state(model, places, kernel)
    if again or state not in _PASSED.setdefault(model, set()):
        if not _try(engine, places, kernel):
            return "the model itself makes numbers that are not finite"
        _PASSED.setdefault(model, set()).add(state)
    return "passed"


def _why_not(engine: Engine, places: Mapping[Site, Place]) -> str:
    if not places:
        return "nothing is edited"
    if isinstance(engine, Module):
        return "its sites are those of a map, which may be of any shape"
    if not _reads_tokens(engine):
        return "it takes no token ids"
    if participants(engine.model):
        return "a block is open on it already"
    if any(part._compiled_call_impl is not None or hasattr(part, "_orig_mod") for part in engine.model.modules()):
        return "a part of it is compiled"
    return ""


def _reads_tokens(engine: Engine) -> bool:
    return "vocab_size" in engine.model_shape() and "input_ids" in inspect.signature(engine.model.forward).parameters


def _state(model: nn.Module, places: Mapping[Site, Place], kernel: KernelName | None) -> int:
    """A number for what can be told cheaply of the model, the sites and the hooks."""
    parts = tuple(
        (id(part), id(type(part)), id(vars(part).get("forward")), _hooks_of(part)) for part in model.modules()
    )
    weights = tuple((id(weight.dtype), weight.device) for weight in model.parameters())
    where = frozenset((site, id(place.module), place.side) for site, place in places.items())
    return hash((parts, weights, where, kernel))


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Modes and random states are afterwards what they were before; inside, nothing is random or remembered."""
    training = [part for part in model.modules() if part.training]
    devices = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
    with torch.random.fork_rng([device.index or 0 for device in devices]), torch.no_grad():
        try:
            for part in training:
                part.training = False
            yield
        finally:
            for part in training:
                part.training = True


Hooks = dict[int, Callable[..., Any]]


def _strangers(model: nn.Module) -> list[tuple[Hooks, Hooks]]:
    """Each table of hooks, and the hooks in it that are not the frameworks' own."""
    tables: list[Any] = [hooks for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)]
    found = [(hooks, {key: hook for key, hook in list(hooks.items()) if not _is_frameworks(hook)}) for hooks in tables]
    return [(hooks, theirs) for hooks, theirs in found if theirs]


@contextmanager
def _without(strangers: Sequence[tuple[Hooks, Hooks]]) -> Iterator[None]:
    """Let something that does nothing stand in their places; who takes off a hook meanwhile has taken it off."""
    there = [(hooks, key, hook) for hooks, theirs in strangers for key, hook in theirs.items() if key in hooks]
    for hooks, key, _ in there:
        hooks[key] = _nothing
    try:
        yield
    finally:
        for hooks, key, hook in there:
            if key in hooks:
                hooks[key] = hook


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A hook that does nothing."""


def _hooks_of(part: nn.Module) -> int:
    """How many hooks of the frameworks are on a module."""
    there = part._forward_hooks, part._forward_pre_hooks
    return sum(_is_frameworks(hook) for hooks in there for hook in hooks.values()) if any(there) else 0


def _is_frameworks(hook: Any) -> bool:
    """Whether a hook is a part of how the model computes, as those that add up what the ranks of a model have."""
    while isinstance(hook, partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").partition(".")[0] in _FRAMEWORKS


def _try(engine: Engine, places: Mapping[Site, Place], kernel: KernelName | None) -> bool:
    """Whether there was anything to be seen; raises where edits go wrong."""
    model, ids, probe = engine.model, _ids(engine), Probe(places)
    readers = {site: reader_of(model, place) for site, place in places.items()}
    ours = {site: _in_front(place) for site, place in places.items()}
    ahead = [site for site, place in places.items() if readers[site].module is not place.module]
    with ExitStack() as stack:  # hooks run in the order in which they came, but for those that ask to be ahead of all
        strangers = _strangers(model)
        before = stack.enter_context(_watched(ours))
        session = join(engine, probe, dict(places))  # from here on, calls of other threads are refused
        stack.callback(leave, session, probe)
        after = stack.enter_context(_watched(readers, ahead))
        stack.enter_context(_as_it_was(model))
        stack.enter_context(_without(strangers))
        with session.muted():
            _run(model, ids)
        plain = dict(after)
        _check_ran(plain, readers)
        if not all(bool(x.isfinite().all()) for x in plain.values()):
            return False
        before.clear()
        after.clear()
        probe.aim({site: _typical(x) for site, x in plain.items()}, kernel)
        _run(model, ids)
    _check_ran(before, ours)
    _check_ran(after, readers)
    first = next(iter(before))
    _check_same(first, ours[first], plain[first], before[first])
    for site, reader in readers.items():
        _check_edit(site, reader, before[site], after[site], probe.carried(site))
    return True


@dataclass(frozen=True, eq=False)
class _InFront(Reader):
    """What an edit is given, at a place whose engine has hooks of its own: seen by one that came before ours."""

    place: Place = field(kw_only=True)

    @contextmanager
    def through(self, change: Callable[[Tensor], Tensor | None], *, first: bool = False) -> Iterator[None]:
        def look(x: Stream) -> Stream:
            change(x)
            return x

        handle = self.place.attach(look)
        try:
            yield
        finally:
            handle.remove()


def _in_front(place: Place) -> Reader:
    if type(place).attach is Place.attach:
        return Reader(place.module, place.side, place.path, False)
    return _InFront(place.module, place.side, place.path, False, place=place)


class Probe:
    """A block that adds a direction of its own to row 1 at every one of ``places``; see `Participant`."""

    prompt_tokens = None

    def __init__(self, places: Mapping[Site, Place]):
        self.sites = frozenset(places)
        self.special_ids: Int[Tensor, " n"] = torch.zeros(0, dtype=torch.long)
        self.editors: dict[Site, Editor] = {}
        self._places = places
        self._saes = {str(site): _one_latent(site, place.width) for site, place in places.items()}
        self._sizes: Mapping[Site, float] = {}

    def aim(self, sizes: Mapping[Site, float], kernel: KernelName | None) -> None:
        """From the next pass on, push by these lengths."""
        rules = tuple(Rule(str(site), (0,), Add(size), special=True) for site, size in sizes.items())
        bound = bind([None, Plan(rules)], self._saes, every_row=False)
        self._sizes = sizes
        self.editors |= {
            site: Editor(site, bound, self._saes, device=place.device, kernel=kernel)
            for site, place in self._places.items()
        }

    def carried(self, site: Site) -> Float[Tensor, " width"]:
        """What row 1 of the module at a site has to gain, in float64: its probes', in the units that it carries."""
        here, total = self._places[site], torch.zeros(self._places[site].width, dtype=torch.float64)
        for other, place in self._places.items():
            if place.module is here.module and place.side == here.side:
                gain = 1.0 if place.gain is None else place.gain.double().cpu()
                total += self._sizes[other] * self._saes[str(other)].W_dec[0].double() * gain
        return total

    def cover(self, rows: int, request: Request | None) -> Bool[Tensor, "batch rules"]:
        """The second row."""
        return (torch.arange(rows) == 1)[:, None].expand(rows, len(self.sites))

    def open_record(self, request: Request | None) -> CallRecord:
        """A record that nobody reads."""
        return CallRecord()

    def see(self, site: Site, before: Stream, after: Stream, view: View, edit: Edit | None) -> None:
        """Nothing: what saeguard believes of its edits is not what is asked here."""


def _one_latent(site: Site, width: int) -> SAE:
    direction = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(width)
    return SAE(str(site), zeros[:, None], zeros[:1], direction / direction.norm(), zeros, site=site)


def _typical(x: Tensor) -> float:
    return PUSH * float(torch.linalg.vector_norm(x.float(), dim=-1).median()) or 1.0


def _ids(engine: Engine) -> Int[Tensor, "row pos"]:
    """Ordinary tokens, the same at every call and on every rank, where the model reads them."""
    find: Any = getattr(engine.model, "get_input_embeddings", lambda: None)
    weight = getattr(find(), "weight", None)
    n = engine.model_shape()["vocab_size"]
    ordinary = torch.arange(n if weight is None else min(n, weight.shape[0]))
    ordinary = ordinary[~torch.isin(ordinary, torch.tensor(sorted(engine.special_ids()), dtype=torch.long))]
    chosen = torch.randint(len(ordinary), (2, LENGTH), generator=torch.Generator().manual_seed(0))
    place = weight if weight is not None else next(engine.model.parameters())
    return ordinary[chosen].to("cpu" if place.is_meta else place.device)  # offloading fetches them from there


def _run(model: nn.Module, ids: Int[Tensor, "row pos"]) -> None:
    known = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        model(**{name: value for name, value in given.items() if name in known})
    except SaeguardError:
        raise
    except Exception as error:
        raise CanaryFailed(
            f"two passes of {LENGTH} tokens before steering {type(model).__name__}",
            f"the model cannot make them: {type(error).__name__}: {error}",
            f"Mend the model; {_WITHOUT}",
        ) from error


@contextmanager
def _watched(readers: Mapping[Site, Reader], ahead: Sequence[Site] = ()) -> Iterator[dict[Site, Tensor]]:
    """What each of ``readers`` reads, in the order of a pass, at some ``ahead`` of all other hooks there."""
    found: dict[Site, Tensor] = {}

    def keep(site: Site, x: Tensor) -> None:
        found[site] = x.detach().flatten(2).cpu().clone()

    with ExitStack() as stack:
        for site, reader in readers.items():
            stack.enter_context(reader.through(partial(keep, site), first=site in ahead))
        yield found


def _check_ran(found: Mapping[Site, Tensor], readers: Mapping[Site, Reader]) -> None:
    for site in readers:
        if site not in found:
            raise _failed(site, readers[site], "that module did not run")


def _check_same(site: Site, reader: Reader, plain: Tensor, before: Tensor) -> None:
    """The first site of a pass: nothing was edited ahead of it."""
    if plain.shape != before.shape or float((plain.double() - before.double()).abs().max()) > _noise(plain, reader):
        raise _failed(site, reader, "what came there, ahead of any edit, is not what comes there without saeguard")


def _noise(x: Tensor, reader: Reader) -> float:
    """What two equal passes may differ by: nothing on a CPU."""
    weight = next(reader.module.parameters(), None)
    on_cpu = weight is None or weight.device.type == "cpu"
    return 0.0 if on_cpu else NOISE * torch.finfo(x.dtype).eps * float(x.abs().max())


def _check_edit(site: Site, reader: Reader, before: Tensor, after: Tensor, dx: Tensor) -> None:
    if before.shape != after.shape or not torch.equal(before[0], after[0]):
        raise _failed(site, reader, "row 0, which has no edit, does not come out as it went in")
    if torch.equal(before[1], after[1]):
        raise _failed(site, reader, "the edit of row 1 does not arrive there")
    expected = before[1].double() + dx
    slack = ULPS * torch.finfo(before.dtype).eps * expected.abs()
    off = float(((after[1].double() - expected).abs() - slack).max() / dx.abs().max())
    if not off <= RELATIVE:  # nan is off
        raise _failed(site, reader, f"row 1 is off by {off:.2g} of the edit's largest number")


def _failed(site: Site, reader: Reader, found: str) -> CanaryFailed:
    return CanaryFailed(
        f"a probe of edits at {site}, watched at {reader.path or 'the model'}",
        found,
        f"Edits of this model would go wrong in the same way: run saeguard check; {_WITHOUT}",
    )
