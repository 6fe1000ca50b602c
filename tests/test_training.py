"""Training: the maths recovers what was planted, a resumed run is the same run, bad text is refused in words."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from saeguard.cli.training import steps_of
from saeguard.errors import MissingBOS, TrainError, UnsupportedModel
from saeguard.loaders import load_sae
from saeguard.sae import SAE
from saeguard.sites import Site
from saeguard.training.activations import Batches, Reader, find_blocks, write_activations
from saeguard.training.batch_topk import batch_topk_loss, calibrate, initial_weights, rank_threshold
from saeguard.training.corpus import Chunks, read_corpus
from saeguard.training.describe import Words, describe_latents, label_of
from saeguard.training.evaluate import evaluate_sae, reconstruction
from saeguard.training.pipeline import Subject, Texts, collect, finish_site, read_texts, train_site
from saeguard.training.trainer import TrainConfig, TrainState, export, geometric_median, train
from tests.tiny import VOCAB, D, fresh_model, tiny_model, tiny_sae

SITE = Site("resid_post", 1)


class Planted:
    """Sparse non-negative sums of 24 known directions, plus an offset: what an SAE is made to undo."""

    def __init__(self, *, batch: int = 512, d_in: int = 16, n: int = 24, active: int = 3):
        generator = torch.Generator().manual_seed(7)
        self.directions = F.normalize(torch.randn(n, d_in, generator=generator), dim=-1)
        self.offset = torch.randn(d_in, generator=generator)
        self.batch, self.active = batch, active

    def at(self, step: int) -> torch.Tensor:
        return self.draw(self.batch, seed=step)

    def sample(self, n: int) -> torch.Tensor:
        return self.draw(min(n, 4096), seed=-1)

    def draw(self, n: int, *, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + 100)
        chosen = torch.rand(n, len(self.directions), generator=generator).topk(self.active).indices
        amounts = torch.rand(n, self.active, generator=generator) + 1.0
        return torch.zeros(n, len(self.directions)).scatter(1, chosen, amounts) @ self.directions + self.offset


SMALL = TrainConfig(d_sae=32, k=3.0, steps=300, batch=512, lr=1e-2, warmup=20, dead_after=20_000, aux_k=8)


@pytest.fixture(scope="module")
def planted() -> tuple[Planted, TrainState]:
    source = Planted()
    return source, train(source, SMALL)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Letters and spaces; ids 0, 1 and 2 are padding, BOS and EOS."""
    letters = "abcdefghijklmnopqrstuvwxyz .,!?ABCDEFGHIJKLMNOPQRSTUVWXYZ1"
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {letter: i + 3 for i, letter in enumerate(letters)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def write_rows(path: Path, texts: list[str]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def tiny_corpus(folder: Path, *, rows: int = 60, context: int = 33) -> Chunks:
    texts = [
        f"the {chr(97 + i % 26)} cat number {i % 7} sat, and then it ran away to the old barn!" for i in range(rows)
    ]
    return read_corpus([write_rows(folder / "t.jsonl.gz", texts)], word_tokenizer(), context=context)


def test_planted_directions_are_recovered(planted: tuple[Planted, TrainState]):
    source, state = planted

    best = (source.directions @ state.weights.W_dec.detach().T).max(dim=1).values

    assert best.min() > 0.95
    assert best.mean() > 0.98


def test_exported_threshold_form_has_the_target_l0_on_new_tokens(planted: tuple[Planted, TrainState]):
    source, state = planted

    sae = export(state, source.sample(4096), l0=3.0, name="planted")
    measured = reconstruction(sae, source.draw(4096, seed=5000))

    assert sae.activation == "jumprelu"
    assert measured["l0"] == pytest.approx(3.0, abs=0.1)
    assert measured["fvu"] < 0.1


def test_exported_decoder_rows_have_unit_length(planted: tuple[Planted, TrainState]):
    source, state = planted

    sae = export(state, source.sample(1024), l0=3.0, name="planted")

    assert torch.allclose(sae.W_dec.float().norm(dim=-1), torch.ones(sae.d_sae), atol=1e-3)
    assert sae.W_dec.dtype is torch.float16
    assert sae.b_enc.dtype is torch.float32


@pytest.mark.parametrize("prefixes", [(), (8, 16)])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, prefixes: tuple[int, ...]):
    config = replace(SMALL, steps=40, prefixes=prefixes, dead_after=2_000)
    whole = train(Planted(), config)

    train(Planted(), config, checkpoint=tmp_path / "c.pt", every=10, stop_at=17)
    resumed = train(Planted(), config, checkpoint=tmp_path / "c.pt", every=10, resume=True)

    assert resumed.step == whole.step == 40
    for ours, theirs in zip(resumed.weights.all(), whole.weights.all(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(resumed.silent, whole.silent)


def test_resume_with_other_hyper_parameters_names_them(tmp_path: Path):
    config = replace(SMALL, steps=4)
    train(Planted(), config, checkpoint=tmp_path / "c.pt")

    with pytest.raises(TrainError) as raised:
        train(Planted(), replace(config, lr=0.5, k=4.0), checkpoint=tmp_path / "c.pt", resume=True)

    assert "other values of k, lr" in raised.value.found


def test_resume_on_other_activations_is_refused(tmp_path: Path):
    config = replace(SMALL, steps=4)
    train(Planted(), config, checkpoint=tmp_path / "c.pt", made_of="one text")

    for other in ("another text", None):
        with pytest.raises(TrainError, match="trained on other activations"):
            train(Planted(), config, checkpoint=tmp_path / "c.pt", resume=True, made_of=other)
    assert train(Planted(), config, checkpoint=tmp_path / "c.pt", resume=True, made_of="one text").step == 4


@pytest.mark.parametrize("lr", [0.0, -1e-3, float("nan"), float("inf")])
def test_learning_rate_that_is_none_is_refused(lr: float):
    with pytest.raises(TrainError, match="peak learning rate"):
        TrainConfig(lr=lr)


@pytest.mark.parametrize("epochs", [0.0, -1.0, float("nan"), float("inf")])
def test_epochs_that_are_no_number_of_passes_are_refused(epochs: float):
    with pytest.raises(TrainError, match="epochs"):
        steps_of(epochs, 10)
    assert (steps_of(0.01, 10), steps_of(2.5, 10)) == (1, 25)


def test_reader_that_cannot_be_entered_leaves_no_hook():
    model = fresh_model()

    with pytest.raises(TrainError, match=r"activations at resid_post\.77"):
        Reader(model, [Site("resid_post", 1), Site("resid_post", 77)]).__enter__()

    assert not any(module._forward_hooks for module in model.modules())


def test_broken_checkpoint_is_named_as_such(tmp_path: Path):
    (tmp_path / "c.pt").write_bytes(b"half a file")

    with pytest.raises(TrainError) as raised:
        train(Planted(), SMALL, checkpoint=tmp_path / "c.pt", resume=True)

    assert "not a whole checkpoint" in raised.value.found


def test_loss_of_nested_prefixes_is_the_mean_over_their_reconstructions():
    x = Planted().draw(64, seed=0)
    weights = initial_weights(32, torch.zeros(16), seed=0)

    loss = batch_topk_loss(weights, x, k=4.0, prefixes=(8, 20))

    pre = (x.bfloat16() @ weights.W_enc.bfloat16()).float()
    f = torch.where(pre > loss.theta, pre, 0.0)
    each = [(x - f[:, :m] @ weights.W_dec[:m]).square().mean() for m in (8, 20, 32)]
    assert float(loss.total.detach()) == pytest.approx(float(torch.stack(each).mean().detach()), rel=2e-2)


def test_prefixes_that_do_not_rise_are_refused():
    with pytest.raises(TrainError, match="do not rise between 1 and 31"):
        TrainConfig(d_sae=32, k=3.0, prefixes=(16, 8))


def test_batch_keeps_k_per_token_and_not_k_of_each():
    x = torch.cat([torch.zeros(32, 16), 10 * Planted().draw(32, seed=0)])
    weights = initial_weights(32, torch.zeros(16), seed=0)

    theta = rank_threshold((x @ weights.W_enc).detach(), 3.0)
    kept = ((x @ weights.W_enc) > theta).sum(1)

    assert int(kept.sum()) == 3 * 64
    assert int(kept[:32].sum()) == 0


def test_dead_latents_get_a_gradient_and_live_ones_do_not_need_it():
    x = Planted().draw(256, seed=0)
    weights = initial_weights(32, torch.zeros(16), seed=0)
    with torch.no_grad():
        weights.b_enc[:4] = -3.0  # silent under the batch's threshold, not under their own ranking
    dead = torch.arange(32) < 4

    batch_topk_loss(weights, x * 4, k=3.0, dead=dead, aux_k=2).total.backward()

    assert weights.W_dec.grad is not None
    assert weights.W_dec.grad[:4].abs().sum() > 0


def test_one_massive_token_does_not_own_the_loss():
    x = Planted().draw(256, seed=0)
    massive = x.clone()
    massive[0] *= 1000

    weights = initial_weights(32, torch.zeros(16), seed=0)
    plain, dominated = (float(batch_topk_loss(weights, y, k=3.0).total.detach()) for y in (x, massive))

    assert dominated < 5 * plain


def test_calibration_is_exact_for_the_tokens_given():
    pre = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))

    threshold = calibrate(pre, l0=4.0)

    assert int((pre > threshold).sum()) == 2000


def test_geometric_median_is_not_dragged_by_an_outlier():
    x = torch.randn(1001, 4, generator=torch.Generator().manual_seed(0))
    x[0] = 1e5

    assert geometric_median(x).norm() < 0.2


def test_chunks_begin_with_bos_and_leave_special_tokens_out(tmp_path: Path):
    chunks = tiny_corpus(tmp_path)

    assert bool((chunks.ids[:, 0] == 1).all())
    assert not bool(chunks.kept[:, 0].any())
    assert not bool(chunks.kept[chunks.ids <= 2].any())
    assert chunks.n_tokens > 1000


def test_budget_is_shared_evenly_and_small_files_pass_on_their_rest(tmp_path: Path):
    long = [write_rows(tmp_path / f"{name}.jsonl.gz", ["long text " * 200] * 5) for name in "ab"]
    short = write_rows(tmp_path / "c.jsonl.gz", ["short text " * 20])

    chunks = read_corpus([*long, short], word_tokenizer(), context=33, n_tokens=3000)

    a, b, c = (file.n_tokens for file in chunks.files)
    assert c < 300
    assert abs(a - b) <= 33
    assert 2900 <= a + b + c <= 3100


def test_chat_rows_go_through_the_chat_template(tmp_path: Path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}"
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"prompt": "hello there", "response": "good day"}) + "\n")

    chunks = read_corpus([path], tokenizer, context=64)

    assert chunks.ids[0, 0] == 1
    assert int((chunks.ids[0] == 1).sum()) == 2
    assert chunks.n_tokens == len("hello there") + len("good day")


