"""Scores of what a latent does to the next token: each fast path is the one-latent-at-a-time path, only faster."""

import hashlib
import json
import threading
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from saeguard import SAE, Add, Plan, Rule, Site, capture, load_model, load_sae, steer
from saeguard.errors import (
    BrokenFile,
    GuardNotApplied,
    MissingMaximum,
    ModelBusy,
    NotSliceable,
    ScoreMismatch,
    UnsupportedMode,
    UnsupportedModel,
    WidthMismatch,
)
from saeguard.loaders import shipped
from saeguard.scoring import causal_effect as causal
from saeguard.scoring import sweep as sweeps
from saeguard.scoring.logit_lens import top_tokens, unembedding
from saeguard.scoring.next_token import amounts, divergence, prefix_ids, read_prefix, units
from saeguard.scoring.output_score import output_score, score_rows
from saeguard.scoring.token_confidence import confidence, token_confidence
from tests import laws, more_models, tiny
from tests.words import word_tokenizer

TEXT, OTHER = "w5 w9 w33 w20 w7 w11", "w8 w40 w3"
LATENTS = [0, 3, 17, 40]


@cache
def model_of(name: str) -> Any:
    if name != "gemma3_sliding":
        return tiny.tiny_model(name)
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        **{**tiny._GEMMA, "sliding_window": 4, "num_hidden_layers": 3},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    return model.eval()


def sae_at(site: str, **options: Any) -> SAE:
    return tiny.tiny_sae(site=Site.parse(site), **options)


def transcoder() -> SAE:
    return replace(sae_at("mlp_in.1"), site_out=Site.parse("mlp_out.1"))


def slow_logits(model: Any, tokenizer: Any, sae: SAE, text: str, latent: int, amount: float) -> Tensor:
    """One full pass for one latent, steered at the last token."""
    ids = torch.tensor([prefix_ids(tokenizer, text)])
    plan = Plan((Rule(sae.name, (latent,), Add(amount), start=ids.shape[1] - 1, special=True),))
    with torch.no_grad(), steer(model, plan, saes=sae):
        return model(ids).logits[0, -1].float()


def slow_f(model: Any, tokenizer: Any, sae: SAE, text: str) -> Tensor:
    ids = torch.tensor([prefix_ids(tokenizer, text)])
    with torch.no_grad(), capture(model, sae.site) as tape:
        model(ids)
    return sae.encode(tape[sae.site])[0, -1]


def slow_score(log_p: Tensor, own: Tensor) -> float:
    order = log_p.argsort(descending=True).tolist()
    ranks = [order.index(token) for token in own.tolist()]
    return (1 - min(ranks) / len(order)) * max(float(log_p[token].exp()) for token in own.tolist())


def traces(model: Any) -> list[Any]:
    return [
        (name, sorted(module.__dict__), list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


def same(a: Any, b: Any) -> None:
    assert list(a.columns) == list(b.columns)
    for name in a.columns:
        torch.testing.assert_close(a.columns[name], b.columns[name], rtol=2e-5, atol=1e-6, equal_nan=True)


# golden values


def test_output_score_and_confidence_have_the_published_numbers():
    log_p = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]] * 2).log_softmax(-1)
    base = torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0, -1.0]).log_softmax(-1)

    found = score_rows(log_p, torch.tensor([[1, 4], [0, 0]]))["output_score"]
    change = [float(confidence(log_p[0], k) - confidence(base, k)) for k in (1, 3)]

    assert found.tolist() == pytest.approx([0.170842, 0.557275], abs=1e-6)
    assert change == pytest.approx([-0.661652, 0.005014], abs=1e-6)


def test_amounts_are_multiples_of_the_largest_activation_of_any_latent():
    f = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.4])
    sae = sae_at("resid_post.1", d_sae=5)

    amount = 10.0 * units(sae, ["text"], lambda: f.amax()[None], "prefix")[0]

    assert (f + torch.eye(5)[0] * amount).tolist() == pytest.approx([14.0, 0.0, 1.0, 0.0, 1.4])


