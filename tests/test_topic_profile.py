"""A topic profile knows what IBM's score knows of one text, and nothing is searched in a profile of something else."""

import hashlib
from dataclasses import replace

import pytest
import torch

from saeguard import load_sae
from saeguard.cards import read_card
from saeguard.errors import BrokenFile, ScoreMismatch, UnsupportedFormat
from saeguard.latents import LatentTable
from saeguard.loaders import shipped
from saeguard.scoring.select import Bound, select
from saeguard.scoring.sentences import minilm
from saeguard.scoring.statistics import PerText, Statistics, gather
from saeguard.scoring.texts import Texts
from saeguard.scoring.topic import topic
from saeguard.scoring.topic_profile import FILE, TopicProfile, draw_passages, topic_profile
from tests import tiny

SPECIAL = (tiny.PAD, tiny.BOS, tiny.EOS)
HALF = 2e-3
"""What float16 vectors may put a squared distance off by."""


def bag(texts: list[str]) -> torch.Tensor:
    """Words counted in the places that their SHA-256 says, and something that all texts have in common."""
    rows = torch.zeros(len(texts), 48)
    rows[:, 0] = 2.0
    for row, text in zip(rows, texts, strict=True):
        for word in text.split():
            row[hashlib.sha256(word.encode()).digest()[0] % 48] += 1
    return rows


@pytest.fixture(scope="module")
def gathered():
    """Statistics of a tiny model over documents of several lengths, and these as words; one latent never fires."""
    ids = tiny.prompt(14, 12, seed=4)
    mask = torch.arange(12) < (12 - torch.arange(14) % 5)[:, None]
    ids = ids.masked_fill(~mask, tiny.PAD)
    text = Texts.from_ids(ids, special_ids=SPECIAL, mask=mask, name="reference")
    sae = tiny.tiny_sae()
    sae = replace(sae, b_enc=sae.b_enc.index_fill(0, torch.tensor([5]), -1e4))
    words = [" ".join(f"w{token}" for token in row[real].tolist()) for row, real in zip(ids, mask, strict=True)]
    return gather(tiny.tiny_model(), sae, {"reference": text}, per_text=True), words, sae


@pytest.fixture(scope="module")
def profile(gathered):
    statistics, words, _ = gathered
    return topic_profile(statistics, words, embedder=bag, words=60)


def made_of(z: list[list[float]]) -> Statistics:
    """Statistics with these sums of activations per text and latent, and nothing else."""
    statistics = gather(tiny.tiny_model(), tiny.tiny_sae(d_sae=len(z[0])), {"reference": Texts.from_ids(
        tiny.prompt(len(z), 4), special_ids=SPECIAL)}, per_text=True)  # fmt: skip
    found = torch.tensor(z).to_sparse()
    document, latent = found.indices()
    values, counts = found.values(), torch.full((len(z),), 3)
    per_text = PerText(document, latent, values, torch.zeros_like(values), counts)
    corpus = replace(statistics.of("reference"), texts=per_text)
    return replace(statistics, corpora={"reference": corpus})


@pytest.mark.parametrize("about", ["w5 w6 w7", "w40", "w11 w12 w11 w60"])
def test_one_text_has_the_published_score(gathered, profile, about):
    statistics, words, _ = gathered
    expected = topic(statistics, words, [about], embedder=bag)

    found = profile.scores([about], embedder=bag)

    torch.testing.assert_close(
        found.column("topic_distance"), expected.column("topic_distance"), atol=HALF, rtol=0, equal_nan=True
    )
    s = expected.column("topic_distance")
    spread = float(s[~s.isnan()].max() - s[~s.isnan()].min())
    torch.testing.assert_close(found.column("topic"), expected.column("topic"), atol=4 * HALF / spread, rtol=0)
    assert torch.equal(found.column("topic_texts"), expected.column("topic_texts"))


