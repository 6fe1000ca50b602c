"""HookedTransformers with the weights of the tiny models, made from configs and converted by TransformerLens itself."""

import copy
from functools import cache
from typing import Any

from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions

from tests.modes import word_tokenizer
from tests.more_models import HIDDEN, shared
from tests.tiny import LAYERS, VOCAB, D

_COMMON: dict[str, Any] = {
    "n_layers": LAYERS, "d_model": D, "n_heads": 4, "d_head": 8, "n_ctx": 256, "d_vocab": VOCAB, "device": "cpu",
}  # fmt: skip
_ROTARY: dict[str, Any] = {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": False}
_LLAMA: dict[str, Any] = {
    **_COMMON, **_ROTARY, "d_mlp": HIDDEN, "n_key_value_heads": 2, "act_fn": "silu", "gated_mlp": True,
    "normalization_type": "RMS", "final_rms": True, "rotary_dim": 8, "eps": 1e-6,
}  # fmt: skip
_NEOX: dict[str, Any] = {
    **_COMMON, **_ROTARY, "d_mlp": HIDDEN, "act_fn": "gelu", "normalization_type": "LN", "rotary_dim": 2,
    "original_architecture": "GPTNeoXForCausalLM",
}  # fmt: skip
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "original_architecture": "LlamaForCausalLM"},
    "qwen2": {**_LLAMA, "original_architecture": "Qwen2ForCausalLM"},
    "gpt2": {
        **_COMMON, "d_mlp": 4 * D, "act_fn": "gelu_new", "normalization_type": "LN",
        "original_architecture": "GPT2LMHeadModel",
    },
    "neox": {**_NEOX, "parallel_attn_mlp": True},
    "neox_sequential": _NEOX,
    "gemma2": {
        **_LLAMA, "act_fn": "gelu_pytorch_tanh", "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 50.0, "output_logits_soft_cap": 30.0, "attn_scale": 16.0,
        "original_architecture": "Gemma2ForCausalLM",
    },
}  # fmt: skip
NAMES = tuple(_SETTINGS)
_CONVERTED: dict[str, Any] = {
    "llama": weight_conversions.convert_llama_weights, "qwen2": weight_conversions.convert_qwen2_weights,
    "gpt2": weight_conversions.convert_gpt2_weights, "neox": weight_conversions.convert_neox_weights,
    "neox_sequential": weight_conversions.convert_neox_weights, "gemma2": weight_conversions.convert_gemma_weights,
}  # fmt: skip
PLAIN = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)


def make(name: str, *, padding_side: str = "right", kind: Any = HookedSAETransformer, **processing: bool) -> Any:
    """A model of its own with the weights of `shared`, processed as ``processing`` says and in no other way."""
    tokenizer = copy.deepcopy(word_tokenizer())
    tokenizer.init_kwargs.update(name_or_path="", add_bos_token=True)
    cfg = HookedTransformerConfig(**_SETTINGS[name])
    model = kind(cfg, tokenizer, default_padding_side=padding_side)
    state = {key: tensor.clone() for key, tensor in _CONVERTED[name](shared(name), cfg).items()}
    model.load_and_process_state_dict(state, **PLAIN | processing)
    return model.eval().requires_grad_(False)


@cache
def hooked(name: str, padding_side: str = "right") -> Any:
    """A model that several tests use; a test must leave it as it was."""
    return make(name, padding_side=padding_side)
