"""Where the streams are in each Hugging Face architecture: one row per model type.

A row gives the list of blocks and, inside a block, the module and side of each stream. With post-norms (Gemma 2 and
3, OLMo 2) what attention and the MLP add to the stream is what their post-norm returns, not what they return.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Side = Literal["input", "output"]
Where = tuple[str, Side]


@dataclass(frozen=True)
class Layout:
    """Paths of one architecture: ``blocks`` from the model, the others from a block ("" is the block itself).

    ``mlp_norm`` is the norm whose output the MLP reads, for the stream before its gain; ``gain`` is what that norm
    multiplies with: its weight, or one plus its weight. ``value_bias`` is the module with the bias of the values:
    its own, or the last third of a fused one (``fused``: "thirds", or "heads" where each head has its own thirds);
    ``attn_norm`` is the norm in front of attention, whose own bias reaches the values too.
    ``parallel`` names the config's flag under which attention and MLP read the same stream: there is no resid_mid.
    """

    blocks: str
    streams: Mapping[str, tuple[str, Side]] = field(default_factory=dict)
    mlp_norm: str | None = None
    gain: Literal["weight", "one_plus_weight"] = "weight"
    value_bias: str | None = None
    fused: Literal["thirds", "heads"] | None = None
    parallel: str | bool = False
    attn_norm: str | None = None

    def where(self, stream: str) -> Where | None:
        """Module and side of a stream inside a block, or None where the architecture has no such stream.

        ``resid_mid`` is where attention adds to the stream, and ``mlp_normed`` where the MLP reads.
        """
        at = {"resid_mid": "attn_out", "mlp_normed": "mlp_in"}.get(stream, stream)
        return {"resid_pre": ("", "input"), "resid_post": ("", "output"), **self.streams}.get(at)  # type: ignore[dict-item]


def _streams(
    attn_out: str, mlp_out: str, mlp_in: str, attn_z: str, mlp_post: str | None
) -> dict[str, tuple[str, Side]]:
    found: dict[str, tuple[str, Side]] = {
        "attn_out": (attn_out, "output"),
        "mlp_out": (mlp_out, "output"),
        "mlp_in": (mlp_in, "input"),
        "attn_z": (attn_z, "input"),
    }
    if mlp_post is not None:
        found["mlp_post"] = (mlp_post, "input")
    return found


def _llama(mlp_post: str | None = "mlp.down_proj", gain: Literal["weight", "one_plus_weight"] = "weight") -> Layout:
    streams = _streams("self_attn", "mlp", "mlp", "self_attn.o_proj", mlp_post)
    return Layout(
        "model.layers", streams, "post_attention_layernorm", gain, "self_attn.v_proj", attn_norm="input_layernorm"
    )


def _post_norm(blocks: str, mlp_norm: str | None, gain: Literal["weight", "one_plus_weight"] = "weight") -> Layout:
    streams = _streams(
        "post_attention_layernorm", "post_feedforward_layernorm", "mlp", "self_attn.o_proj", "mlp.down_proj"
    )
    return Layout(blocks, streams, mlp_norm, gain, "self_attn.v_proj")


LLAMA, MOE = _llama(), _llama(mlp_post=None)
GEMMA = _llama(gain="one_plus_weight")
GEMMA_POST = _post_norm("model.layers", "pre_feedforward_layernorm", "one_plus_weight")
OLMO2 = _post_norm("model.layers", None)
GPT2 = Layout(
    "transformer.h", _streams("attn", "mlp", "mlp", "attn.c_proj", "mlp.c_proj"), "ln_2",
    value_bias="attn.c_attn", fused="thirds", attn_norm="ln_1",
)  # fmt: skip
NEOX = Layout(
    "gpt_neox.layers", _streams("attention", "mlp", "mlp", "attention.dense", "mlp.dense_4h_to_h"),
    "post_attention_layernorm", value_bias="attention.query_key_value", fused="heads", parallel="use_parallel_residual",
    attn_norm="input_layernorm",
)  # fmt: skip
PHI = Layout(
    "model.layers", _streams("self_attn", "mlp", "mlp", "self_attn.dense", "mlp.fc2"), "input_layernorm",
    value_bias="self_attn.v_proj", parallel=True, attn_norm="input_layernorm",
)  # fmt: skip

LAYOUTS: dict[str, Layout] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MOE,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3_moe": MOE,
    "phi3": LLAMA,
    "gemma": GEMMA,
    "gemma2": GEMMA_POST,
    "gemma3_text": GEMMA_POST,
    "olmo2": OLMO2,
    "phi": PHI,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
}
"""By ``config.model_type``. Another architecture is one more row, or ``steer(..., layout=Layout(...))``."""
