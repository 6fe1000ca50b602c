"""What a session knows while the model runs: the blocks that take part, the call, and the pass of this moment."""

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saeguard.axes import Stream
from saeguard.editor import Edit, Editor
from saeguard.engines.base import Pass, Request
from saeguard.errors import GuardNotApplied, RowsMismatch, TokensUnknown
from saeguard.ledger import CallRecord
from saeguard.sites import Site
from saeguard.tokens import TokenBatch, is_special, last_of_prompt, read_mask


@dataclass(frozen=True, eq=False)
class View:
    """One participant's knowledge of one forward pass."""

    tokens: TokenBatch
    covers: Bool[Tensor, "batch rules"]
    record: CallRecord


@runtime_checkable
class Participant(Protocol):
    """A block that is open on a model: it edits at some sites, looks at some, or both."""

    sites: frozenset[Site]
    """Sites that it edits, reads or looks at."""
    editors: dict[Site, Editor]
    special_ids: Int[Tensor, " n"]

    @property
    def prompt_tokens(self) -> int | tuple[int, ...] | None:
        """Real tokens of the prompts of passes outside of generate, where somebody said so."""
        ...

    def cover(self, rows: int, request: Request | None) -> Bool[Tensor, "batch rules"]:
        """Which rules each forward row is under. Raises `RowsMismatch`."""
        ...

    def open_record(self, request: Request | None) -> CallRecord:
        """A fresh record of a call."""
        ...

    def see(self, site: Site, before: Stream, after: Stream, view: View, edit: Edit | None) -> None:
        """Told of every pass at every one of its sites."""
        ...


@dataclass(eq=False)
class Call:
    """A generate call, or the forward passes that share one cache."""

    request: Request | None
    blocks: tuple[Participant, ...] = ()
    """The blocks that were open when a generate call began."""
    records: dict[Participant, CallRecord] = field(default_factory=dict)
    cache: Any = None
    reached: int | None = None
    """The column after the last one that was passed."""
    rows: int | None = None

    def continues(self, seen: Pass) -> bool:
        """Whether a pass belongs to this call: an empty cache, or another number of rows, starts another one."""
        ours = self.cache is not None and seen.cache is not None and self.cache() is seen.cache
        return ours and seen.column > 0 and seen.rows == self.rows


@dataclass(eq=False)
class Forward:
    """The pass that runs now in this thread."""

    call: Call
    views: dict[Participant, View]
    rows: int
    width: int
    sites: frozenset[Site]
    """The sites that it has to pass."""
    ran: set[Site] = field(default_factory=set)
    streams: dict[Site, Stream] = field(default_factory=dict)
    """What flowed past the sites that later sites of this pass need."""
    unstable: list[Tensor] = field(default_factory=list)


def stream_at(forward: Forward, site: Site, needed_at: Site) -> Stream:
    """What flowed past ``site`` earlier in this pass."""
    if site not in forward.streams:
        raise GuardNotApplied(
            f"an edit at {needed_at} that needs the stream at {site}",
            f"{site} was not passed before {needed_at}",
            "A transcoder, or a rule with a gate, has to write behind what it reads: check the sites.",
        )
    return forward.streams[site]


def unseen(call: Call, column: int) -> GuardNotApplied:
    return GuardNotApplied(
        f"edits up to column {column}",
        f"only the passes up to column {call.reached} went through saeguard's hooks",
        "The block ended before the call did, or a compiled copy of the model ran: its output must not be used.",
    )


def tokens_of(seen: Pass, participant: Participant, request: Request | None) -> TokenBatch:
    found = read_mask(seen.mask, seen.rows, seen.width, seen.column)
    if found is None:
        raise TokensUnknown(
            f"a pass of {seen.rows} x {seen.width} tokens after {seen.column} in the cache",
            f"its attention mask is {tuple(seen.mask.shape) if seen.mask is not None else None}",
            "Give a mask of rows x (cached + new) columns.",
        )
    real, absolute = (tensor.to(seen.device) for tensor in found)
    special = None
    if seen.ids is not None:
        special = is_special(seen.ids, participant.special_ids.to(seen.ids.device))
    since, last = None, None
    if request is not None:
        columns = torch.arange(seen.column, seen.column + seen.width, device=seen.device)
        since = (columns - request.prompt_columns).expand(seen.rows, seen.width)
        last = last_of_prompt(real, seen.column, request.prompt_columns)
    elif participant.prompt_tokens is not None:
        given = participant.prompt_tokens
        if isinstance(given, tuple) and len(given) != seen.rows:
            raise RowsMismatch(
                f"prompt_tokens for {len(given)} rows",
                f"the batch has {seen.rows} rows",
                "Give one number per row, or one for all.",
            )
        lengths = torch.tensor(given, device=seen.device).view(-1, 1)
        since = absolute - lengths
        last = real & (since == -1)
    return TokenBatch(real, absolute, special, since, seen.column, seen.ids, last)
