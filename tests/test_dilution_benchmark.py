"""The benchmark of dilution measures DSG as published and as intended beside a policy, and draws every curve."""

from dataclasses import replace
from types import SimpleNamespace

from benchmarks.dilution import draw, intended, published
from saeguard import Site
from saeguard.evaluating.dilution import FORMS, decider, dilution
from saeguard.evaluating.prompts import Frame
from tests import planted, tiny

PARTS = {
    "latents": {"dsg_texts": [0], "dsg_questions": [0]}, "c": 1.0, "thresholds": {"published": 0.15, "rho": 0.15}
}  # fmt: skip
ASKED = ((7, planted.WORD, 9), (7, 8))
BENIGN = tuple(5 + (7 * i) % 30 for i in range(60))


def test_both_forms_of_dsg_are_diluted_and_every_curve_is_drawn(tmp_path):
    model = tiny.fresh_model()
    sae = planted.planted_sae(model)
    after = replace(sae, site=Site("resid_post", 0))  # the published hook is on a block's output
    found = {}
    for name, opened, own in (("intended", intended, sae), ("published", published, after)):
        deployment = SimpleNamespace(model=model, tokenizer=planted.TOKENIZER, saes=(own,))
        with opened(deployment, PARTS) as subject:  # type: ignore[arg-type]
            found[name] = dilution(
                decider(subject), ASKED, BENIGN, Frame((1, 3), (4,)), lengths=(1, 60), forms=FORMS[:2]
            )
    draw(found, tmp_path / "curves.png")

    before = {point.length: point.lost for point in found["intended"].points if point.place == "before"}
    assert (found["intended"].opened_alone, before) == (1, {1: 0, 60: 1})
    assert len(found["published"].points) == 6
    assert (tmp_path / "curves.png").stat().st_size > 1000
