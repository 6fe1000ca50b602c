"""Whatever is entered, left, nested and interrupted, in any order: nothing of ours stays, and all of theirs does."""

import copy
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from saeguard import Misdirect, Plan, Project, Reweight, Rule, Splice, capture, steer
from saeguard.errors import GuardNotApplied, OverlappingRules, PlanNeverRan
from tests.counts import cases
from tests.tiny import fresh_model, prompt, tiny_sae
from tests.traces import add_plan, ambient, make_up, nothing_left

ARCHITECTURES = ("llama", "gpt2")
SAE = tiny_sae()
MODELS = {name: fresh_model(name) for name in ARCHITECTURES}
IDS = prompt(2, 5)
with torch.no_grad():
    PLAIN = {name: model(IDS).logits for name, model in MODELS.items()}

KINDS = ("pre", "pre_kwargs", "forward", "forward_kwargs", "prepend", "always")
DENSE = (
    Rule("tiny", (), Splice(), special=True), Rule("tiny", (1, 2), Reweight(2.0, mode="swap", others=1.0)),
    Rule("tiny", (3,), Reweight(0.0, mode="weight", others=1.0), phase="all", first=3),
    Rule("tiny", (), Misdirect(0.5, unit="norm"), special=True), Rule("tiny", (5, 6), Project(), start=1),
)  # fmt: skip
steers = st.tuples(st.just("steer"), st.integers(0, 11 + len(DENSE)))
captures = st.tuples(st.just("capture"), st.sampled_from(["resid_post.0", "resid_pre.1", "mlp_out.2"]))
exits = st.tuples(st.just("exit"), st.integers(0, 5))
hooks = st.tuples(st.just("hook"), st.sampled_from(KINDS))
others = st.tuples(st.sampled_from(["call", "fail", "unhook", "throw"]), st.integers(0, 5))
actions = st.lists(st.one_of(steers, captures, exits, hooks, others), min_size=1, max_size=8)


class Boom(Exception):
    pass


class Story:
    """Runs a list of actions on one model, and keeps what foreign hooks saw in ``log``."""

    def __init__(self, model: nn.Module):
        self.model, self.block = model, [m for n, m in model.named_modules() if n.endswith((".1", "h.1"))][0]
        self.blocks: list[Any] = []
        self.foreign: list[Any] = []
        self.handles: list[Any] = []
        self.log: list[int] = []
        self.ours = True

    def tell(self, told: list[tuple[str, Any]]) -> list[int]:
        with torch.no_grad():
            try:
                for verb, argument in told:
                    getattr(self, verb)(argument)
            finally:
                for block in self.blocks:
                    close(block, None)
                for handle in self.handles:
                    handle.remove()
        return self.log

    def steer(self, number: int) -> None:
        plan = add_plan(number) if number <= 11 else Plan((DENSE[number - 12],))
        self.enter(lambda: steer(self.model, plan, saes=SAE))

    def capture(self, site: str) -> None:
        self.enter(lambda: capture(self.model, site))

    def enter(self, make: Any) -> None:
        if self.ours:
            block = make()
            try:
                block.__enter__()
            except OverlappingRules:  # two nested blocks set one latent: refused before anything is placed
                return
            self.blocks.append(block)

    def exit(self, index: int) -> None:
        if self.blocks:
            close(self.blocks.pop(index % len(self.blocks)), None)

    def throw(self, index: int) -> None:
        if self.blocks:
            close(self.blocks.pop(index % len(self.blocks)), Boom())

    def call(self, _: int) -> None:
        self.model(IDS)

    def fail(self, step: int) -> None:
        def boom(*_: Any) -> None:
            raise Boom

        target = [self.block, self.model][step % 2]
        register = target.register_forward_hook if step // 2 else target.register_forward_pre_hook
        with ExitStack() as stack:
            stack.callback(register(boom).remove)
            with pytest.raises(Boom):
                self.model(IDS)

    def hook(self, kind: str) -> None:
        number = len(self.foreign)

        def note(*_: Any) -> None:
            self.log.append(number)

        self.foreign.append(kind)
        target = [self.block, self.model][number % 2]
        options: dict[str, Any] = {"with_kwargs": kind.endswith("kwargs"), "prepend": kind == "prepend"}
        if kind.startswith("pre") and kind != "prepend":
            self.handles.append(target.register_forward_pre_hook(note, **options))
        else:
            self.handles.append(target.register_forward_hook(note, always_call=kind == "always", **options))

    def unhook(self, index: int) -> None:
        if self.handles:
            self.handles.pop(index % len(self.handles)).remove()


def close(block: Any, error: BaseException | None) -> None:
    with suppress(PlanNeverRan, Boom):
        block.__exit__(type(error) if error else None, error, None)


