"""Every row of the catalogue tells the truth about its score, and scores that share work give what they give alone."""

from dataclasses import replace

import pytest
import torch

from saeguard.errors import ScoreMismatch
from saeguard.scoring import catalogue
from saeguard.scoring.cache import Cache
from saeguard.scoring.catalogue import SCORES, Job, compute, find, needs_of, sets
from saeguard.scoring.labels import Label
from saeguard.scoring.losses import Questions
from saeguard.scoring.output_score import output_score
from saeguard.scoring.reading import SiteReader
from saeguard.scoring.table import ScoreTable
from saeguard.scoring.texts import Texts
from saeguard.scoring.token_confidence import token_confidence
from saeguard.scoring.topic_profile import topic_profile
from tests import tiny
from tests.words import word_tokenizer

ROLES = ("text", "forget", "retain", "positive", "negative", "chosen", "rejected", "reference")
SPECIAL = (tiny.PAD, tiny.BOS, tiny.EOS)
NAMES = [score.name for score in SCORES]


def embedder(texts: list[str]) -> torch.Tensor:
    """Words counted by their number."""
    rows = torch.zeros(len(texts), tiny.VOCAB)
    for row, text in zip(rows, texts, strict=True):
        for word in text.split():
            row[int(word[1:])] += 1
    return rows


def rows_of(role: str) -> Texts:
    ids = tiny.prompt(5, 9, seed=ROLES.index(role))
    text = Texts.from_ids(ids, special_ids=SPECIAL, name=role)
    return text.with_groups({"a": range(5, 15), "b": range(20, 40)}, before=0, after=0)


def words_of(text: Texts) -> list[str]:
    return [" ".join(f"w{token}" for token in row.tolist() if token > 2) for row in text.ids]


@pytest.fixture(scope="module")
def job() -> Job:
    """Everything that any score needs."""
    model, sae = tiny.tiny_model(), tiny.tiny_sae()
    texts = {role: rows_of(role) for role in ROLES}
    reference = words_of(texts["reference"])
    bare = Job(
        model, word_tokenizer(), sae, texts=texts, prefixes=("w5 w6 w7",), latents=(3, 1, 40), keep=5,
        embedder=embedder, documents={"reference": reference, "aligned": ["w5 w6", "w9"], "opposed": ["w30"]},
        questions=Questions(((1, 5, 6), (1, 8)), ((9, 10), (11, 12)), (0, 1), frozenset(SPECIAL)),
        labels=[Label(2, "w5"), Label(7, "w30")],
    )  # fmt: skip
    statistics = replace(bare, texts={"reference": texts["reference"]}, per_text=True).statistics
    return replace(bare, profile=topic_profile(statistics, reference, embedder=embedder))


@pytest.fixture(scope="module")
def everything(job) -> ScoreTable:
    return compute(NAMES, job)


@pytest.mark.parametrize("name", NAMES)
def test_row_says_what_its_score_gives(job, name):
    (score,) = find([name])

    table = compute([name], job)

    given = [column for column in table.columns if not column.startswith(("topic_opposed", "topic_contrast"))]
    assert sorted(given) == sorted(score.columns)
    assert table.meanings[score.columns[0]] == score.meaning
    assert table.provenance[score.columns[0]]["score"] in name


