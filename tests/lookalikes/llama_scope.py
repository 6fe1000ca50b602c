"""OpenMOSS's three formats: Llama Scope, its R1-Distill successor, and lm-saes 2 or llamascopium.

The equations are those of training, where x and the true output are normed and nothing is folded; activations are
then brought to the units that each format publishes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.lookalikes.base import D_IN, D_SAE, TOP_K, LookAlike, Tensors, largest, weights

ROOT_D = D_IN**0.5
LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
V1 = {
    "hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post",
    "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "expansion_factor": 3, "d_model": D_IN,
    "d_sae": D_SAE,
    "act_fn": "jumprelu", "jump_relu_threshold": 0.35546875, "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 9.0, "out": 9.0}, "decoder_exactly_fixed_norm": False,
    "sparsity_include_decoder_norm": True, "use_glu_encoder": False, "top_k": TOP_K, "dtype": "torch.bfloat16",
}  # fmt: skip
TC = {
    "hook_point_in": "blocks.0.ln2.hook_normalized", "hook_point_out": "blocks.0.hook_mlp_out",
    "jump_relu_threshold": 0.0933837890625, "dataset_average_activation_norm": {"in": 12.0, "out": 0.796875},
}  # fmt: skip
V2 = {
    "sae_type": "sae", "d_model": D_IN, "expansion_factor": 3.0, "use_decoder_bias": True, "act_fn": "jumprelu",
    "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "top_k": TOP_K,
    "use_triton_kernel": False, "sparsity_threshold_for_triton_spmm_kernel": 0.996, "jumprelu_threshold_window": 2.0,
    "use_glu_encoder": False, "hook_point_in": "blocks.7.hook_resid_post", "hook_point_out": "blocks.7.hook_resid_post",
}  # fmt: skip
TC2 = {"hook_point_in": "blocks.3.ln2.hook_normalized", "hook_point_out": "blocks.3.hook_mlp_out"}
R1_FOLDER = "800M-Slimpajama-0-OpenR1-Math-220k/L15R"


def tensors(seed: int) -> Tensors:
    """Weights whose decoder rows have very different norms, and a threshold for each latent."""
    t = weights("threshold", seed=seed)
    return t | {"W_dec": t["W_dec"] * torch.linspace(0.3, 2.0, D_SAE)[:, None]}


def rounded(t: Tensors) -> Tensors:
    """What is left of them in bfloat16."""
    return {key: tensor.bfloat16().float() for key, tensor in t.items()}


def save(path: Path, stored: Tensors) -> None:
    """Weights in a file of that name; files of torch's own have them one level down."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {key: tensor.contiguous() for key, tensor in stored.items()}
    if path.suffix == ".pt":
        torch.save({"sae": stored, "version": "2.0.0b34"}, path)
    else:
        save_file(stored, path)


def linear(t: Tensors, dtype: torch.dtype = torch.float32) -> Tensors:
    """Names and orientation of torch's linear layers."""
    return {name: (t[key].T if key.startswith("W_") else t[key]).to(dtype) for key, name in LINEAR.items() if key in t}


def write_v1(
    t: Tensors, config: dict[str, Any], folder: str, file: str = "checkpoints/final.safetensors"
) -> Callable[[Path], Path]:
    def put(root: Path) -> Path:
        save(root / folder / file, linear(t, torch.bfloat16))
        (root / folder / "hyperparams.json").write_text(json.dumps(config))
        return root / folder

    return put


def write_v2(
    t: Tensors, config: dict[str, Any], norms: dict[str, float], *, folder: str = "layer7",
    file: str = "sae_weights.safetensors", turned: bool = False,
) -> Callable[[Path], Path]:  # fmt: skip
    """lm-saes 2, or with ``turned`` R1-Distill; ``norms`` by hook point."""

    def put(root: Path) -> Path:
        names = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
        stored = linear(t) if turned else {name: t[key] for key, name in names.items() if key in t}
        if "threshold" in t:
            stored[f"{'' if turned else 'activation_function.'}log_jumprelu_threshold"] = t["threshold"].log()
        stored |= {f"dataset_average_activation_norm.{hook}": torch.tensor(norm) for hook, norm in norms.items()}
        save(root / folder / file, stored)
        (root / folder / "config.json").write_text(json.dumps(config, indent=4))
        return root / folder

    return put


