"""``score``, ``select`` and ``latents`` do what their help says, from files to plans, and refuse in words."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from saeguard import Plan
from saeguard.cli.texts import within
from saeguard.loaders import load_sae
from saeguard.loaders.native import save_sae
from saeguard.models import load_model
from saeguard.scoring import catalogue
from saeguard.scoring.forget_retain import farrell
from saeguard.scoring.labels import Label, read_labels, write_labels
from saeguard.scoring.output_score import output_score
from saeguard.scoring.statistics import gather
from saeguard.scoring.table import ScoreTable
from saeguard.scoring.texts import Texts
from saeguard.scoring.topic_profile import FILE, TopicProfile
from tests import tiny, words
from tests.test_cli import flat, run
from tests.test_scoring_labels import endpoint, says

TEXTS = {
    "forget": ["w5 w6 w7 w8 w5 w6", "w9 w5 w7", "w6 w6 w8 w11 w10"],
    "retain": ["w20 w21 w22 w23", "w30 w31 w32 w33 w34", "w40 w21"],
    "reference": [f"w{5 + i} w{20 + i} w{21 + i} w{6 + i} w{7 + i} w40 w41 w{30 + i}" for i in range(12)],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a described SAE, an embedder, and texts."""
    folder = tmp_path_factory.mktemp("scoring")
    words.save_model(folder / "model")
    words.save_described_sae(folder / "sae")
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(folder / "embedder")
    words.word_tokenizer().save_pretrained(folder / "embedder")
    for name, texts in TEXTS.items():
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(rows)
    asked = [
        {"question": "w5 w6", "choices": ["w7", "w8"], "gold": 0},
        {"question": "w9", "choices": ["w7", "w7"], "gold": 1},
        {"question": "w5", "choices": ["w11", "w12", "w13"], "gold": 2},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "corpus.txt").write_text(" ".join(f"w{3 + i * i % 50}" for i in range(400)))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEGUARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def here(place):
    return ("--sae", place / "sae", "--model", place / "model")


@pytest.fixture(scope="module")
def scored(place, tmp_path_factory):
    """What two commands wrote, one after the other."""
    path = tmp_path_factory.mktemp("scored") / "s.safetensors"
    given = ("--sae", place / "sae", "--model", place / "model", "--out", path, "--cache", path.parent / "cache")
    run("score", "--score", "farrell", "--forget", place / "forget.jsonl", "--retain", place / "retain.jsonl", *given)
    run("score", "--score", "output_score", "--prefix", "w5 w6", *given)
    return path


@pytest.mark.parametrize(
    "command", [("score",), ("select",), ("latents", "label"), ("latents", "profile")], ids=" ".join
)
def test_help_explains_the_command(command):
    assert len(flat(run(*command, "--help").output)) > 500


def test_list_names_every_score_and_what_it_needs():
    found = json.loads(run("score", "--list", "--json").stdout)

    assert [row["name"] for row in found] == [score.name for score in catalogue.SCORES]
    assert {row["name"]: row["needs"] for row in found}["dsg"] == ["forget", "retain"]
    text = flat(run("score", "--list").output)
    assert all(score.name in text and score.meaning.source.split()[0] in text for score in catalogue.SCORES)


def test_scores_are_those_of_the_functions(place, scored):
    model, tokenizer = load_model(place / "model")
    sae = load_sae(place / "sae")
    texts = {name: Texts.from_text(TEXTS[name], tokenizer, sae, name=name) for name in ("forget", "retain")}

    table = ScoreTable.load(scored)

    expected = farrell(gather(model, sae, texts)).join(output_score(model, tokenizer, sae, prefixes=["w5 w6"]))
    assert set(table.columns) == set(expected.columns)
    for name, column in expected.columns.items():
        torch.testing.assert_close(table.columns[name], column, equal_nan=True)
    assert table.provenance["farrell"]["texts"]["forget"]["fingerprint"] == texts["forget"].fingerprint
    assert not scored.with_name("s.safetensors.unfinished").exists()


