"""A plan on any module does, through a site map, what plain torch hooks do that somebody wrote for that module.

`by_hand` is that somebody: it finds the tensor, puts its axes in order and edits one position at a time with the slow
formula. Where one site map describes a transformers model, the reference is the transformers engine.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saeguard import (
    SAE,
    Add,
    AnyActive,
    At,
    AtLeast,
    Clamp,
    Plan,
    Rule,
    Scale,
    Site,
    SiteMap,
    capture,
    load_sae,
    steer,
)
from saeguard.engines import engine_for
from saeguard.engines.base import Pass
from saeguard.engines.carried import from_stream, rewrap, to_stream, unwrap
from saeguard.errors import (
    CompiledModel,
    GuardNotApplied,
    MetaDevice,
    OverlappingRules,
    PhaseUnknown,
    PlanNeverRan,
    RowsMismatch,
    SiteNotFound,
    TokensUnknown,
    UnsupportedMode,
    UnsupportedModel,
    WidthMismatch,
)
from saeguard.gates import Hits, Rate, Watch
from tests import laws, tiny
from tests.counts import cases
from tests.lookalikes.openai import write_sdxl
from tests.mapped_models import (
    IMAGE,
    KINDS,
    PLACES,
    D,
    Stepwise,
    Summary,
    by_hand,
    first,
    paint,
    painter,
    pictures,
    unet,
    vit,
    writer,
)

EVERYWHERE: dict[str, Any] = {"phases": ("all",)}
MAP = SiteMap(PLACES)
SAES = [
    tiny.tiny_sae(activation=kind, name=f"{kind} {site}", seed=seed, site=site, d_in=D, d_sae=10)
    for kind in ("relu", "jumprelu", "topk")
    for seed, site in enumerate(PLACES)
]
BY_SITE = {sae.site: sae for sae in SAES if sae.activation == "jumprelu"}
PUSH = Plan((Rule("push", (1, 4), Clamp(3.0, when="always")),))


def sae_at(site: Site, *, width: int = D, name: str = "push") -> SAE:
    return tiny.tiny_sae(name=name, d_in=width, d_sae=10, site=site, activation="relu", seed=2)


@st.composite
def plans_per_row(draw: Any, rows: int, saes: Sequence[SAE] = SAES) -> list[Plan | None]:
    some = draw(st.lists(st.sampled_from(saes), min_size=1, max_size=3, unique_by=lambda sae: sae.name))
    plan = laws.plans(some, most=3, where=laws.wheres(longest=18, **EVERYWHERE))
    known = draw(st.lists(plan, min_size=1, max_size=2))
    return draw(st.lists(st.none() | st.sampled_from(known), min_size=rows, max_size=rows))


@settings(max_examples=cases(800))
@given(st.sampled_from(KINDS), st.integers(1, 3), st.integers(0, 2**20), st.data())
def test_plans_on_a_site_map_do_what_hooks_by_hand_do(kind, rows, seed, data):
    plans, images, model = data.draw(plans_per_row(rows)), pictures(rows, seed=seed), painter(kind)
    rules = [rule for plan in plans if plan is not None for rule in plan.rules]
    named = {sae.name: sae for sae in SAES}
    used = {named[rule.sae].site for rule in rules}
    with by_hand(model, {site: at for site, at in PLACES.items() if site in used}, plans, SAES) as read:
        expected = paint(model, images)
    assume(not any(laws.rule_near_edge(rule, named[rule.sae], read[named[rule.sae].site]) for rule in rules))
    plain = paint(model, images)

    with steer(model, plans, saes=SAES, layout=MAP):
        found = paint(model, images)

    assert laws.distance(found, expected) <= 10 * laws.TOLERANCE
    for row, plan in enumerate(plans):
        assert plan is not None or laws.same_bits(found[row], plain[row])


@settings(max_examples=cases(600))
@given(st.permutations(["batch", "d", "height", "width", "time"]), st.integers(2, 5), st.permutations(range(5)))
def test_axes_go_into_a_stream_and_come_back_bit_for_bit_in_their_memory(names, n_axes, memory):
    axes = list(dict.fromkeys(["batch", "d", *names]))[:n_axes]
    axes = [name for name in names if name in axes]
    layout = [axis for axis in memory if axis < len(axes)]
    x = torch.randn(2, 3, 4, 5, 6)[(0,) * (5 - len(axes))].permute(layout)
    text = " ".join(axes)

    stream = to_stream(x, text)
    back = from_stream(stream + 0.0, text, x)

    assert stream.shape[0] == x.shape[axes.index("batch")]
    assert stream.shape[2] == x.shape[axes.index("d")]
    assert laws.same_bits(back, x)
    assert back.stride() == x.stride()
    index = torch.arange(float(x.numel())).view(x.shape)
    rest = [name for name in axes if name not in ("batch", "d")]
    found = to_stream(index, text)[1, :, 2].tolist()
    fixed = index.select(axes.index("batch"), 1).select(axes.index("d") - (axes.index("batch") < axes.index("d")), 2)
    assert found == fixed.flatten().tolist(), rest


@pytest.mark.parametrize("kind", KINDS)
def test_wrappings_keep_their_class_and_everything_else_in_them(kind):
    output = painter(kind).stages[0](torch.ones(1, D, 2, 2))
    other = torch.zeros(1, D, 2, 2)

    found = rewrap(output, None, other)

    assert type(found) is type(output)
    assert unwrap(found, None) is other
    assert unwrap(output, None) is not other
    assert first(found) is other
    if kind == "named":
        assert found.aux is output.aux
        assert unwrap(output, 1) is output.aux
        assert rewrap(output, 1, other).aux is other
    if kind == "dict":
        assert found["n"] == 1
        assert unwrap(output, "n") == 1
    if kind == "output":
        assert found.last_hidden_state is other


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_plan_that_changes_nothing_leaves_every_bit(memory):
    model, images = painter(), pictures(3, size=8).to(memory_format=memory)
    never = AnyActive((0, 1), 3e38)
    rules = tuple(
        rule
        for sae in BY_SITE.values()
        for rule in (Rule(sae.name, (0, 3), Clamp(9.0, when="always"), trigger=never), Rule(sae.name, (5,), Add(0.0)))
    )
    plain = paint(model, images)

    with steer(model, Plan(rules), saes=SAES, layout=MAP) as run, capture(model, PLACES, layout=MAP):
        found = paint(model, images)

    assert laws.same_bits(found, plain)
    assert found.stride() == plain.stride()
    assert {entry.tokens_edited for entry in run.report.rules} == {0}


def test_row_in_a_batch_is_the_row_alone():
    model, images, sae = painter(), pictures(4), BY_SITE[Site("mlp_out", 1)]
    plans = [Plan((Rule(sae.name, (n, n + 1), AtLeast(4.0), start=n, stop=9 + n),)) for n in range(4)]

    with steer(model, plans, saes=sae, layout=MAP) as run:
        together = paint(model, images)

    for row, plan in enumerate(plans):
        with steer(model, plan, saes=sae, layout=MAP) as alone:
            assert laws.distance(paint(model, images[row : row + 1]), together[row : row + 1]) <= laws.TOLERANCE
        assert laws.edited(alone)[plan.rules[0]][0][0] == laws.edited(run)[plan.rules[0]][0][row]


def test_nested_blocks_are_one_plan_and_the_same_latents_in_both_are_refused():
    model, images = painter(), pictures(2)
    one, two = (
        Plan((Rule(BY_SITE[site].name, (1, 2), AtLeast(4.0)),)) for site in (Site("mlp_out", 0), Site("resid_post", 2))
    )

    with steer(model, Plan(one.rules + two.rules), saes=SAES, layout=MAP):
        expected = paint(model, images)
    with steer(model, one, saes=SAES, layout=MAP), steer(model, two, saes=SAES, layout=MAP):
        found = paint(model, images)

    assert laws.same_bits(found, expected)
    with steer(model, one, saes=SAES, layout=MAP):
        paint(model, images)
        with pytest.raises(OverlappingRules), steer(model, one, saes=SAES, layout=MAP):
            pass


def test_sites_of_one_module_follow_each_other_in_whatever_order_they_came():
    """The update is what the stage makes of its edited input, and the whole holds the edited update."""
    model, images = painter(), pictures(2)
    into, update, whole = Site("resid_pre", 0), Site("mlp_out", 0), Site("resid_post", 0)
    places = {into: At("stages.0", "input", IMAGE, width=D), **{site: PLACES[site] for site in (update, whole)}}
    saes = [sae_at(site, name=site.stream) for site in places]
    plan = Plan(tuple(Rule(sae.name, (1, 4), Clamp(3.0, when="always")) for sae in saes))
    with by_hand(model, places, [plan] * 2, saes):
        expected = paint(model, images)

    for order in ((whole, update, into), (into, update, whole), (update, into, whole)):
        layout = SiteMap({site: places[site] for site in order})
        rules = {saes[list(places).index(site)].name: site for site in order}
        turned = Plan(tuple(Rule(name, (1, 4), Clamp(3.0, when="always")) for name in rules))
        with steer(model, turned, saes=saes, layout=layout):
            assert laws.distance(paint(model, images), expected) <= 10 * laws.TOLERANCE, order


def test_exception_in_a_block_leaves_no_hook():
    model, images = painter(), pictures(1)
    plain = paint(model, images)
    hooks = lambda: [(*m._forward_hooks, *m._forward_pre_hooks) for m in model.modules()]

    def fail() -> None:
        with steer(model, PUSH, saes=sae_at(Site("mlp_out", 1)), layout=MAP):
            paint(model, images)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()

    assert not any(hooks())
    assert laws.same_bits(paint(model, images), plain)


def test_copy_made_inside_a_block_is_refused_there_and_free_after_it():
    model, images = painter(), pictures(1)
    with steer(model, PUSH, saes=sae_at(Site("mlp_out", 1)), layout=MAP):
        twin = copy.deepcopy(model)
        with pytest.raises(GuardNotApplied, match="copy"):
            paint(twin, images)
        paint(model, images)

    assert laws.same_bits(paint(twin, images), paint(model, images))


def test_capture_of_a_delta_is_what_the_module_adds():
    model, images, seen = painter("in place"), pictures(2), []
    stage = model.stages[1]
    entering = stage.register_forward_pre_hook(lambda m, a, k: seen.append(k["hidden"].clone()), with_kwargs=True)
    leaving = stage.register_forward_hook(lambda m, a, output: seen.append(output.clone()))

    with capture(model, "mlp_out.1", layout=MAP) as tape:
        paint(model, images)

    entering.remove()
    leaving.remove()
    assert torch.equal(tape["mlp_out.1"], (seen[1] - seen[0]).flatten(2).transpose(1, 2))


# Text models


TEXT = SiteMap({"resid_post": "h.{}", "attn_out": "h.{}.self_attn"}, tokens="idx", width=16)
LATE = tiny.tiny_sae(name="push", d_in=16, site=Site("resid_post", 1), activation="relu")


def test_own_generate_of_a_text_module_is_edited_at_every_token_after_the_prompt():
    ids = tiny.prompt(2, 4)
    rule = Rule("push", (1, 2), Clamp(6.0, when="always"), phase="generated")
    block = writer().h[1]

    def hook(module: nn.Module, args: Any, x: Tensor) -> Tensor:
        dx = (6.0 - LATE.encode(x)[..., [1, 2]]) @ LATE.W_dec[[1, 2]]
        return torch.cat([x[:, :4], (x + dx)[:, 4:]], 1)

    handle = block.register_forward_hook(hook)
    expected = writer().generate(ids, 5)
    handle.remove()
    with steer(writer(), Plan((rule,)), saes=LATE, layout=TEXT, prompt_tokens=4) as run:
        found = writer().generate(ids, 5)

    assert torch.equal(found, expected)
    assert not torch.equal(found, writer().generate(ids, 5))
    assert [calls[0] for calls in laws.edited(run)[rule]] == [tuple(range(4, 4 + n)) for n in range(5)]


def test_special_tokens_of_a_text_module_are_told_by_their_ids():
    ids = torch.tensor([[tiny.BOS, 5, 6, 7], [8, 5, tiny.EOS, 7]])

    with steer(writer(), PUSH, saes=LATE, layout=TEXT, special_ids=[tiny.BOS, tiny.EOS]) as run:
        writer()(idx=ids)

    assert laws.edited(run)[PUSH.rules[0]][0] == ((1, 2, 3), (0, 1, 3))


@cache
def trunk() -> transformers.LlamaModel:
    """A Llama without its head: transformers does not generate with it."""
    return tiny.tiny_model("llama").model


TRUNK = SiteMap(
    {"resid_post": "layers.{}", "attn_out": "layers.{}.self_attn", "mlp_out": "layers.{}.mlp",
     "resid_pre": At("layers.{}", "input")},
    tokens="input_ids", mask="attention_mask", width=tiny.D,
)  # fmt: skip
TEXT_SAES = [
    tiny.tiny_sae(activation="relu", name="late", site=Site("resid_post", 1)),
    tiny.tiny_sae(activation="jumprelu", name="early", seed=1, site=Site("attn_out", 0)),
    tiny.tiny_sae(activation="topk", name="in", seed=2, site=Site("resid_pre", 2)),
]


@settings(max_examples=cases(600))
@given(st.integers(1, 3), st.integers(2, 8), st.integers(0, 2**20), st.data())
def test_site_map_of_a_transformers_model_edits_what_its_engine_edits(rows, width, seed, data):
    known = data.draw(
        st.lists(laws.plans(TEXT_SAES, most=3, where=laws.wheres(longest=8), gated=True), min_size=1, max_size=2)
    )
    plans = data.draw(st.lists(st.none() | st.sampled_from(known), min_size=rows, max_size=rows))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, tiny.VOCAB, (rows, width), generator=generator)
    mask = (torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)).long()
    call = {"input_ids": ids, "attention_mask": mask.flip(1) if seed % 2 else mask, "use_cache": False}
    options: dict[str, Any] = {"saes": TEXT_SAES, "prompt_tokens": (2,) * rows, "special_ids": (tiny.BOS, tiny.PAD)}

    with steer(trunk(), plans, **options) as expected, torch.no_grad():
        right = trunk()(**call).last_hidden_state
    with steer(trunk(), plans, layout=TRUNK, **options) as run, torch.no_grad():
        found = trunk()(**call).last_hidden_state

    assert laws.edited(run) == laws.edited(expected)
    assert laws.same_bits(found, right)


class Memory:
    """The columns that a reader by hand says are there already."""

    def __init__(self):
        self.columns = 0


def test_reader_by_hand_follows_a_cache_of_its_own():
    model, memory = Stepwise(), Memory()
    ids = tiny.prompt(1, 6)

    def read(args: Any, kwargs: Any) -> Pass:
        its = args[0]["tokens"]
        return Pass(len(its), its.shape[1], memory.columns, memory, its, None, its.device)

    layout = SiteMap({"resid_post.1": "inner"}, width=16, read_pass=read)
    gate = Watch(Hits((1, 2, 3, 4)), Rate(), 0.2)
    plan = Plan((Rule("push", (1, 2), AtLeast(2.0), start=1, gate=gate),))
    with steer(model, plan, saes=LATE, layout=layout) as whole:
        model({"tokens": ids})
    with steer(model, plan, saes=LATE, layout=layout) as run:
        for start in range(0, 6, 2):
            memory.columns = start
            model({"tokens": ids[:, start : start + 2]})

    assert laws.edited(run) == laws.edited(whole)
    assert laws.edited(run)[plan.rules[0]][0][0]


# Image models of libraries


BLOCK, SMALL = "down_blocks.0.attentions.0", "down_blocks.1.attentions.0"
UPDATES = SiteMap({"mlp_out.0": BLOCK, "mlp_out.1": SMALL}, axes=IMAGE, delta=True)
UPDATE = tiny.tiny_sae(name="push", site=Site("mlp_out", 0), activation="topk")
PROMPT = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))


def noise(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@contextmanager
def update_hook(latent: int, mask: Tensor, *, value: float | None = None, amount: float = 0.0) -> Iterator[None]:
    """As in sdxl-unbox, on the block's update in ``batch height width d``; ``mask`` has its first three axes."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        update = (output[0] - args[0]).permute(0, 2, 3, 1)
        f = UPDATE.encode(update)[..., latent]
        added = torch.full_like(f, amount) if value is None else value - f
        return (output[0] + ((added * mask)[..., None] * UPDATE.W_dec[latent]).permute(0, 3, 1, 2), *output[1:])

    handle = unet().get_submodule(BLOCK).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def denoise(rows: int = 2, *, guidance: float | None = None) -> Tensor:
    """Three DDIM steps."""
    scheduler: Any = DDIMScheduler()
    scheduler.set_timesteps(3)
    x = noise(rows)
    for step in scheduler.timesteps:
        if guidance is None:
            told = unet()(x, step, PROMPT[:rows]).sample
        else:
            both = torch.cat([torch.zeros_like(PROMPT[:rows]), PROMPT[:rows]])
            plain, told = unet()(torch.cat([x, x]), step, both).sample.chunk(2)
            told = plain + guidance * (told - plain)
        x = scheduler.step(told, step, x).prev_sample
    return x


