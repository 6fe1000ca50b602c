"""A gate that opens on a topic, from the latents of its tokens and from its words, with a score for every row.

    s_t = (mean of the k largest l of the last 16 tokens) / sd_l + beta (words of the last 24 tokens) / sd_w

The two see different things: latents know what the words mean here, and the table of words has read far more text.
``sd`` are the spreads of the rows' scores. The gate that is deployed has the mean of the heads of all folds; the
scores of the rows, from which a threshold is chosen, come from the head of the fold that has not seen the row, by the
very steps that a deployed gate takes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saeguard.errors import TrainError
from saeguard.gates import Blend, LogOdds, Seen, TopKMean, Watch, Words
from saeguard.training.gate_head import HeadConfig, Heads, fit_heads, segments
from saeguard.training.gate_latents import TokenLatents
from saeguard.training.gate_rows import GateRow, folds_of
from saeguard.training.gate_words import Table, WordsConfig, fit_table, in_most, rounded

QUESTION = 3.0
"""What a row counts for in the table of words, in sentences."""
CPU = torch.device("cpu")

Progress = Callable[[str], None]
"""Called with what is done next."""


@dataclass(frozen=True)
class GateConfig:
    """Windows are in counted tokens; ``segment`` is the longest run of tokens that one label is about."""

    head: HeadConfig = HeadConfig()
    words: WordsConfig = WordsConfig()
    folds: int = 3
    window: int = 16
    last: int = 24
    beta: float = 1.5
    segment: int = 64
    smoothing: float = 16.0
    """Tokens' worth of idf^2 that a score is at least divided by, so that a row's first words do not decide alone."""


@dataclass(frozen=True)
class Sentence:
    """Token ids of a sentence, without special ones."""

    ids: tuple[int, ...]
    topic: str


@dataclass(frozen=True, eq=False)
class FittedGate:
    """``gate`` has threshold 0; ``scores`` are each row's largest, out of fold, ``latents`` and ``words`` its parts."""

    gate: Blend
    scores: Float[Tensor, " row"]
    latents: Float[Tensor, " row"]
    words: Float[Tensor, " row"]
    made: Mapping[str, float] = field(default_factory=dict)


def fit_gate(
    tokens: TokenLatents,
    rows: Sequence[GateRow],
    sentences: Sequence[Sentence],
    forget: str,
    *,
    special: Sequence[int],
    weights: Mapping[str, float] | None = None,
    config: GateConfig = GateConfig(),
    progress: Progress | None = None,
) -> FittedGate:
    """A gate for the topic ``forget``. ``weights`` say how much a row of a topic counts, 1 if they do not.

    The same arguments give the same gate. Raises `TrainError` for rows that cannot tell one topic from others.
    """
    tell, given = progress or (lambda stage: None), dict(weights or {})
    _check(rows, sentences, forget, given, config)
    counts = ~torch.isin(tokens.ids, torch.tensor(sorted(special)))
    if bare := sum(not counts[low:high].any() for low, high in zip(tokens.starts, tokens.starts[1:], strict=False)):
        raise TrainError(
            f"a gate from {len(rows)} rows", f"{bare} of them have no token that counts", "Leave them out."
        )
    labels = torch.tensor([row.topic == forget for row in rows])
    weight = torch.tensor([float(given.get(row.topic, 1.0)) for row in rows])
    folds = folds_of(rows, config.folds)
    tell("the head on latents")
    heads = fit_heads(tokens, counts, segments(tokens.starts, config.segment), labels, weight, folds, config.head)
    tell("the table of words")
    odd = set(special)
    plain = [[token for token in row.text if token not in odd] for row in rows]
    formats = {row.form for row in rows} - {"passage"}
    whole = {form: [[i for i in row.ids if i not in odd] for row in rows if row.form == form] for form in formats}
    table = fit_table(
        [one.ids for one in sentences], [one.topic == forget for one in sentences],
        [float(given.get(one.topic, 1.0)) ** 0.5 for one in sentences],
        plain, labels.tolist(), (QUESTION * weight.sqrt()).tolist(), folds, config.words,
        without=sorted({key for several in whole.values() for key in in_most(several)}),
    )  # fmt: skip
    tell("scores out of fold")
    return _joined(tokens, counts, folds, heads, table, config.smoothing * table.mean_square(plain), config)


