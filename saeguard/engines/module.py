"""The engine for any nn.Module: a `SiteMap` says where the streams are and what the arguments of a call are.

A pass is one call of the module. Without a cache every call starts anew, so that each step of a denoising loop, and
each token that somebody's own loop writes, is a call with a record of its own. Classifier-free guidance passes two rows
per image, those without a condition first, and plans are one per row.
"""

import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from saeguard.engines.base import Model, Outcome, Pass, Reader, Request
from saeguard.engines.layouts import Side
from saeguard.engines.mapped import MappedPlace
from saeguard.engines.placement import check_parallel, device_of
from saeguard.engines.sitemaps import At, SiteMap, example_for
from saeguard.engines.traced import is_traced
from saeguard.errors import CompiledModel, SiteNotFound, TokensUnknown, UnsupportedMode, UnsupportedModel
from saeguard.sites import Site

_WIDTHS = {
    "input": ("in_features", "nx", "in_channels", "num_features", "num_channels"),
    "output": ("out_features", "nf", "embedding_dim", "out_channels", "num_features", "num_channels"),
}
_ONE_SHAPE = "normalized_shape"


class Module:
    """One module and the map of its sites."""

    name = "nn.Module"

    def __init__(self, model: Model, sites: SiteMap):
        self.model = _accept(model)
        self._sites = sites
        self._thread = threading.local()

    def resolve(self, site: Site) -> MappedPlace:
        at = self._sites.find(site)
        if at is None:
            raise SiteNotFound(
                f"site {site} in {type(self.model).__name__}",
                f"its site map names {', '.join(map(str, self._sites.sites))}",
                f"Give it a place: SiteMap({{'{site}': 'path.of.a.module', ...}}).",
            )
        module = self._submodule(site, at.path)
        self._check_alone(site, at, module)
        if getattr(module, "_compiled_call_impl", None) is not None or is_traced(module):
            raise CompiledModel(
                f"steering {type(self.model).__name__} at {site}",
                f"a {type(module).__name__} was compiled, by itself or in a graph that calls one",
                "Such a graph skips hooks that came later. Enter steer before the first call of anything compiled, or "
                "call torch._dynamo.reset() first.",
            )
        width = at.width or _width(module, at.side)
        if width is None:
            raise SiteNotFound(
                f"site {site} in {type(self.model).__name__}",
                f"{at.path} is a {type(module).__name__}, which does not say how wide its {at.side} is",
                f"Say it: At({at.path!r}, width=...), or SiteMap(..., width=...) for all.",
            )
        return MappedPlace(
            site, module, at.path, at.side, width, device_of(self.model, at.path),
            are_tokens=self._sites.are_tokens, at=at,
        )  # fmt: skip

    def value_bias(self, layer: int, *, with_norm: bool) -> Tensor | None:
        raise UnsupportedModel(
            f"taking the bias of the values off attn_z.{layer} in {type(self.model).__name__}",
            "a site map does not say where that bias is",
            "Put it into the SAE with sae.shifted(bias).",
        )

    def centers(self) -> bool:
        return any("LayerNorm" in kind.__name__ for module in self.model.modules() for kind in type(module).__mro__)

    def model_names(self) -> tuple[str, ...]:
        config: Any = getattr(self.model, "config", None)
        name = getattr(self.model, "name_or_path", "") or getattr(config, "_name_or_path", "")
        return (name,) if isinstance(name, str) and name and not Path(name).is_dir() else ()

    def model_shape(self) -> dict[str, Any]:
        config: Any = getattr(self.model, "config", None)
        names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
        return {name: getattr(config, name) for name in names if hasattr(config, name)}

    def special_ids(self) -> frozenset[int]:
        config: Any = getattr(self.model, "config", None)
        found = (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
        listed = (value if isinstance(value, list | tuple) else [value] for value in found if value is not None)
        return frozenset(value for values in listed for value in values)

    def read_pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        self._thread.cache = None
        if self._sites.read_pass is not None:
            return self._read_by_hand(args, kwargs)
        given = _arguments(self.model, args, kwargs)
        if self._sites.tokens is not None:
            return self._read_tokens(given)
        shown = next((tensor for tensor in _tensors(given.values()) if tensor.ndim > 1), None)
        if shown is None:
            raise TokensUnknown(
                f"a call of {type(self.model).__name__}",
                "no argument is a tensor with rows",
                "Give its site map a read_pass that says how many rows there are.",
            )
        return Pass(shown.shape[0], 0, 0, None, None, None, shown.device, are_tokens=False)

    def read_cache(self, output: Any) -> Any:
        return getattr(self._thread, "cache", None)

    def read_request(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request:
        raise UnsupportedMode(
            f"generate of {type(self.model).__name__}", "a site map says nothing of it", "Call the module itself."
        )

    def read_outcome(self, output: Any, request: Request) -> Outcome | None:
        return None

    def entrances(self) -> Sequence[tuple[nn.Module, Reader]]:
        return ()  # a generate of its own is a loop of calls like any other

    def is_generating(self) -> bool:
        return False

    def _read_tokens(self, given: Mapping[str, Any]) -> Pass:
        """A whole text per row, from column 0."""
        kind, its = type(self.model).__name__, self._sites
        ids, mask = given.get(its.tokens or ""), given.get(its.mask or "")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            raise TokensUnknown(
                f"a call of {kind}",
                f"{its.tokens} is not token ids of rows x positions",
                "Name the argument that holds them, tokens='...', or give the site map a read_pass.",
            )
        for name, value in given.items():
            if ("cache" in name or name.startswith("past")) and not isinstance(value, bool | None):
                raise UnsupportedMode(
                    f"a call of {kind} with {name}",
                    "its site map says that calls hold whole texts, and a cache holds a part of them",
                    "Call it without a cache, or give the site map a read_pass.",
                )
            if "mask" in name and name != its.mask and value is not None:
                raise TokensUnknown(
                    f"a call of {kind} with {name}",
                    "its site map does not say what that is, so what is padding is unknown",
                    f"Write SiteMap(..., mask={name!r}) if it is 1 at tokens and 0 at padding, or give a read_pass.",
                )
        return Pass(ids.shape[0], ids.shape[1], 0, None, ids, mask, ids.device)

    def _read_by_hand(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        assert self._sites.read_pass is not None
        seen: Any = self._sites.read_pass(args, kwargs)
        if not isinstance(seen, Pass) or not seen.are_tokens:
            raise TokensUnknown(
                f"a call of {type(self.model).__name__}",
                f"read_pass of its site map returned a {type(seen).__name__} and no Pass of tokens",
                "Return saeguard.engines.base.Pass(rows, width, column, cache, ids, mask, device).",
            )
        if seen.cache is not None:
            try:
                weakref.ref(seen.cache)
            except TypeError as error:
                raise UnsupportedMode(
                    f"a call of {type(self.model).__name__} with a cache",
                    f"a {type(seen.cache).__name__} cannot be told from another one once it is gone",
                    "Let read_pass give an object of a class of its own as cache, the same for all passes of a text.",
                ) from error
        self._thread.cache = seen.cache
        return seen

    def _submodule(self, site: Site, path: str) -> nn.Module:
        found, known = self.model, ""
        for part in path.split(".") if path else ():
            child = dict(found.named_children()).get(part)
            if child is None:
                names = ", ".join(name for name, _ in found.named_children()) or "nothing"
                raise SiteNotFound(
                    f"site {site} at {path} in {type(self.model).__name__}",
                    f"{known or 'the model'} has no {part} inside; it has {names}",
                    "Name a module as model.named_modules() does.",
                )
            found, known = child, f"{known}.{part}" if known else part
        if found is self.model:
            raise SiteNotFound(
                f"site {site} at {path!r} in {type(self.model).__name__}",
                "that is the model itself, and what it returns has left it",
                f"Name a module inside of it: {example_for(self.model)}.",
            )
        return found

    def _check_alone(self, site: Site, at: At, module: nn.Module) -> None:
        """Rules of two sites are not joint, so that one place must not have two names."""
        for other, theirs in self._sites.near(site):
            if (theirs.side, theirs.delta) == (at.side, at.delta) and not _are_apart(theirs.item, at.item):
                try:
                    same = self.model.get_submodule(theirs.path) is module
                except AttributeError:
                    continue
                if same:
                    raise SiteNotFound(
                        f"site {site} in {type(self.model).__name__}",
                        f"{other} is the same place ({at.path}), and rules of two sites do not see each other",
                        "Give a place one name.",
                    )


def _are_apart(a: int | str | None, b: int | str | None) -> bool:
    """Whether two items of one module are surely two tensors; the first one may have any name."""
    return a is not None and b is not None and type(a) is type(b) and a != b


def _accept(model: Any) -> nn.Module:
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"steering {kind} by a site map", "it is no nn.Module", "Give the module inside of it.")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise CompiledModel(
            f"steering {kind}",
            "it is compiled, and may have been traced without hooks",
            "Steer the original model first, and compile or call the compiled one inside the block.",
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UnsupportedModel(
            f"steering {kind}", f"it wraps a {type(model.module).__name__}", "Steer the wrapped model (wrapper.module)."
        )
    check_parallel(model)
    if "__nnsight__" in vars(model) or any(one.__name__ == "TransformerBridge" for one in type(model).__mro__):
        raise UnsupportedModel(
            f"steering {kind} by a site map",
            "nnsight or TransformerLens run it in a way of their own",
            "Leave out layout=, or give a model that they have not wrapped.",
        )
    can_generate: Any = getattr(model, "can_generate", None)
    if callable(can_generate) and can_generate():
        raise UnsupportedModel(
            f"steering {kind} by a site map",
            "transformers generates with it, and a site map does not read caches, beams or prompts",
            "Pass layout=Layout(blocks='path.to.blocks', streams={'mlp_out': ('mlp', 'output')}).",
        )
    return model


def _width(module: nn.Module, side: Side) -> int | None:
    """How wide what a module is given or gives is, where its own attributes leave no doubt."""
    if isinstance(module, nn.Sequential) and len(module):
        return _width(module[0 if side == "input" else -1], side)
    if isinstance(shape := getattr(module, _ONE_SHAPE, None), tuple) and len(shape) == 1:
        return shape[0]
    found = (getattr(module, name, None) for name in _WIDTHS[side])
    return next((value for value in found if isinstance(value, int)), None)


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``forward`` by name, in its order, those without one by their number."""
    signature = inspect.signature(model.forward)
    found: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        match signature.parameters[name].kind:
            case inspect.Parameter.VAR_POSITIONAL:
                found |= {f"{name}[{n}]": one for n, one in enumerate(value)}
            case inspect.Parameter.VAR_KEYWORD:
                found |= value
            case _:
                found[name] = value
    return found


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among values, and in the lists and dicts among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