def rectangle(rows: slice, columns: slice) -> tuple[Tensor, Plan]:
    """A mask of 8 x 8, and the plan of one rule per line of pixels that adds there."""
    mask = torch.zeros(8, 8)
    mask[rows, columns] = 1
    lines = range(8)[rows]
    ranges = [(8 * line + columns.start, 8 * line + columns.stop) for line in lines]
    rules = [Rule("push", (7,), Add(5.0), start=start, stop=stop, priority=n) for n, (start, stop) in enumerate(ranges)]
    return mask, Plan(tuple(rules))


@pytest.mark.parametrize("return_dict", [True, False])
def test_update_of_a_block_is_edited_as_by_the_published_hook(return_dict):
    plan = Plan((Rule("push", (7,), Clamp(6.0, when="always")),))
    with torch.no_grad(), update_hook(7, torch.ones(2, 8, 8), value=6.0):
        expected = unet()(noise(2), 5, PROMPT, return_dict=return_dict)[0]

    with torch.no_grad(), steer(unet(), plan, saes=UPDATE, layout=UPDATES):
        found = unet()(noise(2), 5, PROMPT, return_dict=return_dict)[0]

    assert laws.distance(found, expected) <= laws.TOLERANCE


def test_regions_per_row_are_edited_at_every_step_of_a_denoising_loop():
    left, upper = rectangle(slice(0, 8), slice(0, 3)), rectangle(slice(2, 5), slice(1, 7))
    masks = torch.stack([left[0], upper[0]])
    with update_hook(7, masks, amount=5.0):
        expected = denoise()

    with steer(unet(), [left[1], upper[1]], saes=UPDATE, layout=UPDATES) as run:
        found = denoise()

    assert laws.same_bits(found, expected)
    for row, (mask, plan) in enumerate((left, upper)):
        pixels = tuple(mask.flatten().nonzero().flatten().tolist())
        steps = [[laws.edited(run)[rule][step][row] for rule in plan.rules] for step in range(3)]
        assert [tuple(sorted(sum(step, ()))) for step in steps] == [pixels] * 3


