"""One backward pass gives what autograd gives one latent at a time, what a nudge by steer gives; it leaves no trace."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from saeguard import Add, Plan, Rule, Scale, Site, capture, load_model, load_sae, steer
from saeguard.engines import engine_for
from saeguard.errors import ModelBusy, NotSliceable, ScoreMismatch, WidthMismatch
from saeguard.loaders import shipped
from saeguard.scoring import gradients as module
from saeguard.scoring.attribution import attribution, grad_sae, gsae, gsae_keep, gsae_score
from saeguard.scoring.cache import Cache
from saeguard.scoring.fisher import fisher
from saeguard.scoring.gradients import GradientReader, gradients
from saeguard.scoring.losses import Questions, cross_entropy, log_probability, margin, probability
from saeguard.scoring.texts import Texts
from tests import tiny

FOUR = ("llama", "gemma2", "gpt2", "neox")
SPECIAL = (tiny.PAD, tiny.BOS, tiny.EOS)
small_sae = partial(tiny.tiny_sae, d_sae=24)
SAES = {
    "jumprelu": lambda: small_sae(),
    "topk": lambda: small_sae(activation="topk"),
    "layer_norm": lambda: replace(small_sae(activation="relu"), norm="layer_norm"),
    "const_norm": lambda: replace(small_sae(activation="topk"), norm="const_norm"),
    "middle": lambda: small_sae(activation="relu", site=Site("mlp_out", 1)),
    "transcoder": lambda: replace(
        small_sae(activation="relu", site=Site("mlp_in", 1)), site_out=Site("mlp_out", 1), norm="layer_norm"
    ),
}


def some_text(*, rows: int = 6, length: int = 9, side: str = "right", name: str = "text", seed: int = 3) -> Texts:
    """Rows of several lengths behind BOS, with an EOS inside some of them."""
    ids = tiny.prompt(rows, length, seed=seed)
    ids[::2, 4] = tiny.EOS
    lengths = [length - row % 4 for row in range(rows)]
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    ids = ids.masked_fill(~mask, tiny.PAD)
    if side == "left":
        ids = torch.stack([row.roll(length - n) for row, n in zip(ids, lengths, strict=True)])
        mask = mask.flip(1)
    return Texts.from_ids(ids, special_ids=SPECIAL, mask=mask, name=name)


def some_questions(n: int = 5) -> Questions:
    ids = tiny.prompt(n, 8, seed=5)
    prompts = tuple(tuple(row[: 8 - i % 3].tolist()) for i, row in enumerate(ids))
    choices = tuple((3 + i, 20 + i, 40 + i, 20 + i) for i in range(n))
    return Questions(prompts, choices, tuple(2 * (i % 2) for i in range(n)), frozenset(SPECIAL))


def spliced(model, sae, ids, what):
    """f and dL/df of one row, where x is decode(f) + error with a leaf for every latent of f.

    ``what`` makes L of the row's logits.
    """
    writes = sae.site_out or sae.site
    with torch.no_grad(), capture(model, {sae.site, writes}) as tape:
        model(ids[None])
    x, y = tape[sae.site].float(), tape[writes].float()
    f = sae.encode(x)
    leaves = [column.clone().requires_grad_() for column in f.unbind(-1)]
    error = y - sae.decode(f, x)

    def splice(mod, args, output):
        x_hat = (sae.decode(torch.stack(leaves, -1), x) + error).to(tape[writes].dtype)
        return (x_hat, *output[1:]) if isinstance(output, tuple) else x_hat

    place = engine_for(model).resolve(writes)
    assert place.side == "output"
    handle = place.module.register_forward_hook(splice)
    try:
        value = what(model(ids[None]).logits[0].float())
    finally:
        handle.remove()
    return f[0], torch.stack(torch.autograd.grad(value, leaves), dim=-1)[0]


def row_nll(ids):
    def what(logits):
        terms = [-logits[t - 1].log_softmax(-1)[ids[t]] for t in range(1, len(ids)) if int(ids[t]) not in SPECIAL]
        return torch.stack(terms).sum()

    return what


def by_hand(model, sae, text):
    """f and dL/df at the counted tokens of a text, row by row without padding."""
    fs, gs = [], []
    for row in range(len(text.ids)):
        ids = text.ids[row, text.mask[row]]
        f, g = spliced(model, sae, ids, row_nll(ids))
        kept = torch.tensor([int(token) not in SPECIAL for token in ids])
        fs.append(f[kept])
        gs.append(g[kept])
    return torch.cat(fs), torch.cat(gs)


def close(a, b, *, rel: float = 1e-4) -> bool:
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return a.shape == b.shape and float((a - b).abs().max()) <= rel * max(float(b.abs().max()), 1e-12)


def whole(text):
    (batch,) = text.batches(len(text.ids))
    return batch


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("kind", SAES)
def test_gradients_equal_autograd_through_a_splice_with_a_leaf_per_latent(name, kind):
    model, sae, text = tiny.tiny_model(name), SAES[kind](), some_text()

    f, g = gradients(model, sae, whole(text), cross_entropy)

    expected_f, expected_g = by_hand(model, sae, text)
    assert close(f, expected_f)
    assert close(g @ sae.W_dec.T, expected_g)
    assert float(expected_g.abs().max()) > 1e-3


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("kind", ["margin", "log_p", "p"])
def test_losses_of_questions_equal_autograd_through_a_splice(name, kind):
    model, sae, questions = tiny.tiny_model(name), SAES["layer_norm"](), some_questions(3)
    losses = {"margin": margin, "log_p": log_probability, "p": probability}

    f, g = gradients(model, sae, whole(questions.text), losses[kind](questions))

    at = 0
    for prompt, choices, gold in zip(questions.prompts, questions.choices, questions.gold, strict=True):
        wrong = [c for i, c in enumerate(choices) if i != gold]
        what = {
            "margin": lambda z, c=choices[gold], w=wrong: z[-1][c] - torch.stack([z[-1][t] for t in w]).mean(),
            "log_p": lambda z, c=choices[gold]: z[-1].log_softmax(-1)[c],
            "p": lambda z, c=choices[gold]: z[-1].softmax(-1)[c],
        }[kind]
        expected_f, expected = spliced(model, sae, torch.tensor(prompt), what)
        n = len(prompt) - 1  # BOS does not count
        assert close(f[at : at + n], expected_f[1:])
        assert close(g[at : at + n] @ sae.W_dec.T, expected[1:])
        at += n
    assert at == len(f)


@pytest.mark.parametrize("site", ["resid_pre.1", "resid_mid.1", "resid_post.2", "mlp_out.0", "mlp_normed.1"])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "const_norm"])
def test_finite_differences_through_steer_agree(site, norm):
    """What is differentiated is what a rule adds, at sites that are built on others and through gains too."""
    model = tiny.tiny_model()
    sae = replace(small_sae(activation="relu", site=Site.parse(site)), norm=norm)
    ids = torch.tensor([tiny.BOS, 5, 9, 33, 7])
    text = Texts.from_ids(ids[None], special_ids=SPECIAL)
    _, g = gradients(model, sae, whole(text), cross_entropy)
    token, eps = 2, 2e-2

    for latent in (0, 7, 19):
        values = []
        for sign in (1, -1):
            rule = Rule(sae.name, (latent,), Add(sign * eps), start=token + 1, stop=token + 2)
            with torch.no_grad(), steer(model, Plan((rule,)), saes=sae):
                values.append(float(row_nll(ids)(model(ids[None]).logits[0])))
        slope = (values[0] - values[1]) / (2 * eps)
        assert slope == pytest.approx(float(g[token] @ sae.W_dec[latent]), rel=2e-2, abs=1e-3 * float(g.abs().max()))


def test_cross_entropy_leaves_special_tokens_and_padding_out():
    logits = torch.zeros(6, 9, tiny.VOCAB)

    values = cross_entropy(logits, whole(some_text()))

    counted = whole(some_text()).kept[:, 1:].sum(1)
    assert torch.allclose(values, counted * math.log(tiny.VOCAB))


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "layer_norm"])
def test_batch_size_padding_side_and_slices_change_nothing(monkeypatch, kind):
    model, sae, questions = tiny.tiny_model("gpt2"), SAES[kind](), some_questions()
    tables = lambda rows, side="right": fisher(
        model, sae, some_text(side=side), some_text(seed=8, side=side), batch_rows=rows
    ).join(
        attribution(model, sae, questions, batch_rows=rows, top_n=3),
        grad_sae(model, sae, questions, batch_rows=rows),
        gsae(model, sae, some_text(side=side), k=4, batch_rows=rows),
    )
    expected = tables(6)

    found = {rows: tables(rows) for rows in (1, 4)} | {"left": tables(3, "left")}
    original = module.pieces
    monkeypatch.setattr(module, "TOKENS", 5)
    monkeypatch.setattr(module, "MOST", 5 * sae.d_sae)
    monkeypatch.setattr(module, "pieces", lambda whole: original(whole, 13))
    monkeypatch.setattr("saeguard.scoring.fisher.LATENTS", 13)
    found["cut"] = tables(4)

    for case, other in found.items():
        assert set(other.columns) == set(expected.columns)
        for name, column in other.columns.items():
            assert torch.allclose(column, expected.columns[name], rtol=1e-3, atol=1e-7, equal_nan=True), (case, name)
    assert found["left"].provenance == expected.provenance


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "const_norm"])
def test_fisher_is_the_mean_of_squared_gradients(kind):
    model, sae = tiny.tiny_model("gemma2"), SAES[kind]()
    forget, retain = some_text(), some_text(seed=8)

    table = fisher(model, sae, forget, retain, batch_rows=4)

    expected = {}
    for role, text in (("forget", forget), ("retain", retain)):
        f, g = by_hand(model, sae, text)
        expected[f"fisher_{role}"] = g.square().mean(0)
        expected[f"weighted_fisher_{role}"] = (f * g).square().mean(0)
    for name, column in expected.items():
        assert close(table.column(name), column), name
    for name in ("fisher", "weighted_fisher"):
        ratio = table.column(f"{name}_ratio")
        assert torch.allclose(ratio, expected[f"{name}_forget"] / (expected[f"{name}_retain"] + 1e-21), rtol=1e-2)
    assert table.provenance["fisher_ratio"]["texts"]["forget"]["n_tokens"] == int(forget.kept.sum())


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_scores_of_questions_are_those_of_one_latent_at_a_time(name, kind):
    model, sae, questions = tiny.tiny_model(name), SAES[kind](), some_questions()
    top_n, n = 3, len(questions.prompts)

    table = attribution(model, sae, questions, top_n=top_n, batch_rows=2).join(grad_sae(model, sae, questions))

    expected = {column: torch.zeros(sae.d_sae) for column in ("sum", "peak", "top", "grad", "fires")}
    for prompt, choices, gold in zip(questions.prompts, questions.choices, questions.gold, strict=True):
        ids, wrong = torch.tensor(prompt), [c for i, c in enumerate(choices) if i != gold]
        f, g = spliced(model, sae, ids, lambda z, c=choices[gold], w=wrong: z[-1][c] - z[-1][w].mean())
        effect = (f * g)[1:]  # BOS does not count
        _, dp = spliced(model, sae, ids, lambda z, c=choices[gold]: z[-1].softmax(-1)[c])
        peaks = effect.amax(0)
        expected["sum"] += effect.sum(0) / n
        expected["peak"] += peaks.clamp(min=0) / n
        expected["top"][[j for j in range(sae.d_sae) if peaks[j] > 0 and int((peaks > peaks[j]).sum()) < top_n]] += (
            1 / n
        )
        expected["grad"] += (f * dp)[1:].relu().mean(0) / n
        expected["fires"] += (f[1:] > 0).sum(0)
    fires = expected["fires"] > 0
    pairs = {"attribution": "sum", "attribution_top": "top", "grad_sae": "grad"}
    for column, ours in pairs.items():
        assert close(table.column(column)[fires], expected[ours][fires]), column
        assert bool(table.column(column)[~fires].isnan().all())
    best = table.ranked("grad_sae")[: (int(fires.sum()) + 1) // 2]
    assert table.ranked("grad_sae_half") == best


def test_gsae_score_and_selection_have_the_golden_values():
    W_dec = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0], [0, -0.6, 0.8]])
    z, g_x = torch.tensor([0.5, 0.4, 0.1, 0.3, 0.2]), torch.tensor([0.0, 1, 2])

    score = gsae_score(z, W_dec @ g_x, beta=1.0)

    assert torch.allclose(score, torch.tensor([0.5, 0.8, 0.3, 0.54, 0.4]))
    assert torch.equal(gsae_keep(z, score, 2), torch.tensor([0, 0.4, 0, 0.3, 0]))


def test_gsae_of_a_topk_looks_behind_its_selection():
    model, text = tiny.tiny_model(), some_text()
    sae = SAES["topk"]()

    table = gsae(model, sae, text, beta=0.5, batch_rows=4)

    z, g = by_hand(model, replace(sae, activation="relu", top_k=None), text)
    score = gsae_score(z, g, beta=0.5)
    fires = (z > 0).any(0)
    kept = gsae_keep(z, score, 6) > 0
    assert close(table.column("gsae")[fires], score.mean(0)[fires])
    assert close(table.column("gsae_top")[fires], kept.float().mean(0)[fires])


@pytest.mark.parametrize("toward", ["margin", "log_p"])
def test_a_latent_that_writes_the_right_answer_is_on_top_of_attribution(toward):
    model, right, planted = tiny.tiny_model(), 17, 19
    sae = small_sae(activation="relu", site=Site("resid_post", tiny.LAYERS - 1))
    answer = model.get_output_embeddings().weight.detach()[right]
    W_enc, b_enc, W_dec = sae.W_enc.clone(), sae.b_enc.clone(), sae.W_dec.clone()
    W_enc[:, planted], b_enc[planted] = 0, 20.0  # it fires everywhere, as strongly as others do
    W_dec[planted] = answer / answer.norm() * sae.W_dec.norm(dim=1).mean()
    prompts = tuple(tuple(row.tolist()) for row in tiny.prompt(6, 6, seed=2))
    questions = Questions(prompts, ((right, 3, 40, 50),) * 6, (0,) * 6, frozenset(SPECIAL))

    table = attribution(model, replace(sae, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec), questions, toward=toward)

    assert table.ranked("attribution")[0] == planted
    assert table.ranked("attribution_peak")[0] == planted


@pytest.mark.parametrize("wanted", [True, False])
def test_nothing_is_left_behind(wanted):
    model, sae = tiny.fresh_model(), small_sae()
    for parameter in model.parameters():
        parameter.requires_grad_(wanted)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    before = [parameter.clone() for parameter in model.parameters()]

    gradients(model, sae, whole(some_text()), cross_entropy)
    with pytest.raises(RuntimeError, match="boom"):
        gradients(model, sae, whole(some_text()), boom)

    assert torch.is_grad_enabled()
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all(p.grad is None and p.requires_grad is wanted for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not model.training


def boom(logits, batch):
    raise RuntimeError("boom")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients_get_them_and_stay_without(mode):
    model, sae = tiny.tiny_model(), small_sae()
    expected = gradients(model, sae, whole(some_text()), cross_entropy)

    with mode():
        found = gradients(model, sae, whole(some_text()), cross_entropy)
        still = torch.is_grad_enabled()

    assert not still
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nothing_below_the_site_is_recorded():
    model, sae = tiny.tiny_model(), small_sae(site=Site("resid_post", 1))
    recorded = []
    handles = [
        layer.register_forward_hook(lambda m, a, out: recorded.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]

    gradients(model, sae, whole(some_text()), cross_entropy)
    for handle in handles:
        handle.remove()

    assert [stream.requires_grad for stream in recorded] == [False, False, True]


def test_a_bfloat16_model_gives_the_gradients_of_its_float32_copy():
    sae, text = small_sae(activation="relu"), some_text()
    _, exact = gradients(tiny.fresh_model(), sae, whole(text), cross_entropy)

    _, g = gradients(tiny.fresh_model(dtype=torch.bfloat16), sae, whole(text), cross_entropy)

    assert g.dtype == torch.float32
    assert float(torch.cosine_similarity(g.flatten(), exact.flatten(), dim=0)) > 0.97


def test_an_interrupted_pass_goes_on_and_a_second_one_is_free(tmp_path):
    model, sae, cache = tiny.tiny_model(), small_sae(), Cache(tmp_path)
    texts = (some_text(), some_text(seed=8))
    expected = fisher(model, sae, *texts, batch_rows=1)
    seen: list[tuple[int, int]] = []

    def interrupt(done, total):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fisher(model, sae, *texts, batch_rows=1, cache=cache, save_every=2, progress=interrupt)
    found = fisher(
        model, sae, *texts, batch_rows=1, cache=cache, save_every=2, progress=lambda *told: seen.append(told)
    )
    again = fisher(model, sae, *texts, cache=cache, batch_rows=3, progress=lambda *told: seen.append(told))

    assert [done for done, _ in seen] == [6, 9, 10, 11, 12, 6, 12]
    assert all(total == 12 for _, total in seen)
    for table in (found, again):
        assert all(torch.equal(table.column(name), column) for name, column in expected.columns.items())
    assert not list(tmp_path.glob("*unfinished*"))


def test_a_cache_keeps_questions_with_other_answers_apart(tmp_path):
    model, sae, questions, cache = tiny.tiny_model(), small_sae(), some_questions(), Cache(tmp_path)
    other = replace(questions, gold=tuple(2 - gold for gold in questions.gold))

    one, two = (attribution(model, sae, asked, cache=cache) for asked in (questions, other))

    assert one.provenance["attribution"]["data"] != two.provenance["attribution"]["data"]
    assert not torch.equal(one.column("attribution").nan_to_num(), two.column("attribution").nan_to_num())


def test_what_does_not_fit_is_refused():
    model, sae, questions = tiny.tiny_model(), small_sae(), some_questions()
    empty = Texts.from_ids(torch.tensor([[tiny.BOS, tiny.EOS]]), special_ids=SPECIAL)

    with pytest.raises(NotSliceable, match="gradients of all 24 latents"):
        GradientReader(model, sae.narrow([1, 2]))
    with pytest.raises(WidthMismatch, match="reads vectors of width 16"):
        GradientReader(model, small_sae(d_in=16))
    with pytest.raises(WidthMismatch, match="writes vectors of width 16"):
        GradientReader(model, replace(SAES["transcoder"](), W_dec=torch.zeros(24, 16), b_dec=torch.zeros(16)))
    with pytest.raises(ScoreMismatch, match="none of its tokens counts"):
        fisher(model, sae, empty, some_text())
    with pytest.raises(ScoreMismatch, match="toward 'joy'"):
        attribution(model, sae, questions, toward="joy")
    with pytest.raises(ScoreMismatch, match="k is None"):
        gsae(model, sae, some_text())
    with pytest.raises(ModelBusy), steer(model, Plan((Rule(sae.name, (1,), Add(1.0)),)), saes=sae):
        gradients(model, sae, whole(some_text()), cross_entropy)
    with pytest.raises(ScoreMismatch, match="NaN or infinite"):
        gradients(model, sae, whole(some_text()), lambda logits, batch: cross_entropy(logits * float("inf"), batch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ((1, 2), ())}, "prompt 1 has no token"),
        ({"gold": (0, 2)}, "question 1 has 2 choices, and gold is 2"),
        ({"choices": ((3, 4), (5, 5))}, "a wrong choice begins with the right one's token 5"),
        ({"gold": (0,)}, "1 gold"),
    ],
)
def test_questions_without_one_right_answer_are_refused(change, message):
    given = {"prompts": ((1, 2), (1, 3)), "choices": ((3, 4), (5, 6)), "gold": (0, 1)} | change

    with pytest.raises(ScoreMismatch, match=message):
        Questions(**given)


@pytest.fixture(scope="module")
def real():
    model, tokenizer = load_model("smollm2-135m-instruct")
    name = [name for name in shipped() if name.startswith("smollm2-135m-instruct")][-1]
    return model, tokenizer, load_sae(name)


def test_on_a_real_model_gradients_are_what_a_nudge_does(real):
    model, tokenizer, sae = real
    text = Texts.from_text(["The river Nile flows through the north of Africa to the sea."], tokenizer, sae)
    found = GradientReader(model, sae).read(whole(text), cross_entropy)
    f, token = found.sae.encode(found.x), 6
    column = int(text.kept[0].nonzero()[token])
    loss = lambda: float(cross_entropy(model(text.ids).logits.double(), whole(text)))

    slopes, expected = [], []
    for latent in f[token].topk(4).indices.tolist():
        values = []
        for amount in (0.5, -0.5):
            rule = Rule(sae.name, (latent,), Add(amount), start=column, stop=column + 1)
            with torch.no_grad(), steer(model, Plan((rule,)), saes=sae):
                values.append(loss())
        slopes.append(values[0] - values[1])
        expected.append(float(found.g[token] @ found.sae.W_dec[latent].float()))

    assert torch.allclose(torch.tensor(slopes), torch.tensor(expected), rtol=0.1, atol=2e-3)


def test_on_a_real_model_weakening_latents_costs_what_attribution_says(real):
    model, tokenizer, sae = real
    prompts = ["The capital of France is", "The capital of Japan is", "The capital of Italy is"]
    cities = (" Paris", " Tokyo", " Rome")
    questions = Questions.from_text(prompts, [cities] * 3, (0, 1, 2), tokenizer, sae)
    batch = whole(questions.text)

    table = attribution(model, sae, questions, batch_rows=2)

    def mean_margin(latents, factor):
        with torch.no_grad(), steer(model, Plan((Rule(sae.name, tuple(latents), Scale(factor)),)), saes=sae):
            logits = model(batch.ids, attention_mask=batch.real.long()).logits
        return float(margin(questions)(logits, batch).mean())

    ranked = table.ranked("attribution")
    for latents in (ranked[:10], ranked[-10:]):
        cost = (mean_margin(latents, 1.02) - mean_margin(latents, 0.98)) / 0.04
        assert cost == pytest.approx(float(table.column("attribution")[latents].sum()), rel=0.05)
    assert float(table.column("attribution")[ranked[:10]].sum()) > 0
