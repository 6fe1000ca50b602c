"""A policy that edits first and refuses where the stream behind the edit still scores high, at prefill and later."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from saeguard import Add, AnyActive, Clamp, Plan, Rule, Scale, Site, capture, steer
from saeguard.errors import BadPolicy, SiteNotFound
from saeguard.gates import Always, And, Blend, Count, Cusum, Gate, Hits, Latched, LogOdds, Peak, Watch, Window, Words
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy, Refuse
from saeguard.guarding.stops import escalate
from tests import tiny
from tests.words import word_tokenizer

S = (12, 13, 20)
TOKENIZER = word_tokenizer()
IDS = torch.cat([tiny.prompt(4, 6, seed=3), torch.tensor([[tiny.BOS, 9, 9, 9, 9, 9]])])
WRITE = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tiny.PAD, "suppress_tokens": [tiny.EOS, tiny.PAD]}
AFTER = Site("resid_pre", 2)


def tied_sae() -> Any:
    """Each latent's encoder reads its own decoder row as 1, so that a clamped latent is read as clamped."""
    sae = tiny.tiny_sae()
    return replace(sae, W_dec=(sae.W_enc / (sae.W_enc**2).sum(0)).T.contiguous(), b_enc=torch.zeros(sae.d_sae))


SAE = tied_sae()
GATES: dict[str, Gate] = {
    "count": Latched(Watch(Hits(S), Count(), 3.0)), "cusum": Latched(Watch(Hits(S), Cusum(0.3), 2.0)),
    "window": Latched(Watch(LogOdds(S, (1.0, 1.0, 1.0), 0.0), Window(2), 30.0)),
    "peak": Latched(Watch(LogOdds(S, (1.0, 0.5, 1.0), 0.0), Peak(), 18.0)),
}  # fmt: skip
EDITS = {
    "strong": Clamp(-60.0, when="always"), "weak": Scale(0.9), "contrary": Add(50.0), "none": Scale(1.0),
}  # fmt: skip


def rule_of(edit: str, gate: str, **where: Any) -> Rule:
    return Rule("tiny", S, EDITS[edit], gate=GATES[gate], **where)


def policy(model: Any, rule: Rule, **options: Any) -> Policy:
    stop = escalate(rule, SAE, text="w9 w8", reason="still.high", **options)
    return Policy.of(model, TOKENIZER, SAE, Plan((rule,)), name="first edit, then refuse", refusals=(stop,))


def guarded(model: Any, rule: Rule, ids: Tensor = IDS, **options: Any) -> Any:
    with Guardrail.attach(model, policy(model, rule), tokenizer=TOKENIZER, saes=SAE) as guard:
        return guard.generate(ids, **WRITE, **options)


def scores(rule: Rule, x: Tensor) -> list[float]:
    """The score of the rule's gate after each token of one row's stream, from its definition; BOS does not count."""
    gate: Any = rule.gate
    watch = gate.gate
    f = SAE.encode(x)[:, list(S)]
    if isinstance(watch.evidence, Hits):
        evidence = (f > 0).any(-1).double()
    else:
        evidence = (f.double() * torch.tensor(watch.evidence.weights, dtype=torch.float64)).sum(-1)
    found, seen, piled = [-torch.inf], [], 0.0
    for value in evidence[1:].tolist():
        seen.append(value)
        piled = max(0.0, piled + value - 0.3)
        pooled = {Count: sum(seen), Cusum: piled, Window: sum(seen[-2:]) / 2, Peak: max(seen)}
        found.append(pooled[type(watch.pool)])
    return found


def first_above(rule: Rule, x: Tensor) -> int | None:
    """The token at which the rule's gate would open on a stream."""
    gate: Any = rule.gate
    return next((at for at, score in enumerate(scores(rule, x)) if score > gate.gate.threshold), None)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("edit", EDITS)
