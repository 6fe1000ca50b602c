"""Record what flows past sites, changing nothing; composes with steering."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saeguard.axes import Stream
from saeguard.editor import Edit, Editor
from saeguard.engines import engine_for
from saeguard.engines.base import Model, Request, places_of
from saeguard.engines.calls import View
from saeguard.engines.layouts import Layout
from saeguard.engines.session import bind as bind_to
from saeguard.engines.session import join, leave
from saeguard.engines.sitemaps import SiteMap
from saeguard.errors import SiteNotFound, UnsupportedMode
from saeguard.ledger import CallRecord
from saeguard.sites import Site
from saeguard.tokens import TokenBatch

P = ParamSpec("P")
T = TypeVar("T")


class Tape:
    """What was recorded, by site; ``tape["resid_post.12"]`` is the last call's ``row column d_in``.

    Columns are those of the row's cache, padding included: `real` says which of them are tokens. A pass that starts
    at an earlier column than the last one ended takes the place of what was recorded from that column on.
    """

    def __init__(self, sites: Iterable[Site], side: Literal["before", "after"]):
        self.sites = frozenset(sites)
        self.editors: dict[Site, Editor] = {}
        self.special_ids: Int[Tensor, " n"] = torch.zeros(0, dtype=torch.long)
        self.prompt_tokens: int | tuple[int, ...] | None = None
        self._side = side
        self._record: CallRecord | None = None
        self._passes: dict[Site, list[tuple[TokenBatch, Stream]]] = {}

    def __getitem__(self, site: Site | str) -> Float[Tensor, "row column d_in"]:
        """The stream at ``site`` in the last call, on the CPU, in its own dtype."""
        return torch.cat([x for _, x in self._last(site)], dim=1)

    def real(self, site: Site | str) -> Bool[Tensor, "row column"]:
        """Which columns of ``tape[site]`` are tokens rather than padding."""
        return torch.cat([tokens.real.cpu() for tokens, _ in self._last(site)], dim=1)

    def bind(self, function: Callable[P, T]) -> Callable[P, T]:
        """``function`` for another thread: there it counts as called inside this block, while the block is open."""
        return bind_to(self, function)

    def cover(self, rows: int, request: Request | None) -> Bool[Tensor, "batch rules"]:
        """Every row, no rule."""
        return torch.zeros(rows, 0, dtype=torch.bool)

    def open_record(self, request: Request | None) -> CallRecord:
        """Start over. Raises `UnsupportedMode` for beams, whose rows trade places."""
        if request is not None and request.reorders:
            raise UnsupportedMode("capturing a beam search", "its rows trade places", "Generate without beams.")
        return CallRecord()

    def see(self, site: Site, before: Stream, after: Stream, view: View, edit: Edit | None) -> None:
        """Keep a pass."""
        if view.record is not self._record:
            self._record = view.record
            self._passes = {}
        passes, column = self._passes.setdefault(site, []), view.tokens.column
        kept = before if self._side == "before" else after
        while passes and passes[-1][0].column >= column:
            passes.pop()
        if passes:
            tokens, x = passes[-1]
            passes[-1] = tokens.upto(column), x[:, : column - tokens.column]
        passes.append((view.tokens, kept.detach().to("cpu", copy=True)))

    def _last(self, site: Site | str) -> Sequence[tuple[TokenBatch, Stream]]:
        found = Site.parse(site)
        if found not in self._passes:
            raise SiteNotFound(
                f"the recording at {found}",
                f"this tape holds {', '.join(map(str, self._passes)) or 'nothing yet'}",
                "Name the site in capture(...), and call the model inside the block.",
            )
        return self._passes[found]


@contextmanager
def capture(
    model: Model,
    sites: Site | str | Iterable[Site | str],
    *,
    side: Literal["before", "after"] = "after",
    layout: Layout | SiteMap | None = None,
) -> Iterator[Tape]:
    """Record the stream at ``sites`` in every forward pass of ``model`` inside the block.

    ``side`` says whether what open steer blocks edit is recorded before or after their edits. Outputs stay
    bit-identical. Raises `SiteNotFound`, `UnsupportedModel`, `ModelBusy`.
    """
    engine = engine_for(model, layout)
    named: Iterable[Any] = [sites] if isinstance(sites, Site | str) else sites
    wanted = dict.fromkeys(Site.parse(site) for site in named)
    places = places_of(engine, wanted)
    tape = Tape(wanted, side)
    session = join(engine, tape, places)
    try:
        yield tape
    finally:
        leave(session, tape)
