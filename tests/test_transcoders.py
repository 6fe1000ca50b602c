"""Transcoders: an SAE that reads one site and writes another is steered as a pair of hooks by hand would do it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from saeguard import (
    SAE,
    Add,
    AnyActive,
    At,
    Clamp,
    Misdirect,
    Plan,
    Project,
    Rule,
    Scale,
    Site,
    SiteMap,
    Splice,
    capture,
    steer,
)
from saeguard.engines.base import Pass
from saeguard.errors import GuardNotApplied, OverlappingRules, SiteNotFound, WidthMismatch
from saeguard.passes import OnePass
from saeguard.steering import Run, prepare
from tests import laws, tiny, traces
from tests.counts import cases
from tests.modes import GREEDY, MASK, PADDED, WORDS
from tests.more_models import HIDDEN, LAYER, block_of, family, first, normalised, shared
from tests.tiny import BOS, D

IDS = tiny.prompt(2, 8, seed=5)
LATENTS = (1, 7, 20)
MODELS = ("llama", "gemma2", "gpt2", "neox_sequential")


def transcoder(
    reads: str = "mlp_in", writes: str = "mlp_out", *, d_in: int = D, d_out: int = D, seed: int = 0,
    activation: str = "jumprelu", skip: bool = False, norm: str = "none", layers: tuple[int, int] = (LAYER, LAYER),
) -> SAE:  # fmt: skip
    """A random transcoder, as an SAE with another decoder."""
    sae = tiny.tiny_sae(d_in=d_in, seed=seed, activation=activation, site=Site(reads, layers[0]), name="tc")
    other = tiny.tiny_sae(d_in=d_out, seed=seed + 50)
    generator = torch.Generator().manual_seed(seed)
    return replace(
        sae, W_dec=other.W_dec, b_dec=other.b_dec, site_out=Site(writes, layers[1]), norm=norm,
        skip=torch.randn(d_in, d_out, generator=generator) if skip else None,
    )  # fmt: skip


TRANSCODERS = {
    "mlp_in": transcoder(),
    "resid_mid": transcoder("resid_mid"),
    "mlp_normed": transcoder("mlp_normed"),
    "skip": transcoder(skip=True),
    "layer_norm": transcoder("resid_mid", norm="layer_norm"),
    "topk": replace(transcoder(activation="topk"), top_k=16),
    "layer after": transcoder("resid_mid", layers=(0, 1)),
}


def preactivations(x: Tensor, sae: SAE) -> Tensor:
    """Of all latents of ``x``, computed by hand in float64."""
    x = x.double()
    if sae.norm == "layer_norm":
        x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + sae.eps)
    return x @ sae.W_enc.double() + sae.b_enc.double()


def activations(x: Tensor, sae: SAE) -> Tensor:
    """All latents of ``x``."""
    pre = preactivations(x, sae)
    if sae.activation == "topk":
        kept = torch.zeros_like(pre).scatter(-1, pre.topk(sae.top_k).indices, 1.0)
        return pre.clamp_min(0) * kept
    return torch.where(pre > (0.0 if sae.threshold is None else sae.threshold.double()), pre, 0.0)


def difference(rule: Rule, f: Tensor, y: Tensor, sae: SAE) -> Tensor:
    """f' - f of the rule's latents at every token that is not BOS, padding or outside of its positions."""
    latents, op = list(rule.latents), rule.op.lower()
    units = {"activation": 1.0, "max": sae.maximum[latents].double(), "norm": y.double().norm(dim=-1, keepdim=True)}
    amounts = (op.shift, op.floor, op.lo, op.hi)
    shift, floor, lo, hi = (torch.as_tensor(amount).double() * units[op.unit] for amount in amounts)
    mine = f[..., latents]
    moved = (torch.as_tensor(op.scale).double() * mine + shift).maximum(lo).minimum(hi)
    return torch.where(chosen(rule, f)[..., None] & (mine > floor), moved - mine, 0.0)


def chosen(rule: Rule, f: Tensor) -> Tensor:
    """The tokens that a rule is about."""
    column = torch.arange(f.shape[1])
    found = (IDS != BOS) & (column >= rule.start) & (column < (rule.stop or 10**6))
    return found if not rule.trigger else found & (f[..., list(rule.trigger.latents)] > rule.trigger.threshold).any(-1)


def movement(rule: Rule, x: Tensor, f: Tensor, y: Tensor, sae: SAE) -> Tensor:
    """What a rule adds to ``y``."""
    if not rule.is_dense:
        return difference(rule, f, y, sae) @ sae.W_dec.double()[list(rule.latents)]
    if isinstance(rule.op, Splice):
        x_hat = f @ sae.W_dec.double() + sae.b_dec.double()
        x_hat = x_hat if sae.skip is None else x_hat + x.double() @ sae.skip.double()
        moved = x_hat - y.double() if rule.op.error == "dropped" else torch.zeros_like(x_hat)
    elif isinstance(rule.op, Misdirect):
        length = rule.op.amount * (y.double().norm(dim=-1, keepdim=True) if rule.op.unit == "norm" else 1.0)
        moved = length * torch.tensor(rule.op.direction(y.shape[-1]), dtype=torch.float64) - y.double()
    elif isinstance(rule.op, Project):
        rows = sae.W_dec.double()[list(rule.latents)]
        moved = -rule.op.strength * y.double() @ torch.linalg.pinv(rows) @ rows
    else:
        after = activations(x, laws.weighted(rule, sae))
        after = torch.where(after == 0, 0.0, preactivations(x, sae)) if rule.op.mode == "swap" else after
        moved = (after - f) @ sae.W_dec.double()
    return torch.where(chosen(rule, f)[..., None], moved, 0.0)


class ByHand:
    """A pair of torch hooks that does what a plan on one transcoder should do, and notes which tokens it changed."""

    def __init__(self, model: nn.Module, name: str, plan: Plan, sae: SAE):
        self.name, self.plan, self.sae, self.its = name, plan, sae, family(name)
        self.model, self.block = model, block_of(model)
        self.edited: list[Tensor] = []

    def __enter__(self) -> "ByHand":
        self.stack = ExitStack()
        self.stack.callback(self._reader().remove)
        its, writes = self.its, self.sae.site_out.stream
        path = {"mlp_out": its.post_mlp or "mlp", "resid_post": "", "mlp_post": its.hidden}[writes]
        module = self.block.get_submodule(path)
        handle = (
            module.register_forward_pre_hook(lambda m, args: (self.change(args[0]),))
            if writes == "mlp_post"
            else module.register_forward_hook(lambda m, args, output: self.change(output))
        )
        self.stack.callback(handle.remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def _reader(self) -> Any:
        reads, offset = self.sae.site, self.sae.site.layer - LAYER
        block = self.block
        if offset:
            listed = next(m for m in self.model.modules() if isinstance(m, nn.ModuleList) and self.block in list(m))
            block = listed[LAYER + offset]
        norm = block.get_submodule(self.its.norm)

        def keep(module: nn.Module, args: Any) -> None:
            self.x = args[0] if reads.stream in ("mlp_in", "resid_mid") else normalised(args[0], norm)[0]

        return (block.mlp if reads.stream == "mlp_in" else norm).register_forward_pre_hook(keep)

    def change(self, y: Tensor) -> Tensor:
        """``y`` after the plan."""
        f = activations(self.x, self.sae)
        found = y.double()
        for rule in self.plan.rules:
            moved = movement(rule, self.x, f, y, self.sae)
            found = found + moved
            self.edited.append((moved != 0).any(-1))
        return found.to(y.dtype)

    @property
    def positions(self) -> list[Any]:
        """As in a report, per rule: one call, per row the positions."""
        return [(tuple(tuple(row.nonzero()[:, 0].tolist()) for row in rule),) for rule in self.edited]


def positions(run: Any) -> list[Any]:
    return [entry.edited_positions for entry in run.report.rules]


def plan_of(*rules: Rule) -> Plan:
    return Plan(rules)


CLAMP = plan_of(Rule("tc", LATENTS, Clamp(4.0, when="active")), Rule("tc", (4, 9), Scale(-1.5), start=2, stop=6))


@pytest.mark.parametrize("kind", TRANSCODERS)
@pytest.mark.parametrize("name", MODELS)
def test_transcoder_moves_the_model_as_two_hooks_by_hand(name, kind):
    model, sae = shared(name), TRANSCODERS[kind]
    with ByHand(model, name, CLAMP, sae) as hand:
        expected = model(IDS).logits

    with steer(model, CLAMP, saes=sae) as run:
        found = model(IDS).logits

    assert laws.distance(found, expected) <= 1e-5
    assert positions(run) == hand.positions
    assert any(any(rows) for rule in hand.positions for rows in rule)
    assert {entry.site for entry in run.report.rules} == {f"mlp_out.{LAYER}"}


@pytest.mark.parametrize("kind", ["mlp_in", "resid_mid", "mlp_normed"])
@pytest.mark.parametrize("name", MODELS)
def test_transcoder_moves_a_bfloat16_model_as_two_hooks_by_hand(name, kind):
    model, sae = shared(name, torch.bfloat16), TRANSCODERS[kind]
    plan = plan_of(Rule("tc", LATENTS, Clamp(4.0, when="always")))
    with ByHand(model, name, plan, sae):
        expected = model(IDS).logits

    with steer(model, plan, saes=sae):
        found = model(IDS).logits

    assert laws.distance(found, expected) <= 5e-2
    assert laws.distance(found, model(IDS).logits) > 0.2


@settings(max_examples=cases(1_000))
@given(st.sampled_from(MODELS), st.sampled_from(tuple(TRANSCODERS)), st.data())
def test_random_rules_on_a_transcoder_equal_two_hooks_by_hand(name, kind, data):
    """A case is up to four rules with any op, unit, trigger and range of positions, on one transcoder."""
    model, sae = shared(name), TRANSCODERS[kind]
    where = st.integers(0, 4).flatmap(lambda start: st.fixed_dictionaries({"start": st.just(start), "stop": st.none()}))
    plan = data.draw(laws.plans([sae], where=where))
    latents = [latent for rule in plan.rules for latent in rule.latents]
    assume(len(set(latents)) == len(latents))  # priorities are test_joint's subject
    with capture(model, sae.site) as tape:
        model(IDS)
    assume(not any(laws.rule_near_edge(rule, sae, sae.read(tape[sae.site]).x) for rule in plan.rules))
    with ByHand(model, name, plan, sae) as hand:
        expected = model(IDS).logits

    with steer(model, plan, saes=sae) as run:
        found = model(IDS).logits

    assert laws.distance(found, expected) <= laws.TOLERANCE
    assert positions(run) == hand.positions


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_splice_writes_what_a_transcoder_decodes(kind):
    model, sae = shared("llama"), TRANSCODERS[kind]
    plan = plan_of(Rule("tc", (), Splice("dropped"), special=True))

    with (
        torch.no_grad(), steer(model, plan, saes=sae), capture(model, sae.site, side="before") as reads,
        capture(model, sae.site_out) as tape,
    ):  # fmt: skip
        model(IDS)

    x = reads[sae.site]
    assert laws.distance(tape[sae.site_out], sae.decode(sae.encode(x), x)) <= 1e-5


def test_skip_path_is_part_of_the_reconstruction_and_not_of_the_edit():
    model, sae = shared("llama"), TRANSCODERS["skip"]

    with steer(model, CLAMP, saes=sae):
        found = model(IDS).logits
    with steer(model, CLAMP, saes=replace(sae, skip=None)):
        again = model(IDS).logits

    assert laws.same_bits(found, again)


def test_transcoder_between_streams_of_different_widths():
    model, sae = shared("llama"), transcoder("mlp_normed", "mlp_post", d_out=HIDDEN)
    with ByHand(model, "llama", CLAMP, sae) as hand:
        expected = model(IDS).logits

    with steer(model, CLAMP, saes=sae) as run:
        found = model(IDS).logits

    assert laws.distance(found, expected) <= 1e-5
    assert positions(run) == hand.positions


@pytest.mark.parametrize(("d_in", "d_out", "found"), [
    (D + 1, D, r"at mlp_in\.1: it reads vectors of width 33, and mlp_in\.1 carries width 32"),
    (D, D + 1, r"at mlp_out\.1: it writes vectors of width 33, and mlp_out\.1 carries width 32"),
])  # fmt: skip
def test_transcoder_of_the_wrong_width_at_either_end_is_refused(d_in, d_out, found):
    sae = transcoder(d_in=d_in, d_out=d_out)

    with pytest.raises(WidthMismatch, match=found), steer(shared("llama"), CLAMP, saes=sae):
        pass


@pytest.mark.parametrize("kind", ["mlp_in", "resid_mid", "mlp_normed", "layer_norm"])
def test_cached_generation_equals_uncached_generation(kind):
    model, sae = shared("llama"), TRANSCODERS[kind]

    with steer(model, CLAMP, saes=sae) as cached:
        found = model.generate(IDS, **GREEDY)
    with steer(model, CLAMP, saes=sae) as uncached:
        again = model.generate(IDS, **GREEDY, use_cache=False)

    assert found.tolist() == again.tolist() != model.generate(IDS, **GREEDY).tolist()
    assert positions(cached) == positions(uncached)
    assert max(max(row, default=0) for row in positions(cached)[0][0]) >= IDS.shape[1]


@pytest.mark.parametrize("kind", ["mlp_in", "resid_mid", "mlp_normed"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_and_batch_mates_do_not_matter(name, kind):
    model, sae = shared(name), TRANSCODERS[kind]
    places = (MASK.cumsum(-1) - 1).clamp_min(0)

    with steer(model, CLAMP, saes=sae) as batched:
        found = model(PADDED, attention_mask=MASK, position_ids=places).logits
    for row in range(2):
        real = MASK[row].bool()
        with steer(model, CLAMP, saes=sae) as solo:
            alone = model(PADDED[row : row + 1, real]).logits

        assert laws.distance(found[row : row + 1, real], alone) <= 2e-5
        assert [rule[0][row] for rule in positions(batched)] == [rule[0][0] for rule in positions(solo)]


def test_beams_of_a_transcoder_equal_beams_without_a_cache():
    model, sae, beams = shared("llama"), TRANSCODERS["resid_mid"], WORDS | {"num_beams": 3, "num_return_sequences": 3}

    with steer(model, CLAMP, saes=sae) as run:
        found = model.generate(IDS, **beams)
    with steer(model, CLAMP, saes=sae):
        again = model.generate(IDS, **beams, use_cache=False)

    assert found.tolist() == again.tolist()
    assert all(row for row in positions(run)[0][0])


def test_one_plan_per_row_leaves_the_other_row_as_it_was():
    model, sae = shared("llama"), TRANSCODERS["resid_mid"]

    with steer(model, [CLAMP, None], saes=sae):
        found = model(IDS).logits

    plain = model(IDS).logits
    assert laws.same_bits(found[1], plain[1])
    assert laws.distance(found[0], plain[0]) > 0.05


SAE_OUT = replace(tiny.tiny_sae(seed=3, name="out"), site=Site("mlp_out", LAYER))
SAE_MID = replace(tiny.tiny_sae(seed=4, name="mid"), site=Site("resid_mid", LAYER))
SAE_PRE = replace(tiny.tiny_sae(seed=6, name="pre"), site=Site("resid_pre", LAYER))


def edits_of(sae: SAE, x: Tensor, value: float) -> Tensor:
    """What `Clamp(value, when="always")` on `LATENTS` adds to ``x``; nothing at BOS."""
    df = value - activations(x, sae)[..., list(LATENTS)]
    return (df @ sae.W_dec.double()[list(LATENTS)] * (IDS != BOS)[..., None]).to(x.dtype)


@contextmanager
def watching(module: nn.Module, look: Callable[[Tensor], Any]) -> Iterator[None]:
    """Show ``look`` what a module gives."""
    handle = module.register_forward_hook(lambda module, args, output: look(first(output)))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def adding(module: nn.Module, change: Callable[[Tensor], Tensor], *, to_input: bool = False) -> Iterator[None]:
    """Add ``change(x)`` to what a module gives, or gets."""

    def before(module: nn.Module, args: Any) -> Any:
        return (args[0] + change(args[0]), *args[1:])

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        x = first(output) + change(first(output))
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = module.register_forward_pre_hook(before) if to_input else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", MODELS)
def test_transcoder_and_sae_at_the_written_site_read_the_same_stream(name):
    """The SAE encodes mlp_out as the MLP gave it, whatever the transcoder adds there."""
    model, sae = shared(name), TRANSCODERS["mlp_in"]
    module = block_of(model).get_submodule(family(name).post_mlp or "mlp")
    own: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(watching(module, lambda y: own.append(edits_of(SAE_OUT, y, 2.0))))
        stack.enter_context(ByHand(model, name, CLAMP, sae))
        stack.enter_context(adding(module, lambda y: own[0]))
        expected = model(IDS).logits

    with steer(model, plan_of(*CLAMP.rules, Rule("out", LATENTS, Clamp(2.0, when="always"))), saes=[sae, SAE_OUT]):
        found = model(IDS).logits

    assert laws.distance(found, expected) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["one plan", "transcoder outside", "transcoder inside"])
def test_transcoder_reads_its_site_after_the_edits_there(name, how):
    """resid_pre is edited, which moves resid_mid; that is edited too, and the transcoder reads the outcome."""
    model, sae = shared(name), TRANSCODERS["resid_mid"]
    block, its = block_of(model), family(name)
    middle, seen = block.get_submodule(its.post_attn or its.attn), {}
    edits = plan_of(*(Rule(key, LATENTS, Clamp(2.0, when="always")) for key in ("pre", "mid")))

    def edit_middle(added: Tensor) -> Tensor:
        return edits_of(SAE_MID, seen["x"] + added, 2.0)

    with adding(block, lambda x: edits_of(SAE_PRE, x, 2.0), to_input=True), ExitStack() as stack:
        stack.callback(block.register_forward_pre_hook(lambda module, args: seen.update(x=args[0])).remove)
        stack.enter_context(adding(middle, edit_middle))
        stack.enter_context(ByHand(model, name, CLAMP, sae))
        expected = model(IDS).logits
    plans = [CLAMP, edits] if how == "transcoder outside" else [edits, CLAMP]
    plans = [plan_of(*CLAMP.rules, *edits.rules)] if how == "one plan" else plans

    with ExitStack() as stack:
        for plan in plans:
            stack.enter_context(steer(model, plan, saes=[sae, SAE_MID, SAE_PRE]))
        found = model(IDS).logits

    assert laws.distance(found, expected) <= 1e-5


def test_nested_blocks_equal_one_flat_plan():
    model, saes = shared("llama"), [TRANSCODERS["mlp_normed"], SAE_OUT]
    other = plan_of(Rule("out", LATENTS, Clamp(2.0, when="always")))

    with steer(model, plan_of(*CLAMP.rules, *other.rules), saes=saes) as flat:
        expected = model(IDS).logits
    with steer(model, other, saes=saes) as outer, steer(model, CLAMP, saes=saes) as inner:
        found = model(IDS).logits

    assert laws.distance(found, expected) <= 1e-6
    assert positions(inner) + positions(outer) == positions(flat)


def test_one_latent_of_a_transcoder_in_two_nested_blocks_is_refused():
    model, sae = shared("llama"), TRANSCODERS["mlp_in"]

    refused = pytest.raises(OverlappingRules, match=r"latents \[1, 4, 7, 9, 20\]|latents \[1, 7, 20\]")
    with steer(model, CLAMP, saes=sae):
        with refused, steer(model, CLAMP, saes=sae):
            pass
        model(IDS)


def test_trigger_watches_what_the_transcoder_reads():
    model, sae = shared("llama"), TRANSCODERS["resid_mid"]
    watch = AnyActive((2, 3), 1.0)
    plan = plan_of(Rule("tc", LATENTS, Clamp(4.0, when="always"), trigger=watch))
    with capture(model, "resid_mid.1") as tape:
        model(IDS)
    fires = (activations(tape["resid_mid.1"], sae)[..., [2, 3]] > 1.0).any(-1) & (IDS != BOS)

    with steer(model, plan, saes=sae) as run:
        model(IDS)

    assert positions(run) == [(tuple(tuple(row.nonzero()[:, 0].tolist()) for row in fires),)]
    assert 0 < int(fires.sum()) < fires.numel() - 2


def test_amounts_in_norms_are_of_the_written_stream_and_those_in_maxima_of_the_latent():
    model, sae = shared("llama"), TRANSCODERS["resid_mid"]
    plan = plan_of(Rule("tc", (1,), Add(0.5, unit="norm")), Rule("tc", (2,), Add(0.25, unit="max"), start=2, stop=4))
    with capture(model, ["resid_mid.1", "mlp_out.1"]) as before:
        model(IDS)
    y = before["mlp_out.1"]
    expected = y + 0.5 * y.norm(dim=-1, keepdim=True) * sae.W_dec[1]
    expected[:, 2:4] += 0.25 * sae.maximum[2] * sae.W_dec[2]

    with steer(model, plan, saes=sae), capture(model, ["resid_mid.1", "mlp_out.1"]) as after:
        model(IDS)

    assert laws.distance(after["mlp_out.1"][:, 1:], expected[:, 1:]) <= 1e-6
    assert laws.same_bits(after["mlp_out.1"][:, 0], y[:, 0])
    assert laws.same_bits(after["resid_mid.1"], before["resid_mid.1"])


def test_report_measures_the_change_of_the_written_stream():
    model, sae = shared("llama"), TRANSCODERS["mlp_in"]
    with capture(model, "mlp_out.1") as tape:
        model(IDS)
    norms = tape["mlp_out.1"].norm(dim=-1)[:, 1:].flatten()
    size = float(2.0 * sae.W_dec[3].norm())

    with steer(model, plan_of(Rule("tc", (3,), Add(2.0))), saes=sae) as run:
        model(IDS)

    (entry,) = run.report.rules
    assert (entry.site, entry.tokens_edited) == ("mlp_out.1", 14)
    assert entry.mean_delta == pytest.approx(size, rel=1e-5)
    assert entry.mean_share == pytest.approx(float((size / norms).mean()), rel=1e-4)


class Told:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens: list[Tensor] = []

    def put(self, tokens: Tensor) -> None:
        self.tokens.append(tokens)

    def end(self) -> None:
        raise AssertionError("a token was to come first")


@pytest.mark.parametrize(("reads", "writes"), [
    (Site("mlp_in", 2), Site("mlp_out", 1)), (Site("mlp_out", 1), Site("mlp_in", 1)),
    (Site("mlp_in", 1), Site("resid_mid", 1)), (Site("resid_mid", 1), Site("attn_out", 1)),
    (Site("mlp_in", 1), Site("mlp_normed", 1)),
])  # fmt: skip
def test_transcoder_that_writes_before_it_reads_stops_the_pass_before_a_token_is_emitted(reads, writes):
    model, told = shared("llama"), Told()
    sae = replace(transcoder(), site=reads, site_out=writes)

    refused = pytest.raises(GuardNotApplied, match=f"{reads} was not passed before {writes}".replace(".", r"\."))
    with traces.nothing_left(model), refused, steer(model, CLAMP, saes=sae):
        model.generate(IDS[:1], **GREEDY, streamer=told)

    assert len(told.tokens) == 1  # the prompt


def test_site_without_site_out_is_refused_and_both_move_the_transcoder():
    model, sae = shared("llama"), TRANSCODERS["mlp_in"]
    half = plan_of(Rule("tc", LATENTS, Add(1.0), site=Site("mlp_in", 2)))
    whole = plan_of(Rule("tc", LATENTS, Add(1.0), site=Site("mlp_in", 2), site_out=Site("mlp_out", 2)))

    with pytest.raises(SiteNotFound, match="names only where it reads"), steer(model, half, saes=sae):
        pass
    with steer(model, whole, saes=sae) as run:
        model(IDS)

    assert run.report.rules[0].site == "mlp_out.2"


def test_plan_file_with_site_out_reads_back():
    plan = plan_of(Rule("tc", LATENTS, Add(1.0), site=Site("mlp_in", 2), site_out=Site("mlp_out", 2)))

    again = Plan.from_json(plan.to_json())

    assert again == plan
    assert '"site":"mlp_in.2","site_out":"mlp_out.2"' in plan.to_json()
    assert again.fingerprint() == plan.fingerprint()


OLD = (
    '{"name":"old","rules":[{"first":null,"latents":[1,2],"op":{"kind":"ablate"},"phase":"all","priority":null,'
    '"sae":"tc","site":"resid_post.1","special":false,"start":0,"stop":null,"trigger":null}],"saeguard":"plan",'
    '"schema":1}'
)


def test_plan_file_from_before_transcoders_stays_byte_for_byte_the_same():
    assert Plan.from_json(OLD).to_json() == OLD


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_block_leaves_no_hook_behind(kind):
    model, sae = shared("llama"), TRANSCODERS[kind]

    with traces.nothing_left(model):
        with steer(model, CLAMP, saes=sae):
            model(IDS)
        with steer(model, CLAMP, saes=sae), capture(model, ["resid_mid.1", "mlp_normed.1", "attn_out.1", "mlp_in.1"]):
            model(IDS)


@pytest.mark.parametrize("stream", ["resid_mid", "mlp_normed"])
@pytest.mark.parametrize("name", MODELS)
def test_capture_sees_a_stream_that_is_built_on_others_before_and_after_its_edits(name, stream):
    model, site = shared(name), Site(stream, LAYER)
    sae = tiny.tiny_sae(seed=9, site=site)
    plan = plan_of(Rule("tiny", LATENTS, Clamp(2.0, when="always")))
    with capture(model, site) as tape:
        model(IDS)
    plain = tape[site]

    with capture(model, site, side="before") as before, steer(model, plan, saes=sae), capture(model, site) as after:
        model(IDS)

    assert laws.same_bits(before[site], plain)
    assert laws.distance(after[site], plain + edits_of(sae, plain, 2.0)) <= 1e-6


class Block(nn.Module):
    def __init__(self, in_place: bool):
        super().__init__()
        self.up, self.in_place = nn.Linear(8, 8), in_place

    def forward(self, x):
        if self.in_place:
            x += self.up(x)
            return x
        return x + self.up(x)


class Blocks(nn.Module):
    def __init__(self, in_place: bool):
        super().__init__()
        self.embed, self.block, self.out = nn.Embedding(20, 8), Block(in_place), nn.Linear(8, 20)

    def forward(self, ids):
        return self.out(self.block(self.embed(ids)))


@pytest.mark.parametrize("way", ["block", "one pass"])
def test_stream_that_its_module_writes_into_is_read_as_it_flowed_past(way):
    torch.manual_seed(0)
    plain, in_place = Blocks(False), Blocks(True)
    in_place.load_state_dict(plain.state_dict())
    reads, writes = Site("resid_pre", 0), Site("resid_post", 0)
    sae = tiny.tiny_sae(d_in=8, name="t", activation="relu", site=reads)
    plan = Plan((Rule("t", (1, 2), Scale(3.0), special=True, site=reads, site_out=writes),))
    sites = SiteMap({"resid_pre.0": At("block", "input"), "resid_post.0": "block"}, tokens="ids", width=8)
    ids = torch.randint(3, 20, (2, 5))

    def edited(model):
        if way == "block":
            with steer(model, plan, saes=sae, layout=sites), torch.no_grad():
                return model(ids)
        ready = prepare(model, [plan], every_row=True, saes=sae, layout=sites)
        run = Run([plan], ready, every_row=True, prompt_tokens=None)
        one = OnePass(run, ready.places, Pass(2, 5, 0, None, ids, torch.ones_like(ids), ids.device))
        with torch.no_grad():
            return model.out(one.change(writes, model.block(one.change(reads, model.embed(ids)))))

    with torch.no_grad():
        assert not torch.equal(edited(plain), plain(ids))
    assert torch.equal(edited(in_place), edited(plain))
