"""Dictionaries share the rows that were planted in both; what each does on text is what the other measures say."""

import json
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize
from typer.testing import CliRunner

from saeguard import SAE, Site
from saeguard.cli import app
from saeguard.errors import (
    BrokenFile,
    MissingExtra,
    NotSliceable,
    ScoreMismatch,
    UnsupportedFormat,
    WidthMismatch,
    WrongModel,
)
from saeguard.evaluating import overlap as overlap_module
from saeguard.evaluating.overlap import Overlap, match, nearest, overlap
from saeguard.evaluating.passes import Text
from saeguard.evaluating.portrait import portrait
from saeguard.loaders.native import save_sae
from saeguard.training.corpus import Chunks
from saeguard.training.evaluate import evaluate_sae
from tests import words
from tests.tiny import BOS, D, prompt, tiny_model, tiny_sae


def unit(n: int, *, seed: int, d: int = D) -> torch.Tensor:
    return normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def with_rows(W_dec: torch.Tensor, name: str = "made") -> SAE:
    d_sae, d_in = W_dec.shape
    return SAE(name, W_dec.T.contiguous(), torch.zeros(d_sae), W_dec, torch.zeros(d_in), site=Site("resid_post", 1))


def text_of(ids: torch.Tensor, name: str = "text") -> Text:
    return Text(name, ids, torch.ones_like(ids).bool(), ids != BOS)


TEXTS = [text_of(prompt(4, 31, seed=1), "a"), text_of(prompt(3, 21, seed=2), "b")]


def test_permuted_and_rescaled_dictionaries_are_the_same():
    rows = unit(60, seed=0)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))

    found = overlap(with_rows(rows), with_rows(rows[order] * torch.linspace(0.1, 9, 60)[:, None]))

    assert found.share_a == found.share_b == 1.0
    assert found.nearest_a == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(match(rows, rows[order]).b, order.argsort())


def test_random_dictionaries_share_next_to_nothing():
    found = overlap(with_rows(unit(100, seed=0, d=128)), with_rows(unit(100, seed=1, d=128)))

    assert found.shared == 0
    assert found.nearest_a < 0.5


def test_rows_that_point_the_other_way_are_not_shared():
    rows = unit(20, seed=0)

    found = overlap(with_rows(rows), with_rows(-rows))

    assert found.shared == 0


def test_extended_form_shares_all_of_its_base():
    base, extra = unit(40, seed=0, d=64), unit(24, seed=1, d=64)

    found = overlap(with_rows(base), with_rows(torch.cat([extra, base])))

    assert (found.share_a, found.share_b) == (1.0, 40 / 64)
    assert found.nearest_b < 1.0


def test_a_latent_has_one_partner_at_most():
    row = unit(1, seed=0)

    found = overlap(with_rows(torch.cat([row, row])), with_rows(torch.cat([row, unit(1, seed=9)])))

    assert found.shared == 1
    assert found.nearest_a == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("candidates", [None, 6])
def test_matching_has_the_largest_sum_of_all_permutations(seed, candidates):
    a, b = unit(6, seed=seed, d=3), unit(6, seed=100 + seed, d=3)
    cosines = (a @ b.T).clamp(min=0.0)

    found = match(a, b, candidates=candidates)

    best = max(float(cosines[range(6), list(order)].sum()) for order in permutations(range(6)))
    assert float(found.cosine.sum()) == pytest.approx(best, abs=1e-5)
    assert len(set(found.a.tolist())) == len(set(found.b.tolist())) == len(found.a)
    assert torch.allclose(found.cosine, (a[found.a] * b[found.b]).sum(-1), atol=1e-6)


@pytest.mark.parametrize(("n_a", "n_b"), [(50, 70), (70, 50), (60, 60)])
def test_few_candidates_find_what_is_shared(n_a, n_b):
    shared = unit(30, seed=0, d=24)
    noise = lambda seed, n: torch.cat([normalize(shared + 0.05 * unit(30, seed=seed, d=24)), unit(n, seed=seed, d=24)])
    a, b = noise(1, n_a - 30), noise(2, n_b - 30)

    whole, few = match(a, b), match(a, b, candidates=8)

    assert int((whole.cosine >= 0.7).sum()) == int((few.cosine >= 0.7).sum()) == 30
    assert float(few.cosine.sum()) <= float(whole.cosine.sum()) + 1e-4