def test_json_has_every_value_its_unit_and_where_it_came_from(place, here):
    found = json.loads(run("score", "--score", "random", "--sample", 3, "--seed", 4, "--json", *here).stdout)

    column = found["columns"]["random"]
    assert sum(value is not None for value in column["values"]) == 3
    assert (column["unit"], column["higher"], column["provenance"]["seed"]) == ("a random number", True, 4)
    assert found["written"] is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gradient", ("--forget", "forget.jsonl", "--retain", "retain.jsonl", "--questions", "questions.jsonl")),
        ("activation", ("--forget", "forget.jsonl", "--retain", "retain.jsonl", "--text", "reference.jsonl")),
        ("topic", ("--reference", "reference.jsonl", "--about", "w5 w6", "--opposed", "retain.jsonl",
                   "--embedder", "embedder")),
        ("output", ("--prefix", "w5 w6", "--latents", "3,4")),
    ],
)  # fmt: skip
def test_set_gives_the_columns_of_all_its_scores(place, here, name, options, tmp_path):
    files = [place / part if part.endswith((".jsonl", "embedder")) and "--" not in part else part for part in options]

    found = json.loads(run("score", "--set", name, *files, *here, "--out", tmp_path / "s.st", "--json").stdout)

    expected = {column for score in catalogue.find(catalogue.sets()[name]) for column in score.columns}
    assert expected <= set(found["columns"])
    assert set(ScoreTable.load(tmp_path / "s.st").columns) == set(found["columns"])


def test_questions_whose_choices_begin_alike_are_counted_out(place, here):
    found = json.loads(
        run("score", "--score", "attribution", "--questions", place / "questions.jsonl", *here, "--json").stdout
    )

    assert found["columns"]["attribution"]["provenance"]["n"] == 2


def test_groups_are_words_of_one_token(place, here, tmp_path):
    (tmp_path / "groups.json").write_text('{"a": ["w5"], "b": ["w20", "w21"]}')
    (tmp_path / "long.txt").write_text(" ".join(f"w{3 + i % 50}" for i in range(200)))

    options = ("--text", tmp_path / "long.txt", "--groups", tmp_path / "groups.json")
    found = json.loads(run("score", "--score", "reason", *options, *here, "--json").stdout)

    assert found["columns"]["reason"]["provenance"]["groups"] == ["a", "b"]


def test_tokens_are_a_budget_shared_by_files_and_drawn_by_seed(place, here):
    def seen(seed):
        files = ("--text", place / "reference.jsonl", "--text", place / "retain.jsonl")
        options = ("--tokens", 40, "--seed", seed, "--json")
        document = json.loads(run("score", "--score", "frequency", *files, *options, *here).stdout)
        return document["columns"]["frequency"]["provenance"]["texts"]["corpus"]

    first, again, other = seen(0), seen(0), seen(1)

    assert first == again
    assert first["fingerprint"] != other["fingerprint"]
    assert first["n_tokens"] <= 40


def test_pairs_of_texts_stay_together_under_a_budget():
    """One of two files that fits the budget was once kept in order while the other, a little too long, was shuffled."""
    tokenizer = words.word_tokenizer()
    short = [f"w{5 + i} w{20 + i}" for i in range(12)]
    long = [f"{text} w50" for text in short]

    fits = within({"chosen": short}, tokenizer, n_tokens=35, seed=3)
    cut = within({"rejected": long}, tokenizer, n_tokens=35, seed=3)

    assert fits == short
    assert [text.split()[0] for text in cut] == [text.split()[0] for text in short]
    assert sum(len(text.split()) for text in cut) <= 35


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a --score or a --set; --list shows them all"),
        (("--set", "best"), "--set best: sets are output, activation, gradient, topic"),
        (("--score", "best"), "the score 'best': there is none of that name. Known are: output_score"),
        (("--score", "dsg", "--forget", "F"), "the score 'dsg' of {sae}: it needs 'retain'"),
        (("--score", "random", "--forget", "F"), "none of random needs forget"),
        (("--score", "frequency", "--text", "text=nowhere.txt"), "text from nowhere.txt: no file is there"),
        (("--score", "random", "--latents", "1,x"), "--latents 1,x: write integers with commas"),
        (("--score", "generation_success"), "it needs 'latents'"),
        (("--score", "topic_profile", "--about", "w5", "--embedder", "E"), "there is no topics.safetensors there"),
        (("--score", "attribution", "--questions", "F"), "a row has no question and no choices and no gold"),
    ],
)
def test_score_refuses_in_words(place, here, arguments, message):
    stand_in = {"F": place / "forget.jsonl", "E": place / "embedder"}
    result = run("score", *(stand_in.get(part, part) for part in arguments), *here, status=2)

    assert message.format(sae=place / "sae") in flat(result.stderr)
    assert "Traceback" not in result.stderr


def test_scores_of_another_sae_are_not_joined(place, scored, tmp_path):
    save_sae(replace(tiny.tiny_sae(seed=5), name="other"), tmp_path / "other")
    before = scored.read_bytes()

    result = run("score", "--score", "random", "--sae", tmp_path / "other", "--model", place / "model", "--out", scored,
                 status=2)  # fmt: skip

    assert "their weights differ" in flat(result.stderr)
    assert scored.read_bytes() == before


