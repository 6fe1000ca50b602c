"""A plan on one of nnsight's models does what it does on the transformers model with the same weights, to the last bit.

A case is one plan on one batch, computed on both. nnsight runs the model's own modules, so nothing of the arithmetic is
another's: logits are compared bit by bit, and edited sets by absolute position.
"""

import copy
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeguard import AtLeast, Clamp, Plan, Rule, Scale, Site, capture, load_model, load_sae, steer
from saeguard.engines import engine_for
from saeguard.engines.base import Place
from saeguard.engines.nnsight import Handed
from saeguard.errors import (
    BadRule,
    GuardNotApplied,
    MetaDevice,
    ModelBusy,
    PlanNeverRan,
    RowsMismatch,
    SiteNotFound,
    UnsupportedMode,
    UnsupportedModel,
    WidthMismatch,
)
from saeguard.gates import Hits, Latched, Rate, Watch
from saeguard.loaders import shipped
from saeguard.traces import plan_in_trace
from tests import laws, tiny
from tests.counts import cases
from tests.modes import word_tokenizer
from tests.more_models import HIDDEN, LAYER, model_of, shared

import nnsight  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("llama", "gpt2", "neox", "gemma3", "qwen2", "mixtral", "olmo2")
ABSENT = {("neox", "resid_mid"), ("mixtral", "mlp_post"), ("olmo2", "mlp_normed")}
STREAMS = (
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in", "mlp_normed", "mlp_post", "attn_z",
)  # fmt: skip
PLACED = [(name, stream) for name in NAMES for stream in STREAMS if (name, stream) not in ABSENT]
SAES = [tiny.tiny_sae(activation=kind, name=kind, seed=i) for i, kind in enumerate(("relu", "jumprelu", "topk"))]
SAES.append(tiny.tiny_sae(name="attention", seed=7, site=Site("attn_out", 0)))
SAES.append(tiny.tiny_sae(name="mlp", seed=8, site=Site("mlp_out", 2)))
PUSH = Plan((Rule("relu", (1, 2, 3), AtLeast(4.0)),))
OTHER = Plan((Rule("topk", (5, 6), Scale(2.0)),))
WRITE: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
TEXTS = ("w5 w9 w11 w30", "w7", "w40 w41 w9 w22 w51 w6 w8")


def loaded(name: str = "llama") -> Any:
    """A `TransformersModel` of its own around the weights of `shared`."""
    tokenizer = copy.deepcopy(word_tokenizer())
    return nnsight.TransformersModel(model_of(name), tokenizer=tokenizer, task="text-generation")


@cache
def model(name: str = "llama") -> Any:
    """One that several tests use; a test must leave it as it was."""
    return loaded(name)


@cache
def bare(name: str = "llama") -> Any:
    """The same weights in an `NNsight`, which knows of no tokenizer and no generate."""
    return nnsight.NNsight(model_of(name))


def blocks(found: Any) -> Any:
    """The envoys of the blocks."""
    lists = [one for one in found.modules() if isinstance(one._module, torch.nn.ModuleList)]
    return next(one for one in lists if len(one) == tiny.LAYERS)


def envoy_at(found: Any, site: Site | str) -> Any:
    """The envoy of the module at a site, and the name of its end."""
    place = engine_for(found).resolve(Site.parse(site))
    return found.interleaver.envoys[id(place.module)], place.side


