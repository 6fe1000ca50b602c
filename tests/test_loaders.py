"""Every family's files, written here in their published layout, load to the published equations or are refused by name.

The formulas below are written from the families' own definitions and share nothing with `SAE` or with the loaders.
"""

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import config
from safetensors.torch import save_file
from torch import Tensor

from saeguard import Site, load_sae
from saeguard.errors import BrokenFile, LoadError, UnsupportedFormat
from saeguard.loaders import LOADERS, headers
from tests.tiny import tiny_sae

D_IN, D_SAE, K = 8, 20, 5
HOOK = "blocks.7.hook_resid_post"
PLACE = "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
V6 = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False,
      "normalize_activations": "none", "reshape_activations": "none", "architecture": "jumprelu"}  # fmt: skip
METADATA = {"sae_lens_version": "6.21.0", "model_name": "gemma-2-2b", "hook_name": HOOK, "hook_head_index": None,
            "context_size": 128, "prepend_bos": False, "seqpos_slice": [None],
            "model_from_pretrained_kwargs": {"center_writing_weights": False}}  # fmt: skip
LEGACY = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cuda", "model_name": "gpt2-small",
          "hook_point": "blocks.3.hook_resid_pre", "hook_point_layer": 3, "hook_point_head_index": None,
          "context_size": 64, "activation_fn_str": "relu", "activation_fn_kwargs": {}}  # fmt: skip

Tensors = dict[str, Tensor]
Formula = Callable[[Tensors, Tensor], tuple[Tensor, Tensor]]