def test_guidance_passes_two_rows_per_image_and_plans_are_one_per_row():
    mask, plan = rectangle(slice(0, 4), slice(0, 8))
    halves = torch.cat([torch.zeros(2, 8, 8), mask.expand(2, 8, 8)])
    with update_hook(7, halves, amount=5.0):
        expected = denoise(guidance=3.0)

    with steer(unet(), [None, None, plan, plan], saes=UPDATE, layout=UPDATES):
        found = denoise(guidance=3.0)

    assert laws.same_bits(found, expected)
    explained = pytest.raises(RowsMismatch, match=r"2 plans.*4 rows.*guidance.*\[None\] \* n \+ plans")
    with steer(unet(), [plan, plan], saes=UPDATE, layout=UPDATES), explained:
        denoise(guidance=3.0)


def test_blocks_of_two_resolutions_have_positions_of_their_own():
    small = tiny.tiny_sae(name="small", site=Site("mlp_out", 1), activation="relu")
    plan = Plan((Rule("push", (1,), Add(1.0), start=20), Rule("small", (2,), Add(1.0), start=10)))

    with torch.no_grad(), steer(unet(), plan, saes=[UPDATE, small], layout=UPDATES) as run:
        unet()(noise(1), 5, PROMPT[:1])

    assert [laws.edited(run)[rule][0][0] for rule in plan.rules] == [tuple(range(20, 64)), tuple(range(10, 16))]


