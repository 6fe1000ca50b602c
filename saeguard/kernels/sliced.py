"""The fast kernel: encode the distinct latents of a part, apply all its rules at once, decode the differences.

With df = f' - f written as clip((scale - 1) f + shift, lo - f, hi - f), an op that changes nothing gives df = 0
exactly, and `Add` needs no f at all.
"""

import torch
from jaxtyping import Float

from saeguard.axes import Fired, Stream
from saeguard.kernels.parts import TINY, Part


def edit(x: Stream, part: Part, selected: Fired) -> tuple[Stream, Float[torch.Tensor, "batch pos k"]]:
    """What to add to ``x`` (float32), and the change of each column's activation.

    ``selected`` says per rule of the part which tokens it is about, before triggers.
    """
    f = part.encode(x) if part.reads else None
    if part.triggers and f is not None:
        selected = selected.clone()
        for rule, trigger, watched in part.triggers:
            selected[..., rule] &= trigger.fires(f[..., watched])
    applies = selected[..., part.rule]
    for columns, stronger in part.yields:
        applies[..., columns] &= ~selected[..., stronger, None]
    df = torch.where(applies, _change(x, f, part), 0.0)
    return df @ part.W_dec, df


def _change(x: Stream, f: torch.Tensor | None, part: Part) -> torch.Tensor:
    shift, lo, hi = part.shift, part.lo, part.hi
    if part.by_norm is not None:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(TINY)
        unit = torch.where(part.by_norm, norm, 1.0)
        shift, lo, hi = shift * unit, lo * unit, hi * unit
    if f is None:
        return shift
    f = f[..., part.source]
    change = ((part.scale - 1.0) * f + shift).clamp(lo - f, hi - f)
    # "not <=" rather than ">": a NaN activation goes on to the output and is refused there, instead of passing unedited
    return torch.where(f <= part.floor, 0.0, change)
