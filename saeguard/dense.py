"""The dense ops: frozen data for what needs all latents of a token at once, and so is not one line of the ops' table.

    Splice      x' = x_hat                  dropped: the stream becomes the reconstruction, without the SAE's error
    Reweight    x' = x + (f' - f) @ W_dec   weight:  f' = act(pre * w)
                                            swap:    f' = pre where act(pre * w) != 0, else 0

Both are IBM's (arXiv 2506.12576, section 3): its modes are a `Splice` and a `Reweight` beside each other. Every rule
adds its own difference to x, all read from the same x, so leaving the `Splice` out keeps the error.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from saeguard.errors import BadRule
from saeguard.ops import Amount, as_amount

Error = Literal["dropped", "boosted", "kept"]
Mode = Literal["weight", "swap"]
LARGEST = 3.4028234663852886e38
"""The largest float32: kernels hold weights in it."""


@runtime_checkable
class DenseOp(Protocol):
    """What a rule does to all latents of a token at once."""

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

    def __post_init__(self):
        if self.mode not in get_args(Mode):
            raise BadRule(f"Reweight with mode={self.mode!r}", "there is no such mode", 'Use "weight" or "swap".')
        object.__setattr__(self, "weights", as_amount("Reweight weight", self.weights))
        object.__setattr__(self, "others", as_amount("Reweight others", self.others))
        if not isinstance(self.others, float):
            raise BadRule(f"Reweight with others={self.others}", "that is not one number", "Give one weight for all.")
        largest = max((abs(weight) for weight in (*self._each(), self.others)), default=0.0)
        if largest > LARGEST:
            raise BadRule(f"Reweight by {largest}", f"float32 ends at {LARGEST:.3g}", "Use smaller weights.")
        k = self.top_k
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise BadRule(f"Reweight with top_k={k!r}", "that is no count", "Give an int from 1 upwards, or None.")

    def _each(self) -> tuple[float, ...]:
        return self.weights if isinstance(self.weights, tuple) else (self.weights,)  # type: ignore[return-value]

    def check(self, latents: tuple[int, ...]) -> None:
        if isinstance(self.weights, tuple) and len(self.weights) != len(latents):
            raise BadRule(
                f"one weight per latent for {len(latents)} latents", f"{len(self.weights)} weights were given",
                "Give as many, in the order of latents, or one number for all.",
            )  # fmt: skip

    def __str__(self) -> str:
        each = self._each()
        many = f"{len(each)} weights from {min(each):g} to {max(each):g}" if len(each) > 6 else self.weights
        top_k = "" if self.top_k is None else f", top_k={self.top_k}"
        return f"Reweight({many}, mode={self.mode!r}{top_k}, others={self.others:g})"


DENSE_OPS: dict[str, Any] = {"splice": Splice, "reweight": Reweight}
"""Names of the dense ops in a plan file."""
