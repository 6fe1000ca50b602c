"""The self-check passes SAEs where they belong, and names the number that gives a wrong pair away."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saeguard import SAE, Site, capture, load_model, load_sae
from saeguard.errors import MissingBOS, NotSliceable, SelfCheckFailed, SiteNotFound, TokensUnknown, WidthMismatch
from saeguard.evaluating.self_check import SelfCheck, self_check
from saeguard.loaders import shipped
from tests import tiny, words

NAME = "smollm2-135m-instruct"
WHERE = Site("resid_pre", 0)
IDS = tiny.prompt(4, 80)
MILL = """The mill on the river ground corn for three villages until the new bridge brought the railway. Its owner then
sold the stones, kept the house, and let the water run where it liked. A century later the wheel still turns on windy
days, and children from the school draw it every spring. Nobody remembers what the owner was called, but his initials,
J.K., are cut into the door. In 1962 the council wanted to pull the building down; 412 people signed a letter against
it, and the vote was lost by one. Since then the roof has been mended twice, and a heron nests under it."""


def planted(model, *, noise: float = 0.02) -> SAE:
    """One latent per word: exact up to noise where words enter the first block, and nowhere else."""
    rows = model.get_input_embeddings().weight.detach()
    middle = rows.mean(0)
    away = rows - middle
    size = away.norm(dim=-1, keepdim=True)
    generator = torch.Generator().manual_seed(0)
    return SAE(
        name="planted",
        W_enc=(away / size).T,
        b_enc=-middle @ (away / size).T,
        W_dec=away / size + noise * torch.randn(rows.shape, generator=generator),
        b_dec=middle,
        activation="jumprelu",
        threshold=0.85 * size[:, 0],
        site=WHERE,
    )


@pytest.fixture(scope="module")
def model():
    """Its words lie apart, around a point that is not the origin."""
    made = tiny.fresh_model(seed=1)
    with torch.no_grad():
        made.get_input_embeddings().weight += 0.5 * torch.ones(tiny.D)
    return made


@pytest.fixture(scope="module")
def right(model) -> SAE:
    return planted(model)


def numbers(check: SelfCheck) -> set[str]:
    return {reason.number for reason in check.reasons}


def test_planted_dictionary_passes_and_its_report_round_trips(model, right):
    check = self_check(model, right, ids=IDS).require()

    assert check.passed
    assert check.fvu < 0.05
    assert 0.8 < check.l0 < 1.5
    assert check.n_tokens == 4 * 79
    assert "passed" in str(check)
    assert SelfCheck.from_json(check.to_json()) == check


def test_site_that_is_the_same_stream_under_another_name_is_no_rival(model):
    sae = planted(model)
    found = self_check(model, sae, ids=IDS)

    assert "resid_pre.0" not in found.elsewhere
    assert min(found.elsewhere.values()) > 1.5


MUTANTS = {
    "resid_pre.1": (lambda s: replace(s, site=Site("resid_pre", 1)), "elsewhere"),
    "mlp_out.0": (lambda s: replace(s, site=Site("mlp_out", 0)), "elsewhere"),
    "b_dec missing": (lambda s: replace(s, b_dec=0 * s.b_dec), "mean_share"),
    "b_dec not folded": (lambda s: replace(s, b_enc=s.b_enc + s.b_dec @ s.W_enc), "reading"),
    "threshold dropped": (lambda s: replace(s, activation="relu", threshold=None), "overshoot"),
    "encoder negated": (lambda s: replace(s, W_enc=-s.W_enc), "fvu"),
    "decoder shuffled": (lambda s: replace(s, W_dec=s.W_dec.flip(0)), "fvu"),
    "decoder too long": (lambda s: replace(s, W_dec=2 * s.W_dec), "scale"),
    "layer_norm": (lambda s: replace(s, norm="layer_norm"), "reading"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_of_the_planted_dictionary_is_refused_by_its_number(model, right, name):
    change, number = MUTANTS[name]

    check = self_check(model, change(right), ids=IDS)

    assert number in numbers(check), str(check)
    with pytest.raises(SelfCheckFailed, match="planted at .*: .*[0-9]"):
        check.require()
    assert SelfCheck.from_json(check.to_json()) == check


def test_stated_l0_is_compared_with_the_one_that_is_found(model, right):
    stated = replace(right, manifest={"l0": 20.0})

    check = self_check(model, stated, ids=IDS)

    assert numbers(check) == {"l0"}
    with pytest.raises(SelfCheckFailed, match="its L0 is 1.0, and 20 is stated"):
        check.require()


def test_weights_that_are_not_finite_are_refused_and_still_reported_as_json(model, right):
    broken = replace(right, b_dec=torch.full_like(right.b_dec, torch.nan))

    check = self_check(model, broken, ids=IDS)

    assert "fvu" in numbers(check)
    assert SelfCheck.from_json(check.to_json()) == check


def test_transcoder_is_checked_from_where_it_reads_to_where_it_writes(model):
    table = _mlp_table(model)

    good = self_check(model, table, ids=IDS)
    wrong = self_check(model, replace(table, site_out=Site("mlp_out", 1)), ids=IDS)

    assert good.passed, str(good)
    assert good.place == "mlp_in.0 -> mlp_out.0"
    assert good.row_cosine is None
    assert numbers(wrong) >= {"elsewhere", "fvu"}


def _mlp_table(model) -> SAE:
    """The MLP of the first block as a transcoder of nothing but its linear path, fitted to what it does."""
    sites = [Site("mlp_in", 0), Site("mlp_out", 0)]
    with torch.no_grad(), capture(model, sites) as tape:
        model(input_ids=tiny.prompt(40, 80, seed=5), use_cache=False)
    x, y = (tape[site][:, 1:].flatten(0, 1).float() for site in sites)
    rows = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    solved: Tensor = torch.linalg.lstsq(rows, y).solution
    return SAE(
        name="table", W_enc=torch.zeros(tiny.D, 4), b_enc=torch.ones(4), W_dec=torch.zeros(4, tiny.D),
        b_dec=solved[-1], activation="relu", site=sites[0], site_out=sites[1], skip=solved[:-1],
    )  # fmt: skip


def test_what_cannot_be_checked_is_said(model, right):
    with pytest.raises(NotSliceable, match="only 2 of its 61 latents were read"):
        self_check(model, right.narrow((3, 4)), ids=IDS)
    with pytest.raises(SiteNotFound, match="does not say at which site"):
        self_check(model, replace(right, site=None), ids=IDS)
    with pytest.raises(SiteNotFound, match="layers 0-2"):
        self_check(model, replace(right, site=Site("resid_post", 3)), ids=IDS)
    with pytest.raises(WidthMismatch, match="width 16"):
        self_check(model, tiny.tiny_sae(d_in=16), ids=IDS)
    with pytest.raises(TokensUnknown, match="neither a tokenizer nor ids"):
        self_check(model, right)
    with pytest.raises(SelfCheckFailed, match="the text has 19 tokens .* and 100 are needed"):
        self_check(model, right, ids=IDS[:1, :20])


def test_sae_trained_behind_a_bos_refuses_a_tokenizer_without_one(model, right):
    tokenizer = words.word_tokenizer()
    tokenizer.bos_token = None

    with pytest.raises(MissingBOS, match="has none"):
        self_check(model, replace(right, manifest={"bos": True}), tokenizer, text=["w5 w6 w7 w8 w9 w5 w6 w7"])


@pytest.fixture(scope="module")
def real():
    return load_model(NAME)


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith(NAME)])
def test_shipped_sae_passes_on_its_model_and_the_default_text(real, name):
    check = self_check(real.model, load_sae(name), real.tokenizer).require()

    assert check.fvu < 0.3
    assert 40 < check.l0 < 90
    assert check.n_tokens > 400
    assert check.l0_special is not None
    assert min(check.elsewhere.values()) > 1.2


REAL_MUTANTS = {
    "one layer too high": (lambda s: replace(s, site=Site("resid_post", 10)), "elsewhere"),
    "one layer too low": (lambda s: replace(s, site=Site("resid_post", 8)), "elsewhere"),
    "between attention and MLP": (lambda s: replace(s, site=Site("resid_mid", 9)), "elsewhere"),
    "b_dec not folded": (lambda s: replace(s, b_enc=s.b_enc + s.b_dec @ s.W_enc.float()), "reading"),
    "b_dec missing": (lambda s: replace(s, b_dec=0 * s.b_dec), "mean_share"),
}


@pytest.mark.parametrize("name", REAL_MUTANTS)
def test_mutant_of_a_shipped_sae_is_refused_by_its_number(real, name):
    change, number = REAL_MUTANTS[name]

    check = self_check(real.model, change(load_sae(f"{NAME}/resid_post.9")), real.tokenizer, text=[MILL])

    assert number in numbers(check), str(check)


def test_shipped_sae_without_its_threshold_is_refused_by_its_weaker_activations(real):
    """It explains more than before (FVU 0.097 instead of 0.118), so no bound on the FVU can tell."""
    sae = load_sae(f"{NAME}/resid_post.9")

    check = self_check(real.model, replace(sae, activation="relu", threshold=None), real.tokenizer)

    assert check.fvu < 0.11
    assert "weak_scale" in numbers(check), str(check)