def _check(
    rows: Sequence[GateRow],
    sentences: Sequence[Sentence],
    forget: str,
    weights: Mapping[str, float],
    config: GateConfig,
) -> None:
    topics = {row.topic for row in rows}
    if forget not in topics or len(topics) < 2 or not any(one.topic == forget for one in sentences):
        raise TrainError(
            f"a gate for {forget!r}", f"the rows are about {', '.join(sorted(topics))[:200] or 'nothing'}",
            f"Give rows and sentences about {forget}, and about something else.",
        )  # fmt: skip
    known = topics | {one.topic for one in sentences}
    wrong = [name for name, value in weights.items() if name not in known or not 0 < value < float("inf")]
    if wrong:
        raise TrainError(
            f"the weight of {', '.join(wrong)[:200]}", f"topics are {', '.join(sorted(known))[:200]}",
            "Weigh topics that are there, with numbers above 0.",
        )  # fmt: skip
    if config.folds < 2:
        raise TrainError(f"{config.folds} folds", "scores out of fold need two or more", "Give 3.")


def _joined(
    tokens: TokenLatents, counts: Tensor, folds: Sequence[int], heads: Heads, table: Table, floor: float,
    config: GateConfig,
) -> FittedGate:  # fmt: skip
    """Both parts on one scale, and the gate of their sum."""
    fold = torch.tensor(list(folds))
    of_token = fold.repeat_interleave(tokens.starts.diff())
    log_odds = heads.log_odds(tokens).gather(1, of_token[:, None])[:, 0]
    floor = max(floor, 1e-3)
    pool = TopKMean(config.head.k, width=config.window, floor=heads.floor)
    gates = [table.words(number, last=config.last, floor=floor) for number in range(config.folds)]
    paths = list(_paths(tokens, counts, fold, log_odds, pool, gates))
    latents, words = (torch.stack([path[part].max() for path in paths]) for part in (0, 1))
    wide = tuple(max(1e-6, float(part.std())) for part in (latents, words))
    scores = torch.stack([(a / wide[0] + config.beta * b / wide[1]).max() for a, b in paths])
    watch = _watch(heads, wide[0], config)
    written = table.words(None, last=config.last, floor=floor, scale=config.beta / wide[1])
    made = {"sd_latents": wide[0], "sd_words": wide[1], "beta": config.beta, "floor": floor}
    return FittedGate(Blend((watch, written), (1.0, 1.0), 0.0), scores, latents, words, made)


def _watch(heads: Heads, wide: float, config: GateConfig) -> Watch:
    """The mean of all heads, of the latents that any of them looks at."""
    mean = heads.weights.mean(1) / wide
    used = (mean != 0).nonzero()[:, 0]
    evidence = LogOdds(
        tuple(used.tolist()), rounded(mean[used]), float(heads.bias.mean()) / wide, caps=rounded(heads.caps[used])
    )
    return Watch(evidence, TopKMean(config.head.k, width=config.window, floor=heads.floor / wide), 0.0)


def _paths(
    tokens: TokenLatents, counts: Bool[Tensor, " token"], fold: Tensor, log_odds: Tensor, pool: TopKMean,
    gates: Sequence[Words],
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Both scores at every counted token of each row; one row of no counted token is never open."""
    found: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(fold)
    length = tokens.starts.diff()
    for number, gate in enumerate(gates):
        order = (fold == number).nonzero()[:, 0]
        order = order[length[order].argsort(stable=True)]
        for part in order.split(256):
            places = torch.arange(int(length[part].max()))
            inside = places < length[part][:, None]
            place = torch.where(inside, tokens.starts[part][:, None] + places, 0)
            kept, none = inside & counts[place], torch.zeros(*place.shape, 0)
            seen = Seen(none, none, kept, None, None, tokens.ids[place])
            _, a = pool.step(pool.begin(len(part), CPU), log_odds[place].double(), seen)
            _, verdict = gate.step(gate.begin(len(part), CPU), [seen])
            for i, row in enumerate(part.tolist()):
                some = kept[i] if kept[i].any() else slice(0, 1)
                found[row] = a[i][some], verdict.score[i][some]
    return found
