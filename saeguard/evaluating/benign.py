"""What a guardrail does to text that it has nothing to do with: rows that trigger, and how far predictions move.

    KL       mean over tokens of sum over v of p(v) (ln p(v) - ln q(v))      p plain, q guarded; 0 where nothing opened
    ratio    exp(mean nats of q - mean nats of p)                            of the perplexities of the text itself

A row in which nothing opened has to have the plain model's logits, bit for bit; those that do not are counted, and so
is the rate of triggered rows, per 1,600 tokens of text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saeguard.errors import ScoreMismatch, UnstableEdit
from saeguard.evaluating.multiple_choice import Accuracy
from saeguard.evaluating.prompts import padded, places
from saeguard.evaluating.subject import Subject, device_of

PER_TOKENS = 1_600
BATCH = 4
"""Rows per forward pass; the logits of all their tokens are held twice."""


@dataclass(frozen=True)
class Benign:
    """Of one text: ``kl`` in nats per token, over all rows and over those that triggered (nan where there are none).

    ``changed_untriggered`` counts rows in which nothing opened and a bit of the logits differs: it has to be 0.
    """

    name: str
    tokens: int
    triggered: Accuracy
    kl: float
    kl_triggered: float
    perplexity: float
    perplexity_ratio: float
    changed_untriggered: int

    @property
    def per_tokens(self) -> float:
        """Triggered rows per `PER_TOKENS` tokens."""
        return self.triggered.right * PER_TOKENS / self.tokens


@torch.no_grad()
def benign(
    plain: Subject, guarded: Subject, name: str, rows: Sequence[Sequence[int]], *,
    progress: Callable[[int, int], None] | None = None,
) -> Benign:  # fmt: skip
    """Both subjects on the same rows of token ids. Raises `ScoreMismatch` without text, `UnstableEdit` for NaN."""
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise ScoreMismatch(f"benign text {name}", "no row of it has two tokens", "Give more text.")
    kl, nats, opened = (torch.zeros(len(rows), dtype=torch.float64) for _ in range(3))
    plain_nats, changed = torch.zeros_like(nats), 0
    for low in range(0, len(rows), BATCH):
        some = slice(low, low + BATCH)
        p, _, targets, real = _log_p(plain, rows[some])
        q, verdicts, _, _ = _log_p(guarded, rows[some])
        kl[some] = _sum(torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1), real)
        nats[some], plain_nats[some] = (_sum(-_of(one, targets), real) for one in (q, p))
        opened[some] = torch.tensor(verdicts, dtype=torch.float64)
        same = [torch.equal(a[keep], b[keep]) for a, b, keep in zip(p, q, real, strict=True)]
        changed += sum(not alike and not fired for alike, fired in zip(same, verdicts, strict=True))
        if progress is not None:
            progress(min(low + BATCH, len(rows)), len(rows))
    if bool((kl + nats + plain_nats).isnan().any()):
        raise UnstableEdit(f"predictions of benign text {name}", "they are NaN", "Weaken the policy's edits.")
    counts = torch.tensor([len(row) - 1 for row in rows], dtype=torch.float64)
    fired = opened > 0
    return Benign(
        name, tokens=sum(map(len, rows)), triggered=Accuracy(int(fired.sum()), len(rows), 0.0),
        kl=_mean(kl, counts), kl_triggered=_mean(kl[fired], counts[fired]),
        perplexity=math.exp(_mean(plain_nats, counts)),
        perplexity_ratio=math.exp(_mean(nats, counts) - _mean(plain_nats, counts)), changed_untriggered=changed,
    )  # fmt: skip


def _log_p(subject: Subject, rows: Sequence[Sequence[int]]) -> tuple[Tensor, list[bool], Tensor, Tensor]:
    """Log-probabilities of what may follow each token but the last, what opened, what follows, and which are real."""
    ids, mask = padded(rows, "right", device_of(subject))
    with subject.passes([len(row) for row in rows]) as verdicts:
        logits = subject.model(input_ids=ids, attention_mask=mask, position_ids=places(mask), use_cache=False).logits
        opened = [verdict.opened for verdict in verdicts()]
    return logits[:, :-1].float().log_softmax(-1), opened, ids[:, 1:], mask[:, 1:].bool()


def _of(log_p: Tensor, targets: Tensor) -> Tensor:
    return log_p.gather(-1, targets[..., None])[..., 0]


def _sum(values: Tensor, real: Tensor) -> Tensor:
    """Over each row's real tokens."""
    return values.double().masked_fill(~real, 0.0).sum(1).cpu()


def _mean(sums: Tensor, counts: Tensor) -> float:
    """Per token."""
    return float(sums.sum() / counts.sum()) if len(sums) else math.nan
