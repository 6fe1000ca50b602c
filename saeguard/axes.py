"""Axis names and array types shared by every signature.

Axes read left to right: ``batch pos width``. ``batch`` rows of one forward pass, ``pos`` columns of it (padding
included), ``d_in`` width of a site, ``d_sae`` latents of an SAE, ``k`` edited latents, ``rules`` rules of a plan.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Stream = Float[Tensor, "batch pos d_in"]
"""What flows past a site in one forward pass."""

Mask = Bool[Tensor, "batch pos"]
"""One yes or no per token of one forward pass."""

Places = Int[Tensor, "batch pos"]
"""One integer per token of one forward pass: an id, a column, an absolute position."""

Fired = Bool[Tensor, "batch pos rules"]
"""Per token and rule."""
