"""What the policy is compared with: published faults show on tiny models, every system answers, and runs resume."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.baselines import measuring, showing
from benchmarks.baselines.frontier import LEVELS, Roles, frontier
from benchmarks.baselines.preparing import Setting, prepare, tasks_of
from benchmarks.baselines.probe import ProbeConfig, area, fit_probe
from benchmarks.baselines.published import PublishedHook, hooked, published_threshold
from benchmarks.baselines.rmu import RMUConfig, rmu, weights
from benchmarks.baselines.streams import Streams, gather_streams, scores
from benchmarks.baselines.systems import Parts, System, hits_gates, reading, systems
from benchmarks.unlearning import run
from saeguard import SAE, Clamp, Plan, Rule, Site
from saeguard.cli.guarded import UnderPolicy
from saeguard.evaluating.multiple_choice import Question
from saeguard.evaluating.subject import Plain
from saeguard.gates import Blend, Count, Hits, Latched, Watch
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy
from saeguard.guarding.stops import Refuse
from saeguard.latents import LatentRow, LatentTable
from tests import tiny
from tests.words import word_tokenizer

SITE = Site("resid_post", 0)
TOPIC, OTHER = tuple(range(5, 11)), tuple(range(30, 36))
"""Words that say what a sentence is about; latents 0 to 5 fire on the first, 6 to 11 on the others."""
TOKENIZER = word_tokenizer()
SPECIAL = (tiny.PAD, tiny.BOS, tiny.EOS)
ROLES = Roles("left", ("near",))


class Letters:
    """Texts as counts of their words, so that a label is similar to a query with its words in it."""

    name = "letters"

    def __call__(self, texts: list[str]) -> torch.Tensor:
        ids = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]
        rows = torch.stack([torch.bincount(torch.tensor(row), minlength=tiny.VOCAB).float() + 1e-3 for row in ids])
        return torch.nn.functional.normalize(rows, dim=-1)


@pytest.fixture(scope="module")
def model() -> Any:
    """Words of a topic have something in common."""
    found = tiny.fresh_model()
    with torch.no_grad():
        for dimension, words in enumerate((TOPIC, OTHER)):
            found.get_input_embeddings().weight[list(words), dimension] += 15.0
    return found


@pytest.fixture(scope="module")
def sae(model: Any, tmp_path_factory: Any) -> SAE:
    """Six latents for each topic, found by ridge regression on the stream of random rows."""
    ids = tiny.prompt(200, 12, seed=3)
    streams = gather_streams(model, SITE, ids.tolist(), tmp_path_factory.mktemp("sae"), exact=True)
    x, flat = streams.x.double(), ids.flatten()
    kept = flat != tiny.BOS
    ones = torch.nn.functional.pad(x[kept], (0, 1), value=1.0)
    wanted = torch.stack([torch.isin(flat[kept], torch.tensor(words)).double() for words in (TOPIC, OTHER)], 1)
    solved = torch.linalg.solve(ones.T @ ones + 1e-2 * torch.eye(ones.shape[1]).double(), ones.T @ wanted).float()
    solved = solved.repeat_interleave(6, 1) * (1 + torch.arange(12) / 100)
    W_dec = torch.nn.functional.normalize(torch.randn(12, tiny.D, generator=torch.Generator().manual_seed(0)), dim=1)
    return SAE(
        name="words", W_enc=solved[:-1], b_enc=solved[-1], W_dec=W_dec, b_dec=torch.zeros(tiny.D),
        activation="jumprelu", threshold=torch.full((12,), 0.5), site=SITE, manifest={"bos": True},
    )  # fmt: skip


@pytest.fixture(scope="module")
def policy(model: Any, sae: SAE) -> Policy:
    watch = Watch(Hits(tuple(range(6))), Count(), 0.0)
    gate = Latched(Blend((watch,), (1.0,), 0.5))
    rule = Rule(sae.name, tuple(range(6)), Clamp(-2.0, when="always", unit="norm"), gate=gate)
    return Policy.of(
        model, TOKENIZER, sae, Plan((rule,)), name="left", calibration={"level": 0.1, "method": "percentile"}
    )


def sentence(topic: str, number: int, length: int = 9) -> str:
    """Words of no topic, among them two of the topic's own."""
    draw = torch.Generator().manual_seed(1_000 * len(topic) + number)
    found = (torch.randint(12, 29, (length,), generator=draw)).tolist()
    own = {"left": TOPIC, "right": OTHER}.get(topic, range(40, 46))
    for place in torch.randperm(length, generator=draw)[:2].tolist():
        found[place] = own[int(torch.randint(len(own), (1,), generator=draw))]
    return " ".join(f"w{word}" for word in found)


