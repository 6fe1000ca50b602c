"""Relearning: what a little fine-tuning on the forgotten topic brings back, with the guardrail in force and without it.

    loss = mean over the tokens t of -ln p(t | before t)        of rows of text, under whatever stands on the model
    theta = AdamW(theta, gradient of the loss)                  all parameters, a constant rate, no decay

The weights change in place, so the model that comes out is not the one that a policy was made for: a guardrail refuses
to be attached to it. Who holds the weights gets past that in two ways, by tuning under a guardrail that is attached
already, and by pinning the policy to the new weights; and who holds the weights can leave the guardrail off.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saeguard.errors import TrainError, UnstableEdit
from saeguard.evaluating.subject import Subject, device_of


@dataclass(frozen=True)
class Budget:
    """``steps`` of ``rows`` rows of ``row_tokens`` tokens each, drawn by ``seed``; ``rate`` is AdamW's."""

    steps: int = 50
    rows: int = 4
    row_tokens: int = 64
    rate: float = 5e-5
    seed: int = 0


def relearn(
    subject: Subject, ids: Sequence[int], budget: Budget = Budget(), *,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:  # fmt: skip
    """Fine-tune the subject's model on a text of token ``ids``, with what stands on it in force; the loss of each step.

    Nothing is drawn but the places of the rows, so the same text and budget give the same weights. Raises `TrainError`
    for a text of fewer tokens than a row, `UnstableEdit` where the loss is NaN.
    """
    if len(ids) <= budget.row_tokens:
        raise TrainError(
            f"relearning in rows of {budget.row_tokens} tokens", f"the text has {len(ids)}", "Give more text."
        )
    text = torch.tensor(list(ids), device=device_of(subject))
    generator = torch.Generator().manual_seed(budget.seed)
    parameters = [one for one in subject.model.parameters() if one.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=budget.rate, weight_decay=0.0)
    losses = []
    for step in range(budget.steps):
        starts = torch.randint(len(text) - budget.row_tokens, (budget.rows,), generator=generator).tolist()
        rows = torch.stack([text[low : low + budget.row_tokens] for low in starts])
        loss = _loss(subject, rows)
        losses.append(float(loss.detach()))
        if losses[-1] != losses[-1]:
            raise UnstableEdit(f"relearning, step {step}", "the loss is NaN", "Take a lower rate.")
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        if progress is not None:
            progress(step + 1, budget.steps)
    adam.zero_grad(set_to_none=True)
    return losses


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """The model's weights are after the block what they were before it, to the bit."""
    kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(kept[name])


def _loss(subject: Subject, rows: Tensor) -> Float[Tensor, ""]:
    with torch.enable_grad(), subject.passes([rows.shape[1]] * len(rows)):
        logits = subject.model(input_ids=rows, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
