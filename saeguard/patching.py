"""Activation patching through latents: what they were in one run is put into another, row by row and token by token.

    f'[row, p, j] = values[row, p, j]        at real token p of the row, for the latents that are patched
    x' = x + (f' - f) @ W_dec                everything that these latents do not explain stays

It is a clamp whose value differs from token to token, which no plan can say: a plan is data, and these numbers belong
to one batch. All else is as in a steer block: special tokens stay as they are unless they are asked for, an edit that
did not run raises, blocks nest, and `report` says what was edited. Gradients flow into ``values``: there they are
dL/df.

Each value that counts has to find its token in some pass of the block, or the end of the block raises: a value behind
the last token of its row, where only padding is, would change nothing and say nothing. Whoever has values for rows of
unequal length says with ``where`` which of them count; what `read_latents` found says so itself:
``interchange(model, sae, found.f, latents, where=found.known[..., None])``.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saeguard.axes import Fired, Mask, Stream
from saeguard.capturing import capture
from saeguard.editor import Edit, Editor, PartEdit
from saeguard.engines import engine_for
from saeguard.engines.base import Engine, Model
from saeguard.engines.corrections import on_plain_weights
from saeguard.engines.layouts import Layout
from saeguard.engines.session import join, leave
from saeguard.engines.sitemaps import SiteMap
from saeguard.errors import BadRule, PlanNeverRan, RowsMismatch, SiteNotFound
from saeguard.kernels.parts import Part
from saeguard.ops import Clamp
from saeguard.plans import Plan, Rule
from saeguard.reports import Report
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.steering import Ready, Run, prepare
from saeguard.tokens import TokenBatch, read_mask

Call = Callable[[], Any]
_MOST = 1 << 24
"""Positions that a text may have."""


@dataclass(frozen=True, eq=False)
class Reading:
    """Activations of some latents in one run, by absolute position: padding is left out.

    ``f`` is 0 behind a row's last token, where ``known`` is False.
    """

    f: Float[Tensor, "row position k"]
    known: Bool[Tensor, "row position"]


def read_latents(
    model: Model,
    sae: SAE,
    latents: Sequence[int],
    run: Call,
    *,
    site: Site | None = None,
    layout: Layout | SiteMap | None = None,
) -> Reading:
    """Activations of ``latents`` in the last call of the model that ``run()`` makes, at the SAE's site or ``site``.

    Inside a steer block they are those after its edits. They are on the CPU, without gradients. Raises what `capture`
    raises, `LatentOutOfRange`, and `SiteNotFound` where nobody says where the SAE reads.
    """
    reads = _reads(sae, site)
    with torch.no_grad(), capture(model, reads, layout=layout) as tape:
        run()
    engine = engine_for(model, layout)
    plain = on_plain_weights(sae.to(device="cpu"), engine, reads, sae.site_out or reads)
    found, real = plain.encode_at(tape[reads], list(latents)), tape.real(reads)
    longest = int(real.sum(1).max())
    f, known = found.new_zeros(len(real), longest, len(latents)), torch.zeros(len(real), longest, dtype=torch.bool)
    for row, mine in enumerate(real):
        n = int(mine.sum())
        f[row, :n], known[row, :n] = found[row, mine], True
    return Reading(f, known)


@contextmanager
def interchange(
    model: Model,
    sae: SAE,
    values: Float[Tensor, "row position k"],
    latents: Sequence[int],
    *,
    positions: Sequence[int] | None = None,
    where: Bool[Tensor, "#row #position #k"] | None = None,
    site: Site | None = None,
    site_out: Site | None = None,
    special: bool = False,
    tokenizer: Any = None,
    special_ids: Iterable[int] | None = None,
    layout: Layout | SiteMap | None = None,
) -> Iterator[Run]:
    """Set ``latents`` to ``values`` in every forward pass of ``model`` inside the block, and leave no trace after it.

    ``values`` are in activation units; its second axis counts real tokens of a row from 0, or is about ``positions``.
    ``where`` says which of them to use, by default all: tokens beyond, and those that it leaves out, keep their bits.
    There is one row of values for each row of the batch. Special tokens stay as they are without ``special``; listed in
    ``positions`` they are asked for, and refused.

    Raises `BadRule` for values that are not finite or do not fit their latents, `RowsMismatch`, and what `steer`
    raises; at the end of the block `PlanNeverRan` where a value that ``where`` counts, of whatever row, found no token
    in any pass, and `BadRule` where one at a listed position found special tokens only.
    """
    rule = Rule(sae.name, tuple(latents), Clamp(0.0, when="always"), site=site, site_out=site_out, special=special)
    patch = _Patch.of(values, latents, positions, where)
    plans = [Plan((rule,))] * len(values)
    ready = prepare(
        model, plans, every_row=False, saes=sae, tokenizer=tokenizer, special_ids=special_ids, layout=layout
    )
    (out,) = ready.editors
    editor = _PatchEditor(out, ready, patch)
    run = _PatchRun(plans, replace(ready, editors={out: editor}), every_row=False, prompt_tokens=None)
    session = join(ready.engine, run, ready.places)
    try:
        yield run
    finally:
        leave(session, run)
    if not run.calls:
        raise PlanNeverRan(
            f"{len(latents)} latents of {sae.name} to be patched", "the block ended and the model was not called in it",
            "Call the model inside the block.",
        )  # fmt: skip
    editor.check(f"{len(latents)} latents of {sae.name} to be patched")


def patch(
    model: nn.Module,
    sae: SAE,
    inputs: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    latents: Sequence[int],
    *,
    positions: Sequence[int] | None = None,
    site: Site | None = None,
    special: bool = False,
    tokenizer: Any = None,
    layout: Layout | SiteMap | None = None,
) -> Any:
    """The model's output on ``inputs`` with ``latents`` as they are on ``source``: an interchange intervention.

    Both are arguments of the model by name; ``input_ids`` are given to bridges of TransformerLens as the ``input`` that
    they take. Rows belong together one by one. Without ``positions`` every token is patched, special ones only on
    request, and rows have to be equally long. Raises `RowsMismatch`, `BadRule`, and what `interchange` raises.
    """
    found = read_latents(model, sae, latents, lambda: model(**_as_called(model, source)), site=site, layout=layout)
    theirs, (rows, ours) = found.known.sum(1), _lengths(engine_for(model, layout), inputs)
    if rows != len(theirs):
        raise RowsMismatch(
            f"{rows} rows patched from {len(theirs)}", "each row needs one to be patched from",
            "Give as many rows in both.",
        )  # fmt: skip
    _check_lengths(theirs if ours is None else ours, theirs, positions)
    listed = None if positions is None else _listed(positions)
    with interchange(
        model, sae, found.f if listed is None else found.f[:, listed], latents, positions=listed,
        where=None if listed is not None else found.known[..., None], site=site, special=special, tokenizer=tokenizer,
        layout=layout,
    ) as run:  # fmt: skip
        output = model(**_as_called(model, inputs))
        table = run.calls[-1].table(run.rules[0].site) if run.calls else None
        if ours is None and table is not None:
            _check_lengths(table.real.sum(1), theirs, positions)
    return output


@dataclass(frozen=True, eq=False)
class _Patch:
    """What to put where; ``column`` says, by absolute position, where in ``values`` a token's are, -1 for nowhere."""

    values: Float[Tensor, "row position k"]
    wanted: Bool[Tensor, "row position k"]
    column: Tensor
    positions: tuple[int, ...]
    """The absolute position of each column."""
    are_listed: bool
    """Whether somebody named the positions, so that special tokens among them are no accident."""

    @classmethod
    def of(
        cls, values: Tensor, latents: Sequence[int], positions: Sequence[int] | None, where: Tensor | None
    ) -> "_Patch":
        if not isinstance(values, Tensor) or values.ndim != 3 or values.is_complex() or not len(values):
            raise BadRule(
                f"values of {_shown(values)}", "they are no numbers by row, position and latent",
                "Give rows x positions x latents: values[:, None] for one position.",
            )  # fmt: skip
        n, k = values.shape[1:]
        listed = list(range(n)) if positions is None else _listed(positions)
        if (n, k) != (len(listed), len(latents)):
            raise BadRule(
                f"values of shape {tuple(values.shape)} for {len(latents)} latents",
                f"positions are {'as many' if positions is None else listed}", "Give rows x positions x latents.",
            )  # fmt: skip
        wanted = _wanted(where, values)
        if not bool(torch.isfinite(values.detach())[wanted].all()):
            raise BadRule("values to be patched", "some are NaN or infinite", "Leave those out with where=....")
        column = torch.full((max(listed, default=-1) + 2,), -1)
        column[torch.tensor(listed, dtype=torch.long)] = torch.arange(n)
        return cls(values, wanted, column, tuple(listed), positions is not None)

    def places(self, tokens: TokenBatch) -> tuple[Int[Tensor, "batch 1"], Int[Tensor, "batch pos"]]:
        """Per token of a pass its row and column in ``values``, column -1 for none."""
        absolute = tokens.absolute.cpu().clamp(0, len(self.column) - 1)
        rows = torch.arange(len(absolute)) // (len(absolute) // len(self.values))
        return rows[:, None], self.column[absolute]  # the last entry stands for all tokens beyond

    def at(self, tokens: TokenBatch, device: torch.device) -> tuple[Float[Tensor, "batch pos k"], Fired]:
        """Per token of a pass its values, and which of them count."""
        rows, column = self.places(tokens)
        place = rows.to(self.values.device), column.clamp(min=0).to(self.values.device)
        wanted = self.wanted[place] & (column >= 0).to(self.values.device)[..., None]
        return self.values[place].to(device).float(), wanted.to(device)


