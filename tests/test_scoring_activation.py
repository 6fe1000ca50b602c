"""Scores that are functions of the sums over texts: what their papers' equations give, and the golden numbers.

The golden file gives results only. Where its inputs are not in the notes either, the inputs here were chosen so that
the equation gives the golden result: CRISP, ReasonScore, STA and MOSAIC.
"""

import math

import pytest
import torch

from saeguard import SAE, Site
from saeguard.errors import LatentOutOfRange, ScoreMismatch
from saeguard.scoring.accumulators import PER_LATENT, Accumulator
from saeguard.scoring.contrast import conditional_difference, reason, sta, sta_vector
from saeguard.scoring.controls import fake, random_control, real, special
from saeguard.scoring.forget_retain import crisp, dsg, farrell, importance
from saeguard.scoring.frequency import alive, frequency
from saeguard.scoring.probe import mosaic
from saeguard.scoring.statistics import CorpusStatistics, PerText, Statistics, gather
from saeguard.scoring.table import ScoreTable
from saeguard.scoring.texts import Batch, Texts
from tests import tiny

S_F = [0.30, 0.05, 0.002, 0.10, 0.02, 0]
S_R = [0.25, 0.0005, 0, 0.02, 0.0009, 0]
T = 10_000
TOY_W_DEC = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0], [0, -0.6, 0.8]])
NAN = float("nan")


def sums(d_sae: int, *, n_tokens: int = T, n_documents: int = 1, **given) -> CorpusStatistics:
    """Statistics of a text that never was: what is not given is zero."""
    none = torch.zeros(d_sae, dtype=torch.float64)
    where = torch.full((d_sae,), -1)
    vectors = dict.fromkeys(PER_LATENT, none) | {"maximum_row": where, "maximum_position": where}
    vectors |= {"group_sum": torch.zeros(0, d_sae, dtype=torch.float64), "group_tokens": torch.zeros(0).long()}
    vectors |= {
        name: torch.tensor(value, dtype=torch.int64 if name == "group_tokens" else torch.float64)
        for name, value in given.items() if isinstance(value, list)
    }  # fmt: skip
    rest = {"n_special": 0, "grouped_tokens": 0, "fingerprint": "none", "name": "made up"}
    rest |= {name: value for name, value in given.items() if not isinstance(value, list)}
    return CorpusStatistics(n_tokens=n_tokens, n_documents=n_documents, **vectors, **rest)


def made(d_sae: int, **corpora: CorpusStatistics) -> Statistics:
    return Statistics("toy", "toy weights", d_sae, "toy model", {}, corpora)


def shares(values: list[float]) -> list[float]:
    return [value * T for value in values]


GOLDEN = made(
    6,
    forget=sums(6, active=shares(S_F), sum=shares(S_F)),
    retain=sums(6, active=shares(S_R), sum=shares(S_R)),
)


@pytest.mark.parametrize(("threshold", "golden"), [(0.001, [1, 4, 2]), (0.05, [3, 1, 4, 2])])
def test_farrell_selects_the_golden_latents(threshold, golden):
    table = farrell(GOLDEN, retain_threshold=threshold)

    assert table.ranked("farrell") == golden
    assert table.ranked("forget_frequency") == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(("percentile", "golden"), [(50.0, [1, 4, 2]), (90.0, [2])])
def test_dsg_selects_the_golden_latents(percentile, golden):
    assert dsg(GOLDEN, ratio_percentile=percentile).ranked("dsg") == golden


def test_dsg_floor_drops_latents_that_hardly_fire_and_moves_no_percentile():
    table = dsg(GOLDEN, ratio_percentile=50.0, floor=0.01)

    assert table.ranked("dsg") == [1, 4]
    assert table.column("dsg")[1] == pytest.approx(0.05**2)
    assert table.column("dsg_ratio")[0] == pytest.approx(1.44)