def test_sae_of_sdxl_turbo_is_bound_where_its_rule_says(tmp_path):
    sae = load_sae(write_sdxl(tmp_path))
    layout = SiteMap({"mlp_out.0": At("stages.0", axes="batch d height width", delta=True)}, width=sae.d_in)
    model = nn.ModuleDict({"stages": nn.ModuleList([nn.Conv2d(sae.d_in, sae.d_in, 1)])})
    model.forward = lambda x: model["stages"][0](x)  # type: ignore[method-assign]
    model.requires_grad_(False)
    x = torch.randn(1, sae.d_in, 3, 3, generator=torch.Generator().manual_seed(0))
    there = Plan((Rule(sae.name, (3,), Add(2.0), site=Site("mlp_out", 0), start=4, stop=5),))

    with steer(model, there, saes=sae, layout=layout):
        found = model(x)

    expected = model(x)
    expected[0, :, 1, 1] += 2.0 * sae.W_dec[3]
    assert laws.distance(found, expected) <= laws.TOLERANCE
    nowhere = pytest.raises(SiteNotFound, match="Give the rule a site")
    with nowhere, steer(model, rule(sae.name), saes=sae, layout=layout):
        pass


def test_gradients_go_through_an_edited_update():
    plan, grown = Plan((Rule("push", (7,), Clamp(6.0, when="always")),)), []

    for block in (update_hook(7, torch.ones(1, 8, 8), value=6.0), steer(unet(), plan, saes=UPDATE, layout=UPDATES)):
        x = noise(1).requires_grad_()
        with block:
            unet()(x, 5, PROMPT[:1]).sample.square().sum().backward()
        grown.append(x.grad)

    assert laws.distance(grown[1], grown[0]) <= 10 * laws.TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_its_dtype_and_the_bits_of_other_rows(kind):
    model, images = copy.deepcopy(painter(kind)).bfloat16(), pictures(2).bfloat16()
    rules = tuple(Rule(sae.name, (1, 4), AtLeast(4.0)) for sae in BY_SITE.values())
    with torch.no_grad():
        plain = model(images)["picture"]

    with torch.no_grad(), steer(model, [None, Plan(rules)], saes=SAES, layout=MAP):
        found = model(images)["picture"]

    assert found.dtype == torch.bfloat16
    assert laws.same_bits(found[0], plain[0])
    assert not torch.equal(found[1], plain[1])


