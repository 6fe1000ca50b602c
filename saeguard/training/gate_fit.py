"""A gate that opens on a topic, from its words or from them and the latents of its tokens, with a score for every row.

    words    s_t = the largest sum of q over a run of tokens that ends here                         (`gate_piled`)
    both     s_t = (mean of the k largest l of the last 16 tokens) / sd_l + beta (words) / sd_w

The two see different things: latents know what the words mean here, and the table of words has read far more text. But
what latents say of a question changes with the text around it, and what piled words say does not. ``sd`` are the
spreads of the rows' scores; ``beta`` is the largest of a few whose recall is within a hundredth of the best, where a
hundredth of the other rows fires. The gate that is deployed has the mean of the heads of all folds; the scores of the
rows, from which a threshold is chosen, come from the head of the fold that has not seen the row, by the very steps that
a deployed gate takes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saeguard.errors import TrainError
from saeguard.gates import Blend, LogOdds, Seen, TopKMean, Watch, WordsCusum
from saeguard.training.gate_head import HeadConfig, Heads, fit_heads, segments
from saeguard.training.gate_latents import TokenLatents
from saeguard.training.gate_piled import Piled, PiledConfig, fit_piled
from saeguard.training.gate_rows import GateRow, folds_of
from saeguard.training.gate_words import SPAN, WordsConfig, fit_table, in_most, rounded

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
    piled: PiledConfig = PiledConfig()
    folds: int = 3
    window: int = 16
    betas: tuple[float, ...] = (0.5, 1.5, 5.0, 15.0, 50.0)
    segment: int = 64


@dataclass(frozen=True)
class Sentence:
    """Token ids of a sentence, without special ones."""

    ids: tuple[int, ...]
    topic: str


@dataclass(frozen=True, eq=False)
class FittedGate:
    """``gate`` has threshold 0; ``scores`` are each row's largest, out of fold, ``parts`` those of its parts."""

    gate: Blend | WordsCusum
    scores: Float[Tensor, " row"]
    parts: Mapping[str, Float[Tensor, " row"]] = field(default_factory=dict)
    made: Mapping[str, float] = field(default_factory=dict)


def fit_gate(
    tokens: TokenLatents,
    rows: Sequence[GateRow],
    sentences: Sequence[Sentence],
    forget: str,
    *,
    special: Sequence[int],
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
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
    piled = _Texts.of(rows, sentences, forget, special, given).piled(folds, seed, config, tell)
    tell("scores out of fold")
    return _joined(tokens, counts, folds, heads, piled, labels, config)


def fit_words_gate(
    rows: Sequence[GateRow],
    sentences: Sequence[Sentence],
    forget: str,
    *,
    special: Sequence[int],
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    config: GateConfig = GateConfig(),
    progress: Progress | None = None,
) -> FittedGate:
    """The same of words alone, for which no model has to run: a `WordsCusum`, which no text in front can close."""
    tell, given = progress or (lambda stage: None), dict(weights or {})
    _check(rows, sentences, forget, given, config)
    folds = folds_of(rows, config.folds)
    piled = _Texts.of(rows, sentences, forget, special, given).piled(folds, seed, config, tell)
    tell("scores out of fold")
    scores, odd = torch.zeros(len(rows)), torch.tensor(sorted(special))
    for fold in range(config.folds):
        gate, mine = piled.gate(fold), [number for number, of in enumerate(folds) if of == fold]
        mine.sort(key=lambda number: len(rows[number].ids))
        for start in range(0, len(mine), 256):
            part = mine[start : start + 256]
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[i].ids) for i in part], batch_first=True)
            lengths = torch.tensor([len(rows[i].ids) for i in part])
            counts = ~torch.isin(ids, odd) & (torch.arange(ids.shape[1]) < lengths[:, None])
            none = torch.zeros(*ids.shape, 0)
            _, verdict = gate.step(gate.begin(len(part), CPU), [Seen(none, none, counts, None, None, ids)])
            scores[part] = verdict.score.amax(1).float()
    gate = piled.gate()
    return FittedGate(gate, scores, {"words": scores}, {"drift": gate.drift})