def test_a_row_is_refused_where_the_edited_stream_scores_high_and_nowhere_else(edit, gate):
    model, rule = tiny.fresh_model(), rule_of(edit, gate)
    with steer(model, Plan((rule,)), saes=SAE), capture(model, SAE.site) as tape, torch.no_grad():
        sequences = model.generate(IDS, **WRITE)
        model(sequences[:, :-1])

    found = guarded(model, rule)

    for row, decision in enumerate(found.decisions):
        expected = first_above(rule, tape[SAE.site][row])
        assert (decision.decision == "refuse", decision.at) == (expected is not None, expected)
        if expected is None:
            assert torch.equal(found.sequences[row, : sequences.shape[1]], sequences[row])


def decisions(edit: str, gate: str = "count") -> list[str]:
    return [one.decision for one in guarded(tiny.fresh_model(), rule_of(edit, gate)).decisions]


def test_an_edit_that_helps_steers_and_one_that_does_not_is_followed_by_a_refusal():
    assert decisions("strong").count("steer") > 0
    assert "refuse" not in decisions("strong")
    assert decisions("none").count("refuse") == decisions("strong").count("steer")


def test_refusals_come_in_the_prompt_and_in_decoding():
    """The prompt is read at once, and the rest token by token: the stop works in both."""
    places = [one.at for one in guarded(tiny.fresh_model(), rule_of("weak", "peak")).decisions if one.at is not None]

    assert any(at < IDS.shape[1] for at in places)
    assert any(at >= IDS.shape[1] for at in places)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("way", [{}, {"use_cache": False}, {"prefill_chunk_size": 2}])
def test_refusals_do_not_depend_on_how_the_text_is_read(gate, way):
    rule = rule_of("weak", gate)
    model = tiny.fresh_model()

    whole, other = guarded(model, rule), guarded(model, rule, **way)
    alone = [guarded(model, rule, IDS[row : row + 1]).decisions[0] for row in range(len(IDS))]

    assert [(one.decision, one.at) for one in other.decisions] == [(one.decision, one.at) for one in whole.decisions]
    assert [(one.decision, one.at) for one in alone] == [(one.decision, one.at) for one in whole.decisions]


def test_a_row_whose_gate_stays_closed_has_the_plain_models_bits():
    model = tiny.fresh_model()
    plain = model.generate(IDS, **WRITE)
    quiet = replace(rule_of("strong", "count"), gate=Latched(Watch(Hits(S), Count(), 99.0)))

    found = guarded(model, quiet)

    assert torch.equal(found.sequences, plain)
    assert {one.decision for one in found.decisions} == {"allow"}


def test_a_stop_with_the_edits_own_gate_would_refuse_before_the_edit_could_help():
    """What `escalate` is there for: at the edit's own site a gate reads the stream before the edit."""
    model, rule = tiny.fresh_model(), rule_of("strong", "count")
    early = Refuse(GATES["count"], "tiny", None, "w9", "too.early")
    made = Policy.of(model, TOKENIZER, SAE, Plan((rule,)), name="too early", refusals=(early,))

    with Guardrail.attach(model, made, tokenizer=TOKENIZER, saes=SAE) as guard:
        found = guard.generate(IDS, **WRITE)

    assert [one.decision for one in found.decisions].count("refuse") == decisions("strong").count("steer")


def test_every_part_that_reads_the_edited_stream_is_moved_and_no_other():
    words = Words((9,), (1.0,), (1.0,), (), (), (), 4, 1.0, 0.0)
    here, named = Watch(Hits(S), Count(), 1.0), Watch(Hits(S, sae="tiny"), Count(), 1.0)
    sited = Watch(Hits(S, site=SAE.site), Count(), 1.0)
    earlier = Watch(Hits(S, site=Site("resid_post", 0)), Count(), 1.0)
    other = Watch(Hits(S, sae="another"), Count(), 1.0)
    gate = And((here, named, Latched(sited), earlier, other, Blend((here, words), (1.0, 1.0), 0.0)))

    stop = escalate(Rule("tiny", S, Scale(0.5), gate=gate), SAE, text="no", reason="r")

    moved: Any = stop.gate
    assert [leaf.site for leaf in moved.leaves] == [AFTER, AFTER, AFTER, Site("resid_post", 0), None, AFTER, None]
    assert (stop.sae, stop.site) == ("tiny", AFTER)