def test_vision_transformer_has_its_class_token_at_position_0():
    found = [path for path, module in vit().named_modules() if isinstance(module, nn.ModuleList)]
    layout = SiteMap({"resid_post": f"{found[0]}.{{}}"}, width=tiny.D)
    sae, images = tiny.tiny_sae(name="push"), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plan = Plan((Rule("push", (1, 2), Clamp(9.0, when="always"), start=1),))
    cls = Plan((Rule("push", (3,), Clamp(9.0, when="always"), stop=1),))

    with capture(vit(), "resid_post.1", layout=layout) as plain:
        vit()(pixel_values=images)

    with (
        capture(vit(), "resid_post.1", layout=layout) as tape,
        steer(vit(), [plan, cls], saes=sae, layout=layout) as run,
    ):
        vit()(pixel_values=images)

    moved = (tape["resid_post.1"] != plain["resid_post.1"]).any(-1)
    assert moved.tolist() == [[False] + [True] * 16, [True] + [False] * 16]
    assert laws.edited(run)[plan.rules[0]][0] == (tuple(range(1, 17)), ())
    with pytest.raises(UnsupportedModel, match=rf"SiteMap\(\{{'resid_post': '{found[0]}\.\{{\}}'\}}"):
        engine_for(vit())


# What is refused


