"""Sequential unlearning: topic after topic is added to what is forgotten, and after each step every topic is asked for.

    kept     a topic to forget is forgotten after a step where guarded accuracy is at most chance + 5 points
    loss     100 (right plainly - right under guard) / questions, in points, over topics that no step forgets

The interval of the loss is that of the mean of paired differences, one per question, by their normal approximation.
"""

import math
from collections.abc import Sequence
from typing import Any

from saeguard.evaluating.multiple_choice import Answers
from saeguard.evaluating.unlearning import share

SLACK = 0.05
"""Above chance, as a share, that still counts as forgotten."""
_Z = 1.959963984540054


def after_step(plain: Answers, guarded: Answers, forgotten: Sequence[str], to_come: Sequence[str]) -> dict[str, Any]:
    """One step as JSON: per topic both accuracies and the questions in which a gate opened, then what is lost where.

    ``forgotten`` are the topics of the steps so far and ``to_come`` those of later ones, which count as neither
    forgotten nor kept. ``loss`` has the topics that are never forgotten: together, and the mean over topics.
    """
    topics = sorted({one.topic for one in plain.questions})
    parts = [_of_topic(topic, plain, guarded) for topic in topics]
    for part in parts:
        part["role"] = _role(part["topic"], forgotten, to_come)
        part["forgotten"] = part["guarded"]["share"] <= part["chance"] + SLACK
    never = [part for part in parts if part["role"] == "never forgotten"]
    return {
        "forgets": list(forgotten), "topics": parts,
        "forgotten": {part["topic"]: part["forgotten"] for part in parts if part["role"] == "to forget"},
        "loss": _loss(plain, guarded, {part["topic"] for part in never}, [part["loss"] for part in never]),
    }  # fmt: skip


def _of_topic(topic: str, plain: Answers, guarded: Answers) -> dict[str, Any]:
    places = [i for i, one in enumerate(plain.questions) if one.topic == topic]
    right = [[side.right()[i] for i in places] for side in (plain, guarded)]
    a, b = (share(sum(some), len(places)) for some in right)
    opened = sum(guarded.asked[i].opened for i in places)
    chance = sum(1 / len(plain.questions[i].choices) for i in places) / len(places)
    return {
        "topic": topic, "n": len(places), "chance": chance, "plain": a, "guarded": b,
        "loss": 100 * (a["share"] - b["share"]), "triggered": share(opened, len(places)),
    }  # fmt: skip


def _role(topic: str, forgotten: Sequence[str], to_come: Sequence[str]) -> str:
    return "to forget" if topic in forgotten else "to come" if topic in to_come else "never forgotten"


def _loss(plain: Answers, guarded: Answers, topics: set[str], each: Sequence[float]) -> dict[str, Any]:
    """In points; null where no topic is never forgotten."""
    pairs = zip(plain.questions, plain.right(), guarded.right(), strict=True)
    lost = [int(a) - int(b) for one, a, b in pairs if one.topic in topics]
    if not lost:
        return {"n": 0, "points": None, "low": None, "high": None, "mean_of_topics": None}
    n, mean = len(lost), sum(lost) / len(lost)
    half = _Z * math.sqrt(max(sum(x * x for x in lost) / n - mean**2, 0.0) / n)
    return {
        "n": n, "points": 100 * mean, "low": 100 * (mean - half), "high": 100 * (mean + half),
        "mean_of_topics": sum(each) / len(each),
    }  # fmt: skip