def test_percentiles_are_those_of_numpy():
    import numpy as np

    generator = torch.Generator().manual_seed(0)
    values = torch.rand(101, generator=generator, dtype=torch.float64)
    found = made(101, forget=sums(101, sum=(values * T).tolist()), retain=sums(101, sum=[1.0 * T] * 101))

    for percentile in (0.0, 12.5, 50.0, 95.0, 99.3, 100.0):
        chosen = dsg(found, ratio_percentile=percentile, forget_percentile=0.0).ranked("dsg")
        assert set(chosen) == set(
            (values.square() >= np.percentile(values.square(), percentile)).nonzero()[:, 0].tolist()
        )


def test_importance_squares_the_mean_or_means_the_square_of_tokens_or_documents():
    found = sums(2, n_tokens=4, n_documents=2, sum=[4, 8], sum_sq=[16, 20], document_sq=[2, 9])

    assert importance(found, "squared_mean").tolist() == [1, 4]
    assert importance(found, "mean_square").tolist() == [4, 5]
    assert importance(found, "document").tolist() == [1, 4.5]


def test_crisp_selects_the_golden_latents():
    target = sums(4, active=[90, 95, 60, 10], sum=[400, 90, 200, 30])
    benign = sums(4, active=[10, 5, 8, 0], sum=[20, 80, 30, 0])

    table = crisp(made(4, forget=target, retain=benign))

    assert table.ranked("crisp")[:2] == [0, 2]  # latent 1 has the largest delta, and fires as hard on benign text
    assert table.column("crisp_delta").tolist() == [80, 90, 52, 10]
    assert table.column("crisp_rho").tolist() == pytest.approx([400 / 21, 90 / 81, 200 / 31, 30])
    assert crisp(made(4, forget=target, retain=benign), candidates=2).ranked("crisp") == [0]


def test_reason_score_is_the_golden_one():
    # shares inside (.5, .25, .25), outside (.25, .25, .5); latent 0 and 2 are in both groups, latent 1 in one
    text = sums(
        3, n_tokens=30, sum=[20 + 5, 10 + 5, 10 + 10], grouped_sum=[20, 10, 10], grouped_tokens=20,
        group_sum=[[10, 10, 5], [10, 0, 5]], group_tokens=[10, 10], groups=("wait", "so"),
    )  # fmt: skip

    table = reason(made(3, text=text))

    assert table.column("reason_entropy").tolist() == pytest.approx([1, 0, 1])
    assert table.column("reason").tolist() == pytest.approx([0.25, -0.25, -0.25])
    assert reason(made(3, text=text), alpha=0.0).column("reason").tolist() == pytest.approx([0.25, 0, -0.25])
    with pytest.raises(ScoreMismatch, match="tokens of 0 groups"):
        reason(made(3, text=sums(3)))


def test_reason_entropy_is_that_of_the_means_over_groups():
    text = sums(
        1, n_tokens=100, sum=[30.0], grouped_sum=[28.0], grouped_tokens=28,
        group_sum=[[6.0], [8.0], [0.0], [0.0]], group_tokens=[2, 8, 18, 0], groups=("a", "b", "c", "none"),
    )  # fmt: skip

    p = torch.tensor([3 / 4, 1 / 4])
    expected = float(-(p * p.log()).sum()) / math.log(3)
    assert float(reason(made(1, text=text)).column("reason_entropy")) == pytest.approx(expected)


def toy_sae() -> SAE:
    return SAE(
        name="toy", W_enc=TOY_W_DEC.T.contiguous(), b_enc=torch.zeros(5), W_dec=TOY_W_DEC, b_dec=torch.zeros(3),
        activation="jumprelu", threshold=torch.full((5,), 0.5), site=Site("resid_post", 0),
    )  # fmt: skip


