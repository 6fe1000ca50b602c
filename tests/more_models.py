"""Tiny models of every architecture in the table, with random gains and biases, and where their modules are.

A fresh norm multiplies with 1 and adds 0, and a fresh bias is 0: then nothing shows whether they are taken off rightly.
`Family` is the tests' own table of modules: nothing of it comes from saeguard's.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests import tiny
from tests.tiny import LAYERS, SPECIAL, VOCAB, D

HIDDEN = 48
LAYER = 1
"""The block that tests look into."""
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, **SPECIAL,
}  # fmt: skip
_CONFIGS = {
    "mistral": lambda: transformers.MistralConfig(**_LLAMA),
    "mixtral": lambda: transformers.MixtralConfig(**_LLAMA, num_local_experts=3, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_LLAMA, head_dim=8, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "phi3": lambda: transformers.Phi3Config(**_LLAMA),
    "gemma": lambda: transformers.GemmaConfig(**_LLAMA, head_dim=8),
    "olmo2": lambda: transformers.Olmo2Config(**_LLAMA),
    "phi": lambda: transformers.PhiConfig(**_LLAMA),
    "neox_sequential": lambda: transformers.GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=256, use_parallel_residual=False, **SPECIAL,
    ),
    "llama_with_biases": lambda: transformers.LlamaConfig(**_LLAMA, attention_bias=True),
}  # fmt: skip
ALL = (*tiny.ARCHITECTURES, *_CONFIGS)
ONE_PLUS = ("gemma", "gemma2", "gemma3")
"""Families whose norms multiply with one plus their weight."""


def model_of(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of its own, in eval mode, with random gains and biases."""
    if name in _CONFIGS:
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(_CONFIGS[name](), dtype=dtype).eval()
    else:
        model = tiny.fresh_model(name, seed=seed, dtype=dtype)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
            else:
                is_gain = path.endswith("weight") and name not in ONE_PLUS
                parameter.normal_(1.0 if is_gain else 0.0, 0.2)
    return model.requires_grad_(False)


@cache
def shared(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model that several tests use; a test must leave it as it was."""
    return model_of(name, dtype=dtype)


@dataclass(frozen=True)
class Family:
    """Where the pieces of a block are; None for what a family does not have."""

    attn: str = "self_attn"
    post_attn: str | None = None
    norm: str | None = "post_attention_layernorm"
    post_mlp: str | None = None
    z: str = "self_attn.o_proj"
    hidden: str | None = "mlp.down_proj"
    parallel: bool = False


LLAMA, MOE = Family(), Family(hidden=None)
GEMMA = Family(
    post_attn="post_attention_layernorm", norm="pre_feedforward_layernorm", post_mlp="post_feedforward_layernorm"
)
NEOX = Family(attn="attention", z="attention.dense", hidden="mlp.dense_4h_to_h")
FAMILIES = {
    "mixtral": MOE,
    "qwen3_moe": MOE,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "olmo2": Family(post_attn="post_attention_layernorm", norm=None, post_mlp="post_feedforward_layernorm"),
    "gpt2": Family(attn="attn", norm="ln_2", z="attn.c_proj", hidden="mlp.c_proj"),
    "neox": Family(**{**vars(NEOX), "parallel": True}),
    "neox_sequential": NEOX,
    "phi": Family(norm="input_layernorm", z="self_attn.dense", hidden="mlp.fc2", parallel=True),
}


def family(name: str) -> Family:
    return FAMILIES.get(name, LLAMA)


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def block_of(model: nn.Module) -> nn.Module:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == tiny.LAYERS]
    return lists[0][LAYER]


def gain_and_bias(norm: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    gain = norm.weight.float() + (1.0 if name in ONE_PLUS else 0.0)
    bias = getattr(norm, "bias", None)
    return gain, torch.zeros_like(gain) if bias is None else bias.float()


def normalised(x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a norm gives before its gain, and the mean square that it then has: just below 1, because of eps."""
    x = x.float()
    x = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    eps = next(getattr(norm, key) for key in ("eps", "variance_epsilon") if hasattr(norm, key))
    power = x.square().mean(-1, keepdim=True)
    return x / (power + eps).sqrt(), (power / (power + eps))[..., 0]
