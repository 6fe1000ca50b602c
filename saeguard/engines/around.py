"""What an engine leaves to the Hugging Face engine of the transformers model that its framework has wrapped."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from saeguard.engines.base import Outcome, Reader, Request
from saeguard.engines.hf import HuggingFace
from saeguard.engines.layouts import Layout


class Around:
    """An engine around a transformers model; what is different in its framework is in the classes made from this."""

    def __init__(self, model: nn.Module, layout: Layout | None = None):
        self.model = model
        self._wrapped = HuggingFace(model, layout)

    def value_bias(self, layer: int, *, with_norm: bool) -> Tensor | None:
        return self._wrapped.value_bias(layer, with_norm=with_norm)

    def centers(self) -> bool:
        return self._wrapped.centers()

    def model_names(self) -> tuple[str, ...]:
        return self._wrapped.model_names()

    def model_shape(self) -> dict[str, Any]:
        return self._wrapped.model_shape()

    def special_ids(self) -> frozenset[int]:
        return self._wrapped.special_ids()

    def read_cache(self, output: Any) -> Any:
        return self._wrapped.read_cache(output)

    def read_request(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request:
        return self._wrapped.read_request(args, kwargs)

    def read_outcome(self, output: Any, request: Request) -> Outcome | None:
        return self._wrapped.read_outcome(output, request)

    def entrances(self) -> Sequence[tuple[nn.Module, Reader]]:
        return self._wrapped.entrances()

    def is_generating(self) -> bool:
        return self._wrapped.is_generating()
