"""Fluency: how likely a model, left alone, finds what was written, by itself or under a plan.

    nats(row) = -(1/n) sum over its n written tokens of ln p(token | all before it)        perplexity = exp(nats)

Text that was steered is compared with plain text for the same prompts: the ratio of their perplexities under the plain
model is 1 for text that it might have written itself. Repetition makes text likely, so look at the share of distinct
word pairs as well.
"""

import math
import re
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saeguard.engines.session import participants
from saeguard.errors import ModelBusy
from saeguard.tokens import is_special

BATCH = 16
"""Rows per forward pass."""


def continuation_nats(
    model: nn.Module,
    sequences: Int[Tensor, "row column"],
    prompt_mask: Int[Tensor, "row prompt"],
    *,
    stop_ids: Sequence[int] = (),
    batch_rows: int = BATCH,
) -> Float[Tensor, " row"]:
    """Mean nats per written token of each row, NaN for rows that wrote none; the prompt's own tokens do not count.

    ``sequences`` are what generate returned for prompts with ``prompt_mask``, padded on the left. What stands behind a
    row's first stop token is filling and does not count; the stop itself does. Raises `ModelBusy` while hooks
    of a plan are on the model: the text would be judged by the model that wrote it.
    """
    if any(participant.editors for participant in participants(model)):
        raise ModelBusy(
            "the perplexity of text under the plain model", "a plan is on the model now", "Leave the steer block first."
        )
    written = _written(sequences[:, prompt_mask.shape[1] :], stop_ids)
    mask = torch.cat([prompt_mask.bool().cpu(), written], dim=1)
    counts = torch.cat([torch.zeros_like(prompt_mask.bool().cpu()), written], dim=1)[:, 1:]
    found = []
    for low in range(0, len(sequences), batch_rows):
        rows = slice(low, low + batch_rows)
        ids, real = sequences[rows], mask[rows].to(sequences.device)
        places = (real.long().cumsum(1) - 1).clamp(min=0)  # as generate counts them, behind padding on the left
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=real.long(), position_ids=places, use_cache=False).logits[
                :, :-1
            ]
        nats = -logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].cpu()
        kept = counts[rows]
        found.append(nats.masked_fill(~kept, 0.0).sum(1) / kept.sum(1))
    return torch.cat(found) if found else torch.zeros(0)


def perplexity_ratio(steered: Float[Tensor, " row"], plain: Float[Tensor, " row"]) -> float:
    """exp of the difference of mean nats, over the rows that have both."""
    both = ~(steered.isnan() | plain.isnan())
    return math.exp(float(steered[both].mean() - plain[both].mean())) if bool(both.any()) else math.nan


def word_share(text: str, wanted: Sequence[str]) -> float:
    """The share of the words of ``text`` that are among ``wanted``, whatever their case."""
    found, among = words(text), {word.lower() for word in wanted}
    return sum(word in among for word in found) / len(found) if found else 0.0


def distinct_pairs(text: str) -> float:
    """The share of neighbouring pairs of words that are not a repetition of an earlier pair; 1 for short texts."""
    found = words(text)
    pairs = list(zip(found, found[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())


def _written(new: Int[Tensor, "row new"], stop_ids: Sequence[int]) -> Tensor:
    stops = is_special(new.cpu(), torch.tensor(sorted(stop_ids), dtype=torch.long))
    return stops.long().cumsum(1) - stops.long() == 0
