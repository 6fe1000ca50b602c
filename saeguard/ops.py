"""The ops: frozen data that says what happens to a latent's activation f.

Every elementwise op is one line of the same table,

    f' = clip(scale * f + shift, lo, hi)   where f > floor,   else f

so adding an op means adding a class that lowers to those five numbers, and its name to `OPS`.
"""

import math
import sys
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from saeguard.errors import BadRule

Amount = int | float | list[int | float] | tuple[int | float, ...]
"""One number for all latents of a rule, or one per latent in the rule's order; kept as floats."""

Unit = Literal["activation", "max", "norm"]
"""Activation units; multiples of the latent's recorded maximum; multiples of the norm of x at that token."""

INF = math.inf


@dataclass(frozen=True)
class Lowered:
    """The five numbers of the table, and in which unit all of them but ``scale`` are given."""

    scale: Amount = 1.0
    shift: Amount = 0.0
    floor: Amount = -INF
    lo: Amount = -INF
    hi: Amount = INF
    unit: Unit = "activation"

    @property
    def reads(self) -> bool:
        """Whether f' depends on f, so that the latent has to be encoded; a pure shift adds a constant vector."""
        return (self.scale, self.floor, self.lo, self.hi) != (1.0, -INF, -INF, INF)


@runtime_checkable
class Op(Protocol):
    """What a rule does to each of its latents."""

    def lower(self) -> Lowered: ...


@dataclass(frozen=True)
class Clamp:
    """Set f to ``value``: at every selected token (``when="always"``) or only where f > 0 (``when="active"``).

    ``when`` has no default because the field uses the word for both. ``Clamp(-c, when="active")`` is the negative
    clamp of Farrell et al. and SAEBench, whose "multiplier" c is our ``-value``.
    """

    value: Amount
    _: KW_ONLY
    when: Literal["always", "active"]
    unit: Unit = "activation"

    def __post_init__(self):
        if self.when not in ("always", "active"):
            raise BadRule(f"Clamp with when={self.when!r}", "there is no such mode", 'Use "always" or "active".')
        object.__setattr__(self, "value", as_amount("Clamp value", self.value))
        check_unit("Clamp", self.unit)

    def lower(self) -> Lowered:
        return Lowered(0.0, self.value, 0.0 if self.when == "active" else -INF, unit=self.unit)


@dataclass(frozen=True)
class ClampAbove:
    """Set f to ``value`` where f > ``above``, strictly; both are in ``unit``.

    "Clamp Prime" of Khoriaty et al. (arXiv 2503.11127) is ``ClampAbove(c, above=0.05)``: unlike `Clamp` where a latent
    is active, it leaves faint activations alone.
    """

    value: Amount
    _: KW_ONLY
    above: Amount
    unit: Unit = "activation"

    def __post_init__(self):
        object.__setattr__(self, "value", as_amount("ClampAbove value", self.value))
        object.__setattr__(self, "above", as_amount("ClampAbove above", self.above))
        check_unit("ClampAbove", self.unit)

    def lower(self) -> Lowered:
        return Lowered(0.0, self.value, self.above, unit=self.unit)


@dataclass(frozen=True)
class Scale:
    """Multiply f by ``factor``; a negative factor turns the latent's contribution around."""

    factor: Amount

    def __post_init__(self):
        object.__setattr__(self, "factor", as_amount("Scale factor", self.factor))

    def lower(self) -> Lowered:
        return Lowered(scale=self.factor)


@dataclass(frozen=True)
class Add:
    """Add ``amount`` to f: x moves by ``amount * W_dec[latent]`` and nothing has to be encoded."""

    amount: Amount
    _: KW_ONLY
    unit: Unit = "activation"

    def __post_init__(self):
        object.__setattr__(self, "amount", as_amount("Add amount", self.amount))
        check_unit("Add", self.unit)

    def lower(self) -> Lowered:
        return Lowered(shift=self.amount, unit=self.unit)


@dataclass(frozen=True)
class Reduce:
    """Take ``amount``, which is not negative, off f where f > 0, and never more than there is.

    SpARE (arXiv 2410.15999) removes min(z, f) of latents in this way, and raises others with `AtLeast`.
    """

    amount: Amount
    _: KW_ONLY
    unit: Unit = "activation"

    def __post_init__(self):
        object.__setattr__(self, "amount", as_amount("Reduce amount", self.amount))
        check_unit("Reduce", self.unit)
        if min(each(self.amount), default=0.0) < 0:
            raise BadRule(f"Reduce by {self.amount}", "an amount is negative", "Raise latents with Add or AtLeast.")

    def lower(self) -> Lowered:
        off = tuple(-a for a in each(self.amount))
        return Lowered(1.0, off if isinstance(self.amount, tuple) else off[0], 0.0, 0.0, unit=self.unit)


@dataclass(frozen=True)
class Ablate:
    """Set f to 0; everything that the latent does not explain passes through."""

    def lower(self) -> Lowered:
        return Lowered(scale=0.0)


@dataclass(frozen=True)
class AtLeast:
    """Raise f to ``value`` where it is below (the minimum clamp of AxBench)."""

    value: Amount
    _: KW_ONLY
    unit: Unit = "activation"

    def __post_init__(self):
        object.__setattr__(self, "value", as_amount("AtLeast value", self.value))
        check_unit("AtLeast", self.unit)

    def lower(self) -> Lowered:
        return Lowered(lo=self.value, unit=self.unit)


@dataclass(frozen=True)
class AtMost:
    """Lower f to ``value`` where it is above."""

    value: Amount
    _: KW_ONLY
    unit: Unit = "activation"

    def __post_init__(self):
        object.__setattr__(self, "value", as_amount("AtMost value", self.value))
        check_unit("AtMost", self.unit)

    def lower(self) -> Lowered:
        return Lowered(hi=self.value, unit=self.unit)


AnyOp = Clamp | ClampAbove | Scale | Add | Reduce | Ablate | AtLeast | AtMost
OPS: dict[str, Any] = {
    "clamp": Clamp, "scale": Scale, "add": Add, "ablate": Ablate, "at_least": AtLeast, "at_most": AtMost,
    "clamp_above": ClampAbove, "reduce": Reduce,
}  # fmt: skip
"""Names of the ops in a plan file."""


def as_amount(what: str, amount: Any) -> Amount:
    """``amount`` in floats, so that equal amounts are written alike. Raises `BadRule` unless all are finite."""
    numbers = tuple(amount) if isinstance(amount, tuple | list) else (amount,)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= sys.float_info.max:
            raise BadRule(
                what, f"{number!r:.40} is not a finite number", "Amounts are finite floats, or a tuple of them."
            )
    floats = tuple(float(number) + 0.0 for number in numbers)
    return floats if isinstance(amount, tuple | list) else floats[0]


def each(amount: Amount) -> tuple[float, ...]:
    """The numbers of ``amount``: one, or one per latent."""
    return tuple(amount) if isinstance(amount, tuple | list) else (amount,)


def check_unit(what: str, unit: str) -> None:
    """Raise `BadRule` for an unknown unit."""
    if unit not in get_args(Unit):
        raise BadRule(f"{what} with unit={unit!r}", "there is no such unit", f"Units: {', '.join(get_args(Unit))}.")