def test_selection_becomes_a_plan_with_its_origin_beside_it(place, scored, tmp_path):
    target = tmp_path / "a" / "plan.json"
    bounds = (
        "--bound",
        "output_rank >= 0.2",
        "--percentile-bound",
        "output_rank<=95",
        "--within",
        "forget_frequency=40",
    )
    op = ("--op", "at_least", "--value", 1, "--unit", "max", "--phase", "generated", "--out", target)

    result = run("select", scored, "--by", "output_score", "--top", 3, *bounds, *op)

    plan = Plan.load(target)
    origin = json.loads((tmp_path / "a" / "plan.selection.json").read_text())
    assert len(plan.rules[0].latents) == 3
    assert plan.rules[0].phase == "generated"
    assert list(plan.rules[0].latents) == origin["latents"]
    assert origin["provenance"]["within"] == {"forget_frequency": 40}
    assert [bound["percentile"] for bound in origin["provenance"]["bounds"]] == [False, True]
    assert f"w{origin['latents'][0]} -> w9" in flat(result.output)


def test_selection_as_json_is_what_select_gives(scored):
    found = json.loads(run("select", scored, "--by", "forget_frequency", "--top", 4, "--json").stdout)

    assert found["selection"]["latents"] == ScoreTable.load(scored).ranked("forget_frequency")[:4]
    assert (found["plan"], found["written"]) == (None, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--by", "vibes"), "this table has"),
        (
            ("--by", "output_score", "--bound", "farrell>1"),
            "the bound 'farrell>1': write COLUMN>=NUMBER or COLUMN<=NUMBER",
        ),
        (("--by", "output_score", "--bound", "farrell>=e"), "the bound 'farrell>=e': write COLUMN>=NUMBER"),
        (("--by", "output_score", "--bound", "output_rank>=9"), "Loosen the bounds, or score more latents."),
        (("--by", "output_score", "--within", "farrell"), "--within farrell: write COLUMN=NUMBER, such as topic=500"),
        (("--by", "output_score", "--out", "plan.json"), "--out writes a plan, which needs --op"),
        (("--by", "output_score", "--value", "1"), "--value needs --op"),
        (
            ("--by", "output_score", "--op", "push", "--value", "1"),
            "--op push: ops are add, scale, clamp, at_least, at_most",
        ),
        (("--by", "output_score", "--op", "add"), "add needs an amount: --value"),
        (("--by", "output_score", "--op", "ablate", "--value", "1"), "ablate takes no amount"),
    ],
)
def test_select_refuses_in_words(scored, arguments, message):
    result = run("select", scored, *arguments, status=2)

    assert message in flat(result.stderr)


@pytest.fixture(scope="module")
def profiled(place, tmp_path_factory):
    """The SAE once more, with a profile beside it."""
    folder = tmp_path_factory.mktemp("profiled") / "sae"
    words.save_described_sae(folder)
    run("latents", "profile", "--reference", place / "reference.jsonl", "--out", folder / FILE, "--sae", folder,
        "--model", place / "model", "--embedder", place / "embedder", "--cache", folder.parent / "cache")  # fmt: skip
    return folder


def test_profile_says_what_it_was_made_from(profiled):
    profile = TopicProfile.load(profiled, sae=load_sae(profiled))

    assert profile.provenance["files"] == ["reference.jsonl"]
    assert profile.provenance["n_texts"] == 12
    assert int(profile.texts.max()) == 12


@pytest.mark.parametrize("rank", ["centred", "cosine", "published"])
def test_search_by_topic_ranks_by_the_profile(place, profiled, rank):
    options = ("--by", "topic", "--rank", rank, "--embedder", place / "embedder", "--texts", 2, "--top", 5)

    found = json.loads(run("latents", "search", "w5 w6", *options, "--sae", profiled, "--json").stdout)["hits"]

    from saeguard.scoring.sentences import minilm

    scores = TopicProfile.load(profiled).scores(["w5 w6"], embedder=minilm(place / "embedder"))
    column = "topic" if rank == "published" else f"topic_{rank}"
    expected = [j for j in scores.ranked(column) if scores.row(j)["topic_texts"] >= 2][:5]
    assert [hit["latent"] for hit in found] == expected
    assert found[0]["label"] == f"w{expected[0]} -> w9"
    assert {hit["by"] for hit in found} == {"topic"}


def test_search_by_labels_uses_those_that_are_given(place, profiled, tmp_path):
    labels = write_labels([Label(4, "w5 w6"), Label(9, "w40")], tmp_path / "labels.jsonl")
    options = ("--by", "labels", "--labels", labels, "--embedder", place / "embedder", "--sae", profiled)

    found = json.loads(run("latents", "search", "w5 w6", *options, "--json").stdout)["hits"]

    assert [hit["latent"] for hit in found] == [4, 9]
    assert found[0]["score"] == pytest.approx(1.0, abs=1e-4)
    assert "w40" in run("latents", "search", "w5 w6", *options).output


