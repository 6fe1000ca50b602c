"""SmolLM2-135M-Instruct under a policy on eight questions written here: what triggers, and the bits of what does not.

Nothing here is skipped: without the model these tests fail with `ModelUnavailable`, which says how to get it.
"""

from typing import Any

import pytest
import torch

from saeguard import Clamp, Plan, Rule, capture, load_model, load_sae
from saeguard.cli.guarded import PLAIN, UnderPolicy
from saeguard.evaluating.multiple_choice import Question, answers_of, asked_as
from saeguard.evaluating.prompts import bare_ids, token_ids
from saeguard.evaluating.subject import Plain
from saeguard.evaluating.unlearning import ask, figures
from saeguard.gates import Count, Hits, Latched, Watch
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy

NAME = "smollm2-135m-instruct"
BIRDS = ("owl", "sparrow", "penguin", "eagle")
TOWNS = ("Paris", "London", "Rome", "Madrid")
QUESTIONS = (
    Question("Which bird hunts mice at night?", BIRDS, 0, "birds"),
    Question("Which bird cannot fly but swims under the ice?", BIRDS, 2, "birds"),
    Question("Which small brown bird nests under roofs?", BIRDS, 1, "birds"),
    Question("Which bird of prey stands on many coats of arms?", BIRDS, 3, "birds"),
    Question("Which town is the capital of France?", TOWNS, 0, "towns"),
    Question("In which town does the king of England live?", TOWNS, 1, "towns"),
    Question("Which town is the capital of Italy?", TOWNS, 2, "towns"),
    Question("Which town is the capital of Spain?", TOWNS, 3, "towns"),
)


@pytest.fixture(scope="module")
def real() -> Any:
    model, tokenizer = load_model(NAME)
    return model, tokenizer, load_sae(f"{NAME}/resid_post.20")


def fired(real: Any, ids: list[int]) -> set[int]:
    """Latents that fire on some token behind the first."""
    model, _, sae = real
    with torch.no_grad(), capture(model, sae.site) as tape:
        model(torch.tensor([ids]))
    return set((sae.encode(tape[sae.site][0, 1:]) > 0).any(0).nonzero()[:, 0].tolist())


@pytest.fixture(scope="module")
def policy(real: Any) -> Policy:
    """Opens on latents that fire on each question about birds and on nothing that is said about towns."""
    model, tokenizer, sae = real
    prompt = lambda one: bare_ids(tokenizer, asked_as(one))
    towns = [one for one in QUESTIONS if one.topic == "towns"]
    rows = [prompt(one) + token_ids(tokenizer, f" {choice}") for one in towns for choice in one.choices]
    known = set().union(*(fired(real, row) for row in rows))
    birds = [fired(real, prompt(one)) - known for one in QUESTIONS if one.topic == "birds"]
    assert all(birds), "a question about birds has no latent of its own"
    latents = tuple(sorted(set().union(*birds)))
    gate = Latched(Watch(Hits(latents), Count(), 0.0))
    plan = Plan((Rule(sae.name, latents[:20], Clamp(-0.3, when="always", unit="norm"), gate=gate),))
    return Policy.of(model, tokenizer, sae, plan, name="birds")


def test_questions_about_birds_trigger_and_those_about_towns_are_the_plain_models_to_the_last_bit(real, policy):
    model, tokenizer, sae = real
    plain = ask(Plain(model, tokenizer), QUESTIONS, forms=("options",), new_tokens=6)
    with Guardrail.attach(model, {PLAIN: None, "guarded": policy}, tokenizer=tokenizer, saes=sae) as guard:
        birds, towns = figures(plain, ask(UnderPolicy(guard), QUESTIONS, forms=("options",), new_tokens=6))

    assert birds["triggered"]["question"]["count"] == 4
    assert towns["triggered"]["answers"]["count"] == 0
    assert towns["identical"]["sums"] == towns["identical"]["logits"] == [4, 4]
    assert towns["likelihood"]["sum"]["plain"] == towns["likelihood"]["sum"]["guarded"]
    assert towns["likelihood"]["sum"]["plain"]["count"] >= 3
    same, of = towns["identical"]["written, options"]
    assert same == of


def test_sums_are_those_of_whole_rows(real):
    model, tokenizer, _ = real
    found = answers_of(Plain(model, tokenizer), QUESTIONS[:2])

    for one, sums in zip(QUESTIONS[:2], found.sum, strict=True):
        for choice, total in zip(one.choices, sums, strict=True):
            front, back = bare_ids(tokenizer, asked_as(one)), token_ids(tokenizer, f" {choice}")
            with torch.no_grad():
                log_p = model(torch.tensor([front + back])).logits[0].log_softmax(-1)
            expected = sum(float(log_p[len(front) + i - 1, token]) for i, token in enumerate(back))
            assert total == pytest.approx(expected, abs=2e-3)
