"""IBM's steering modes: from a score of every latent for a topic to the rules that steer towards it.

With w the scores, 0 for latents that have none, and x_hat = decode(f) without the error (arXiv 2506.12576, section 3):

    original   x                                          no rules
    sae        f                                          Splice
    clamp      f, and the 5 best latents + 10             Splice, Add
    weight     act(pre * w)                               Splice, Reweight
    swap       pre where act(pre * w) != 0, else 0        Splice, Reweight; the one that the paper proposes

The published code never puts the error back; ``keep_error`` does, by leaving out the `Splice`. Its weight mode decodes
with the mean of the scores in place of the token's mean, and that squared in place of its deviation; here it decodes as
all others do. It acts on every token, special ones included: that is ``special=True``.
"""

from typing import Any, Literal, get_args

from saeguard.dense import Reweight, Splice
from saeguard.errors import BadRule, ScoreMismatch
from saeguard.ops import Add
from saeguard.plans import Plan, Rule
from saeguard.scoring.table import ScoreTable

TopicMode = Literal["original", "sae", "clamp", "weight", "swap"]


def topic_rules(
    scores: ScoreTable,
    column: str = "topic",
    *,
    mode: TopicMode,
    keep_error: bool = False,
    top: int = 5,
    amount: float = 10.0,
    top_k: int | None = None,
    **where: Any,
) -> tuple[Rule, ...]:
    """The rules of one mode, by the scores in ``column``; none for the original model.

    ``top`` latents get ``amount``, in activation units, under ``clamp``. ``top_k`` is how many latents of a token fire
    under ``weight`` and ``swap``; by default that is up to the SAE's own kind, and an SAE with thresholds then only
    loses latents by weights below 1. ``where`` are `Rule`'s own fields. Raises `BadRule`, `ScoreMismatch`.
    """
    _check(mode, keep_error, top, top_k)
    column_of = scores.column(column)
    splice = () if keep_error or mode == "original" else (Rule(scores.sae, (), Splice("dropped"), **where),)
    if mode in ("original", "sae"):
        return splice
    ranked = scores.ranked(column)
    if not ranked:
        raise ScoreMismatch(
            f"topic mode {mode!r} by {column!r} of {scores.sae}", "no latent has that score", "Score another topic."
        )
    if mode == "clamp":
        best = tuple(ranked[:top])
        return (*splice, Rule(scores.sae, best, Add(amount), **where))
    if not scores.meanings[column].higher:
        raise ScoreMismatch(
            f"topic mode {mode!r} by {column!r} of {scores.sae}", "its lower numbers are the better ones, and these "
            "would weigh least", "Weigh by a column of similarities.",
        )  # fmt: skip
    weights = column_of.tolist()
    found = {latent: weights[latent] for latent in sorted(ranked) if weights[latent]}
    op = Reweight(tuple(found.values()), mode="swap" if mode == "swap" else "weight", top_k=top_k)
    return (*splice, Rule(scores.sae, tuple(found), op, **where))


def topic_plan(scores: ScoreTable, column: str = "topic", *, name: str = "", **mode: Any) -> Plan | None:
    """A plan of `topic_rules`; None for the original model, as `steer` takes it."""
    rules = topic_rules(scores, column, **mode)
    return Plan(rules, name) if rules else None


def _check(mode: str, keep_error: bool, top: int, top_k: int | None) -> None:
    if mode not in get_args(TopicMode):
        raise BadRule(f"topic mode {mode!r}", "there is no such mode", f"Modes: {', '.join(get_args(TopicMode))}.")
    if keep_error and mode == "sae":
        raise BadRule(
            "topic mode 'sae' with keep_error=True", "the reconstruction and its error are the stream as it is",
            "Use mode='original', or leave keep_error out.",
        )  # fmt: skip
    if top_k is not None and mode not in ("weight", "swap"):
        raise BadRule(f"topic mode {mode!r} with top_k={top_k}", "it ranks nothing", "Leave top_k out.")
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise BadRule(f"topic mode {mode!r} with top={top!r}", "that is no count of latents", "Give 1 or more.")