def test_empty_corpus_is_refused(tmp_path: Path):
    with pytest.raises(TrainError, match="no document"):
        read_corpus([write_rows(tmp_path / "empty.jsonl.gz", [])], word_tokenizer())


def test_row_without_text_is_named_with_its_file(tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"body": "x"}\n')

    with pytest.raises(TrainError) as raised:
        read_corpus([path], word_tokenizer())

    assert "bad.jsonl" in raised.value.asked
    assert "text field" in raised.value.proceed


def test_tokenizer_without_bos_is_refused(tmp_path: Path):
    tokenizer = word_tokenizer()
    tokenizer.bos_token = None

    with pytest.raises(MissingBOS, match="no BOS token"):
        read_corpus([write_rows(tmp_path / "t.jsonl.gz", ["text"])], tokenizer)


def test_corpus_smaller_than_a_batch_is_refused_with_both_numbers(tmp_path: Path):
    chunks = tiny_corpus(tmp_path, rows=2)
    store = write_activations(tiny_model(), chunks, [SITE], tmp_path / "acts")

    with pytest.raises(TrainError) as raised:
        Batches(store, SITE, batch=4096, seed=0)

    assert "4096" in raised.value.asked
    assert str(chunks.n_tokens) in raised.value.found


def test_stored_activations_are_the_hidden_states_of_kept_tokens(tmp_path: Path):
    chunks = tiny_corpus(tmp_path, rows=6)
    hooks = [len(block._forward_hooks) for block in find_blocks(tiny_model())]
    with Reader(tiny_model(), [SITE, Site("resid_post", 0)], exact=True) as reader:
        seen = reader.read(chunks.ids)
    left = [len(block._forward_hooks) for block in find_blocks(tiny_model())]

    with torch.no_grad():
        hidden = tiny_model()(input_ids=chunks.ids, output_hidden_states=True).hidden_states

    assert torch.allclose(seen[SITE], hidden[2], atol=1e-5)
    assert torch.allclose(seen[Site("resid_post", 0)], hidden[1], atol=1e-5)
    assert left == hooks