def questions(n: int, *, start: int = 0) -> list[Question]:
    topics = ("left", "right", "near")
    choice = lambda number, i: f"w{12 + (5 * number + 7 * i) % 17}"
    return [
        Question(sentence(topic, start + number), tuple(choice(number, i) for i in range(3)), number % 3, topic)
        for topic in topics for number in range(n)
    ]  # fmt: skip


def texts(path: Path, topic: str) -> list[Path]:
    rows = [{"text": " ".join(sentence(topic, 500 + 40 * i + j) for j in range(30))} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [path]


@pytest.fixture(scope="module")
def setting(model: Any, sae: SAE, policy: Policy, tmp_path_factory: Any) -> Setting:
    folder = tmp_path_factory.mktemp("setting")
    labels = [f"w{word}" for word in (*TOPIC, *OTHER)]
    table = LatentTable(LatentRow(i, 0.1, 1.0, (word,), (0.9,), (), word) for i, word in enumerate(labels))
    return Setting(
        model, TOKENIZER, sae, table, policy, Letters(), ROLES, questions(4), questions(12, start=50),
        questions(24, start=100), texts(folder / "left.jsonl", "left"), texts(folder / "right.jsonl", "right"),
        texts(folder / "benign.jsonl", "benign"), folder / "work", tokens=800, tuned_on=4, benign_rows=3,
        padded_rows=8, new_tokens=5, exact=True, rmu=RMUConfig(layer=1, blocks=2, steps=3, rows=2, tokens=40, lr=1e-2),
        probe=ProbeConfig(steps=60), also=(refusing(policy),),
    )  # fmt: skip


def refusing(policy: Policy) -> Policy:
    """The same, with a refusal behind the same gate."""
    assert policy.plan is not None
    (rule,) = policy.plan.rules
    assert rule.gate is not None
    return replace(policy, name="refusing", refusals=(Refuse(rule.gate, rule.sae, None, "w1", "left"),))


@pytest.fixture(scope="module")
def document(setting: Setting) -> dict[str, Any]:
    return run(setting, lambda stage: None)


def hook_of(sae: SAE, threshold: float = 0.1) -> PublishedHook:
    return PublishedHook(sae, tuple(range(6)), 4.0, threshold)


def published(model: Any, sae: SAE) -> System:
    return System(
        "published", "", lambda: hooked(model, TOKENIZER, hook_of(sae)), "published", gated=True, is_causal=False
    )


def ours(model: Any, sae: SAE, policy: Policy) -> System:
    @contextmanager
    def guarded():
        with Guardrail.attach(model, {"guarded": policy}, tokenizer=TOKENIZER, saes=sae) as guard:
            yield UnderPolicy(guard)

    return System("ours", "", guarded, "ours", gated=True)


def result(system: System, task: tuple[str, measuring.Task]) -> dict[str, Any]:
    with system.open() as subject:
        return task[1](subject, system)


def asked(topic: str, n: int) -> list[str]:
    return [sentence(topic, 900 + i) for i in range(n)]


def rows_of(some: Sequence[str]) -> list[list[int]]:
    return [[tiny.BOS, *TOKENIZER(text, add_special_tokens=False)["input_ids"]] for text in some]


def test_published_hook_is_dead_in_decode_and_ours_is_not(model, sae, policy):
    """A decoded token is alone in its pass, at position 0, which the hook takes for BOS."""
    task = measuring.decoding([Question(one, ("w3", "w4"), 0) for one in asked("left", 6)], SITE, new_tokens=6)

    dead, alive = result(published(model, sae), task), result(ours(model, sae, policy), task)

    assert dead["edited"] == 0.0
    assert dead["equal"] < dead["n"]
    assert alive["edited"] == 1.0
    assert alive["equal"] == alive["n"] == 6


@contextmanager
def forgetful(model: Any, strength: float) -> Iterator[Plain]:
    """An edit of every token that is left out where a token comes alone: right in any pass without a cache."""
    push = strength * torch.randn(tiny.D, generator=torch.Generator().manual_seed(4))

    def hook(block: Any, args: Any, output: Any) -> Any:
        return output if output.shape[1] == 1 else output + push

    handle = model.model.layers[0].register_forward_hook(hook)
    try:
        yield Plain(model, TOKENIZER)
    finally:
        handle.remove()


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_one_pass_tells_which_answers_generating_without_a_cache_would_give(model, strength):
    system = System("forgetful", "", lambda: forgetful(model, strength), "")
    some = [Question(one, ("w3", "w4"), 0) for one in asked("left", 6) + asked("right", 6)]
    task = measuring.decoding(some, SITE, new_tokens=4)

    quick, slow = (result(replace(system, is_causal=causal), task)["equal"] for causal in (True, False))

    assert quick == slow
    assert (slow == 12) == (strength == 0.0)


def test_published_hook_flips_under_padding_while_ours_does_not(model, sae, policy):
    """Its rate is over all columns, so a longer row in the batch dilutes it."""
    task = measuring.padding(rows_of(asked("left", 5) + asked("right", 5)), more=40)

    flipped, steady = result(published(model, sae), task), result(ours(model, sae, policy), task)

    assert flipped["opened"] == steady["opened"] == 5
    assert flipped["right"] == 5
    assert steady["right"] == steady["left"] == 0


def test_published_hook_does_what_its_equations_say(model, sae, tmp_path):
    x = gather_streams(model, SITE, rows_of(asked("left", 3)), tmp_path, exact=True).x.view(3, -1, tiny.D)
    hook = hook_of(sae)
    found = hook.edit(x)

    for row, after in zip(x, found, strict=True):
        f = sae.encode(row)
        f[0] = 0
        hot = [bool((f[t, :6] > 0).any()) for t in range(len(row))]
        for t, own in enumerate(hot):
            expected = row[t] - sae.decode(f)[t]
            if own and sum(hot) / len(row) > hook.threshold:
                f[t, :6] = -4.0
            assert torch.allclose(after[t], expected + sae.decode(f[t]), atol=1e-4)
    assert hook.opened == [True] * 3


def test_published_threshold_is_numpys_percentile_of_the_rates(model, sae, tmp_path):
    rows = rows_of(asked("left", 5) + asked("right", 20))
    streams = gather_streams(model, SITE, rows, tmp_path, exact=True)

    found = published_threshold(hook_of(sae), [streams.row(i) for i in range(len(rows))])

    hot = [(sae.encode(streams.row(i))[1:, :6] > 0).any(1).sum() for i in range(len(rows))]
    rates = sorted(int(n) / len(row) for n, row in zip(hot, rows, strict=True))
    place = 0.95 * (len(rates) - 1)
    low = int(place)
    assert found == pytest.approx(rates[low] + (place - low) * (rates[low + 1] - rates[low]), abs=1e-6)


def test_scores_of_kept_streams_are_those_of_the_deployed_gate(model, sae, policy, tmp_path):
    rows = [row[: 4 + i % 6] for i, row in enumerate(rows_of(asked("left", 6) + asked("right", 6)))]
    streams = gather_streams(model, SITE, rows, tmp_path, exact=True)
    gates = {**hits_gates(tuple(range(6))), "policy": policy.plan.rules[0].gate}
    for name, gate in gates.items():
        rule = replace(policy.plan.rules[0], gate=gate)
        slow = []
        own = Policy.of(model, TOKENIZER, sae, Plan((rule,)), name=name)
        with Guardrail.attach(model, own, tokenizer=TOKENIZER, saes=sae) as guard:
            for row in rows:
                ids = torch.tensor([row])
                options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1, "do_sample": False}
                slow.append(guard.generate(input_ids=ids, **options).decisions[0].scores["gate.0"])

        assert scores(gate, sae, streams, SPECIAL).tolist() == pytest.approx(slow, abs=1e-4), name


