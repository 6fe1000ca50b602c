"""Labels of every known layout are read to the same latents, strange files are refused by name, endpoints are asked."""

import gzip
import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from saeguard.errors import BrokenFile, LatentOutOfRange, ModelUnavailable, ScoreMismatch, UnsupportedFormat
from saeguard.latents import LatentRow, LatentTable
from saeguard.loaders import shipped
from saeguard.scoring import explainer, labels
from saeguard.scoring.contexts import Context
from saeguard.scoring.explainer import Explainer, question
from saeguard.scoring.labels import Label, best_labels, label_from, labels_of, read_labels, write_labels

TWO = [Label(3, "stars and planets"), Label(12, "verbs of motion")]
NEURONPEDIA = [
    {"modelId": "m", "layer": "20-res", "index": "12", "description": " verbs of\nmotion ",
     "explanationModelName": "a model", "typeName": "t", "embedding": [0.5]},
    {"modelId": "m", "layer": "20-res", "index": 3, "description": "stars and planets",
     "explanationModelName": "a model"},
    {"modelId": "m", "layer": "20-res", "index": "4", "description": None, "explanationModelName": "a model"},
]  # fmt: skip
CONTEXTS = [
    Context(9.0, "light of phot", "osynth", "esis in leaves"),
    Context(6.0, "the ", "Photosynthesis", " of"),
    Context(3.0, "green", " leaf", " falls"),
    Context(2.0, "end", ".", " And"),
]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("list.json", json.dumps(NEURONPEDIA).encode()),
        ("indented.json", json.dumps(NEURONPEDIA, indent=1).encode()),
        ("lines.jsonl", lines(NEURONPEDIA)),
        ("lines.jsonl.gz", gzip.compress(lines(NEURONPEDIA))),
        ("packed_under_a_plain_name.json", gzip.compress(json.dumps(NEURONPEDIA).encode())),
        ("wrapped.json", json.dumps({"explanationsCount": 3, "explanations": NEURONPEDIA}).encode()),
        ("marked.jsonl", b"\xef\xbb\xbf" + lines(NEURONPEDIA)),
    ],
)
def test_neuronpedia_exports_are_read(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)

    assert read_labels(path) == [replace(label, source="a model") for label in TWO]


def test_neuronpedia_features_with_several_explanations_keep_them_all(tmp_path):
    told = [
        {"description": "stars", "explanationModelName": "x"},
        {"description": "planets", "explanationModelName": "y"},
    ]
    path = tmp_path / "feature.json"
    path.write_text(json.dumps({"modelId": "m", "layer": "1", "index": "3", "explanations": told}))

    assert read_labels(path) == [Label(3, "stars", "x"), Label(3, "planets", "y")]


def test_folder_of_batches_is_read_as_one(tmp_path):
    for number in (0, 2, 10):
        (tmp_path / f"batch-{number}.jsonl.gz").write_bytes(
            gzip.compress(lines([{"index": number, "description": f"text {number}"}]))
        )
    (tmp_path / "README.md").write_text("not labels")

    assert [label.latent for label in read_labels(tmp_path)] == [0, 2, 10]


@pytest.mark.parametrize(
    "rows",
    [
        {"feature_3": "stars and planets", "feature_12": "verbs of motion", "feature_5": ""},
        {"12": "verbs of motion", "3": "stars and planets"},
        {"layers.9_latent3": {"explanation": "stars and planets"}, "layers.9_latent12": "verbs of motion"},
    ],
)
def test_objects_from_latent_to_text_are_read(tmp_path, rows):
    path = tmp_path / "explanations.json"
    path.write_text(json.dumps(rows))

    assert read_labels(path) == TWO


@pytest.mark.parametrize("keys", [("latent", "explanation"), ("feature", "label"), ("feature_index", "interpretation")])
def test_rows_under_other_known_keys_are_read(tmp_path, keys):
    path = tmp_path / "explanations.jsonl"
    path.write_bytes(lines([{keys[0]: label.latent, keys[1]: label.text, "score": 0.5} for label in TWO]))

    assert read_labels(path) == [replace(label, score=0.5) for label in TWO]


def test_delphi_folder_of_texts_is_read(tmp_path):
    (tmp_path / "layers.9_latent12.txt").write_text(json.dumps("verbs of motion"))
    (tmp_path / "layers.9_latent3.txt").write_text("stars and planets\n")
    (tmp_path / "layers.9_latent4.txt").write_text("")

    assert read_labels(tmp_path) == TWO
    assert read_labels(tmp_path / "layers.9_latent3.txt") == TWO[:1]


def test_labels_of_two_saes_are_not_mixed(tmp_path):
    path = tmp_path / "both.jsonl"
    path.write_bytes(lines([{**NEURONPEDIA[0], "layer": layer} for layer in ("9-res", "20-res")]))

    with pytest.raises(UnsupportedFormat, match="those of 2 SAEs: 'm/20-res', 'm/9-res'"):
        read_labels(path)
    assert [label.latent for label in read_labels(path, of="m/9-res")] == [12]
    with pytest.raises(UnsupportedFormat, match="labels of m/7-res"):
        read_labels(path, of="m/7-res")


