"""Every SAELens look-alike, and every live object, computes what sae_lens's own classes compute from the same files.

Skipped where sae_lens is not installed; written against 6.54.12.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saeguard import SAE, load_sae
from saeguard.errors import UnsupportedFormat
from saeguard.loaders.live import load_saelens
from tests.lookalikes.base import inputs
from tests.lookalikes.saelens import CASES, LOOKALIKES, SCALE, Case

with warnings.catch_warnings():  # its dependencies warn while they are imported
    warnings.simplefilter("ignore")
    sae_lens = pytest.importorskip("sae_lens")

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 2e-5
NOT_COMPUTED = {
    "matryoshka with threshold": "its threshold is topk_threshold",
    "constant scalar": "only the temporal architecture has it",
    "legacy finetuned": "the scale is renamed and then is an unexpected tensor",
    "legacy tanh": "activation_fn of a standard SAE is not looked at: it computes ReLU",
    "transcoder average": "its fold divides the output too, which has no normalisation to undo",
}
LIKES = {like.name.removeprefix("saelens "): like for like in LOOKALIKES}
COMPARED = sorted(set(LIKES) - set(NOT_COMPUTED))


def live_from(folder: Path) -> Any:
    """What sae_lens makes of the files: an inference class, or one in training where only that reads them."""
    try:
        sae = sae_lens.SAE.load_from_disk(folder)
    except (KeyError, RuntimeError):
        sae = sae_lens.TrainingSAE.load_from_disk(folder)
    if sae.cfg.normalize_activations == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(SCALE)
    return sae


def inference(sae: Any, folder: Path) -> Any:
    if isinstance(sae, sae_lens.TrainingSAE):
        sae.save_inference_model(folder)
        sae = sae_lens.SAE.load_from_disk(folder)
    return sae.to(dtype=torch.float32)


def computed(live: Any, x: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Activations and output of sae_lens's object on the stream as TransformerLens would give it."""
    is_centred = case.config.get("model_from_pretrained_kwargs", {}).get("center_writing_weights", False)
    mean = x.mean(-1, keepdim=True) if is_centred else torch.zeros(())
    heads = case.config.get("reshape_activations") == "hook_z"
    given = (x - mean).unflatten(-1, (4, 4)) if heads else x - mean
    with torch.no_grad():
        f, out = live.encode(given), live(given)
    return f, (out.flatten(-2) if heads else out) + mean


def assert_same(sae: SAE, live: Any, case: Case) -> None:
    x = inputs()
    f, out = computed(live, x, case)
    found = sae.encode(x)
    torch.testing.assert_close(found, f, atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(found != 0, f != 0)
    torch.testing.assert_close(sae.decode(found, x), out, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", COMPARED)
def test_look_alike_computes_what_sae_lens_computes(name, tmp_path):
    folder = LIKES[name].write(tmp_path)

    live = inference(live_from(folder), tmp_path / "inference")

    assert_same(load_sae(folder, **LIKES[name].options), live, CASES[name])


@pytest.mark.parametrize("name", COMPARED)
def test_oracle_of_the_look_alike_is_that_of_sae_lens(name, tmp_path):
    live, x = inference(live_from(LIKES[name].write(tmp_path)), tmp_path / "inference"), inputs()

    f, out = computed(live, x, CASES[name])

    torch.testing.assert_close(LIKES[name].acts(x), f, atol=TOLERANCE, rtol=TOLERANCE)
    torch.testing.assert_close(LIKES[name].decode(f, x), out, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", COMPARED)
def test_live_object_becomes_an_sae_that_computes_the_same(name, tmp_path):
    live = live_from(LIKES[name].write(tmp_path))
    before = {key: tensor.clone() for key, tensor in live.state_dict().items()}

    sae = load_saelens(live)

    assert_same(sae, inference(live, tmp_path / "inference"), CASES[name])
    assert (str(sae.site), str(sae.site_out)) == (LIKES[name].site, str(LIKES[name].site_out))
    assert sae.name == live.get_name()
    after = live.state_dict()
    assert all(torch.equal(after[key].to(tensor.dtype), tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", NOT_COMPUTED)
def test_look_alike_that_sae_lens_does_not_compute_is_still_one_that_it_does_not_compute(name, tmp_path):
    """When a later sae_lens does, it belongs among the others."""
    folder = LIKES[name].write(tmp_path)

    with pytest.raises((KeyError, RuntimeError, ValueError, AssertionError)):
        assert_same(
            load_sae(folder, **LIKES[name].options), inference(live_from(folder), tmp_path / "inference"), CASES[name]
        )


ARCHITECTURES = ("standard", "jumprelu", "gated", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk",
                 "matching_pursuit")  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_training_object_becomes_an_sae_that_computes_what_its_inference_class_does(architecture, tmp_path):
    torch.manual_seed(0)
    _, config = sae_lens.registry.get_sae_training_class(architecture)
    more = {"k": 5} if "topk" in architecture else {}
    if architecture.startswith("matryoshka"):
        more["matryoshka_widths"] = [8, 20]
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.7.hook_resid_post", model_name="gpt2-small")
    training = sae_lens.TrainingSAE.from_dict(
        config(d_in=16, d_sae=48, apply_b_dec_to_input=True, metadata=metadata, **more).to_dict()
    )
    for parameter in training.parameters():
        parameter.data += torch.rand_like(parameter) * 0.1

    sae = load_saelens(training, name="mine")

    assert_same(sae, inference(training, tmp_path / "inference"), CASES["standard"])
    assert (sae.name, str(sae.site), sae.model) == ("mine", "resid_post.7", "gpt2")


def test_live_object_of_an_architecture_that_is_refused_is_refused():
    sae = sae_lens.SAE.from_dict({"architecture": "temporal", "d_in": 64, "d_sae": 64, "kval_topk": 4, "n_heads": 1})

    with pytest.raises(UnsupportedFormat, match="its latents depend on earlier tokens"):
        load_saelens(sae)


def test_object_that_is_not_of_sae_lens_is_refused():
    with pytest.raises(UnsupportedFormat, match="an object Linear: it is not one of sae_lens"):
        load_saelens(torch.nn.Linear(3, 3))


def test_live_object_on_a_stream_without_its_mean_keeps_saying_so(tmp_path):
    live = live_from(LIKES["legacy centred"].write(tmp_path))

    assert load_saelens(live).norm == "center"
    assert load_saelens(live, "attn_z.3").norm == "none"
