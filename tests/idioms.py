"""What the tests of other libraries share: plans, texts, policies, and texts written by hand."""

from functools import cache
from typing import Any

from saeguard import Add, Clamp, Plan, Rule, steer
from saeguard.gates import Count, Hits, Latched, Watch
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy, Refuse
from tests import tiny
from tests.words import word_tokenizer

SAE = tiny.tiny_sae()
GATE = Latched(Watch(Hits((1, 2, 3)), Count(), 2.0))
PUSH = Plan((Rule("tiny", (4, 5), Add(6.0), gate=GATE), Rule("tiny", (7, 8), Clamp(5.0, when="active"))))
PHASED = Plan((Rule("tiny", (4, 5), Add(6.0), phase="prompt"), Rule("tiny", (9,), Add(5.0), phase="generated")))
TEXTS = ["w5 w9 w11 w30", "w7", "w40 w41 w9 w22 w51 w6 w8"]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
FIRST, LATE = (Watch(Hits(tuple(range(48))), Count(), limit) for limit in (0.0, 9.0))


@cache
def tokenizer() -> Any:
    found = word_tokenizer()
    found.padding_side = "left"
    return found


def by_hand(model: Any, texts: list[str], plan: Any = None) -> list[str]:
    """What each text goes on with, steered in a batch of its own."""
    plans = plan if isinstance(plan, list) else [plan] * len(texts)
    found = []
    for text, one in zip(texts, plans, strict=True):
        ids = tokenizer()(text, return_tensors="pt")
        with steer(model, one, saes=SAE, tokenizer=tokenizer()):
            output = model.generate(**ids, **GREEDY)[0, ids["input_ids"].shape[1] :]
        found.append(tokenizer().decode(output, skip_special_tokens=True))
    return found


def policy(model: Any, plan: Plan | None = PUSH, **options: Any) -> Policy:
    return Policy.of(model, tokenizer(), SAE, plan, name="tiny policy", **options)


def refusing(model: Any, gate: Any = FIRST) -> Policy:
    return policy(model, None, refusals=(Refuse(gate, "tiny", None, "w9 w9 w8", "said.no"),))


def attach(model: Any, policies: Any, **options: Any) -> Guardrail:
    return Guardrail.attach(model, policies, tokenizer=tokenizer(), saes=SAE, **options)
