"""SAELens, version 6 and before: every architecture, and what its config can ask for around it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.lookalikes.base import D_IN, D_SAE, TOP_K, LookAlike, Tensors, largest, relu_jump, weights

D_OUT = 12
SCALE = 0.4
HOOK = "blocks.7.hook_resid_post"
METADATA = {
    "sae_lens_version": "6.21.0", "sae_lens_training_version": "6.21.0", "dataset_path": "some/text", "hook_name": HOOK,
    "model_name": "gemma-2-2b", "model_class_name": "HookedTransformer", "hook_head_index": None, "context_size": 128,
    "seqpos_slice": [None], "model_from_pretrained_kwargs": {"center_writing_weights": False}, "prepend_bos": True,
    "exclude_special_tokens": False, "sequence_separator_token": "bos", "disable_concat_sequences": False,
}  # fmt: skip
V6 = {
    "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False,
    "normalize_activations": "none", "reshape_activations": "none", "architecture": "standard",
}  # fmt: skip
LEGACY = {
    "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cuda", "model_name": "gpt2-small",
    "hook_point": "blocks.3.hook_resid_pre", "hook_point_layer": 3, "hook_point_head_index": None, "context_size": 64,
    "activation_fn_str": "relu", "activation_fn_kwargs": {}, "dataset_path": "some/text",
}  # fmt: skip

Gate = Callable[[Tensors, Tensor], Tensor]
Write = Callable[[Tensors, Tensor], Tensor]


def standard(t: Tensors, x: Tensor) -> Tensor:
    return (x @ t["W_enc"] + t["b_enc"]).relu()


def tanh(t: Tensors, x: Tensor) -> Tensor:
    return standard(t, x).tanh()


def jumprelu(t: Tensors, x: Tensor) -> Tensor:
    return relu_jump(x @ t["W_enc"] + t["b_enc"], t["threshold"])


def log_jumprelu(t: Tensors, x: Tensor) -> Tensor:
    return relu_jump(x @ t["W_enc"] + t["b_enc"], t["log_threshold"].exp())


def gated(t: Tensors, x: Tensor) -> Tensor:
    return (x @ t["W_enc"] + t["b_gate"] > 0) * (x @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()


def topk(t: Tensors, x: Tensor) -> Tensor:
    p = x @ t["W_enc"] + t["b_enc"]
    return p.relu() * largest(p, TOP_K)


def abstopk(t: Tensors, x: Tensor) -> Tensor:
    p = x @ t["W_enc"] + t["b_enc"]
    return p * largest(p.abs(), TOP_K)


def batchtopk(t: Tensors, x: Tensor) -> Tensor:
    return relu_jump(x @ t["W_enc"] + t["b_enc"], t["topk_threshold"])


def rescaled(gate: Gate) -> Gate:
    """The gate looks at pre-activations times the norms of the decoder's rows."""
    return lambda t, x: gate(t | {"W_enc": t["W_enc"] * norms(t), "b_enc": t["b_enc"] * norms(t)}, x)


def norms(t: Tensors) -> Tensor:
    return (t["W_dec"] ** 2).sum(-1).sqrt()


def pursuit(t: Tensors, x: Tensor, rounds: int = D_IN, residual: float = 1e-2, stops: bool = True) -> Tensor:
    """Token by token, in plain words."""
    f = torch.zeros(*x.shape[:-1], D_SAE)
    for f_token, rest in zip(f.view(-1, D_SAE), x.reshape(-1, D_IN), strict=True):
        for _ in range(rounds):
            fits = (t["W_dec"] @ rest).relu()
            best, support = int(fits.argmax()), f_token != 0
            f_token[best] += fits[best]
            rest = rest - fits[best] * t["W_dec"][best]
            if bool(rest.norm() < residual) or stops and bool(((f_token != 0) == support).all()):
                break
    return f


def plain(t: Tensors, f: Tensor) -> Tensor:
    return f @ t["W_dec"] + t["b_dec"]


def by_norm(t: Tensors, f: Tensor) -> Tensor:
    return (f / norms(t)) @ t["W_dec"] + t["b_dec"]


def finetuned(t: Tensors, f: Tensor) -> Tensor:
    return (f * t["scaling_factor"]) @ t["W_dec"] + t["b_dec"]


def without_bias(t: Tensors, f: Tensor) -> Tensor:
    return f @ t["W_dec"]


def untouched(x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
    """x as it is read, and the scale and the shift with which a reconstruction goes back."""
    return x, 1.0, 0.0


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True)
    std = ((x - mean) ** 2).sum(-1, keepdim=True).div(D_IN - 1).sqrt()
    return (x - mean) / (std + 1e-5), std, mean