def test_sta_gives_the_golden_mask_and_vector():
    sae = toy_sae()
    positive = sums(5, n_documents=10, document_sum=[5, 0, 20, 5, 35], document_active=[3, 0, 0, 5, 9])
    negative = sums(5, n_documents=10, document_sum=[0, 20, 5, 0, 5], document_active=[2, 8, 9, 3, 1])
    statistics = Statistics("toy", sae.fingerprint(), 5, "toy model", {}, {"positive": positive, "negative": negative})

    table = sta(statistics)

    assert table.column("sta").isfinite().int().tolist() == [0, 1, 0, 0, 1]
    assert sta_vector(sae, table).tolist() == pytest.approx([0, -3.8, 2.4])
    assert float(torch.linalg.vector_norm(sta_vector(sae, table, norm=7.0))) == pytest.approx(7.0)
    with pytest.raises(ScoreMismatch, match="weights differ"):
        sta_vector(tiny.tiny_sae(d_sae=5, d_in=3), table)


def test_sta_leaves_out_what_grows_and_fires_in_fewer_documents():
    positive = sums(5, n_documents=10, document_sum=[5, 0, 20, 5, 35], document_active=[3, 0, 0, 5, 9])
    negative = sums(5, n_documents=10, document_sum=[0, 20, 5, 0, 5], document_active=[2, 8, 9, 3, 1])
    found = made(5, positive=positive, negative=negative)

    table = sta(found, trim=0.3)

    assert table.column("sta_activation").tolist() == pytest.approx([0.5, -2, 1.5, 0.5, 3])
    assert table.column("sta_frequency").tolist() == pytest.approx([0.1, -0.8, -0.9, 0.2, 0.8])
    assert table.ranked("sta") == [4, 1]  # 2 has two signs, 0 and 3 have the smallest difference in activation


def test_sta_never_takes_a_latent_without_a_difference():
    silent = sums(5, n_documents=10, document_sum=[0, 0, 0, 0, 20], document_active=[0, 0, 0, 0, 5])
    other = sums(5, n_documents=10)

    assert sta(made(5, positive=silent, negative=other), trim=0.1).ranked("sta") == [4]


def test_mosaic_counts_are_the_golden_ones():
    f = torch.tensor([[0, 3, 0.5, 1], [2, 4, 0, 0], [0, 0, 5, 0]])
    sae = SAE(
        name="identity", W_enc=torch.eye(4), b_enc=torch.zeros(4), W_dec=torch.eye(4), b_dec=torch.zeros(4),
        activation="relu", site=Site("resid_post", 0),
    )  # fmt: skip
    yes = torch.ones(1, 3, dtype=torch.bool)
    batch = Batch(range(1), torch.zeros(1, 3).long(), yes, yes, ~yes, torch.zeros(1).long(), yes[..., None][..., :0])
    found = Accumulator(sae, 0, top_n=2, per_text=False)

    found.add(batch, f[None], ~yes)

    assert found.tensors["top"].tolist() == [1, 2, 1, 1]  # the last token has one active latent, and counts one


def per_text(counts: list[list[float]], n_tokens: list[int]) -> PerText:
    dense = torch.tensor(counts)
    document, latent = dense.nonzero(as_tuple=True)
    values = dense[document, latent]
    return PerText(document, latent, values, values, torch.tensor(n_tokens))


def test_probe_weights_are_where_the_gradient_of_the_penalised_loss_vanishes():
    generator = torch.Generator().manual_seed(1)
    plus = torch.randint(0, 4, (8, 5), generator=generator).float()
    minus = torch.randint(0, 4, (7, 5), generator=generator).float()
    plus[:, 0] += 4
    plus[:, 3], minus[:, 3] = 0, 0
    plus[:, 4], minus[:, 4] = 2, 2
    found = made(
        5, positive=sums(5, n_tokens=80, texts=per_text(plus.tolist(), [10] * 8), top=plus.sum(0).tolist()),
        negative=sums(5, n_tokens=70, texts=per_text(minus.tolist(), [10] * 7)),
    )  # fmt: skip

    table = mosaic(found, c=0.5)

    z = torch.cat([plus, minus]).double()[:, :3] / 10
    z = z / z.std(0, correction=0)
    label = torch.tensor([1.0] * 8 + [0.0] * 7).double()
    w = table.column("mosaic_probe")[:3].double()
    biases = torch.linspace(-20, 20, 40_001).double()[:, None]
    b = biases[torch.nn.functional.softplus((1 - 2 * label) * (z @ w + biases)).sum(1).argmin()]
    slope = (torch.sigmoid(z @ w + b) - label) @ z + w / 0.5
    assert slope.abs().max() < 1e-2
    assert table.column("mosaic_probe")[3:].isnan().all()
    assert table.column("mosaic_mean")[0] == pytest.approx(float(z[:8, 0].mean() - z[8:, 0].mean()))
    assert table.ranked("mosaic_probe")[0] == 0
    assert table.column("mosaic_count")[0] == pytest.approx(float(plus[:, 0].sum()) / 80)


