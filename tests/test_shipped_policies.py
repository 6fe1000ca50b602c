"""The policies that ship stand on what ships, and what opens the gate of words opens it behind any text."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard import load_sae
from saeguard.errors import BadPolicyFile
from saeguard.gates import Latched, WordsCusum
from saeguard.gates.base import Seen
from saeguard.guarding.policy import Policy
from saeguard.guarding.shipped import FOLDER, load_policy, shipped_policies
from tests.counts import cases

VOCABULARY = 49_152
"""Of SmolLM2."""


@pytest.mark.parametrize("name", shipped_policies())
def test_shipped_policy_fits_what_ships_and_its_card(name):
    policy = loaded(name)

    assert all(load_sae(pin.source).fingerprint() == pin.fingerprint for pin in policy.saes)
    assert policy.calibration["questions"]["retain"]["share"] <= policy.calibration["level"]
    card = json.loads((FOLDER / f"{name}.card.json").read_text(encoding="utf-8"))
    assert card["fingerprint"] == policy.fingerprint()
    assert policy.name == card["name"] == name


def test_policy_that_does_not_ship_is_refused_by_name():
    with pytest.raises(BadPolicyFile, match="policy 'botany'.*shipped are"):
        load_policy("botany")


def test_biology_refuses_and_edits_behind_one_gate():
    (rule,), (stop,) = gates_of(loaded("biology"))

    assert rule is stop  # the very same object: compared at every pass
    assert isinstance(rule, Latched)
    assert isinstance(rule.gate, WordsCusum)


@settings(max_examples=cases(40))
@given(st.data())
def test_what_opens_the_gate_of_words_opens_it_behind_and_before_any_text(data):
    gate = load_gate()
    loud = sorted(zip(gate.weights, gate.tokens, strict=True))[-3000:]
    words = data.draw(st.lists(st.sampled_from([token for _, token in loud]), min_size=2, max_size=12))
    before, after = (data.draw(st.lists(st.integers(17, VOCABULARY - 1), max_size=60)) for _ in range(2))

    alone, beside = peak(gate, words), peak(gate, [*before, *words, *after])

    assert beside >= alone - 1e-9


def gates_of(policy: Policy) -> tuple[list[Any], list[Any]]:
    assert policy.plan is not None
    return [rule.gate for rule in policy.plan.rules], [stop.gate for stop in policy.refusals]


loaded = cache(load_policy)


def load_gate() -> WordsCusum:
    gate: Any = loaded("biology").refusals[0].gate
    return gate.gate


def peak(gate: WordsCusum, ids: list[int]) -> float:
    row, none = torch.tensor([ids]), torch.zeros(1, len(ids), 0)
    seen = Seen(none, none, torch.ones_like(row).bool(), None, None, row)
    _, verdict = gate.step(gate.begin(1, torch.device("cpu")), [seen])
    return float(verdict.score.amax())
