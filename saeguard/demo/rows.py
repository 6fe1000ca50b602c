"""What the demonstration asks, and under which plan each row of its batch answers."""

from dataclasses import dataclass

from saeguard.gates import AnyActive
from saeguard.ops import AtLeast, Clamp, Scale
from saeguard.plans import Plan, Rule

SAE_NAME = "smollm2-135m-instruct/resid_post.18"


@dataclass(frozen=True)
class DemoRow:
    """One row: what it shows, the prompt, and its plan."""

    title: str
    prompt: str
    plan: Plan | None


BOOST = Rule(SAE_NAME, (1,), AtLeast(1.2, unit="max"), phase="generated")
TURN = Rule(SAE_NAME, (7,), Scale(-2.0))
SET_WHERE = Rule(SAE_NAME, (3,), Clamp(1.5, when="always", unit="max"), trigger=AnyActive((2,)), phase="generated")

ROWS = (
    DemoRow(
        "Boost a topic in every answer", "Suggest something nice to do on a free Saturday.", Plan((BOOST,), "boost")
    ),
    DemoRow("Turn a topic around", "Explain how plants make their food.", Plan((TURN,), "turn around")),
    DemoRow("Act only where something fires", "Why do people visit a doctor?", Plan((SET_WHERE,), "where it fires")),
    DemoRow("Leave a row alone", "Give me three tips for learning a language.", None),
)
