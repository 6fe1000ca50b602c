"""Top contexts and activations are those of whole passes through the plain model, one latent at a time."""

from dataclasses import replace

import pytest
import torch

from saeguard import capture
from saeguard.errors import LatentOutOfRange, SiteNotFound, WrongModel
from saeguard.scoring import contexts
from saeguard.scoring.contexts import activations, contexts_of, top_contexts
from tests import tiny
from tests.words import word_tokenizer

IDS = tiny.prompt(37, 11, seed=6)
KEPT = IDS > 2
KINDS = ("jumprelu", "topk")


def slowly(sae, latent):
    """Activations at every token, row by row, through the whole model."""
    rows = []
    for ids in IDS:
        with torch.no_grad(), capture(tiny.tiny_model(), sae.site) as tape:
            tiny.tiny_model()(ids[None])
        rows.append(sae.encode(tape[sae.site])[0, :, latent])
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_are_the_hardest_tokens_one_per_row(kind):
    sae = tiny.tiny_sae(activation=kind)
    f = slowly(sae, 7).masked_fill(~KEPT, 0.0)
    best = f.max(dim=1)
    order = best.values.argsort(descending=True, stable=True)[:5]

    found = top_contexts(tiny.tiny_model(), word_tokenizer(), sae, 7, IDS, KEPT, top=5)

    assert [context.token for context in found] == [f"w{int(IDS[row, best.indices[row]])}" for row in order]
    torch.testing.assert_close(torch.tensor([c.activation for c in found]), best.values[order])
    first, place = int(order[0]), int(best.indices[order[0]])
    assert found[0].before == " ".join(f"w{token}" for token in IDS[first, 1:place].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_many_latents_at_once_are_each_alone_whatever_the_slices(kind, monkeypatch):
    sae = tiny.tiny_sae(activation=kind)
    options = tiny.tiny_model(), word_tokenizer(), sae
    alone = {latent: top_contexts(*options, latent, IDS, KEPT, top=4) for latent in (3, 40, 1, 7, 22)}
    monkeypatch.setattr(contexts, "LATENTS", 2)
    monkeypatch.setattr(contexts, "BATCH", 5)

    found = contexts_of(*options, [3, 40, 1, 7, 22], IDS, KEPT, top=4)

    assert list(found) == [3, 40, 1, 7, 22]
    for latent, expected in alone.items():
        assert [(c.before, c.token, c.after) for c in found[latent]] == [(c.before, c.token, c.after) for c in expected]


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_those_of_the_counted_tokens_in_order(kind):
    sae = tiny.tiny_sae(activation=kind)

    found = activations(tiny.tiny_model(), sae, 7, IDS, KEPT)

    torch.testing.assert_close(found, slowly(sae, 7)[KEPT])


def test_latent_that_never_fires_has_no_context():
    sae = tiny.tiny_sae()
    sae = replace(sae, b_enc=sae.b_enc - 1e4)

    assert top_contexts(tiny.tiny_model(), word_tokenizer(), sae, 0, IDS, KEPT) == []


def test_progress_ends_with_all_rows():
    told = []
    contexts_of(
        tiny.tiny_model(), word_tokenizer(), tiny.tiny_sae(), [1, 2], IDS, KEPT, progress=lambda *x: told.append(x)
    )

    assert told == [(16, 37), (32, 37), (37, 37)]


@pytest.mark.parametrize(
    ("change", "latent", "error", "message"),
    [
        ({}, 99, LatentOutOfRange, "this SAE has latents 0..47"),
        ({"site": None}, 1, SiteNotFound, "it does not say at which site it reads"),
        (
            {"manifest": {"model_shape": {"hidden_size": 99}}},
            1,
            WrongModel,
            "its manifest asks for a model with hidden_size 99",
        ),
    ],
)
def test_sae_that_does_not_fit_is_refused(change, latent, error, message):
    sae = replace(tiny.tiny_sae(), **change)

    with pytest.raises(error, match=message):
        top_contexts(tiny.tiny_model(), word_tokenizer(), sae, latent, IDS, KEPT)
