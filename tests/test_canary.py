"""Entering a block tries an edit first: what is broken is refused there, and what is whole is left as it was."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from saeguard import Add, AnyActive, Clamp, Plan, Rule, Site, capture, steer
from saeguard import canary as canaries
from saeguard.canary import canary
from saeguard.engines import engine_for
from saeguard.engines.base import places_of
from saeguard.engines.session import Session
from saeguard.errors import (
    CanaryFailed,
    CompiledModel,
    GuardNotApplied,
    ModelBusy,
    PlanNeverRan,
    SiteNotFound,
    UnsupportedModel,
)
from saeguard.guarding.guardrail import Guardrail
from saeguard.guarding.policy import Policy
from saeguard.sites import STREAMS
from tests import more_models, sabotages, tiny
from tests.words import word_tokenizer

SAE = tiny.tiny_sae()
PLAN = Plan((Rule("tiny", (1, 2), Clamp(3.0, when="active"), trigger=AnyActive((5,))),), "mine")
IDS = tiny.prompt(2, 5)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@contextmanager
def passes_of(model: nn.Module) -> Iterator[list[int]]:
    """How often ``forward`` ran, by something that is no hook."""
    count, own = [0], type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return own(self, *args, **kwargs)

    forward.__signature__ = __import__("inspect").signature(own)  # type: ignore[attr-defined]
    type(model).forward = forward  # type: ignore[method-assign]
    try:
        yield count
    finally:
        type(model).forward = own  # type: ignore[method-assign]


CAUGHT: dict[Any, tuple[type[Exception], str]] = {
    sabotages.wrong_sign: (CanaryFailed, r"resid_post\.1, watched at model\.layers\.2.*off by 2 of the edit"),
    sabotages.edits_twice: (CanaryFailed, "off by 1 of the edit"),
    sabotages.row_0_only: (CanaryFailed, "does not arrive"),
    sabotages.decoding_only: (CanaryFailed, "does not arrive"),
    sabotages.spares_column_0: (CanaryFailed, "off by 1 of the edit"),
    sabotages.means_over_rows: (CanaryFailed, "off by 0.5 of the edit"),
    sabotages.keeps_the_norm: (CanaryFailed, "row 1 is off"),
    sabotages.rebuilds_the_stream: (CanaryFailed, "row 0, which has no edit"),
    sabotages.swapped_layer: (CanaryFailed, "ahead of any edit"),
    sabotages.hook_for_tuples: (CanaryFailed, "does not arrive"),
    sabotages.fast_kernel_is_off: (CanaryFailed, "off by 2 of the edit"),
    sabotages.dead_hook: (GuardNotApplied, "had not run"),
    sabotages.compiled_too_early: (CompiledModel, "torch.compile"),
}


@pytest.mark.parametrize("sabotage", CAUGHT, ids=lambda sabotage: sabotage.__name__)
def test_what_breaks_edits_is_refused_on_entry(sabotage):
    model, (error, message) = tiny.fresh_model(), CAUGHT[sabotage]

    with sabotage(model), pytest.raises(error, match=message), steer(model, PLAN, saes=SAE):
        raise AssertionError("entered")


@pytest.mark.parametrize("sabotage", [s for s in CAUGHT if CAUGHT[s][0] is CanaryFailed], ids=lambda s: s.__name__)
def test_without_the_canary_the_block_begins_all_the_same(sabotage):
    """So it is the canary that catches them, at an edit that the plan's own gates would not have made."""
    model = tiny.fresh_model()

    with sabotage(model), steer(model, PLAN, saes=SAE, canary=False) as run:
        logits(model)

    assert run.canary == "not asked for"


