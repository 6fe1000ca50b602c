"""One streaming pass counts what one latent at a time, one row at a time, counts; however it is cut, and again."""

import threading
from dataclasses import replace

import pytest
import torch

from saeguard import SAE, Add, Plan, Rule, Site, capture, load_model, load_sae, steer
from saeguard.activations import KINDS
from saeguard.errors import (
    ModelBusy,
    NotSliceable,
    ScoreMismatch,
    SiteNotFound,
    UnsupportedMode,
    WidthMismatch,
)
from saeguard.fingerprints import model_fingerprint
from saeguard.loaders import shipped
from saeguard.scoring import accumulators
from saeguard.scoring.accumulators import Accumulator, fired, pieces
from saeguard.scoring.cache import Cache
from saeguard.scoring.reading import SiteReader
from saeguard.scoring.statistics import gather
from saeguard.scoring.texts import Batch, Texts
from tests import tiny

FOUR = ("llama", "gemma2", "gpt2", "neox")
VECTORS = ("active", "sum", "sum_sq", "maximum", "document_sum", "document_sq", "document_active", "special_active",
           "special_sum", "top", "grouped_sum", "group_sum", "group_tokens")  # fmt: skip
EXACT = ("active", "document_active", "special_active", "top", "group_tokens", "maximum_row", "maximum_position")
NEEDED = {kind: {"top_k": 6} for kind, what in KINDS.items() if "top_k" in what.needs}
NEEDED["jumprelu"] = {"threshold": torch.full((48,), 0.7)}
PART = dict(  # noqa: C408
    W_dec=torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0], [0, -0.6, 0.8]]), b_enc=torch.zeros(5),
    b_dec=torch.tensor([0.1, 0, -0.1]), activation="jumprelu", threshold=torch.full((5,), 0.5), name="toy",
)  # fmt: skip
TOY = SAE(W_enc=PART["W_dec"].T.contiguous(), site=Site("resid_post", 0), **PART)
TOY_X = torch.tensor([[[10.0, 0, 0], [1, 0.2, 0], [0, 2, 0], [0.3, -1, 1]]])


def some_text(*, rows: int = 9, length: int = 11, side: str = "right", name: str = "text") -> Texts:
    """Rows of several lengths behind BOS, an EOS inside some, documents of one to three rows, two groups of tokens."""
    ids = tiny.prompt(rows, length, seed=3)
    ids[::2, 4] = tiny.EOS
    lengths = [length - row % 4 for row in range(rows)]
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    ids = ids.masked_fill(~mask, tiny.PAD)
    if side == "left":
        ids = torch.stack([row.roll(length - n) for row, n in zip(ids, lengths, strict=True)])
        mask = mask.flip(1)
    document = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 7])[:rows]
    text = Texts.from_ids(ids, special_ids=(tiny.PAD, tiny.BOS, tiny.EOS), mask=mask, document=document, name=name)
    return text.with_groups({"low": range(3, 12), "high": range(40, 61)}, before=1, after=2)


def alone(model, sae, text, latent, *, top_n):
    """What one latent does, from whole passes over single rows without padding: every sum by its definition."""
    found = dict.fromkeys(VECTORS, 0.0) | {"group_sum": [0.0] * len(text.groups), "where": (-1, -1)}
    documents: dict[int, list[float]] = {}
    for row in range(len(text.ids)):
        real = text.mask[row]
        ids = text.ids[row, real][None]
        with torch.no_grad(), capture(model, sae.site) as tape:
            model(ids, attention_mask=torch.ones_like(ids))
        f_all = sae.encode(tape[sae.site])[0].double()
        for position, column in enumerate(real.nonzero()[:, 0].tolist()):
            f, others = float(f_all[position, latent]), f_all[position]
            if int(text.ids[row, column]) in (tiny.PAD, tiny.BOS, tiny.EOS):
                found["special_active"] += f > 0
                found["special_sum"] += f
                continue
            found["active"] += f > 0
            found["sum"] += f
            found["sum_sq"] += f**2
            found["top"] += f > 0 and int((others > f).sum()) < top_n
            if f > found["maximum"]:
                found["maximum"], found["where"] = f, (row, position)
            documents.setdefault(int(text.document[row]), []).append(f)
            member = text.member[row, position]
            for g, inside in enumerate(member):
                found["group_sum"][g] += f * bool(inside)
            found["grouped_sum"] += f * bool(member.any())
    means = [sum(values) / len(values) for values in documents.values()]
    found |= {"document_sum": sum(means), "document_sq": sum(mean**2 for mean in means)}
    found["document_active"] = sum(mean > 0 for mean in means)
    return found