def enter(
    layout: SiteMap, model: nn.Module | None = None, plan: Plan = PUSH, *, calls: int = 1, **options: Any
) -> Callable[[], None]:
    """Steer a painter, or another model of its kind, at the first site of a map."""

    def act() -> None:
        site = next(Site.parse(key) for key in layout.sites)
        with steer(model or painter(), plan, layout=layout, **{"saes": sae_at(site)} | options):
            for _ in range(calls):
                paint(model or painter(), pictures(2))

    return act


def called(model: nn.Module, layout: SiteMap, *args: Any, **kwargs: Any) -> Callable[[], None]:
    """Call a model while the first site of a map is captured."""

    def act() -> None:
        site = str(next(iter(layout.sites)))
        with capture(model, site if "." in site else f"{site}.0", layout=layout):
            model(*args, **kwargs)

    return act


def one(path: str, **at: Any) -> SiteMap:
    return SiteMap({"resid_post.0": At(path, **{"axes": IMAGE, "width": D} | at)})


def wide(width: int) -> SAE:
    return sae_at(Site("resid_post", 0), width=width)


def rule(sae: str = "push", **options: Any) -> Plan:
    return Plan((Rule(sae, (1,), Scale(2.0), **options),))


class Around:
    """No module, but something around one."""

    _module = nn.Linear(2, 2)


def twice() -> nn.Module:
    model = copy.deepcopy(painter())
    model.stages[1] = model.stages[0]
    return model


def read_by(reader: Any) -> SiteMap:
    return SiteMap({"resid_post": "h.{}"}, width=16, read_pass=reader)