@pytest.mark.parametrize("name", more_models.ALL)
def test_every_site_of_every_architecture_passes_alone_and_together(name):
    engine = engine_for(more_models.model_of(name))
    places = {}
    for site in (Site(stream, layer) for stream in STREAMS for layer in (0, tiny.LAYERS - 1)):
        try:
            places |= places_of(engine, [site])
        except SiteNotFound:
            continue

    assert canary(engine, places) == "passed"
    for site in list(places)[::5]:
        assert canary(engine, places_of(engine, [site])) == "passed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_and_a_wrong_sign_is_caught_there_too(dtype):
    model = tiny.fresh_model(dtype=dtype)

    with steer(model, PLAN, saes=SAE) as run:
        logits(model)
    with sabotages.wrong_sign(model), pytest.raises(CanaryFailed), steer(copy.deepcopy(model), PLAN, saes=SAE):
        pass

    assert run.canary == "passed"


def test_nothing_is_disturbed():
    """A model in training, with dropout, gradients, a foreign hook, and half of its modules in eval mode."""
    model = tiny.fresh_model()
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.register_forward_hook(lambda m, a, output: nn.functional.dropout(output, 0.5, m.training))
    seen: list[int] = []
    model.register_forward_pre_hook(lambda *_: seen.append(0))
    model(IDS).logits.sum().backward()
    seen.clear()
    modes, grads = [part.training for part in model.modules()], [p.grad.clone() for p in model.parameters()]
    hooks = [(list(part._forward_hooks), list(part._forward_pre_hooks)) for part in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    with passes_of(model) as count, steer(model, Plan((Rule("tiny", (1,), Add(0.0)),)), saes=SAE) as run:
        assert count == [2]
        assert seen == []
        assert run.calls == []
        assert torch.equal(torch.rand(3), expected)
        model(IDS)

    assert run.canary == "passed"
    assert seen == [0]
    assert modes == [part.training for part in model.modules()]
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert hooks == [(list(part._forward_hooks), list(part._forward_pre_hooks)) for part in model.modules()]


def test_block_without_a_call_is_refused_as_before():
    with pytest.raises(PlanNeverRan), steer(tiny.fresh_model(), PLAN, saes=SAE):
        pass


def test_model_stays_as_it_was_when_the_canary_fails():
    model = tiny.fresh_model().train()
    model.register_forward_hook(lambda *_: None)
    hooks = [(list(part._forward_hooks), list(part._forward_pre_hooks)) for part in model.modules()]

    with sabotages.wrong_sign(model), pytest.raises(CanaryFailed), steer(model, PLAN, saes=SAE):
        pass

    assert model.training
    assert "generate" not in vars(model)
    assert hooks == [(list(part._forward_hooks), list(part._forward_pre_hooks)) for part in model.modules()]


def test_it_is_tried_once_and_again_when_the_model_has_changed():
    model = tiny.fresh_model()
    told = []

    def enter() -> int:
        with passes_of(model) as count, steer(model, PLAN, saes=SAE):
            told.append(count[0])
            logits(model)
        return told[-1]

    assert [enter(), enter()] == [2, 0]
    model.model.layers[2] = copy.deepcopy(model.model.layers[2])
    assert [enter(), enter()] == [2, 0]
    model.to(torch.bfloat16)
    assert [enter(), enter()] == [2, 0]
    model.model.layers[1].forward = model.model.layers[1].forward  # as offloading does
    assert [enter(), enter()] == [2, 0]


def test_run_says_why_it_was_not_tried():
    model, open_ = tiny.fresh_model(), "a block is open on it already"

    with capture(model, "resid_post.1") as tape, steer(model, PLAN, saes=SAE) as inner:
        logits(model)
        recorded = tape["resid_post.1"].shape
    with steer(model, PLAN, saes=SAE) as outer:
        with steer(model, Plan((Rule("tiny", (9,), Add(1.0)),)), saes=SAE) as nested:
            logits(model)
        assert len(outer.calls) == 1
    with steer(model, None) as empty:
        logits(model)
    model.model.layers[0].mlp.compile(backend="eager")
    with passes_of(model) as count, steer(model, PLAN, saes=SAE) as compiled:
        assert count == [0]
        logits(model)
    torch._dynamo.reset()

    assert recorded == (2, 5, tiny.D)
    assert [run.canary for run in (inner, outer, nested, empty)] == [open_, "passed", open_, "nothing is edited"]
    assert compiled.canary == "a part of it is compiled"


def test_model_that_cannot_make_a_pass_is_refused_by_name():
    model = tiny.fresh_model()
    model.model.layers[1].mlp.down_proj = nn.Linear(7, 7)

    with pytest.raises(CanaryFailed, match=r"cannot make them: RuntimeError.*canary=False"):
        steer(model, PLAN, saes=SAE).__enter__()


def test_block_that_does_not_run_is_named():
    model = tiny.fresh_model()
    model.config.num_hidden_layers = 2
    model.model.config.num_hidden_layers = 2

    with (
        pytest.raises((CanaryFailed, GuardNotApplied)),
        steer(model, PLAN, saes=tiny.tiny_sae(site=Site("resid_post", 2))),
    ):
        pass


def test_hook_that_its_owner_takes_off_meanwhile_stays_off(monkeypatch):
    model, make_a_pass = tiny.fresh_model(), canaries._run
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    other = model.register_forward_hook(lambda module, args, output: None)

    def and_take_it_off(model: nn.Module, ids: Any) -> None:
        handle.remove()
        make_a_pass(model, ids)

    monkeypatch.setattr(canaries, "_run", and_take_it_off)
    with steer(model, PLAN, saes=SAE):
        model(tiny.prompt())

    assert not model._forward_pre_hooks
    assert list(model._forward_hooks) == [other.id]


def test_calls_of_other_threads_are_refused_while_it_runs(monkeypatch):
    model, said = tiny.fresh_model(), []
    own = canaries._run

    def run(*args: Any) -> None:
        def call() -> None:
            try:
                logits(model)
            except ModelBusy:
                said.append("busy")

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        own(*args)

    monkeypatch.setattr(canaries, "_run", run)
    with steer(model, PLAN, saes=SAE):
        logits(model)

    assert said == ["busy", "busy"]


def test_guardrail_tries_it_when_it_is_attached():
    model, tokenizer = tiny.fresh_model(), word_tokenizer()
    policy = Policy.of(model, tokenizer, SAE, PLAN, name="edits")

    with sabotages.row_0_only(model), pytest.raises(CanaryFailed):
        Guardrail.attach(model, policy, tokenizer=tokenizer, saes=SAE)
    with passes_of(model) as count:
        guard = Guardrail.attach(model, policy, tokenizer=tokenizer, saes=SAE)
        assert count == [2]
        guard.reload(policy)
        assert count == [2]
    guard.detach()

    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def bridge() -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    plain, tokenizer = tiny.fresh_model(), copy.deepcopy(word_tokenizer())
    plain.config.architectures = [type(plain).__name__]
    tokenizer.init_kwargs.update(name_or_path="", add_bos_token=True)
    return TransformerBridge.boot_transformers("tiny", hf_model=plain, tokenizer=tokenizer, device="cpu")


def test_it_is_tried_on_the_model_inside_of_a_bridge():
    lens = bridge()

    for stream in STREAMS:
        with steer(lens, PLAN, saes=sae_at(lens, Site(stream, 1))) as run:
            logits(lens.original_model)
        assert run.canary == "passed"
    engine = engine_for(lens)
    with sabotages.wrong_sign(lens), pytest.raises(CanaryFailed):
        canary(engine, places_of(engine, [Site("resid_post", 1)]), again=True)


def sae_at(model: Any, site: Site) -> Any:
    """An SAE that is as wide as a site."""
    return tiny.tiny_sae(site=site, d_in=engine_for(model).resolve(site).width)


def test_model_that_is_not_supported_is_refused_as_before():
    with pytest.raises(UnsupportedModel), steer(nn.Linear(2, 2), PLAN, saes=SAE):
        pass


def test_a_probe_that_leaves_its_hooks_would_be_seen():
    """The mutant of the law that nothing stays."""
    model = tiny.fresh_model()
    own = Session._detach
    try:
        Session._detach = lambda self, site: self._handles.pop(site)  # type: ignore[method-assign,assignment]
        canary(engine_for(model), places_of(engine_for(model), [Site("resid_post", 1)]))
    finally:
        Session._detach = own  # type: ignore[method-assign]

    assert any(part._forward_hooks for part in model.modules())
