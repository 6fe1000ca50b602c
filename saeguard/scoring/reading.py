"""The stream at one site for a batch of token rows, from a forward pass that ends there.

The hooks that look at the site are placed for one call, in this thread, and the last of them ends the pass with an
exception of ours, so that the blocks above the site never run. Hooks and exception are gone when the call returns.
"""

import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from saeguard.axes import Stream
from saeguard.engines import engine_for
from saeguard.engines.base import Place, places_of
from saeguard.engines.fit import check_model
from saeguard.engines.layouts import Layout
from saeguard.engines.session import participants
from saeguard.errors import ModelBusy, SiteNotFound, UnsupportedMode, WidthMismatch
from saeguard.sae import SAE
from saeguard.sites import Site


class SiteReader:
    """Reads what an SAE reads. Raises `SiteNotFound`, `WidthMismatch`, `WrongModel`, `UnsupportedModel`,
    `UnsupportedMode`."""

    def __init__(self, model: nn.Module, sae: SAE, *, layout: Layout | None = None):
        if sae.site is None:
            raise SiteNotFound(f"scores of {sae.name}", "it does not say at which site it reads", "Give it a site.")
        self.engine = engine_for(model, layout)
        self.model, self.site = model, sae.site
        self._places = places_of(self.engine, [sae.site])
        place = self._places[sae.site]
        self.device = place.device
        if place.width != sae.d_in:
            raise WidthMismatch(
                f"scores of {sae.name} at {sae.site}",
                f"it reads vectors of width {sae.d_in}, and {sae.site} carries width {place.width}",
                "Was this SAE trained on another model or another stream?",
            )
        check_model(sae, sae.site, self.engine)
        if model.training:
            raise UnsupportedMode(
                f"scores of {sae.name} on {type(model).__name__}",
                "the model is in training mode, whose dropout makes every pass another one",
                "Call model.eval() first.",
            )

    def read(self, ids: Int[Tensor, "batch pos"]) -> Stream:
        """The stream at the site, on the model's device; rows are padded on the right, which changes nothing before.

        Raises `ModelBusy` inside a steer block: a score is about the model as it is.
        """
        if any(participant.editors for participant in participants(self.engine.model)):
            raise ModelBusy(
                f"scores on {type(self.model).__name__}",
                "a steer block is open on it, and scores are about the model without edits",
                "Score before or after that block.",
            )
        seen: dict[Site, Tensor] = {}
        with ExitStack() as hooks:
            for place in self._places.values():
                hooks.callback(place.attach(self._keep(place, seen)).remove)
            with torch.no_grad(), suppress(_Reached):
                entry = next(self.model.parameters()).device
                self.model(input_ids=ids.to(entry), use_cache=False)
        if self.site not in seen:
            raise SiteNotFound(
                f"the stream at {self.site} of {type(self.model).__name__}", "the forward pass did not come by",
                "Report the model class: its site table is wrong.",
            )  # fmt: skip
        return seen[self.site]

    def _keep(self, place: Place, seen: dict[Site, Tensor]) -> Callable[[Stream], Stream]:
        caller = threading.get_ident()

        def keep(carried: Stream) -> Stream:
            if threading.get_ident() != caller:  # another thread uses the model at the same time
                return carried
            seen[place.site] = place.value(carried, None if place.base is None else seen[place.base]).detach()
            if place.site == self.site:
                raise _Reached
            return carried

        return keep


class _Reached(Exception):
    """Ends a forward pass whose rest nobody needs."""


def name_of(reader: SiteReader) -> str:
    """What to call the reader's model in a provenance."""
    names: Any = reader.engine.model_names()
    return names[0] if names else type(reader.model).__name__