def test_blocks_above_the_deepest_site_do_not_run(tmp_path: Path):
    ran = []
    handle = find_blocks(tiny_model())[2].register_forward_hook(lambda *a: ran.append(True))

    with handle, Reader(tiny_model(), [SITE]) as reader:
        reader.read(tiny_corpus(tmp_path, rows=2).ids)

    assert ran == []


def test_interrupted_pass_goes_on_at_the_missing_shard(tmp_path: Path):
    chunks = tiny_corpus(tmp_path)
    store = write_activations(tiny_model(), chunks, [SITE], tmp_path / "acts", rows_per_shard=32)
    kept, lost = store.path(0).stat().st_mtime_ns, store.read(1, SITE)
    store.path(1).unlink()

    again = write_activations(tiny_model(), chunks, [SITE], tmp_path / "acts", rows_per_shard=32)

    assert again.path(0).stat().st_mtime_ns == kept
    assert torch.equal(again.read(1, SITE), lost)


def test_folder_with_other_activations_is_refused(tmp_path: Path):
    chunks = tiny_corpus(tmp_path)
    write_activations(tiny_model(), chunks, [SITE], tmp_path / "acts")

    with pytest.raises(TrainError) as raised:
        write_activations(tiny_model(), chunks, [Site("resid_post", 0)], tmp_path / "acts")

    assert "sites ['resid_post.1']" in raised.value.found