IDS = tiny.prompt(2)
PLAIN, TWO_SIZES = one("stages.0"), {"resid_post.0": "stages.0", "resid_post.2": "stages.2"}
ACROSS = rule(site=Site("resid_post", 0), site_out=Site("resid_post", 2))
POOL = nn.Sequential(nn.Conv2d(3, D, 1), nn.AvgPool2d(2))
UNMASKED = SiteMap({"resid_post": "layers.{}"}, tokens="input_ids", width=tiny.D)
SUMMED = SiteMap({"resid_post.0": At("inner", axes="batch d")}, tokens="idx", width=16)
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "no map": (UnsupportedModel, r"SiteMap\(\{'resid_post': 'stages\.\{\}'\}, width=", lambda: engine_for(painter())),
    "no map of a text": (UnsupportedModel, r"'h\.\{\}'\}, tokens='idx'", lambda: engine_for(writer())),
    "no map of images": (UnsupportedModel, f"'resid_post.0': '{BLOCK}'.*axes='batch d h", lambda: engine_for(unet())),
    "an empty map": (SiteNotFound, "names no site", lambda: SiteMap({})),
    "a stream without numbers": (SiteNotFound, r"has no \{\}", lambda: SiteMap({"resid_post": "stages"})),
    "a site of no stream": (SiteNotFound, "not a stream", lambda: SiteMap({"attention.0": "stages.0"})),
    "no batch": (SiteNotFound, "'batch' and 'd'", lambda: At("stages.0", axes="pos d")),
    "the delta of an input": (SiteNotFound, "what a module gives minus", lambda: At("stages.0", "input", delta=True)),
    "a mask without tokens": (SiteNotFound, "names no tokens", lambda: SiteMap({"resid_post.0": "a"}, mask="mask")),
    "another site": (SiteNotFound, "its site map names", enter(PLAIN, saes=sae_at(Site("mlp_in", 0)))),
    "no such module": (SiteNotFound, "the model has no blocks.*it has enter, stages", enter(one("blocks.0"))),
    "no such block": (SiteNotFound, "stages has no 7.*it has 0, 1, 2", enter(one("stages.7"))),
    "the model itself": (SiteNotFound, "the model itself", enter(one(""))),
    "no width": (SiteNotFound, r"how wide.*At\('stages.0', width", enter(one("stages.0", width=None))),
    "another width": (WidthMismatch, "width 6.*width 3", enter(one("enter", side="input", width=None))),
    "a wrong width": (WidthMismatch, "width 6 there.*says 7", enter(one("stages.0", width=7), saes=wide(7))),
    "other axes": (GuardNotApplied, "site map says batch pos d", enter(one("stages.0", axes="batch pos d"))),
    "no tensor": (GuardNotApplied, "carries a int there", enter(one("stages.0", item=1))),
    "no such item": (GuardNotApplied, "carries a tuple there", enter(one("stages.0", item=2))),
    "an update of another size": (GuardNotApplied, "is no update", called(POOL, one("1", delta=True), pictures(1))),
    "two names of one place": (
        SiteNotFound, "resid_post.1 is the same place",
        enter(SiteMap({"resid_post.0": "stages.0", "resid_post.1": "stages.0"}, axes=IMAGE, width=D)),
    ),
    "the first item by its number": (
        SiteNotFound, "resid_post.1 is the same place",
        enter(SiteMap({"resid_post.0": "stages.0", "resid_post.1": At("stages.0", item=0)}, axes=IMAGE, width=D)),
    ),
    "an item from the end": (SiteNotFound, "counted from the beginning", lambda: At("stages.0", item=-1)),
    "a module that does not run": (GuardNotApplied, "had not run", enter(one("unused", axes="batch d", width=None))),
    "a module that runs twice": (GuardNotApplied, "ran a second time in one pass", enter(PLAIN, twice())),
    "other rows": (
        GuardNotApplied, "6 rows of 1 positions there, and the pass has 2 rows",
        enter(one("mixer", axes="d batch", width=2), saes=wide(2)),
    ),
    "fewer positions": (GuardNotApplied, "1 positions there.*2 rows of 7 tokens", called(Summary(), SUMMED, IDS)),
    "a prompt": (PhaseUnknown, "no tokens, and none is prompt", enter(PLAIN, plan=rule(phase="prompt"))),
    "the newest": (PhaseUnknown, "none is prompt or generated", enter(PLAIN, plan=rule(phase="newest"))),
    "a length of prompts": (PhaseUnknown, "positions are no text", enter(PLAIN, prompt_tokens=3)),
    "a gate": (UnsupportedMode, "one token after", enter(PLAIN, plan=rule(gate=Watch(Hits((1,)), Rate(), 0.5)))),
    "two sizes in one rule": (
        GuardNotApplied, "resid_post.0 has 16 positions and resid_post.2 has 4",
        enter(SiteMap(TWO_SIZES, axes=IMAGE, width=D), plan=ACROSS),
    ),
    "no call": (PlanNeverRan, "not called inside it", enter(PLAIN, calls=0)),
    "no rows": (TokensUnknown, "no argument is a tensor with rows", called(painter(), PLAIN, 3)),
    "no ids": (TokensUnknown, "idx is not token ids", called(writer(), TEXT, torch.ones(2, 3))),
    "an unknown mask": (
        TokensUnknown, r"SiteMap\(\.\.\., mask='attention_mask'\)",
        called(trunk(), UNMASKED, IDS, attention_mask=torch.ones(2, 7)),
    ),
    "a cache": (
        UnsupportedMode, "without a cache", called(trunk(), TRUNK, IDS, past_key_values=transformers.DynamicCache()),
    ),
    "a reader of nothing": (
        TokensUnknown, "returned a NoneType", called(writer(), read_by(lambda args, kwargs: None), IDS),
    ),
    "a cache that cannot be told": (
        UnsupportedMode, "a list cannot be told",
        called(writer(), read_by(lambda args, kwargs: Pass(2, 7, 0, [], None, None, IDS.device)), IDS),
    ),
    "a model that generates": (UnsupportedModel, "generates with it", lambda: engine_for(tiny.tiny_model(), TRUNK)),
    "a wrapper": (UnsupportedModel, r"wrapper\.module", lambda: engine_for(nn.DataParallel(painter()), MAP)),
    "no module": (UnsupportedModel, "it is no nn.Module", lambda: engine_for(Around(), MAP)),
    "compiled": (
        CompiledModel, "Steer the original", lambda: engine_for(torch.compile(copy.deepcopy(painter())), MAP),
    ),
    "no weights": (MetaDevice, "meta device", enter(PLAIN, copy.deepcopy(painter()).to("meta"))),
    "the bias of values": (
        UnsupportedModel, r"sae\.shifted\(bias\)", lambda: engine_for(painter(), MAP).value_bias(0, with_norm=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_site_map_cannot_do_is_refused_by_name(what):
    error, message, act = REFUSED[what]

    with pytest.raises(error, match=message):
        act()


def test_rows_in_another_place_than_the_first_tensor_are_noticed():
    """The batch of a module may be folded into its positions, so that rows are no longer those of the call."""
    folded = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 4))
    layout = SiteMap({"resid_post.0": At("1", axes="batch d")})

    with steer(folded, PUSH, saes=sae_at(Site("resid_post", 0), width=4), layout=layout):
        with pytest.raises(GuardNotApplied, match=r"resid_post\.0"):
            folded(torch.randn(2, 3, 4))
        folded(torch.randn(2, 1, 4))


