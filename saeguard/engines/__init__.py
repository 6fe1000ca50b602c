"""One adapter per framework; each turns sites into places and says what a call's tokens are."""

from torch import nn

from saeguard.engines.base import Engine
from saeguard.engines.hf import HuggingFace
from saeguard.engines.layouts import Layout


def engine_for(model: nn.Module, layout: Layout | None = None) -> Engine:
    """The engine for ``model``, by its type. Raises `UnsupportedModel`, `CompiledModel`."""
    if any(kind.__module__.partition(".")[0] == "transformer_lens" for kind in type(model).__mro__):
        from saeguard.engines.lens import Lens  # an extra: whoever has such a model has it installed

        return Lens(model, layout)
    return HuggingFace(model, layout)
