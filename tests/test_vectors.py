"""Vectors of others become rules, rules that only add become vectors for others, and both move the same streams.

The oracle of an edit is a torch hook that adds a tensor to what leaves a block; that of a file is the gguf package.
"""

import json
import re
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from saeguard import (
    Ablate,
    Add,
    AnyActive,
    AtLeast,
    Clamp,
    Misdirect,
    Plan,
    Project,
    Reweight,
    Rule,
    Scale,
    Site,
    Splice,
    capture,
    load_sae,
    save_sae,
    steer,
)
from saeguard.cli import app
from saeguard.errors import (
    AmbiguousSAE,
    BrokenFile,
    LoadError,
    MissingMaximum,
    NotConstant,
    OpMismatch,
    SiteNotFound,
    UnsupportedFormat,
    WidthMismatch,
)
from saeguard.exporting import as_directions, constant_vectors, export_vectors
from saeguard.gates import Count, Hits, Watch
from saeguard.loaders import open_sae
from saeguard.vectors import load_vectors, vectors
from tests import laws, tiny
from tests.counts import cases

IDS = tiny.prompt(2, 7)
RESID = [Site("resid_post", layer) for layer in range(3)]


def vector(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (tiny.D,)), generator=torch.Generator().manual_seed(seed))


def write_gguf(path: Path, directions, *, architecture="controlvector", dtype=np.float32) -> Path:
    """A control vector as repeng and llama.cpp's generator write it, by the gguf package."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, values in directions.items():
        writer.add_tensor(f"direction.{layer}", np.asarray(values).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def control(tmp_path):
    return write_gguf(tmp_path / "control.gguf", {1: vector(1).numpy(), 2: vector(2).numpy()})


@contextmanager
def added(model, directions, keep=None):
    """Hooks that add a vector to what leaves a block, wherever ``keep`` is not set."""

    def hook(v):
        def change(module, args, output):
            x = output[0] if isinstance(output, tuple) else output
            moved = x + v if keep is None else torch.where(keep[..., None], x, x + v)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return change

    with ExitStack() as stack:
        for site, v in directions.items():
            assert site.stream == "resid_post"
            block = model.get_submodule("model.layers")[site.layer]
            stack.callback(block.register_forward_hook(hook(v)).remove)
        yield


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def steered(plan, saes=(), model=None, **options):
    model = model or tiny.tiny_model()
    with steer(model, plan, saes=saes, **options):
        return logits(model)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def with_hooks(directions, keep=None):
    model = tiny.tiny_model()
    with added(model, directions, keep):
        return logits(model)


# in: files and objects


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_a_control_vector_that_the_gguf_package_wrote_loads_as_it_was_written(tmp_path, dtype):
    path = write_gguf(tmp_path / "c.gguf", {1: vector(1).numpy(), 12: vector(2).numpy()}, dtype=dtype)

    sae = load_sae(f"{path}@12")

    assert (sae.site, sae.d_sae, sae.d_in, sae.is_vectors) == (Site("resid_post", 12), 1, tiny.D, True)
    assert torch.equal(sae.W_dec[0].double(), torch.from_numpy(vector(2).numpy().astype(dtype)).double())
    assert sae.manifest["model_hint"] == "llama"
    assert not sae.encode(torch.randn(3, tiny.D)).any()


def test_direction_n_is_added_to_what_leaves_block_n_counted_from_0(control):
    model, plan = tiny.tiny_model(), Plan((Rule(f"{control}@1", (0,), Add(2.0), special=True),))
    with capture(model, RESID) as plain:
        logits(model)
    with steer(model, plan), capture(model, RESID) as tape:
        logits(model)

    assert torch.equal(tape[RESID[0]], plain[RESID[0]])
    assert torch.allclose(tape[RESID[1]] - plain[RESID[1]], 2.0 * vector(1), atol=1e-5)
    assert not torch.equal(tape[RESID[2]], plain[RESID[2]])


def test_a_rule_with_a_file_adds_the_vector_except_at_special_tokens(control):
    plan = Plan((Rule(f"{control}@2", (0,), Add(1.5)),))

    found = steered(plan)

    assert close(found, with_hooks({RESID[2]: 1.5 * vector(2)}, keep=tiny.BOS == IDS))


def test_all_sites_of_a_file_make_one_plan_that_finds_the_file_again_from_json(control):
    happy = load_vectors(control)
    plan = happy.plan(0.5, special=True)

    assert happy.sites == (RESID[1], RESID[2])
    again = steered(Plan.from_json(plan.to_json()))
    assert laws.same_bits(again, steered(plan, happy.saes))
    assert close(again, with_hooks({RESID[1]: 0.5 * vector(1), RESID[2]: 0.5 * vector(2)}))


@pytest.mark.parametrize("given", ["sites", "texts", "repeng"])
def test_tensors_in_memory_and_repeng_objects_are_vectors_too(given):
    tensors = {RESID[1]: vector(1), RESID[2]: vector(2)}
    mapped = vector(1).numpy()
    mapped.setflags(write=False)  # as repeng reads them from a file
    how = {
        "sites": tensors,
        "texts": {"blocks.1.hook_resid_post": vector(1).numpy(), "model.layers.2": vector(2)},
        "repeng": SimpleNamespace(model_type="llama", directions={1: mapped, 2: vector(2).numpy()}),
    }[given]
    happy = vectors(how, name="happy")

    found = steered(happy.plan(-1.0, special=True), happy.saes)

    assert list(happy.saes) == ["happy@1", "happy@2"]
    assert close(found, with_hooks({site: -v for site, v in tensors.items()}))


def test_many_vectors_of_one_site_are_latents_of_one_sae(tmp_path):
    many = vector(3, 5, tiny.D)
    save_file({"resid_post.1": many}, tmp_path / "many.safetensors")
    torch.save(many, tmp_path / "weight.pt")

    for source in (tmp_path / "many.safetensors", f"{tmp_path}/weight.pt@1", f"{tmp_path}/weight.pt@resid_post.1"):
        plan = Plan((Rule(str(source), (4, 0), Add((1.0, -2.0)), special=True),))
        assert close(steered(plan), with_hooks({RESID[1]: many[4] - 2 * many[0]}))
    assert open_sae(tmp_path / "weight.pt").site is None
    assert load_sae(tmp_path / "weight.pt", "mlp_out.2").site == Site("mlp_out", 2)
    assert load_vectors(tmp_path / "weight.pt", "mlp_out.2").sites == (Site("mlp_out", 2),)


def test_the_same_vector_at_two_layers_is_no_dictionary_read_twice(tmp_path):
    path = write_gguf(tmp_path / "c.gguf", {1: vector(1).numpy(), 2: vector(1).numpy()})

    found = steered(load_vectors(path).plan(1.0, special=True))

    assert close(found, with_hooks({RESID[1]: vector(1), RESID[2]: vector(1)}))


def test_phases_rows_norms_and_gates_of_other_saes_work_as_in_any_rule():
    happy, sae = vectors({RESID[1]: vector(1)}, name="happy"), tiny.tiny_sae(site=RESID[0])
    gate = Watch(Hits(tuple(range(0, 48, 2)), sae="tiny", site=RESID[0]), Count(), 3.5)
    plans = [happy.plan(2.0, phase="prompt"), happy.plan(0.3, unit="norm", gate=gate)]
    with steer(tiny.tiny_model(), plans, saes={**happy.saes, "tiny": sae}, prompt_tokens=4) as run:
        logits(tiny.tiny_model())

    first, second = run.report.rules
    assert first.edited_positions == (((1, 2, 3), ()),)
    assert second.edited_positions[0][0] == ()
    assert 0 < len(second.edited_positions[0][1]) < 6
    assert second.mean_share == pytest.approx(0.3 * float(vector(1).norm()), rel=1e-4)


def test_saved_in_our_format_they_are_still_vectors(control, tmp_path):
    sae = load_sae(save_sae(load_sae(f"{control}@2"), tmp_path / "ours"))

    assert sae.is_vectors
    with pytest.raises(OpMismatch):
        steered(Plan((Rule(sae.name, (0,), Scale(2.0)),)), sae)


READERS = {
    "clamp": {"op": Clamp(1.0, when="always")},
    "scale": {"op": Scale(2.0)},
    "ablate": {"op": Ablate()},
    "at least": {"op": AtLeast(1.0)},
    "splice": {"op": Splice("dropped"), "latents": ()},
    "reweight": {"op": Reweight(2.0, mode="weight")},
    "trigger": {"op": Add(1.0), "trigger": AnyActive((0,))},
    "gate": {"op": Add(1.0), "gate": Watch(Hits((0,)), Count(), 1.5)},
}


@pytest.mark.parametrize("name", READERS)
def test_what_reads_an_activation_of_a_vector_is_refused_before_the_model_is_touched(name):
    happy = vectors({RESID[1]: vector(1)}, name="happy")
    options = {"latents": (0,)} | READERS[name]
    rule = Rule("happy@1", options.pop("latents"), options.pop("op"), **options)

    with pytest.raises(OpMismatch, match=r"on happy@1: its latents are plain vectors.*Use Add"):
        steered(Plan((rule,)), happy.saes)


def test_a_gate_on_vectors_is_refused_also_where_the_rule_is_on_an_sae():
    happy, gate = vectors({RESID[1]: vector(1)}, name="happy"), Watch(Hits((0,), sae="happy@1"), Count(), 1.5)

    with pytest.raises(OpMismatch, match="a gate on happy@1"):
        steered(Plan((Rule("tiny", (1,), Ablate(), gate=gate),)), {**happy.saes, "tiny": tiny.tiny_sae()})


def test_a_direction_can_be_projected_out_of_the_stream():
    happy, model = vectors({RESID[1]: vector(1)}, name="happy"), tiny.tiny_model()
    plan = Plan((Rule("happy@1", (0,), Project(1.0), special=True),))
    with steer(model, plan, saes=happy.saes), capture(model, RESID[1]) as tape:
        logits(model)

    assert float((tape[RESID[1]] @ vector(1)).abs().max()) < 1e-4


def test_units_of_a_maximum_and_other_widths_are_refused():
    happy, wide = vectors({RESID[1]: vector(1)}, name="h"), vectors({RESID[1]: vector(1, 40)}, name="w")

    with pytest.raises(MissingMaximum):
        steered(happy.plan(1.0, unit="max"), happy.saes)
    with pytest.raises(WidthMismatch):
        steered(wide.plan(1.0), wide.saes)


BAD_GIVEN = {
    "no mapping": ([vector(1)], UnsupportedFormat, "no mapping from sites to vectors"),
    "empty": ({}, UnsupportedFormat, "an empty one"),
    "a cube": ({RESID[1]: vector(1, 2, 2, 2)}, UnsupportedFormat, r"its shape is \(2, 2, 2\)"),
    "NaN": ({RESID[1]: torch.tensor([1.0, torch.nan])}, UnsupportedFormat, "with NaN or infinity"),
    "text": ({RESID[1]: "happy"}, UnsupportedFormat, "is no tensor"),
    "twice": ({RESID[1]: vector(1), 1: vector(2)}, UnsupportedFormat, "two are at resid_post.1"),
    "negative": ({-1: vector(1)}, SiteNotFound, "from 0 upwards"),
}


@pytest.mark.parametrize("name", BAD_GIVEN)
def test_what_is_no_vectors_is_refused(name):
    given, error, says = BAD_GIVEN[name]

    with pytest.raises(error, match=says):
        vectors(given, name="happy")


def test_a_site_that_the_vectors_do_not_have_is_refused():
    with pytest.raises(SiteNotFound, match=r"they are at resid_post.1\."):
        vectors({RESID[1]: vector(1)}, name="happy").plan(at=[RESID[2]])


def test_files_that_do_not_say_which_vector_or_are_none_are_refused(control, tmp_path):
    model = write_gguf(tmp_path / "model.gguf", {1: vector(1).numpy()}, architecture="llama")
    named = write_gguf(tmp_path / "x.gguf", {"x": vector(1).numpy()})
    sae = save_sae(tiny.tiny_sae(), tmp_path / "sae.safetensors")
    for source, error, says in (
        (control, UnsupportedFormat, r"it has vectors at 1, 2\. Name one of them: control.gguf@1"),
        (f"{control}@7", UnsupportedFormat, r"at resid_post.7: it has vectors at 1, 2"),
        (model, UnsupportedFormat, "its general.architecture is 'llama'"),
        (named, BrokenFile, "'direction.x' names no site"),
        (f"{sae}@2", UnsupportedFormat, "the @ names resid_post.2 of a file of vectors, and this is of saeguard"),
    ):
        with pytest.raises(error, match=says):
            load_sae(source)
    with pytest.raises(UnsupportedFormat, match="the @ names resid_post.2"):
        load_sae(f"{control}@2", "resid_post.1")


def test_a_gguf_file_cut_or_changed_anywhere_is_read_or_refused_by_name(control):
    whole = control.read_bytes()
    generator = np.random.default_rng(0)
    header = whole.index(b"direction.2") + 40
    damaged = [whole[:n] for n in range(0, header, 7)]
    for at in generator.integers(0, header, cases(2000)).tolist():
        damaged.append(whole[:at] + bytes([int(generator.integers(256))]) + whole[at + 1 :])
    read = 0
    for content in damaged:
        control.write_bytes(content)
        with suppress(LoadError):
            load_sae(f"{control}@2")
            read += 1

    assert 0 < read < len(damaged)


def test_quantised_tensors_and_headers_as_long_as_models_have_are_refused(tmp_path):
    def entries(path, keys=0, kind=None):
        writer = gguf.GGUFWriter(path, "controlvector")
        writer.add_array("tokens", ["one token of many, at length"] * keys or ["t"])
        rows = np.zeros((34,), dtype=np.uint8) if kind else np.ones(4, dtype=np.float32)
        writer.add_tensor("direction.1", rows, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    with pytest.raises(UnsupportedFormat, match="quantised"):
        load_sae(entries(tmp_path / "q.gguf", kind=gguf.GGMLQuantizationType.Q8_0))
    with pytest.raises(UnsupportedFormat, match="longer than 1048576 bytes, as models' are"):
        load_sae(entries(tmp_path / "m.gguf", keys=40_000))
    assert load_sae(entries(tmp_path / "v.gguf", keys=100)).site == RESID[1]


# out: plans that are constant

SAES = {
    "a": tiny.tiny_sae(name="a", seed=1, site=RESID[1]),
    "b": tiny.tiny_sae(name="b", seed=2, site=RESID[2], activation="topk"),
}


@st.composite
def constant_plans(draw, *, special=True):
    rules = []
    for name in draw(st.lists(st.sampled_from(("a", "b", "c")), min_size=1, max_size=3, unique=True)):
        latents = draw(st.lists(st.integers(0, 47), min_size=1, max_size=4, unique=True).map(tuple))
        amount = draw(laws.amounts | st.lists(laws.amounts, min_size=len(latents), max_size=len(latents)).map(tuple))
        sae, site = ("a", RESID[2]) if name == "c" else (name, None)
        op = Add(amount, unit=draw(st.sampled_from(("activation", "max"))))
        rules.append(Rule(sae, latents, op, site=site, special=special))
    return Plan(tuple(rules))


@settings(max_examples=cases(400))
@given(constant_plans())
def test_hooks_that_add_the_exported_vectors_do_what_steering_does(plan):
    found = constant_vectors(plan, SAES)

    assert close(with_hooks(found), steered(plan, SAES))


@settings(max_examples=cases(100))
@given(plan=constant_plans(special=False))
def test_everywhere_exports_what_the_plan_does_outside_of_special_tokens(plan):
    found = constant_vectors(plan, SAES, everywhere=True)

    assert close(with_hooks(found, keep=tiny.BOS == IDS), steered(plan, SAES))


@settings(max_examples=cases(100))
@given(plan=constant_plans(), ending=st.sampled_from((".gguf", ".safetensors")))
def test_a_file_of_exported_vectors_read_back_is_the_plan(tmp_path_factory, plan, ending):
    path = tmp_path_factory.mktemp("v") / f"out{ending}"
    export_vectors(constant_vectors(plan, SAES), path, model_type="llama")

    again = load_vectors(path)

    assert close(steered(again.plan(1.0, special=True)), steered(plan, SAES))
    assert not list(path.parent.glob("*.partial"))


def test_the_gguf_package_reads_what_is_written_as_it_reads_a_control_vector(tmp_path):
    directions = {RESID[1]: vector(1), Site("resid_post", 11): vector(2)}
    export_vectors(directions, tmp_path / "c.gguf", model_type="qwen2")

    reader = gguf.GGUFReader(tmp_path / "c.gguf")

    fields = {name: reader.get_field(name).contents() for name in reader.fields if not name.startswith("GGUF")}
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "qwen2",
        "controlvector.layer_count": 2,
    }
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.11"]
    assert np.array_equal(reader.tensors[1].data, vector(2).numpy())


def test_what_enters_a_block_is_what_leaves_the_one_before():
    found = as_directions({Site("resid_pre", 2): vector(1), RESID[1]: vector(2)})

    assert list(found) == [1]
    assert torch.equal(found[1], vector(1) + vector(2))


@pytest.mark.parametrize("site", ["resid_post.0", "resid_pre.1", "mlp_out.2"])
def test_sites_that_a_control_vector_cannot_name_are_refused_and_safetensors_has_them(site, tmp_path):
    directions = {Site.parse(site): vector(1)}

    with pytest.raises(SiteNotFound, match=r"direction.N is resid_post.N, from N = 1 on.*safetensors"):
        export_vectors(directions, tmp_path / "c.gguf")
    export_vectors(directions, tmp_path / "c.safetensors")
    assert not (tmp_path / "c.gguf").exists()
    assert load_vectors(tmp_path / "c.safetensors").sites == (Site.parse(site),)


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(UnsupportedFormat, match=r"Endings: \.gguf and \.safetensors"):
        export_vectors({RESID[1]: vector(1)}, tmp_path / "c.npz")


def test_infinity_is_not_written_and_one_tensor_may_be_at_two_sites(tmp_path):
    with pytest.raises(UnsupportedFormat, match=r"those at resid_post.1 hold NaN or infinity"):
        export_vectors({RESID[1]: vector(1) / 0}, tmp_path / "c.gguf")
    export_vectors(dict.fromkeys(RESID, vector(1)), tmp_path / "c.safetensors")

    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    assert load_vectors(tmp_path / "c.safetensors").sites == tuple(RESID)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("ending", ["gguf", "safetensors"])
@pytest.mark.parametrize(
    ("directions", "says"),
    [
        ({}, "there are none"),
        ({RESID[1]: torch.ones(2, 32)}, "those at resid_post.1 are no tensors of one dimension"),
        ({RESID[1]: torch.tensor(1.0)}, "no tensors of one dimension"),
        ({RESID[1]: [1.0]}, "no tensors of one dimension"),
        ({RESID[1]: torch.ones(0)}, "are 0 wide"),
        ({RESID[1]: torch.ones(32), RESID[2]: torch.ones(31)}, "are 31 and 32 wide"),
    ],
    ids=["none", "matrix", "number", "list", "empty", "two widths"],
)
def test_what_is_no_vectors_of_one_width_is_not_written(directions, says, ending, tmp_path):
    with pytest.raises(UnsupportedFormat, match=says):
        export_vectors(directions, tmp_path / "new" / f"c.{ending}")

    assert not list(tmp_path.iterdir())


def test_a_folder_is_made_and_streams_of_other_widths_may_share_a_file(tmp_path):
    directions = {RESID[1]: torch.ones(32), Site("mlp_post", 1): torch.ones(48)}

    path = export_vectors(directions, tmp_path / "a" / "b" / "c.safetensors")

    assert {sae.d_in for sae in load_vectors(path).saes.values()} == {32, 48}


def test_vectors_are_of_the_saes_that_steering_would_take():
    plan = Plan((Rule("a", (1,), Add(2.0), special=True),))
    one, other = (tiny.tiny_sae(name="a", seed=seed) for seed in (1, 2))

    with pytest.raises(AmbiguousSAE, match="two different SAEs of that name"):
        constant_vectors(plan, [one, other])
    assert torch.equal(constant_vectors(plan, [one, one])[one.site], 2.0 * one.W_dec[1])


GATE = Watch(Hits((0,)), Count(), 1.5)
NOT_CONSTANT = {
    "clamp": (Rule("a", (1,), Clamp(2.0, when="always"), special=True), "Clamp depends on x"),
    "scale": (Rule("a", (1,), Scale(2.0), special=True), "Scale depends on x"),
    "dense": (Rule("a", (), Misdirect(2.0), special=True), "Misdirect depends on x"),
    "norm": (Rule("a", (1,), Add(2.0, unit="norm"), special=True), "a multiple of the norm of x"),
    "gate": (Rule("a", (1,), Add(2.0), special=True, gate=GATE), "it has a gate"),
    "trigger": (Rule("a", (1,), Add(2.0), special=True, trigger=AnyActive((1,))), "it has a trigger"),
    "phase": (Rule("a", (1,), Add(2.0), special=True, phase="generated"), "some tokens only"),
    "first": (Rule("a", (1,), Add(2.0), special=True, first=3), "some tokens only"),
    "range": (Rule("a", (1,), Add(2.0), special=True, start=3), "some tokens only"),
    "special": (Rule("a", (1,), Add(2.0)), "leaves special tokens alone.*everywhere=True"),
}


@pytest.mark.parametrize("name", NOT_CONSTANT)
def test_a_rule_that_is_no_constant_vector_is_refused_with_its_reason(name):
    rule, says = NOT_CONSTANT[name]

    with pytest.raises(NotConstant, match=re.compile(f"vectors of the rule {re.escape(str(rule))}: .*{says}")):
        constant_vectors(Plan((Rule("b", (1,), Add(1.0), special=True), rule)), SAES)


def test_priorities_norms_and_plans_per_row_are_refused():
    add = Plan((Rule("a", (1,), Add(2.0), special=True),))
    both = [Rule("a", (1, n), Add(float(n)), special=True, priority=n) for n in (2, 3)]

    with pytest.raises(NotConstant, match=r"priorities decide on latents \[1\]"):
        constant_vectors(Plan(tuple(both)), SAES)
    with pytest.raises(NotConstant, match="layer_norm scales what is added by each token's norm"):
        constant_vectors(add, {"a": replace(SAES["a"], norm="layer_norm")})
    with pytest.raises(NotConstant, match="Export each plan by itself"):
        constant_vectors([add, None], SAES)
    with pytest.raises(MissingMaximum):
        constant_vectors(Plan((Rule("a", (1,), Add(1.0, unit="max"), special=True),)), replace(SAES["a"], maximum=None))


def test_the_command_writes_the_file_and_refuses_what_is_no_constant_with_status_2(tmp_path):
    sae = save_sae(replace(SAES["a"], name="kept"), tmp_path / "kept")
    Plan((Rule(str(sae), (1, 2), Add((2.0, -1.0))),)).save(tmp_path / "plan.json")
    arguments = ["export-vector", str(tmp_path / "plan.json"), str(tmp_path / "c.gguf"), "--json"]

    refused = CliRunner().invoke(app, arguments)
    written = CliRunner().invoke(app, [*arguments, "--everywhere", "--model-type", "llama"])

    assert (refused.exit_code, written.exit_code) == (2, 0), written.output
    assert "leaves special tokens alone" in refused.output + refused.stderr
    (told,) = json.loads(written.stdout)["vectors"]
    expected = 2 * SAES["a"].W_dec[1] - SAES["a"].W_dec[2]
    assert told == {"site": "resid_post.1", "width": tiny.D, "norm": f"{float(expected.norm()):.4g}"}
    assert torch.allclose(load_sae(tmp_path / "c.gguf").W_dec[0], expected)
