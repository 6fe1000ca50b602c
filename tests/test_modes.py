"""No silent no-op: in every execution mode exactly the declared tokens are edited, or a named error says why not."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from saeguard import Add, Plan, Rule, Site, capture, steer
from saeguard.engines import hf
from saeguard.engines.traced import is_traced
from saeguard.errors import CompiledModel, GuardNotApplied, SiteNotFound, UnsupportedMode
from tests import modes, refusals
from tests.counts import FULL
from tests.tiny import fresh_model, tiny_model, tiny_sae
from tests.traces import add_plan, edited, fed, nothing_left, should_edit, union

ARCHITECTURES = ("llama", "gpt2", "neox", "gemma3")
SAE = tiny_sae()
ALL = Rule("tiny", (1, 2), Add(9.0), start=1, stop=9)
FIRST = Rule("tiny", (5,), Add(-9.0), first=3, special=True)
GENERATED = Rule("tiny", (7,), Add(5.0), phase="generated", first=3)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block_of(*rules: Rule) -> modes.Block:
    return lambda model: steer(model, Plan(rules), saes=SAE)


def expected(rule: Rule, done: modes.Done) -> tuple[tuple[int, ...], ...]:
    """What ``rule`` is about in the only call of ``done``, found token by token."""
    rows = []
    for number, sequence in enumerate(done.sequences):
        ids = fed(sequence, done.columns) if done.generates else sequence.tolist()
        real = None if done.real is None else done.real[number].tolist()
        rows.append(should_edit(rule, ids, columns=done.columns, real=real))
    n = done.per_request
    return tuple(union(rows[i : i + n]) for i in range(0, len(rows), n))


def assert_exact(done: modes.Done, rules: tuple[Rule, ...], plain: Tensor) -> None:
    for rule, found in zip(rules, edited(done.run), strict=True):
        assert found == (expected(rule, done),), f"{rule.where}"
        assert any(found[0]), "the plan was about no token"
    assert plain.shape != done.out.shape or not torch.equal(plain, done.out), "the edits changed nothing"


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("mode", modes.FORWARD)
def test_forward_mode_edits_exactly_the_declared_tokens(mode, name):
    model, run = tiny_model(name), modes.FORWARD[mode]
    plain = run(model, lambda _: nullcontext()).out
    with nothing_left(model):
        done = run(model, block_of(ALL, FIRST))

    assert_exact(done, (ALL, FIRST), plain)
    assert torch.equal(run(model, lambda _: nullcontext()).out, plain)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("mode", modes.GENERATE)
def test_generate_mode_edits_exactly_the_declared_tokens(mode, name):
    model, run = tiny_model(name), modes.GENERATE[mode]
    rules = (ALL, FIRST) if mode == "one_new_token" else (ALL, FIRST, GENERATED)
    plain = run(model, lambda _: nullcontext()).out
    done = run(model, block_of(*rules))

    assert_exact(done, rules, plain)
    assert "generate" not in vars(model)


@cache
def eager(name: str) -> tuple[Tensor, Tensor]:
    """Plain and steered logits without any compiler."""
    model = tiny_model(name)
    with torch.no_grad(), steer(model, Plan((ALL, FIRST)), saes=SAE):
        steered = model(modes.IDS).logits
    return model(modes.IDS).logits.detach(), steered


def spread(names: Iterable[str]) -> list[tuple[str, str]]:
    """Modes by architectures; tracing takes seconds: without SAEGUARD_FULL each mode gets one architecture, in turn."""
    every = [(mode, name) for mode in names for name in ARCHITECTURES]
    return every if FULL else [every[4 * i + i % 4] for i in range(len(every) // 4)]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("mode", "name"), spread(modes.COMPILED))
def test_compiled_mode_edits_exactly_the_declared_tokens(mode, name):
    plain, steered = eager(name)
    done = modes.COMPILED[mode](tiny_model(name), block_of(ALL, FIRST))

    assert_exact(done, (ALL, FIRST), plain)
    torch.testing.assert_close(done.out, steered, rtol=1e-4, atol=1e-4)
    assert torch.equal(tiny_model(name)(modes.IDS).logits, plain)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("mode", refusals.REFUSED)
def test_mode_without_exact_edits_is_refused_by_name(mode, name):
    model = tiny_model(name)
    run, error, text = refusals.REFUSED[mode]
    with nothing_left(model), pytest.raises(error, match=text):
        run(model, block_of(ALL))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("mode", "name"), spread(refusals.COMPILED_BEFORE))
def test_model_that_was_traced_without_hooks_is_refused_at_entry(mode, name):
    """torch.compile does not guard on hooks: what it traced before they came goes on without them, silently."""
    run, error, text = refusals.COMPILED_BEFORE[mode]
    with pytest.raises(error, match=text):
        run(tiny_model(name), block_of(ALL))


def test_the_matrix_has_at_least_52_cells_per_architecture_and_all_are_distinct():
    exact = [*modes.FORWARD, *modes.GENERATE, *modes.COMPILED]
    refused = [*refusals.REFUSED, *refusals.COMPILED_BEFORE]

    assert len(exact) + len(refused) == len({*exact, *refused}) >= 52
    assert len(exact) >= 35


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_function_that_saw_the_hooks_is_plain_after_the_block_and_steered_in_the_next():
    model, (plain, steered) = tiny_model("llama"), eager("llama")
    function = torch.compile(lambda ids: model(ids).logits, backend="eager")
    with block_of(ALL, FIRST)(model):
        inside = function(modes.IDS)
    after = function(modes.IDS)
    with block_of(ALL, FIRST)(model) as run:
        again = function(modes.IDS)

    torch.testing.assert_close(inside, steered, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, inside)
    assert run.report.calls == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_reset_makes_a_traced_model_steerable_again():
    model = tiny_model("llama")
    function = torch.compile(lambda ids: model(ids).logits, backend="eager")
    function(modes.IDS)
    with pytest.raises(CompiledModel), block_of(ALL)(model):
        raise AssertionError("entered")
    torch._dynamo.reset()
    with block_of(ALL, FIRST)(model):
        logits = function(modes.IDS)

    torch.testing.assert_close(logits, eager("llama")[1], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
def test_traced_modules_are_told_from_those_that_only_compiled_their_own_forward():
    model = tiny_model("llama")
    layer = modes.blocks(model)[1]
    torch.compile(model.lm_head, backend="eager")(torch.ones(1, 1, 32))
    assert not is_traced(layer)
    torch.compile(lambda ids: model(ids), backend="eager")(modes.IDS)

    assert is_traced(layer)
    assert is_traced(layer.mlp)
    assert not is_traced(nn.Bilinear(1, 1, 1))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("generates", [False, True])
def test_embeddings_are_edited_where_every_rule_takes_special_tokens_too(name, generates):
    model, rule = tiny_model(name), Rule("tiny", (1, 2, 3), Add(20.0), special=True, stop=8)
    embeds = model.get_input_embeddings()(modes.IDS)

    def call() -> Tensor:
        return model.generate(inputs_embeds=embeds, **modes.WORDS) if generates else model(inputs_embeds=embeds).logits

    with block_of(rule)(model) as run:
        out = call()

    n = 8 if generates else 6
    assert edited(run) == [((tuple(range(n)),) * 2,)]
    assert not torch.equal(out, call())


def gradients(model: nn.Module, block: modes.Block) -> list[Tensor]:
    model.zero_grad()
    with block(model), torch.enable_grad():
        model(modes.IDS, use_cache=False).logits.square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_checkpointing_is_exact_around_blocks_and_refused_inside_them(name):
    """The backward pass runs a block's forward again: hooks around it do not see that, those inside it do."""
    model = copy.deepcopy(tiny_model(name)).requires_grad_(True)
    expected = gradients(model, block_of(ALL))
    model.train().apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else None)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    assert all(map(torch.equal, gradients(model, block_of(ALL)), expected))
    assert not all(map(torch.equal, gradients(model, lambda _: nullcontext()), expected))
    inside = Rule("tiny", (1,), Add(4.0), site=Site("attn_out", 1))
    with pytest.raises(UnsupportedMode, match=r"gradient checkpointing at attn_out\.1.*gradient_checkpointing_disable"):
        gradients(model, block_of(inside))


