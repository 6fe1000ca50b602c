"""How strong a rule has to be for its edits to move predictions by so many nats: amounts that compare across ops.

    KL(s) = mean over the tokens t that the rule edits of KL(p plain(. | t) || p edited(. | t))
    find s with |KL(s) - kappa| <= rtol * kappa

s multiplies the rule's own amounts: `Scale` by c becomes `Scale` by 1 + s (c - 1), and of all other ops the amount is
multiplied by s, so that tuples keep their proportions and signs. s is doubled or halved from 1 until KL(s) lies on
the other side of kappa, and log s then bisected, every other time where a power law puts kappa. The calibration is
Delphi's (arXiv 2410.13928, intervention scoring), for one latent at the last token there
(`saeguard.scoring.causal_effect`), and for any rule here, with its gate, trigger and phase, on whole texts. KL is in
nats.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saeguard.dense import Misdirect, Project
from saeguard.engines import engine_for
from saeguard.errors import BadRule, ScoreMismatch, StrengthUnreachable, UnstableEdit
from saeguard.ops import Add, Amount, AtLeast, AtMost, Clamp, ClampAbove, Reduce, Scale
from saeguard.plans import Plan, Rule
from saeguard.sae import SAE
from saeguard.scoring.last_token import check_free
from saeguard.scoring.sweep import LOGITS, Progress
from saeguard.scoring.texts import Batch, Texts, special_ids_of
from saeguard.steering import steer

FURTHEST = 1e4
"""The largest factor that is tried, and one over the smallest."""
STEPS = 40
"""Tries between two factors, every other one a halving of log s, after which KL is taken to jump there."""
TOKENS = 64
"""Edited tokens whose distributions are compared at a time, in float64."""


@dataclass(frozen=True)
class KLStrength:
    """``rule`` has the amounts at which the mean KL is ``kl``: ``factor`` times those that it was given.

    ``edited`` counts the tokens that it then edits, of ``tokens`` that count in the text. ``tried`` are the factors and
    their KL, in order. ``text`` is the fingerprint of the text.
    """

    rule: Rule
    factor: float
    kl: float
    kappa: float
    edited: int
    tokens: int
    text: str
    tried: tuple[tuple[float, float], ...] = field(repr=False)

    def figures(self) -> dict[str, Any]:
        """Everything but the rule, as plain values."""
        return {name: value for name, value in asdict(replace(self)).items() if name != "rule"}


@torch.no_grad()
def kl_strength(
    model: nn.Module,
    tokenizer: Any,
    sae: SAE | Mapping[str, SAE],
    rule: Rule,
    texts: Texts,
    *,
    kappa: float = 0.5,
    rtol: float = 0.05,
    batch: int | None = None,
    progress: Progress | None = None,
) -> KLStrength:
    """``rule`` with the amounts at which its edits move the predictions behind edited tokens by ``kappa`` nats.

    ``sae`` is the rule's, or a mapping where its gate reads others too. What stands before a row's first counted token
    is its prompt, to rules that ask for a phase. Each try is one pass over the text, plain and edited rows together,
    ``batch`` of each at a time; logits are reduced where they are made. ``progress`` is told the rows of the running
    try. Raises `ScoreMismatch` for an op without an amount, a text of which nothing is edited, or a kappa that is no
    positive number, `StrengthUnreachable`, `BindError`, `ModelBusy`.
    """
    scaled(rule, 1.0)
    if not 0 < kappa < math.inf or not 0 < rtol < 1:
        raise ScoreMismatch(f"a KL of {kappa} nats within {rtol}", "that is none", "Give kappa > 0 and 0 < rtol < 1.")
    check_free(model)
    saes = sae if isinstance(sae, Mapping) else {rule.sae: sae}
    options = {"saes": dict(saes), "special_ids": special_ids_of(tokenizer, saes[rule.sae])}
    trial = _Trials(model, rule, texts, options, batch or _rows(model, texts), progress, [])
    factor, kl = _search(trial, kappa, rtol)
    return KLStrength(
        scaled(rule, factor), factor, kl, kappa, trial.edited, int(texts.kept.sum()), texts.fingerprint,
        tuple(trial.tried),
    )  # fmt: skip


def scaled(rule: Rule, factor: float) -> Rule:
    """``rule`` with ``factor`` times its amounts; see the module. Raises `ScoreMismatch` for an op without any."""
    op = rule.op
    match op:
        case Clamp() | ClampAbove() | AtLeast() | AtMost():
            return replace(rule, op=replace(op, value=_times(op.value, factor)))
        case Add() | Reduce() | Misdirect():
            return replace(rule, op=replace(op, amount=_times(op.amount, factor)))
        case Project():
            return replace(rule, op=replace(op, strength=_times(op.strength, factor)))
        case Scale():
            return replace(rule, op=replace(op, factor=_times(op.factor, factor, around=1.0)))
    raise ScoreMismatch(
        f"a strength for {op}", "it has no amount that could be larger or smaller",
        "Use an op with one: Clamp, ClampAbove, Scale, Add, Reduce, AtLeast, AtMost, Misdirect or Project.",
    )  # fmt: skip


def _times(amount: Amount, factor: float, *, around: float = 0.0) -> Any:
    if isinstance(amount, tuple | list):
        return tuple(around + factor * (a - around) for a in amount)
    return around + factor * (amount - around)


def _search(trial: "_Trials", kappa: float, rtol: float) -> tuple[float, float]:
    """The factor, and its KL. Raises `ScoreMismatch`, `StrengthUnreachable`."""
    close = lambda kl: abs(kl - kappa) <= rtol * kappa
    factor, kl = 1.0, trial(1.0)
    if trial.edited == 0:
        raise ScoreMismatch(
            f"the strength of {trial.rule}", f"it edits none of the {int(trial.texts.kept.sum())} tokens of the text",
            "Give text on which its latents fire and its gate opens, with prompts where its phase asks for them.",
        )  # fmt: skip
    step = 2.0 if kl < kappa else 0.5
    before, kl_before = factor, kl
    while not close(kl) and (kl < kappa) == (step > 1):
        before, kl_before, factor = factor, kl, factor * step
        if not 1 / FURTHEST <= factor <= FURTHEST:
            raise trial.unreachable(kappa, f"at {before:g} times its amounts it still is {kl_before:.3g} nats")
        kl = trial(factor)
    if close(kl):
        return factor, kl
    low, high = sorted(((before, kl_before), (factor, kl)))
    for number in range(STEPS):
        middle = _between(low, high, kappa) if number % 2 == 0 else math.sqrt(low[0] * high[0])
        kl = trial(middle)
        if close(kl):
            return middle, kl
        low, high = ((middle, kl), high) if kl < kappa else (low, (middle, kl))
    raise trial.unreachable(kappa, f"it jumps over that at {low[0]:g} times its amounts")


def _between(low: tuple[float, float], high: tuple[float, float], kappa: float) -> float:
    """Where KL is ``kappa`` if between two tries it is a power of the factor; their middle where it cannot be.

    Near 0 KL grows with the square of the factor, so that this saves most of the halvings.
    """
    (a, kl_a), (b, kl_b) = low, high
    if not 0 < kl_a < kappa < kl_b:
        return math.sqrt(a * b)
    share = math.log(kappa / kl_a) / math.log(kl_b / kl_a)
    return a * (b / a) ** min(max(share, 0.05), 0.95)


@dataclass(eq=False)
class _Trials:
    """The mean KL at one factor after the other."""

    model: nn.Module
    rule: Rule
    texts: Texts
    options: dict[str, Any]
    batch: int
    progress: Progress | None
    tried: list[tuple[float, float]]
    edited: int = 0
    """Tokens that the latest try edited."""

    def __call__(self, factor: float) -> float:
        try:
            plan, nats, self.edited, done = Plan((scaled(self.rule, factor),)), 0.0, 0, 0
            for batch in self.texts.batches(self.batch):
                for kl in self._divergences(plan, batch):
                    nats, self.edited = nats + float(kl.sum()), self.edited + len(kl)
                done += len(batch.rows)
                if self.progress is not None:
                    self.progress(done, len(self.texts.ids))
        except (UnstableEdit, BadRule) as error:
            raise self.unreachable(None, f"at {factor:g} times its amounts {error.found}") from error
        mean = nats / max(self.edited, 1)
        if math.isnan(mean):
            raise self.unreachable(None, f"at {factor:g} times its amounts the model's predictions are NaN")
        self.tried.append((factor, mean))
        return mean

    def _divergences(self, plan: Plan, batch: Batch) -> Iterator[Float[Tensor, " token"]]:
        """KL at each edited token of some rows, a few tokens at a time."""
        rows, device = len(batch.rows), next(self.model.parameters()).device
        ids, real = (torch.cat([part, part]).to(device) for part in (batch.ids, batch.real))
        before = (batch.real & (batch.kept.cumsum(1) == 0)).sum(1).tolist()
        plans = [None] * rows + [plan] * rows
        with steer(self.model, plans, prompt_tokens=before * 2, **self.options) as run:
            logits = self.model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
        places = run.report.rules[0].edited_positions[0]  # absolute ones, which are columns here: no padding in front
        where = [(row, column) for row in range(rows) for column in places[rows + row]]
        for low in range(0, len(where), TOKENS):
            row, column = torch.tensor(where[low : low + TOKENS], device=logits.device).unbind(1)
            yield token_divergence(logits[row, column], logits[rows + row, column]).cpu()

    def unreachable(self, kappa: float | None, found: str) -> StrengthUnreachable:
        """The error for a search that ended without an answer."""
        tried = ", ".join(f"{kl:.3g} at {factor:g}" for factor, kl in sorted(self.tried))
        wanted = "a KL" if kappa is None else f"a mean KL of {kappa:g} nats"
        return StrengthUnreachable(
            f"{wanted} by {self.rule}", f"{found} (tried: {tried or 'nothing'})",
            "Ask for another KL, begin with other amounts, or choose other latents.",
        )  # fmt: skip


def token_divergence(plain: Float[Tensor, "token vocab"], edited: Float[Tensor, "token vocab"]) -> Tensor:
    """KL(plain || edited) in nats from two rows of logits each, as the sum of q - p + p (ln p - ln q), in float64.

    Each term is at least 0, so that small differences do not cancel; what the plain model rules out counts nothing.
    """
    p, q = plain.double().log_softmax(-1), edited.double().log_softmax(-1)
    gap = torch.where(p.isneginf(), 0.0, p - q)
    return (q.exp() - p.exp() + p.exp() * gap).sum(-1)


def _rows(model: nn.Module, texts: Texts) -> int:
    """As many rows as keep the logits of a batch, plain and edited, small."""
    width = max(int(texts.mask.sum(1).max()), 1) if texts.mask.numel() else 1
    vocabulary = engine_for(model).model_shape().get("vocab_size", 1 << 16)
    return max(1, LOGITS // (2 * width * vocabulary))