@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=cases(10_000) // len(ARCHITECTURES))
@given(told=actions)
def test_any_order_of_blocks_and_exceptions_leaves_nothing(name, told):
    model = MODELS[name]
    alone = Story(model)
    alone.ours = False
    log = alone.tell(told)
    with nothing_left(model):
        together = Story(model).tell(told)

    assert together == log, "a foreign hook fired another number of times, or in another order"
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, PLAIN[name])


@pytest.mark.parametrize(("canary", "registrations"), [(False, 5), (True, 12)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma3"])
def test_a_failure_at_any_registration_leaves_nothing(name, canary, registrations, monkeypatch):
    """Two hooks on the root, one per site; the canary, which is not tried again, has as many and two per site more."""
    model = fresh_model(name)
    plan = add_plan(1, site="resid_post.0"), add_plan(1, site="resid_pre.1"), add_plan(1, site="mlp_out.2")
    joined = type(plan[0])(tuple(rule for one in plan for rule in one.rules))
    reached = 0
    before = make_up(model)
    for k in range(1, 20):
        count = iter(range(1, 100))
        with monkeypatch.context() as patch:
            for method in ("register_forward_hook", "register_forward_pre_hook"):
                patch.setattr(nn.Module, method, failing(getattr(nn.Module, method), count, k))
            try:
                with steer(model, joined, saes=SAE, canary=canary), torch.no_grad():
                    model(IDS)
            except MemoryError:
                reached = k
        assert make_up(model) == before, f"failure at registration {k}"
        if reached < k:
            break

    assert reached == registrations


@pytest.mark.parametrize("failing_at", [1, 2])
def test_a_failure_while_nesting_leaves_the_outer_block_whole(failing_at, monkeypatch):
    model = MODELS["llama"]
    with steer(model, add_plan(1), saes=SAE) as run, torch.no_grad():
        steered = model(IDS).logits
        inside = make_up(model)
        with monkeypatch.context() as patch:
            counter = iter(range(1, 100))
            patch.setattr(
                nn.Module, "register_forward_hook", failing(nn.Module.register_forward_hook, counter, failing_at)
            )
            with pytest.raises(MemoryError), capture(model, ["resid_post.0", "resid_post.2"]):
                raise AssertionError("entered")

        assert make_up(model) == inside
        assert torch.equal(model(IDS).logits, steered)
    assert run.report.calls == 2


def failing(register: Any, count: Any, k: int) -> Any:
    def registering(*args: Any, **kwargs: Any) -> Any:
        if next(count) == k:
            raise MemoryError
        return register(*args, **kwargs)

    return registering


def test_exit_keeps_a_generate_that_somebody_else_put_there():
    model = fresh_model()

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    with steer(model, add_plan(1), saes=SAE), torch.no_grad():
        model(IDS)
        inner = model.generate
        model.generate = theirs

    assert model.__dict__["generate"] is theirs
    plain = fresh_model().generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), plain)


def test_exit_restores_a_generate_that_was_there_before():
    model = fresh_model()
    model.generate = theirs = type(model).generate.__get__(model)
    with steer(model, add_plan(1), saes=SAE):
        model.generate(IDS, max_new_tokens=4, do_sample=False)

    assert model.__dict__["generate"] is theirs


def test_generate_kept_from_inside_a_block_is_plain_after_it():
    model = fresh_model()
    with steer(model, add_plan(1), saes=SAE):
        kept = model.generate
        steered = kept(IDS, max_new_tokens=4, do_sample=False)

    plain = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(kept(IDS, max_new_tokens=4, do_sample=False), plain)
    assert not torch.equal(steered, plain)


def test_a_copy_made_inside_a_block_refuses_until_the_block_ends_and_then_is_plain():
    """The copy's ``generate`` once was the original's: it ran another model than the one it was called on."""
    model = fresh_model()
    with steer(model, add_plan(1), saes=SAE):
        model(IDS)
        twin = copy.deepcopy(model)
        with pytest.raises(GuardNotApplied, match="made inside a block on the original"):
            twin(IDS)
    with torch.no_grad():
        twin.get_output_embeddings().weight.zero_()

    assert not torch.equal(model(IDS).logits, twin(IDS).logits)
    assert (twin.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)[:, 5:] == 0).all()
    assert model.generate.__self__ is model
    assert twin.generate.__self__ is twin


def test_entering_leaves_random_state_and_modes_alone():
    model = fresh_model()
    before = ambient()
    with steer(model, add_plan(1), saes=SAE), capture(model, "resid_post.0"):
        inside = ambient()
        model(IDS)

    assert inside == before == ambient()
