"""Families of one small file each: linear layers, Nanda's and Kissane's, Apollo's, mistral_sae, Bussmann's, ITDA."""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn.functional import linear, normalize, relu

from tests.lookalikes.base import D_IN, D_SAE, TOP_K, LookAlike, Tensors, largest, weights
from tests.lookalikes.dictionary_learning import linear_tensors
from tests.lookalikes.openai import layer_norm

T = weights("threshold", seed=91)
PLAIN = {key: T[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec")}
KISSANE = {
    "seed": 49, "batch_size": 4096, "lr": 0.0012, "l1_coeff": 1.8, "dict_mult": 32, "seq_len": 128, "enc_dtype": "fp32",
    "model_name": "gpt2-small", "site": "z", "layer": 5, "device": "cuda", "head": "cat", "concat_heads": True,
    "act_name": "blocks.5.attn.hook_z", "act_size": D_IN, "dict_size": D_SAE, "name": "gpt2-small_5_48_z",
}  # fmt: skip
NEEL = {
    "seed": 49, "batch_size": 4096, "lr": 0.0001, "dict_mult": 8, "seq_len": 128, "enc_dtype": "fp32", "d_mlp": D_IN,
    "remove_rare_dir": False, "model_name": "gelu-1l",
}  # fmt: skip
BUSSMANN = {
    "seed": 49, "batch_size": 4096, "seq_len": 128, "dtype": "torch.float32", "model_name": "gpt2-small",
    "site": "resid_pre", "layer": 8, "act_size": D_IN, "dict_size": D_SAE, "dataset_path": "Skylion007/openwebtext",
    "input_unit_norm": True,
    "sae_type": "topk", "top_k": TOP_K, "bandwidth": 0.001, "hook_point": "blocks.8.hook_resid_pre",
}  # fmt: skip
ITDA = {
    "activation_dim": D_IN, "batch_size": 4, "dataset": "monology/pile-uncopyrighted", "device": "cuda", "k": TOP_K,
    "layer": 8, "lm_name": "EleutherAI/pythia-160m-deduped", "loss_threshold": 0.1, "max_dict_size": 0, "seed": None,
    "seq_len": 128, "steps": 100, "submodule_name": None, "wandb_name": "ITDA",
}  # fmt: skip
LINEAR = linear_tensors(T) | {"decoder.bias": T["b_dec"]}


def apollo(*hooks: str, t: Tensors = T) -> Tensors:
    """State of a ModuleDict of SAEs; only the last hook's weights are ``t``."""
    found: Tensors = OrderedDict()
    for hook in hooks:
        these = t if hook == hooks[-1] else weights(seed=len(hook))
        found |= {
            f"{hook}.encoder.0.weight": these["W_enc"].T.contiguous(), f"{hook}.encoder.0.bias": these["b_enc"],
            f"{hook}.decoder.weight": these["W_dec"].T.contiguous(), f"{hook}.decoder.bias": these["b_dec"],
        }  # fmt: skip
    return found


def write(file: str, content: Any, more: dict[str, Any] | None = None, *, give: str = "") -> Callable[[Path], Path]:
    """A file of tensors, with texts beside it; ``give`` names what is handed to the loader, the folder if nothing."""

    def put(root: Path) -> Path:
        torch.save(content, root / file)
        for name, said in (more or {}).items():
            (root / name).write_text(yaml.dump(said) if name.endswith(".yaml") else json.dumps(said))
        return root / give if give else root

    return put


def write_itda(atoms: Tensor, metadata: dict[str, Any]) -> Callable[[Path], Path]:
    """Bare tensors, and metadata."""

    def put(root: Path) -> Path:
        torch.save(torch.zeros(len(atoms), 2, dtype=torch.long), root / "atom_indices.pt")
        return write("atoms.pt", atoms, {"metadata.yaml": metadata})(root)

    return put


def _linear(x: Tensor) -> Tensor:
    return relu(linear(x, T["W_enc"].T, T["b_enc"]))


def _linear_decode(f: Tensor, x: Tensor) -> Tensor:
    return linear(f, T["W_dec"].T, T["b_dec"])


def _nanda(x: Tensor) -> Tensor:
    return relu((x - T["b_dec"]) @ T["W_enc"] + T["b_enc"])


def _centred(acts: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: acts(x - x.mean(-1, keepdim=True))


def _centred_decode(decode: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, x: decode(f, x) + x.mean(-1, keepdim=True)


def _apollo_decode(f: Tensor, x: Tensor) -> Tensor:
    return linear(f, normalize(T["W_dec"].T, dim=0), T["b_dec"])


def _mistral(x: Tensor) -> Tensor:
    pre = (layer_norm(x)[0] - T["b_dec"]) @ T["W_enc"] + T["b_enc"]
    return relu(pre) * largest(pre, TOP_K)


def _normed_decode(f: Tensor, x: Tensor) -> Tensor:
    _, mu, std = layer_norm(x)
    return (f @ T["W_dec"] + T["b_dec"]) * std + mu


def _bussmann_topk(x: Tensor) -> Tensor:
    acts = relu((x - T["b_dec"]) @ T["W_enc"])
    return acts * largest(acts, TOP_K)


def _bussmann_jumprelu(x: Tensor) -> Tensor:
    pre = relu(x @ T["W_enc"] + T["b_enc"])
    return pre * (pre > T["threshold"])


def _normed(acts: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: acts(layer_norm(x)[0])


def pursue(x: Tensor, atoms: Tensor, rounds: int) -> Tensor:
    """One token and one round at a time."""
    tokens = x.reshape(-1, x.shape[-1])
    f = torch.zeros(len(tokens), len(atoms))
    for row, token in enumerate(tokens):
        rest = token.clone()
        for _ in range(rounds):
            fits = atoms @ rest
            best = int(fits.abs().argmax())
            f[row, best] += fits[best]
            rest = rest - fits[best] * atoms[best]
    return f.reshape(*x.shape[:-1], -1)


UNIT = normalize(T["W_dec"], dim=1)
_APOLLO = "blocks-6-hook_resid_pre"
_TWO = ("blocks-2-hook_resid_pre", _APOLLO)
_Z = "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.80e+00_ds24576_v9"


def _like(
    name: str,
    family: str,
    note: str,
    put: Callable[[Path], Path],
    acts: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor, Tensor], Tensor],
    **more: Any,
) -> LookAlike:
    return LookAlike(name=name, family=family, note=note, write=put, acts=acts, decode=decode, **more)


def _bussmann(kind: str, tensors: Tensors = PLAIN, **more: Any) -> Callable[[Path], Path]:
    return write("sae.pt", OrderedDict(tensors), {"config.json": BUSSMANN | {"sae_type": kind} | more})


_GPT2 = {"site": "resid_pre.8", "model": "gpt2"}
_LOG = {"jumprelu.log_threshold": T["threshold"].log()}
LOOKALIKES = [
    _like(
        "linear_relu",
        "linear_relu",
        "ReLU, no config",
        write("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", OrderedDict(LINEAR)),
        _linear,
        _linear_decode,
        site="resid_post.19",
        model="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    ),
    _like(
        "linear_relu_unnamed",
        "linear_relu",
        "the same, its name says nothing",
        write("weights.pt", LINEAR, give="weights.pt"),
        _linear,
        _linear_decode,
    ),
    _like(
        "nanda_z",
        "nanda",
        "Kissane's, of attention heads",
        write(f"{_Z}.pt", OrderedDict(PLAIN), {f"{_Z}_cfg.json": KISSANE}),
        _nanda,
        _linear_decode,
        site="attn_z.5",
        model="gpt2",
    ),
    _like(
        "nanda_resid",
        "nanda",
        "of a stream without its mean",
        write(
            "3.pt",
            PLAIN,
            {
                "3_cfg.json": KISSANE
                | {"site": "resid_post", "act_name": "blocks.5.hook_resid_post", "concat_heads": None, "head": None}
            },
            give="3.pt",
        ),
        _centred(_nanda),
        _centred_decode(_linear_decode),
        site="resid_post.5",
        model="gpt2",
    ),
    _like(
        "nanda_short",
        "nanda",
        "a site's short name",
        write("47.pt", PLAIN, {"47_cfg.json": NEEL | {"site": "post", "layer": 0}}),
        _nanda,
        _linear_decode,
        site="mlp_post.0",
        model="gelu-1l",
    ),
    _like(
        "nanda_first",
        "nanda",
        "Neel Nanda's first, which names no site",
        write("25.pt", PLAIN, {"25_cfg.json": NEEL}),
        _nanda,
        _linear_decode,
        model="gelu-1l",
    ),
    _like(
        "apollo_e2e",
        "apollo_e2e",
        "ReLU, decoder normalised",
        write(
            "samples_400000.pt",
            apollo(_APOLLO),
            {"final_config.yaml": {"tlens_model_name": "gpt2-small", "tlens_model_path": None}},
        ),
        _centred(_linear),
        _centred_decode(_apollo_decode),
        site="resid_pre.6",
        model="gpt2",
    ),
    _like(
        "apollo_e2e_several",
        "apollo_e2e",
        "one of several hooks",
        write("samples_400000.pt", apollo(*_TWO)),
        _centred(_linear),
        _centred_decode(_apollo_decode),
        site="resid_pre.6",
        options={"site": "resid_pre.6"},
    ),
    _like(
        "apollo_e2e_own",
        "apollo_e2e",
        "on a model of their own",
        write(
            "samples_10.pt",
            apollo(_APOLLO),
            {"final_config.yaml": {"tlens_model_name": None, "tlens_model_path": "models/epoch_1.pt"}},
        ),
        _linear,
        _apollo_decode,
        site="resid_pre.6",
    ),
    _like(
        "mistral_sae",
        "mistral_sae",
        "TopK behind a layer norm, k is told",
        write(
            "mistral_16_32.pt",
            OrderedDict(
                w_enc=T["W_enc"],
                w_dec=T["W_dec"],
                b_enc=T["b_enc"],
                b_pre=T["b_dec"],
                stats_last_nonzero=torch.zeros(D_SAE, dtype=torch.long),
            ),
        ),
        _mistral,
        _normed_decode,
        options={"top_k": TOP_K, "site": "resid_post.16", "model": "mistralai/Mistral-7B-v0.1"},
        site="resid_post.16",
        model="mistralai/Mistral-7B-v0.1",
    ),
    _like(
        "bussmann_topk",
        "bussmann",
        "TopK that ignores b_enc",
        _bussmann("topk"),
        _normed(_bussmann_topk),
        _normed_decode,
        **_GPT2,
    ),
    _like(
        "bussmann_topk_plain",
        "bussmann",
        "TopK without the norm",
        _bussmann("topk", input_unit_norm=False),
        _centred(_bussmann_topk),
        _centred_decode(_linear_decode),
        **_GPT2,
    ),
    _like("bussmann_vanilla", "bussmann", "ReLU", _bussmann("vanilla"), _normed(_nanda), _normed_decode, **_GPT2),
    _like(
        "bussmann_jumprelu",
        "bussmann",
        "JumpReLU, log thresholds",
        _bussmann("jumprelu", PLAIN | _LOG),
        _normed(_bussmann_jumprelu),
        _normed_decode,
        **_GPT2,
    ),
    _like(
        "bussmann_jumprelu_plain",
        "bussmann",
        "the same without the norm, on the MLP's hidden layer",
        _bussmann("jumprelu", PLAIN | _LOG, input_unit_norm=False, hook_point="blocks.3.mlp.hook_post"),
        _bussmann_jumprelu,
        _linear_decode,
        site="mlp_post.3",
        model="gpt2",
    ),
    _like(
        "itda",
        "itda",
        "matching pursuit",
        write_itda(UNIT, ITDA),
        lambda x: pursue(x, UNIT, TOP_K),
        lambda f, x: f @ UNIT,
        site="resid_post.8",
        model="EleutherAI/pythia-160m-deduped",
    ),
    _like(
        "itda_long_atoms",
        "itda",
        "atoms that are not yet unit vectors",
        write_itda(T["W_dec"], ITDA | {"k": 3}),
        lambda x: pursue(x, UNIT, 3),
        lambda f, x: f @ UNIT,
        site="resid_post.8",
        model="EleutherAI/pythia-160m-deduped",
    ),
]
