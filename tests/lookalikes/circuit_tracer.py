"""circuit-tracer's per-layer transcoders."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tests.lookalikes.base import TOP_K, LookAlike, Tensors, largest, weights

QWEN = "Qwen/Qwen3-0.6B"
CONFIG = {
    "model_name": QWEN,
    "model_kind": "transcoder_set",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "mlp.hook_out",
    "transcoders": ["hf://mwhanna/qwen3-0.6b-transcoders/layer_0.safetensors"],
}
RUN = {"d_model": {"value": 16}, "d_feature": {"value": 48}, "batch_size": {"value": 4096},
       "before_ln": {"value": False}, "activation": {"desc": None, "value": "relu"}, "wandb_version": 1}  # fmt: skip
# As stored: encoder (d_sae, d_in), decoder (d_sae, d_out), both bfloat16.
RELU = {name: tensor.bfloat16() for name, tensor in weights(seed=51).items()}
JUMP = weights("activation_function.threshold", seed=52)
JUMP["activation_function.threshold"] = JUMP["activation_function.threshold"] - 0.3
SKIP = weights("skip", seed=53, d_out=10)


def write(
    stored: Tensors, config: dict[str, Any] | None, folder: str = "set", layers: tuple[int, ...] = (4,), **more: Any
) -> Callable[[Path], Path]:
    """A folder with a config and some layers, where all but the last hold other weights; ``more`` are YAML files."""

    def put(root: Path) -> Path:
        (root / folder).mkdir(parents=True)
        for layer in layers:
            tensors = stored if layer == layers[-1] else {key: tensor * 2 for key, tensor in stored.items()}
            save_file(as_published(tensors), root / folder / f"layer_{layer}.safetensors")
        for name, content in {"config.yaml": config, **more}.items():
            if content is not None:
                (root / folder / name).write_text(yaml.safe_dump(content))
        return root / folder

    return put


def as_published(t: Tensors) -> Tensors:
    """Names and orientation of the files."""
    turned = {"W_enc": t["W_enc"].T.contiguous()}
    if "skip" in t:
        turned["W_skip"] = t["skip"].T.contiguous()
    return {key: tensor for key, tensor in t.items() if key != "skip"} | turned


def transposed(t: Tensors) -> Callable[[Path], Path]:
    """One file, as older repositories have it."""

    def put(root: Path) -> Path:
        path = root / "layer_11.safetensors"
        save_file(as_published(t) | {"W_dec": t["W_dec"].T.contiguous()}, path)
        hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
        (root / "config.yaml").write_text(yaml.safe_dump(CONFIG | hooks | {"model_name": "meta-llama/Llama-3.2-1B"}))
        return path

    return put


def _pre(t: Tensors) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.nn.functional.linear(x, t["W_enc"].T.float(), t["b_enc"].float())


def _relu(t: Tensors) -> Callable[[Tensor], Tensor]:
    return lambda x: _pre(t)(x).relu()


def _jump(x: Tensor) -> Tensor:
    p = _pre(JUMP)(x)
    return p * (p > JUMP["activation_function.threshold"])


def _topk(t: Tensors, k: int) -> Callable[[Tensor], Tensor]:
    return lambda x: _pre(t)(x) * largest(_pre(t)(x), k)


def _decode(t: Tensors) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, x: f @ t["W_dec"].float() + t["b_dec"].float()


def _skip(f: Tensor, x: Tensor) -> Tensor:
    w_skip = SKIP["skip"].T
    return f @ SKIP["W_dec"] + SKIP["b_dec"] + x @ w_skip.T


OLD = weights(seed=55)
FEW = weights(seed=54)  # b_enc so low that fewer than k are above 0, and the rest are kept below 0
FEW["b_enc"] = FEW["b_enc"] - 4
GEMMA = {
    "feature_input_hook": "ln2.hook_normalized",
    "feature_output_hook": "hook_mlp_out",
    "model_name": "google/gemma-2-2b",
}

LOOKALIKES = [
    LookAlike("circuit_tracer relu", "circuit_tracer", "ReLU transcoder, bfloat16",
              write(RELU, CONFIG, **{"wandb-config.yaml": RUN}), _relu(RELU), _decode(RELU),
              site="mlp_in.4", site_out="mlp_out.4", model=QWEN),
    LookAlike("circuit_tracer many", "circuit_tracer", "ReLU transcoder, one of a folder",
              write(RELU, CONFIG | {"activation": "relu"}, layers=(0, 1, 10, 2)), _relu(RELU), _decode(RELU),
              site="mlp_in.2", site_out="mlp_out.2", model=QWEN, options={"site": "mlp_in.2"}),
    LookAlike("circuit_tracer no config", "circuit_tracer", "ReLU transcoder, no config.yaml",
              write(RELU, None, folder="qwen3-14b-transcoders-lowl0", **{"wanb-config.yaml": RUN}), _relu(RELU),
              _decode(RELU), site="mlp_in.4", site_out="mlp_out.4", model="Qwen/Qwen3-14B",
              options={"site": "mlp_in.4", "site_out": "mlp_out.4"}),
    LookAlike("circuit_tracer jumprelu", "circuit_tracer", "thresholded transcoder, some thresholds below 0",
              write(JUMP, CONFIG | GEMMA), _jump, _decode(JUMP), site="mlp_normed.4", site_out="mlp_out.4",
              model="google/gemma-2-2b"),
    LookAlike("circuit_tracer skip", "circuit_tracer", "ReLU transcoder with a skip, to another width",
              write(SKIP, CONFIG), _relu(SKIP), _skip, site="mlp_in.4", site_out="mlp_out.4", model=QWEN),
    LookAlike("circuit_tracer transposed", "circuit_tracer", "ReLU transcoder, W_dec transposed", transposed(OLD),
              _relu(OLD), _decode(OLD), site="resid_mid.11", site_out="mlp_out.11", model="meta-llama/Llama-3.2-1B"),
    LookAlike("circuit_tracer topk", "circuit_tracer", "TopK transcoder without a ReLU",
              write(FEW, CONFIG | {"activation": "topk", "k": TOP_K}), _topk(FEW, TOP_K), _decode(FEW),
              site="mlp_in.4", site_out="mlp_out.4", model=QWEN),
    LookAlike("circuit_tracer topk in the file", "circuit_tracer", "TopK transcoder, k beside the weights",
              write(FEW | {"k": torch.tensor(TOP_K)}, CONFIG), _topk(FEW, TOP_K), _decode(FEW),
              site="mlp_in.4", site_out="mlp_out.4", model=QWEN),
    LookAlike("circuit_tracer topk by hand", "circuit_tracer", "TopK transcoder, k given",
              write(FEW, CONFIG), _topk(FEW, 9), _decode(FEW),
              site="mlp_in.4", site_out="mlp_out.4", model=QWEN, options={"top_k": 9}),
]  # fmt: skip
