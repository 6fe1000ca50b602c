"""The fast kernel of ops that change x as a whole and need no activation; latents are read for triggers only.

Misdirect   length * u - y         length is c, or c |y|
Project     -s (y Q) Q^T
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saeguard.axes import Fired, Stream
from saeguard.dense import Misdirect, Project
from saeguard.kernels.stream_parts import StreamPart


def edit(
    x: Stream, y: Float[Tensor, "batch pos d_out"], part: StreamPart, selected: Fired
) -> tuple[Float[Tensor, "batch pos d_out"], Fired, Float[Tensor, "batch pos rules"]]:
    """What to add to ``y``, per rule whether it adds anything, and the norm of what it adds.

    ``x`` is what triggers look at and ``y`` what is edited, both float32; they differ under a transcoder. ``selected``
    says per rule of the part which tokens it is about, before triggers.
    """
    watches = any(places is not None for places in part.watched)
    f = part.sae.activate(part.sae.read(x).x) if watches else None
    dy, adds, norms = torch.zeros_like(y), [], []
    for number, (rule, places) in enumerate(zip(part.rules, part.watched, strict=True)):
        applies = selected[..., number]
        if rule.trigger is not None and f is not None:
            applies = applies & rule.trigger.fires(f[..., places])
        change = torch.where(applies[..., None], _change(y, part, number), 0.0)
        dy = dy + change
        adds.append((change != 0).any(-1))
        norms.append(torch.linalg.vector_norm(change, dim=-1))
    return dy, torch.stack(adds, -1), torch.stack(norms, -1)


def _change(y: Stream, part: StreamPart, number: int) -> Stream:
    op, basis = part.rules[number].op, part.basis[number]
    if isinstance(op, Misdirect):
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        return (op.amount * norm if op.unit == "norm" else op.amount) * basis[:, 0] - y
    assert isinstance(op, Project)
    return -op.strength * ((y @ basis) @ basis.T)