# the fast path is the slow one


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2", "gemma3_sliding", "qwen3"])
@pytest.mark.parametrize(
    "site", ["resid_post.1", "resid_post.2", "resid_pre.0", "resid_pre.1", "mlp_out.1", "attn_z.2"]
)
def test_fast_rows_are_one_steered_pass_per_latent(name, site):
    model, tokenizer, sae = model_of(name), word_tokenizer(), sae_at(site)
    prefix = read_prefix(model, tokenizer, sae, TEXT)

    fast = prefix.last.logits(torch.tensor([2.0, -3.0, 5.0, 9.0])[:, None] * prefix.directions(LATENTS))
    slow = [slow_logits(model, tokenizer, sae, TEXT, j, a) for j, a in zip(LATENTS, (2, -3, 5, 9), strict=True)]

    assert laws.distance(fast, torch.stack(slow)) <= 1e-5
    assert len(prefix.last.passed) == int(site[-1]) + (site.startswith("resid_post"))


@pytest.mark.parametrize(
    "sae",
    [
        sae_at("resid_post.1", activation="topk"),
        replace(sae_at("resid_post.1"), norm="layer_norm"),
        replace(sae_at("mlp_out.0"), norm="const_norm"),
        transcoder(),
    ],
    ids=["topk", "layer_norm", "const_norm", "transcoder"],
)
def test_fast_rows_hold_for_saes_that_rank_norm_or_transcode(sae):
    model, tokenizer = model_of("llama"), word_tokenizer()
    prefix = read_prefix(model, tokenizer, sae, TEXT)

    fast = prefix.last.logits(3.0 * prefix.directions(LATENTS))
    slow = [slow_logits(model, tokenizer, sae, TEXT, j, 3.0) for j in LATENTS]

    assert laws.distance(fast, torch.stack(slow)) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_fast_rows_hold_in_half_precision(name):
    model, tokenizer, sae = tiny.fresh_model(name, dtype=torch.bfloat16), word_tokenizer(), sae_at("resid_post.1")
    prefix = read_prefix(model, tokenizer, sae, TEXT)

    fast = prefix.last.logits(3.0 * prefix.directions(LATENTS))
    slow = [slow_logits(model, tokenizer, sae, TEXT, j, 3.0) for j in LATENTS]

    assert laws.distance(fast, torch.stack(slow)) <= 2e-2
    assert len(prefix.last.passed) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma3"])
def test_output_score_is_that_of_one_pass_per_latent(name):
    model, tokenizer, sae = model_of(name), word_tokenizer(), sae_at("resid_post.1")
    own = top_tokens(model, sae, k=3)

    table = output_score(model, tokenizer, sae, own=own, prefixes=[TEXT], latents=LATENTS, factor=2.0)
    amount = 2.0 * float(slow_f(model, tokenizer, sae, TEXT).max())
    slow = [slow_score(slow_logits(model, tokenizer, sae, TEXT, j, amount).log_softmax(-1), own[j]) for j in LATENTS]

    assert table.columns["output_score"][LATENTS].tolist() == pytest.approx(slow, rel=1e-4, abs=1e-6)
    assert int(table.columns["output_score"].isnan().sum()) == sae.d_sae - len(LATENTS)


def test_of_says_what_factors_multiply():
    model, tokenizer, sae = model_of("llama"), word_tokenizer(), sae_at("resid_post.1")
    read = [read_prefix(model, tokenizer, sae, text) for text in (TEXT, OTHER)]
    each = [float(slow_f(model, tokenizer, sae, text).max()) for text in (TEXT, OTHER)]

    batch, prefix, recorded = (amounts(read, 2.0, of) for of in ("batch", "prefix", "recorded"))

    assert [float(a[0]) for a in batch] == pytest.approx([2 * max(each)] * 2)
    assert [float(a[0]) for a in prefix] == pytest.approx([2 * one for one in each])
    assert torch.equal(recorded[0], 2.0 * sae.maximum)
    assert each[0] != pytest.approx(each[1])


def test_blocks_that_need_more_than_the_stream_from_below_are_all_run():
    """Some models hand keys from block to block: a short cut would then fail, or worse, be wrong."""
    model, tokenizer, sae = tiny.fresh_model("llama"), word_tokenizer(), sae_at("resid_post.1")
    below, above, handed = model.model.layers[0], model.model.layers[2], {}
    below.register_forward_hook(lambda m, a, out: handed.update(x=out) if "below" in handed else None)
    inner, outer = below.forward, above.forward

    def give(*args: Any, **kwargs: Any) -> Any:
        handed["x"] = inner(*args, **kwargs)
        return handed["x"]

    below.forward = give
    above.forward = lambda x, **kwargs: outer(x + handed.pop("x"), **kwargs)
    prefix = read_prefix(model, tokenizer, sae, TEXT)

    fast = prefix.last.logits(3.0 * prefix.directions(LATENTS))
    slow = [slow_logits(model, tokenizer, sae, TEXT, j, 3.0) for j in LATENTS]

    assert prefix.last.passed == ()
    assert laws.distance(fast, torch.stack(slow)) <= 1e-5
    assert below.forward is give


