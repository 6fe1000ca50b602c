"""Generation success and input score: rows of a batch are the rows alone, and planted latents are found."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from saeguard import SAE, Add, Plan, Rule, Site, capture, load_model, load_sae, steer
from saeguard.errors import MissingMaximum, NotSliceable, ScoreMismatch, SiteNotFound
from saeguard.loaders import shipped
from saeguard.scoring import generation_success as generation
from saeguard.scoring import sweep as sweeps
from saeguard.scoring.generation_success import Writing, generation_success, successes
from saeguard.scoring.input_score import EXAMPLES, FEWEST, input_score, matches, max_tokens
from saeguard.scoring.logit_lens import top_tokens
from saeguard.scoring.next_token import prefix_ids
from saeguard.scoring.prefixes import NEUTRAL
from tests import tiny
from tests.words import WORDS

TEXTS = ("w5 w9 w33 w20", "w8 w40")
STOP = 10
LATENTS = [0, 17, 40]
GREEDY = Writing(factors=(0.0, 1.0, 4.0), ks=(1, 3), tokens=5, temperature=1e-6)
SAMPLED = Writing(factors=(0.5, 3.0), ks=(1, 3), tokens=6)


@cache
def tokenizer() -> Any:
    """Word tokens, of which number `STOP` is a full stop."""
    words = [f"w{i}." if i == STOP else word for i, word in enumerate(WORDS)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def planted(model: Any, *, latent: int = 7, token: int = 29, reads: bool = False) -> SAE:
    """An SAE at the last block of which one latent writes a token's unembedding row, and reads its embedding."""
    sae = tiny.tiny_sae(site=Site("resid_pre", 0) if reads else Site("resid_post", 2), activation="relu")
    W_dec, W_enc, b_enc = sae.W_dec.clone(), sae.W_enc.clone(), sae.b_enc.clone()
    W_dec[latent] = model.get_output_embeddings().weight[token].detach()
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    if reads:
        embedding = model.get_input_embeddings().weight.detach()
        W_enc[:, latent], b_enc[latent] = embedding[token], -0.9 * embedding[token].square().sum()
    return replace(sae, W_dec=W_dec, W_enc=W_enc, b_enc=b_enc)


@torch.no_grad()
def slow_success(model: Any, sae: SAE, latent: int, factor: float, text: str, own: Tensor, how: Writing) -> list[int]:
    """Greedy, one latent, one prefix, one full pass per token."""
    ids = prefix_ids(tokenizer(), text)
    with capture(model, sae.site) as tape:
        model(torch.tensor([ids]))
    amount = factor * float(sae.encode(tape[sae.site])[0, -1].max())
    plan = Plan((Rule(sae.name, (latent,), Add(amount), start=len(ids) - 1),))
    written: list[int] = []
    while len(written) < how.tokens and not set(written) & {STOP, tiny.EOS}:
        with steer(model, plan if factor else None, saes=sae):
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    counted = [token for token in written if token not in tokenizer().all_special_ids]
    return [sum(token in own[:k].tolist() for token in counted) for k in how.ks]


# generation success


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma3"])
def test_success_is_that_of_one_greedy_row_at_a_time(name):
    model, sae = tiny.tiny_model(name), tiny.tiny_sae()
    own = top_tokens(model, sae, k=3)

    counts = successes(model, tokenizer(), sae, LATENTS, how=GREEDY, own=own, prefixes=TEXTS)
    slow = [
        [[slow_success(model, sae, j, factor, text, own[j], GREEDY) for text in TEXTS] for factor in GREEDY.factors]
        for j in LATENTS
    ]

    assert counts.tolist() == slow
    assert counts.sum() > 0


def test_which_rows_share_a_batch_changes_nothing():
    model, sae = tiny.tiny_model("llama"), tiny.tiny_sae()

    whole, some, single = (
        successes(model, tokenizer(), sae, LATENTS, how=SAMPLED, prefixes=TEXTS, batch=batch) for batch in (64, 5, 1)
    )

    assert torch.equal(whole, some)
    assert torch.equal(whole, single)
    assert whole.shape == (3, 2, 2, 2)


