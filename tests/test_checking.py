"""`saeguard check` passes what is right, refuses what cannot be, and says what it found in words and in JSON."""

import json

import pytest
import torch

from saeguard import Add, Clamp, Plan, Rule, Site
from saeguard.checking import costs
from saeguard.checking.check import check_steering
from saeguard.checking.claims import Checked
from saeguard.cli import checking
from saeguard.errors import NotSliceable, SelfCheckFailed, SiteNotFound, WidthMismatch
from saeguard.loaders.native import save_sae
from saeguard.models import LoadedModel
from tests import sabotages, tiny, words
from tests.test_cli import flat, run
from tests.test_self_check import planted

IDS = tiny.prompt(4, 80)
LAWS = ("identity", "unplanned rows", "rows", "padding", "phase", "kernel", "residue")
CLAIMS = ("fit", "site", "edit", "direction", *LAWS, "canary", "cost")


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch):
    """Times are for people; here they only have to be taken."""
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setattr(costs, "TOKENS", 3)


def good_pair(name: str = "llama"):
    """A model, and an SAE that explains what enters its first block."""
    model = tiny.fresh_model(name, seed=1)
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.5 * torch.ones(tiny.D)
    return model, planted(model)


def failed(check: Checked) -> set[str]:
    return {claim.name for claim in check.failed}


def test_right_pair_passes_every_claim_and_its_report_says_so():
    model, sae = good_pair()

    found = check_steering(model, sae, ids=IDS)

    assert found.passed, str(found)
    assert tuple(claim.name for claim in found.claims) == CLAIMS
    assert all(claim.holds for claim in found.claims)
    assert "FAILED" not in str(found)
    document = json.loads(found.to_json())
    assert document["passed"] is True
    assert [claim["name"] for claim in document["claims"]] == list(CLAIMS)
    assert document["claims"][0]["numbers"]["fvu"] < 0.05


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_random_sae_fails_by_its_fit_alone_on_every_architecture(name):
    assert failed(check_steering(tiny.fresh_model(name), tiny.tiny_sae(), ids=IDS)) == {"fit"}


@pytest.mark.parametrize("site", ["resid_pre.1", "resid_post.2", "mlp_out.1", "attn_out.0", "resid_mid.1"])
def test_every_site_is_checked_and_what_nobody_reads_stays_open(site):
    found = check_steering(tiny.fresh_model(), tiny.tiny_sae(site=Site.parse(site)), ids=IDS)

    assert failed(found) == {"fit"}
    open_ = {claim.name for claim in found.claims if claim.holds is None}
    inside = {"mlp_out.1": {"site"}, "attn_out.0": {"site"}, "resid_mid.1": {"site", "edit", "direction"}}
    assert open_ == inside.get(site, set())


def test_bfloat16_model_passes_with_the_limits_of_its_dtype():
    found = check_steering(tiny.fresh_model(dtype=torch.bfloat16), tiny.tiny_sae(), ids=IDS)

    assert failed(found) == {"fit"}, str(found)


def test_check_leaves_the_model_as_it_was():
    model, sae = good_pair()
    ids = tiny.prompt(2, 9)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        logits = model(ids).logits

    check_steering(model, sae, ids=IDS)

    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_laws_are_checked_again_under_the_plan_that_is_given():
    model, sae = good_pair()
    plan = Plan((Rule(sae.name, (7, 9), Clamp(2.0, when="always"), phase="generated"),), "mine")

    found = check_steering(model, sae, ids=IDS, plan=plan)

    assert found.passed, str(found)
    under = [claim for claim in found.claims if claim.name.startswith("plan: ")]
    assert [claim.name for claim in under] == [f"plan: {law}" for law in LAWS[1:]]
    assert all(claim.holds for claim in under)
    assert found.plan == "mine"


def test_plan_that_finds_nothing_to_edit_is_open_and_does_not_fail():
    model, sae = good_pair()
    plan = Plan((Rule(sae.name, (0,), Clamp(2.0, when="active")),))  # token 0 is padding, and not in the text

    found = check_steering(model, sae, ids=IDS, plan=plan)

    assert found.passed, str(found)
    held = {claim.name: claim.holds for claim in found.claims}
    assert held["plan: rows"] is None
    assert held["plan: phase"] is None
    assert held["plan: residue"] is True


@pytest.mark.parametrize(
    ("sae", "error"),
    [
        (tiny.tiny_sae(site=Site("resid_post", 9)), SiteNotFound),
        (tiny.tiny_sae(d_in=16), WidthMismatch),
        (tiny.tiny_sae(d_sae=3), NotSliceable),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(sae, error):
    with pytest.raises(error):
        check_steering(tiny.tiny_model(), sae, ids=IDS)


def test_too_little_text_is_refused():
    with pytest.raises(SelfCheckFailed, match="ordinary tokens"):
        check_steering(tiny.tiny_model(), tiny.tiny_sae(), ids=tiny.prompt(1, 30))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A good pair in reach of the command, whose text is made of the model's own words."""
    model, sae = good_pair()
    text = " ".join(f"w{token}" for token in tiny.prompt(1, 400, seed=3)[0, 1:].tolist())
    monkeypatch.setattr("saeguard.evaluating.prose.prose", lambda: text)
    monkeypatch.setattr("saeguard.models.load_model", lambda name: LoadedModel(model, words.word_tokenizer()))
    save_sae(sae, tmp_path / "sae")
    return tmp_path


def test_command_shows_every_claim_and_ends_with_status_0(place):
    result = run("check", "model", "--sae", place / "sae")

    assert all(name in flat(result.stdout) for name in CLAIMS)
    assert "passed (13 claims" in flat(result.stdout)


def test_command_writes_json_and_checks_a_plan(place):
    plan = Plan((Rule(str(place / "sae"), (9,), Add(2.0)),), "mine")
    plan.save(place / "plan.json")

    result = run("check", "model", "--sae", place / "sae", "--plan", place / "plan.json", "--json")

    document = json.loads(result.stdout)
    assert document["passed"] is True
    assert document["plan"] == "mine"
    assert "plan: padding" in [claim["name"] for claim in document["claims"]]


def test_command_ends_with_status_1_when_a_claim_fails(place):
    with sabotages.wrong_sign(torch.nn.Identity()):
        result = run("check", "model", "--sae", place / "sae", status=1)

    assert "FAILED: edit, direction" in flat(result.stdout)


def test_command_ends_with_status_2_when_the_pair_is_refused(place):
    save_sae(tiny.tiny_sae(d_in=16), place / "narrow")

    result = run("check", "model", "--sae", place / "narrow", status=2)

    assert "WidthMismatch" in flat(result.stderr)


def test_command_is_the_one_that_is_documented():
    assert checking.check.__doc__
    assert "Exit status 1" in checking.check.__doc__
