"""Where the sites of any module are: a map from sites to the names of its submodules.

    SiteMap({"resid_post": "transformer.h.{}"}, tokens="idx", width=768)         every block of a text model
    SiteMap({"resid_post.0": "encoder.layer.4"}, width=768)                      image tokens, without any ids
    SiteMap({"mlp_out.0": At("down_blocks.2.attentions.1", axes="batch d height width", delta=True)})

A site is what the map says: the names of streams and the numbers of layers are free, and an SAE whose file names a
site is used there. Without ``tokens`` positions are no tokens. Each site then has its own, in the order of its axes
(pixels row by row), all of them are real and none is special; ranges of positions are about them, and phases, prompts
and gates, which follow a text, are refused.

``delta`` is the update that a module makes: the SAE reads what it gives minus what it is given, and edits are added to
what it gives. The SAEs of SDXL Turbo are trained on the updates of its transformer blocks (arXiv 2410.22366).
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from saeguard.engines.base import Pass
from saeguard.engines.layouts import Side
from saeguard.errors import SiteNotFound
from saeguard.sites import STREAMS, Site

_SHOWN = 3
_BLOCKS = ("Transformer", "Block", "Layer", "Attention")


@dataclass(frozen=True)
class At:
    """One place in a module: the submodule ``path``, what it is given (``input``) or gives (``output``), in which axes.

    ``axes`` names the dimensions of the tensor there, ``batch`` and ``d`` among them; all others together are the
    positions, in the order in which they stand. ``item`` picks the tensor out of a tuple, a dict or a ModelOutput (by
    default the first one), or names the argument of an ``input`` (by default the first one). ``width`` is the size of
    ``d``, which the map has to say where the module does not. Raises `SiteNotFound`.
    """

    path: str
    side: Side = "output"
    axes: str = "batch pos d"
    delta: bool = False
    width: int | None = None
    item: int | str | None = None

    def __post_init__(self):
        names = self.axes.split()
        if len(set(names)) != len(names) or not {"batch", "d"} <= set(names):
            raise SiteNotFound(
                f"axes {self.axes!r} of {self.path!r}",
                "the axes of a place are different names, 'batch' and 'd' among them",
                "Write them as 'batch pos d', 'batch d height width' or 'batch d'.",
            )
        if isinstance(self.item, int) and self.item < 0:
            raise SiteNotFound(
                f"item {self.item} of {self.path!r}",
                "items are counted from the beginning",
                "Write 0 for the first one.",
            )
        if self.side not in ("input", "output") or self.delta and self.side == "input":
            raise SiteNotFound(
                f"the {self.side} of {self.path!r}" + (" as a delta" if self.delta else ""),
                "a delta is what a module gives minus what it is given" if self.delta else "there is no such side",
                "Use side='output'.",
            )


@dataclass(frozen=True, eq=False)
class SiteMap:
    """Sites of one module, and how its calls are read; for ``steer(model, plan, layout=SiteMap(...))``.

    A key of ``sites`` is a site, or a stream whose path holds ``{}`` for the number of the layer; a value is an `At`,
    or a path for which ``side``, ``axes`` and ``delta`` of the map hold. ``width`` is that of every place that says no
    other. ``tokens`` and ``mask`` name the arguments of ``forward`` that hold token ids and the attention mask, both
    rows x positions; a call is then one whole text. ``read_pass`` reads calls of any other kind:
    ``read_pass(args, kwargs)`` returns a `Pass`.

    Raises `SiteNotFound`.
    """

    sites: Mapping[Site | str, str | At]
    side: Side = "output"
    axes: str = "batch pos d"
    delta: bool = False
    width: int | None = None
    tokens: str | None = None
    mask: str | None = None
    read_pass: Callable[[tuple[Any, ...], Mapping[str, Any]], Pass] | None = None

    def __post_init__(self):
        if not self.sites:
            raise SiteNotFound("a site map", "it names no site", "Write SiteMap({'resid_post.0': 'path.of.a.module'}).")
        for key, value in self.sites.items():
            at = self._at(value)
            if key not in STREAMS:
                Site.parse(key)
            elif "{}" not in at.path:
                raise SiteNotFound(
                    f"{key!r} at {at.path!r} in a site map",
                    "a stream without a layer stands for all of them, and the path has no {} for their number",
                    f"Write {{'{key}': 'blocks.{{}}'}}, or one layer, {{'{key}.0': {at.path!r}}}.",
                )
        if self.mask is not None and self.tokens is None:
            raise SiteNotFound(
                f"a site map with mask={self.mask!r}",
                "it names no tokens, and a mask says which tokens are padding",
                "Name both, tokens='input_ids', or give read_pass.",
            )

    @property
    def are_tokens(self) -> bool:
        """Whether positions are tokens of a text."""
        return self.tokens is not None or self.read_pass is not None

    def find(self, site: Site) -> At | None:
        """Where a site is; a site of its own goes before a stream for all layers."""
        for key, value in self.sites.items():
            if key not in STREAMS and Site.parse(key) == site:
                return self._at(value)
        if site.stream not in self.sites:
            return None
        at = self._at(self.sites[site.stream])
        return replace(at, path=at.path.replace("{}", str(site.layer)))

    def near(self, site: Site) -> Iterator[tuple[Site, At]]:
        """The sites that may be the same place as ``site``: those that are named, and those of its layer."""
        named = [Site.parse(key) for key in self.sites if key not in STREAMS]
        for other in dict.fromkeys([*named, *(Site(stream, site.layer) for stream in STREAMS)]):
            if other != site and (at := self.find(other)) is not None:
                yield other, at

    def _at(self, value: str | At) -> At:
        at = value if isinstance(value, At) else At(value, self.side, self.axes, self.delta)
        return replace(at, width=at.width or self.width)


def example_for(model: nn.Module) -> str:
    """A site map to begin with, in the model's own names."""
    kinds = [(path, type(module).__name__) for path, module in model.named_modules() if path]
    is_image = any(isinstance(module, nn.Conv2d) for module in model.modules())
    transformers = [path for path, kind in kinds if kind.startswith("Transformer")] if is_image else []
    repeated = [] if transformers else list(_repeated(model))
    named = transformers or [path for path, kind in kinds if any(word in kind for word in _BLOCKS)]
    chosen = [f"'resid_post.{n}': '{path}'" for n, path in enumerate((named or [path for path, _ in kinds])[:_SHOWN])]
    sites = f"'resid_post': '{repeated[0]}.{{}}'" if repeated else ", ".join(chosen)
    axes = ", axes='batch d height width'" if transformers else ""
    tokens = ""
    if any(isinstance(module, nn.Embedding) for module in model.modules()):
        tokens = f", tokens={next(iter(inspect.signature(model.forward).parameters), 'ids')!r}"
    others = f" (other repeated blocks: {', '.join(repeated[1:_SHOWN])})" if repeated[1:] else ""
    sites = sites or "'resid_post.0': 'path.of.a.module'"
    return f"layout=SiteMap({{{sites}}}{axes}{tokens}, width=...){others}"


def _repeated(model: nn.Module) -> Iterator[str]:
    """Lists of at least two modules of one class, outermost first and without those inside of them."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(path.startswith(f"{one}.") for one in found):
            continue
        if path and len(module) > 1 and len({type(child) for child in module}) == 1:
            found.append(path)
            yield path