def assert_same(a, b, *, exactly: bool = False):
    for name in (*VECTORS, "maximum_row", "maximum_position"):
        one, other = getattr(a, name), getattr(b, name)
        same = torch.equal(one, other) if exactly or name in EXACT else torch.allclose(one, other, rtol=1e-5)
        assert same, name
    assert (a.n_tokens, a.n_special, a.n_documents) == (b.n_tokens, b.n_special, b.n_documents)


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_one_pass_counts_what_one_latent_at_a_time_counts(name, activation):
    model, sae, text = tiny.tiny_model(name), tiny.tiny_sae(activation=activation), some_text().packed

    found = gather(model, sae, {"a": text}, top_n=3, batch_rows=4).of("a")

    for latent in range(0, sae.d_sae, 7):
        expected = alone(model, sae, text, latent, top_n=3)
        for field in set(VECTORS) - {"group_sum", "group_tokens"}:
            assert float(getattr(found, field)[latent]) == pytest.approx(float(expected[field]), rel=1e-4), field
        assert found.group_sum[:, latent].tolist() == pytest.approx(expected["group_sum"], rel=1e-4)
        assert (int(found.maximum_row[latent]), int(found.maximum_position[latent])) == expected["where"]
    assert found.n_tokens == int(text.kept.sum())
    assert found.n_documents == 5
    assert found.n_special == int((text.mask & text.special).sum())
    assert found.group_tokens.tolist() == text.member.sum((0, 1)).tolist()


@pytest.mark.parametrize("activation", ["jumprelu", "topk", "relu"])
def test_batch_size_padding_side_slices_and_blocks_change_nothing(monkeypatch, activation):
    model, sae = tiny.tiny_model("gpt2"), tiny.tiny_sae(activation=activation)
    expected = gather(model, sae, {"a": some_text()}, per_text=True).of("a")

    found = {rows: gather(model, sae, {"a": some_text()}, batch_rows=rows, per_text=True).of("a") for rows in (1, 2, 5)}
    found["left"] = gather(model, sae, {"a": some_text(side="left")}, per_text=True).of("a")
    monkeypatch.setattr(accumulators, "TOKENS", 7)
    monkeypatch.setattr(accumulators, "MOST", 5 * sae.d_sae)
    monkeypatch.setattr(accumulators.pieces, "__defaults__", (13,))
    found["cut"] = gather(model, sae, {"a": some_text()}, batch_rows=3, per_text=True).of("a")

    for other in found.values():
        assert_same(expected, other)
        for which in ("sum", "top"):
            one, two = (x.texts.matrix(which, sae.d_sae).to_dense() for x in (expected, other))
            assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)
    assert some_text().fingerprint == some_text(side="left").fingerprint
    assert found["left"].fingerprint == expected.fingerprint


def test_sums_per_document_add_up_to_the_text():
    model, sae = tiny.tiny_model(), tiny.tiny_sae()

    found = gather(model, sae, {"a": some_text()}, per_text=True, top_n=2).of("a")

    assert torch.allclose(found.texts.matrix("sum", sae.d_sae).to_dense().double().sum(0), found.sum, rtol=1e-5)
    assert torch.equal(found.texts.matrix("top", sae.d_sae).to_dense().double().sum(0), found.top)
    assert int(found.texts.n_tokens.sum()) == found.n_tokens
    assert float(found.top.sum()) <= 2 * found.n_tokens


def test_tokens_that_do_not_count_change_no_sum():
    model, sae, text = tiny.tiny_model(), tiny.tiny_sae(), some_text()
    widened = torch.cat([text.ids, torch.full((len(text.ids), 3), 17)], dim=1)
    more = Texts.from_ids(
        widened, special_ids=(tiny.PAD, tiny.BOS, tiny.EOS), document=text.document,
        mask=torch.cat([text.mask, torch.zeros(len(text.ids), 3, dtype=torch.bool)], dim=1),
    ).with_groups({"low": range(3, 12), "high": range(40, 61)}, before=1, after=2)  # fmt: skip
    unnamed = Texts.from_ids(text.ids, mask=text.mask, document=text.document)  # the model's config names its own

    found = gather(model, sae, {"a": text, "b": more, "c": unnamed})

    assert_same(found.of("a"), found.of("b"))
    assert torch.equal(found.of("a").sum, found.of("c").sum)
    assert found.of("c").n_special == found.of("a").n_special


