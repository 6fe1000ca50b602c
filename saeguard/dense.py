"""The dense ops: frozen data for what is not one line of the ops' table, because it changes x as a whole.

    Splice      x' = x_hat                  dropped: the stream becomes the reconstruction, without the SAE's error
    Reweight    x' = x + (f' - f) @ W_dec   weight:  f' = act(pre * w)
                                            swap:    f' = pre where act(pre * w) != 0, else 0
    Misdirect   x' = c u                    u: one random unit vector for all tokens; c, or c times the norm of x
    Project     x' = x - s P x              P: onto the span of the chosen latents' decoder rows

The first two need all latents of a token. They are IBM's (arXiv 2506.12576, section 3): its modes are a `Splice` and a
`Reweight` beside each other. The others need no activation at all. `Misdirect` does while a model runs what RMU (arXiv
2403.03218) trains it to do; `Project` is the removal of a direction in Farrell et al.'s code (arXiv 2410.19278), for
several directions at once. Every rule adds its own difference to x, all read from the same x, so leaving the `Splice`
out keeps the error.
"""

import random
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from saeguard.errors import BadRule
from saeguard.ops import Amount, as_amount, each

Error = Literal["dropped", "boosted", "kept"]
Mode = Literal["weight", "swap"]
Length = Literal["stream", "norm"]
"""The units of the stream, or multiples of the norm of x at that token."""
LARGEST = 3.4028234663852886e38
"""The largest float32: kernels hold weights in it."""


@runtime_checkable
class DenseOp(Protocol):
    """What a rule does to x as a whole."""

    needs_all: ClassVar[bool]
    """Whether it needs all latents of the SAE."""

    def check(self, latents: tuple[int, ...]) -> None:
        """Raise `BadRule` unless the op can stand in a rule on these latents."""
        ...


@dataclass(frozen=True)
class Splice:
    """Put the SAE's reconstruction into the stream, in place of what flows there. Its rule names no latents.

    ``error="dropped"`` leaves out what the SAE does not explain. On an SAE with boosts that is the base's
    reconstruction alone, and ``"boosted"`` adds what the boosts make of the error. ``"kept"`` puts the whole error
    back, which is the stream as it was, bit for bit. What a transcoder writes becomes what it decodes.
    """

    error: Error = "dropped"
    needs_all: ClassVar[bool] = True

    def __post_init__(self):
        if self.error not in get_args(Error):
            raise BadRule(
                f"Splice with error={self.error!r}", "there is no such mode", f"Modes: {', '.join(get_args(Error))}."
            )

    def check(self, latents: tuple[int, ...]) -> None:
        if latents:
            raise BadRule(
                f"Splice on {len(latents)} latents", "it writes the whole reconstruction",
                "Leave latents empty; to change some of them too, put another rule beside it.",
            )  # fmt: skip


@dataclass(frozen=True)
class Reweight:
    """Multiply pre-activations by weights before the SAE decides what fires.

    ``weights`` is one number for all latents of the rule or one for each, in their order; latents that the rule does
    not name have the weight ``others``. ``mode="weight"`` keeps the weighted values. ``"swap"`` keeps only who fires,
    with its own pre-activation: a negative one with a negative weight is then a negative activation, as published.

    What fires is decided by the SAE's own kind, thresholds and k. ``top_k`` lets the so many largest of a token fire
    instead, boosts included, also under kinds that do not rank, whose thresholds are then 0.
    """

    weights: Amount
    _: KW_ONLY
    mode: Mode
    top_k: int | None = None
    others: float = 0.0
    needs_all: ClassVar[bool] = True

    def __post_init__(self):
        if self.mode not in get_args(Mode):
            raise BadRule(f"Reweight with mode={self.mode!r}", "there is no such mode", 'Use "weight" or "swap".')
        object.__setattr__(self, "weights", as_amount("Reweight weight", self.weights))
        object.__setattr__(self, "others", as_amount("Reweight others", self.others))
        if not isinstance(self.others, float):
            raise BadRule(f"Reweight with others={self.others}", "that is not one number", "Give one weight for all.")
        for weight in (*each(self.weights), self.others):
            _check_float32("Reweight by", weight)
        k = self.top_k
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise BadRule(f"Reweight with top_k={k!r}", "that is no count", "Give an int from 1 upwards, or None.")

    def check(self, latents: tuple[int, ...]) -> None:
        if isinstance(self.weights, tuple) and len(self.weights) != len(latents):
            raise BadRule(
                f"one weight per latent for {len(latents)} latents", f"{len(self.weights)} weights were given",
                "Give as many, in the order of latents, or one number for all.",
            )  # fmt: skip

    def __str__(self) -> str:
        weights = each(self.weights)
        many = f"{len(weights)} weights from {min(weights):g} to {max(weights):g}" if len(weights) > 6 else self.weights
        top_k = "" if self.top_k is None else f", top_k={self.top_k}"
        return f"Reweight({many}, mode={self.mode!r}{top_k}, others={self.others:g})"