def test_another_gate_can_stand_for_the_rules_own():
    stop = escalate(rule_of("weak", "count"), SAE, text="no", reason="r", gate=Latched(Watch(Hits(S), Count(), 9.0)))

    assert stop.gate == Latched(Watch(Hits(S, site=AFTER), Count(), 9.0))


def test_a_gate_of_words_is_joined_by_one_that_sees_the_edit():
    """Words stay what they are whatever is edited: alone they would refuse every row that they open."""
    said = Latched(Words((9,), (1.0,), (1.0,), (), (), (), 4, 1.0, 0.0))
    high = Watch(LogOdds(S, (1.0, 1.0, 1.0), 0.0), Window(1), 5.0)
    decided = {}
    for edit in ("none", "strong"):
        model, rule = tiny.fresh_model(), Rule("tiny", S, EDITS[edit], gate=said)
        made = policy(model, rule, gate=high)
        with Guardrail.attach(model, made, tokenizer=TOKENIZER, saes=SAE) as guard:
            decided[edit] = [one.decision for one in guard.generate(IDS, **WRITE).decisions]

    assert made.refusals[0].gate == And((said, Watch(LogOdds(S, (1.0, 1.0, 1.0), 0.0, site=AFTER), Window(1), 5.0)))
    assert decided["none"][-1] == "refuse"
    assert decided["strong"][-1] == "steer"
    assert decided["none"].count("refuse") <= decided["strong"].count("steer")
    with pytest.raises(BadPolicy, match="no part of its gate reads"):
        escalate(rule, SAE, text="no", reason="r")


@pytest.mark.usefixtures("without_type_checks")
def test_an_escalating_policy_comes_back_from_its_text():
    made = policy(tiny.fresh_model(), rule_of("weak", "window"))

    assert Policy.from_json(made.to_json()) == made


REFUSED = {
    "no gate": (Rule("tiny", S, Scale(0.5)), {}, "has no gate"),
    "part of the tokens": (rule_of("weak", "count", phase="generated"), {}, "leaves tokens unedited"),
    "special tokens": (
        Rule("tiny", S, Scale(0.5), gate=Watch(Hits(S, special=True), Count(), 1.0)), {}, "leaves tokens unedited",
    ),
    "a gate that reads nothing": (Rule("tiny", S, Scale(0.5), gate=Always()), {}, "no part of its gate reads"),
    "a gate that reads elsewhere": (
        Rule("tiny", S, Scale(0.5), gate=Watch(Hits(S, site=Site("resid_post", 0)), Count(), 1.0)), {},
        "no part of its gate reads",
    ),
    "a site that nothing follows": (rule_of("weak", "count", site=Site("mlp_out", 1)), {}, "carries the same stream"),
    "no code": (rule_of("weak", "count"), {"reason": "two words"}, "1 to 128 letters"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_escalations_that_could_not_work_are_refused_by_name(name):
    rule, options, message = REFUSED[name]

    with pytest.raises(BadPolicy, match=message):
        escalate(rule, SAE, **{"text": "no", "reason": "r"} | options)


def test_a_trigger_may_leave_tokens_out():
    """DSG edits hot tokens only; the others are no evidence for its gate either."""
    rule = rule_of("strong", "count", trigger=AnyActive(S))

    assert escalate(rule, SAE, text="no", reason="r").site == AFTER
    assert "refuse" not in [one.decision for one in guarded(tiny.fresh_model(), rule).decisions]


def test_nothing_follows_the_last_block():
    model = tiny.fresh_model()
    rule = rule_of("weak", "count", site=Site("resid_post", 2))

    with pytest.raises(SiteNotFound):
        guarded(model, rule)