def test_means_are_those_of_a_loop_over_texts_and_latents(gathered, profile):
    statistics, words, _ = gathered
    z = statistics.per_text("reference").matrix("sum", statistics.d_sae).to_dense().double()
    vectors = torch.nn.functional.normalize(bag(words), dim=-1).double()
    for latent in range(statistics.d_sae):
        above, below = torch.zeros(48, dtype=torch.float64), 0.0
        for i in range(len(words)):
            weight = float(z[i, latent]) / float(z[i].sum())
            above += weight * vectors[i]
            below += weight
        expected = above / below if below else above

        torch.testing.assert_close(profile.mean[latent].double(), expected, atol=5e-4, rtol=1e-3)


def test_several_texts_take_the_closest_per_latent_which_is_never_below_the_published_score(gathered, profile):
    statistics, words, _ = gathered
    texts = ["w5 w6", "w30 w31"]

    found = profile.scores(texts, embedder=bag).column("topic_distance")

    alone = [profile.scores([text], embedder=bag).column("topic_distance") for text in texts]
    published = topic(statistics, words, texts, embedder=bag).column("topic_distance")
    torch.testing.assert_close(found, torch.minimum(*alone), equal_nan=True)
    assert bool((found >= published - HALF)[~found.isnan()].all())


def test_latent_that_never_fires_has_the_score_that_was_asked_for_and_no_distance(profile):
    found = profile.scores(["w5"], embedder=bag, dead=-1.0)

    assert profile.texts[5] == 0
    assert float(found.column("topic")[5]) == -1.0
    assert bool(found.column("topic_distance")[5].isnan())
    assert bool(found.column("topic_centred")[5].isnan())
    assert bool(found.column("topic_cosine")[5].isnan())
    assert not bool(found.column("topic_centred").isnan()[profile.texts > 0].any())


def test_centred_column_finds_the_topic_where_the_published_one_finds_what_fires_once():
    """Latent 0 fires on all texts of the topic, among others of one word more; 1 fires everywhere, 2 on a stray one."""
    words = ["w5 w6", "w5 w7", "w5 w8", "w5", "w20 w21", "w30", "w40 w41", "w50 w51 w52"]
    z = [[4, 1, 0], [4, 1, 0], [4, 1, 0], [1, 1, 8], [1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]]
    profile = topic_profile(made_of([[float(x) for x in row] for row in z]), words, embedder=bag)

    table = profile.scores(["w5"], embedder=bag)

    assert table.ranked("topic")[0] == 2
    assert select(table, "topic_centred", top=1, bounds=(Bound("topic_texts", least=3),)).latents == (0,)
    for name in ("topic_centred", "topic_cosine"):
        assert table.column(name)[1] < table.column(name)[0]


def test_centred_column_ranks_one_text_as_the_profile_less_its_mean_does(profile):
    """The mean over latents is the same for all of them, so only the query's own mean can change the order."""
    query = torch.nn.functional.normalize(bag(["w5 w6"]), dim=-1)[0] - profile.reference
    expected = profile.mean.float() @ query
    expected[profile.texts == 0] = -9.0

    assert profile.scores(["w5 w6"], embedder=bag).ranked("topic_centred")[:10] == expected.topk(10).indices.tolist()


def test_profile_comes_back_from_its_file(profile, tmp_path):
    path = profile.save(tmp_path / "a" / "t.safetensors")

    found = TopicProfile.load(path)

    assert torch.equal(found.mean, profile.mean)
    assert torch.equal(found.texts, profile.texts.int())
    assert torch.equal(found.reference, profile.reference)
    assert (found.sae, found.embedder, found.provenance) == (profile.sae, profile.embedder, profile.provenance)
    assert [p.name for p in path.parent.iterdir()] == ["t.safetensors"]


def test_profile_is_found_in_the_folder_of_its_sae(profile, tmp_path, gathered):
    profile.save(tmp_path / FILE)

    assert TopicProfile.load(tmp_path, sae=gathered[2]).sae == "tiny"