def options(mask: Tensor | None) -> dict[str, Any]:
    if mask is None:
        return {"use_cache": False}
    return {"use_cache": False, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def logits(found: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of one pass of a transformers model, or of a direct call of what nnsight has wrapped."""
    with torch.no_grad():
        return found(ids, **options(mask)).logits


def traced(found: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of one pass in a trace."""
    with torch.no_grad(), found.trace(ids, **options(mask)):
        out = found.output.logits.save()
    return out  # noqa: RET504  there is no return in the code of a trace


def written(found: Any, ids: Tensor, **how: Any) -> Tensor:
    """What a trace of generate gives."""
    if isinstance(found, nnsight.TransformersModel):
        with found.generate(ids, **WRITE, **how) as tracer:
            out = tracer.result.save()
        return out  # noqa: RET504
    with found.trace(ids, fn="generate", **WRITE, **how) as tracer:
        out = tracer.result.save()
    return out  # noqa: RET504


def batch(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Any ids, special ones included; some rows are padded, on the left or on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, tiny.VOCAB, (rows, width), generator=generator)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    mask = torch.arange(width) < lengths
    return ids, (mask.flip(1) if seed % 2 else mask).long()


@st.composite
def plans_per_row(draw: Any, rows: int, *, gated: bool = True) -> list[Plan | None]:
    known = draw(st.lists(laws.plans(SAES, most=3, where=laws.wheres(longest=8), gated=gated), min_size=1, max_size=2))
    return draw(st.lists(st.none() | st.sampled_from(known), min_size=rows, max_size=rows))


WAYS = {
    "trace of NNsight": (bare, traced),
    "call of NNsight": (bare, logits),
    "trace of TransformersModel": (model, traced),
}


@settings(max_examples=cases(600))
@given(
    st.sampled_from(NAMES), st.sampled_from(sorted(WAYS)), st.integers(1, 3), st.integers(2, 9),
    st.integers(0, 2**20), st.data(),
)  # fmt: skip
def test_pass_in_a_trace_edits_what_a_pass_of_the_model_edits(name, way, rows, width, seed, data):
    plans, (ids, mask) = data.draw(plans_per_row(rows)), batch(rows, width, seed)
    of, ask = WAYS[way]
    told: dict[str, Any] = {"saes": SAES, "prompt_tokens": [(seed + row) % (width + 1) for row in range(rows)]}

    with steer(shared(name), plans, **told) as expected:
        right = logits(shared(name), ids, mask)
    with steer(of(name), plans, **told) as run:
        found = ask(of(name), ids, mask)

    assert laws.edited(run) == laws.edited(expected)
    assert laws.same_bits(found, right)
    plain = ask(of(name), ids, mask)
    for row, plan in enumerate(plans):
        assert plan is not None or laws.same_bits(found[row], plain[row])


def sae_at(name: str, stream: str) -> Any:
    hidden = 4 * tiny.D if name == "gpt2" else HIDDEN
    width = hidden if stream == "mlp_post" else tiny.D
    return tiny.tiny_sae(d_in=width, site=Site(stream, LAYER), activation="relu", seed=13)


FORCE = Plan((Rule("tiny", (1, 7, 20, 31), Clamp(3.0, when="always")),))


@pytest.mark.parametrize(("name", "stream"), PLACED)
def test_trace_is_given_every_stream_after_its_edits(name, stream):
    sae, (ids, mask) = sae_at(name, stream), batch(2, 8, seed=5)
    envoy, side = envoy_at(bare(name), sae.site)

    with steer(shared(name), FORCE, saes=sae):
        right = logits(shared(name), ids, mask)
    with steer(bare(name), FORCE, saes=sae), capture(bare(name), sae.site) as tape:
        given_here, found = both_of(bare(name), envoy, side, ids, mask)

    assert laws.same_bits(found, right)
    assert laws.distance(found, logits(bare(name), ids, mask)) > 1e-2
    if stream not in ("resid_mid", "mlp_normed"):  # of these a module carries something that they follow from
        assert laws.same_bits(first(given_here), tape[sae.site])


def both_of(found: Any, envoy: Any, side: str, ids: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
    with torch.no_grad(), found.trace(ids, **options(mask)):
        carried = (envoy.output if side == "output" else envoy.input).save()
        out = found.output.logits.save()
    return carried, out


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def test_law_catches_edits_that_come_after_what_a_trace_is_given(monkeypatch):
    """A forward hook runs outside of nnsight's controller: it steers the model, and the trace sees plain streams."""
    monkeypatch.setattr(Handed, "attach", Place.attach)

    with pytest.raises(AssertionError):
        test_trace_is_given_every_stream_after_its_edits("llama", "resid_post")


@settings(max_examples=cases(240))
@given(
    st.sampled_from(NAMES), st.sampled_from((model, bare)), st.integers(1, 3), st.integers(2, 8),
    st.integers(0, 2**20), st.booleans(), st.data(),
)  # fmt: skip
def test_generate_in_a_trace_edits_what_generate_of_the_model_edits(name, of, rows, width, seed, cached, data):
    plans, (ids, mask) = data.draw(plans_per_row(rows)), batch(rows, width, 2 * (seed // 2) + 1)
    how: dict[str, Any] = {"attention_mask": mask, "use_cache": cached}

    with steer(shared(name), plans, saes=SAES) as expected:
        right = shared(name).generate(ids, **WRITE, **how)
    with steer(of(name), plans, saes=SAES) as run:
        found = written(of(name), ids, **how)

    assert torch.equal(found, right)
    assert laws.edited(run) == laws.edited(expected)


@settings(max_examples=cases(200))
@given(
    st.sampled_from(NAMES), laws.plans(SAES, where=laws.wheres(), gated=True), st.integers(2, 8), st.integers(0, 999)
)
def test_decoding_in_a_trace_edits_what_one_pass_in_a_trace_edits(name, plan, width, seed):
    ids = tiny.prompt(1, width, seed=seed)

    with steer(model(name), plan, saes=SAES) as run:
        text = written(model(name), ids)
    ends = (text[0, width:] == tiny.EOS).nonzero().flatten().tolist()
    text = text[:, : width + ends[0] if ends else -1]
    assume(not laws.near_edge(shared(name), plan, SAES, text, prompt_tokens=width))
    with steer(model(name), plan, saes=SAES, prompt_tokens=width) as whole:
        traced(model(name), text)

    assert laws.edited_by_row(run) == laws.edited_by_row(whole)


GATED = Plan((
    Rule(
        "jumprelu", (1, 2, 3), Clamp(-6.0, when="active"), phase="generated",
        gate=Latched(Watch(Hits((4, 5, 6, 7)), Rate(), 0.26)),
    ),
    Rule("relu", (8, 9), AtLeast(3.0), phase="newest"),
))  # fmt: skip
ROWS: list[Plan | None] = [GATED, None, Plan((Rule("topk", (1, 2), Scale(-2.0), phase="prompt"),))]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_invokes_are_edited_as_if_each_were_alone(name):
    """Texts of different lengths, which nnsight pads into one batch, each under its own plan."""
    found = model(name)

    with steer(found, ROWS, saes=SAES) as together, found.generate(**WRITE) as tracer:
        with tracer.invoke(TEXTS[0]):
            one = tracer.result.save()
        with tracer.invoke(list(TEXTS[1:])):
            two = tracer.result.save()

    said = [*one, *two]
    for row, text in enumerate(TEXTS):
        with steer(found, ROWS[row], saes=SAES) as alone:
            words = written(found, text)
        n = words.shape[1] - len(text.split())
        assert torch.equal(said[row][-6:][:n], words[0, -n:])
        mine = laws.edited_by_row(alone)
        assert laws.edited_by_row(together)[row] == (mine[0] if mine else {})
    assert laws.edited_by_row(together)[0]
    assert not laws.edited_by_row(together)[1]


def test_invokes_of_a_trace_see_their_own_edited_rows():
    found, layer = model(), blocks(model())[1]

    with steer(found, [PUSH, None], saes=SAES), capture(found, "resid_post.1") as tape, found.trace() as tracer:
        with tracer.invoke(TEXTS[0]):
            one = layer.output.save()
        with tracer.invoke(TEXTS[1]):
            two = layer.output.save()
    plain = traced_at(found, layer, TEXTS[1])

    assert torch.equal(torch.cat([one, two]), tape["resid_post.1"])
    assert laws.distance(two[:, -1:], plain) <= laws.TOLERANCE


def traced_at(found: Any, layer: Any, prompt: Any) -> Tensor:
    with torch.no_grad(), found.trace(prompt):
        out = layer.output.save()
    return out  # noqa: RET504


def test_pipeline_of_a_model_generates_as_its_generate_does():
    found = model()

    with steer(found, GATED, saes=SAES) as run:
        found.pipe(TEXTS[0], **WRITE)
    with steer(found, GATED, saes=SAES) as expected:
        written(found, TEXTS[0])

    assert laws.edited(run) == laws.edited(expected)


def test_what_a_trace_writes_at_a_site_stands_and_is_not_edited_there_again():
    found, ids, layers = model(), tiny.prompt(1, 6), blocks(model())

    with steer(found, PUSH, saes=SAES), capture(found, ["resid_post.1", "resid_pre.2"]) as tape, found.trace(ids):
        seen = layers[1].output.clone().save()
        layers[1].output = 2 * layers[1].output

    assert torch.equal(seen, tape["resid_post.1"])
    assert torch.equal(tape["resid_pre.2"], 2 * seen)


def test_what_a_trace_writes_before_a_site_is_what_the_edit_reads():
    found, ids, layers, plain = model(), tiny.prompt(1, 6), blocks(model()), model_of("llama")
    plain.model.layers[0].register_forward_hook(lambda module, args, output: 2 * output)

    with steer(plain, PUSH, saes=SAES) as expected:
        right = logits(plain, ids)
    with steer(found, PUSH, saes=SAES) as run, torch.no_grad(), found.trace(ids):
        layers[0].output = 2 * layers[0].output
        out = found.output.logits.save()

    assert torch.equal(out, right)
    assert laws.edited(run) == laws.edited(expected)


def test_stored_edit_of_the_user_comes_after_ours():
    found, ids = loaded(), tiny.prompt(1, 6)
    with found.edit() as (_, edited):
        edited.model.layers[1].output = 2 * edited.model.layers[1].output

    with steer(found, PUSH, saes=SAES), capture(found, ["resid_post.1", "resid_pre.2"]) as tape, edited.trace(ids):
        edited.output.save()

    assert torch.equal(tape["resid_pre.2"], 2 * tape["resid_post.1"])


def test_edit_stays_when_a_trace_looks_into_the_operations_of_its_module():
    found, ids = loaded(), tiny.prompt(1, 6)

    with steer(shared("llama"), PUSH, saes=SAES):
        right = logits(shared("llama"), ids)
    with steer(found, PUSH, saes=SAES) as run, torch.no_grad():
        names = found.model.layers[1].source.names
        with found.trace(ids):
            inner = found.model.layers[1].source.self_mlp_0.output.save()
            out = found.output.logits.save()

    assert "self_mlp_0" in names
    assert inner.shape == (1, 6, tiny.D)
    assert torch.equal(out, right)
    assert laws.edited(run)[PUSH.rules[0]][0][0]


def traces_left(found: Any) -> list[Any]:
    """Everything that a block puts on a model, per module."""
    kept: list[Any] = [sorted(vars(found))]
    for module in found._module.modules():
        controller = module.__dict__.get("forward")
        kept.append((len(module._forward_hooks), len(module._forward_pre_hooks), type(controller.state)))
    return [*kept, "generate" in vars(found._module)]


def fails_in_the_trace(found: Any) -> None:
    with steer(found, [PUSH, None], saes=SAES), found.trace(tiny.prompt(2, 4)):
        found.model.layers[2].output.save()
        raise RuntimeError("boom")


def fails_in_a_generate(found: Any) -> None:
    with steer(found, PUSH, saes=SAES), found.generate(tiny.prompt(2, 4), **WRITE) as tracer:
        for step in tracer.iter[:]:
            found.model.layers[2].output.save()
            if step == 2:
                raise RuntimeError("boom")


def fails_behind_the_trace(found: Any) -> None:
    with steer(found, PUSH, saes=SAES):
        traced(found, tiny.prompt(2, 4))
        raise RuntimeError("boom")


@pytest.mark.parametrize("fails", [fails_in_the_trace, fails_in_a_generate, fails_behind_the_trace])
def test_nothing_stays_on_a_model_after_an_exception(fails):
    found, ids = loaded(), tiny.prompt(2, 4)
    before = traces_left(found)

    with pytest.raises(RuntimeError, match="boom"):
        fails(found)

    assert traces_left(found) == before
    assert torch.equal(traced(found, ids), logits(shared("llama"), ids))


def test_blocks_on_the_wrapper_and_on_its_model_nest():
    ids, found = tiny.prompt(1, 6), model()

    with steer(shared("llama"), PUSH, saes=SAES), steer(shared("llama"), OTHER, saes=SAES):
        expected = logits(shared("llama"), ids)
    with steer(found, PUSH, saes=SAES), steer(found._module, OTHER, saes=SAES):
        nested = traced(found, ids)
    with steer(found._module, OTHER, saes=SAES), steer(found, PUSH, saes=SAES):
        inverse = traced(found, ids)

    assert torch.equal(nested, expected)
    assert laws.distance(inverse, expected) <= laws.TOLERANCE


def test_two_wrappers_of_one_model_are_one_model():
    found, ids = loaded(), tiny.prompt(1, 6)
    twin: Any = nnsight.NNsight(found._module)

    with steer(found, PUSH, saes=SAES) as run:
        through_twin = traced(twin, ids)
        itself = traced(found, ids)

    assert torch.equal(through_twin, itself)
    assert len(laws.edited(run)[PUSH.rules[0]]) == 2


def test_session_of_traces_is_edited_in_each():
    found, ids, layer = model(), tiny.prompt(1, 6), blocks(model())[1]

    with steer(found, PUSH, saes=SAES) as run, capture(found, "resid_post.1") as tape, found.session():
        with found.trace(ids):
            first_time = layer.output
        with found.trace(ids):
            both = torch.stack([first_time, layer.output]).save()

    assert torch.equal(both[0], tape["resid_post.1"])
    assert torch.equal(both[1], both[0])
    assert len(laws.edited(run)[PUSH.rules[0]]) == 2


def test_gradients_of_a_trace_flow_through_the_edit():
    everywhere, ids = Plan((Rule("relu", (1, 2, 3), Scale(3.0), special=True),)), tiny.prompt(1, 5)
    one, two = (shared("llama").get_input_embeddings()(ids).detach().requires_grad_() for _ in range(2))

    with steer(shared("llama"), everywhere, saes=SAES):
        shared("llama")(inputs_embeds=one).logits.sum().backward()
    with steer(bare(), everywhere, saes=SAES), bare().trace(inputs_embeds=two):
        bare().output.logits.sum().backward()

    assert one.grad is not None
    assert torch.equal(one.grad, two.grad)


def skipped(found: Any) -> None:
    with found.trace(tiny.prompt(1, 4)):
        found.model.layers[1].skip(found.model.layers[1].input)


def stopped_before(found: Any) -> None:
    with found.trace(tiny.prompt(1, 4)) as tracer:
        found.model.layers[0].output.save()
        tracer.stop()


def generating_stopped_before(found: Any) -> None:
    with found.generate(tiny.prompt(1, 4), **WRITE) as tracer:
        for step in tracer.iter[:]:
            found.model.layers[0].output.save()
            if step == 2:
                tracer.stop()


def other_tokens(found: Any) -> None:
    with found.trace(tiny.prompt(1, 4)):
        found.input = found.input + 1


def other_tokens_in_place(found: Any) -> None:
    with found.trace(tiny.prompt(1, 4)):
        found.input[:] = 1


def called_apart_first(found: Any) -> None:
    with found.trace(tiny.prompt(1, 4)):
        args, kwargs = found.model.layers[1].inputs
        found.model.layers[1](*args, **kwargs)


def called_apart_later(found: Any) -> None:
    with found.trace(tiny.prompt(1, 4)):
        args, kwargs = found.model.layers[1].inputs
        found.model.layers[2].output.save()
        found.model.layers[1](*args, **kwargs)


def steered_inside(found: Any) -> None:
    with found.trace(tiny.prompt(1, 4)):
        found.model.layers[0].input.save()
        with steer(found, OTHER, saes=SAES, canary=False):
            found.model.layers[2].output.save()


def steered_behind_the_trace(found: Any) -> None:
    with found.trace(tiny.prompt(1, 4)), steer(found, OTHER, saes=SAES):
        found.model.layers[2].output.save()


def captured_behind_the_trace(found: Any) -> None:
    with (
        found.trace(tiny.prompt(1, 4)),
        capture(found, "resid_post.1"),
    ):
        found.model.layers[2].output.save()


def called_inside(found: Any) -> None:
    with found.trace(tiny.prompt(1, 4)):
        found.model.layers[0].output.save()
        found(tiny.prompt(1, 4))


def scanned(found: Any) -> None:
    with found.scan(tiny.prompt(1, 4)):
        found.model.layers[1].output.save()


def remote(found: Any) -> None:
    with found.trace(tiny.prompt(1, 4), remote=True):
        found.model.layers[1].output.save()


def remote_session(found: Any) -> None:
    with found.session(remote=True):
        traced(found, tiny.prompt(1, 4))


def in_another_thread(found: Any) -> None:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            traced(found, tiny.prompt(1, 4))
        except ModelBusy as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    raise raised[0]


REFUSED: dict[Callable[[Any], None], tuple[type[Exception], str]] = {
    skipped: (GuardNotApplied, r"resid_post\.1"),
    stopped_before: (GuardNotApplied, r"resid_post\.1.*tracer.stop\(\)"),
    generating_stopped_before: (GuardNotApplied, r"resid_post\.1.*tracer.stop\(\)"),
    other_tokens: (UnsupportedMode, "writes to the input of the whole model"),
    other_tokens_in_place: (UnsupportedMode, "writes to the input of the whole model"),
    called_apart_first: (GuardNotApplied, "ran a second time in one pass"),
    called_apart_later: (GuardNotApplied, "ran a second time in one pass"),
    steered_inside: (ModelBusy, "another thread or task"),
    steered_behind_the_trace: (UnsupportedMode, "Put it in front"),
    captured_behind_the_trace: (UnsupportedMode, "Put it in front"),
    called_inside: (ModelBusy, "another thread or task"),
    scanned: (UnsupportedMode, "a scan of a steered model"),
    remote: (UnsupportedMode, "remote=True"),
    remote_session: (UnsupportedMode, "remote=True"),
    in_another_thread: (ModelBusy, "another thread or task"),
}


BEGINNINGS = (steered_inside, steered_behind_the_trace, captured_behind_the_trace)


@pytest.mark.parametrize("does", REFUSED, ids=lambda does: does.__name__)
def test_what_cannot_be_exact_is_refused_by_name_and_leaves_nothing(does):
    found, (error, message) = loaded(), REFUSED[does]
    before = traces_left(found)

    with pytest.raises(error, match=f"(?s){message}"), steer(found, PUSH, saes=SAES):
        does(found)

    assert traces_left(found) == before
    assert torch.equal(traced(found, tiny.prompt(1, 4)), logits(shared("llama"), tiny.prompt(1, 4)))


def test_blocks_may_end_in_any_order():
    """What looks after the whole pass came with the first block, and went with it while the second was open."""
    found, ids, first_block, second_block = loaded(), tiny.prompt(1, 4), ExitStack(), ExitStack()
    before = traces_left(found)
    first_block.enter_context(steer(found, PUSH, saes=SAES))
    second_block.enter_context(steer(found, Plan((Rule("mlp", (5, 6), Scale(2.0)),)), saes=SAES))
    traced(found, ids)
    first_block.close()

    for does in (stopped_before, other_tokens, remote):
        with pytest.raises((GuardNotApplied, UnsupportedMode)):
            does(found)
    assert not torch.equal(traced(found, ids), logits(shared("llama"), ids))
    second_block.close()
    assert traces_left(found) == before


@pytest.mark.parametrize("does", BEGINNINGS, ids=lambda does: does.__name__)
def test_block_that_begins_where_the_code_of_a_trace_would_not_be_in_it_is_refused(does):
    found, (error, message) = loaded(), REFUSED[does]
    before = traces_left(found)

    with pytest.raises(error, match=message):
        does(found)

    assert traces_left(found) == before


def test_trace_may_stop_behind_the_last_site():
    found, ids = model(), tiny.prompt(1, 4)

    with steer(found, PUSH, saes=SAES) as run, capture(found, "resid_post.1") as tape, found.trace(ids) as tracer:
        last = blocks(found)[1].output.save()
        tracer.stop()

    assert torch.equal(last, tape["resid_post.1"])
    assert laws.edited(run)[PUSH.rules[0]][0][0]


def test_bound_trace_runs_in_another_thread():
    found, ids, made = model(), tiny.prompt(1, 4), []

    with steer(found, PUSH, saes=SAES) as run:
        thread = threading.Thread(target=lambda ask: made.append(ask(found, ids)), args=(run.bind(traced),))
        thread.start()
        thread.join()
        expected = traced(found, ids)

    assert torch.equal(made[0], expected)


def test_trace_that_never_begins_does_not_count_as_steered():
    found = model()

    with pytest.raises(PlanNeverRan), steer(found, PUSH, saes=SAES), found.trace(tiny.prompt(1, 4)) as tracer:
        tracer.stop()


def test_model_without_weights_is_refused_until_it_is_dispatched(tmp_path):
    model_of("llama").save_pretrained(tmp_path)
    lazy: Any = nnsight.LanguageModel(str(tmp_path), tokenizer=copy.deepcopy(word_tokenizer()))
    ids = tiny.prompt(1, 5)

    with pytest.raises(MetaDevice, match=r"dispatch\(\)"):
        engine_for(lazy)
    lazy.dispatch()
    with steer(lazy, PUSH, saes=SAES):
        found = traced(lazy, ids)

    with steer(shared("llama"), PUSH, saes=SAES):
        assert torch.equal(found, logits(shared("llama"), ids))


def test_what_is_no_model_of_this_process_is_refused():
    engine_of_vllm = type("VLLM", (nnsight.NNsight,), {"__module__": "nnsight.modeling.vllm.vllm"})

    with pytest.raises(UnsupportedModel, match="process of vLLM"):
        engine_for(engine_of_vllm(model_of("llama")))
    with pytest.raises(UnsupportedModel, match="not a transformers model"):
        engine_for(nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2))))
    with pytest.raises(UnsupportedModel, match="not a torch module"):
        engine_for(type("Holder", (), {"_module": model_of("llama")})())


def test_plan_that_does_not_fit_is_refused_before_the_model_is_touched():
    before = traces_left(model())

    for site, width, error in ((Site("resid_post", 9), tiny.D, SiteNotFound), (Site("mlp_post", 1), 7, WidthMismatch)):
        sae = tiny.tiny_sae(site=site, d_in=width)
        with pytest.raises(error), steer(model(), Plan((Rule("tiny", (1,), Scale(2.0)),)), saes=sae):
            pass
    assert traces_left(model()) == before
    assert engine_for(model()).name == "nnsight"


def test_copy_made_inside_a_block_is_refused_there_and_free_after_it():
    found, ids = loaded(), tiny.prompt(1, 4)

    with steer(found, PUSH, saes=SAES):
        twin = copy.deepcopy(found._module)
        with pytest.raises(GuardNotApplied, match="copy was made inside a block"):
            logits(twin, ids)
        traced(found, ids)

    assert torch.equal(logits(twin, ids), traced(found, ids))
    assert torch.equal(twin.generate(ids, **WRITE), written(found, ids))


def snippet(found: Any, edits: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad(), found.trace(ids, **options(mask)):
        edits()
        out = found.output.logits.save()
    return out  # noqa: RET504


@settings(max_examples=cases(200))
@given(st.sampled_from(NAMES), st.integers(1, 3), st.integers(2, 9), st.integers(0, 2**20), st.data())
def test_edits_in_a_trace_do_what_steering_does(name, rows, width, seed, data):
    plans, (ids, mask) = data.draw(plans_per_row(rows)), batch(rows, width, seed)
    fired = st.sampled_from([stream for n, stream in PLACED if n == name])
    sae = sae_at(name, data.draw(fired))
    plans[0] = Plan((*FORCE.rules, *(plans[0].rules if plans[0] else ())))
    told: dict[str, Any] = {"prompt_tokens": (2,) * rows}

    with steer(bare(name), plans, saes=[*SAES, sae], **told) as run:
        expected = traced(bare(name), ids, mask)
    edits = plan_in_trace(plans, bare(name), [*SAES, sae], **told)
    twice = [snippet(bare(name), edits, ids, mask) for _ in range(2)]

    assert laws.same_bits(twice[0], expected)
    assert laws.same_bits(twice[1], expected)
    assert [rule.edited_positions[:1] for rule in edits.report.rules] == [
        rule.edited_positions for rule in run.report.rules
    ]


@settings(max_examples=cases(120))
@given(st.sampled_from(NAMES), st.integers(1, 3), st.integers(2, 7), st.integers(0, 2**20), st.data())
def test_edits_at_each_step_of_generate_do_what_steering_does(name, rows, width, seed, data):
    plans, (ids, mask) = data.draw(plans_per_row(rows, gated=False)), batch(rows, width, 2 * (seed // 2) + 1)
    found, lengths = model(name), tuple(mask.sum(1).tolist())

    with steer(found, plans, saes=SAES):
        expected = written(found, ids, attention_mask=mask)
    edits = plan_in_trace(plans, found, SAES, prompt_tokens=lengths)
    with found.generate(**WRITE) as tracer:
        with tracer.invoke(ids, attention_mask=mask):
            for _ in tracer.iter[:]:
                edits()
        with tracer.invoke():
            words = tracer.result.save()

    assert torch.equal(words, expected)


def test_edits_in_an_invoke_are_of_its_rows_alone():
    found = model()
    one, two = plan_in_trace(PUSH, found, SAES), plan_in_trace(OTHER, found, SAES)

    with steer(found, [PUSH, OTHER, None], saes=SAES), torch.no_grad(), found.trace(list(TEXTS)):
        expected = found.output.logits.save()
    with torch.no_grad(), found.trace() as tracer:
        with tracer.invoke(TEXTS[0]):
            one()
        with tracer.invoke(TEXTS[1]):
            two()
        with tracer.invoke(TEXTS[2]):
            blocks(found)[2].output.save()
        with tracer.invoke():
            all_rows = found.output.logits.save()

    assert torch.equal(all_rows, expected)


def test_edits_that_a_model_stores_are_made_in_every_trace_of_it():
    found, ids = loaded(), tiny.prompt(2, 5)
    edits = plan_in_trace(PUSH, found, SAES)
    with found.edit() as (tracer, edited):
        for _ in tracer.iter[:]:
            edits()

    with steer(found, PUSH, saes=SAES):
        expected, words = traced(found, ids), written(found, ids)

    assert torch.equal(traced(edited, ids), expected)
    assert torch.equal(written(edited, ids), words)
    assert torch.equal(traced(found, ids), logits(shared("llama"), ids))


def at_every_step(found: Any, edits: Any) -> None:
    with found.generate(tiny.prompt(1, 5), **WRITE) as tracer:
        for _ in tracer.iter[:]:
            edits()


def in_invokes_of_beams(found: Any, edits: Any) -> None:
    with found.generate(num_beams=2, **WRITE) as tracer:
        with tracer.invoke(TEXTS[0]):
            edits()
        with tracer.invoke(TEXTS[1]):
            edits()


@pytest.mark.usefixtures("without_type_checks")
def test_edits_in_a_trace_are_told_of_prompts_as_steering_is():
    found, ids = bare("llama"), tiny.prompt(2, 5)
    plan = Plan((Rule("relu", (1, 2, 3), AtLeast(4.0), phase="prompt"),))

    for told in (-3, 2.5, True, [3, 2.5]):
        with pytest.raises(BadRule, match="not a count of tokens"):
            plan_in_trace(plan, found, SAES, prompt_tokens=told)
    with pytest.raises(BadRule, match="there are 2 plans, one per row"):
        plan_in_trace([plan, None], found, SAES, prompt_tokens=[3])
    with pytest.raises(RowsMismatch, match="prompt_tokens for 3 rows"):
        snippet(found, plan_in_trace(plan, found, SAES, prompt_tokens=[3, 4, 5]), ids)
    with steer(found, plan, saes=SAES, prompt_tokens=[2, 4]):
        expected = traced(found, ids)
    assert torch.equal(snippet(found, plan_in_trace(plan, found, SAES, prompt_tokens=[2, 4]), ids), expected)


def test_edits_in_a_trace_refuse_what_they_cannot_know():
    found = model()
    edits, gated = plan_in_trace(PUSH, found, SAES), plan_in_trace(GATED, found, SAES, prompt_tokens=5)

    with pytest.raises(UnsupportedMode, match="no pass of the model runs"):
        edits()
    with pytest.raises(UnsupportedMode, match="gate remembers tokens, and of the 5 in the cache"):
        at_every_step(found, gated)
    with pytest.raises(UnsupportedMode, match="an invoke of 1 rows"):
        in_invokes_of_beams(found, edits)
    with pytest.raises(UnsupportedModel, match="has no traces"):
        plan_in_trace(PUSH, shared("llama"), SAES)


def test_real_model_is_steered_in_a_trace_as_it_is_without_one():
    name = "smollm2-135m-instruct"
    plain, tokenizer = load_model(name)
    sae = load_sae(next(one for one in shipped() if one.startswith(name)))
    plan = Plan((Rule(sae.name, (10, 20, 30), AtLeast(0.5, unit="max"), phase="generated"),))
    prompts = ["The journey began in", "Why is the sky blue, and the sea"]
    padded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")

    with steer(plain, [plan, None], saes=sae, tokenizer=tokenizer) as expected:
        right = plain.generate(**padded, **WRITE)
    found: Any = nnsight.TransformersModel(copy.deepcopy(plain), tokenizer=tokenizer, task="text-generation")
    with steer(found, [plan, None], saes=sae) as run, found.generate(prompts, **WRITE) as tracer:
        words = tracer.result.save()

    assert torch.equal(words[:, -6:], right[:, -6:])
    assert laws.edited(run) == laws.edited(expected)