def test_search_by_all_shows_each_way(place, profiled):
    options = ("--by", "all", "--embedder", place / "embedder", "--sae", profiled, "--texts", 1)

    text = flat(run("latents", "search", "w12", *options).output)

    assert [f'"w12" by {kind} in' in text for kind in ("words", "labels", "topic")] == [True] * 3


def test_show_has_scores_contexts_and_a_picture(place, here, scored, tmp_path):
    options = ("--scores", scored, "--corpus", place / "corpus.txt", "--picture", tmp_path / "h.png", "--top", 2)

    found = json.loads(run("latents", "show", 3, *here, *options, "--json").stdout)

    table = ScoreTable.load(scored)
    assert found["scores"]["s.safetensors"]["output_score"][0] == pytest.approx(table.row(3)["output_score"])
    assert found["scores"]["s.safetensors"]["farrell"][0] is None
    assert found["contexts"][0]["activation"] >= found["contexts"][1]["activation"] > 0
    assert found["text"]["n_tokens"] > found["text"]["fires"] > 0
    assert len(found["promotes"]) == 20
    assert (tmp_path / "h.png").read_bytes()[:4] == b"\x89PNG"
    text = flat(run("latents", "show", 3, *here, *options).output)
    assert "scores in s.safetensors" in text
    assert f"hardest of {found['text']['n_tokens']} tokens" in text


def test_show_of_an_sae_without_a_table_needs_scores_or_text(place, tmp_path):
    save_sae(replace(tiny.tiny_sae(), name="bare"), tmp_path / "bare")
    given = ("--sae", tmp_path / "bare", "--model", place / "model")

    assert "there is no latents.jsonl.gz" in run("latents", "show", 3, *given, status=2).stderr
    found = json.loads(run("latents", "show", 3, *given, "--corpus", place / "corpus.txt", "--json").stdout)
    assert found["latent"] == 3
    assert found["contexts"]


def test_show_refuses_scores_of_other_weights_and_a_picture_of_nothing(place, scored, tmp_path):
    save_sae(replace(tiny.tiny_sae(seed=5), name="other"), tmp_path / "other")

    result = run("latents", "show", 3, "--sae", tmp_path / "other", "--scores", scored, status=2)
    assert "whose weights differ. Score this SAE." in flat(result.stderr)
    result = run("latents", "show", 3, "--sae", place / "sae", "--picture", tmp_path / "h.png", status=2)
    assert "give --corpus FILE or --self-written" in flat(result.stderr)


def test_label_by_rule_writes_labels_that_search_reads(place, here, tmp_path):
    target = tmp_path / "labels.jsonl"
    write_labels([Label(3, "somebody's", "else"), Label(3, "old", "saeguard"), Label(7, "kept", "saeguard")], target)

    result = run(
        "latents", "label", "--latents", "3,4", "--corpus", place / "corpus.txt", "--out", target, *here, "--json"
    )

    made = json.loads(result.stdout)
    labels = read_labels(target)
    assert [one["latent"] for one in made["labels"]] == [3, 4]
    assert made["kept"] == 2
    assert [(one.latent, one.source) for one in labels] == [
        (3, "else"),
        (3, "saeguard"),
        (4, "saeguard"),
        (7, "saeguard"),
    ]
    assert all(one.text.startswith("w") for one in labels if one.latent == 4)
    assert "old" not in [one.text for one in labels]


def test_label_asks_an_endpoint_once_per_latent(place, here, tmp_path, monkeypatch):
    target = tmp_path / "labels.jsonl"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with endpoint(says("numbers of words"), says("more words")) as (url, requests):
        options = ("--explainer", url, "--explainer-model", "m", "--corpus", place / "corpus.txt", "--out", target)
        run("latents", "label", "--latents", "3,4", *options, *here)
        first = len(requests)
        run("latents", "label", "--latents", "3,4", *options, *here)

    assert first == len(requests) == 2
    assert [(one.latent, one.text, one.source) for one in read_labels(target)] == [
        (3, "numbers of words", "m"), (4, "more words", "m")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --corpus FILE or --self-written"),
        (("--self-written", "--explainer", "http://x/v1"), "--explainer and --explainer-model go together"),
        (("--self-written", "--latents", "99"), "this SAE has latents 0..47"),
    ],
)
def test_label_refuses_in_words(here, tmp_path, arguments, message):
    result = run("latents", "label", "--out", tmp_path / "l.jsonl", *arguments, *here, status=2)

    assert message in flat(result.stderr)