class _PatchEditor(Editor):
    """An editor of one clamp whose values are looked up token by token."""

    def __init__(self, site: Site, ready: Ready, patch: _Patch):
        super().__init__(site, ready.rules, ready.saes, device=ready.places[site].device)
        self._patch = patch
        self._met: set[tuple[int, int]] = set()
        self._selected: set[tuple[int, int]] = set()
        """Rows and columns of the values that a real token of a pass, or one that was patched, belonged to."""

    def check(self, asked: str) -> None:
        """Raise `PlanNeverRan` or `BadRule` where a value that counts was put nowhere."""
        wanted = {(row, column) for row, column in self._patch.wanted.any(-1).nonzero().tolist()}
        if missed := sorted(wanted - self._met):
            raise PlanNeverRan(
                asked, f"{self._named(missed)} came in no pass of the block",
                "Positions count real tokens of a row from 0; where=... says which values count, and in rows of "
                "unequal length those behind the last token, where padding may be, do not.",
            )  # fmt: skip
        if self._patch.are_listed and (missed := sorted(wanted - self._selected)):
            raise BadRule(
                asked, f"{self._named(missed)} is a special token, and those stay as they are",
                "Say special=True to patch special tokens too, or leave it out of positions or where.",
            )  # fmt: skip

    def _named(self, missed: Sequence[tuple[int, int]]) -> str:
        row, column = missed[0]
        more = f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""
        return f"position {self._patch.positions[column]} of row {row}{more}"

    def _note(self, tokens: TokenBatch, selected: Mask) -> None:
        rows, columns = (found.expand(tokens.absolute.shape) for found in self._patch.places(tokens))
        for noted, which in ((self._met, tokens.real.cpu()), (self._selected, selected.cpu())):
            here = which & (columns >= 0)
            noted.update(zip(rows[here].tolist(), columns[here].tolist(), strict=True))

    def __call__(self, y: Stream, tokens: TokenBatch, covers: Bool[Tensor, "batch rules"],
                 streams: Mapping[Site, Tensor] | None = None, memory: Any = None) -> Edit:  # fmt: skip
        (reads, members, _, _), part = self._parts[0], self._part_on(0, y.device)
        assert isinstance(part, Part)
        x = {**(streams or {}), self.site: y}[reads].to(y.device).float()
        with torch.autocast(y.device.type, enabled=False):
            values, wanted = self._patch.at(tokens, y.device)
            selected = tokens.select(self.rules[0].rule.where)[..., None].to(y.device) & covers.to(y.device)[:, None]
            self._note(tokens, selected[..., 0])
            read = part.sae.read(x)
            change = values - part.sae.activate(read.x)
            df = torch.where(selected & wanted, change, 0.0)
            dx = df @ part.W_dec
            dx = dx if read.scale is None else dx * read.scale
        selected = selected & wanted.any(-1, keepdim=True)
        changed = (df != 0).any(-1)
        if dx.requires_grad:  # as in Editor
            dx, changed = -(0.0 - dx), selected[..., 0]
        return Edit(dx, changed, (PartEdit(part, members, selected, df, read.scale),))