def test_streams_resume_where_they_were_cut_off(model, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.baselines.streams.ROWS", 4)
    rows = tiny.prompt(10, 8, seed=9).tolist()
    whole = gather_streams(model, SITE, rows, tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather_streams(model, SITE, rows, tmp_path / "cut", progress=stop)
    again = gather_streams(model, SITE, rows, tmp_path / "cut")

    assert torch.equal(whole.x, again.x)
    assert whole.starts.tolist() == list(range(0, 81, 8))


def test_every_system_answers_every_question_and_the_plain_one_differs_from_itself_in_none(document):
    rows = {row["system"]: row for row in document["systems"]}

    assert len(rows) == 14
    for row in rows.values():
        assert [row[role]["sum"]["n"] for role in ("forget", "retain", "neighbour")] == [4, 4, 4]
        assert set(row["topics"]) == {"left", "right", "near"}
        assert row["benign"]["kl"] >= -1e-6
    plain = rows["no guard"]
    assert plain["forget"]["sum"]["paired"]["lost"] == plain["forget"]["sum"]["paired"]["gained"] == 0
    assert plain["decoding"] == {"equal": 4, "n": 4, "edited": 0.0}
    assert plain["benign"]["kl"] == pytest.approx(0.0, abs=1e-6)


def test_gated_systems_leave_other_topics_as_they_are_and_the_ungated_ones_do_not(document):
    rows = {row["system"]: row for row in document["systems"]}

    assert rows["ours"]["forget"]["fires"]["share"] == 1.0
    assert rows["ours"]["retain"]["fires"]["share"] == 0.0
    assert rows["ours"]["retain"]["sum"]["paired"]["lost"] == 0
    assert rows["ours"]["benign"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows["our edit, no gate"]["benign"]["kl"] > 0.01
    assert rows["DSG, published hook"]["decoding"]["edited"] == 0.0
    assert rows["ours"]["decoding"]["edited"] == 1.0
    assert rows["ours, refusing"]["forget"]["fires"]["share"] == 1.0
    assert rows["ours, refusing"]["forget"]["sum"]["share"] == 0.0
    assert rows["ours, refusing"]["retain"] == rows["ours"]["retain"]
    assert {row["system"] for row in document["systems"] if "padding" in row} >= {"ours", "DSG, published hook"}


def test_controls_move_the_stream_as_far_as_the_policy(setting):
    """At tokens whose latents are silent the edit is the clamp alone, -v |x| times the sum of the decoder rows."""
    parts, _ = prepare(setting, measuring.Kept(setting.work / "results"), lambda stage: None)
    sizes = {}
    for system in systems(parts):
        if system.name in ("ours", "our gate, random latents", "our gate, random direction"):
            task = measuring.benign(measuring.Text.of(_plain(setting), rows_of(asked("left", 4))))
            sizes[system.name] = result(system, task)["opened"]
    rule = parts.rule
    moved = setting.sae.W_dec[list(rule.latents)].sum(0).norm() * 2.0

    assert set(sizes.values()) == {4}
    drawn = _rule(parts, "our gate, random latents")
    assert not set(drawn.latents) & set(rule.latents)
    assert -drawn.op.value * float(setting.sae.W_dec[list(drawn.latents)].sum(0).norm()) == pytest.approx(float(moved))
    assert -_rule(parts, "our gate, random direction").op.value == pytest.approx(float(moved))


def _plain(setting: Setting) -> Any:
    return Plain(setting.model, setting.tokenizer)


def _rule(parts: Parts, name: str) -> Rule:
    """The rule that a system opens with."""
    system = next(one for one in systems(parts) if one.name == name)
    return system.open.args[3].rules[0]  # type: ignore[attr-defined]


def test_a_run_that_was_cut_off_gives_what_an_uninterrupted_one_gives(setting, document, tmp_path):
    cut, calls = replace(setting, work=tmp_path), []

    def stop(stage: str) -> None:
        calls.append(stage)
        if len(calls) in (6, 25, 60):
            raise KeyboardInterrupt

    found = None
    for _ in range(4):
        try:
            found = run(cut, stop)
        except KeyboardInterrupt:
            continue
        break

    assert len(calls) > 60
    assert json.dumps(found, default=str) == json.dumps(document, default=str)


def test_nothing_is_measured_twice_and_other_questions_are_measured_anew(setting, document):
    stages: list[str] = []
    run(setting, stages.append)
    assert not [stage for stage in stages if ": topic" in stage]

    run(replace(setting, questions=questions(3)), stages.append)

    assert len([stage for stage in stages if ": topic" in stage]) == 3 * len(document["systems"])


def test_more_questions_go_on_where_fewer_have_ended(setting, tmp_path, monkeypatch):
    """Parts of a topic are results of their own, and put together they are the topic, question by question."""
    kept, stages = measuring.Kept(tmp_path), []
    system = System("plain", "", lambda: nullcontext(_plain(setting)), "")
    whole = result(system, measuring.answering([one for one in setting.questions if one.topic == "left"]))
    monkeypatch.setattr(measuring, "PART", 2)
    for n in (6, 12):
        tasks, _ = tasks_of(replace(setting, questions=setting.questions[:n]))
        own = {name: task for name, task in tasks.items() if name.startswith("topic")}
        found = measuring.measure(system, own, kept, stages.append)

    assert measuring.joined(found)["topic left"] == whole
    names = ["left, from 0", "left, from 2", "right, from 0", "right, from 2", "near, from 0", "near, from 2"]
    assert stages == [f"plain: topic {name}" for name in names]


def test_instruction_stands_before_each_question(model):
    system = System("prompting", "", lambda: None, "", instruction="w7 w8")  # type: ignore[arg-type]

    assert system.posed(Question("w12 w13", ("w1", "w2"), 0)).question == "w7 w8 w12 w13"
    assert System("plain", "", lambda: None, "").said("w12") == "w12"  # type: ignore[arg-type]


def test_benign_text_behind_an_instruction_is_compared_token_by_token(model, setting):
    """The instruction's own tokens do not count, and the same text without one has no divergence."""
    rows = rows_of(asked("right", 5))
    text = measuring.Text.of(_plain(setting), rows)
    plain = System("plain", "", lambda: None, "")  # type: ignore[arg-type]
    found = measuring.benign(text)[1](_plain(setting), replace(plain, instruction="w7 w8 w9"))

    assert found["tokens"] == sum(len(row) - 1 for row in rows)
    kl = 0.0
    for row in rows:
        lead = torch.tensor([[row[0], 7, 8, 9, *row[1:]]])
        with torch.no_grad():
            q = model(lead).logits[0, 3:-1].log_softmax(-1)
            p = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
    assert found["kl"] == pytest.approx(kl / found["tokens"], rel=1e-3)


def test_probe_finds_the_planted_words_from_labels_of_rows_alone(setting, model, sae, tmp_path):
    rows = rows_of([one.question for one in setting.train])
    streams = gather_streams(model, SITE, rows, tmp_path, exact=True)
    labels = torch.tensor([one.topic == "left" for one in setting.train])

    fitted = fit_probe(streams, labels, SPECIAL, SITE, ProbeConfig(k=2))
    deployed = scores(fitted.gate, sae, streams, SPECIAL)

    assert area(fitted.scores[labels], fitted.scores[~labels]) > 0.95
    assert area(deployed[labels], deployed[~labels]) > 0.99
    assert fitted.gate.gate.evidence.site == SITE


def test_rmu_moves_what_is_to_be_forgotten_further_and_its_weights_are_read_again(model, tmp_path):
    forget, retain = tiny.prompt(6, 20, seed=1), tiny.prompt(6, 20, seed=2)
    config = RMUConfig(layer=1, blocks=2, steps=80, rows=4, tokens=16, lr=1e-2, alpha=10.0)
    before = {name: weight.clone() for name, weight in weights(model, config).items()}

    tuned = rmu(model, forget, retain, config, tmp_path)
    again = rmu(model, forget, retain, config, tmp_path, progress=lambda done, total: pytest.fail("tuned again"))

    with torch.no_grad():
        kl = [
            (model(text).logits.log_softmax(-1) - tuned(text).logits.log_softmax(-1)).abs().mean()
            for text in (forget, retain)
        ]
    assert kl[0] > 1.5 * kl[1]
    for name, weight in weights(again, config).items():
        assert torch.equal(weight, weights(tuned, config)[name])
        assert torch.equal(before[name], weights(model, config)[name])
        assert not torch.equal(weight, before[name])


def test_rounding_is_no_edit(model):
    with measuring.moved_tokens(model, SITE) as meter:
        handle = model.model.layers[0].register_forward_hook(
            lambda b, a, y: y * (1 + 1e-5) if isinstance(y, torch.Tensor) else (y[0] * (1 + 1e-5), *y[1:])
        )
        with torch.no_grad():
            model(torch.tensor([[5], [6]]))
        handle.remove()

    assert (meter.decoded, meter.moved) == (2, 0)


def test_gate_reads_the_sae_that_it_was_told_wherever_its_rule_lies(policy):
    gate = reading(policy.plan.rules[0].gate, "words")

    assert [leaf.sae for leaf in gate.leaves] == ["words"]
    assert isinstance(gate, Latched)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30), st.lists(st.integers(0, 8), min_size=1, max_size=30))
def test_recall_at_a_level_is_the_best_that_its_false_positives_allow(above, below):
    values = torch.tensor([*above, *below], dtype=torch.float64)
    topics = ["left"] * len(above) + ["right"] * len(below)

    (found,) = frontier({"gate": values}, {"gate": 4.0}, topics, ROLES)

    share = lambda some, v: sum(x > v for x in some) / len(some)
    for level, at in zip(LEVELS, found["at"], strict=True):
        allowed = [v for v in range(-1, 9) if share(below, v) <= level + 1e-12]
        assert at["recall"] <= share(above, min(allowed)) + 1e-9
        assert at["retain"] <= level + 1e-9
    assert found["deployed"]["forget"]["share"] == pytest.approx(share(above, 4))
    pairs = [(a > b) + 0.5 * (a == b) for a in above for b in below]
    assert found["area"] == pytest.approx(sum(pairs) / len(pairs))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_difference_lies_in_its_interval_and_turns_with_its_sides(pairs):
    before, after = [list(side) for side in zip(*pairs, strict=True)]

    there, back = showing.paired(before, after), showing.paired(after, before)

    assert there["difference"] == pytest.approx(sum(after) / len(pairs) - sum(before) / len(pairs))
    assert there["difference"] == pytest.approx(-back["difference"])
    assert (there["low"], there["high"]) == pytest.approx((-back["high"], -back["low"]))
    assert there["low"] < there["high"]


def test_tables_and_pictures_are_drawn(document, tmp_path, capsys):
    showing.show(document["systems"], document["gates"], "left")
    showing.draw_frontier(document["gates"], tmp_path / "a" / "frontier.png", "left")
    showing.draw_forget_retain(document["systems"], tmp_path / "forget_retain.png", "left")

    told = capsys.readouterr().out
    assert all(row["system"].split(",")[0] in told for row in document["systems"])
    assert all(
        path.read_bytes().startswith(b"\x89PNG")
        for path in (tmp_path / "a" / "frontier.png", tmp_path / "forget_retain.png")
    )


def test_streams_know_their_rows():
    streams = Streams(((1, 5), (1, 6, 7)), torch.tensor([0, 2, 5]), torch.arange(10.0).view(5, 2))

    assert len(streams) == 2
    assert streams.row(1).tolist() == [[4.0, 5.0], [6.0, 7.0], [8.0, 9.0]]