def test_batches_change_nothing():
    model, tokenizer, sae = model_of("gemma3_sliding"), word_tokenizer(), sae_at("mlp_out.1")
    texts = [TEXT, OTHER]

    whole = output_score(model, tokenizer, sae, prefixes=texts, batch=48)
    pieces = output_score(model, tokenizer, sae, prefixes=texts, batch=5)
    single = output_score(model, tokenizer, sae, prefixes=texts, batch=1)

    same(whole, pieces)
    same(whole, single)


def test_one_token_and_no_bos_is_a_prefix_like_any_other():
    model, tokenizer, sae = model_of("gpt2"), word_tokenizer(), sae_at("resid_post.1")
    tokenizer.bos_token = None
    prefix = read_prefix(model, tokenizer, sae, "w5")

    fast = prefix.last.logits(3.0 * prefix.directions([3]))

    assert prefix.ids.tolist() == [[5]]
    assert laws.distance(fast[0], slow_logits(model, tokenizer, sae, "w5", 3, 3.0)) <= 1e-5


# no trace


def test_scores_leave_no_trace_even_when_a_pass_is_interrupted():
    model, tokenizer, sae = tiny.fresh_model("llama"), word_tokenizer(), sae_at("resid_post.1")
    before = traces(model)
    prefix = read_prefix(model, tokenizer, sae, TEXT)
    assert traces(model) == before

    def stop(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        prefix.last.logits(prefix.directions([0]))
    handle.remove()

    assert traces(model) == before


def test_another_thread_meets_the_plain_model():
    model, tokenizer, sae = tiny.fresh_model("llama"), word_tokenizer(), sae_at("resid_post.1")
    prefix, ids, heard = read_prefix(model, tokenizer, sae, TEXT), tiny.prompt(rows=3), []
    plain = model(ids).logits

    def meanwhile(module: Any, args: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=lambda: heard.append(model(ids).logits))
        thread.start()
        thread.join()

    handle = model.model.layers[2].register_forward_pre_hook(meanwhile)
    prefix.last.logits(prefix.directions(LATENTS))

    assert laws.same_bits(heard[0], plain)


# interrupted and resumed


def test_an_interrupted_sweep_goes_on_where_it_was_and_refuses_another(tmp_path, monkeypatch):
    model, tokenizer, sae = model_of("llama"), word_tokenizer(), sae_at("resid_post.1")
    monkeypatch.setattr(sweeps, "EVERY_S", 0.0)
    file, told = tmp_path / "part.safetensors", []

    def interrupt(done: int, total: int) -> None:
        if done >= 30:
            raise KeyboardInterrupt

    whole = output_score(model, tokenizer, sae, prefixes=[TEXT], batch=10)
    with pytest.raises(KeyboardInterrupt):
        output_score(model, tokenizer, sae, prefixes=[TEXT], batch=10, checkpoint=file, progress=interrupt)
    with pytest.raises(ScoreMismatch, match="beginning of other scores"):
        output_score(model, tokenizer, sae, prefixes=[OTHER], batch=10, checkpoint=file)
    resumed = output_score(
        model, tokenizer, sae, prefixes=[TEXT], batch=10, checkpoint=file, progress=lambda *now: told.append(now)
    )

    assert told == [(30, 48), (40, 48), (48, 48)]
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(whole.columns[name], resumed.columns[name]) for name in whole.columns)


# planted


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_latent_that_writes_an_unembedding_row_is_found_at_the_top(name):
    model, tokenizer = model_of(name), word_tokenizer()
    sae = sae_at("resid_post.2")
    planted = sae.W_dec.clone()
    planted[7] = model.get_output_embeddings().weight[29]
    sae = replace(sae, W_dec=planted / planted.norm(dim=1, keepdim=True))

    own = top_tokens(model, sae, k=2)
    table = output_score(model, tokenizer, sae, own=own, prefixes=[TEXT])

    assert own[7, 0] == 29
    assert table.ranked("output_score")[0] == 7


