"""One adapter per framework; each turns sites into places and says what a call's tokens are."""

from torch import nn

from saeguard.engines.base import Engine, Model
from saeguard.engines.hf import HuggingFace
from saeguard.engines.layouts import Layout
from saeguard.engines.module import Module
from saeguard.engines.sitemaps import SiteMap
from saeguard.errors import UnsupportedModel


def engine_for(model: Model, layout: Layout | SiteMap | None = None) -> Engine:
    """The engine for ``model``, by its type, or by a site map. Raises `UnsupportedModel`, `CompiledModel`."""
    if isinstance(layout, SiteMap):
        return Module(model, layout)
    if _is_of(model, "nnsight") or "__nnsight__" in vars(model):  # what nnsight has wrapped once hands its streams on
        from saeguard.engines.nnsight import NNsight

        return NNsight(model, layout)
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(
            f"steering {type(model).__name__}",
            "it is not a torch module, nor one of nnsight's models",
            "Steer the model inside it.",
        )
    if _is_of(model, "transformer_lens"):  # an extra: whoever has such a model has it installed
        from saeguard.engines.hooked import Hooked, hooked_kind
        from saeguard.engines.lens import Lens

        return Lens(model, layout) if hooked_kind(model) is None else Hooked(model, layout)
    if _is_of(model, "peft"):
        from saeguard.engines.adapters import without_adapters

        return HuggingFace(without_adapters(model), layout)
    return HuggingFace(model, layout)


def _is_of(model: Model, package: str) -> bool:
    """Whether the model's class, or one that it is made from, is of a package."""
    return any(kind.__module__.partition(".")[0] == package for kind in type(model).__mro__)