@pytest.mark.parametrize("stream", ["mlp_out", "resid_mid"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_edit_that_a_backward_pass_after_the_block_would_lose_is_refused_before_it(stream, reentrant):
    model = copy.deepcopy(tiny_model("llama")).requires_grad_(True).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    plan = Plan((Rule("tiny", (1,), Add(4.0), site=Site(stream, 1)),))

    with torch.enable_grad(), steer(model, plan, saes=SAE, canary=False):
        with pytest.raises(UnsupportedMode, match=f"gradient checkpointing at {stream}"):
            model(modes.IDS, use_cache=False)
        with torch.no_grad():
            model(modes.IDS, use_cache=False)
        model.eval()(modes.IDS, use_cache=False)
    with torch.enable_grad(), capture(model.train(), Site(stream, 1)):
        loss = model(modes.IDS, use_cache=False).logits.sum()
    loss.backward()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_second_turn_goes_on_where_the_first_one_ended(name):
    model, rule = tiny_model(name), Rule("tiny", (1,), Add(4.0), start=2, stop=20)
    past = DynamicCache(config=model.config)
    with block_of(rule)(model) as run:
        first = model.generate(modes.IDS[:1], **modes.GREEDY, past_key_values=past)
        second = torch.cat([first, modes.IDS[1:, 1:4]], dim=1)
        both = model.generate(second, **modes.GREEDY, past_key_values=past)

    cached = fed(first[0], modes.IDS.shape[1])
    positions = should_edit(rule, fed(both[0], second.shape[1]), columns=second.shape[1])
    turns = edited(run)[0]
    assert turns[0][0] == should_edit(rule, cached, columns=modes.IDS.shape[1])
    assert turns[1][0] == tuple(p for p in positions if p >= past_length(first, cached))


def past_length(sequence: Tensor, cached: list[int]) -> int:
    return max(len(cached), sequence.shape[1] - 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layer_that_the_model_does_not_have_is_refused_before_anything_is_touched(name):
    model = tiny_model(name)
    block = steer(model, add_plan(1, site=Site("resid_post", 3)), saes=SAE)
    with nothing_left(model), pytest.raises(SiteNotFound, match="this model has layers 0-2. Use layer 2"), block:
        raise AssertionError("entered")


MUTANTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "nothing": lambda module, output: output,
    "row 0 only": lambda module, output: torch.cat([output[:1] + 1.0, output[1:]]),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_an_edit_that_does_not_reach_every_row_would_fail_here(mutant):
    """The anti-vacuity check bites: a hook that runs and changes nothing, or row 0 only, is not taken for an edit."""
    model = copy.deepcopy(fresh_model())
    plain = model(modes.IDS).logits
    handle = modes.blocks(model)[1].register_forward_hook(lambda m, args, output: MUTANTS[mutant](m, output))
    found = model(modes.IDS).logits
    handle.remove()

    assert torch.equal(found[1:], plain[1:])


@pytest.mark.usefixtures("fresh_compiler")
def test_without_the_refusal_at_entry_compiled_functions_would_be_silently_plain(monkeypatch):
    """The danger is real: a plain call is steered, so the block ends in peace, and the compiled call was not."""
    monkeypatch.setattr(hf, "is_traced", lambda module: False)
    model = fresh_model("llama")  # once asked for hidden states, a model has hooks of transformers, and guards on them
    function = torch.compile(lambda ids: model(ids).logits, backend="eager")
    function(modes.IDS)
    with block_of(ALL, FIRST)(model):
        steered, unsteered = model(modes.IDS).logits, function(modes.IDS)

    plain, expected = eager("llama")
    assert torch.equal(steered, expected)
    torch.testing.assert_close(unsteered, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
def test_without_the_refusal_generate_that_compiles_itself_would_fail_at_its_decode_step(monkeypatch):
    monkeypatch.setattr(hf, "is_traced", lambda module: False)
    with pytest.raises(GuardNotApplied, match="the forward pass ended and they had not run"):
        refusals.generate_that_compiles_itself_called_before(fresh_model("llama"), block_of(ALL))


def test_graphs_that_cannot_be_inspected_are_refused_by_name(monkeypatch):
    import torch._dynamo.convert_frame as frames

    monkeypatch.setattr(frames, "input_codes", object())

    with pytest.raises(CompiledModel, match="keeps its graphs where saeguard cannot look"), block_of(ALL)(tiny_model()):
        raise AssertionError("entered")