def tensors(*names: str, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    found = {name: torch.randn(shapes.get(name, (D_SAE,)), generator=generator) * 0.3
             for name in ("W_enc", "b_enc", "W_dec", "b_dec", *names)}  # fmt: skip
    return {name: tensor.abs() if name == "threshold" else tensor for name, tensor in found.items()}


def gated_tensors() -> Tensors:
    return {name: tensor for name, tensor in tensors("b_gate", "b_mag", "r_mag").items() if name != "b_enc"}


def thresholded() -> Tensors:
    return tensors() | {"topk_threshold": torch.tensor(0.11, dtype=torch.float64)}


def inputs() -> Tensor:
    return torch.randn(2, 30, D_IN, generator=torch.Generator().manual_seed(9))


def saelens(folder: Path, stored: Tensors, cfg: dict[str, Any] | None = None, **metadata: Any) -> Path:
    """A folder of version 6, or with ``hook_point`` in ``cfg`` an older one."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "sae_weights.safetensors")
    whole = LEGACY | cfg if cfg and "hook_point" in cfg else V6 | (cfg or {}) | {"metadata": METADATA | metadata}
    (folder / "cfg.json").write_text(json.dumps(whole))
    return folder


def gemma(root: Path, stored: Tensors, place: str = PLACE, save: Callable[..., None] = np.savez) -> Path:
    folder = root / place
    folder.mkdir(parents=True)
    save(folder / "params.npz", **{name: tensor.numpy() for name, tensor in stored.items()})
    return folder


def old(**changes: Any) -> dict[str, Any]:
    return {"hook_point": LEGACY["hook_point"]} | changes


def relu(t: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    f = (x @ t["W_enc"] + t["b_enc"]).relu()
    return f, f @ t["W_dec"] + t["b_dec"]


def minus_b_dec(formula: Formula) -> Formula:
    return lambda t, x: formula(t, x - t["b_dec"])


def jumprelu(t: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    p = x @ t["W_enc"] + t["b_enc"]
    f = p.relu() * (p > t["threshold"])
    return f, f @ t["W_dec"] + t["b_dec"]


def gated(t: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    f = (x @ t["W_enc"] + t["b_gate"] > 0) * (x @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()
    return f, f @ t["W_dec"] + t["b_dec"]


def largest(p: Tensor) -> Tensor:
    return p.relu() * (p >= p.sort(dim=-1, descending=True).values[..., K - 1 : K])


def topk(t: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    f = largest(x @ t["W_enc"] + t["b_enc"])
    return f, f @ t["W_dec"] + t["b_dec"]


def topk_rescaled(t: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    norms = t["W_dec"].norm(dim=-1)
    f = largest((x @ t["W_enc"] + t["b_enc"]) * norms)
    return f, (f / norms) @ t["W_dec"] + t["b_dec"]


def batchtopk(t: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    p = x @ t["W_enc"] + t["b_enc"]
    f = p.relu() * (p > t["topk_threshold"])
    return f, f @ t["W_dec"] + t["b_dec"]


def batchtopk_rescaled(t: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    norms = t["W_dec"].norm(dim=-1)
    p = (x @ t["W_enc"] + t["b_enc"]) * norms
    f = p.relu() * (p > t["topk_threshold"])
    return f, (f / norms) @ t["W_dec"] + t["b_dec"]


def finetuned(t: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    f = (x @ t["W_enc"] + t["b_enc"]).relu()
    return f, (f * t["scaling_factor"]) @ t["W_dec"] + t["b_dec"]


def negative(stored: Tensors) -> Tensors:
    return stored | {"threshold": -stored["threshold"]}


LOADED: dict[str, tuple[Tensors, dict[str, Any], Formula]] = {
    "standard": (tensors(), {"architecture": "standard"}, relu),
    "standard b_dec": (tensors(), {"architecture": "standard", "apply_b_dec_to_input": True}, minus_b_dec(relu)),
    "jumprelu": (tensors("threshold"), {}, jumprelu),
    "jumprelu b_dec": (tensors("threshold"), {"apply_b_dec_to_input": True}, minus_b_dec(jumprelu)),
    "jumprelu below zero": (negative(tensors("threshold")), {}, jumprelu),
    "gated": (gated_tensors(), {"architecture": "gated"}, gated),
    "gated b_dec": (gated_tensors(), {"architecture": "gated", "apply_b_dec_to_input": True}, minus_b_dec(gated)),
    "topk": (tensors(), {"architecture": "topk", "k": K}, topk),
    "topk rescaled": (tensors(), {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True,
                                  "apply_b_dec_to_input": True}, minus_b_dec(topk_rescaled)),
    "batchtopk": (thresholded(), {"architecture": "batchtopk", "k": 5.5, "rescale_acts_by_decoder_norm": False},
                  batchtopk),
    "batchtopk rescaled": (thresholded(), {"architecture": "batchtopk", "rescale_acts_by_decoder_norm": True},
                           batchtopk_rescaled),
    "matryoshka with threshold": (tensors("threshold"), {"architecture": "matryoshka_batchtopk"}, jumprelu),
    "legacy": (tensors(), old(), minus_b_dec(relu)),
    "legacy without b_dec": (tensors(), old(apply_b_dec_to_input=False, normalize_activations=False), relu),
    "legacy topk": (tensors(), old(activation_fn_str="topk", activation_fn_kwargs={"k": K}), minus_b_dec(topk)),
    "legacy finetuned": (tensors("scaling_factor"), old(finetuning_scaling_factor=True), minus_b_dec(finetuned)),
    "legacy scale of one": (tensors() | {"scaling_factor": torch.ones(D_SAE)}, old(), minus_b_dec(relu)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADED)
def test_saelens_folder_computes_what_saelens_defines(name, tmp_path):
    stored, cfg, formula = LOADED[name]
    sae, x = load_sae(saelens(tmp_path, stored, cfg)), inputs()
    f, x_hat = formula(stored, x)

    assert 0.05 < (f > 0).float().mean() < 0.95
    torch.testing.assert_close(sae.encode(x), f, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sae.decode(sae.encode(x)), x_hat, atol=1e-6, rtol=1e-6)


def test_saelens_weights_of_half_precision_are_folded_in_float32(tmp_path):
    stored = {name: tensor.bfloat16() for name, tensor in tensors().items()}
    sae, x = load_sae(saelens(tmp_path, stored, {"architecture": "standard", "apply_b_dec_to_input": True})), inputs()

    assert sae.b_enc.dtype == torch.float32
    expected = minus_b_dec(relu)({name: tensor.float() for name, tensor in stored.items()}, x)[0]
    torch.testing.assert_close(sae.encode(x), expected, atol=1e-6, rtol=1e-6)


def test_saelens_manifest_and_site_of_version_six(tmp_path):
    sae = load_sae(saelens(tmp_path / "mine", tensors("threshold")))

    assert (sae.name, sae.model, sae.site) == ("mine", "gemma-2-2b", Site("resid_post", 7))
    assert sae.manifest == {
        "format": "saelens",
        "architecture": "jumprelu",
        "hook_name": HOOK,
        "bos": False,
        "context": 128,
        "model_name": "gemma-2-2b",
        "sae_lens_version": "6.21.0",
        "folded": [],
    }


def test_saelens_manifest_and_site_of_a_legacy_config(tmp_path):
    sae = load_sae(saelens(tmp_path, tensors(), old()))

    assert (sae.model, sae.site) == ("gpt2", Site("resid_pre", 3))
    assert sae.manifest["bos"] is True
    assert sae.manifest["context"] == 64
    assert sae.manifest["folded"] == ["apply_b_dec_to_input"]


@pytest.mark.parametrize(("hook", "reason"), [
    ("blocks.7.ln2.hook_normalized", "is not a stream and a layer"), ("x.3", "'x' is not a stream"),
    (None, "cfg.json names no hook"),
])  # fmt: skip
def test_saelens_hook_that_is_no_site_of_ours_leaves_the_site_open_and_says_why(hook, reason, tmp_path):
    sae = load_sae(saelens(tmp_path, tensors("threshold"), hook_name=hook))

    assert sae.site is None
    assert reason in sae.manifest["site_unknown"]


def test_saelens_heads_side_by_side_are_attn_z(tmp_path):
    folder = saelens(
        tmp_path, tensors("threshold"), {"reshape_activations": "hook_z"}, hook_name="blocks.2.attn.hook_z"
    )

    assert load_sae(folder).site == Site("attn_z", 2)


def one_scale() -> Tensors:
    return tensors("threshold", "scaling_factor")


def flat_row() -> Tensors:
    stored = tensors()
    stored["W_dec"][3] = 0.0
    return stored


UNSUPPORTED: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "transcoder": (tensors(), {"architecture": "transcoder"}, "architecture transcoder: a transcoder reads one"),
    "skip transcoder": (tensors(), {"architecture": "jumprelu_skip_transcoder"}, "reads one stream and writes another"),
    "d_out": (tensors("threshold"), {"d_out": 12}, "with d_out 12: a transcoder"),
    "hook_name_out": (tensors("threshold"), {"hook_name_out": "blocks.7.hook_mlp_out"}, "with hook_name_out 'blocks"),
    "legacy transcoder": (tensors(), old(is_transcoder=True), "with is_transcoder True"),
    "legacy hook out": (tensors(), old(hook_point_out="blocks.7.hook_mlp_out"), "with hook_point_out 'blocks"),
    "abstopk": (tensors(), {"architecture": "abstopk", "k": 3}, "architecture abstopk: it keeps the largest |pre|"),
    "pursuit": (tensors(), {"architecture": "matching_pursuit"}, "found one after another"),
    "temporal": (tensors(), {"architecture": "temporal"}, "depend on earlier tokens"),
    "future": (tensors(), {"architecture": "novel"}, "architecture 'novel': known are standard, jumprelu"),
    "layer_norm": (tensors(), {"normalize_activations": "layer_norm"}, "with normalize_activations 'layer_norm'"),
    "average": (tensors(), {"normalize_activations": "expected_average_only_in"}, "cannot be folded into the weights"),
    "old average": (tensors(), old(normalize_activations=True), "with normalize_activations True"),
    "reshape": (tensors(), {"reshape_activations": "other"}, "with reshape_activations 'other'"),
    "one head": (tensors(), old(hook_point_head_index=4), "with hook_head_index 4: it reads one head"),
    "tanh": (tensors(), old(activation_fn_str="tanh-relu"), "activation_fn 'tanh-relu' with standard"),
    "rescaled jumprelu": (tensors("threshold"), {"rescale_acts_by_decoder_norm": True},
                          "rescale_acts_by_decoder_norm with jumprelu"),
    "centred": (tensors(), old(model_from_pretrained_kwargs={"center_writing_weights": True}),
                "center_writing_weights True: it was trained on a stream without its mean"),
    "no threshold": (tensors(), {"architecture": "batchtopk", "k": 5.0}, "depend on the other tokens of the batch"),
    "norms unsaid": (thresholded(), {"architecture": "batchtopk"}, "whether the decoder's norms are in the threshold"),
    "skip tensor": (tensors("W_skip"), {"architecture": "standard"}, "tensor 'W_skip': standard SAEs have none"),
}  # fmt: skip
BROKEN: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "another width": (tensors("threshold"), {"d_in": 9}, "W_dec is (20, 8), not (20, 9)"),
    "no width": (tensors("threshold"), {"d_in": None}, "d_in is None"),
    "true width": (tensors("threshold"), {"d_sae": True}, "d_sae is True"),
    "zero width": (tensors("threshold"), {"d_sae": 0}, "d_sae is 0"),
    "no threshold": (tensors(), {}, "threshold of architecture jumprelu not there"),
    "gated without gate": (tensors(), {"architecture": "gated"}, "b_gate, b_mag, r_mag of architecture gated"),
    "k missing": (tensors(), {"architecture": "topk"}, "k is None"),
    "k a fraction": (tensors(), {"architecture": "topk", "k": 2.5}, "k is 2.5"),
    "k too large": (tensors(), {"architecture": "topk", "k": D_SAE + 1}, "top_k is 21"),
    "bos a word": (tensors("threshold"), {"prepend_bos": "yes"}, "prepend_bos is 'yes'"),
    "scale not announced": (one_scale(), {}, "the config does not say to use one"),
    "scale not there": (tensors(), old(finetuning_scaling_factor=True), "the file has no such tensor"),
    "flat row": (flat_row(), {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True}, "row of norm 0"),
    "not finite": (tensors() | {"b_enc": torch.full((D_SAE,), float("nan"))}, {"architecture": "standard"},
                   "b_enc holds NaN"),
    "overflow": (gated_tensors() | {"r_mag": torch.full((D_SAE,), 200.0)}, {"architecture": "gated"},
                 "W_enc holds NaN or infinity"),
    "integers": (tensors() | {"b_enc": torch.zeros(D_SAE, dtype=torch.int32)}, {"architecture": "standard"},
                 "tensor 'b_enc' is 'I32'"),
    "three axes": (tensors() | {"W_enc": torch.zeros(2, 2, 2)}, {"architecture": "standard"},
                   "tensor 'W_enc' is 'F32'"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_saelens_variant_that_does_not_fold_is_refused_by_name(name, tmp_path):
    stored, cfg, text = UNSUPPORTED[name]
    folder = saelens(tmp_path, stored, cfg)

    with pytest.raises(UnsupportedFormat) as caught:
        load_sae(folder)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", BROKEN)
def test_saelens_folder_that_contradicts_itself_is_refused(name, tmp_path):
    stored, cfg, text = BROKEN[name]
    folder = saelens(tmp_path, stored, cfg)

    with pytest.raises(BrokenFile) as caught:
        load_sae(folder)
    assert text in str(caught.value)


@pytest.mark.parametrize(("text", "says"), [
    ("[1]", "it is not a JSON object"), ('{"d_in": NaN}', "NaN is not a number"), ("{", "it is not JSON"),
    ('{"d_in": 8, "d_in": 9}', "a key stands twice"), ("[" * 100_000, "it is not JSON"),
    ('{"metadata": 3}', "metadata is 3"),
    (" " * (headers.MAX_JSON_BYTES + 1), "are allowed"), ("\xff", "it is not JSON"),
])  # fmt: skip
def test_saelens_config_that_is_no_config_is_refused(text, says, tmp_path):
    folder = saelens(tmp_path, tensors())
    (folder / "cfg.json").write_bytes(text.encode("latin-1"))

    with pytest.raises(BrokenFile, match=says):
        load_sae(folder)


@pytest.mark.parametrize(("repository", "site", "model"), [
    ("gemma-scope-2b-pt-res", "resid_post.12", "google/gemma-2-2b"),
    ("models--google--gemma-scope-9b-it-res/snapshots/f00", "resid_post.12", "google/gemma-2-9b-it"),
    ("gemma-scope-27b-pt-res", "resid_post.12", "google/gemma-2-27b"),
    ("gemma-scope-2b-pt-mlp", "mlp_out.12", "google/gemma-2-2b"),
    ("gemma-scope-9b-pt-att", "attn_z.12", "google/gemma-2-9b"),
])  # fmt: skip
def test_gemma_scope_site_and_model_come_from_the_path(repository, site, model, tmp_path):
    sae = load_sae(gemma(tmp_path, tensors("threshold"), f"{repository}/layer_12/width_16k/average_l0_82"))

    assert (str(sae.site), sae.model) == (site, model)
    assert sae.name.startswith("gemma-scope-")
    assert sae.name.endswith("/layer_12/width_16k/average_l0_82")
    assert sae.manifest == {"format": "gemma_scope", "architecture": "jumprelu", "bos": True}


@pytest.mark.parametrize("rename", [{}, {"W_enc": "w_enc", "W_dec": "w_dec"}])
@pytest.mark.parametrize("as_file", [False, True])
def test_gemma_scope_computes_its_jumprelu(rename, as_file, tmp_path):
    stored = tensors("threshold")
    folder = gemma(tmp_path, {rename.get(name, name): tensor for name, tensor in stored.items()})
    sae, x = load_sae(folder / "params.npz" if as_file else folder), inputs()
    f, x_hat = jumprelu(stored, x)

    assert 0.05 < (f > 0).float().mean() < 0.95
    torch.testing.assert_close(sae.encode(x), f, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sae.decode(sae.encode(x)), x_hat, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("place", "model", "says"), [
    ("mine", None, "no folder gemma-scope-...-res"),
    ("layer_12/width_16k/average_l0_82", None, "no folder gemma-scope"),
    ("gemma-scope-2b-pt-res/mine", "google/gemma-2-2b", "no folder layer_.../width_"),
    ("not-gemma-scope-2b-pt-res/layer_1/width_16k/canonical", None, "no folder gemma-scope"),
    ("gemma-scope-2b-pt-res/player_1/width_16k/canonical", "google/gemma-2-2b", "no folder layer_"),
])  # fmt: skip
def test_gemma_scope_outside_its_folders_has_no_site_and_says_why(place, model, says, tmp_path):
    sae = load_sae(gemma(tmp_path, tensors("threshold"), place))

    assert (sae.site, sae.model) == (None, model)
    assert says in sae.manifest["site_unknown"]


@pytest.mark.parametrize(("place", "says"), [
    ("gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_8", "it is a transcoder, which reads one stream"),
    ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "it reads embeddings before Gemma scales them"),
])  # fmt: skip
def test_gemma_scope_archive_that_is_no_stream_is_refused(place, says, tmp_path):
    folder = gemma(tmp_path, tensors("threshold"), place)

    with pytest.raises(UnsupportedFormat, match=says):
        load_sae(folder)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickle_in_a_gemma_scope_archive_is_refused_and_never_executed(tmp_path):
    arrays = {name: tensor.numpy() for name, tensor in tensors("threshold").items()}
    (tmp_path / "sae").mkdir()
    path = tmp_path / "sae" / "params.npz"
    np.savez(path, allow_pickle=True, **arrays | {"b_dec": np.array([Trap(tmp_path / "sprung")] * D_IN, dtype=object)})  # type: ignore[arg-type]

    with pytest.raises(BrokenFile, match="pickled objects, which are never unpickled"):
        load_sae(path)
    assert not (tmp_path / "sprung").exists()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array)
    return stream.getvalue()


def archive(folder: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], compression: int = 0) -> Path:
    members = {f"{name}.npy": npy(tensor.numpy()) for name, tensor in tensors("threshold").items()}
    with zipfile.ZipFile(folder / "params.npz", "w", compression) as file:
        for name, content in change(members).items():
            file.writestr(name, content)
    return folder


HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "one more": (lambda m: m | {"scaling_factor.npy": m["b_enc.npy"]}, "'scaling_factor.npy'"),
    "one less": (lambda m: {name: content for name, content in m.items() if name != "threshold.npy"}, "members ["),
    "two spellings": (lambda m: m | {"w_enc.npy": m["W_enc.npy"]}, "'w_enc.npy'"),
    "nothing in it": (lambda m: m | {"b_dec.npy": b""}, "does not begin as a numpy array"),
    "header cut": (lambda m: m | {"b_dec.npy": m["b_dec.npy"][:40]}, "does not begin as a numpy array"),
    "version": (lambda m: m | {"b_dec.npy": m["b_dec.npy"].replace(b"NUMPY\x01", b"NUMPY\x07")}, "does not begin"),
    "data cut": (lambda m: m | {"b_dec.npy": m["b_dec.npy"][:-4]}, "b_dec.npy is <f4 (8,) in 28 bytes"),
    "data added": (lambda m: m | {"b_dec.npy": m["b_dec.npy"] + b"\0"}, "in 33 bytes"),
    "giant": (
        lambda m: m | {"b_dec.npy": m["b_dec.npy"].replace(b"(8,), }" + b" " * 10, b"(99999999999,), }")},
        "b_dec.npy is <f4 (99999999999,) in 32 bytes",
    ),
    "code": (lambda m: m | {"b_dec.npy": m["b_dec.npy"].replace(b"False", b"exit ")}, "does not begin as a numpy"),
    "integers": (lambda m: m | {"b_dec.npy": npy(np.zeros(D_IN, np.int32))}, "dtype <i4: not floating point"),
    "three axes": (lambda m: m | {"b_dec.npy": npy(np.zeros((1, 1, D_IN), np.float32))}, "one or two axes"),
    "infinite": (lambda m: m | {"b_dec.npy": npy(np.full(D_IN, np.inf, np.float32))}, "b_dec holds NaN or infinity"),
    "transposed": (lambda m: m | {"W_enc.npy": npy(np.zeros((D_SAE, D_IN), np.float32))}, "b_enc is (20,), not (8,)"),
    "vector": (lambda m: m | {"W_enc.npy": npy(np.zeros(D_IN, np.float32))}, "W_enc is (8,), not (0, 0)"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_gemma_scope_archive_is_refused(name, tmp_path):
    change, text = HOSTILE[name]
    folder = archive(tmp_path, change)

    with pytest.raises(BrokenFile) as caught:
        load_sae(folder)
    assert text in str(caught.value)


def test_compressed_gemma_scope_archive_is_refused_before_it_is_inflated(tmp_path):
    folder = archive(tmp_path, lambda m: m | {"b_dec.npy": b"\0" * 5_000_000}, zipfile.ZIP_DEFLATED)

    with pytest.raises(BrokenFile, match="is compressed or encrypted"):
        load_sae(folder)


def test_gemma_scope_members_that_share_their_bytes_are_refused(tmp_path):
    """Five directory entries may point at one stretch of a file, and would be read five times."""
    folder = archive(tmp_path, lambda m: m)
    path = folder / "params.npz"
    with zipfile.ZipFile(path) as file:
        largest_first = sorted(file.infolist(), key=lambda info: -info.file_size)
    whole, size = bytearray(path.read_bytes()), largest_first[0].file_size
    for info in largest_first[1:]:
        entry = whole.rindex(info.filename.encode()) - 46
        whole[entry + 20 : entry + 28] = size.to_bytes(4, "little") * 2
    path.write_bytes(whole)

    with pytest.raises(BrokenFile, match="bytes in a file of"):
        load_sae(folder)


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """Thousands of loads: the checking of annotations would take most of the time."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def refused(source: Path) -> bool:
    try:
        load_sae(source)
    except LoadError:
        return True
    return False


@pytest.mark.usefixtures("without_type_checks")
def test_truncated_or_damaged_gemma_scope_archives_end_in_load_errors_only(tmp_path):
    folder = gemma(tmp_path, tensors("threshold"))
    path = folder / "params.npz"
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for n in range(0, len(whole), 13):
        path.write_bytes(whole[:n])

        assert refused(folder), f"{n} of {len(whole)} bytes"
    for _ in range(400):
        place, byte = (int(torch.randint(n, (1,), generator=generator)) for n in (len(whole), 256))
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        refused(folder)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_truncated_or_damaged_saelens_folders_end_in_load_errors_only(name, tmp_path):
    folder = saelens(tmp_path, tensors("threshold"))
    path = folder / name
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for n in range(0, len(whole), 7):
        path.write_bytes(whole[:n])

        assert refused(folder), f"{n} of {len(whole)} bytes"
    for _ in range(400):
        place, byte = (int(torch.randint(n, (1,), generator=generator)) for n in (min(len(whole), 500), 256))
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        refused(folder)


def native(root: Path) -> Path:
    from saeguard.loaders.native import save_sae

    return save_sae(tiny_sae(), root / "native").parent


@pytest.mark.parametrize(("family", "write"), [
    ("saeguard", native),
    ("saelens", lambda root: saelens(root, tensors("threshold"))),
    ("saelens", lambda root: saelens(root, tensors(), old())),
    ("gemma_scope", lambda root: gemma(root, tensors("threshold"))),
    ("gemma_scope", lambda root: gemma(root, tensors("threshold")) / "params.npz"),
])  # fmt: skip
def test_exactly_one_family_recognises_each_layout(family, write, tmp_path):
    source = write(tmp_path)

    assert [name for name, loader in LOADERS.items() if loader.recognises(source)] == [family]


def test_archive_without_an_encoder_is_of_no_family(tmp_path):
    np.savez(tmp_path / "params.npz", other=np.zeros(3))

    with pytest.raises(UnsupportedFormat, match="no loader recognises it"):
        load_sae(tmp_path)
