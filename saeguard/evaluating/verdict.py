"""What a self-check found, in numbers, and which of them speak against the SAE.

Every bound is a constant here, with what right and wrong pairs gave; `benchmarks/self_check.py` measures them again.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from saeguard import strict_json
from saeguard.errors import SelfCheckFailed
from saeguard.evaluating.fits import EXACT

MOST_FVU = 0.95
"""Good: 0.10 to 0.69, a small transcoder on Shakespeare 0.73. An FVU of 1 is what a constant gives."""
BETTER_ELSEWHERE = 0.96
"""Times the FVU here. Good pairs find nothing below 1.03, on text of other kinds 0.98; one layer off, at most 0.92."""
BETTER_READING = 0.95
"""Times the FVU as read. Good pairs: none below 0.99; misreadings whose remedy is listed: nearly all below 0.93."""
BETTER_LOUDER_READING, LOUDER = 0.82, 1.1
"""The same for readings under which L0 grows by more than a tenth, which alone lowers the FVU of good pairs to 0.86;
thresholds that were not rescaled with their rows: 0.75 to 0.81."""
LEAST_SCALE = 0.88
"""Good: 0.93 and more, on text of other kinds 0.91. TopK and thresholds read as ReLU: 0.60 to 0.92."""
MOST_SCALE, MOST_SCALE_SHRUNK = 1.15, 1.35
"""Good: up to 1.00, and 1.19 under an L1 penalty. A decoder norm that only the encoder has: mostly 1.2 and more."""
MOST_MEAN_SHARE = 0.13
"""Good: up to 0.04, on text of other kinds 0.10. Without b_dec in the decoder: 0.14 to 0.97."""
MOST_OVERSHOOT = 0.29
"""Good: up to 0.23 (overfitted), on text of other kinds 0.26. TopK and thresholds read as ReLU: 0.21 to 1.2."""
MOST_UNDERSHOOT, MOST_UNDERSHOOT_SHRUNK = 0.4, 1.0
"""Good: up to 0.14, and 0.63 under an L1 penalty. A decoder norm that only the encoder has: 0.5 and more."""
LEAST_WEAK_SCALE = 0.65
"""Good: 0.74 and more, on text of other kinds 0.72. TopK and thresholds read as ReLU: -0.3 to 0.75."""
L0_FACTOR = 3.0
"""Times the stated L0, either way. It varies by 1.5 with the text."""
MOST_L0_OF_WIDTH = 0.5
"""Times d_in. Good: 0.26 under an L1 penalty, 0.14 else. TopK and thresholds read as ReLU: 0.4 to 0.9."""
FEWEST_TOKENS = 100
"""Below it the numbers above are noise."""
SHRINKING = ("relu", "tanh_relu")
"""Kinds that are trained under an L1 penalty."""


@dataclass(frozen=True)
class Reason:
    """Why an SAE is refused: the name of the number, what it is, and what to look at."""

    number: str
    found: str
    proceed: str


@dataclass(frozen=True)
class SelfCheck:
    """What an SAE does at its site, over ``n_tokens`` typical tokens: neither special nor massive.

    ``fvu``, ``scale`` (of the best multiple of x_hat), ``mean_share`` and the rms of latents whose best gain is below
    1 (``overshoot``) or above (``undershoot``) are defined in `saeguard.evaluating.fits`. ``l0`` counts active latents
    per token, ``l0_special`` per special token, ``l0_expected`` is what the SAE's files say. ``row_cosine`` is the
    median between encoder columns and decoder rows (None for transcoders), ``silent`` the share of latents that never
    fired. ``elsewhere`` and ``readings`` give the FVU at other sites, and under other conventions for the same
    weights, as multiples of the FVU here: below 1, the other one explains more. ``louder`` names the readings under
    which clearly more latents fire, ``shrinks`` says whether the kind is one that L1 penalties are used with.
    """

    sae: str
    model: str
    place: str
    d_in: int
    n_tokens: int
    n_massive: int
    n_special: int
    fvu: float
    l0: float
    l0_expected: float | None
    l0_special: float | None
    scale: float
    mean_share: float
    overshoot: float
    undershoot: float
    weak_scale: float
    shrinks: bool
    row_cosine: float | None
    silent: float
    elsewhere: dict[str, float]
    readings: dict[str, float]
    louder: tuple[str, ...]
    reasons: tuple[Reason, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the pair."""
        return not self.reasons

    def require(self) -> "SelfCheck":
        """This check. Raises `SelfCheckFailed` with the numbers that gave the SAE away."""
        if self.reasons:
            raise SelfCheckFailed(
                f"SAE {self.sae} at {self.place} of {self.model}",
                "; ".join(reason.found for reason in self.reasons),
                " ".join(dict.fromkeys(reason.proceed for reason in self.reasons)),
            )
        return self

    def to_json(self) -> str:
        """All numbers and reasons, with ``passed``."""
        return json.dumps({"passed": self.passed, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str | bytes) -> "SelfCheck":
        """Read what `to_json` wrote."""
        values = strict_json.parse(text)
        values.pop("passed")
        reasons = tuple(Reason(**reason) for reason in values["reasons"])
        return cls(**values | {"louder": tuple(values["louder"]), "reasons": reasons})

    def __str__(self) -> str:
        special = "" if self.l0_special is None else f", {self.l0_special:.0f} on special tokens"
        expected = "" if self.l0_expected is None else f" (stated {self.l0_expected:.4g})"
        cosine = "" if self.row_cosine is None else f", encoder and decoder rows at cosine {self.row_cosine:.2f}"
        lines = [
            f"{self.sae} at {self.place} of {self.model}: {'passed' if self.passed else 'REFUSED'}",
            f"  FVU {self.fvu:.4f} over {self.n_tokens} tokens ({self.n_massive} massive ones left out)",
            f"  L0 {self.l0:.1f}{expected}{special}; {self.silent:.0%} of latents never fired{cosine}",
            f"  best scale {self.scale:.3f}, error in its mean {self.mean_share:.1%}, "
            f"gains off by -{self.overshoot:.2f} and +{self.undershoot:.2f}, weak activations at {self.weak_scale:.2f}",
            f"  elsewhere, times this FVU: {_least(self.elsewhere)}",
            f"  other readings: {_least(self.readings)}",
        ]
        return "\n".join(lines + [f"  - {reason.found}. {reason.proceed}" for reason in self.reasons])


def reasons_against(check: SelfCheck) -> tuple[Reason, ...]:
    """Everything that speaks against the SAE, what explains the most first."""
    return (*_better(check), *_absolute(check), *_sparsity(check))


def _better(check: SelfCheck) -> Iterator[Reason]:
    bounds = {name: BETTER_LOUDER_READING if name in check.louder else BETTER_READING for name in check.readings}
    better = {name: ratio for name, ratio in check.readings.items() if ratio < bounds[name]}
    if better:
        name, ratio = min(better.items(), key=lambda item: item[1])
        yield Reason(
            "reading",
            f"its FVU is {check.fvu:.3f} as it was read, and {ratio:.3g} times that {name}",
            "Check the conventions under which its file was read.",
        )
    place, ratio = min(check.elsewhere.items(), key=lambda item: item[1], default=("", 1.0))
    if ratio < BETTER_ELSEWHERE:
        yield Reason(
            "elsewhere",
            f"its FVU is {check.fvu:.3f} here, and {ratio:.3g} times that at {place}",
            f"Check its site: was it trained at {place}, or one layer off?",
        )


def _absolute(check: SelfCheck) -> Iterator[Reason]:
    if not check.fvu <= MOST_FVU:
        yield Reason(
            "fvu",
            f"its FVU is {check.fvu:.3f}, above {MOST_FVU}",
            "Check that it was trained on this model, and the orientation of its weights.",
        )
    most_scale = MOST_SCALE_SHRUNK if check.shrinks else MOST_SCALE
    if not LEAST_SCALE <= check.scale <= most_scale:
        yield Reason(
            "scale",
            f"its reconstruction fits best {check.scale:.3f} times as large, outside {LEAST_SCALE} to {most_scale}",
            "Check input scales, decoder norms and thresholds.",
        )
    if check.fvu > EXACT and not check.mean_share <= MOST_MEAN_SHARE:
        yield Reason(
            "mean_share",
            f"{check.mean_share:.0%} of its squared error is one constant vector, above {MOST_MEAN_SHARE:.0%}",
            "Check b_dec, in the decoder and in the encoder's fold.",
        )
    for number, value, bound, word in (
        ("overshoot", check.overshoot, MOST_OVERSHOOT, "large"),
        ("undershoot", check.undershoot, MOST_UNDERSHOOT_SHRUNK if check.shrinks else MOST_UNDERSHOOT, "small"),
    ):
        if not value <= bound:
            yield Reason(
                number,
                f"its latents are too {word} by {value:.2f} of their own gain, above {bound}",
                "Check its activation (TopK or a threshold read as ReLU), decoder norms and input scale.",
            )


def _sparsity(check: SelfCheck) -> Iterator[Reason]:
    advice = "Check its activation (TopK or a threshold read as ReLU), its threshold and its input scale."
    if not check.weak_scale >= LEAST_WEAK_SCALE:
        yield Reason(
            "weak_scale",
            f"the weaker half of its activations fits best {check.weak_scale:.2f} times as large, "
            f"below {LEAST_WEAK_SCALE}",
            advice,
        )
    if check.l0_expected and not check.l0_expected / L0_FACTOR <= check.l0 <= check.l0_expected * L0_FACTOR:
        yield Reason("l0", f"its L0 is {check.l0:.1f}, and {check.l0_expected:.4g} is stated", advice)
    elif not 0 < check.l0 <= MOST_L0_OF_WIDTH * check.d_in:
        yield Reason("l0", f"its L0 is {check.l0:.1f} in a stream of width {check.d_in}", advice)


def _least(ratios: dict[str, float], n: int = 3) -> str:
    first = sorted(ratios.items(), key=lambda item: item[1])[:n]
    return ", ".join(f"{name} x{ratio:.3g}" for name, ratio in first) or "none"