class Training:
    """How an SAE or transcoder is run on normed activations."""

    def __init__(self, t: Tensors, config: dict[str, Any], average_in: float | None, average_out: float | None):
        self.t, self.config = t, config
        self.s_in = ROOT_D / average_in if average_in else 1.0
        self.s_out = ROOT_D / average_out if average_out else 1.0
        self.per_token = config["norm_activation"] == "token-wise"
        self.b_dec = t.get("b_dec", torch.zeros(D_IN))
        self.n = t["W_dec"].norm(dim=1)

    def scale(self, x: Tensor) -> Tensor | float:
        return ROOT_D / x.norm(dim=-1, keepdim=True) if self.per_token else self.s_in

    def pre(self, x: Tensor) -> Tensor:
        x = x * self.scale(x)
        if self.config.get("apply_decoder_bias_to_pre_encoder"):
            x = x - self.b_dec
        return x @ self.t["W_enc"] + self.t["b_enc"]

    def decode(self, f: Tensor, x: Tensor) -> Tensor:
        return (f @ self.t["W_dec"] + self.b_dec) / (self.scale(x) if self.per_token else self.s_out)


def v1(
    name: str, note: str, seed: int, changes: dict[str, Any], site: str, *, folder: str = "Llama3_1-8B-Base-L15R-8x",
    file: str = "checkpoints/final.safetensors", drop: tuple[str, ...] = (), site_out: str | None = None,
) -> LookAlike:  # fmt: skip
    """Published activations are those of training, over s_in, times the norm of the decoder's row in raw units."""
    config = V1 | changes
    t = rounded({key: tensor for key, tensor in tensors(seed).items() if key != "threshold" and key not in drop})
    averages = config["dataset_average_activation_norm"] if config["norm_activation"] == "dataset-wise" else {}
    training = Training(t, config, averages.get("in"), averages.get("out"))
    raw_norms = training.n * training.s_in / training.s_out if config["sparsity_include_decoder_norm"] else 1.0
    unit, threshold = raw_norms / training.s_in, config["jump_relu_threshold"]

    def acts(x: Tensor) -> Tensor:
        p = training.pre(x) * unit
        if config["act_fn"] == "relu":
            return p.relu()
        if config["act_fn"] == "topk" and threshold == 0:
            return p.relu() * largest(p.relu(), TOP_K)
        return p * (p > threshold)

    written = {key: value for key, value in config.items() if key not in drop}
    return LookAlike(
        name=f"llama_scope {name}", family="llama_scope", note=note, write=write_v1(t, written, folder, file),
        acts=acts, decode=lambda f, x: training.decode(f / unit, x), site=site, site_out=site_out,
        model="meta-llama/Llama-3.1-8B" if folder.startswith("Llama3_1") else None,
    )  # fmt: skip


def v2(
    name: str, note: str, seed: int, changes: dict[str, Any], site: str | None, *, averages: tuple[float, ...] = (9.0,),
    drop: tuple[str, ...] = (), folder: str = "layer7", file: str = "sae_weights.safetensors",
    site_out: str | None = None, turned: bool = False, in_file: bool = True, model: str | None = None,
) -> LookAlike:  # fmt: skip
    """Published activations are those of training."""
    config = V2 | changes
    ranks = config["act_fn"] == "topk"
    unused = ("threshold",) if ranks or config["act_fn"] == "relu" else ()
    t = {key: tensor for key, tensor in tensors(seed).items() if key not in (*unused, *drop)}
    used = averages if config["norm_activation"] == "dataset-wise" else (None,)
    training = Training(t, config, used[0], used[-1])

    def acts(x: Tensor) -> Tensor:
        p = training.pre(x)
        gated = p * training.n if config["sparsity_include_decoder_norm"] else p
        if ranks:
            return p.relu() * largest(gated.relu(), TOP_K)
        return p * (gated > t.get("threshold", torch.zeros(())))

    hooks = dict.fromkeys((config["hook_point_in"], config["hook_point_out"]))
    norms = dict(zip(hooks, averages, strict=False)) if in_file else {}
    family = "llama_scope_r1" if turned else "lm_saes"
    return LookAlike(
        name=f"{family} {name}", family=family, note=note, acts=acts, decode=training.decode, site=site,
        write=write_v2(t, config, norms, folder=folder, file=file, turned=turned), site_out=site_out, model=model,
        options={} if in_file or used[0] is None else {"input_scale": ROOT_D / averages[0]},
    )  # fmt: skip


