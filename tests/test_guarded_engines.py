"""A guarded model is guarded from every side: whatever a framework offers besides the guardrail refuses.

Ways around a plain transformers model are in `tests/test_guardrail.py`; these are those of wrappers.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from saeguard.errors import GuardError, UnsupportedModel
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy
from tests import test_engine_nnsight, tiny
from tests.engine_table import PUSH, SAES
from tests.modes import word_tokenizer
from tests.test_engine_lens import boot

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = tiny.prompt(2, 6)
SHORT: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
Way = Callable[[Any], Any]


def traced(found: Any) -> Any:
    with found.trace(IDS, use_cache=False):
        out = found.output.logits.save()
    return out  # noqa: RET504  there is no return in the code of a trace


def generated(found: Any) -> Any:
    with found.generate(IDS, **SHORT) as tracer:
        out = tracer.result.save()
    return out  # noqa: RET504


def peft_model() -> Any:
    return get_peft_model(tiny.fresh_model(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")).eval()


BRIDGE: dict[str, Way] = {
    "call": lambda it: it(IDS),
    "forward": lambda it: it.forward(IDS),
    "generate": lambda it: it.generate(IDS, verbose=False, **SHORT),
    "hf_generate": lambda it: it.hf_generate(IDS, **SHORT),
    "generate_stream": lambda it: list(it.generate_stream(IDS, max_new_tokens=2, verbose=False)),
    "run_with_cache": lambda it: it.run_with_cache(IDS),
    "run_with_cache, stopped": lambda it: it.run_with_cache(IDS, stop_at_layer=0),
    "run_with_hooks": lambda it: it.run_with_hooks(IDS, fwd_hooks=[]),
    "the model inside": lambda it: it.original_model(IDS),
    "its generate": lambda it: it.original_model.generate(IDS, **SHORT),
    "its forward": lambda it: it.original_model.forward(IDS),
    "its trunk": lambda it: it.original_model.model(IDS),
}
NNSIGHT: dict[str, Way] = {
    "trace": traced, "generate": generated, "pipe": lambda it: it.pipe("w5 w6"), "call": lambda it: it(IDS),
    "the model inside": lambda it: it._module(IDS), "its forward": lambda it: it._module.forward(IDS),
}  # fmt: skip
PEFT: dict[str, Way] = {
    "call": lambda it: it(input_ids=IDS), "generate": lambda it: it.generate(input_ids=IDS, **SHORT),
    "the tuner": lambda it: it.base_model(input_ids=IDS), "the model inside": lambda it: it.get_base_model()(IDS),
    "its generate": lambda it: it.get_base_model().generate(IDS, **SHORT),
}  # fmt: skip
SIDES = [(boot_it, name, way) for boot_it, ways in (("bridge", BRIDGE), ("nnsight", NNSIGHT), ("peft", PEFT))
         for name, way in ways.items()]  # fmt: skip


def made(kind: str) -> tuple[Any, Any]:
    """A model as its users have it, and what a guardrail is attached to."""
    if kind == "nnsight":
        found = test_engine_nnsight.loaded("llama")
        return found, found._module
    found = boot("llama") if kind == "bridge" else peft_model()
    return found, found


@pytest.mark.parametrize(("kind", "name", "way"), SIDES)
def test_way_around_a_guardrail_is_refused_and_free_when_it_is_gone(kind, name, way):
    found, model = made(kind)
    tokenizer = word_tokenizer()
    policy = Policy.of(model, tokenizer, SAES[0], PUSH, name="edits")

    with Guardrail.attach(model, policy, tokenizer=tokenizer, saes=SAES) as guard, torch.no_grad():
        with pytest.raises(GuardError):
            way(found)
        assert guard.generate(IDS, **SHORT).sequences.shape == (2, 8)
    with torch.no_grad():
        way(found)


def test_guardrail_on_what_only_wraps_the_model_is_refused():
    found, _ = made("nnsight")

    with pytest.raises(UnsupportedModel, match=r"model\._module"):
        Policy.of(found, word_tokenizer(), SAES[0], PUSH, name="edits")
    policy = Policy.of(found._module, word_tokenizer(), SAES[0], PUSH, name="edits")
    with pytest.raises(UnsupportedModel, match=r"model\._module"):
        Guardrail.attach(found, policy, tokenizer=word_tokenizer(), saes=SAES)