def test_golden_activations_and_sums_of_the_toy_sae():
    special = torch.tensor([[True, False, False, False]])
    batch = Batch(range(1), torch.arange(4)[None], ~(special & ~special), ~special, special, torch.zeros(1).long(),
                  torch.zeros(1, 4, 0, dtype=torch.bool))  # fmt: skip
    sums = Accumulator(TOY, 0, top_n=2, per_text=False)

    (found,) = fired(pieces(TOY), TOY_X[0])
    sums.add(batch, TOY_X, torch.zeros_like(special))

    f = torch.zeros(4, 5, dtype=torch.float64)
    f[found.token, found.latent] = found.value
    golden = [[10, 0, 0, 6, 0], [1, 0, 0, 0.76, 0], [0, 2, 0, 1.6, 0], [0, 0, 1, 0, 1.4]]
    assert torch.allclose(f, torch.tensor(golden).double(), atol=1e-6)
    assert sums.tensors["sum"].tolist() == pytest.approx([1, 2, 1, 2.36, 1.4])
    assert sums.tensors["special_sum"].tolist() == pytest.approx([10, 0, 0, 6, 0])
    assert sums.tensors["top"].tolist() == [1, 1, 1, 2, 1]


@pytest.mark.parametrize("activation", [kind for kind in KINDS if kind != "pursuit"])
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_slices_list_what_encode_gives_for_every_kind(activation, norm):
    sae = replace(tiny.tiny_sae(activation="relu"), norm=norm, activation=activation, **NEEDED.get(activation, {}))
    x = torch.randn(9, tiny.D, generator=torch.Generator().manual_seed(0))

    f = torch.zeros(9, sae.d_sae, dtype=torch.float64)
    for found in fired(pieces(sae, 13), x):
        f[found.token, found.latent] = found.value

    assert torch.allclose(f, sae.encode(x).double(), atol=1e-5)


def test_negative_activations_count_in_sums_and_never_as_firing():
    model, sae = tiny.tiny_model(), replace(tiny.tiny_sae(activation="topk"), activation="abstopk")

    found = gather(model, sae, {"a": some_text()}).of("a")

    assert bool((found.sum < 0).any())
    assert bool((found.maximum >= 0).all())
    assert torch.equal(found.active > 0, found.maximum > 0)