def r1(name: str, note: str, seed: int, changes: dict[str, Any], **more: Any) -> LookAlike:
    return v2(
        name, note, seed, {"hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post"}
        | changes, "resid_post.15", turned=True, folder=R1_FOLDER, model="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        **more,
    )  # fmt: skip


SAME = {"hook_point_in": "blocks.2.hook_attn_out", "hook_point_out": "blocks.2.hook_attn_out"}
LOOKALIKES = [
    v1("residual", "JumpReLU in raw units, bfloat16", 71, {}, "resid_post.15"),
    v1("topk with a threshold", "is JumpReLU", 72, {"act_fn": "topk"}, "resid_post.15"),
    v1("topk", "TopK of p |W_dec|", 73, {"act_fn": "topk", "jump_relu_threshold": 0}, "resid_post.15"),
    v1("transcoder", "pre-gain normed stream to MLP output", 74, TC, "mlp_normed.0", site_out="mlp_out.0",
       folder="Llama3_1Base-L0TC-32x"),
    v1("named by its folder", "no hook points in its config", 75, {}, "attn_out.9", folder="Llama3_1-8B-Base-L9A-32x",
       drop=("hook_point_in", "hook_point_out")),
    v1("transcoder named by its folder", "no hook points in its config", 76, TC, "mlp_normed.31", site_out="mlp_out.31",
       folder="Llama3_1-8B-Base-L31TC-8x", drop=("hook_point_in", "hook_point_out")),
    v1("pre-encoder bias", "ReLU of x - b_dec", 77, {"apply_decoder_bias_to_pre_encoder": True, "act_fn": "relu"},
       "resid_post.15"),
    v1("unfolded norms", "gate without decoder norms", 78, {"sparsity_include_decoder_norm": False}, "resid_post.15"),
    v1("token-wise", "each token's norm", 79,
       {"norm_activation": "token-wise", "apply_decoder_bias_to_pre_encoder": True}, "resid_post.15"),
    v1("no decoder bias", "torch file", 80, {"use_decoder_bias": False, "norm_activation": "inference"},
       "resid_post.15", drop=("b_dec",), file="sae_weights.pt", folder="gpt2-L15"),
    r1("residual", "JumpReLU in units of the normed input", 81, {}),
    r1("scale from its release", "average norm not in the file", 82, {}, in_file=False),
    r1("plain gate", "gate without decoder norms", 83, {"sparsity_include_decoder_norm": False}),
    v2("jumprelu", "gate sees p |W_D|", 84, {}, "resid_post.7"),
    v2("topk", "ranks by p |W_D|", 85, {"act_fn": "topk"}, "resid_post.7"),
    v2("plain topk", "ranks by p, folded by its exporter", 86, {"act_fn": "topk", "norm_activation": "inference",
       "sparsity_include_decoder_norm": False}, "resid_post.7"),
    v2("relu", "ReLU, no decoder bias", 87, {"act_fn": "relu", "use_decoder_bias": False} | SAME, "attn_out.2",
       drop=("b_dec",)),
    v2("token-wise", "each token's norm", 88, {"norm_activation": "token-wise"}, "resid_post.7"),
    v2("transcoder", "normed stream to MLP output", 89, {"act_fn": "topk"} | TC2, "mlp_normed.3", site_out="mlp_out.3",
       averages=(9.0, 2.5)),
    v2("jumprelu transcoder", "torch file", 90, TC2, "mlp_normed.3", site_out="mlp_out.3", averages=(9.0, 2.5),
       file="sae_weights.pt"),
    v2("converted batchtopk", "with the threshold of its conversion", 91, {"act_fn": "batchtopk"}, "resid_post.7",
       file="checkpoints/final.safetensors"),
]  # fmt: skip