class _PatchRun(Run):
    """A block that patches: the clamp of its rule is none of the numbers that are set."""

    @property
    def report(self) -> Report:
        """What was edited so far."""
        found = super().report
        said = str(self.rules[0].rule).partition(" on ")[2]
        return replace(found, rules=tuple(replace(rule, rule=f"interchange on {said}") for rule in found.rules))


def _reads(sae: SAE, site: Site | None) -> Site:
    reads = site or sae.site
    if reads is None:
        raise SiteNotFound(f"the site of {sae.name}", "it names none", "Say site=Site('resid_post', 12).")
    return reads


def _as_called(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``inputs`` by the names that ``model`` has for them: token ids are ``input_ids``, and ``input`` in bridges."""
    names = inspect.signature(model.forward).parameters
    renamed = {one: other for one, other in (("input_ids", "input"), ("input", "input_ids"))
               if one not in names and other in names and other not in inputs}  # fmt: skip
    return {renamed.get(name, name): value for name, value in inputs.items()}


def _lengths(engine: Engine, inputs: Mapping[str, Tensor]) -> tuple[int, Tensor | None]:
    """How many rows there are, and real tokens per row; None where that is known only once the model has run."""
    seen = engine.read_pass((), _as_called(engine.model, inputs))
    found = read_mask(seen.mask, seen.rows, seen.width, seen.column) if seen.are_tokens else None
    if found is None:
        return seen.rows, None
    real, absolute = found
    return seen.rows, torch.where(real, absolute + 1, 0).amax(1).cpu()


def _check_lengths(ours: Tensor, theirs: Tensor, positions: Sequence[int] | None) -> None:
    if positions is None and not torch.equal(ours, theirs):
        raise BadRule(
            "patching every token", f"rows have {ours.tolist()} tokens and are patched from {theirs.tolist()}",
            "Say which tokens: positions=[...].",
        )  # fmt: skip
    shortest = int(torch.minimum(ours, theirs).min())
    if wrong := [p for p in positions or () if not 0 <= p < shortest]:
        raise BadRule(
            f"patching at positions {wrong}", f"the shortest row has {shortest} real tokens",
            "Positions count real tokens of a row from 0.",
        )  # fmt: skip


def _listed(positions: Sequence[int]) -> list[int]:
    try:
        found = [index(p) for p in positions]
    except TypeError:
        found = []
    if not found or len(set(found)) != len(found) or not 0 <= min(found) <= max(found) < _MOST:
        raise BadRule(
            f"positions={positions!r}", f"positions are {found or 'no ints, or none'}",
            "Give every position once, from 0; None is for all.",
        )  # fmt: skip
    return found


def _wanted(where: Tensor | None, values: Tensor) -> Bool[Tensor, "row position k"]:
    if where is None:
        return torch.ones_like(values, dtype=torch.bool)
    try:
        if where.dtype == torch.bool:
            return where.to(values.device).expand(values.shape)
    except (AttributeError, RuntimeError):  # no tensor, or one of another shape
        pass
    raise BadRule(
        f"where={_shown(where)} for values of {_shown(values)}", "it does not say yes or no of each value",
        "Give a bool tensor of rows x positions x latents; an axis of size 1 is for all.",
    )  # fmt: skip


def _shown(value: Any) -> str:
    return f"shape {tuple(value.shape)} in {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
