"""What the demonstration asks, and under which plan each row of its batch answers."""

from dataclasses import dataclass

from saeguard.ops import AtLeast, Clamp, Scale
from saeguard.plans import Plan, Rule
from saeguard.triggers import AnyActive

SAE_NAME = "smollm2-135m-instruct/resid_post.20"
EARTH, SUN = 273, 4284
CELLS = 3502
STARS, LOVE = 4019, 436
"""Latents of that SAE, by what they fire on most; `saeguard latents show` says more."""


@dataclass(frozen=True)
class DemoRow:
    """One row: what it shows, the prompt, and its plan."""

    title: str
    prompt: str
    plan: Plan | None


PUSH = Rule(SAE_NAME, (EARTH, SUN), AtLeast(0.8, unit="max"), phase="generated")
TURN = Rule(SAE_NAME, (CELLS,), Scale(-1.0))
SET_WHERE = Rule(SAE_NAME, (LOVE,), Clamp(1.5, when="always", unit="max"), trigger=AnyActive((STARS,)))

ROWS = (
    DemoRow("Push a topic into every answer", "Tell me one interesting fact.", Plan((PUSH,), "push Earth and Sun")),
    DemoRow("Turn a topic around", "What is a cell?", Plan((TURN,), "turn cells around")),
    DemoRow("Act only where something fires", "Why do stars shine?", Plan((SET_WHERE,), "love where stars are")),
    DemoRow("Leave a row alone", "Give me three tips for learning a language.", None),
)