def test_chunks_change_nothing(monkeypatch):
    a, b = unit(33, seed=0), unit(47, seed=1)
    whole, matched = nearest(a, b), match(a, b, candidates=9)

    monkeypatch.setattr(overlap_module, "CHUNK", 47 * 4)
    parts, again = nearest(a, b), match(a, b, candidates=9)

    assert torch.allclose(parts[0], whole[0], atol=1e-6)
    assert torch.allclose(parts[1], whole[1], atol=1e-6)
    assert torch.equal(matched.a, again.a)
    assert torch.equal(matched.b, again.b)
    assert torch.allclose(whole[0], (a @ b.T).amax(1), atol=1e-6)


def test_wide_dictionaries_say_that_candidates_were_matched(monkeypatch):
    rows = unit(40, seed=0)
    monkeypatch.setattr(overlap_module, "WHOLE", 100)

    found = overlap(with_rows(rows), with_rows(rows.flip(0)))

    assert found == Overlap(40, 40, 40, 0.7, found.nearest_a, found.nearest_b, 32)


REFUSED = {
    "width": (lambda: with_rows(unit(4, seed=0, d=16)), WidthMismatch, "vectors of width 32 .* the other 16"),
    "site": (lambda: replace(with_rows(unit(4, seed=0)), site=Site("resid_post", 2)), WrongModel, "sites differ"),
    "output": (
        lambda: replace(with_rows(unit(4, seed=0)), site_out=Site("mlp_out", 1)), WrongModel, "output sites differ"
    ),
    "model": (lambda: replace(with_rows(unit(4, seed=0)), model="org/other"), WrongModel, "models differ"),
    "part": (lambda: with_rows(unit(4, seed=0)).narrow([0, 2]), NotSliceable, "only 2 of the 4 latents"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_dictionaries_of_different_streams_are_refused(case):
    make, kind, message = REFUSED[case]

    with pytest.raises(kind, match=message):
        overlap(replace(with_rows(unit(6, seed=1)), model="org/Tiny"), make())


def test_other_site_of_the_same_width_is_compared_when_asked_for():
    rows = unit(10, seed=0)

    found = overlap(with_rows(rows), replace(with_rows(rows), site=Site("resid_post", 2)), anyway=True)

    assert found.share_a == 1.0


def test_dictionary_shares_all_with_itself_whatever_the_cosine_asked_for():
    assert overlap(tiny_sae(), tiny_sae(), least=1.0).share_a == 1.0


def test_decoder_that_is_not_a_number_is_named():
    with pytest.raises(BrokenFile, match="W_dec holds NaN"):
        overlap(tiny_sae(), replace(tiny_sae(), W_dec=torch.full((48, D), float("nan"))))


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)

    with pytest.raises(MissingExtra, match=r"saeguard\[eval\]"):
        overlap(tiny_sae(), tiny_sae(seed=1))


def test_portrait_agrees_with_the_measures_that_cards_hold():
    model, sae, text = tiny_model(), tiny_sae(), TEXTS[0]

    found = portrait(model, sae, [text]).whole
    card = evaluate_sae(sae, model, Chunks(text.ids, text.counted, (), 0))

    for name in ("n_tokens", "n_massive", "fvu", "fvu_typical", "l0", "dead", "n_ce_tokens", "ce", "ce_spliced"):
        wanted = getattr(card, "n_ce_tokens" if name == "n_ce_tokens" else name)
        assert getattr(found, name) == pytest.approx(wanted, rel=1e-4), name
    assert found.ce_zeroed == pytest.approx(card.ce_zeroed, rel=1e-4)


def test_recovered_is_one_for_an_exact_sae_and_zero_for_one_that_gives_zero():
    eye = torch.eye(D)
    exact = SAE("exact", torch.cat([eye, -eye], 1), torch.zeros(2 * D), torch.cat([eye, -eye]), torch.zeros(D),
                site=Site("resid_post", 1))  # fmt: skip
    text = [text_of(prompt(4, 31, seed=7))]
    nothing = replace(exact, W_dec=0 * exact.W_dec)

    full, none = (portrait(tiny_model("gpt2"), sae, text).whole for sae in (exact, nothing))

    assert full.fvu < 1e-9
    if full.ce_recovered is not None:
        assert full.ce_recovered == pytest.approx(1.0, abs=1e-4)
        assert none.ce_recovered == pytest.approx(0.0, abs=1e-6)
    assert none.ce_spliced == pytest.approx(none.ce_zeroed, rel=1e-6)


def test_latents_that_fire_on_random_tokens_are_fake_and_silent_ones_dead():
    sae = tiny_sae()
    b_enc = sae.b_enc.clone()
    b_enc[:12], b_enc[12:] = 1e4, -1e4
    made = replace(sae, b_enc=b_enc)

    found = portrait(tiny_model(), made, TEXTS, random=text_of(prompt(5, 20, seed=8)), n_ce_rows=0)

    assert found.fake == 12 / 48
    assert found.whole.dead == 36
    assert found.whole.l0 == 12.0
    assert found.whole.ce is None
    assert found.whole.ce_recovered is None


def test_fake_means_more_often_than_the_threshold():
    random = text_of(prompt(5, 20, seed=8))

    shares = [
        portrait(tiny_model(), tiny_sae(), TEXTS, random=random, fake_above=above, n_ce_rows=0).fake
        for above in (0.0, 0.3, 0.6, 1.0)
    ]

    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0.0


@pytest.mark.parametrize("batch_rows", [1, 3])
@pytest.mark.parametrize("front", [0, 3])
def test_portrait_knows_neither_batches_nor_padding(batch_rows, front):
    pad = lambda part, fill: torch.nn.functional.pad(part, (front, 0), value=fill)
    texts = [Text(t.name, pad(t.ids, 9), pad(t.real, False), pad(t.counted, False)) for t in TEXTS]

    whole, found = portrait(tiny_model("gpt2"), tiny_sae(), TEXTS), portrait(
        tiny_model("gpt2"), tiny_sae(), texts, batch_rows=batch_rows
    )  # fmt: skip

    for ours, theirs in zip((found.whole, *found.texts), (whole.whole, *whole.texts), strict=True):
        for name in ("n_tokens", "fvu", "fvu_typical", "l0", "dead", "ce", "ce_spliced", "ce_zeroed"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-3), name


def test_portrait_refuses_transcoders_and_empty_texts():
    with pytest.raises(UnsupportedFormat, match="transcoder"):
        portrait(tiny_model(), replace(tiny_sae(), site_out=Site("resid_post", 2)), TEXTS)
    with pytest.raises(ScoreMismatch, match="no token to count"):
        portrait(tiny_model(), tiny_sae(), [text_of(torch.full((2, 3), BOS))])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    words.save_model(folder / "model")
    save_sae(tiny_sae(name="one"), folder / "one")
    save_sae(tiny_sae(name="two", seed=5, site=Site("resid_post", 2)), folder / "two")
    (folder / "law.txt").write_text(" ".join(f"w{3 + i * i % 50}" for i in range(700)))
    (folder / "prose.txt").write_text(" ".join(f"w{3 + i * 7 % 50}" for i in range(700)))
    return folder


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == status, result.output + result.stderr
    return result


def test_command_compares_dictionaries_without_any_model(place):
    found = json.loads(run("compare", place / "one", place / "one", "--json").stdout)

    assert found["overlap"]["share_a"] == 1.0
    assert "portraits" not in found


def test_command_compares_what_both_do_on_text(place):
    given = ("compare", place / "one", place / "two", "--anyway", "--model", place / "model", "--text", place / "*.txt")
    found = json.loads(run(*given, "--ce-rows", 1, "--json").stdout)
    shown = run(*given, "--ce-rows", 0).output

    assert [one["site"] for one in found["portraits"]] == ["resid_post.1", "resid_post.2"]
    assert [part["name"] for part in found["portraits"][0]["texts"]] == ["law", "prose"]
    assert found["overlap"]["shared"] < 48
    assert all(word in shown for word in ("fake", "cross-entropy recovered", "law", "shared"))


def test_command_refuses_other_sites_unless_told(place):
    result = run("compare", place / "one", place / "two", status=2)

    assert "sites differ: resid_post.1 and resid_post.2" in result.stderr
    assert "--anyway" in result.stderr