# token confidence


@pytest.mark.parametrize("name", ["llama", "neox"])
@torch.no_grad()
def test_additive_confidence_is_that_of_one_pass_per_latent(name):
    model, tokenizer, sae = model_of(name), word_tokenizer(), sae_at("resid_post.1")
    plain = model(torch.tensor([prefix_ids(tokenizer, TEXT)])).logits[0, -1].log_softmax(-1)
    amount = 2.0 * float(slow_f(model, tokenizer, sae, TEXT).max())

    table = token_confidence(model, tokenizer, sae, ks=(1, 3), prefixes=[TEXT], latents=LATENTS, factor=2.0)

    for k in (1, 3):
        slow = [
            float(
                confidence(slow_logits(model, tokenizer, sae, TEXT, j, amount).log_softmax(-1), k)
                - confidence(plain, k)
            )
            for j in LATENTS
        ]
        assert table.columns[f"confidence_change_{k}"][LATENTS].tolist() == pytest.approx(slow, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@torch.no_grad()
def test_scaled_confidence_decodes_one_code_and_says_nothing_of_silent_latents(norm):
    model, tokenizer, sae = model_of("llama"), word_tokenizer(), replace(sae_at("resid_post.1"), norm=norm)
    ids = torch.tensor([prefix_ids(tokenizer, TEXT)])
    f = slow_f(model, tokenizer, sae, TEXT)
    plain = confidence(model(ids).logits[0, -1].log_softmax(-1))

    def replaced(latent: int) -> float:
        def hook(module: Any, args: Any, out: Tensor) -> Tensor:
            alone = torch.zeros(1, sae.d_sae)
            alone[0, latent] = 10.0 * f[latent]
            return torch.cat([out[:, :-1], sae.decode(alone, out[:, -1])[:, None]], dim=1)

        handle = model.model.layers[1].register_forward_hook(hook)
        log_p = model(ids).logits[0, -1].log_softmax(-1)
        handle.remove()
        return float(confidence(log_p) - plain)

    column = token_confidence(model, tokenizer, sae, reading="scaled", prefixes=[TEXT]).columns
    column, firing = column["confidence_change_scaled_1"], f.nonzero()[:, 0].tolist()

    assert torch.equal(column.isnan(), f == 0)
    assert 0 < len(firing) < sae.d_sae
    assert column[firing].tolist() == pytest.approx([replaced(j) for j in firing], rel=1e-4, abs=1e-5)


# causal effect


def slow_kl(model: Any, tokenizer: Any, sae: SAE, latent: int, amount: float) -> float:
    p = model(torch.tensor([prefix_ids(tokenizer, TEXT)])).logits[0, -1].double().log_softmax(-1)
    q = slow_logits(model, tokenizer, sae, TEXT, latent, amount).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


@torch.no_grad()
def test_causal_effect_is_the_kl_and_the_bisection_of_one_latent_at_a_time():
    model, tokenizer, sae = model_of("llama"), word_tokenizer(), sae_at("resid_post.1")

    table = causal.causal_effect(model, tokenizer, sae, prefixes=[TEXT], latents=LATENTS)

    for latent in LATENTS:
        low, high, middle, found = -3.0, 4.0, 2.0, float("nan")
        for _ in range(10):
            kl = slow_kl(model, tokenizer, sae, latent, 10**middle)
            if abs(kl - 0.5) <= 0.05:
                found = 10**middle
                break
            low, high = (middle, high) if kl < 0.5 else (low, middle)
            middle = (low + high) / 2
        row = table.row(latent)
        assert row["effect"] == pytest.approx(slow_kl(model, tokenizer, sae, latent, 1.0), rel=1e-3, abs=1e-6)
        assert row["strength_at_kl"] == pytest.approx(found, rel=1e-4, nan_ok=True)
    assert not table.columns["strength_at_kl"][LATENTS].isnan().any()


def test_a_kl_that_no_strength_has_is_not_a_number():
    model, tokenizer, sae = model_of("llama"), word_tokenizer(), sae_at("resid_post.1")

    table = causal.causal_effect(model, tokenizer, sae, kappa=1e6, prefixes=[TEXT], latents=LATENTS)

    assert table.columns["strength_at_kl"].isnan().all()
    assert table.meanings["strength_at_kl"].higher is False


def test_small_divergences_do_not_cancel():
    logits = torch.linspace(-3, 3, 500)
    near = logits + 1e-3 * torch.sin(torch.arange(500.0))
    exact = logits.double().log_softmax(-1), near.double().log_softmax(-1)

    found = divergence(logits.log_softmax(-1), near.log_softmax(-1)[None])

    assert float(found) == pytest.approx(float((exact[0].exp() * (exact[0] - exact[1])).sum()), rel=1e-2)
    assert divergence(logits.log_softmax(-1), logits.log_softmax(-1)[None]).tolist() == [0.0]


def test_large_divergences_are_numbers():
    plain, pushed = torch.zeros(50), torch.zeros(2, 50)
    plain[0] = -200.0  # less than a float32 probability can be
    pushed[0, 0], pushed[1, 1] = 300.0, -500.0
    clean, rows = plain.log_softmax(-1), pushed.log_softmax(-1)

    found = divergence(clean, rows)

    exact = (clean.double().exp() * (clean.double() - rows.double())).sum(-1)
    assert found.tolist() == pytest.approx(exact.tolist(), rel=1e-4)
    impossible = torch.tensor([float("-inf"), 0.0])
    assert divergence(impossible, impossible[None]).tolist() == [0.0]


# logit lens


@pytest.mark.parametrize("name", more_models.ALL)
def test_the_unembedding_found_is_the_one_behind_the_last_block(name):
    model = more_models.model_of(name)
    ids = tiny.prompt()
    with torch.no_grad(), capture(model, Site("resid_post", tiny.LAYERS - 1)) as tape:
        logits = model(ids).logits[0]

        found = unembedding(model)(tape[Site("resid_post", tiny.LAYERS - 1)][0])

    cap = getattr(model.config, "final_logit_softcapping", None)
    assert laws.distance(cap * torch.tanh(found / cap) if cap else found, logits) <= 1e-5


def test_top_tokens_are_those_of_each_row_alone():
    model, sae = more_models.model_of("gemma2"), sae_at("resid_post.1")
    head, norm = model.lm_head, model.model.norm

    found, chunked = top_tokens(model, sae, k=5), top_tokens(model, sae, k=5, chunk=7)
    slow = torch.stack([head(norm(row)).softmax(-1).topk(5).indices for row in sae.W_dec])
    bare = torch.stack([head(row).topk(5).indices for row in sae.W_dec])

    assert torch.equal(found, slow)
    assert torch.equal(found, chunked)
    assert torch.equal(top_tokens(model, sae, k=5, norm=False), bare)
    assert not torch.equal(found, bare)


def test_top_tokens_of_an_sae_that_was_read_in_part_keep_their_places():
    model, sae = model_of("llama"), sae_at("resid_post.1")

    found = top_tokens(model, sae.narrow([9, 4]), k=5)

    assert torch.equal(found[[4, 9]], top_tokens(model, sae, k=5)[[4, 9]])
    assert int((found < 0).all(1).sum()) == sae.d_sae - 2


def test_what_cannot_be_read_as_tokens_is_refused():
    model = model_of("llama")
    bodiless = tiny.fresh_model("llama")
    bodiless.model.last = bodiless.model.norm
    del bodiless.model.norm

    with pytest.raises(UnsupportedModel, match="no output embeddings"):
        unembedding(model.model)
    with pytest.raises(UnsupportedModel, match="no final norm under any of the names norm, ln_f"):
        unembedding(bodiless)
    with pytest.raises(WidthMismatch, match="width 48, and the unembedding reads 32"):
        top_tokens(model, sae_at("mlp_post.1", d_in=48))


# refusals


def test_an_sae_read_in_part_scores_by_recorded_maxima_only():
    model, tokenizer, sae = model_of("llama"), word_tokenizer(), sae_at("resid_post.1")
    whole = output_score(model, tokenizer, sae, prefixes=[TEXT], latents=[4, 9], of="recorded")

    part = output_score(model, tokenizer, sae.narrow([9, 4]), prefixes=[TEXT], of="recorded")

    assert part.columns["output_score"][[4, 9]].tolist() == pytest.approx(
        whole.columns["output_score"][[4, 9]].tolist(), rel=1e-5
    )
    with pytest.raises(NotSliceable, match="activations of all 48 latents"):
        output_score(model, tokenizer, sae.narrow([9, 4]), prefixes=[TEXT])


def test_what_cannot_be_scored_is_refused_by_name():
    model, tokenizer, sae = model_of("llama"), word_tokenizer(), sae_at("resid_post.1")
    silent = replace(sae, threshold=torch.full((48,), 1e6))

    with pytest.raises(ScoreMismatch, match="its last token is a special one"):
        output_score(model, tokenizer, sae, prefixes=["w5 </s>"])
    with pytest.raises(ScoreMismatch, match="its last token is a special one, or there is none"):
        output_score(model, tokenizer, sae, prefixes=[""])
    with pytest.raises(ScoreMismatch, match="there is no prefix"):
        output_score(model, tokenizer, sae, prefixes=[])
    with pytest.raises(ScoreMismatch, match="no latent fires at its last token"):
        output_score(model, tokenizer, silent, prefixes=[TEXT])
    with pytest.raises(ScoreMismatch, match="own tokens are given for 3 latents"):
        output_score(model, tokenizer, sae, own=torch.zeros(3, 2).long(), prefixes=[TEXT])
    with pytest.raises(MissingMaximum, match="it records none"):
        output_score(model, tokenizer, replace(sae, maximum=None), prefixes=[TEXT], of="recorded")
    with pytest.raises(ModelBusy, match="a steer or capture block is open"), capture(model, "resid_post.0"):
        output_score(model, tokenizer, sae, prefixes=[TEXT])


def test_an_edit_that_does_not_run_is_refused():
    prefix = read_prefix(model_of("llama"), word_tokenizer(), sae_at("resid_post.1"), TEXT)
    astray = replace(prefix.last, place=replace(prefix.last.place, module=torch.nn.Identity()))

    with pytest.raises(GuardNotApplied, match=r"1 edits of one token at resid_post\.1: they ran on \[\]"):
        astray.logits(prefix.directions([0]))


def test_a_model_whose_passes_differ_is_refused():
    model = tiny.fresh_model("llama")
    model.model.layers[2].register_forward_hook(lambda module, args, out: out + torch.randn(out.shape))

    with pytest.raises(GuardNotApplied, match="does not have the logits of the plain model"):
        read_prefix(model, word_tokenizer(), sae_at("resid_post.1"), TEXT)


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "part.safetensors"
    key = hashlib.sha256(json.dumps([[0], {}]).encode()).hexdigest()
    save_file({"x": torch.zeros(1)}, file, metadata={"saeguard_sweep": key, "done": "soon"})

    with pytest.raises(BrokenFile, match="checkpoint part.safetensors: ValueError"):
        sweeps.sweep([0], lambda rows: {}, batch=1, asked={}, checkpoint=file)


def test_a_model_in_training_mode_is_refused():
    model, sae = tiny.fresh_model("gpt2").train(), sae_at("resid_post.1")

    with pytest.raises(UnsupportedMode, match="the model is in training mode"):
        output_score(model, word_tokenizer(), sae, prefixes=[TEXT])


def test_provenance_names_model_text_and_settings():
    model, tokenizer, sae = model_of("llama"), word_tokenizer(), sae_at("resid_post.1")

    first, other = (
        output_score(model, tokenizer, sae, prefixes=[text], latents=[0]).provenance["output_score"]
        for text in (TEXT, OTHER)
    )

    assert (first["prefixes"], first["factor"], first["of"], first["own_tokens"]) == ([TEXT], 10.0, "batch", 20)
    assert len(first["data"]) == 64
    assert first["data"] != other["data"]


# the real model


def test_on_smollm2_the_fast_path_is_one_steered_pass_per_latent():
    model, tokenizer = load_model("smollm2-135m-instruct")
    names = [name for name in shipped() if name.startswith("smollm2-135m-instruct")]
    sae = load_sae(names[0]) if names else tiny.tiny_sae(d_in=576, site=Site("resid_post", 15))
    text, sample = "From my experience,", [0, sae.d_sae // 3, sae.d_sae - 1]
    own = torch.arange(20).expand(sae.d_sae, 20)

    table = output_score(model, tokenizer, sae, own=own, latents=sample)
    amount = 10.0 * float(slow_f(model, tokenizer, sae, text).max())
    slow = [slow_score(slow_logits(model, tokenizer, sae, text, j, amount).log_softmax(-1), own[j]) for j in sample]

    assert table.columns["output_score"][sample].tolist() == pytest.approx(slow, rel=1e-3, abs=1e-8)