def const_norm(x: Tensor) -> tuple[Tensor, Tensor, float]:
    coefficient = D_IN**0.5 / x.norm(dim=-1, keepdim=True)
    return x * coefficient, 1 / coefficient, 0.0


def scaled(x: Tensor) -> tuple[Tensor, float, float]:
    return x * SCALE, 1 / SCALE, 0.0


def centred(x: Tensor) -> tuple[Tensor, float, Tensor]:
    mean = x.mean(-1, keepdim=True)
    return x - mean, 1.0, mean


def centred_and_scaled(x: Tensor) -> tuple[Tensor, float, Tensor]:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * SCALE, 1 / SCALE, mean


@dataclass(frozen=True)
class Case:
    """``cfg`` on top of version 6's, or with a ``hook_point`` on top of an old one's; ``unit``: published / p."""

    note: str
    tensors: Tensors
    cfg: dict[str, Any]
    gate: Gate = standard
    write: Write = plain
    norm: Callable[[Tensor], Any] = untouched
    metadata: dict[str, Any] = field(default_factory=dict)
    site: str = "resid_post.7"
    site_out: str | None = None
    model: str = "gemma-2-2b"
    options: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] | None = None
    unit: float = 1.0

    @property
    def config(self) -> dict[str, Any]:
        if "hook_point" in self.cfg:
            return LEGACY | self.cfg
        return V6 | self.cfg | {"metadata": METADATA | self.metadata}