def test_probe_of_binary_counts_asks_only_whether():
    plus, minus = [[3.0, 0.0], [1.0, 2.0]], [[0.0, 9.0], [0.0, 0.0]]
    found = made(2, positive=sums(2, texts=per_text(plus, [5, 50])), negative=sums(2, texts=per_text(minus, [9, 3])))

    assert mosaic(found, binary=True).column("mosaic_mean").tolist() == pytest.approx([2.0, 0.0])
    with pytest.raises(ScoreMismatch, match="per_text=True"):
        mosaic(made(2, positive=sums(2), negative=sums(2)))


def test_conditional_difference_looks_at_the_pairs_whose_prompt_fires():
    chosen, rejected = [[4.0, 0.0], [0.0, 6.0], [8.0, 0.0]], [[2.0, 2.0], [0.0, 0.0], [0.0, 4.0]]
    prompts = [[0.0, 1.0], [1.0, 0.0], [0.0, 2.0]]
    found = made(
        2, chosen=sums(2, texts=per_text(chosen, [2, 2, 2])), rejected=sums(2, texts=per_text(rejected, [2, 2, 4])),
        prompts=sums(2, texts=per_text(prompts, [5, 5, 5])),
    )  # fmt: skip

    everywhere = conditional_difference(found).column("conditional_difference")
    where_1 = conditional_difference(found, prompts="prompts", given=1)

    assert everywhere.tolist() == pytest.approx([(2 + 0 + 4) / 3 - 1 / 3, 1 - (1 + 0 + 1) / 3])
    assert where_1.column("conditional_difference").tolist() == pytest.approx([3 - 0.5, -1])
    assert where_1.provenance["conditional_difference"]["n_pairs"] == 2
    with pytest.raises(ScoreMismatch, match="no such pair"):
        conditional_difference(
            made(2, **found.corpora | {"prompts": sums(2, texts=per_text([[1.0, 0]] * 3, [5] * 3))}),
            prompts="prompts", given=1,
        )  # fmt: skip
    with pytest.raises(ScoreMismatch, match="same number of documents"):
        conditional_difference(made(2, **found.corpora | {"rejected": sums(2, texts=per_text(chosen[:2], [1, 1]))}))


def test_frequencies_are_shares_and_what_is_a_mean_of_nothing_is_nan():
    found = made(
        2, text=sums(2, n_tokens=100, n_documents=4, active=[10, 0], sum=[25, 0], maximum=[7, 0],
                     document_active=[2, 0]),
    )  # fmt: skip

    table = frequency(found)

    assert table.row(0) == pytest.approx(
        {"frequency": 0.1, "log_density": -1, "document_frequency": 0.5, "mean": 0.25, "mean_active": 2.5, "maximum": 7}
    )
    assert [name for name, value in table.row(1).items() if math.isnan(value)] == [
        "log_density",
        "mean_active",
        "maximum",
    ]
    assert alive(found) == [0]
    assert alive(found, most=0.05) == []
    assert alive(found, above=0.1) == []


def test_random_control_is_a_draw_that_a_seed_repeats():
    sae = tiny.tiny_sae()

    one, again, other = (random_control(sae, seed=seed, among=range(0, 48, 2)) for seed in (1, 1, 2))

    assert one.ranked("random") == again.ranked("random") != other.ranked("random")
    assert sorted(one.ranked("random")) == list(range(0, 48, 2))
    shared = random_control(sae, seed=1).ranked("random", among=range(0, 48, 2))
    assert shared == one.ranked("random")
    assert one.provenance["random"]["seed"] == 1
    with pytest.raises(LatentOutOfRange):
        random_control(sae, seed=0, among=[48])


