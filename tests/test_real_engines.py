"""Every engine does to the real models what the transformers engine does to them.

Random SAEs as wide as the model, at two sites, with a plan per row, one of them gated; text padded on the left.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saeguard import AtLeast, Clamp, Plan, Rule, Scale, Site, SiteMap, load_model, steer
from saeguard.gates import Hits, Latched, Rate, Watch
from tests import laws, tiny

import nnsight  # isort: skip
from transformer_lens.model_bridge import TransformerBridge  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = ["smollm2-135m-instruct", pytest.param("gemma-3-270m", marks=pytest.mark.full)]
PROMPTS = ["The journey began in", "Why is the sky blue, and the sea", "Tell me"]
NEW = 6


def plans(width: int) -> tuple[list[Plan | None], list[Any]]:
    """One plan per prompt, and the SAEs of their rules."""
    saes = [
        tiny.tiny_sae(activation="jumprelu", name="late", d_in=width, d_sae=256, site=Site("resid_post", 9)),
        tiny.tiny_sae(activation="topk", name="added", d_in=width, d_sae=256, seed=1, site=Site("mlp_out", 5)),
    ]
    gate = Latched(Watch(Hits((4, 9, 30)), Rate(), 0.3))
    first = Plan((Rule("late", (1, 2, 3), AtLeast(4.0)), Rule("added", (5, 6), Scale(2.0))))
    second = Plan((Rule("late", (7,), Clamp(0.05, when="always", unit="norm"), gate=gate),))
    return [first, None, second], saes


def bridge_to(model: Any, tokenizer: Any) -> Any:
    model.config.architectures = [type(model).__name__]
    return TransformerBridge.boot_transformers(
        model.config._name_or_path or "model", hf_model=model, tokenizer=tokenizer, device="cpu"
    )


def traces_of(model: Any, tokenizer: Any) -> Any:
    return nnsight.TransformersModel(model, tokenizer=tokenizer, task="text-generation")


def call_bridge(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model(ids, attention_mask=mask, use_cache=False)


def call_traced(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with model.trace(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False):
        out = model.output.logits.save()
    return out  # noqa: RET504  there is no return in the code of a trace


def write_bridge(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model.hf_generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)


def write_traced(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False) as tracer:
        out = tracer.result.save()
    return out  # noqa: RET504


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


ENGINES: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "TransformerLens": (bridge_to, call_bridge, write_bridge),
    "nnsight": (traces_of, call_traced, write_traced),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_real_model_is_edited_alike_by_every_engine(name, engine):
    plain, tokenizer = load_model(name)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows, saes = plans(plain.config.hidden_size)
    with torch.no_grad(), steer(plain, rows, saes=saes, tokenizer=tokenizer) as expected:
        right = plain(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        said = plain.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    wrap, call, write = ENGINES[engine]
    found = wrap(copy.deepcopy(plain), tokenizer)

    with torch.no_grad(), steer(found, rows, saes=saes, tokenizer=tokenizer) as run:
        logits = call(found, ids, mask)
        written = write(found, ids, mask)

    assert (run.engine, expected.engine) == (engine, "transformers")
    assert laws.edited(run) == laws.edited(expected)
    assert any(position for calls in laws.edited(run).values() for call_ in calls for row in call_ for position in row)
    real = mask[..., None].bool()
    assert laws.distance(logits.masked_fill(~real, 0), right.masked_fill(~real, 0)) <= laws.TOLERANCE
    assert torch.equal(written, said)


@pytest.mark.parametrize("name", MODELS)
def test_real_model_under_a_site_map_is_edited_as_by_its_own_engine(name):
    plain, tokenizer = load_model(name)
    trunk = plain.model
    sites = SiteMap(
        {"resid_post": "layers.{}"}, tokens="input_ids", mask="attention_mask", width=plain.config.hidden_size
    )
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="right")
    rows, saes = plans(plain.config.hidden_size)
    rows = [None if plan is None else Plan(tuple(rule for rule in plan.rules if rule.sae == "late")) for plan in rows]
    options: dict[str, Any] = {"saes": saes, "tokenizer": tokenizer}

    with torch.no_grad(), steer(plain, rows, **options) as expected:
        right = plain(**batch, use_cache=False).logits
    with torch.no_grad(), steer(trunk, rows, layout=sites, **options) as run:
        hidden = trunk(**batch, use_cache=False).last_hidden_state

    assert run.engine == "nn.Module"
    assert laws.edited(run) == laws.edited(expected)
    assert laws.same_bits(plain.lm_head(hidden), right)