def save(folder: Path, tensors: Tensors, config: dict[str, Any], scaler: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    if scaler is not None:
        (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    return folder


def likeness(name: str, case: Case) -> LookAlike:
    config = case.config
    t = {key: tensor.float() for key, tensor in case.tensors.items()}
    is_transcoder = "transcoder" in config.get("architecture", "")
    minus = config.get("apply_b_dec_to_input", True)

    def acts(x: Tensor) -> Tensor:
        x = case.norm(x)[0]
        return case.gate(t, x - t["b_dec"] if minus else x) * case.unit

    def decode(f: Tensor, x: Tensor) -> Tensor:
        x_hat = case.write(t, f / case.unit)
        if not is_transcoder:
            _, scale, shift = case.norm(x)
            x_hat = x_hat * scale + shift
        return x_hat + x @ t["W_skip"].T if "W_skip" in t else x_hat

    return LookAlike(
        name=f"saelens {name}", family="saelens", note=case.note,
        write=lambda folder: save(folder / "sae", case.tensors, config, case.scaler), acts=acts, decode=decode,
        site=case.site, site_out=case.site_out, model=case.model, options=case.options,
    )  # fmt: skip


def v6(architecture: str, **changes: Any) -> dict[str, Any]:
    return {"architecture": architecture} | changes


def old(**changes: Any) -> dict[str, Any]:
    return {"hook_point": LEGACY["hook_point"]} | changes


def tensors(*names: str, without: str = "", d_out: int | None = None, seed: int = 41) -> Tensors:
    return {name: tensor for name, tensor in weights(*names, seed=seed, d_out=d_out).items() if name != without}


def transcoder(*names: str, d_out: int = D_OUT) -> Tensors:
    t = weights(*names, "skip", seed=43, d_out=d_out)
    return {name: t[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", *names)} | {"W_skip": t["skip"].T}


def no_skip(t: Tensors) -> Tensors:
    return {name: tensor for name, tensor in t.items() if name != "W_skip"}


def atoms() -> Tensors:
    """Of lengths around 1, so that rounds go on and a division by their squares would show."""
    t = weights(seed=47)
    lengths = torch.linspace(0.8, 1.1, D_SAE)[:, None]
    return {"W_dec": t["W_dec"] / t["W_dec"].norm(dim=-1, keepdim=True) * lengths, "b_dec": t["b_dec"]}


THRESHOLD = {"topk_threshold": torch.tensor(0.7, dtype=torch.float64)}
GATED = tensors("b_gate", "b_mag", "r_mag", without="b_enc")
NEGATIVE = tensors("threshold") | {"threshold": tensors("threshold")["threshold"] - 0.4}
AVERAGE = {"normalize_activations": "expected_average_only_in"}
CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
GPT2: dict[str, Any] = {"site": "resid_pre.3", "model": "gpt2"}
MLP: dict[str, Any] = {
    "metadata": {"hook_name": "blocks.7.ln2.hook_normalized", "hook_name_out": "blocks.7.hook_mlp_out"},
    "site": "mlp_normed.7", "site_out": "mlp_out.7",
}  # fmt: skip
HOOK_Z: dict[str, Any] = {"metadata": {"hook_name": "blocks.2.attn.hook_z"}, "site": "attn_z.2"}

CASES: dict[str, Case] = {
    "standard": Case("ReLU", tensors(), v6("standard")),
    "standard b_dec": Case("ReLU, b_dec off the input", tensors(), v6("standard", apply_b_dec_to_input=True)),
    "jumprelu": Case("JumpReLU", tensors("threshold"), v6("jumprelu"), jumprelu),
    "jumprelu b_dec": Case("JumpReLU, b_dec off the input", tensors("threshold"),
                           v6("jumprelu", apply_b_dec_to_input=True), jumprelu),
    "jumprelu below zero": Case("JumpReLU, thresholds below 0", NEGATIVE, v6("jumprelu"), jumprelu),
    "jumprelu logarithm": Case("JumpReLU checkpoint with log_threshold", tensors("log_threshold"), v6("jumprelu"),
                               log_jumprelu),
    "jumprelu half": Case("JumpReLU in bfloat16",
                          {name: t.bfloat16() for name, t in tensors("threshold").items()},
                          v6("jumprelu", apply_b_dec_to_input=True), jumprelu),
    "gated": Case("Gated", GATED, v6("gated"), gated),
    "gated b_dec": Case("Gated, b_dec off the input", GATED, v6("gated", apply_b_dec_to_input=True), gated),
    "topk": Case("TopK", tensors(), v6("topk", k=TOP_K), topk),
    "topk rescaled": Case("TopK by decoder norm", tensors(),
                          v6("topk", k=TOP_K, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=True),
                          rescaled(topk), by_norm),
    "topk rescaled average": Case("TopK by decoder norm, input scaled", tensors(),
                                  v6("topk", k=TOP_K, rescale_acts_by_decoder_norm=True, **AVERAGE), rescaled(topk),
                                  by_norm, scaled, options={"input_scale": SCALE}, unit=1 / SCALE),
    "abstopk": Case("AbsTopK", tensors(), v6("abstopk", k=TOP_K), abstopk),
    "abstopk rescaled": Case("AbsTopK by decoder norm", tensors(),
                             v6("abstopk", k=TOP_K, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=True),
                             rescaled(abstopk), by_norm),
    "batchtopk": Case("BatchTopK checkpoint", tensors() | THRESHOLD,
                      v6("batchtopk", k=5.5, rescale_acts_by_decoder_norm=False), batchtopk),
    "batchtopk rescaled": Case("BatchTopK checkpoint by decoder norm", tensors() | THRESHOLD,
                               v6("batchtopk", k=5.5, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=True),
                               rescaled(batchtopk), by_norm),
    "matryoshka rescaled average": Case(
        "Matryoshka BatchTopK checkpoint by decoder norm, input scaled", tensors() | THRESHOLD,
        v6("matryoshka_batchtopk", k=5.0, matryoshka_widths=[8, 20], rescale_acts_by_decoder_norm=True, **AVERAGE),
        rescaled(batchtopk), by_norm, scaled, scaler={"scaling_factor": SCALE, "has_whitening": False}, unit=1 / SCALE,
    ),
    "matryoshka with threshold": Case("Matryoshka BatchTopK with a threshold by latent", tensors("threshold"),
                                      v6("matryoshka_batchtopk"), jumprelu),
    "average": Case("ReLU, input scaled", tensors(), v6("standard", **AVERAGE), norm=scaled,
                    options={"input_scale": SCALE}),
    "average b_dec": Case("JumpReLU, input scaled, b_dec off it", tensors("threshold"),
                          v6("jumprelu", apply_b_dec_to_input=True, norm_scaling_factor=SCALE, **AVERAGE), jumprelu,
                          norm=scaled),
    "average gated": Case("Gated, input scaled, b_dec off it", GATED,
                          v6("gated", apply_b_dec_to_input=True, **AVERAGE), gated, norm=scaled,
                          options={"input_scale": SCALE}),
    "constant scalar": Case(
        "ReLU, input times a constant", tensors(),
        v6("standard", apply_b_dec_to_input=True, normalize_activations="constant_scalar_rescale",
           activation_normalization_factor=SCALE), norm=scaled,
    ),
    "constant norm": Case("JumpReLU, every token of one norm", tensors("threshold"),
                          v6("jumprelu", normalize_activations="constant_norm_rescale", apply_b_dec_to_input=True),
                          jumprelu, norm=const_norm),
    "layer norm": Case("ReLU, every token normalised", tensors(), v6("standard", normalize_activations="layer_norm"),
                       norm=layer_norm),
    "heads": Case("JumpReLU on heads side by side", tensors("threshold"), v6("jumprelu", reshape_activations="hook_z"),
                  jumprelu, **HOOK_Z),
    "legacy": Case("ReLU before version 6", tensors(), old(), **GPT2),
    "legacy without b_dec": Case("ReLU before version 6, b_dec not off the input", tensors(),
                                 old(apply_b_dec_to_input=False, normalize_activations=False), **GPT2),
    "legacy topk layer norm": Case(
        "TopK before version 6, every token normalised", tensors(),
        old(activation_fn_str="topk", activation_fn_kwargs={"k": TOP_K}, normalize_activations="layer_norm",
            prepend_bos=False), topk, norm=layer_norm, **GPT2,
    ),
    "legacy average": Case("ReLU before version 6, input scaled", tensors(), old(normalize_activations=True),
                           norm=scaled, options={"input_scale": SCALE}, **GPT2),
    "legacy constant norm": Case("ReLU before version 6, every token of one norm", tensors(),
                                 old(normalize_activations="constant_norm_rescale"), norm=const_norm, **GPT2),
    "legacy tanh": Case("tanh-relu before version 6", tensors(), old(activation_fn_str="tanh-relu"), tanh, **GPT2),
    "legacy finetuned": Case("ReLU before version 6, finetuned", tensors("scaling_factor"),
                             old(finetuning_scaling_factor=True), write=finetuned, **GPT2),
    "legacy scale of one": Case("ReLU before version 6, with a scale of 1",
                                tensors() | {"scaling_factor": torch.ones(D_SAE)}, old(), **GPT2),
    "legacy centred": Case("ReLU on a stream without its mean", tensors(), old(**CENTRED), norm=centred, **GPT2),
    "legacy centred average": Case("ReLU on a stream without its mean, input scaled", tensors(),
                                   old(normalize_activations=True, **CENTRED), norm=centred_and_scaled,
                                   options={"input_scale": SCALE}, **GPT2),
    "legacy centred layer norm": Case("ReLU on a stream without its mean, every token normalised", tensors(),
                                      old(normalize_activations="layer_norm", **CENTRED), norm=layer_norm, **GPT2),
    "transcoder": Case("ReLU transcoder", no_skip(transcoder()), v6("transcoder", d_out=D_OUT), **MLP),
    "skip transcoder": Case("ReLU transcoder with a skip", transcoder(), v6("skip_transcoder", d_out=D_OUT), **MLP),
    "jumprelu transcoder": Case("JumpReLU transcoder", no_skip(transcoder("threshold")),
                                v6("jumprelu_transcoder", d_out=D_OUT), jumprelu, **MLP),
    "jumprelu skip transcoder": Case("JumpReLU transcoder with a skip, as wide as its input",
                                     transcoder("threshold", d_out=D_IN),
                                     v6("jumprelu_skip_transcoder", d_out=D_IN), jumprelu, **MLP),
    "transcoder layer norm": Case("ReLU transcoder with a skip, every token normalised", transcoder(),
                                  v6("skip_transcoder", d_out=D_OUT, normalize_activations="layer_norm"),
                                  norm=layer_norm, **MLP),
    "transcoder average": Case("ReLU transcoder with a skip, input scaled", transcoder(),
                               v6("skip_transcoder", d_out=D_OUT, **AVERAGE), norm=scaled,
                               options={"input_scale": SCALE}, **MLP),
    "pursuit": Case("matching pursuit", atoms(), v6("matching_pursuit", apply_b_dec_to_input=True,
                                                    residual_threshold=1e-2, max_iterations=None,
                                                    stop_on_duplicate_support=True), pursuit),
    "pursuit without b_dec": Case("matching pursuit without b_dec", atoms(), v6("matching_pursuit"), pursuit,
                                  without_bias),
    "pursuit of few rounds": Case(
        "matching pursuit with repeats, up to a residual", atoms(),
        v6("matching_pursuit", residual_threshold=1.5, max_iterations=7, stop_on_duplicate_support=False,
           apply_b_dec_to_input=True),
        partial(pursuit, rounds=7, residual=1.5, stops=False),
    ),
    "pursuit layer norm": Case("matching pursuit, every token normalised", atoms(),
                               v6("matching_pursuit", apply_b_dec_to_input=True, normalize_activations="layer_norm"),
                               pursuit, norm=layer_norm),
}  # fmt: skip
LOOKALIKES = [likeness(name, case) for name, case in CASES.items()]