@pytest.mark.parametrize("name", NAMES)
def test_score_computed_with_all_others_is_the_score_computed_alone(job, everything, name):
    alone = compute([name], job)

    for column, values in alone.columns.items():
        torch.testing.assert_close(everything.columns[column], values, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("name", [score.name for score in SCORES if set(score.needs) - {"random", "embedder"}])
def test_score_without_what_it_needs_is_refused_by_name_before_any_work(job, name):
    bare = Job(job.model, job.tokenizer, job.sae)

    with pytest.raises(ScoreMismatch, match=rf"the score '{name}' of tiny: it needs '\w+'"):
        compute(["random", name], bare)


def test_output_score_and_token_confidence_share_one_sweep(job):
    seen = []
    both = compute(["output_score", "token_confidence"], replace(job, progress=lambda *told: seen.append(told)))

    options = {"prefixes": job.prefixes, "latents": job.latents}
    alone = output_score(job.model, job.tokenizer, job.sae, **options).join(
        token_confidence(job.model, job.tokenizer, job.sae, **options)
    )
    assert seen == [("output_score+token_confidence", 3, 3)]
    assert both.provenance == alone.provenance
    for name, column in alone.columns.items():
        assert torch.equal(both.columns[name].nan_to_num(9), column.nan_to_num(9)), name


def test_one_pass_feeds_all_activation_scores(job, monkeypatch):
    reads, read = [], SiteReader.read
    monkeypatch.setattr(SiteReader, "read", lambda self, ids: reads.append(len(ids)) or read(self, ids))

    compute(sets()["activation"], job)

    own = sum(len(job.texts[role].ids) for role in ("text", "forget", "retain", "positive", "negative"))
    assert sum(reads) == own + 64  # random tokens


def test_positive_and_negative_are_forget_and_retain_unless_given(job):
    fewer = replace(job, texts={role: job.texts[role] for role in ("forget", "retain")})
    renamed = {"positive": job.texts["forget"], "negative": job.texts["retain"]}

    found, expected = compute(["sta"], fewer), compute(["sta"], replace(job, texts=renamed))

    torch.testing.assert_close(found.column("sta"), expected.column("sta"), equal_nan=True)


def test_sets_are_the_usual_scores_of_their_family():
    found = sets()

    assert tuple(found) == catalogue.FAMILIES
    assert found["output"] == ("output_score", "token_confidence", "causal_effect")
    assert needs_of(found["activation"]) == {"text", "random", "forget", "retain", "positive", "negative"}
    assert needs_of(found["gradient"]) == {"forget", "retain", "questions"}


def test_names_are_unique_and_no_two_scores_give_one_column():
    columns = [column for score in SCORES for column in score.columns]

    assert len(set(NAMES)) == len(NAMES)
    assert len(set(columns)) == len(columns)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ScoreMismatch, match="there is none of that name. Known are: output_score, token_confidence"):
        find(["frequency", "vibes"])


def test_no_name_is_refused(job):
    with pytest.raises(ScoreMismatch, match="none is asked for"):
        compute([], job)


def test_profile_of_another_sae_is_refused(job):
    other = replace(job, sae=tiny.tiny_sae(seed=9))

    with pytest.raises(ScoreMismatch, match="the weights differ"):
        compute(["topic_profile"], other)


def test_interrupted_sweep_goes_on_where_it_was(job, tmp_path, monkeypatch):
    monkeypatch.setattr("saeguard.scoring.sweep.EVERY_S", 0.0)
    monkeypatch.setattr("saeguard.scoring.pushed.rows_at_once", lambda prefix, batch: 1)
    names, told = ["output_score", "token_confidence"], []

    def stop(stage, done, total):
        told.append(done)
        if len(told) == 3:  # after the second latent was written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute(names, replace(job, folder=tmp_path, progress=stop))
    resumed = compute(names, replace(job, folder=tmp_path, progress=lambda *args: told.append(args[1])))

    assert told == [1, 2, 3, 3]
    assert list(tmp_path.iterdir()) == []
    for name, column in compute(names, job).columns.items():
        assert torch.equal(resumed.columns[name].nan_to_num(9), column.nan_to_num(9))


def test_second_score_of_a_text_reads_it_from_the_cache(job, tmp_path, monkeypatch):
    kept = replace(job, cache=Cache(tmp_path))
    first = compute(["dsg"], kept)
    monkeypatch.setattr(SiteReader, "read", lambda self, ids: pytest.fail("the model ran again"))

    again = compute(["dsg", "farrell"], kept)

    assert torch.equal(again.column("dsg").nan_to_num(9), first.column("dsg").nan_to_num(9))


def test_checkpoint_of_other_weights_is_refused_whatever_the_models_are_called(job, tmp_path, monkeypatch):
    """Numbers of two models were once joined to one column when a model's file changed between two tries."""
    monkeypatch.setattr("saeguard.scoring.sweep.EVERY_S", 0.0)

    def stop(stage, done, total):
        if done > 1:
            raise KeyboardInterrupt

    for score in ("output_score", "causal_effect", "token_confidence_scaled"):
        monkeypatch.setattr(f"saeguard.scoring.{MODULES.get(score, score)}.rows_at_once", lambda prefix, batch: 1)
        asked = replace(job, folder=tmp_path, latents=range(48))
        with pytest.raises(KeyboardInterrupt):
            compute([score], replace(asked, progress=stop))
        with pytest.raises(ScoreMismatch, match="it holds the beginning of other scores"):
            compute([score], replace(asked, model=tiny.fresh_model(seed=1)))


MODULES = {"output_score": "pushed", "token_confidence_scaled": "token_confidence"}
