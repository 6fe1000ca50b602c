"""The work of ``saeguard guard fit``: latents by `saeguard.scoring`, the gate by training, thresholds by guarding.

A question is one row of the calibration, whatever the number of formats that it was read in: it fires if any does. A
threshold is chosen on questions about topics that are neither to be forgotten nor neighbours, from scores of heads that
have not seen them.
"""

import hashlib
import json
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saeguard.cli.edits import Edit, Wanted, made
from saeguard.cli.texts import documents_of

LEVELS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""False-positive rates whose thresholds are shown beside the one that was asked for."""


@dataclass(frozen=True)
class Asked:
    """The options of the command; texts by topic, as names and patterns."""

    forget: Mapping[str, Sequence[str]]
    retain: Mapping[str, Sequence[str]]
    questions: Sequence[str]
    topic: str
    neighbours: tuple[str, ...]
    weights: Mapping[str, float]
    sae: str
    model: str
    edit: Wanted
    level: float
    method: Any
    confidence: float
    passages: int
    sentences: int
    grams: int
    evidence: str
    chat_every: int
    tokens: int
    name: str
    refuse: str
    also_edit: bool
    seed: int
    folder: Path


@dataclass(frozen=True, eq=False)
class _Read:
    """What was asked for, loaded."""

    model: Any
    tokenizer: Any
    sae: Any
    questions: tuple[Any, ...]
    documents: Mapping[str, list[str]]


def fit_policy(asked: Asked, tell: Any) -> tuple[Any, dict[str, Any]]:
    """The policy, and everything that was measured on the way. Raises `TrainError`, `CalibrationRefused` and others."""
    from saeguard.gates import Latched
    from saeguard.guarding.policy import Policy

    started, say = time.perf_counter(), tell or (lambda *told: None)
    read = _load(asked)
    edit = None if asked.refuse and not asked.also_edit else made(
        asked.edit, read, asked.topic, tokens=asked.tokens, seed=asked.seed, folder=asked.folder, say=say
    )  # fmt: skip
    rows, fitted = _gate(asked, read, say)
    threshold, figures, frontier = _calibrated(asked, rows, fitted.scores)
    figures["fit"] |= {} if edit is None else edit.figures
    gate = Latched(replace(fitted.gate, threshold=threshold.value))
    policy = Policy.of(
        read.model, read.tokenizer, [read.sae], name=asked.name, calibration=figures,
        sources={read.sae.name: asked.sae}, model_name=asked.model, **_action(asked, read.sae.name, edit, gate),
    )  # fmt: skip
    cost = {
        "minutes": round((time.perf_counter() - started) / 60, 2),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "tokens": sum(len(row.ids) for row in rows),
    }
    edited = {} if edit is None else {"selection": edit.selection, "strength": edit.strength}
    return policy, {
        "topic": asked.topic, "refuses": bool(asked.refuse),
        "latents": [] if edit is None else list(edit.latents), **edited, "calibration": figures, "frontier": frontier,
        "parts": {**fitted.made, "alone": _alone(asked, rows, fitted)}, "cost": cost,
    }  # fmt: skip


def _action(asked: Asked, sae: str, edit: Edit | None, gate: Any) -> dict[str, Any]:
    """What happens where the gate opens: an edit, a refusal, or both behind the one gate."""
    from saeguard.guarding.stops import Refuse
    from saeguard.plans import Plan, Rule

    found: dict[str, Any] = {}
    if edit is not None:
        found["plan"] = Plan((Rule(sae, edit.latents, edit.op, gate=gate),), asked.name)
    if asked.refuse:
        found["refusals"] = (Refuse(gate, sae, None, asked.refuse, f"{asked.topic}.gate"),)
    return found


def _load(asked: Asked) -> _Read:
    """Raises `TrainError` for topics that are not there, before the model is loaded."""
    from saeguard.cli.training import expand
    from saeguard.errors import TrainError
    from saeguard.loaders import load_sae
    from saeguard.models import load_model
    from saeguard.training.gate_rows import read_questions

    questions = read_questions(expand([*asked.questions]))
    about = {question.topic for question in questions}
    given = {*asked.forget, *asked.retain}
    for names, where, what in (((asked.topic,), set(asked.forget), "--forget"), ((asked.topic,), about, "--questions"),
                               (asked.neighbours, about | given, "the texts")):  # fmt: skip
        if missing := [name for name in names if name not in where]:
            raise TrainError(
                f"a policy for {asked.topic}", f"{what} has nothing about {', '.join(missing)}",
                f"Topics there: {', '.join(sorted(where))[:200]}.",
            )  # fmt: skip
    model, tokenizer = load_model(asked.model)
    named = [*asked.forget.items(), *asked.retain.items()]
    documents: dict[str, list[str]] = {}
    for topic, patterns in named:
        found = documents_of(patterns, tokenizer).values()
        documents.setdefault(topic, []).extend(text for texts in found for text in texts)
    return _Read(model, tokenizer, load_sae(asked.sae), questions, documents)


def _gate(asked: Asked, read: _Read, say: Any) -> tuple[Sequence[Any], Any]:
    """The rows of all formats, and the gate that was fitted to them."""
    from saeguard.training.corpus import special_ids
    from saeguard.training.gate_fit import GateConfig, Sentence, fit_gate, fit_words_gate
    from saeguard.training.gate_latents import gather_latents
    from saeguard.training.gate_rows import passage_rows, question_rows
    from saeguard.training.gate_words import WordsConfig, sentences

    bos = read.sae.manifest.get("bos") is not False
    rows = (
        *question_rows(read.questions, read.tokenizer, bos=bos, chat_every=asked.chat_every),
        *passage_rows(read.documents, read.tokenizer, each=asked.passages, bos=bos, seed=asked.seed),
    )
    listed: list[Sentence] = []
    for topic, texts in read.documents.items():
        found = sentences(texts, asked.sentences * (3 if topic == asked.topic else 1), asked.seed)
        ids = read.tokenizer(found, add_special_tokens=False)["input_ids"] if found else []
        listed += [Sentence(tuple(one), topic) for one in ids]
    odd = sorted({*special_ids(read.tokenizer), *read.sae.manifest.get("special_ids", ())})
    config = GateConfig(words=WordsConfig(most=asked.grams))
    tell = lambda stage: say("fitting the gate", 0, 1, stage)
    if asked.evidence == "words":
        return rows, fit_words_gate(rows, listed, asked.topic, special=odd, weights=asked.weights, seed=asked.seed,
                                    config=config, progress=tell)  # fmt: skip
    tokens = gather_latents(read.model, read.sae, rows, asked.folder / "latents",
                            progress=lambda done, total: say("latents of all rows", done, total, "tokens"))  # fmt: skip
    return rows, fit_gate(tokens, rows, listed, asked.topic, special=odd, weights=asked.weights, seed=asked.seed,
                          config=config, progress=tell)  # fmt: skip


def _calibrated(asked: Asked, rows: Sequence[Any], scores: Any) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
    """The threshold, what is known of it, and what other thresholds would do."""
    from saeguard.guarding.calibrating import rate, threshold

    by_topic = _questions(rows, scores)
    harmless = [one for topic, found in by_topic.items() if _role(asked, topic) == "retain" for one in found]
    chosen = threshold(harmless, level=asked.level, method=asked.method, confidence=asked.confidence)
    share = lambda found, value: rate(found, value, confidence=asked.confidence)
    topics: dict[str, Any] = {topic: {"role": _role(asked, topic), "forms": {}} for topic in {r.topic: 0 for r in rows}}
    for topic, about in topics.items():
        for form in ("plain", "chat", "passage"):
            own = [float(s) for row, s in zip(rows, scores, strict=True) if (row.topic, row.form) == (topic, form)]
            if own:
                about["forms"][form] = share(own, chosen.value)
    figures = {
        **chosen.to_dict(), "questions": {role: share(_of(asked, by_topic, role), chosen.value)
                                          for role in ("forget", "retain", "neighbour")
                                          if _of(asked, by_topic, role)},
        "topics": topics, "rows": len(rows), "scores": "out of fold; a question fires if any of its formats does",
        "data": _fingerprint(rows), "fit": _settings(asked),
    }  # fmt: skip
    frontier = [_at(asked, by_topic, harmless, level) for level in LEVELS]
    return chosen, figures, frontier


def _fingerprint(rows: Sequence[Any]) -> str:
    """SHA-256 of the rows that the gate was trained and calibrated on: token ids, topics and formats, in order."""
    text = json.dumps([(row.ids, row.topic, row.form) for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()


def _settings(asked: Asked) -> dict[str, Any]:
    """What was asked for, as far as it is no file."""
    names = ("topic", "evidence", "passages", "sentences", "grams", "chat_every", "tokens", "seed")
    return {name: getattr(asked, name) for name in names} | asked.edit.settings() | {
        "neighbours": list(asked.neighbours), "weights": dict(asked.weights),
    }  # fmt: skip


def _at(asked: Asked, by_topic: Mapping[str, list[float]], harmless: list[float], level: float) -> dict[str, float]:
    """The percentile of that level, and the shares of questions that it would let fire."""
    from saeguard.guarding.calibrating import rate, threshold

    value = threshold(harmless, level=level, method="percentile").value
    shares = {}
    for name, role in (("recall", "forget"), ("retain", "retain"), ("neighbours", "neighbour")):
        found = _of(asked, by_topic, role)
        shares[name] = rate(found, value)["share"] if found else 0.0
    return {"level": level, "threshold": value, **shares}


def _alone(asked: Asked, rows: Sequence[Any], fitted: Any) -> dict[str, float]:
    """Recall of each part at the asked level, so that it can be seen what the others add."""
    found = {}
    for name, scores in (*fitted.parts.items(), ("all", fitted.scores)):
        by_topic = _questions(rows, scores)
        harmless = _of(asked, by_topic, "retain")
        found[name] = _at(asked, by_topic, harmless, asked.level)["recall"]
    return found


def _questions(rows: Sequence[Any], scores: Any) -> dict[str, list[float]]:
    """Per topic the largest score of each question over its formats."""
    best: dict[tuple[str, str], float] = {}
    for row, score in zip(rows, scores.tolist(), strict=True):
        if row.form != "passage":
            best[row.topic, row.group] = max(score, best.get((row.topic, row.group), score))
    found: dict[str, list[float]] = {}
    for (topic, _), score in best.items():
        found.setdefault(topic, []).append(score)
    return found


def _of(asked: Asked, by_topic: Mapping[str, list[float]], role: str) -> list[float]:
    return [one for topic, found in by_topic.items() if _role(asked, topic) == role for one in found]


def _role(asked: Asked, topic: str) -> str:
    return "forget" if topic == asked.topic else "neighbour" if topic in asked.neighbours else "retain"