@dataclass(frozen=True)
class Misdirect:
    """Put c u into the stream in place of x: u is a unit vector drawn by ``seed``, the same at every token and call.

    c is ``amount`` in the units of the stream, or ``amount`` times the norm of x with ``unit="norm"``. As in RMU u is
    drawn evenly from positive numbers. Its rule names no latents; the SAE says where.
    """

    amount: int | float
    _: KW_ONLY
    seed: int = 0
    unit: Length = "stream"
    needs_all: ClassVar[bool] = False

    def __post_init__(self):
        object.__setattr__(self, "amount", _one_number("Misdirect", "amount", self.amount))
        if self.unit not in get_args(Length):
            raise BadRule(
                f"Misdirect with unit={self.unit!r}", "there is no such unit", f"Units: {', '.join(get_args(Length))}."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise BadRule(f"Misdirect with seed={self.seed!r}", "that is no seed", "Give an int from 0 to 2^63 - 1.")

    def direction(self, width: int) -> tuple[float, ...]:
        """u, for a stream of ``width``."""
        drawn = random.Random(self.seed)  # whose numbers are the same on every machine and in every version
        numbers = [drawn.random() for _ in range(width)]
        length = sum(number * number for number in numbers) ** 0.5
        return tuple(number / length for number in numbers)

    def check(self, latents: tuple[int, ...]) -> None:
        if latents:
            raise BadRule(
                f"Misdirect on {len(latents)} latents", "it replaces the whole stream",
                "Leave latents empty; to do so where some of them fire, give the rule a trigger or a gate.",
            )  # fmt: skip


@dataclass(frozen=True)
class Project:
    """Take out of x what lies in the span of the latents' decoder rows, whether they are active or not.

    The projection is orthogonal and onto all rows together, so rows that are not orthogonal to each other, or depend on
    each other, are taken out once. ``strength`` 1 leaves nothing of them, 2 reflects.
    """

    strength: int | float = 1.0
    needs_all: ClassVar[bool] = False

    def __post_init__(self):
        object.__setattr__(self, "strength", _one_number("Project", "strength", self.strength))

    def check(self, latents: tuple[int, ...]) -> None:
        """Any latents will do; none leave the stream as it is."""


AnyDense = Splice | Reweight | Misdirect | Project
DENSE_OPS: dict[str, Any] = {"splice": Splice, "reweight": Reweight, "misdirect": Misdirect, "project": Project}
"""Names of the dense ops in a plan file."""


def _one_number(op: str, name: str, value: Any) -> float:
    number = as_amount(f"{op} {name}", value)
    if not isinstance(number, float):
        raise BadRule(f"{op} with {name}={value!r:.40}", "that is not one number", "Give one number.")
    _check_float32(f"{op} by", number)
    return number


def _check_float32(what: str, number: float) -> None:
    if abs(number) > LARGEST:
        raise BadRule(f"{what} {number}", f"float32 ends at {LARGEST:.3g}", "Use smaller numbers.")
