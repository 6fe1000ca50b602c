"""From texts and training questions to what the systems are made of, and what each of them has to do.

Nothing here looks at the validation questions but the gates' frontier, which only reports on them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from benchmarks.baselines import choosing, measuring
from benchmarks.baselines.frontier import Roles, by_role, frontier
from benchmarks.baselines.probe import ProbeConfig, fit_probe
from benchmarks.baselines.published import PublishedHook, published_threshold
from benchmarks.baselines.rmu import RMUConfig, rmu
from benchmarks.baselines.streams import Streams, gather_streams, scores
from benchmarks.baselines.systems import BY_LABELS, Parts, digest, farrell_rule, hits_gates, named, rho, systems
from saeguard.cli.texts import documents_of
from saeguard.evaluating.multiple_choice import Question, asked_as
from saeguard.evaluating.prompts import bare_ids
from saeguard.evaluating.subject import Plain
from saeguard.gates import Gate, Latched
from saeguard.guarding.calibrating import threshold
from saeguard.guarding.policy import Policy
from saeguard.latents import LatentTable
from saeguard.scoring.sentences import Embedder
from saeguard.training.corpus import read_corpus, special_ids

STRENGTHS = (0.3, 1.0, 3.0)
"""Of Farrell's clamp, in lengths of x."""
DSG_LEVEL: tuple[float, Any] = (0.05, "percentile")
PROMPTS = 12
"""Answers that are written with the cache and without."""
CONTEXT = 128
Tell = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Setting:
    """What is compared, on what, and where results are kept."""

    model: Any
    tokenizer: Any
    sae: Any
    table: LatentTable
    policy: Policy
    embedder: Embedder
    roles: Roles
    questions: Sequence[Question]
    wide: Sequence[Question]
    """Of all topics, for the gates alone."""
    train: Sequence[Question]
    forget: Sequence[Path]
    retain: Sequence[Path]
    benign: Sequence[Path]
    work: Path
    tokens: int = 20_000
    tuned_on: int = 30
    """Questions of either kind on which Farrell's strength is chosen."""
    benign_rows: int = 16
    padded_rows: int = 12
    new_tokens: int = measuring.NEW_TOKENS
    exact: bool = False
    also: tuple[Policy, ...] = ()
    """More policies, each with its own gate and action."""
    rmu: RMUConfig = RMUConfig()
    probe: ProbeConfig = ProbeConfig()


def prepare(setting: Setting, kept: measuring.Kept, tell: Tell) -> tuple[Parts, list[dict[str, Any]]]:
    """What the systems are made of, and the gates' frontier."""
    chosen = _choose(setting, tell)
    gates = _gates(setting, chosen, tell)
    tuned, key = _tuned(setting, tell)
    thresholds = gates.thresholds | {"published": _published(setting, chosen.dsg_texts, gates.c, tell)}
    parts = Parts(
        setting.model, setting.tokenizer, setting.sae, setting.table, setting.policy, chosen, thresholds, gates.probe,
        gates.c, STRENGTHS[0], tuned, key, setting.roles.topic, also=setting.also,
    )  # fmt: skip
    return replace(parts, farrell=_strength(setting, parts, kept, tell)), gates.frontier


@dataclass(frozen=True, eq=False)
class _Gates:
    """Thresholds by name, the probe's gate with its own, the median length of x, and the frontier."""

    thresholds: dict[str, float]
    probe: Gate
    c: float
    frontier: list[dict[str, Any]]


