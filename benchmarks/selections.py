r"""The forget-retain frontier of selections: one policy's gate, with the latents of every way to choose them behind it.

    python -m benchmarks.selections --train glossary_mcq.train.jsonl.gz --questions glossary_mcq.val.jsonl.gz \
        --out out/selections.jsonl [--policy biology] [--forget-topic biology] [--topic physics history ...] [--n 24] \
        [--configs dsg:20:-1 attribution:5:kl2 policy ...] [--tokens 25000] [--plot FRONTIER.png]

A configuration is SELECTION:LATENTS:AMOUNT, AMOUNT the clamp's own or klNATS, or it is policy, for that one's own edit.
Latents and strengths are found on --train as saeguard guard fit finds them (see saeguard guard selections). Multiple
choice by log-likelihood on --questions: of the topic behind the gate, as deployed, of each --topic without one, which
shows what the edit costs where the gate opens by mistake. Refusals of the policy are left out; the plain model is asked
once. --out has one JSON line per finished configuration, and these are not repeated; the last line printed is JSON too.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.baselines.edited import draw, frontier, show
from benchmarks.baselines.systems import digest
from saeguard import Clamp, Plan, Rule
from saeguard.cli.edits import Wanted, made
from saeguard.cli.guarded import Deployment, deploy
from saeguard.cli.policy_files import named_policy
from saeguard.errors import SaeguardError
from saeguard.evaluating.multiple_choice import Question, answers_of, read_questions
from saeguard.evaluating.subject import Subject
from saeguard.training import gate_rows

SELECTIONS = ("dsg", "dsg_mean_square", "dsg_frequency", "farrell", "crisp", "attribution", "random")
CONFIGS = (
    "policy",
    *(f"{name}:{n}:{amount}" for name, n, amount in product(SELECTIONS, (5, 20, 50), (-0.1, -0.3, -1))),
)
CONFIG = re.compile(r"\w+:[1-9]\d*:(kl)?-?\d+(\.\d+)?(e-?\d+)?")
FLOOR = 0.01
"""Share of forget tokens that a latent has to fire on, as in saeguard guard fit."""


@dataclass(frozen=True, eq=False)
class Setting:
    """``train`` chooses latents and strengths, ``questions`` by topic are what is reported."""

    deployment: Deployment
    train: Sequence[gate_rows.Question]
    questions: dict[str, list[Question]]
    topic: str
    tokens: int
    work: Path
    seed: int = 0

    @property
    def rule(self) -> Rule:
        """The policy's; it has to have one, a clamp."""
        plan = self.deployment.policy.plan
        assert plan is not None, "the policy refuses, and edits nothing"
        (rule,) = plan.rules
        assert isinstance(rule.op, Clamp), "the policy's edit is no clamp"
        return rule

    def key(self, config: str) -> str:
        """Of everything that the results of a configuration depend on."""
        asked = {name: [(q.question, q.choices, q.gold) for q in some] for name, some in self.questions.items()}
        trained = [] if config in ("plain", "policy") else [[(q.text, q.topic) for q in self.train], self.tokens]
        return digest(self.deployment.policy.fingerprint(), config, self.topic, asked, trained, self.seed)


@dataclass(frozen=True, eq=False)
class Read:
    """What `edits.made` chooses from."""

    model: Any
    tokenizer: Any
    sae: Any
    questions: Sequence[gate_rows.Question]


def run(setting: Setting, configs: Sequence[str], out: Path, tell: Any = print) -> list[dict[str, Any]]:
    """One object per configuration, the plain model's first; those that ``out`` has are read there."""
    known, found = {row["key"]: row for row in finished(out)}, []
    for config in ("plain", *configs):
        key = setting.key(config)
        if key not in known:
            tell(f"{config} ...")
            started = time.perf_counter()
            row = {"config": config, "key": key, **measured(setting, config)}
            known[key] = append(out, row | {"seconds": round(time.perf_counter() - started, 1)})
        found.append(known[key])
    return found


