"""Every way to choose latents chooses what its equation does, one latent and one token at a time, and lists are held
to the SAE that they were made for."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from saeguard import Plan, Rule, Scale, steer
from saeguard.errors import BrokenFile, LatentOutOfRange, ScoreMismatch
from saeguard.scoring.attribution import loss_attribution
from saeguard.scoring.cache import Cache
from saeguard.scoring.catalogue import Job
from saeguard.scoring.gradients import GradientReader
from saeguard.scoring.reading import SiteReader
from saeguard.scoring.select import Bound, Selection, select, spelled
from saeguard.scoring.selections import SELECTIONS, choose, find, listed, read_selection
from saeguard.scoring.table import Meaning, ScoreTable
from tests import tiny
from tests.test_scoring_gradients import by_hand, row_nll, some_text
from tests.words import word_tokenizer

FLOOR = 0.4
"""Below and above what latents of the tiny SAE do."""
NAMES = [way.name for way in SELECTIONS]


@pytest.fixture(scope="module")
def job() -> Job:
    texts = {side: some_text(name=side, seed=seed, rows=9) for side, seed in (("forget", 3), ("retain", 8))}
    return Job(tiny.tiny_model(), word_tokenizer(), tiny.tiny_sae(), texts, seed=5)


@pytest.fixture(scope="module")
def rare(job) -> Job:
    """The same with a retain text of two tokens, on which most latents of the tiny SAE never fire."""
    retain = job.texts["retain"]
    first = (retain.kept.flatten().cumsum(0) <= 2).view_as(retain.kept)
    return replace(job, texts={**job.texts, "retain": replace(retain, kept=retain.kept & first)})


@pytest.fixture(scope="module")
def dense(job) -> dict[str, Any]:
    """Per text the activations and gradients at every counted token, and the tokens of each document."""
    found: dict[str, Any] = {}
    for side, text in job.texts.items():
        f, g = by_hand(job.model, job.sae, text)
        found[side] = f.detach().double().numpy(), g.double().numpy(), text.kept.sum(1).tolist()
    return found


def importances(reading: str, f: np.ndarray, sizes: list[int]) -> list[float]:
    """By the definitions, one latent at a time."""
    found = []
    for j in range(f.shape[1]):
        column = [float(x) for x in f[:, j]]
        starts = np.cumsum([0, *sizes])
        means = [sum(column[a:b]) / (b - a) for a, b in zip(starts[:-1], starts[1:], strict=True) if b > a]
        found.append({
            "squared_mean": (sum(column) / len(column)) ** 2,
            "mean_square": sum(x * x for x in column) / len(column),
            "document": sum(m * m for m in means) / len(means),
            "frequency": sum(x > 0 for x in column) / len(column),
        }[reading])  # fmt: skip
    return found


def reference(name: str, dense: dict[str, Any]) -> list[int]:
    """The latents that a way chooses, best first, by nothing but its equation."""
    (f, g, sizes), (f_r, g_r, sizes_r) = dense["forget"], dense["retain"]
    often, often_r = (importances("frequency", *part) for part in ((f, sizes), (f_r, sizes_r)))
    reading = {"dsg": "squared_mean", "ratio": "squared_mean"}.get(name, name.removeprefix("dsg_"))
    numbers: dict[int, float] = {}
    if name.startswith("dsg") or name in ("ratio", "squared_mean", "mean_square", "frequency"):
        ours, theirs = importances(reading, f, sizes), importances(reading, f_r, sizes_r)
        ratio = [a / (b + 1e-21) for a, b in zip(ours, theirs, strict=True)]
        least, least_ratio = np.percentile(ours, 5), np.percentile(ratio, 95)
        for j in range(len(ours)):
            if name.startswith("dsg") and ours[j] >= least and ratio[j] >= least_ratio and often[j] >= FLOOR:
                numbers[j] = ours[j]
            if name == "ratio" and often[j] >= FLOOR:
                numbers[j] = ratio[j]
            if name == reading:
                numbers[j] = ours[j]
    elif name == "farrell":
        numbers = {j: often[j] for j in range(len(often)) if often_r[j] < 0.01 and often[j] > 0}
    elif name == "crisp":
        for j in range(f.shape[1]):
            if f[:, j].sum() / (f_r[:, j].sum() + 1) >= 3:
                numbers[j] = (f[:, j] > 0).sum() - (f_r[:, j] > 0).sum()
    elif name == "attribution":
        adds = [-(a * b).sum(0) / len(a) for a, b in ((f, g), (f_r, g_r))]
        numbers = {j: adds[0][j] - abs(adds[1][j]) for j in range(f.shape[1]) if often[j] >= FLOOR}
    return sorted(numbers, key=lambda j: (-np.float32(numbers[j]), j))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("random", "farrell", "crisp")])
def test_way_chooses_what_its_equation_chooses(name, job, dense):
    found = choose(name, job, top=48, floor=FLOOR)

    expected = reference(name, dense)
    assert 0 < len(expected) < 48 or find(name).by == "forget_importance"
    assert found.latents == tuple(expected)
    assert found.provenance["selection"] == name
    assert found.provenance["meanings"][find(name).by]["unit"]


@pytest.mark.parametrize("name", ["farrell", "crisp"])
def test_rules_that_want_latents_rare_elsewhere_choose_them(name, rare, dense):
    f_r, g_r, _ = dense["retain"]

    found = choose(name, rare, top=48)

    assert found.latents == tuple(reference(name, {**dense, "retain": (f_r[:2], g_r[:2], [2])}))


def test_random_control_is_drawn_by_its_seed_from_latents_that_fire(rare, dense):
    few = replace(rare, texts={"forget": rare.texts["retain"], "retain": rare.texts["retain"]})

    found = choose("random", few, top=48)

    fires = set(np.nonzero((dense["retain"][0][:2] > 0).any(0))[0].tolist())
    assert set(found.latents) == fires
    assert 5 < len(fires) < 48
    assert choose("random", few, top=5).latents == found.latents[:5]
    assert choose("random", replace(few, seed=6), top=48).latents != found.latents


def test_bounds_hold_on_frequencies_whatever_the_way(job, dense):
    often_r = np.float32((dense["retain"][0] > 0).mean(0))
    most = float(np.median(often_r))

    for name in ("attribution", "random", "mean_square"):
        found = choose(name, job, top=48, bounds=(Bound("retain_frequency", most=most),))
        assert found.latents
        assert all(often_r[j] <= most for j in found.latents)

    few = choose("ratio", job, top=48, bounds=(Bound("dsg_ratio", least=90, percentile=True),), within={"dsg_ratio": 3})
    assert few.latents == choose("ratio", job, top=3).latents


def test_attribution_is_what_a_small_ablation_adds_to_the_loss(job):
    table = loss_attribution(job.model, job.sae, job.texts["forget"], job.texts["retain"])
    text, eps = job.texts["forget"], 1e-3
    n = int(text.kept.sum())

    def nats(*rules: Rule) -> float:
        total = 0.0
        for row in range(len(text.ids)):
            ids = text.ids[row, text.mask[row]]
            special = {"special_ids": (tiny.PAD, tiny.BOS, tiny.EOS)}
            with torch.no_grad(), steer(job.model, Plan(rules), saes={"tiny": job.sae}, **special):
                total += float(row_nll(ids)(job.model(ids[None]).logits[0].double()))
        return total

    for latent in table.ranked("loss_attribution_forget")[:3]:
        less, more = (nats(Rule("tiny", (latent,), Scale(1.0 + sign * eps))) for sign in (-1, 1))
        assert float(table.column("loss_attribution_forget")[latent]) == pytest.approx((less - more) / (2 * eps * n),
                                                                                      rel=0.02)  # fmt: skip
    both = (table.column(f"loss_attribution_{side}").double() for side in ("forget", "retain"))
    ours, theirs = both
    torch.testing.assert_close(table.column("loss_attribution").double(), ours - theirs.abs(), equal_nan=True)


def test_attribution_says_nothing_of_latents_that_never_fire_on_what_is_to_be_forgotten(rare, dense):
    few, many = rare.texts["retain"], rare.texts["forget"]

    table = loss_attribution(rare.model, rare.sae, few, many)

    silent = ~(dense["retain"][0][:2] > 0).any(0)
    assert silent.any()
    for column in table.columns.values():
        assert column.isnan().tolist() == silent.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_second_choice_from_the_same_texts_reads_nothing_again(name, rare, tmp_path, monkeypatch):
    first = choose(name, replace(rare, cache=Cache(tmp_path)), top=4)
    for reader in (SiteReader, GradientReader):
        monkeypatch.setattr(reader, "read", lambda *given: pytest.fail("read again"))

    assert choose(name, replace(rare, cache=Cache(tmp_path)), top=4) == first


@pytest.mark.parametrize("read", [SiteReader, GradientReader])
def test_choice_that_was_interrupted_ends_the_same(read, job, tmp_path, monkeypatch):
    reads, original = [], read.read

    def until(self: Any, *given: Any) -> Any:
        reads.append(given)
        if len(reads) == 2:
            raise KeyboardInterrupt
        return original(self, *given)

    monkeypatch.setattr(read, "read", until)
    with pytest.raises(KeyboardInterrupt):
        choose("attribution", replace(job, cache=Cache(tmp_path)), top=6)

    again = choose("attribution", replace(job, cache=Cache(tmp_path)), top=6)
    assert again.latents == choose("attribution", job, top=6).latents


def test_way_that_is_not_there_or_rejects_all_is_refused(job):
    with pytest.raises(ScoreMismatch, match="no selection of that name. Known are: dsg, "):
        choose("magic", job, top=3)
    with pytest.raises(ScoreMismatch, match="by dsg: the rule rejects all of them"):
        choose("dsg", job, top=3, floor=1.1)
    with pytest.raises(ScoreMismatch, match="none is left of 48"):
        choose("random", job, top=3, bounds=(Bound("retain_frequency", least=1.1),))
    with pytest.raises(ScoreMismatch, match="this table has .*retain_frequency"):
        choose("random", job, top=3, bounds=(Bound("dsg_ratio", least=1),))


def selected(sae: Any) -> Selection:
    """From scores with and without a number."""
    values = torch.tensor([math.inf if j == 7 else math.nan if j == 3 else float(j) for j in range(sae.d_sae)])
    table = ScoreTable.of(sae, {name: (v, Meaning("share", "made up")) for name, v in
                                (("a", values), ("b", values.roll(-44)))}, seed=1)  # fmt: skip
    return select(table, "a", top=4)


def test_selection_comes_back_from_its_file_for_its_own_sae_alone(tmp_path):
    sae, path = tiny.tiny_sae(), tmp_path / "p.selection.json"
    path.write_text(selected(sae).to_json())

    found = read_selection(path, sae)

    assert found.latents == (7, 47, 46, 45)
    assert json.loads(found.to_json())["scores"] == json.loads(selected(sae).to_json())["scores"]
    assert len(found.provenance["file"]) == 64
    with pytest.raises(ScoreMismatch, match="weights differ"):
        read_selection(path, tiny.tiny_sae(seed=1))


@pytest.mark.parametrize("change", [
    {"latents": [1.0, 2, 3, 4]}, {"latents": None}, {"latents": [1]}, {"scores": []}, {"scores": {"a": ["x"] * 4}},
    {"provenance": {}}, {"provenance": 3},
], ids=str)  # fmt: skip
def test_file_that_is_no_selection_is_refused(change, tmp_path):
    path = tmp_path / "p.selection.json"
    path.write_text(json.dumps(json.loads(selected(tiny.tiny_sae()).to_json()) | change))

    with pytest.raises(BrokenFile, match=r"p.selection.json.*cannot be read"):
        read_selection(path, tiny.tiny_sae())


def test_file_that_is_no_json_or_not_there_is_refused(tmp_path):
    (tmp_path / "cut.json").write_text(selected(tiny.tiny_sae()).to_json()[:-9])

    for name in ("cut.json", "none.json"):
        with pytest.raises(BrokenFile, match="cannot be read"):
            read_selection(tmp_path / name, tiny.tiny_sae())


def test_list_names_latents_that_are_there_each_once():
    sae = tiny.tiny_sae()

    assert listed(sae, (9, 3)).latents == (9, 3)
    for wrong, error in (((), ScoreMismatch), ((3, 3), ScoreMismatch), ((48,), LatentOutOfRange)):
        with pytest.raises(error):
            listed(sae, wrong)


def test_bounds_are_spelled_as_they_are_written():
    assert spelled(Bound("dsg_ratio", least=99, percentile=True)) == "dsg_ratio>=99%"
    assert spelled(Bound("f", 0.1, 0.5)) == "f>=0.1 f<=0.5"