def _gates(setting: Setting, chosen: choosing.Chosen, tell: Tell) -> _Gates:
    """Calibrated on harmless training questions; DSG's as DSG does it, the others as the policy's own was."""
    sae, topics = setting.sae, [one.topic for one in setting.train]
    special = sorted({*special_ids(setting.tokenizer), *sae.manifest.get("special_ids", ())})
    train = _streams(setting, _rows(setting, setting.train), "training questions", tell)
    tell("the linear probe")
    labels = torch.tensor([topic == setting.roles.topic for topic in topics])
    probe = fit_probe(train, labels, special, sae.site, setting.probe)
    own = {named(policy, setting.policy): _gate(policy) for policy in (setting.policy, *setting.also)}
    gates: dict[str, Any] = hits_gates(chosen.dsg_questions) | {
        BY_LABELS: rho(chosen.labels, 0.0), "raw probe": probe.gate, **own,
    }  # fmt: skip
    tell("thresholds")
    thresholds = {name: _threshold(gate) for name, gate in own.items()}
    for name in (one for one in gates if one not in thresholds):
        found = probe.scores if name == "raw probe" else scores(gates[name], sae, train, special)
        harmless = by_role(found, topics, setting.roles)["retain"].tolist()
        level, method = DSG_LEVEL if name.startswith("rho") else _level(setting.policy)
        thresholds[name] = threshold(harmless, level=level, method=method).value
    wide = _streams(setting, _rows(setting, setting.wide), "validation questions", tell)
    found = {name: scores(gate, sae, wide, special) for name, gate in gates.items()}
    told = frontier(found, thresholds, [one.topic for one in setting.wide], setting.roles)
    fired: Any = probe.gate.gate
    counted = ~torch.isin(torch.tensor([i for row in train.ids for i in row]), torch.tensor(special))
    c = float(train.x[counted].norm(dim=-1).median())
    return _Gates(thresholds, Latched(replace(fired, threshold=thresholds["raw probe"])), c, told)


def _choose(setting: Setting, tell: Tell) -> choosing.Chosen:
    """Latents from raw texts, from questions as they are asked, and from labels."""
    topic = setting.roles.topic
    sides = {"forget": _documents(setting, setting.forget), "retain": _documents(setting, setting.retain)}
    asked = {"forget": [asked_as(one) for one in setting.train if one.topic == topic],
             "retain": [asked_as(one) for one in setting.train if one.topic != topic]}  # fmt: skip
    found = []
    for name, texts in (("texts", sides), ("questions", asked)):
        tell(f"choosing latents on {name}")
        found.append(choosing.statistics_of(setting.model, setting.tokenizer, setting.sae, texts,
                                            setting.work / "statistics", n_tokens=setting.tokens))  # fmt: skip
    return choosing.Chosen(
        choosing.by_dsg(found[0]), choosing.by_dsg(found[1]), choosing.by_farrell(found[0]),
        choosing.by_labels(setting.sae, setting.table, topic, setting.embedder),
    )  # fmt: skip


def pieces(files: Sequence[Path], tokenizer: Any, tokens: int, most: int) -> Int[Tensor, "row column"]:
    """Rows of so many tokens each, BOS included, in an order by chance that is always the same; no shorter ones."""
    chunks = read_corpus(files, tokenizer, context=tokens, n_tokens=4 * most * tokens)
    return chunks.ids[chunks.kept[:, -1]][:most]


def _documents(setting: Setting, files: Sequence[Path]) -> list[str]:
    return [text for texts in documents_of([str(file) for file in files], setting.tokenizer).values() for text in texts]


def _rows(setting: Setting, questions: Sequence[Question]) -> list[list[int]]:
    return [bare_ids(setting.tokenizer, asked_as(one)) for one in questions]


def _streams(setting: Setting, rows: Sequence[Sequence[int]], what: str, tell: Tell) -> Streams:
    told = lambda done, total: tell(f"{what}: {done} of {total} rows")
    return gather_streams(
        setting.model, setting.sae.site, rows, setting.work / "streams", exact=setting.exact, progress=told
    )


def _published(setting: Setting, latents: tuple[int, ...], c: float, tell: Tell) -> float:
    """DSG's own calibration: pieces of retain texts, without a question in them."""
    streams = _streams(setting, pieces(setting.retain, setting.tokenizer, CONTEXT, 100).tolist(), "retain texts", tell)
    hook = PublishedHook(setting.sae, latents, c, 0.0)
    return published_threshold(hook, [streams.row(i) for i in range(len(streams))])