def test_latents_beyond_the_sae_are_refused(tmp_path):
    path = write_labels(TWO, tmp_path / "labels.jsonl")

    assert read_labels(path, d_sae=13) == TWO
    with pytest.raises(LatentOutOfRange, match="one is of latent 12"):
        read_labels(path, d_sae=12)


@pytest.mark.parametrize(
    ("data", "error", "found"),
    [
        (b"latent,text\n3,stars\n", UnsupportedFormat, "it begins with 'latent,text"),
        (b"version https://git-lfs.github.com/spec/v1\n", UnsupportedFormat, "Git LFS pointer"),
        (lines([{"neuron_id": 3, "note": "stars"}]), UnsupportedFormat, "a row has the keys 'neuron_id', 'note'"),
        (lines([{}]), UnsupportedFormat, "of an empty object"),
        (lines(NEURONPEDIA)[:-20], BrokenFile, "labels in labels.json"),
        (b"[1, 2]", BrokenFile, "row 1 is not an object"),
        (b'[{"index": -4, "text": "a"}]', BrokenFile, "'-4' is no latent"),
        (b'[{"index": true, "text": "a"}]', BrokenFile, "True is no latent"),
        (b'[{"index": 1.5, "text": "a"}]', BrokenFile, "1.5 is no latent"),
        (b'[{"index": "12abc", "text": "a"}]', BrokenFile, "'12abc' is no latent"),
        (b'[{"index": 4, "text": ["a"]}]', BrokenFile, "the text of latent 4 is a list"),
        (b'[{"index": 4, "index": 5, "text": "a"}]', BrokenFile, "a key stands twice"),
        (b'[{"index": 4, "text": "a", "score": NaN}]', BrokenFile, "NaN is not a number"),
        (b'[{"index": 4, "text": "a", "score": 1e999}]', BrokenFile, "the score of latent 4 is inf"),
        (b"[" * 100_000, BrokenFile, "nests too deep"),
        (b"\xff\xfe", BrokenFile, "labels in labels.json"),
        (gzip.compress(lines(NEURONPEDIA))[:-12], BrokenFile, "labels in labels.json"),
        (b'{"explanations": [{"explanations": []}]}', BrokenFile, "not an explanation"),
        (json.dumps([{"index": 4, "text": "a" * 10_001}]).encode(), BrokenFile, "has 10001 characters"),
    ],
)
def test_strange_files_are_refused_by_what_is_wrong_with_them(tmp_path, data, error, found):
    path = tmp_path / "labels.json"
    path.write_bytes(data)

    with pytest.raises(error) as caught:
        read_labels(path)

    assert found in str(caught.value)


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "MAX_BYTES", 1_000_000)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 50_000_000))

    with pytest.raises(BrokenFile, match="more than 1,000,000 bytes"):
        read_labels(path)


def test_too_many_labels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "MAX_LABELS", 1)
    path = write_labels(TWO, tmp_path / "labels.jsonl")

    with pytest.raises(BrokenFile, match="more than 1 labels"):
        read_labels(path)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(UnsupportedFormat, match="there is no such file or folder"):
        read_labels(tmp_path / "nothing.json")
    with pytest.raises(UnsupportedFormat, match=r"it has no \*.jsonl"):
        read_labels(tmp_path)


