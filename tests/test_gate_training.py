"""A gate that was trained finds a topic that was planted, says of every row what a deployed one says, and resumes."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeguard import Add, Plan, Rule, steer
from saeguard.errors import MissingBOS, TrainError
from saeguard.gates import Seen
from saeguard.training.gate_fit import GateConfig, Sentence, _paths, fit_gate, fit_words_gate
from saeguard.training.gate_head import Bags, HeadConfig, Heads, Pooling, fit_heads, segments
from saeguard.training.gate_latents import TokenLatents, gather_latents
from saeguard.training.gate_piled import PiledConfig, fit_piled
from saeguard.training.gate_rows import GateRow, Question, folds_of, passage_rows, question_rows, read_questions
from saeguard.training.gate_words import SPAN, WordsConfig, fit_table, in_most, sentences
from saeguard.training.sparse_rows import SparseRows
from tests import tiny, words
from tests.counts import cases

PLANTED, OTHERS = range(5, 11), range(20, 60)
CONFIG = GateConfig(head=HeadConfig(k=2, steps=40, lr=0.05), words=WordsConfig(most=200), folds=2, window=6)


def text_about(topic: str, draw: random.Random, length: int = 12) -> str:
    """Words of no topic, among them four that are planted."""
    found = [draw.choice(OTHERS) for _ in range(length)]
    for place in draw.sample(range(length), 4) if topic == "planted" else ():
        found[place] = draw.choice(PLANTED)
    return " ".join(f"w{word}" for word in found)


def planted(n: int, *, seed: int) -> tuple[Question, ...]:
    draw = random.Random(seed)
    topics = ["planted" if i % 3 == 0 else f"other{i % 2}" for i in range(n)]
    return tuple(Question(text_about(topic, draw), topic) for topic in topics)


def chat_tokenizer():
    tokenizer = words.word_tokenizer()
    tokenizer.chat_template = "{{ bos_token }} w3 {% for m in messages %}{{ m.content }} w4 {% endfor %}"
    return tokenizer


def rows_of(n: int = 120, *, seed: int = 1) -> tuple[GateRow, ...]:
    return question_rows(planted(n, seed=seed), chat_tokenizer())


def sentences_of(n: int = 200, *, seed: int = 2) -> list[Sentence]:
    encode = words.word_tokenizer()
    return [Sentence(tuple(encode(one.text)["input_ids"]), one.topic) for one in planted(n, seed=seed)]


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    rows = rows_of()
    folder = tmp_path_factory.mktemp("latents")
    return rows, gather_latents(tiny.tiny_model(), tiny.tiny_sae(), rows, folder, exact=True, rows_per_shard=50)


@pytest.fixture(scope="module")
def fitted(gathered):
    rows, tokens = gathered
    return fit_gate(tokens, rows, sentences_of(), "planted", special=(0, 1, 2), config=CONFIG)


def dense(tokens: TokenLatents) -> torch.Tensor:
    crow, column, value = tokens.of_tokens(torch.ones(tokens.n_tokens, dtype=torch.bool))
    found = torch.zeros(tokens.n_tokens, tokens.d_sae)
    found[torch.arange(tokens.n_tokens).repeat_interleave(crow.diff()), column.long()] = value
    return found


def area(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """How often a planted row has the higher score of two."""
    return float((scores[labels][:, None] > scores[~labels]).double().mean())


def test_latents_are_those_of_each_row_alone(gathered):
    rows, tokens = gathered
    model, sae = tiny.tiny_model(), tiny.tiny_sae()
    found = dense(tokens)

    for number in (0, 7, len(rows) - 1):
        with torch.no_grad():
            x = model(torch.tensor([rows[number].ids]), output_hidden_states=True).hidden_states[2][0]
        low, high = tokens.starts[number], tokens.starts[number + 1]
        assert tokens.ids[low:high].tolist() == list(rows[number].ids)
        assert torch.allclose(found[low:high], sae.encode(x).detach(), rtol=1e-2, atol=1e-3)  # kept in bfloat16


def test_interrupted_pass_goes_on_and_ends_as_one_that_was_not(tmp_path):
    rows, model, sae = rows_of(40), tiny.tiny_model(), tiny.tiny_sae()
    whole = gather_latents(model, sae, rows, tmp_path / "whole", rows_per_shard=16)

    def stop(done: int, total: int) -> None:
        if done > total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather_latents(model, sae, rows, tmp_path / "cut", rows_per_shard=16, progress=stop)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.safetensors")}
    again = gather_latents(model, sae, rows, tmp_path / "cut", rows_per_shard=16)

    assert 0 < len(made) < -(-len(rows) // 16)
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())
    for name in ("starts", "ids", "crow", "column", "value"):
        assert torch.equal(getattr(again, name), getattr(whole, name))


def test_folder_of_other_work_and_broken_shards_are_refused_by_name(tmp_path):
    rows, model, sae = rows_of(8), tiny.tiny_model(), tiny.tiny_sae()
    gather_latents(model, sae, rows, tmp_path)

    with pytest.raises(TrainError, match=r"latents in .* with rows .*the folder holds latents with rows"):
        gather_latents(model, sae, rows[:4], tmp_path)
    with pytest.raises(TrainError, match="with sae"):
        gather_latents(model, tiny.tiny_sae(seed=3), rows, tmp_path)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"no")
    with pytest.raises(TrainError, match="they cannot be read"):
        gather_latents(model, sae, rows, tmp_path)
    for text in ("{", "3"):
        (tmp_path / "latents.json").write_text(text)
        with pytest.raises(TrainError, match="latents.json cannot be read"):
            gather_latents(model, sae, rows, tmp_path)
    with pytest.raises(TrainError, match="there are no rows"):
        gather_latents(model, sae, (), tmp_path)


@settings(max_examples=cases(200))
@given(st.data())
def test_sparse_product_and_its_gradient_are_those_of_the_dense_matrix(data):
    n, m = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    matrix = torch.randint(-2, 3, (n, m), generator=generator).float()
    w = torch.randn(m, 2, generator=generator, requires_grad=True)
    v = w.detach().clone().requires_grad_()
    row, column = matrix.nonzero(as_tuple=True)
    crow = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(row, minlength=n).cumsum(0)])

    found = SparseRows(crow, column, matrix[row, column], m) @ w
    found.square().sum().backward()
    (matrix @ v).square().sum().backward()

    assert torch.allclose(found, matrix @ v, atol=1e-5)
    assert torch.allclose(w.grad, v.grad, atol=1e-3)


@settings(max_examples=cases(400))
@given(st.data())
def test_mean_of_the_largest_is_that_of_each_bag_alone(data):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=9))
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    counts = torch.rand(sum(lengths), generator=generator) < 0.7
    values, config = torch.randn(sum(lengths), 2, generator=generator), HeadConfig(k=data.draw(st.integers(1, 5)))
    bags = segments(starts, data.draw(st.integers(1, 12)))

    found = Pooling.of(bags, counts, config).top(values)

    for i, (start, length) in enumerate(zip(bags.start.tolist(), bags.length.tolist(), strict=True)):
        own = [values[t] for t in range(start, start + length) if counts[t]]
        own += [torch.full((2,), config.floor)] * config.k
        assert torch.allclose(found[i], torch.stack(own).sort(0, descending=True).values[: config.k].mean(0))
    assert int(bags.length.sum()) == sum(lengths)


def test_log_odds_of_heads_cut_latents_off_at_their_caps(gathered):
    _, tokens = gathered
    heads = Heads(torch.randn(48, 3), torch.randn(3), torch.rand(48) * 3, -8.0)

    found = heads.log_odds(tokens)

    assert torch.allclose(found, torch.minimum(dense(tokens), heads.caps) @ heads.weights + heads.bias, atol=1e-4)


def test_gate_finds_the_planted_topic_in_rows_that_its_head_has_not_seen(gathered, fitted):
    labels = torch.tensor([row.topic == "planted" for row in gathered[0]])

    assert area(fitted.scores, labels) > 0.97
    assert area(fitted.parts["words"], labels) > 0.97
    assert area(fitted.parts["latents"], labels) > 0.7


def test_gate_of_shuffled_labels_finds_nothing(gathered):
    """Scores that came from a head that has seen the row would find it all the same."""
    rows, tokens = gathered
    draw = random.Random(4)
    named = {group: draw.choice(("planted", "other")) for group in sorted({row.group for row in rows})}
    shuffled = [GateRow(row.ids, row.text, named[row.group], row.form, row.group) for row in rows]
    apart = [Sentence(one.ids, draw.choice(("planted", "other"))) for one in sentences_of()]

    found = fit_gate(tokens, shuffled, apart, "planted", special=(0, 1, 2), config=CONFIG)

    labels = torch.tensor([row.topic == "planted" for row in shuffled])
    assert 0.3 < area(found.scores, labels) < 0.7


def test_same_rows_give_the_same_gate(gathered, fitted):
    rows, tokens = gathered

    again = fit_gate(tokens, rows, sentences_of(), "planted", special=(0, 1, 2), config=CONFIG)

    assert again.gate == fitted.gate
    assert torch.equal(again.scores, fitted.scores)


def test_gate_in_a_model_has_the_scores_that_it_had_in_training(gathered, fitted):
    """The steps of training and of deployment are the same; activations were rounded once."""
    rows, tokens = gathered
    model, sae, row = tiny.tiny_model(), tiny.tiny_sae(), 11
    counts = ~torch.isin(tokens.ids, torch.tensor((0, 1, 2)))
    watch, table = fitted.gate.gates
    low, high = int(tokens.starts[row]), int(tokens.starts[row + 1])
    f = dense(tokens)[low:high, list(watch.evidence.latents)]
    seen = Seen(f[None], torch.zeros(1, high - low, 0), counts[None, low:high], None, None, tokens.ids[None, low:high])
    _, said = fitted.gate.step(fitted.gate.begin(1, torch.device("cpu")), [seen, seen])

    plan = Plan((Rule(sae.name, (3,), Add(0.0), gate=fitted.gate),))
    with torch.no_grad(), steer(model, plan, saes={sae.name: sae}, tokenizer=words.word_tokenizer()) as run:
        model(torch.tensor([rows[row].ids]))

    (peak,) = run.report.gates[0].peak[0]
    assert peak == pytest.approx(float(said.score[said.score.isfinite()].max()), abs=0.05)


def test_paths_are_the_same_in_whatever_company(gathered, fitted):
    rows, tokens = gathered
    counts = ~torch.isin(tokens.ids, torch.tensor((0, 1, 2)))
    watch, table = fitted.gate.gates
    odds = torch.randn(tokens.n_tokens)

    once = _paths(tokens, counts, torch.zeros(len(rows), dtype=torch.long), odds, watch.pool, [table])
    apart = _paths(tokens, counts, torch.tensor(folds_of(rows, 2)), odds, watch.pool, [table, table])

    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(once, apart, strict=True))


def test_table_of_words_lists_what_the_sentences_show_and_sums_as_it_was_trained():
    texts, labels = [(5, 6, 7), (5, 6, 8), (9, 10, 7), (9, 10, 8)] * 3, [True, True, False, False] * 3

    table = fit_table(texts, labels, [1.0] * 12, texts, labels, [1.0] * 12, [0, 1] * 6, WordsConfig(least=3))

    q = dict(zip(table.keys.tolist(), table.weights.mean(1).tolist(), strict=True))
    pair = lambda a, b: (a + 1) * SPAN + b
    assert set(q) == {5, 6, 7, 8, 9, 10, *(pair(a, b) for a, b in ((5, 6), (6, 7), (6, 8), (9, 10), (10, 7), (10, 8)))}
    assert q[5] > 0.1 > abs(q[7])
    assert q[9] < -0.1
    assert q[pair(5, 6)] > 0.1 > -0.1 > q[pair(9, 10)]
    gate = table.words(None, last=4, floor=1.0)
    assert dict(zip(gate.tokens, gate.weights, strict=True))[5] == pytest.approx(q[5], rel=1e-3)
    assert gate.pairs[:2] == (5, 6)


def test_smaller_table_keeps_the_words_that_weigh_most():
    draw = random.Random(0)
    texts = [[draw.choice(OTHERS) for _ in range(8)] + ([5, 6] if i % 2 else []) for i in range(60)]
    labels = [bool(i % 2) for i in range(60)]

    table = fit_table(texts, labels, [1.0] * 60, texts, labels, [1.0] * 60, [0, 1] * 30, WordsConfig(most=3))

    assert table.keys.tolist() == [5, 6, 6 * SPAN + 6]


def test_words_of_the_format_are_left_out_of_the_table():
    rows = [(3, 4, 5), (3, 4, 6), (3, 4, 7), (3, 8, 4)]
    texts, labels = [(3, 4, 5), (3, 4, 6)] * 4, [True, False] * 4

    common = in_most(rows)
    table = fit_table(texts, labels, [1.0] * 8, texts, labels, [1.0] * 8, [0, 1] * 4, without=common)

    assert common == [3, 4, 4 * SPAN + 4]
    assert table.keys.tolist() == [5, 6, 5 * SPAN + 5, 5 * SPAN + 6]


def test_rows_are_what_a_deployed_model_reads():
    tokenizer = chat_tokenizer()
    plain, chat = question_rows([Question("w5 w6", "a")], tokenizer)

    assert plain.ids == tuple(tokenizer("<s> Question: w5 w6\nAnswer:", add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(chat.ids).split() == ["<s>", "w3", "w5", "w6", "w4"]
    assert (plain.form, chat.form, plain.group) == ("plain", "chat", chat.group)
    assert question_rows([Question("w5 w6", "a")], words.word_tokenizer()) == (plain,)


def test_passages_are_drawn_by_their_seed_and_stay_within_their_length():
    tokenizer, documents = words.word_tokenizer(), {"a": [" ".join(f"w{3 + i % 50}" for i in range(4000))], "b": []}

    rows = passage_rows(documents, tokenizer, each=5, tokens=30)

    assert [row.topic for row in rows] == ["a"] * 5
    assert all(row.ids[0] == tiny.BOS and len(row.ids) <= 31 for row in rows)
    assert rows == passage_rows(documents, tokenizer, each=5, tokens=30)
    assert rows != passage_rows(documents, tokenizer, each=5, tokens=30, seed=1)


def test_formats_of_one_question_share_a_fold_and_new_rows_move_none():
    rows = rows_of(60)
    folds = folds_of(rows, 3)

    assert set(folds) == {0, 1, 2}
    assert all(len({fold for row, fold in zip(rows, folds, strict=True) if row.group == group}) == 1
               for group in {row.group for row in rows})  # fmt: skip
    assert folds_of(rows[10:], 3) == folds[10:]


def test_sentences_are_parted_at_their_ends_and_drawn_by_seed():
    text = " ".join(f"Sentence {i} says what comes into my mind first." for i in range(20)) + " Short."

    found = sentences([text], 8, 0)

    assert len(found) == 8
    assert [one.startswith(" sentence") for one in found] == [bool(i % 2) for i in range(8)]
    assert found == sentences([text], 8, 0) != sentences([text], 8, 1)


def test_questions_are_read_once_each_and_take_their_topic_from_the_file(tmp_path):
    file = tmp_path / "piqa.train.jsonl"
    file.write_text('{"question": "a?"}\n{"question": "a?"}\n\n{"question": "b?", "topic": "t"}\n')

    assert read_questions([file]) == (Question("a?", "piqa"), Question("b?", "t"))


@pytest.mark.parametrize("line", ['{"question": ""}', '{"text": "a"}', "[1]", "{", '{"question": "a", "topic": 3}'])
def test_questions_that_are_none_are_refused(tmp_path, line):
    (tmp_path / "q.jsonl").write_text(line + "\n")

    with pytest.raises(TrainError, match="a row could not be read"):
        read_questions([tmp_path / "q.jsonl"])


def test_no_questions_and_no_file_are_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n")

    with pytest.raises(TrainError, match="there is none in them"):
        read_questions([tmp_path / "q.jsonl"])
    with pytest.raises(TrainError, match="a row could not be read"):
        read_questions([tmp_path / "nothing.jsonl"])


def test_tokenizer_without_bos_is_refused_unless_none_is_wanted():
    tokenizer = words.word_tokenizer()
    tokenizer.bos_token = None

    with pytest.raises(MissingBOS):
        question_rows([Question("w5", "a")], tokenizer)
    (row,) = question_rows([Question("w5", "a")], tokenizer, bos=False)
    assert row.ids[1] == row.text[0] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget": "biology"}, "a gate for 'biology'"),
        ({"weights": {"botany": 2.0}}, "the weight of botany"),
        ({"weights": {"planted": 0.0}}, "the weight of planted"),
        ({"config": GateConfig(folds=1)}, "1 folds"),
        ({"sentences": [Sentence((5, 6), "other0")]}, "a gate for 'planted'"),
        ({"special": tuple(range(tiny.VOCAB))}, "have no token that counts"),
    ],
)
def test_what_no_gate_can_be_made_of_is_refused_by_name(gathered, change, message):
    rows, tokens = gathered
    given = {"forget": "planted", "special": (0, 1, 2), "config": CONFIG, "sentences": sentences_of(30)} | change

    with pytest.raises(TrainError, match=message):
        fit_gate(tokens, rows, given.pop("sentences"), given.pop("forget"), **given)


def test_head_without_both_labels_outside_a_fold_is_refused(gathered):
    _, tokens = gathered
    n = len(tokens.starts) - 1
    labels, folds = torch.arange(n) < 3, [0] * 3 + [1] * (n - 3)
    bags = Bags(tokens.starts[:-1], tokens.starts.diff(), torch.arange(n))

    with pytest.raises(TrainError, match="outside fold 0 all .* rows have one label"):
        fit_heads(tokens, torch.ones(tokens.n_tokens).bool(), bags, labels, torch.ones(n), folds)


def test_gate_is_small_enough_to_send(fitted):
    from saeguard.gates.written import gate_from_dict, gate_to_dict

    text = json.dumps(gate_to_dict(fitted.gate))

    assert gate_from_dict(json.loads(text)) == fitted.gate
    assert len(text) < 40 * (48 + 200)


def test_words_alone_find_a_planted_topic_out_of_fold_and_without_a_model():
    rows = rows_of()

    fitted, again = (
        fit_words_gate(rows, sentences_of(), "planted", special=(0, 1, 2), config=CONFIG) for _ in range(2)
    )

    assert area(fitted.scores, torch.tensor([row.topic == "planted" for row in rows])) > 0.97
    assert (again.gate, again.scores.tolist()) == (fitted.gate, fitted.scores.tolist())
    assert min(fitted.gate.pair_weights, default=0.0) >= 0


def test_table_of_runs_leaves_out_pairs_behind_a_format_and_scores_the_best_run_of_a_long_text():
    draw = random.Random(0)
    noise = lambda n: [draw.choice(OTHERS) for _ in range(n)]
    texts = [[*noise(90), *([5, 6, 7] if i % 2 else noise(3)), *noise(20)] for i in range(80)]
    labels = [bool(i % 2) for i in range(80)]
    table = fit_table(texts, labels, [1.0] * 80, texts, labels, [1.0] * 80, [0, 1] * 40, WordsConfig(least=2))

    piled = fit_piled(table, texts, labels, [1.0] * 80, [-1] * 80, formats=(6,), config=PiledConfig(epochs=8, batch=16))

    gate = piled.gate()
    firsts = set(gate.pairs[::2])
    assert 6 not in firsts
    assert 5 in firsts
    weight = dict(zip(gate.tokens, gate.weights, strict=True))
    assert min(weight[5], weight[6]) > max(value for token, value in weight.items() if token >= 20)
    doubled = piled.gate(scale=2.0)
    assert doubled.weights == pytest.approx([2 * value for value in gate.weights], rel=1e-3, abs=1e-3)
    assert doubled.drift == pytest.approx(2 * gate.drift, rel=1e-3)