def columns_first(names: list[str]) -> list[int]:
    others = [axis for axis, name in enumerate(names) if name not in ("batch", "d")]
    return [names.index("batch"), *reversed(others), names.index("d")]


def channels_last(stream: Tensor, axes: str, like: Tensor) -> Tensor:
    back = from_stream(stream, axes, like)
    return back.contiguous(memory_format=torch.channels_last) if back.ndim == 4 else back


MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "reads the whole instead of the update": ("mapped.MappedPlace.value", lambda self, carried, base: carried),
    "flattens columns first": ("carried._order", columns_first),
    "leaves channels last in memory": ("mapped.from_stream", channels_last),
    "puts the whole before the update": ("mapped.MappedPlace.follows", lambda self, other: False),
}  # fmt: skip
CAUGHT_BY = {
    "leaves channels last in memory": lambda: test_plan_that_changes_nothing_leaves_every_bit(torch.contiguous_format),
    "puts the whole before the update": test_sites_of_one_module_follow_each_other_in_whatever_order_they_came,
    "reads the whole instead of the update": lambda: test_update_of_a_block_is_edited_as_by_the_published_hook(True),
    "flattens columns first": test_regions_per_row_are_edited_at_every_step_of_a_denoising_loop,
}


@pytest.mark.parametrize("fault", MUTANTS)
def test_law_catches(monkeypatch, fault):
    path, wrong = MUTANTS[fault]
    monkeypatch.setattr(f"saeguard.engines.{path}", wrong)

    with pytest.raises(AssertionError):
        CAUGHT_BY[fault]()
