"""What a session knows while the model runs: the blocks that take part, the call, and the pass of this moment."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from saeguard.axes import Stream
from saeguard.editor import Edit, Editor
from saeguard.engines.base import Pass, Place, Request
from saeguard.errors import (
    GuardNotApplied,
    PhaseUnknown,
    RowsMismatch,
    TokensUnknown,
    UnstableEdit,
    UnsupportedMode,
)
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


def needed_later(participants: Iterable[Participant], places: Mapping[Site, Place]) -> frozenset[Site]:
    """Sites whose streams later sites of the same pass need.

    These are kept as copies: a module may write into the stream in place once it has passed.
    """
    editors = [editor for participant in participants for editor in participant.editors.values()]
    bases = [place.base for place in places.values() if place.base is not None]
    return frozenset(bases).union(*(editor.reads for editor in editors))


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
    """The error of a stream that is not one of this pass, where it is expected now."""
    proceed = "Call the model itself, as model(...) or model.generate(...), not model.forward or a part of it."
    if forward is None:
        found = "its module ran, and no pass of the steered model is running here"
    elif site in forward.ran:
        found = "its module ran a second time in one pass"
        proceed = "A module that is edited has to run once in each pass: do not call it apart, nor put it in twice."
    else:
        passed = f"{forward.rows} rows" + ("" if forward.width is None else f" of {forward.width} tokens")
        found = f"it carries {x.shape[0]} rows of {x.shape[1]} positions there, and the pass has {passed}"
        proceed += " With a site map, say what its axes are."
    return GuardNotApplied(f"an edit at {site}", found, proceed)


def check_ran(forward: Forward) -> None:
    """Raise `GuardNotApplied` where a pass has ended and a site was not passed."""
    missing = sorted(map(str, forward.sites - forward.ran))
    if missing:
        raise GuardNotApplied(
            f"edits at {', '.join(missing)}",
            "the forward pass ended and they had not run",
            "A module was replaced, skipped or called through .forward, the pass was stopped early, or steer ended "
            "while it ran: restore it, and enter steer again.",
        )


def check_numbers(forward: Forward) -> None:
    """What can be said of a pass once its edits have run. Raises `UnstableEdit`, `GuardError`."""
    for view in forward.views.values():
        view.record.memory.check(view.tokens)
    if forward.unstable and bool(torch.stack([flag.cpu() for flag in forward.unstable]).any()):
        raise UnstableEdit(
            f"edits at {', '.join(sorted(map(str, forward.ran)))}",
            "an edited vector holds NaN or infinity",
            "Use smaller amounts, or a dtype with more range; nothing was sampled from this pass.",
        )


def check_reruns(model: nn.Module, participants: Iterable[Participant], places: Mapping[Site, Place]) -> None:
    """Refuse edits inside of what gradient checkpointing runs again in the backward pass: they would be missing there.

    Sites at the ends of a block are exact, and so is what is only recorded. Raises `UnsupportedMode`.
    """
    if not torch.is_grad_enabled():
        return
    flagged = [part for part in model.modules() if part.__dict__.get("gradient_checkpointing") is True]
    ids = {id(part) for part in flagged}
    for part in flagged:
        inner = {id(module) for module in part.modules()} - {id(part)}
        if not part.training or (inner & ids and not _runs_itself_again(part)):  # it passes the flag on to others
            continue
        edited = {site for participant in participants if participant.editors for site in participant.sites}
        edited |= {base for site in edited if site in places and (base := places[site].base) is not None}
        hit = sorted(str(site) for site in edited if site in places and id(places[site].module) in inner)
        if hit:
            raise UnsupportedMode(
                f"an edit with gradient checkpointing at {', '.join(hit)}",
                f"the backward pass runs what is inside a {type(part).__name__} again, where the edit would be missing",
                "Call model.gradient_checkpointing_disable(), edit resid_pre or resid_post, which are at the ends of "
                "a block, or use torch.no_grad().",
            )


def _runs_itself_again(part: nn.Module) -> bool:
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(part).__mro__)


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
