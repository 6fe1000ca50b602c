"""Check on a live model what steering promises, by computing both sides of each claim and comparing them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saeguard.drawing.scene import Proof, Take, play
from saeguard.kernels.pick import KernelName
from saeguard.plans import Plan
from saeguard.sae import SAE
from saeguard.steering import Run, steer

LOGIT_TOLERANCE = 1e-2
"""Largest difference of a logit between two ways to compute one thing in float32; logits are some tens large."""

Hooks = dict[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Case:
    """A batch that ran plain and steered, and what is needed to run it again in another way."""

    model: nn.Module
    tokenizer: Any
    plans: tuple[Plan | None, ...]
    saes: Mapping[str, SAE]
    plain: Take
    steered: Take
    hooks_before: Hooks


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass over the whole text of a take: the logits and the run."""

    logits: Tensor
    run: Run


def prove(case: Case, *, tick: Callable[[str], None] = lambda claim: None) -> tuple[Proof, ...]:
    """All checks, in the order in which they are shown; ``tick`` is told what is being checked."""
    tick("rows without a plan")
    proofs = [unsteered_rows_are_untouched(case)]
    tick("cached against uncached")
    whole = one_pass(case)
    proofs.append(cached_equals_uncached(case, whole))
    tick("batched against solo")
    proofs.append(batched_equals_solo(case))
    tick("sliced kernel against reference")
    proofs.append(sliced_equals_reference(case, whole, one_pass(case, kernel="reference")))
    tick("nothing left behind")
    proofs.append(nothing_is_left_behind(case))
    return tuple(proofs)


def unsteered_rows_are_untouched(case: Case) -> Proof:
    """Rows without a plan have the bits of the plain run of the same batch, in every logit of every step."""
    rows = [row for row, plan in enumerate(case.plans) if plan is None]
    compared, equal = 0, bool(rows)
    for row in rows:
        for step in range(min(len(_written(case.plain, row)), len(case.steered.logits))):
            theirs, ours = case.plain.logits[step][row], case.steered.logits[step][row]
            compared += theirs.numel()
            equal &= bool(torch.equal(theirs, ours))
        equal &= bool(torch.equal(_written(case.plain, row), _written(case.steered, row)))
    found = f"{compared:,} logits of {_rows(rows)} compared bit by bit with the plain model"
    return Proof("A row without a plan is bit-identical to the plain model", found, equal)


def cached_equals_uncached(case: Case, whole: Pass) -> Proof:
    """One pass over the whole text, without a cache, picks the tokens that cached decoding picked, and edits alike.

    By induction that is what greedy decoding without a cache would have written.
    """
    rows = range(len(case.plans))
    written = [_written(case.steered, row) for row in rows]
    same = all(torch.equal(_picked(case.steered, whole, row), written[row]) for row in rows)
    n_tokens = sum(map(len, written))
    alike, n_edits = _same_edits(case, whole.run)
    found = f"{n_tokens} next tokens {_equal(same)}, {n_edits} edits {_equal(alike)}"
    return Proof("Decoding with a cache equals one pass without it", found, same and alike)


def batched_equals_solo(case: Case) -> Proof:
    """Each row alone, without padding, picks the same tokens and is edited at the same positions."""
    same = alike = True
    n_tokens = n_edits = 0
    for row in range(len(case.plans)):
        solo = one_pass(case, row=row)
        picked, written = _picked(case.steered, solo, row), _written(case.steered, row)
        same &= bool(torch.equal(picked, written))
        alike &= edits(case.steered.run, row) == edits(solo.run, 0)
        n_tokens += len(written)
        n_edits += len(edits(solo.run, 0))
    found = f"{n_tokens} next tokens {_equal(same)}, {n_edits} edits {_equal(alike)}, row by row without padding"
    return Proof("A row in the batch equals the row alone", found, same and alike)