def _level(policy: Policy) -> tuple[float, Any]:
    """What the policy's own threshold was calibrated for."""
    return float(policy.calibration.get("level", 0.01)), policy.calibration.get("method", "certain")


def _gate(policy: Policy) -> Any:
    """The first one's."""
    return policy.plan.rules[0].gate if policy.plan is not None else policy.refusals[0].gate


def _threshold(gate: Any) -> float:
    return _threshold(gate.gate) if isinstance(gate, Latched) else gate.threshold


def _tuned(setting: Setting, tell: Tell) -> tuple[Any, str]:
    """RMU's model, and what it depends on."""
    config = setting.rmu
    read = lambda files: pieces(files, setting.tokenizer, config.tokens, config.steps * config.rows)
    forget, retain = read(setting.forget), read(setting.retain)
    told = lambda done, total: tell(f"RMU: {done} of {total} steps")
    tuned = rmu(setting.model, forget, retain, config, setting.work / "rmu", progress=told)
    return tuned, digest(asdict(config), forget.tolist(), retain.tolist())


def _strength(setting: Setting, parts: Parts, kept: measuring.Kept, tell: Tell) -> float:
    """Farrell's, as SAEBench chooses it: the lowest accuracy on the topic that leaves 99 % of that on the others.

    Where none does, the one that parts the two most. On training questions.
    """
    some: list[Question] = []
    for role in ("forget", "retain"):
        own = [one for one in setting.train if setting.roles.of(one.topic) == role]
        some += own[:: max(1, len(own) // setting.tuned_on)][: setting.tuned_on]
    n = sum(one.topic == setting.roles.topic for one in some)
    tried = [systems(parts)[0]] + [
        parts.planned(f"Farrell, {s:g}", "tried", farrell_rule(setting.sae, parts.chosen.farrell, s)) for s in STRENGTHS
    ]
    right = [measuring.measure(one, {"training": measuring.answering(some)}, kept, tell) for one in tried]
    shares = []
    for found in right:
        told = found["training"]["right"]["sum"]
        shares.append((sum(told[:n]) / n, sum(told[n:]) / max(1, len(told) - n)))
    eligible = [i for i in range(1, len(shares)) if shares[i][1] >= 0.99 * shares[0][1]]
    parted = lambda i: shares[i][1] - shares[i][0]
    best = min(eligible, key=lambda i: shares[i][0]) if eligible else max(range(1, len(shares)), key=parted)
    return STRENGTHS[best - 1]


def tasks_of(setting: Setting) -> tuple[dict[str, tuple[str, measuring.Task]], tuple[str, measuring.Task]]:
    """What every system has to do, and what only the gated ones have."""
    topics = list(dict.fromkeys(one.topic for one in setting.questions))
    by_topic = {topic: [one for one in setting.questions if one.topic == topic] for topic in topics}
    tasks = {
        measuring.part(topic, start): measuring.answering(some[start : start + measuring.PART])
        for topic, some in by_topic.items() for start in range(0, len(some), measuring.PART)
    }  # fmt: skip
    own = by_topic[setting.roles.topic]
    tasks["decoding"] = measuring.decoding(own[:PROMPTS], setting.sae.site, new_tokens=setting.new_tokens)
    rows = pieces(setting.benign, setting.tokenizer, CONTEXT, setting.benign_rows).tolist()
    tasks["benign"] = measuring.benign(measuring.Text.of(Plain(setting.model, setting.tokenizer), rows))
    others = [one for one in setting.questions if one.topic != setting.roles.topic]
    half = setting.padded_rows // 2
    some = [*own[:half], *others[:: max(1, len(others) // half)][:half]]
    return tasks, measuring.padding(_rows(setting, some))