def test_the_seed_decides_what_is_sampled():
    model, sae = tiny.tiny_model("llama"), tiny.tiny_sae()
    hot = replace(SAMPLED, temperature=3.0)

    first, again, other = (
        successes(model, tokenizer(), sae, LATENTS, how=replace(hot, seed=seed), prefixes=TEXTS) for seed in (0, 0, 1)
    )

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_are_drawn_from_the_distribution_at_the_temperature():
    logits, n = torch.tensor([2.0, 1.0, 0.0, -1.0]), 4000
    sampler = generation._Sampler([(i, 1.0, 0) for i in range(n)], [[1]], 0.7, seed=3)

    drawn = sampler(torch.zeros(n, 1), logits.expand(n, 4)).argmax(1)

    assert (drawn.bincount(minlength=4) / n).tolist() == pytest.approx((logits / 0.7).softmax(0).tolist(), abs=0.03)


def test_tokens_count_up_to_the_first_stop_and_specials_never():
    written = torch.tensor([[5, 6, STOP, 5, 5], [1, 5, 0, 6, 6]])
    own = torch.tensor([[5, STOP, 6], [0, 6, 1]])

    counts = generation._count(written, own, [2, STOP], [0, 1, 2], (1, 2, 3))

    assert counts.tolist() == [[1, 2, 3], [0, 2, 2]]


def test_a_planted_latent_writes_its_token_and_its_best_factor_is_reported():
    model = tiny.tiny_model("llama")
    sae, how = planted(model), replace(GREEDY, factors=(4.0, 0.0, 10.0))

    table = generation_success(model, tokenizer(), sae, [3, 7, 30], how=how, prefixes=TEXTS)

    assert table.ranked("generation_success_1")[0] == 7
    assert table.row(7) == {"generation_success_1": 5.0, "generation_success_3": 5.0, "steering_factor": 4.0}
    assert int(table.columns["steering_factor"].isnan().sum()) == sae.d_sae - 3
    assert table.provenance["steering_factor"]["factors"] == [4.0, 0.0, 10.0]


def test_interrupted_and_resumed_writes_the_same(tmp_path, monkeypatch):
    model, sae, file = tiny.tiny_model("llama"), tiny.tiny_sae(), tmp_path / "part.safetensors"
    monkeypatch.setattr(sweeps, "EVERY_S", 0.0)

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    options: Any = {"how": SAMPLED, "prefixes": TEXTS, "batch": 4}
    whole = successes(model, tokenizer(), sae, LATENTS, **options)
    with pytest.raises(KeyboardInterrupt):
        successes(model, tokenizer(), sae, LATENTS, checkpoint=file, progress=interrupt, **options)
    resumed = successes(model, tokenizer(), sae, LATENTS, checkpoint=file, **options)

    assert torch.equal(whole, resumed)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_steered_is_refused_by_name():
    model, sae = tiny.tiny_model("llama"), tiny.tiny_sae()
    recorded = replace(SAMPLED, of="recorded")

    with pytest.raises(ScoreMismatch, match="Give at least 3 token ids"):
        successes(model, tokenizer(), sae, [0], how=SAMPLED, own=torch.zeros(48, 2).long(), prefixes=TEXTS)
    with pytest.raises(MissingMaximum, match="it records none"):
        successes(model, tokenizer(), replace(sae, maximum=None), [0], how=recorded, prefixes=TEXTS)
    with pytest.raises(SiteNotFound, match="at which site"):
        successes(model, tokenizer(), replace(sae, site=None), [0], how=SAMPLED, prefixes=TEXTS)
    with pytest.raises(NotSliceable, match="activations of all 48 latents"):
        successes(model, tokenizer(), sae.narrow([0]), [0], how=SAMPLED, prefixes=TEXTS)
    assert successes(model, tokenizer(), sae.narrow([0]), [0], how=recorded, prefixes=TEXTS).shape[0] == 1


def test_the_neutral_prefixes_are_fifty_and_all_different():
    assert len(set(NEUTRAL)) == len(NEUTRAL) == 50
    assert not [text for text in NEUTRAL if text != text.strip() or text.endswith(".")]


# input score


