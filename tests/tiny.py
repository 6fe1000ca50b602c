"""Random tiny models and SAEs: real classes, random weights, seconds to build, nothing to download."""

from functools import cache

import torch
import transformers
from transformers import PreTrainedModel

from saeguard import SAE, Site

VOCAB, D, LAYERS = 61, 32, 3
BOS, EOS, PAD = 1, 2, 0
SPECIAL = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, **SPECIAL,
}  # fmt: skip
_GEMMA = _LLAMA | {"head_dim": 8, "sliding_window": 128}
_CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_LLAMA),
    "qwen2": lambda: transformers.Qwen2Config(**_LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**_LLAMA, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**_GEMMA),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_GEMMA),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=D, n_layer=LAYERS, n_head=4, n_positions=256, **SPECIAL
    ),
    "neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=256, **SPECIAL,
    ),
}  # fmt: skip
ARCHITECTURES = tuple(_CONFIGS)


def fresh_model(name: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of its own, in eval mode."""
    torch.manual_seed(seed)
    config = _CONFIGS[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # the default 0.02 gives streams too small to tell tokens apart
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    return model.eval()


@cache
def tiny_model(name: str = "llama") -> PreTrainedModel:
    """A shared model; a test must leave it as it was."""
    return fresh_model(name)


def tiny_sae(
    *, d_sae: int = 48, seed: int = 0, activation: str = "jumprelu", site: Site | None = None, d_in: int = D,
    name: str = "tiny",
) -> SAE:  # fmt: skip
    """A random SAE whose latents fire on about a third of tokens; weights in eighths, so that sums are exact."""
    generator = torch.Generator().manual_seed(seed)

    def eighths(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 4).round() / 8

    return SAE(
        name=name,
        W_enc=eighths(d_in, d_sae),
        b_enc=eighths(d_sae),
        W_dec=eighths(d_sae, d_in),
        b_dec=eighths(d_in),
        activation=activation,  # type: ignore[arg-type]
        threshold=torch.rand(d_sae, generator=generator) + 0.5 if activation == "jumprelu" else None,
        top_k=6 if activation == "topk" else None,
        maximum=torch.rand(d_sae, generator=generator) * 4 + 4,
        site=site or Site("resid_post", 1),
    )


def prompt(rows: int = 1, length: int = 7, *, seed: int = 0) -> torch.Tensor:
    """Token ids without special ones, except a BOS in front."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    ids[:, 0] = BOS
    return ids
