"""Whatever is broken on purpose, in the library, the model or the SAE, some claim of a check says so by name."""

from dataclasses import replace

import pytest
import torch

from saeguard import SAE, Site
from saeguard.checking import costs
from saeguard.checking.check import check_steering
from saeguard.errors import SaeguardError
from tests import sabotages, tiny
from tests.test_checking import IDS, failed, good_pair


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch):
    """Times are for people; here they only have to be taken."""
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setattr(costs, "TOKENS", 3)


def square_sae() -> SAE:
    """As many latents as the stream is wide, so that a transposed decoder has the right shape."""
    return tiny.tiny_sae(d_sae=tiny.D)


def caught(model, sae) -> set[str]:
    """Names of the claims that fail, or the name of what refuses the check; a random SAE's fit is not counted."""
    try:
        return failed(check_steering(model, sae, ids=IDS)) - {"fit"}
    except SaeguardError as error:
        return {type(error).__name__}


EDITS = [
    (sabotages.wrong_sign, {"edit", "direction"}),
    (sabotages.edits_twice, {"edit", "direction"}),
    (sabotages.row_0_only, {"edit", "rows", "direction"}),
    (sabotages.prefill_only, {"phase"}),
    (sabotages.decoding_only, {"edit", "direction", "phase"}),
    (sabotages.spares_column_0, {"phase"}),
    (sabotages.means_over_rows, {"edit", "rows"}),
    (sabotages.rounds_in_bfloat16, {"edit"}),
    (sabotages.keeps_the_norm, {"edit"}),
    (sabotages.rebuilds_the_stream, {"edit", "identity", "unplanned rows"}),
    (sabotages.counts_padding, {"edit", "padding"}),
    (sabotages.positions_are_columns, {"edit", "padding"}),
    (sabotages.edits_bos, {"edit"}),
    (sabotages.decoder_transposed, {"edit", "direction"}),
    (sabotages.decoder_rescaled, {"edit", "direction"}),
    (sabotages.latents_off_by_one, {"edit", "direction"}),
    (sabotages.threshold_forgotten, {"edit"}),
    (sabotages.encoder_in_other_units, {"edit"}),
    (sabotages.swapped_layer, {"site", "edit", "direction"}),
    (sabotages.dead_hook, {"GuardNotApplied"}),
    (sabotages.dies_after_the_prompt, {"phase"}),
    (sabotages.hook_for_tuples, {"edit", "direction"}),
    (sabotages.every_row_is_covered, {"unplanned rows"}),
    (sabotages.report_lies, {"edit"}),
    (sabotages.fast_kernel_is_off, {"edit", "kernel"}),
    (sabotages.hooks_stay, {"residue"}),
    (sabotages.hooks_stay_after_an_exception, {"residue"}),
    (sabotages.generate_is_not_restored, {"residue"}),
    (sabotages.weights_are_changed, {"residue"}),
    (sabotages.dropout_is_on, {"identity"}),
    (sabotages.compiled_too_early, {"CompiledModel"}),
]


@pytest.mark.parametrize(("sabotage", "by"), [pytest.param(*row, id=row[0].__name__) for row in EDITS])
def test_sabotage_is_caught_by_the_claims_that_are_about_it(sabotage, by):
    model = tiny.fresh_model()

    with sabotage(model):
        found = caught(model, square_sae())

    assert by <= found


def test_without_sabotage_the_same_pair_fails_nothing_but_its_fit():
    assert caught(tiny.fresh_model(), square_sae()) == set()


def norm_folded(model, sae: SAE) -> SAE:
    """As if it had been trained on the stream that a norm with unit gain gives."""
    size = float(model.get_input_embeddings().weight.detach().square().mean(-1).sqrt().mean())
    return replace(sae, W_enc=sae.W_enc * size, W_dec=sae.W_dec / size, b_dec=sae.b_dec / size)


MISFITS = {
    "folded weights": norm_folded,
    "decoder rescaled": lambda model, sae: replace(sae, W_dec=sae.W_dec * 2),
    "encoder and decoder from different SAEs": lambda model, sae: replace(sae, W_dec=sae.W_dec.roll(1, 0)),
    "threshold dropped": lambda model, sae: replace(sae, activation="relu", threshold=None),
    "b_dec dropped": lambda model, sae: replace(sae, b_dec=torch.zeros_like(sae.b_dec)),
    "one layer off": lambda model, sae: replace(sae, site=Site("resid_pre", 1)),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_sae_that_is_not_this_models_fails_by_its_fit(misfit):
    model, sae = good_pair()

    found = check_steering(model, MISFITS[misfit](model, sae), ids=IDS)

    assert "fit" in failed(found), str(found)
