"""What reads a site next, the final norm included: where a check watches whether edits arrive."""

from torch import nn

from saeguard.engines.base import Engine
from saeguard.engines.readers import Reader
from saeguard.engines.readers import reader_of as next_reader
from saeguard.errors import UnsupportedModel
from saeguard.scoring.logit_lens import unembedding
from saeguard.sites import Site

__all__ = ["Reader", "reader_of"]


def reader_of(model: nn.Module, engine: Engine, site: Site) -> Reader:
    """The module that reads ``site`` next. Raises what `Engine.resolve` raises."""
    try:
        last = unembedding(model).norm
    except UnsupportedModel:  # no norm behind the last block, or under a name that is not known
        last = None
    return next_reader(model, engine.resolve(site), last)