def measured(setting: Setting, config: str) -> dict[str, Any]:
    """Right answers per topic; what cannot be chosen or reached is ``refused``, in words."""
    if config == "plain":
        with setting.deployment.guarded() as (plain, _):
            return {"right": {topic: right(plain, some)[0] for topic, some in setting.questions.items()}}
    try:
        rule, told = (setting.rule, {}) if config == "policy" else chosen(setting, config)
    except SaeguardError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    found: dict[str, list[bool]] = {}
    opened: list[bool] = []
    own, others = {setting.topic}, set(setting.questions) - {setting.topic}
    for topics, one in ((own, rule), (others, replace(rule, gate=None))):
        policy = replace(setting.deployment.policy, plan=Plan((one,)), refusals=())
        with replace(setting.deployment, policy=policy).guarded() as (_, subject):
            for topic in sorted(topics):
                found[topic], fired = right(subject, setting.questions[topic])
                opened = fired if topic == setting.topic else opened
    return {"latents": rule.latents, **told, "right": found, "opened": opened}


def chosen(setting: Setting, config: str) -> tuple[Rule, dict[str, Any]]:
    """The policy's rule with other latents and another amount. Raises what `edits.made` raises."""
    name, top, amount = config.split(":")
    rule, of = setting.rule, setting.deployment
    kl = float(amount.removeprefix("kl")) if amount.startswith("kl") else None
    op = replace(rule.op, value=float(amount) if kl is None else -1.0)  # type: ignore[call-arg]
    sae = next(one for one in of.saes if one.name == rule.sae)
    edit = made(
        Wanted(op, name, int(top), FLOOR, kl=kl), Read(of.model, of.tokenizer, sae, setting.train), setting.topic,
        tokens=setting.tokens, seed=setting.seed, folder=setting.work, say=lambda *told: None,
    )  # fmt: skip
    return replace(rule, latents=edit.latents, op=edit.op), {"strength": edit.strength}


def right(subject: Subject, questions: Sequence[Question]) -> tuple[list[bool], list[bool]]:
    """Per question whether it was answered rightly, and whether the gate opened on it."""
    answers = answers_of(subject, questions)
    return answers.right(), [one.opened for one in answers.asked]


def finished(out: Path) -> Iterator[dict[str, Any]]:
    """What was measured before. A last line without an end was being written when the run was stopped; it goes."""
    if not out.is_file():
        return
    text = out.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        out.write_text(whole, encoding="utf-8")
    yield from map(json.loads, whole.splitlines())


def append(out: Path, row: dict[str, Any]) -> dict[str, Any]:
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(row)
    with out.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    return json.loads(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="biology", help="a shipped policy's name, or a file")
    parser.add_argument("--questions", type=Path, nargs="+", default=[], help="to report; JSON lines with topics")
    parser.add_argument("--train", type=Path, nargs="+", default=[], help="to choose latents and strengths on")
    parser.add_argument("--forget-topic", default="biology")
    parser.add_argument("--topic", nargs="+", default=["physics", "history", "government_law"])
    parser.add_argument("--n", type=int, default=24, help="questions per topic")
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--tokens", type=int, default=25_000, help="of training questions, on each side")
    parser.add_argument("--out", type=Path, default=Path("out/selections.jsonl"))
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    if strange := [one for one in given.configs if one != "policy" and not CONFIG.fullmatch(one)]:
        parser.error(f"--configs {' '.join(strange)}: write SELECTION:LATENTS:AMOUNT, such as dsg:20:-1 or dsg:5:kl2")
    if not (given.questions and given.train):
        print(json.dumps({"benchmark": "selections", "skipped": "give --questions and --train"}))
        return
    console = Console(stderr=True)
    tell = lambda stage: console.print(stage, markup=False, highlight=False)
    read = [q for file in given.questions for q in read_questions(file, topics=[given.forget_topic, *given.topic])]
    asked = {name: [q for q in read if q.topic == name][: given.n] for name in (given.forget_topic, *given.topic)}
    if empty := [name for name, some in asked.items() if not some]:
        parser.error(f"--questions have none about {', '.join(empty)}")
    setting = Setting(
        deploy(named_policy(given.policy), "", tell), gate_rows.read_questions(given.train), asked, given.forget_topic,
        given.tokens, given.out.with_name(given.out.name + ".work"),
    )  # fmt: skip
    found = frontier(run(setting, given.configs, given.out, tell), given.forget_topic)
    show(found, given.forget_topic)
    if given.plot is not None:
        draw(found, given.plot, given.forget_topic)
    print(json.dumps({"benchmark": "selections", "topic": given.forget_topic, "n": given.n, "frontier": found}))


if __name__ == "__main__":
    main()