def test_site_that_training_cannot_read_is_refused():
    with pytest.raises(TrainError, match="blocks 0..2"), Reader(tiny_model(), [Site("resid_post", 9)]):
        pass


def test_model_without_a_layout_is_refused():
    with pytest.raises(UnsupportedModel, match="no layout"):
        find_blocks(torch.nn.Linear(2, 2))


def test_every_epoch_has_the_same_tokens_in_another_order(tmp_path: Path):
    store = write_activations(tiny_model(), tiny_corpus(tmp_path), [SITE], tmp_path / "acts")
    batches = Batches(store, SITE, batch=int(store.chunks.n_tokens), seed=3)

    first, second = batches.at(0), batches.at(1)

    assert batches.steps_per_epoch == 1
    assert not torch.equal(first, second)
    assert torch.allclose(first.float().sum(0), second.float().sum(0), rtol=1e-3)
    assert torch.equal(first, Batches(store, SITE, batch=len(first), seed=3).at(0))


def identity_sae() -> SAE:
    """Reconstructs exactly: one latent per direction and sign."""
    eye = torch.eye(D)
    both = torch.cat([eye, -eye])
    return SAE("identity", both.T.contiguous(), torch.zeros(2 * D), both, torch.zeros(D), site=SITE)


def test_exact_reconstruction_recovers_all_of_the_loss(tmp_path: Path):
    result = evaluate_sae(identity_sae(), tiny_model(), tiny_corpus(tmp_path, rows=8))

    assert result.fvu == pytest.approx(0.0, abs=1e-9)
    assert result.ce_spliced == pytest.approx(result.ce, abs=1e-5)
    assert result.ce_recovered == pytest.approx(1.0, abs=1e-4)
    assert result.l0 == pytest.approx(D, abs=0.01)


