"""Fitting boosts: what a base was denied is found and nothing else, runs resume, baselines and the command work."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from saeguard import (
    SAE,
    Boosted,
    Site,
    base_of,
    boosts_of,
    load_sae,
)
from saeguard.cli import app
from saeguard.errors import SiteNotFound, TrainError, WidthMismatch, WrongModel
from saeguard.latents import LatentTable
from saeguard.training.activations import ActivationStore, Batches, write_activations
from saeguard.training.boost import check_base, error_of, fit_batches, fit_boost, write_errors
from saeguard.training.boost_baselines import at_random, from_base, stitched
from saeguard.training.boost_pipeline import Domain, boost_domain, fit_baselines
from saeguard.training.corpus import Chunks
from saeguard.training.evaluate import evaluate_sae
from saeguard.training.pipeline import Subject, Texts, read_texts
from saeguard.training.trainer import TrainConfig
from tests import laws, words
from tests.test_training import word_tokenizer, write_rows
from tests.tiny import tiny_model, tiny_sae

D, KNOWN, DENIED = 48, 16, 8


class World:
    """Tokens are sparse sums of known directions and an offset; a base knows the first of them and not the last."""

    def __init__(self, *, batch: int = 512, active: int = 4):
        generator = torch.Generator().manual_seed(3)
        self.directions = F.normalize(torch.randn(KNOWN + DENIED, D, generator=generator), dim=-1)
        self.offset = torch.randn(D, generator=generator)
        self.batch, self.active = batch, active

    def base(self) -> SAE:
        """Reads and writes the directions that it knows, exactly."""
        reads = torch.linalg.pinv(self.directions)[:, :KNOWN].contiguous()
        return SAE("base", reads, -self.offset @ reads, self.directions[:KNOWN].clone(), self.offset.clone(),
                   activation="jumprelu", threshold=torch.full((KNOWN,), 0.5), site=Site("resid_post", 1))  # fmt: skip

    def draw(self, n: int, *, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + 100)
        chosen = torch.rand(n, len(self.directions), generator=generator).topk(self.active).indices
        amounts = torch.rand(n, self.active, generator=generator) + 1.0
        return torch.zeros(n, len(self.directions)).scatter(1, chosen, amounts) @ self.directions + self.offset

    def at(self, step: int) -> torch.Tensor:
        return self.draw(self.batch, seed=step)

    def sample(self, n: int) -> torch.Tensor:
        return self.draw(min(n, 4096), seed=-1)


class Errors:
    """What the base leaves over of the same tokens."""

    def __init__(self, world: World, base: SAE):
        self.world, self.base = world, base

    def at(self, step: int) -> torch.Tensor:
        return error_of(self.base, self.world.at(step))

    def sample(self, n: int) -> torch.Tensor:
        return error_of(self.base, self.world.sample(n))


SMALL = TrainConfig(d_sae=12, k=1.4, steps=250, batch=512, lr=1e-2, warmup=20, dead_after=20_000, aux_k=8)


def fitted(base: SAE, config: TrainConfig = SMALL, **options: Any) -> SAE:
    world = World()
    return fit_batches(base, world, Errors(world, base), config, name="boost", domain="denied", **options)


@pytest.fixture(scope="module")
def planted() -> tuple[World, SAE, SAE]:
    world = World()
    base = world.base()
    return world, base, fitted(base)


def test_boost_recovers_what_the_base_was_denied_and_nothing_else(planted: tuple[World, SAE, SAE]):
    world, _, boost = planted
    f = boost.encode(world.draw(4096, seed=7777))
    alive = boost.W_dec.float()[(f > 0).float().mean(0) > 1e-3]

    cosine = alive @ world.directions.T

    assert cosine[:, KNOWN:].max(0).values.mean() > 0.95
    assert cosine[:, KNOWN:].max(0).values.min() > 0.95
    assert (cosine.argmax(1) >= KNOWN).all()


class Elsewhere(World):
    """Other text: the same directions, other offset; the base's errors there are none of the boost's business."""

    def draw(self, n: int, *, seed: int) -> torch.Tensor:
        return super().draw(n, seed=seed + 10_000) - 2 * self.offset


def test_boost_that_saw_other_text_is_silent_there_and_as_good_at_home():
    world, other = World(), Elsewhere()
    base = world.base()
    home, away = world.draw(4096, seed=9999), other.draw(4096, seed=9999)

    without, beside = fitted(base), fitted(base, others=(other,))

    errors = [
        float((error_of(base, home) - boost.decode(boost.encode(home))).square().sum()) for boost in (without, beside)
    ]
    assert errors[1] < 0.1 * float(error_of(base, home).square().sum())
    assert (beside.encode(away) > 0).float().sum(-1).mean() < 0.1 * (without.encode(away) > 0).float().sum(-1).mean()


def test_boosts_that_saw_each_others_text_keep_their_gains_when_stacked():
    world, other = World(), Elsewhere()
    base = world.base()
    mine = fitted(base, others=(other,))
    theirs = fit_batches(base, other, Errors(other, base), SMALL, name="theirs", domain="other", others=(world,))
    home = world.draw(4096, seed=9999)

    alone, stacked = (
        float((home - sae.decode(sae.encode(home))).square().sum())
        for sae in (Boosted(base, [mine]), Boosted(base, [mine, theirs]))
    )

    assert stacked < 1.1 * alone


def test_boosted_explains_what_the_base_alone_does_not(planted: tuple[World, SAE, SAE]):
    world, base, boost = planted
    x, both = world.draw(4096, seed=9999), Boosted(base, [boost])

    before, after = ((x - sae.decode(sae.encode(x))).square().sum() for sae in (base, both))

    assert after < 0.1 * before


def test_boosting_leaves_the_latents_of_the_base_as_they_were(planted: tuple[World, SAE, SAE]):
    world, base, boost = planted
    x, before, both = world.draw(999, seed=1), base.fingerprint(), Boosted(base, [boost])

    assert torch.equal(both.encode(x)[:, :KNOWN], base.encode(x))
    assert base.fingerprint() == base_of(both).fingerprint() == before
    assert [one.fingerprint() for one in boosts_of(both)] == [boost.fingerprint()]


def test_resumed_boost_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path):
    base, config = World().base(), replace(SMALL, steps=40, dead_after=2_000)
    whole = fitted(base, config)

    fitted(base, config, checkpoint=tmp_path / "c.pt", every=10, stop_at=17)
    resumed = fitted(base, config, checkpoint=tmp_path / "c.pt", every=10, resume=True)

    assert resumed.fingerprint() == whole.fingerprint()


def test_b_dec_of_a_boost_is_zero_and_its_rows_have_unit_length(planted: tuple[World, SAE, SAE]):
    _, _, boost = planted

    assert not boost.b_dec.any()
    assert torch.allclose(boost.W_dec.float().norm(dim=-1), torch.ones(boost.d_sae), atol=1e-3)
    assert (boost.W_dec.dtype, boost.b_enc.dtype) == (torch.float16, torch.float32)


def test_threshold_gives_k_latents_per_token_of_the_domain(planted: tuple[World, SAE, SAE]):
    world, _, boost = planted

    f = boost.encode(world.draw(4096, seed=4242))

    assert float((f > 0).sum(1).float().mean()) == pytest.approx(SMALL.k, abs=0.1)


@pytest.mark.parametrize("norm", ["center", "const_norm", "layer_norm"])
def test_boost_of_a_base_with_a_norm_learns_in_its_units(norm):
    """Read and written as the base does it: the planted directions are found although every token has its own scale."""
    world = World()
    base = replace(world.base(), norm=norm)
    boost = fitted(base, replace(SMALL, steps=100))
    x, both = world.draw(4096, seed=9), Boosted(base, [boost])

    before, after = ((x - sae.decode(sae.encode(x), x)).square().sum() for sae in (base, both))

    assert (boost.norm, boost.eps) == (norm, base.eps)
    assert after < 0.75 * before


def test_too_little_text_for_a_threshold_is_refused():
    class Short(World):
        def sample(self, n: int) -> torch.Tensor:
            return self.draw(100, seed=-1)

    base = World().base()

    with pytest.raises(TrainError, match="there are 100 tokens to set its threshold on, and 1024 are the least"):
        fit_batches(base, Short(), Errors(Short(), base), SMALL, name="boost", domain="denied")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda base: replace(base, site=None), "it names no site"),
        (lambda base: replace(base, site_out=Site("resid_post", 2)), "it is a transcoder"),
        (lambda base: laws.with_boosts(base, [2]), "it is boosted already"),
        (lambda base: base.narrow([1, 2]), "only some of its latents were read"),
        (lambda base: replace(base, manifest={"processing": {"fold_ln": True}}), "trained on processed weights"),
    ],
    ids=["no site", "transcoder", "boosted", "narrowed", "processed"],
)
def test_base_that_cannot_be_boosted_is_refused(change, found):
    with pytest.raises(TrainError, match=found):
        check_base(change(World().base()))


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Subject, Texts, ActivationStore, Chunks]:
    folder = tmp_path_factory.mktemp("boost")
    rows = [f"the {chr(97 + i % 26)} cat number {i % 7} sat, and then it ran away to the old barn!" for i in range(60)]
    texts = Texts((write_rows(folder / "t.jsonl.gz", rows),), (write_rows(folder / "v.jsonl.gz", rows[:9]),),
                  context=33, n_ce_chunks=2)  # fmt: skip
    subject = Subject("tiny", tiny_model(), word_tokenizer())
    chunks, held_out = read_texts(texts, subject.tokenizer)
    store = write_activations(subject.model, chunks, [Site("resid_post", 1)], folder / "acts", rows_per_shard=32)
    return folder, subject, texts, store, held_out


def test_errors_on_disk_are_those_of_the_base_in_the_order_of_the_activations(collected: Any):
    _, _, _, store, _ = collected
    base, site = tiny_sae(), Site("resid_post", 1)

    errors = write_errors(base, store)

    for shard in range(store.n_shards):
        x, e = store.read(shard, site).float(), errors.read(shard, site).float()
        assert torch.allclose(e, x - base.decode(base.encode(x)), atol=0.05, rtol=0.01)
    assert (
        Batches(store, site, batch=64, seed=3).sample(500).shape
        == Batches(errors, site, batch=64, seed=3).sample(500).shape
    )


def test_interrupted_errors_go_on_at_the_missing_shard(collected: Any):
    _, _, _, store, _ = collected
    errors, site = write_errors(tiny_sae(seed=2), store), Site("resid_post", 1)
    kept, lost = errors.path(0).stat().st_mtime_ns, errors.read(1, site)
    errors.path(1).unlink()

    again = write_errors(tiny_sae(seed=2), store)

    assert again.path(0).stat().st_mtime_ns == kept
    assert torch.equal(again.read(1, site), lost)


def test_damaged_shard_is_named(collected: Any):
    _, _, _, store, _ = collected
    errors = write_errors(tiny_sae(seed=3), store)
    errors.path(0).write_bytes(errors.path(0).read_bytes()[:100])

    with pytest.raises(TrainError, match=r"shard-00000\.safetensors: they cannot be read"):
        errors.read(0, Site("resid_post", 1))


def test_checkpoint_of_another_text_elsewhere_is_not_gone_on_from(collected: Any, tmp_path: Path):
    _, _, _, store, _ = collected
    other, base = replace(store, chunks=replace(store.chunks, ids=store.chunks.ids.flip(1))), tiny_sae()
    other = write_activations(tiny_model(), other.chunks, [Site("resid_post", 1)], tmp_path / "b", rows_per_shard=32)
    config = TrainConfig(d_sae=16, k=3.0, steps=2, batch=256)
    options: dict[str, Any] = {"name": "boost", "domain": "cats", "checkpoint": tmp_path / "c.pt", "resume": True}
    first = fit_boost(base, store, config, elsewhere=(store,), **options)

    with pytest.raises(TrainError, match="of another text, model or base"):
        fit_boost(base, store, config, elsewhere=(other,), **options)
    again = fit_boost(base, store, config, elsewhere=(store,), **options)

    assert again.fingerprint() == first.fingerprint()


def test_base_of_another_model_is_refused_before_anything_is_trained(collected: Any, tmp_path: Path):
    _, subject, texts, store, held_out = collected
    config, cats = TrainConfig(d_sae=16, k=3.0, steps=2, batch=256), Domain("cats", texts)
    strangers = {
        WidthMismatch: tiny_sae(d_in=16),
        WrongModel: replace(tiny_sae(), manifest={"model_shape": {"num_hidden_layers": 9}}),
        SiteNotFound: tiny_sae(site=Site("resid_post", 77)),
    }

    for error, base in strangers.items():
        with pytest.raises(error):
            boost_domain(subject, base, cats, store, held_out, config, tmp_path / "out", command="saeguard boost")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "a+b", "a/b"])
def test_domain_that_no_base_and_domain_could_name_is_refused(collected: Any, name: str):
    with pytest.raises(TrainError, match=r"base\+domain"):
        Domain(name, collected[2])


def test_activations_without_the_site_of_the_base_are_refused(collected: Any):
    _, _, _, store, _ = collected

    with pytest.raises(TrainError, match=r"errors at resid_post\.0: the activations in .* do not have it"):
        write_errors(tiny_sae(site=Site("resid_post", 0)), store)


def test_pipeline_writes_a_boost_that_loads_and_a_card_with_baselines(collected: Any, tmp_path: Path):
    folder, subject, texts, store, held_out = collected
    other = write_rows(folder / "g.jsonl.gz", ["a quiet harbour under the grey morning sky, and no one there"] * 4)
    base = replace(tiny_sae(), name="tiny/resid_post.1")
    config = TrainConfig(d_sae=16, k=3.0, steps=8, batch=256)

    card = boost_domain(subject, base, Domain("cats", texts, (other,)), store, held_out, config, tmp_path / "cats",
                        command="saeguard boost", baselines=True)  # fmt: skip

    boost = load_sae(tmp_path / "cats")
    both = Boosted(base, [boost])
    assert card == json.loads((tmp_path / "cats" / "card.json").read_text(encoding="utf-8"))
    assert (boost.name, both.name, both.d_sae) == ("tiny/resid_post.1/boosts/cats", "tiny/resid_post.1+cats", 64)
    assert boost.maximum is not None
    assert (boost.manifest["special_ids"], boost.manifest["boost"]["domain"]) == ([0, 1, 2], "cats")
    assert set(card["baselines"]) == {"extended (active)", "extended (random)", "fine-tuned", "stitched", "at random"}
    assert card["evaluation"]["domain"]["base"] == evaluate_sae(base, subject.model, held_out, n_ce_chunks=2).rounded()
    assert card["changes"]["ev_after"] == pytest.approx(1 - card["evaluation"]["domain"]["boosted"]["fvu"], abs=1e-4)
    assert len(LatentTable.load(tmp_path / "cats")) == 16


def test_general_text_that_is_trained_on_is_refused(collected: Any):
    _, _, texts, _, _ = collected

    with pytest.raises(TrainError, match=r"t\.jsonl\.gz is already used to train or to measure it"):
        Domain("cats", texts, texts.train)
    with pytest.raises(TrainError, match=r"other text for a boost .* is already used"):
        Domain("cats", texts, elsewhere=texts.held_out)


def test_stitched_and_random_latents_leave_the_base_alone_and_trained_ones_do_not(collected: Any):
    _, _, _, store, _ = collected
    base = tiny_sae()

    found = fit_baselines(base, store, TrainConfig(d_sae=16, k=3.0, steps=4, batch=256))

    x = store.read(0, Site("resid_post", 1)).float()
    for name in ("stitched", "at random"):
        assert torch.equal(found[name].encode(x)[:, :48], base.encode(x))
    for name in ("extended (active)", "extended (random)", "fine-tuned"):
        assert not torch.equal(found[name].W_dec[:48].float(), base.W_dec)
    assert {name: sae.d_sae for name, sae in found.items()} == {
        "extended (active)": 64, "extended (random)": 64, "fine-tuned": 48, "stitched": 64, "at random": 64,
    }  # fmt: skip


def test_stitched_latents_explain_the_error_better_than_random_ones():
    world = World()
    base = world.base()
    config = replace(SMALL, d_sae=32, k=4.0, steps=150)

    sewn = stitched(base, world, Errors(world, base), config, 12)
    random = at_random(base, world, Errors(world, base), 12, k=1.4, seed=0)

    x = world.draw(4096, seed=4)
    before, by_stitching, by_chance = (
        float((x - sae.decode(sae.encode(x))).square().sum()) for sae in (base, sewn, random)
    )
    assert by_stitching < 0.5 * before
    assert by_stitching < by_chance < before


def test_base_in_training_form_is_the_same_function():
    """Scaled inputs, unit rows and b_dec taken off first: pre-activations are the base's, times length and scale."""
    world = World()
    base, x = replace(world.base(), W_dec=world.base().W_dec * 2), world.draw(64, seed=1)

    weights, centre, scale = from_base(base, x)

    pre = (x - centre) * scale @ weights.W_enc + weights.b_enc
    assert torch.allclose(pre / scale / 2, x @ base.W_enc + base.b_enc, atol=1e-4)
    assert torch.allclose(weights.W_dec * 2, base.W_dec)


def test_command_trains_a_boost_and_says_what_it_changed(tmp_path: Path):
    words.save_model(tmp_path / "model")
    words.save_described_sae(tmp_path / "sae")
    for name, start in (("corpus", 3), ("held_out", 4), ("other", 5)):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"w{start + i * i % 50}" for i in range(1500)))
    arguments = ["boost", "--base", "sae", "--corpus", "corpus.txt", "--validation", "held_out.txt", "--general",
                 "other.txt", "--model", "model", "--out", "moths", "--latents", "8", "--k", "2", "--steps", "4",
                 "--batch", "256", "--context", "64", "--ce-chunks", "2"]  # fmt: skip

    with contextlib.chdir(tmp_path):
        told = CliRunner().invoke(app, arguments)
        again = CliRunner().invoke(app, [*arguments, "--resume", "--json"])

    assert told.exit_code == again.exit_code == 0, told.output + again.output
    assert "8 latents behind" in told.output
    card = json.loads(again.stdout)
    assert (card["domain"], card["d_sae"], card["training"]["steps"]) == ("moths", 8, 4)
    assert load_sae(tmp_path / "moths").manifest["boost"]["domain"] == "moths"