def sliced_equals_reference(case: Case, fast: Pass, slow: Pass) -> Proof:
    """The fast kernel edits what the slow float64 kernel edits, and no logit is far off."""
    alike = all(edits(fast.run, row) == edits(slow.run, row) for row in range(len(case.plans)))
    n_edits = sum(len(edits(slow.run, row)) for row in range(len(case.plans)))
    real = _mask(case.steered)[:, :-1]
    largest = float((fast.logits - slow.logits)[real].abs().max())
    found = f"{n_edits} edits {_equal(alike)}, largest difference of any logit {largest:.1e} (limit {LOGIT_TOLERANCE})"
    return Proof("The sliced kernel equals the reference kernel", found, alike and largest <= LOGIT_TOLERANCE)


def nothing_is_left_behind(case: Case) -> Proof:
    """The model has the hooks that it had before, and answers the prompts with the same bits."""
    clean = hooks(case.model) == case.hooks_before
    again = play(
        case.model, case.plain.batch, None, tokenizer=case.tokenizer, saes={}, sites=(), max_new_tokens=1
    )  # fmt: skip
    equal = bool(torch.equal(again.logits[0], case.plain.logits[0]))
    number = sum(map(len, case.hooks_before.values()))
    found = f"{number} hooks before, {sum(map(len, hooks(case.model).values()))} after; first logits {_equal(equal)}"
    return Proof("Nothing is left on the model afterwards", found, clean and equal)


def hooks(model: nn.Module) -> Hooks:
    """The forward hooks of every module that has some, and whether ``generate`` is replaced."""
    found = {
        name: (*module._forward_pre_hooks, *module._forward_hooks)
        for name, module in model.named_modules()
        if module._forward_pre_hooks or module._forward_hooks
    }
    return found | ({"generate": (0,)} if "generate" in vars(model) else {})


def one_pass(case: Case, *, row: int | None = None, kernel: KernelName | None = None) -> Pass:
    """The model over the steered text as a whole, or over one row without its padding; same plans, no cache."""
    take, mask = case.steered, _mask(case.steered)[:, :-1]
    ids, plans, lengths = take.ids[:, :-1], list(case.plans), take.batch.attention_mask.sum(1)
    if row is not None:
        ids, plans, lengths = ids[row, mask[row]][None], [case.plans[row]], lengths[row : row + 1]
        mask = torch.ones_like(ids, dtype=torch.bool)
    with (
        torch.no_grad(),
        steer(
            case.model, plans, saes=case.saes, tokenizer=case.tokenizer, kernel=kernel, prompt_tokens=lengths.tolist()
        ) as run,
    ):
        output = case.model(
            input_ids=ids, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False
        )
    return Pass(output.logits, run)


def edits(run: Run, row: int) -> frozenset[tuple[str, int]]:
    """Which rule changed which absolute position of a row, in the run's first call."""
    rules = run.report.rules
    return frozenset((rule.rule, place) for rule in rules for place in rule.edited_positions[0][row])


def _written(take: Take, row: int) -> Tensor:
    """What a row wrote, with the token that ended it."""
    prompt, stop = take.batch.input_ids.shape[1], min(int(take.ends[row]) + 1, take.ids.shape[1])
    return take.ids[row, prompt:stop]


def _picked(take: Take, whole: Pass, row: int) -> Tensor:
    """The likeliest next token wherever a row wrote one, according to one pass over its text."""
    n_prompt = int(take.batch.attention_mask[row].sum())
    padding = 0 if len(whole.logits) == 1 else take.batch.input_ids.shape[1] - n_prompt
    first = padding + n_prompt - 1
    logits = whole.logits[0 if len(whole.logits) == 1 else row]
    return logits[first : first + len(_written(take, row))].argmax(-1)


def _mask(take: Take) -> Tensor:
    """True for tokens: neither padding in front nor filling after a row's end."""
    width = take.ids.shape[1]
    mask = torch.arange(width) < take.ends[:, None]
    mask[:, : take.batch.input_ids.shape[1]] &= take.batch.attention_mask.bool()
    return mask


def _same_edits(case: Case, run: Run) -> tuple[bool, int]:
    rows = range(len(case.plans))
    alike = all(edits(case.steered.run, row) == edits(run, row) for row in rows)
    return alike, sum(len(edits(run, row)) for row in rows)


def _equal(same: bool) -> str:
    return "equal" if same else "NOT EQUAL"


def _rows(rows: Sequence[int]) -> str:
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(str(row + 1) for row in rows) or 'none'}"
