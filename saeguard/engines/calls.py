"""What a session knows while the model runs: the blocks that take part, the call, and the pass of this moment."""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saeguard.axes import Stream
from saeguard.editor import Edit, Editor
from saeguard.engines.base import Pass, Request
from saeguard.errors import GuardNotApplied, PhaseUnknown, RowsMismatch, TokensUnknown
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
    width: int | None
    """None where each site has positions of its own."""
    sites: frozenset[Site]
    """The sites that it has to pass."""
    ran: set[Site] = field(default_factory=set)
    streams: dict[Site, Stream] = field(default_factory=dict)
    """What flowed past the sites that later sites of this pass need."""
    unstable: list[Tensor] = field(default_factory=list)

    def fits(self, x: Stream) -> bool:
        """Whether ``x`` has the rows and positions of this pass."""
        return x.shape[0] == self.rows and self.width in (None, x.shape[1])


def stream_at(forward: Forward, site: Site, needed_at: Site, x: Tensor | None = None) -> Stream:
    """What flowed past ``site`` earlier in this pass; it has to have the positions of ``x``, where that is given."""
    if site not in forward.streams:
        raise GuardNotApplied(
            f"an edit at {needed_at} that needs the stream at {site}",
            f"{site} was not passed before {needed_at}",
            "A transcoder, or a rule with a gate, has to write behind what it reads: check the sites.",
        )
    found = forward.streams[site]
    if x is not None and x.shape[1] != found.shape[1]:
        raise GuardNotApplied(
            f"an edit at {needed_at} that needs the stream at {site}",
            f"{site} has {found.shape[1]} positions and {needed_at} has {x.shape[1]}",
            "A rule reads and writes sites of one resolution: check the site map.",
        )
    return found


def views_at(forward: Forward, x: Stream) -> dict[Participant, View]:
    """What the participants know of the positions of ``x``: all real and none special, where they are no tokens."""
    if forward.width is not None:
        return forward.views
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    absolute = torch.arange(x.shape[1], device=x.device).expand(real.shape)
    tokens = TokenBatch(real, absolute, torch.zeros_like(real), None, 0)
    return {who: replace(view, tokens=tokens) for who, view in forward.views.items()}


def misplaced(forward: Forward | None, site: Site, x: Stream) -> GuardNotApplied:
    found = "its block ran outside a call of the steered model, or twice in one call"
    proceed = "Call the model itself, as model(...) or model.generate(...), not model.forward or a part of it."
    if forward is not None and site not in forward.ran:
        passed = f"{forward.rows} rows" + ("" if forward.width is None else f" of {forward.width} tokens")
        found = f"it carries {x.shape[0]} rows of {x.shape[1]} positions there, and the pass has {passed}"
        proceed += " With a site map, say what its axes are."
    return GuardNotApplied(f"an edit at {site}", found, proceed)


def unseen(call: Call, column: int) -> GuardNotApplied:
    return GuardNotApplied(
        f"edits up to column {column}",
        f"only the passes up to column {call.reached} went through saeguard's hooks",
        "The block ended before the call did, or a compiled copy of the model ran: its output must not be used.",
    )


def tokens_of(seen: Pass, participant: Participant, request: Request | None) -> TokenBatch:
    if not seen.are_tokens and participant.prompt_tokens is not None:
        raise PhaseUnknown(
            f"prompt_tokens={participant.prompt_tokens} of a pass without tokens",
            "its positions are no text, and none of them is a prompt",
            "Leave prompt_tokens out, or name the tokens in the site map: SiteMap(..., tokens='input_ids').",
        )
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