def test_fake_latents_fire_on_random_tokens():
    found = made(
        4, text=sums(4, n_tokens=100, active=[10, 10, 0, 0]), random=sums(4, n_tokens=50, active=[0, 20, 5, 0])
    )

    table = fake(found)

    assert table.column("fake_ratio").tolist() == pytest.approx([0, 4, math.inf, NAN], nan_ok=True)
    assert table.ranked("random_frequency") == [0, 3, 2, 1]
    assert real(found) == [0, 2, 3]
    assert real(found, most=0.0) == [0, 3]


def test_latents_of_special_tokens_are_named():
    found = made(3, text=sums(3, sum=[10, 5, 0], special_sum=[0, 15, 0], special_active=[0, 3, 0], n_special=4))

    table = special(found)

    assert table.column("special_share").tolist() == pytest.approx([0, 0.75, NAN], nan_ok=True)
    assert table.column("special_frequency").tolist() == pytest.approx([0, 0.75, 0])
    assert table.meanings["special_share"].higher is False


def test_scores_of_real_sums_say_what_they_were_made_from_and_outlive_a_file(tmp_path):
    model, sae = tiny.tiny_model(), tiny.tiny_sae()
    text = {
        name: Texts.from_ids(tiny.prompt(6, 9, seed=seed), name=f"text {seed}").with_groups(
            {"a": range(3, 12), "b": range(30, 36)}, before=0, after=1
        )
        for seed, name in enumerate(("forget", "retain"))
    }
    found = gather(model, sae, text, per_text=True)
    pair = {"positive": "forget", "negative": "retain"}

    table = random_control(sae, seed=0).join(
        frequency(found, "forget"), dsg(found), farrell(found), crisp(found), sta(found, **pair),
        mosaic(found, **pair), reason(found, "forget"), fake(found, text="forget", random="retain"),
        special(found, "forget"), conditional_difference(found, chosen="forget", rejected="retain"),
    )  # fmt: skip
    again = ScoreTable.load(table.save(tmp_path / "scores.safetensors"))

    assert again.provenance["dsg"]["texts"]["forget"]["fingerprint"] == text["forget"].fingerprint
    assert again.provenance["dsg"]["ratio_percentile"] == 95
    assert again.provenance["frequency"]["score"] == "frequency"
    assert again.sae_fingerprint == sae.fingerprint()
    assert set(again.columns) == set(table.columns)
    assert {name for name in table.columns if not table.ranked(name)} <= {"farrell", "crisp"}  # rules that reject all


def test_planted_latent_is_found_by_every_contrast_of_two_texts():
    model, sae, planted = tiny.fresh_model(), tiny.tiny_sae(activation="relu", site=Site("resid_pre", 0)), 7
    word = 20
    sae.W_enc[:, planted] = model.get_input_embeddings().weight[word].detach()
    sae.W_enc[:, planted] *= 300 / sae.W_enc[:, planted].square().sum()
    sae.b_enc[planted] = -270
    plain, topic = tiny.prompt(8, 12, seed=1), tiny.prompt(8, 12, seed=2)
    plain[plain == word] = word + 1
    topic[:, 3::2] = word

    found = gather(model, sae, {"forget": Texts.from_ids(topic), "retain": Texts.from_ids(plain)}, per_text=True)

    pair = {"positive": "forget", "negative": "retain"}
    assert farrell(found, retain_threshold=0.001).ranked("farrell") == [planted]
    assert dsg(found).ranked("dsg")[0] == planted
    assert crisp(found).ranked("crisp")[0] == planted
    assert sta(found, **pair).ranked("sta_frequency")[0] == planted
    assert mosaic(found, binary=True, **pair).ranked("mosaic_mean")[0] == planted
