"""What an engine owes the layers above: sites to places, and what a call says about its tokens."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from saeguard.axes import Stream
from saeguard.errors import GuardNotApplied
from saeguard.sites import Site


@runtime_checkable
class Wrapper(Protocol):
    """An object around a model that is no module itself, as nnsight's are."""

    _module: nn.Module


Model = nn.Module | Wrapper
"""What can be steered."""


@dataclass(frozen=True, eq=False)
class Place:
    """A site in a live model: what a module reads (``input``) or gives (``output``), and how the site follows from it.

    Most sites are what the module carries. With ``base`` the site is that plus the stream at another site of the same
    pass (the stream between attention and MLP is never an output of its own), and with ``gain`` it is
    (carried - bias) / gain (what a norm gives before its gain).
    """

    site: Site
    module: nn.Module
    path: str
    side: Literal["input", "output"]
    width: int
    device: torch.device
    base: Site | None = None
    gain: Tensor | None = None
    bias: Tensor | None = None
    are_tokens: bool = True
    """Whether its positions are tokens of a text, or just positions (pixels, patches) of the site's own."""

    def value(self, carried: Stream, base: Tensor | None) -> Stream:
        """The stream at the site."""
        if base is not None:
            return base.to(carried.device) + carried
        if self.gain is None:
            return carried
        plain = carried.float() if self.bias is None else carried.float() - self.bias.to(carried.device)
        return plain / self.gain.to(carried.device)

    def add(self, carried: Stream, dx: Stream) -> Stream:
        """What the module has to carry for the site to move by ``dx``."""
        return (carried + (dx if self.gain is None else dx * self.gain.to(carried.device))).to(carried.dtype)

    def follows(self, other: "Place") -> bool:
        """Whether both hook the same end of one module, and this stream comes into being after the other one."""
        return self.module is other.module and self.side == other.side and self.rank > other.rank

    @property
    def rank(self) -> int:
        """Where it comes among the streams of one end of one module."""
        return 0 if self.gain is not None else 1 if self.base is None else 2

    def changed(self, output: Any, change: Callable[[Stream], Stream]) -> Any:
        """What the module gives, with the stream in it passed through ``change``."""
        if isinstance(output, tuple):
            return (change(_tensor(output[0], self)), *output[1:])
        return change(_tensor(output, self))

    def attach(self, change: Callable[[Stream], Stream]) -> Any:
        """Register one hook that passes the stream through ``change``; the handle removes it.

        The hook stays out of torch.compile graphs: it runs in Python at every call, whoever compiles the model.
        """
        if self.side == "output":

            def on_output(module: nn.Module, args: Any, output: Any) -> Any:
                return self.changed(output, change)

            return self.module.register_forward_hook(outside_graphs(on_output))

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(_tensor(args[0], self)), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": change(_tensor(kwargs.get("hidden_states"), self))}

        return self.module.register_forward_pre_hook(outside_graphs(on_input), with_kwargs=True)


def outside_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook``, kept out of torch.compile graphs."""
    return torch.compiler.disable(hook)  # type: ignore[return-value]


def _tensor(value: Any, place: Place) -> Tensor:
    if isinstance(value, Tensor) and value.ndim == 3:
        return value
    raise GuardNotApplied(
        f"an edit at {place.site}",
        f"{place.path} carries {type(value).__name__} {tuple(getattr(value, 'shape', ()))} there, not batch x pos x d",
        "Report the model class: its site table is wrong.",
    )


@dataclass(frozen=True, eq=False)
class Request:
    """What a generate call says before it starts.

    ``rows`` is the batch of the request, ``copies`` how many forward rows each of its rows becomes, ``reorders``
    whether those trade places (beams). ``prompt_columns`` is the width of the prompt, padding and what the cache
    already holds included; ``output_columns`` the part of it that the output will repeat. ``eos`` and ``pad`` are the
    token ids that end and fill up a row. ``drafts`` is whether passes hold tokens that may be thrown away.
    """

    rows: int
    copies: int
    reorders: bool
    prompt_columns: int
    output_columns: int
    eos: tuple[int, ...]
    pad: tuple[int, ...]
    drafts: bool


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a generate call did: it fed ``columns`` columns through the model, and per forward row ``ends`` is the first
    of them whose token was not used.
    """

    columns: int
    ends: Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward call says of its tokens, before saeguard's own knowledge of the request is added."""

    rows: int
    width: int
    column: int
    cache: Any
    ids: Tensor | None
    mask: Tensor | None
    device: torch.device
    are_tokens: bool = True
    """Without, only the rows are known: ``width`` is 0, and every site has positions of its own."""


@runtime_checkable
class Reader(Protocol):
    """How the generate calls of one object are read: before they start, and once they have ended."""

    def read_request(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request:
        """Read the arguments of a generate call. Raises `UnsupportedMode`, `TokensUnknown`."""
        ...

    def read_outcome(self, output: Any, request: Request) -> Outcome | None:
        """What a generate call did, from what it returned."""
        ...


@runtime_checkable
class Engine(Reader, Protocol):
    """The adapter to one framework, bound to one model; as a reader, of the generate that its users call."""

    model: nn.Module
    name: str

    def resolve(self, site: Site) -> Place:
        """Where ``site`` is in the model. Raises `SiteNotFound`, `MetaDevice`."""
        ...

    def value_bias(self, layer: int, *, with_norm: bool) -> Tensor | None:
        """What ``attn_z`` holds in a block whatever the tokens are: the values' bias, in float32, or None for none.

        ``with_norm`` adds what the values make of the bias of the norm in front of attention.
        """
        ...

    def centers(self) -> bool:
        """Whether the model's norms take the mean out of the stream, so that its mean direction is never read."""
        ...

    def model_names(self) -> tuple[str, ...]:
        """Names under which the model may stand in an SAE's manifest; empty when it has none."""
        ...

    def model_shape(self) -> dict[str, Any]:
        """The model's type, width, depth and vocabulary, as an SAE's manifest may name them."""
        ...

    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens that the model's own configuration names."""
        ...

    def read_pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        """Read the arguments of a forward call. Raises `TokensUnknown`, `UnsupportedMode`."""
        ...

    def read_cache(self, output: Any) -> Any:
        """The cache that a forward call returned, or None."""
        ...

    def entrances(self) -> Sequence[tuple[nn.Module, Reader]]:
        """The objects whose ``generate`` makes passes of the model, and who reads their calls."""
        ...

    def is_generating(self) -> bool:
        """Whether the caller is a generate call of the model: one that no request was read for."""
        ...


def places_of(engine: Engine, sites: Iterable[Site]) -> dict[Site, Place]:
    """Where the sites are, and the sites that they are built on. Raises what `Engine.resolve` raises."""
    found = {site: engine.resolve(site) for site in dict.fromkeys(sites)}
    for place in list(found.values()):
        if place.base is not None and place.base not in found:
            found[place.base] = engine.resolve(place.base)
    return found