def test_constant_reconstruction_leaves_all_of_the_variance(tmp_path: Path):
    chunks = tiny_corpus(tmp_path, rows=8)
    with Reader(tiny_model(), [SITE], exact=True) as reader:
        mean = reader.read(chunks.ids)[SITE][chunks.kept].mean(0)

    result = evaluate_sae(replace(identity_sae(), b_enc=torch.full((2 * D,), -1e6), b_dec=mean), tiny_model(), chunks)

    assert result.fvu == pytest.approx(1.0, abs=1e-5)
    assert result.dead == 2 * D


def test_words_join_the_pieces_before_the_firing_token():
    class Pieces:
        pieces = ("<bos>", "Ġphot", "osynth", "esis", ".", "Ċ", "chlor")

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [self.pieces[i] for i in ids]

        def batch_decode(self, rows: list[list[int]]) -> list[str]:
            return [self.pieces[i].replace("Ġ", " ").replace("Ċ", "\n") for (i,) in rows]

    words = Words(Pieces(), 7)
    numbers = words.number([0, 1, 2, 3, 4, 5, 6, 1])

    named = [words.names[i] for i in numbers]
    assert named == ["<bos>", "phot", "photosynth", "photosynthesis", ".", "↵", "chlor", "phot"]


def test_label_has_words_read_and_tokens_promoted():
    label = label_of(["photosynthesis", ",", "Photosynthesis", "chlorophyll"], ["plants", "chlorophyll", "light"])

    assert label == "photosynthesis, chlorophyll -> plants, light"
    assert label_of(["cell"], []) == "cell"


def test_notes_count_what_fired(tmp_path: Path):
    chunks = tiny_corpus(tmp_path)
    store = write_activations(tiny_model(), chunks, [SITE], tmp_path / "acts")
    sae = tiny_sae(site=SITE)

    notes = describe_latents(sae, tiny_model(), word_tokenizer(), store)

    f = sae.encode(store.read(0, SITE))
    assert [note.latent for note in notes] == list(range(sae.d_sae))
    assert notes[5].frequency == pytest.approx(float((f[:, 5] > 0).float().mean()), abs=1e-5)
    assert notes[5].maximum == pytest.approx(float(f[:, 5].max()), abs=1e-3)
    assert all(sum(note.shares) <= 1.001 for note in notes)
    assert VOCAB > max(len(note.promotes) for note in notes) > 0


def test_pipeline_writes_weights_card_and_notes_that_load(tmp_path: Path):
    rows = [f"the {chr(97 + i % 26)} cat number {i % 7} sat, and then it ran away to the old barn!" for i in range(60)]
    held = write_rows(tmp_path / "v.jsonl.gz", rows[:9])
    texts = Texts((write_rows(tmp_path / "t.jsonl.gz", rows),), (held,), n_tokens=2000, context=33, n_ce_chunks=2)
    subject = Subject("tiny", tiny_model(), word_tokenizer())
    config = TrainConfig(d_sae=48, k=4.0, steps=20, batch=256)
    chunks, held_out = read_texts(texts, subject.tokenizer)
    store = collect(subject, chunks, [SITE], tmp_path / "out")
    state = train_site(store, SITE, config, tmp_path / "out")

    card = finish_site(subject, store, held_out, state, site=SITE, config=config, texts=texts,
                       out=tmp_path / "out", command="saeguard train")  # fmt: skip

    sae = load_sae(tmp_path / "out" / "resid_post.1")
    assert sae.site == SITE
    assert sae.maximum is not None
    assert sae.manifest["special_ids"] == [0, 1, 2]
    assert card == json.loads((tmp_path / "out" / "resid_post.1" / "card.json").read_text())
    assert card["data"]["files"][0]["name"] == "t.jsonl.gz"
    notes = gzip.decompress((tmp_path / "out" / "resid_post.1" / "latents.jsonl.gz").read_bytes())
    assert notes.count(b"\n") == 48


def test_text_on_both_sides_is_refused(tmp_path: Path):
    path = write_rows(tmp_path / "t.jsonl.gz", ["text"])

    with pytest.raises(TrainError, match=r"t\.jsonl\.gz would be on both sides"):
        Texts((path,), (path,))
