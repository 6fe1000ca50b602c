"""Activation patching through latents: what they were in one run is put into another, row by row and token by token.

    f'[row, p, j] = values[row, p, j]        at real token p of the row, for the latents that are patched
    x' = x + (f' - f) @ W_dec                everything that these latents do not explain stays

It is a clamp whose value differs from token to token, which no plan can say: a plan is data, and these numbers belong
to one batch. All else is as in a steer block: special tokens stay as they are unless they are asked for, an edit that
did not run raises, blocks nest, and `report` says what was edited. Gradients flow into ``values``: there they are
dL/df.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saeguard.axes import Fired, Stream
from saeguard.capturing import capture
from saeguard.editor import Edit, Editor, PartEdit
from saeguard.engines import engine_for
from saeguard.engines.base import Model
from saeguard.engines.corrections import on_plain_weights
from saeguard.engines.layouts import Layout
from saeguard.engines.session import join, leave
from saeguard.errors import BadRule, PlanNeverRan, RowsMismatch, SiteNotFound
from saeguard.kernels.parts import Part
from saeguard.ops import Clamp
from saeguard.plans import Plan, Rule
from saeguard.reports import Report
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.steering import Ready, Run, prepare
from saeguard.tokens import TokenBatch

Call = Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Reading:
    """Activations of some latents in one run, by absolute position: padding is left out.

    ``f`` is 0 behind a row's last token, where ``known`` is False.
    """

    f: Float[Tensor, "row position k"]
    known: Bool[Tensor, "row position"]


def read_latents(
    model: Model, sae: SAE, latents: Sequence[int], run: Call, *, site: Site | None = None, layout: Layout | None = None
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
    layout: Layout | None = None,
) -> Iterator[Run]:
    """Set ``latents`` to ``values`` in every forward pass of ``model`` inside the block, and leave no trace after it.

    ``values`` are in activation units; its second axis counts real tokens of a row from 0, or is about ``positions``.
    ``where`` says which of them to use, by default all: tokens beyond, and those that it leaves out, keep their bits.
    There is one row of values for each row of the batch. Raises `BadRule` for values that are not finite or do not fit
    their latents, `RowsMismatch`, and what `steer` raises.
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
    layout: Layout | None = None,
) -> Any:
    """The model's output on ``inputs`` with ``latents`` as they are on ``source``: an interchange intervention.

    Rows belong together one by one. Without ``positions`` every token is patched, special ones only on request, and
    rows have to be equally long. Raises `RowsMismatch`, `BadRule`, and what `interchange` raises.
    """
    found = read_latents(model, sae, latents, lambda: model(**source), site=site, layout=layout)
    ours, theirs = _lengths(inputs), found.known.sum(1)
    if len(ours) != len(theirs):
        raise RowsMismatch(
            f"{len(ours)} rows patched from {len(theirs)}", "each row needs one to be patched from",
            "Give as many rows in both.",
        )  # fmt: skip
    if positions is None and not torch.equal(ours.cpu(), theirs):
        raise BadRule(
            "patching every token", f"rows have {ours.tolist()} tokens and are patched from {theirs.tolist()}",
            "Say which tokens: positions=[...].",
        )  # fmt: skip
    shortest = int(torch.minimum(ours.cpu(), theirs).min())
    wrong = [p for p in positions or () if not 0 <= p < shortest]
    if wrong:
        raise BadRule(
            f"patching at positions {wrong}", f"the shortest row has {shortest} real tokens",
            "Positions count real tokens of a row from 0.",
        )  # fmt: skip
    values = found.f if positions is None else found.f[:, list(positions)]
    with interchange(
        model, sae, values, latents, positions=positions, site=site, special=special, tokenizer=tokenizer, layout=layout
    ):
        return model(**inputs)


@dataclass(frozen=True, eq=False)
class _Patch:
    """What to put where; ``column`` says, by absolute position, where in ``values`` a token's are, -1 for nowhere."""

    values: Float[Tensor, "row position k"]
    wanted: Bool[Tensor, "row position k"]
    column: Tensor

    @classmethod
    def of(
        cls, values: Tensor, latents: Sequence[int], positions: Sequence[int] | None, where: Tensor | None
    ) -> "_Patch":
        rows, n, k = values.shape
        listed = list(range(n)) if positions is None else list(positions)
        if (n, k) != (len(listed), len(latents)) or len(set(listed)) != n or min(listed, default=0) < 0 or not rows:
            raise BadRule(
                f"values of shape {tuple(values.shape)} for {len(latents)} latents",
                f"positions are {'as many' if positions is None else listed}",
                "Give rows x positions x latents, and every position once, from 0.",
            )
        wanted = torch.ones_like(values, dtype=torch.bool) if where is None else where.to(values.device)
        wanted = wanted.expand(values.shape)
        if not bool(torch.isfinite(values.detach())[wanted].all()):
            raise BadRule("values to be patched", "some are NaN or infinite", "Leave those out with where=....")
        column = torch.full((max(listed, default=-1) + 2,), -1)
        column[torch.tensor(listed, dtype=torch.long)] = torch.arange(n)
        return cls(values, wanted, column)

    def at(self, tokens: TokenBatch, device: torch.device) -> tuple[Float[Tensor, "batch pos k"], Fired]:
        """Per token of a pass its values, and which of them count."""
        absolute = tokens.absolute.cpu().clamp(0, len(self.column) - 1)
        column = self.column[absolute]  # the last entry stands for all tokens beyond
        rows = torch.arange(len(absolute)) // (len(absolute) // len(self.values))
        place = rows[:, None].to(self.values.device), column.clamp(min=0).to(self.values.device)
        wanted = self.wanted[place] & (column >= 0).to(self.values.device)[..., None]
        return self.values[place].to(device).float(), wanted.to(device)


class _PatchEditor(Editor):
    """An editor of one clamp whose values are looked up token by token."""

    def __init__(self, site: Site, ready: Ready, patch: _Patch):
        super().__init__(site, ready.rules, ready.saes, device=ready.places[site].device)
        self._patch = patch

    def __call__(self, y: Stream, tokens: TokenBatch, covers: Bool[Tensor, "batch rules"],
                 streams: Mapping[Site, Tensor] | None = None, memory: Any = None) -> Edit:  # fmt: skip
        (reads, members, _, _), part = self._parts[0], self._part_on(0, y.device)
        assert isinstance(part, Part)
        x = {**(streams or {}), self.site: y}[reads].to(y.device).float()
        with torch.autocast(y.device.type, enabled=False):
            values, wanted = self._patch.at(tokens, y.device)
            selected = tokens.select(self.rules[0].rule.where)[..., None].to(y.device) & covers.to(y.device)[:, None]
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


def _lengths(inputs: Mapping[str, Tensor]) -> Tensor:
    """Real tokens per row."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    return torch.full((len(ids),), ids.shape[1]) if mask is None else mask.sum(1)