def test_texts_become_one_printable_line(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps([{"index": 1, "text": "a\x1b[31m red\n\u202e lie \ud800"}]))

    assert read_labels(path) == [Label(1, "a [31m red lie")]


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.jsonl.gz"])
def test_our_own_files_come_back_and_have_the_same_bytes_in_any_order(tmp_path, name):
    given = [Label(7, 'ünïcode, "quoted"', "x", 0.25), Label(7, "two", "x"), Label(0, "first", "y", -1.0)]

    path = write_labels(given, tmp_path / "a" / name)
    again = write_labels(given[::-1], tmp_path / "b" / name)

    assert path.read_bytes() == again.read_bytes()
    assert read_labels(path) == sorted(given, key=lambda label: (label.latent, label.source, label.text))
    assert [p.name for p in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("wrong", [(-1, "a", None), (1, "", None), (1, "a", float("nan"))])
def test_label_without_latent_text_or_number_is_refused(wrong):
    with pytest.raises(ScoreMismatch, match="a label of latent"):
        Label(wrong[0], wrong[1], "", wrong[2])


def test_best_label_is_the_one_with_the_largest_score():
    found = best_labels([Label(5, "c"), Label(1, "b", "", 0.2), Label(1, "a", "", 0.9), Label(1, "0"), Label(5, "b")])

    assert {latent: label.text for latent, label in found.items()} == {1: "a", 5: "b"}


def test_label_from_contexts_names_whole_words_by_their_activation():
    label = label_from(4, CONTEXTS, ["Photosynthesis", " plant", "␣", "plant", " green"])

    assert label == Label(4, "photosynthesis, leaf -> plant, green", "saeguard", 18 / 20)


def test_label_from_contexts_of_signs_alone_names_them_and_nothing_gives_none():
    assert label_from(4, CONTEXTS[3:]) == Label(4, ".", "saeguard", 1.0)
    assert label_from(4, [], [" plant"]) == Label(4, "-> plant", "saeguard", None)
    assert label_from(4, []) is None


def test_labels_of_a_table_take_its_label_or_make_one_and_leave_silent_latents_out():
    table = LatentTable([
        LatentRow(0, 0.1, 2.0, ("Stars", "star", "of"), (0.5, 0.2, 0.1), ("planet",), "Stars, star -> planet"),
        LatentRow(1, 0.1, 2.0, ("run", "RUN", "."), (0.5, 0.25, 0.125), ("fast",)),
        LatentRow(2, 0.0, 0.0, (), (), (), "(silent on the training sample)"),
        LatentRow(3, 0.1, 2.0, ("walk",)),
    ])  # fmt: skip

    assert labels_of(table) == [
        Label(0, "Stars, star -> planet", "saeguard", 0.7),
        Label(1, "run -> fast", "saeguard", 0.5),
        Label(3, "walk", "saeguard", None),
    ]


def test_shipped_tables_have_labels_that_can_be_written_and_read(tmp_path):
    for name in shipped():
        found = labels_of(LatentTable.load(name))

        assert len(found) > 1000
        assert read_labels(write_labels(found, tmp_path / "labels.jsonl.gz")) == found


@contextmanager
def endpoint(*answers):
    """A server that gives (status, headers, body) one after another, the last one for ever, and keeps what it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, dict(self.headers), json.loads(body)))
            status, headers, answer = answers[min(len(got), len(answers)) - 1]
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", got
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def says(text):
    return 200, {}, {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_explainer_sends_the_contexts_and_makes_a_label_of_the_first_line(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "s3cret")
    with endpoint(says('\n "Plants that grow."\nBecause ...')) as (url, got):
        label = Explainer(url + "/", "a-model", "SOME_KEY").explain(4, CONTEXTS, [" leaf"])

    path, headers, body = got[0]
    assert label == Label(4, "Plants that grow.", "a-model")
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer s3cret")
    assert (body["model"], body["temperature"]) == ("a-model", 0)
    assert body["messages"][1]["content"] == question(CONTEXTS, [" leaf"])
    assert "10/10: light of phot «osynth» esis in leaves" in body["messages"][1]["content"]


def test_explainer_without_a_key_sends_none_and_with_an_unset_one_nothing(monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with endpoint(says("Plants")) as (url, got):
        Explainer(url, "a-model").explain(4, CONTEXTS)
        with pytest.raises(ModelUnavailable, match="the variable SOME_KEY is not set"):
            Explainer(url, "a-model", "SOME_KEY").explain(4, CONTEXTS)

    assert len(got) == 1
    assert "Authorization" not in got[0][1]


def test_explainer_tries_again_when_the_endpoint_is_busy_and_waits_as_it_asks(monkeypatch):
    waits = []
    monkeypatch.setattr(explainer.time, "sleep", waits.append)
    busy = [(429, {"Retry-After": "7"}, {}), (503, {}, {}), (500, {"Retry-After": "900"}, {})]
    with endpoint(*busy, says("Plants")) as (url, got):
        label = Explainer(url, "a-model").explain(4, CONTEXTS)

    assert label.text == "Plants"
    assert (len(got), waits) == (4, [7.0, 2.0, 30.0])


@pytest.mark.parametrize(
    ("answer", "tries", "found"),
    [
        ((503, {}, {}), 3, "HTTP 503"),
        ((401, {}, {}), 1, "HTTP 401"),
        ((307, {"Location": "http://127.0.0.1:1/"}, {}), 1, "HTTP 307"),
        ((200, {}, b"<html>"), 1, "is no chat completion"),
        ((200, {}, {"choices": []}), 1, "is no chat completion"),
        ((200, {}, {"choices": [{"message": {"content": None}}]}), 1, "the content is a NoneType"),
        ((200, {}, b" " * 1_000_001), 1, "more than 1000000 bytes"),
        (says(' " \n'), 1, "its answer has no text"),
    ],
)
def test_explainer_says_what_the_endpoint_did(answer, tries, found):
    with endpoint(answer) as (url, got), pytest.raises(ModelUnavailable) as caught:
        Explainer(url, "a-model", retries=2, wait_s=0.0).explain(4, CONTEXTS)

    assert found in str(caught.value)
    assert len(got) == tries


def test_explainer_gives_up_on_a_silent_endpoint():
    with endpoint(says("late")) as (url, _):
        pass

    with pytest.raises(ModelUnavailable, match="an explanation by a-model at http://127.0.0.1"):
        Explainer(url, "a-model", retries=1, wait_s=0.0, timeout_s=0.5).explain(4, CONTEXTS)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:8000/v1", "http://", ""])
def test_explainer_takes_web_addresses_only(url):
    with pytest.raises(ModelUnavailable, match="that is no http or https address"):
        Explainer(url, "a-model")