def test_profile_of_other_weights_is_refused(profile, tmp_path):
    path = profile.save(tmp_path / FILE)

    with pytest.raises(ScoreMismatch, match="the topic profile of tiny for tiny: the weights differ"):
        TopicProfile.load(path, sae=tiny.tiny_sae(seed=8))


def test_query_by_another_embedder_is_refused(profile):
    def other(texts: list[str]) -> torch.Tensor:
        return bag(texts)

    with pytest.raises(ScoreMismatch, match="its profile was made with bag. Use that one"):
        profile.scores(["w5"], embedder=other)


def test_folder_without_a_profile_is_refused(tmp_path):
    with pytest.raises(UnsupportedFormat, match="there is no topics.safetensors there. Make one with"):
        TopicProfile.load(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:200], lambda data: data.replace(b"schema", b"schemx"), lambda _: b""]
)
def test_damaged_profile_is_refused(profile, tmp_path, damage):
    path = profile.save(tmp_path / FILE)
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(BrokenFile):
        TopicProfile.load(path)


def test_texts_other_than_those_of_the_statistics_are_refused(gathered):
    statistics, words, _ = gathered

    with pytest.raises(ScoreMismatch, match="there are 13 reference texts, and activations of 14 documents"):
        topic_profile(statistics, words[1:], embedder=bag)


def test_profile_of_silence_is_refused():
    with pytest.raises(ScoreMismatch, match="no latent fires on it"):
        topic_profile(made_of([[0.0, 0.0], [0.0, 0.0]]), ["w5", "w6"], embedder=bag)


def test_passages_are_drawn_evenly_from_files_and_the_rest_is_passed_on():
    long = [" ".join(f"a{i}" for i in range(1000))]
    short = [" ".join(f"b{i}" for i in range(22)), "too short"]

    drawn = draw_passages([long, short, long], 42, words=10)

    firsts = [passage[0] for passage in drawn]
    assert len(drawn) == 42
    assert firsts.count("b") == 2  # ten words each; the two that are left of 22 are too few
    assert firsts.count("a") == 40
    assert all(8 <= len(passage.split()) <= 10 for passage in drawn)


def test_draw_is_decided_by_its_seed():
    documents = [[" ".join(f"a{i}" for i in range(600))]]

    first, again, other = (draw_passages(documents, 20, words=10, seed=seed) for seed in (0, 0, 1))

    assert first == again
    assert first != other


def test_draw_of_nothing_is_refused():
    with pytest.raises(ScoreMismatch, match="no document has 8 words"):
        draw_passages([["a b"]], 5)


@pytest.mark.parametrize("name", [name for name, place in shipped().items() if (place / FILE).is_file()])
def test_shipped_profile_is_that_of_its_sae(name):
    profile = TopicProfile.load(name, sae=load_sae(name))

    assert profile.sae == name
    assert profile.mean.dtype == torch.float16
    assert (profile.texts > 0).float().mean() > 0.95
    assert read_card(name)["topics"]["texts"] == profile.provenance["texts"]


@pytest.mark.full
def test_shipped_profile_finds_latents_that_fire_on_words_of_the_topic():
    """Their words were measured on other text and by no embedding."""
    name = "smollm2-135m-instruct/resid_post.20"
    words = {"moon", "sun", "solar", "lunar", "star", "stars", "planet", "planets", "earth", "space", "orbit", "galaxy"}
    table = LatentTable.load(name)

    scores = TopicProfile.load(name).scores(["the planets and their moons"], embedder=minilm())

    best = select(scores, "topic_centred", top=10, bounds=(Bound("topic_texts", least=3),)).latents
    found = [latent for latent in best if words & {word.strip().lower() for word in table.row(latent).fires_on}]
    everywhere = sum(bool(words & {word.strip().lower() for word in row.fires_on}) for row in table.rows)
    assert len(found) >= 5
    assert len(found) / 10 > 5 * everywhere / len(table)