def test_a_pass_of_another_thread_is_not_cut_short():
    model, sae, ids, said = tiny.fresh_model(), tiny.tiny_sae(), tiny.prompt(2, 6), []

    def meanwhile(*args):
        handle.remove()
        thread = threading.Thread(target=lambda: said.append(model(ids).logits))
        thread.start()
        thread.join()

    expected = model(ids).logits
    handle = model.register_forward_pre_hook(meanwhile)
    SiteReader(model, sae).read(ids)

    assert torch.equal(said[0], expected)


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_reading_ends_at_the_site_and_leaves_no_trace(name):
    model = tiny.fresh_model(name)
    ids = tiny.prompt(2, 6)
    hooks = {module: (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()}
    before, names = model(ids).logits, set(model.__dict__)
    streams = ["resid_pre.1", "resid_post.1", "attn_out.1", "mlp_out.0", "mlp_in.1", "resid_mid.1", "mlp_normed.1"]

    for site in map(Site.parse, streams):
        try:
            with torch.no_grad(), capture(model, site) as tape:
                model(ids)
        except SiteNotFound:  # a stream that this architecture does not have
            continue
        sae = tiny.tiny_sae(site=site)
        passed = []
        handle = model.get_output_embeddings().register_forward_hook(lambda *args, seen=passed: seen.append(1))
        x = SiteReader(model, sae).read(ids)
        handle.remove()

        assert torch.equal(x, tape[site]), site
        assert not passed
    after = {module: (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()}
    assert hooks == after
    assert set(model.__dict__) == names
    assert torch.equal(model(ids).logits, before)


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path):
    model, sae, cache = tiny.tiny_model(), tiny.tiny_sae(), Cache(tmp_path)
    text = some_text(rows=12)
    whole = gather(model, sae, {"a": text}, batch_rows=2, per_text=True).of("a")

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 8:
            raise Stop

    with pytest.raises(Stop):
        gather(model, sae, {"a": text}, batch_rows=2, per_text=True, cache=cache, save_every=1, progress=stop)
    seen = []
    found = gather(
        model, sae, {"a": text}, batch_rows=2, per_text=True, cache=cache, progress=lambda *now: seen.append(now)
    )

    assert_same(found.of("a"), whole, exactly=True)
    assert torch.equal(found.of("a").texts.sum, whole.texts.sum)
    assert torch.equal(found.of("a").texts.document, whole.texts.document)
    assert seen[0] == (8, 12)
    assert seen[-1] == (12, 12)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_second_pass_is_read_from_the_cache_and_a_new_text_is_the_only_one_passed(tmp_path):
    model, sae, cache = tiny.fresh_model(), tiny.tiny_sae(), Cache(tmp_path)
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    first = gather(model, sae, {"a": some_text()}, cache=cache)
    ran = len(calls)

    second = gather(model, sae, {"other name": some_text(side="left")}, cache=cache)
    assert len(calls) == ran
    gather(model, sae, {"a": some_text(), "b": some_text(rows=5)}, cache=cache)

    assert len(calls) == ran + 1
    assert_same(first.of("a"), second.of("other name"), exactly=True)


def test_another_model_sae_setting_or_a_broken_file_is_passed_again(tmp_path):
    model, sae, cache, text = tiny.fresh_model(), tiny.tiny_sae(), Cache(tmp_path), some_text()
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    gather(model, sae, {"a": text}, cache=cache)

    def passes(sae=sae, **options) -> int:
        before = len(calls)
        gather(model, sae, {"a": text}, cache=cache, **options)
        return len(calls) - before

    assert passes() == 0
    assert passes(top_n=2) == 1
    assert passes(per_text=True) == 1
    assert passes(tiny.tiny_sae(seed=1)) == 1
    fingerprint = model_fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-3
    assert model_fingerprint(model) != fingerprint
    assert passes() == 1
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert passes() == 1
    assert passes() == 0


def test_what_cannot_be_counted_is_refused_by_name():
    model, sae, text = tiny.fresh_model(), tiny.tiny_sae(), some_text()
    refused = [
        (NotSliceable, "only 2 of them were read", sae.narrow([1, 2])),
        (SiteNotFound, "does not say at which site", replace(sae, site=None)),
        (WidthMismatch, "carries width 32", tiny.tiny_sae(d_in=16)),
    ]

    for error, message, wrong in refused:
        with pytest.raises(error, match=message):
            gather(model, wrong, {"a": text})
    plan = Plan((Rule(sae.name, (1,), Add(1.0)),))
    with steer(model, plan, saes=sae):
        with pytest.raises(ModelBusy, match="about the model without edits"):
            gather(model, sae, {"a": text})
        model(tiny.prompt())
    with capture(model, sae.site):
        watched = gather(model, sae, {"a": text})
    assert_same(watched.of("a"), gather(model, sae, {"a": text}).of("a"), exactly=True)
    with pytest.raises(UnsupportedMode, match="training mode"):
        gather(model.train(), sae, {"a": text})
    relu = tiny.tiny_sae(activation="relu")
    with pytest.raises(ScoreMismatch, match="some latents give is NaN or infinite"):
        gather(model.eval(), replace(relu, b_enc=relu.b_enc * float("nan")), {"a": text})
    with torch.no_grad():
        model.get_input_embeddings().weight[10] = float("inf")
    with pytest.raises(ScoreMismatch, match="the stream at resid_post.1 is NaN"):
        gather(model, sae, {"a": text})


def test_sample_of_real_latents_equals_its_slow_reference():
    model, tokenizer = load_model("smollm2-135m-instruct")
    sae = load_sae(next(name for name in shipped() if name.startswith("smollm2")))
    texts = ["The ferry left the harbour a little after six.", "Water expands when it freezes, which is odd."]
    text = Texts.from_text(texts, tokenizer, sae, context=8)

    found = gather(model, sae, {"a": text}, batch_rows=2).of("a")

    f = []
    for row in range(len(text.ids)):
        ids = text.ids[row, text.mask[row]][None]
        with torch.no_grad(), capture(model, sae.site) as tape:
            model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
        f.append(sae.encode(tape[sae.site])[0, text.kept[row, text.mask[row]]])
    f = torch.cat(f).double()
    for latent in f.sum(0).argsort(descending=True)[:40:8].tolist():
        assert float(found.sum[latent]) == pytest.approx(float(f[:, latent].sum()), rel=1e-4)
        assert float(found.active[latent]) == float((f[:, latent] > 0).sum())
        assert float(found.maximum[latent]) == pytest.approx(float(f[:, latent].max()), rel=1e-4)
    assert found.n_tokens == len(f)
    assert found.n_documents == 2
