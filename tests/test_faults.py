"""A failed request changes nothing for the next one, wherever and whenever it fails."""

import asyncio
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saeguard import Plan, Site, capture, steer
from saeguard.engines import engine_for
from saeguard.errors import GuardError
from tests.counts import FULL
from tests.tiny import fresh_model, prompt, tiny_sae
from tests.traces import add_plan, nothing_left, raiser

ARCHITECTURES = ("llama", "gpt2", "neox", "gemma3")
KINDS = (RuntimeError, KeyboardInterrupt, MemoryError, asyncio.CancelledError)
STEPS = (1, 2, 3, 4)  # the prefill and three decode steps
SITES = ("resid_pre.0", "attn_out.1", "mlp_in.1", "mlp_out.1", "resid_post.1", "resid_post.2")
SAE = tiny_sae()
IDS = prompt(2, 6, seed=3)
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
MODELS = {name: fresh_model(name) for name in ARCHITECTURES}


def plan_at_all_sites() -> Plan:
    return Plan(tuple(rule for site in SITES for rule in add_plan(1, amount=0.5, site=site).rules))


def next_three(model: nn.Module) -> list[Tensor]:
    """Another tenant's plan, no plan, and a plain generate."""
    with torch.no_grad():
        with steer(model, add_plan(9), saes=SAE):
            steered = model(IDS).logits
        return [steered, model(IDS).logits, model.generate(IDS, **GREEDY)]


@pytest.fixture(scope="module")
def references() -> dict[str, list[Tensor]]:
    return {name: next_three(copy.deepcopy(model)) for name, model in MODELS.items()}


def modules_at_sites(model: nn.Module) -> dict[str, nn.Module]:
    """The model itself and every module that a site of the plan is at."""
    engine = engine_for(model)
    found = {str(site): engine.resolve(Site.parse(site)).module for site in SITES}
    return {"model": model, **found}


def fault_points() -> Iterator[tuple[str, str, int, str, type[BaseException]]]:
    """Module, side of our hook, forward pass and kind; without SAEGUARD_FULL each point gets one of the kinds."""
    for a, name in enumerate(ARCHITECTURES):
        for where in ("model", *SITES):
            for s, side in enumerate(("pre before", "pre after", "post before", "post after")):
                for step in STEPS:
                    kinds = KINDS if FULL else [KINDS[(a + s + step) % 4]] if (a + s + step) % 2 else []
                    for kind in kinds:
                        yield name, where, step, side, kind


POINTS = list(fault_points())


def register(module: nn.Module, side: str, hook: Any) -> Any:
    before = side.endswith("before")
    if side.startswith("pre"):
        return module.register_forward_pre_hook(hook, prepend=before)
    return module.register_forward_hook(hook, prepend=before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fault_at_any_site_and_step_leaves_the_next_requests_as_in_a_fresh_process(name, references):
    model = MODELS[name]
    modules, plan = modules_at_sites(model), plan_at_all_sites()
    done = 0
    for _, where, step, side, kind in [point for point in POINTS if point[0] == name]:
        steered = steer(model, plan, saes=SAE), capture(model, "resid_post.1")
        with nothing_left(model), pytest.raises(kind, match="boom"), steered[0], steered[1]:
            fail(model, modules[where], side, kind, step)

        found = next_three(model)
        assert all(map(torch.equal, found, references[name])), (where, side, step, kind.__name__)
        done += 1

    assert done >= (448 if FULL else 56)


def fail(model: nn.Module, module: nn.Module, side: str, kind: type[BaseException], step: int) -> None:
    """Generate, with a hook on ``module`` that raises in the ``step``-th pass."""
    handle = register(module, side, raiser(kind, at=step))
    try:
        model.generate(IDS, **GREEDY)
    finally:
        handle.remove()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fault_caught_inside_the_block_leaves_the_block_exact(name, step):
    model, plan = MODELS[name], plan_at_all_sites()
    with steer(model, plan, saes=SAE) as run:
        with pytest.raises(RuntimeError, match="boom"):
            fail(model, modules_at_sites(model)["mlp_out.1"], "post after", RuntimeError, step)
        after = model.generate(IDS, **GREEDY)
        logits = model(IDS).logits
    with steer(model, plan, saes=SAE) as fresh:
        expected = model.generate(IDS, **GREEDY)

        assert torch.equal(logits, model(IDS).logits)
    assert torch.equal(after, expected)
    ours = [entry.edited_positions[1] for entry in run.report.rules]
    assert ours == [entry.edited_positions[0] for entry in fresh.report.rules]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_forward_called_by_hand_after_a_fault_is_refused_and_not_taken_for_the_failed_pass(name):
    """What the failed pass knew of its tokens must not be used for another pass."""
    model, plan = MODELS[name], add_plan(1)
    with steer(model, plan, saes=SAE):
        with pytest.raises(RuntimeError, match="boom"):
            fail(model, modules_at_sites(model)["resid_pre.0"], "pre before", RuntimeError, 1)

        with pytest.raises(GuardError, match="no pass of the steered model is running"):
            model.forward(IDS)


@contextmanager
def without_finally(model: nn.Module, block: nn.Module) -> Iterator[None]:
    """The mutant: hooks removed after a bare yield, as PEFT 0.21 does with ``adapter_names``."""
    handle = block.register_forward_hook(lambda module, args, output: output + 1.0)
    yield
    handle.remove()


def test_hooks_without_finally_would_fail_here(references):
    model = copy.deepcopy(MODELS["llama"])
    block = modules_at_sites(model)["resid_post.1"]
    with pytest.raises(RuntimeError, match="boom"), without_finally(model, block):
        raise RuntimeError("boom")

    assert not any(map(torch.equal, next_three(model)[:2], references["llama"][:2]))
    with pytest.raises(AssertionError), nothing_left(MODELS["llama"]), without_finally(model, MODELS["llama"]):
        MODELS["llama"].register_forward_hook(print)
    MODELS["llama"]._forward_hooks.clear()
