"""Where the streams are in each Hugging Face architecture: one row per model type.

A row gives the list of blocks and, inside a block, the module and side of each stream. With post-norms (Gemma 2 and
3, OLMo 2) what attention and the MLP add to the stream is what their post-norm returns, not what they return.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Layout:
    """Paths of one architecture: ``blocks`` from the model, the others from a block ("" is the block itself)."""

    blocks: str
    streams: Mapping[str, tuple[str, Side]] = field(default_factory=dict)

    def where(self, stream: str) -> tuple[str, Side] | None:
        """Module and side of a stream inside a block, or None where the architecture has no such stream."""
        return {"resid_pre": ("", "input"), "resid_post": ("", "output"), **self.streams}.get(stream)  # type: ignore[dict-item]


def _streams(attn_out: str, mlp_out: str, mlp_in: str, attn_z: str) -> dict[str, tuple[str, Side]]:
    return {
        "attn_out": (attn_out, "output"),
        "mlp_out": (mlp_out, "output"),
        "mlp_in": (mlp_in, "input"),
        "attn_z": (attn_z, "input"),
    }


LLAMA = Layout("model.layers", _streams("self_attn", "mlp", "mlp", "self_attn.o_proj"))
POST_NORM = Layout(
    "model.layers", _streams("post_attention_layernorm", "post_feedforward_layernorm", "mlp", "self_attn.o_proj")
)
GPT2 = Layout("transformer.h", _streams("attn", "mlp", "mlp", "attn.c_proj"))
NEOX = Layout("gpt_neox.layers", _streams("attention", "mlp", "mlp", "attention.dense"))
PHI = Layout("model.layers", _streams("self_attn", "mlp", "mlp", "self_attn.dense"))

LAYOUTS: dict[str, Layout] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": POST_NORM,
    "gemma3_text": POST_NORM,
    "olmo2": POST_NORM,
    "phi": PHI,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
}
"""By ``config.model_type``. Another architecture is one more row, or ``steer(..., layout=Layout(...))``."""