def text_of(rows: int = 24, *, length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of different lengths padded on the right: ids, which count, and which are text."""
    ids = tiny.prompt(rows, length, seed=5)
    mask = torch.arange(length) < torch.tensor([length - i % 4 for i in range(rows)])[:, None]
    ids = ids.masked_fill(~mask, tiny.PAD)
    return ids, mask & (ids > 2), mask


def test_matches_are_the_share_of_examples_whose_token_is_its_own():
    tokens = torch.full((3, 20), -1)
    tokens[0, :10] = torch.tensor([5, 5, 6, 7, 8, 9, 9, 9, 9, 9])
    tokens[1, : FEWEST - 1] = 5
    own = torch.tensor([[5, 9], [5, 9], [5, 9]])

    found = matches(tokens, own)

    assert found[0] == pytest.approx(0.7)
    assert found[1:].isnan().all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma3"])
def test_hardest_tokens_are_those_of_each_row_and_latent_alone(name):
    model, sae = tiny.tiny_model(name), tiny.tiny_sae()
    ids, kept, mask = text_of()

    found = max_tokens(model, sae, ids, kept, mask=mask, n=8)

    for latent in LATENTS:
        best = []
        for row in range(len(ids)):
            alone = ids[row][mask[row]][None]
            with torch.no_grad(), capture(model, sae.site) as tape:
                model(alone)
            f = sae.encode(tape[sae.site])[0, :, latent] * kept[row][mask[row]]
            best += [(float(f.max()), -row, int(alone[0, f.argmax()]))] if f.max() > 0 else []
        slow = [token for *_, token in sorted(best, reverse=True)][:8]
        assert found[latent].tolist() == slow + [-1] * (8 - len(slow))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_batch_and_padding_side_change_no_input_score(name):
    """GPT-2 counts padding on the left as positions unless it is told otherwise."""
    model, sae = tiny.tiny_model(name), tiny.tiny_sae()
    ids, kept, mask = text_of()
    order = mask.long().argsort(dim=1, stable=True)
    left = [tensor.gather(1, order) for tensor in (ids, kept, mask)]

    whole, pieces = (input_score(model, sae, ids, kept, mask=mask, rows=rows).columns for rows in (16, 3))
    other = input_score(model, sae, left[0], left[1], mask=left[2]).columns

    assert left[2][:, -1].all()
    assert torch.equal(whole["input_examples"], pieces["input_examples"])
    assert torch.equal(whole["input_score"].nan_to_num(-1), pieces["input_score"].nan_to_num(-1))
    assert torch.equal(whole["input_score"].nan_to_num(-1), other["input_score"].nan_to_num(-1))
    assert int(whole["input_examples"].max()) <= min(EXAMPLES, len(ids))


def test_a_latent_that_reads_an_embedding_and_writes_its_unembedding_is_found_at_the_top():
    model = tiny.fresh_model("llama")
    sae, (ids, kept, mask) = planted(model, reads=True), text_of(60)
    ids[::3, 4] = 29

    table = input_score(model, sae, ids, kept, mask=mask, own=top_tokens(model, sae, k=1))

    assert table.ranked("input_score")[0] == 7
    assert table.row(7)["input_score"] == 1.0


def test_an_sae_that_was_read_in_part_scores_what_it_holds():
    model, sae, (ids, kept, mask) = tiny.tiny_model("llama"), tiny.tiny_sae(), text_of()

    whole = input_score(model, sae, ids, kept, mask=mask).columns
    part = input_score(model, sae.narrow([9, 4]), ids, kept, mask=mask).columns

    for name in whole:
        assert torch.equal(part[name][[4, 9]].nan_to_num(-1), whole[name][[4, 9]].nan_to_num(-1))
    assert int(part["input_examples"].isnan().sum()) == sae.d_sae - 2


def test_input_score_refuses_what_it_cannot_place():
    model, sae, (ids, kept, _) = tiny.tiny_model("llama"), tiny.tiny_sae(), text_of()

    with pytest.raises(SiteNotFound, match="at which site"):
        max_tokens(model, replace(sae, site=None), ids, kept)
    with pytest.raises(ScoreMismatch, match="own tokens are given for 3 latents"):
        input_score(model, sae, ids, kept, own=torch.zeros(3, 2).long())


# the real model


def test_on_smollm2_rows_of_one_call_are_rows_alone():
    model, words = load_model("smollm2-135m-instruct")
    names = [name for name in shipped() if name.startswith("smollm2-135m-instruct")]
    sae = load_sae(names[0]) if names else tiny.tiny_sae(d_in=576, site=Site("resid_post", 15))
    own = torch.arange(20).expand(sae.d_sae, 20)
    how = Writing(factors=(0.0, 2.0), tokens=4)

    whole, single = (
        successes(model, words, sae, [11], how=how, own=own, prefixes=NEUTRAL[:2], batch=batch) for batch in (4, 1)
    )

    assert torch.equal(whole, single)
