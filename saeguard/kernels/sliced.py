"""The fast kernel: encode the distinct latents of a part, apply all its rules at once, decode the differences.

With df = f' - f written as clip((scale - 1) f + shift, lo - f, hi - f), an op that changes nothing gives df = 0
exactly, and `Add` needs no f at all.
"""

import torch
from jaxtyping import Float

from saeguard.axes import Fired, Stream
from saeguard.kernels.parts import TINY, Part


def edit(
    x: Stream, y: Float[torch.Tensor, "batch pos d_out"], part: Part, selected: Fired
) -> tuple[Float[torch.Tensor, "batch pos d_out"], Float[torch.Tensor, "batch pos k"], torch.Tensor | None]:
    """What to add to ``y``, the change of each column's activation, and by what each token's change was scaled.

    ``x`` is what the SAE reads and ``y`` what is edited, both float32; they differ under a transcoder. ``selected``
    says per rule of the part which tokens it is about, before triggers.
    """
    scaled = part.sae.norm not in ("none", "center")
    read = part.sae.read(x) if part.reads or scaled else None
    f = part.sae.activate(read.x) if part.reads and read is not None else None
    if part.triggers and f is not None:
        selected = selected.clone()
        for rule, trigger, watched in part.triggers:
            selected[..., rule] &= trigger.fires(f[..., watched])
    applies = selected[..., part.rule]
    for columns, stronger in part.yields:
        applies[..., columns] &= ~selected[..., stronger, None]
    df = torch.where(applies, _change(y, f, part), 0.0)
    dy, scale = df @ part.W_dec, None if read is None else read.scale
    return dy if scale is None else dy * scale, df, scale


def _change(y: torch.Tensor, f: torch.Tensor | None, part: Part) -> torch.Tensor:
    shift, floor, lo, hi = part.shift, part.floor, part.lo, part.hi
    if part.by_norm is not None:
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min(TINY)
        unit = torch.where(part.by_norm, norm, 1.0)
        shift, floor, lo, hi = (_times(amount, unit) for amount in (shift, floor, lo, hi))
    if f is None:
        return shift
    f = f[..., part.source]
    change = ((part.scale - 1.0) * f + shift).clamp(lo - f, hi - f)
    # "not <=" rather than ">": a NaN activation goes on to the output and is refused there, instead of passing unedited
    return torch.where(f <= floor, 0.0, change)


def _times(amount: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """In activation units. Bounds that are none stay out of the product, whose gradient would be 0 * inf."""
    none = amount.isinf()
    return torch.where(none, amount, amount.masked_fill(none, 0.0) * unit)