@dataclass(frozen=True, eq=False)
class _Texts:
    """What words are learned from: token ids without special ones, labels and weights of sentences and of rows.

    ``formats`` are keys of the n-grams that a format brings with it.
    """

    sentences: list[Sequence[int]]
    sentence_labels: list[bool]
    sentence_weights: list[float]
    rows: list[list[int]]
    row_labels: list[bool]
    row_weights: list[float]
    formats: list[int]

    @classmethod
    def of(cls, rows: Sequence[GateRow], sentences: Sequence[Sentence], forget: str, special: Sequence[int],
           given: Mapping[str, float]) -> "_Texts":  # fmt: skip
        odd, forms = set(special), {row.form for row in rows} - {"passage"}
        root = lambda topic: float(given.get(topic, 1.0)) ** 0.5
        whole = {form: [[i for i in row.ids if i not in odd] for row in rows if row.form == form] for form in forms}
        return cls(
            [one.ids for one in sentences], [one.topic == forget for one in sentences],
            [root(one.topic) for one in sentences],
            [[token for token in row.text if token not in odd] for row in rows],
            [row.topic == forget for row in rows], [QUESTION * root(row.topic) for row in rows],
            sorted({key for several in whole.values() for key in in_most(several)}),
        )  # fmt: skip

    def piled(self, folds: Sequence[int], seed: int, config: GateConfig, tell: Progress) -> Piled:
        tell("the table of words")
        table = fit_table(
            self.sentences, self.sentence_labels, self.sentence_weights, self.rows, self.row_labels, self.row_weights,
            folds, config.words, without=self.formats,
        )  # fmt: skip
        tell("runs of words")
        return fit_piled(
            table, [*self.sentences, *self.rows], [*self.sentence_labels, *self.row_labels],
            [*self.sentence_weights, *self.row_weights], [*([-1] * len(self.sentences)), *folds],
            formats=[key for key in self.formats if key < SPAN], seed=seed, config=config.piled,
        )  # fmt: skip


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
    tokens: TokenLatents, counts: Tensor, folds: Sequence[int], heads: Heads, piled: Piled,
    labels: Bool[Tensor, " row"], config: GateConfig,
) -> FittedGate:  # fmt: skip
    """Both parts on one scale, and the gate of their sum."""
    fold = torch.tensor(list(folds))
    of_token = fold.repeat_interleave(tokens.starts.diff())
    log_odds = heads.log_odds(tokens).gather(1, of_token[:, None])[:, 0]
    pool = TopKMean(config.head.k, width=config.window, floor=heads.floor)
    gates = [piled.gate(number) for number in range(config.folds)]
    paths = list(_paths(tokens, counts, fold, log_odds, pool, gates))
    latents, words = (torch.stack([path[part].max() for path in paths]) for part in (0, 1))
    wide = tuple(max(1e-6, float(part.std())) for part in (latents, words))
    by_beta = {b: torch.stack([(x / wide[0] + b * y / wide[1]).max() for x, y in paths]) for b in config.betas}
    beta = _chosen(by_beta, labels)
    scores = by_beta[beta]
    watch = _watch(heads, wide[0], config)
    written = piled.gate(scale=beta / wide[1])
    made = {"sd_latents": wide[0], "sd_words": wide[1], "beta": beta, "drift": written.drift}
    return FittedGate(Blend((watch, written), (1.0, 1.0), 0.0), scores, {"latents": latents, "words": words}, made)


def _chosen(by_beta: Mapping[float, Tensor], labels: Bool[Tensor, " row"]) -> float:
    """What words say survives the text around it, so the more of it the better, where it costs little."""
    recall = {
        beta: float((scores[labels] > torch.quantile(scores[~labels], 0.99, interpolation="higher")).double().mean())
        for beta, scores in by_beta.items()
    }
    return max(beta for beta, found in recall.items() if found >= max(recall.values()) - 0.01)


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
    gates: Sequence[WordsCusum],
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
