"""Where to read and write, in no framework's words."""

import re
from dataclasses import dataclass

from saeguard.errors import SiteNotFound

STREAMS = {
    "resid_pre": "the residual stream that enters a block",
    "resid_mid": "the residual stream between attention and the MLP",
    "resid_post": "the residual stream that leaves a block",
    "attn_out": "what attention adds to the residual stream, after any post-norm",
    "mlp_out": "what the MLP adds to the residual stream, after any post-norm",
    "mlp_in": "what the MLP reads, after its norm",
    "mlp_normed": "what the MLP's norm gives before its gain and bias",
    "mlp_post": "the MLP's hidden layer, before its output projection",
    "attn_z": "the heads' outputs side by side, before the output projection",
}

_TRANSFORMER_LENS = re.compile(
    r"blocks\.([0-9]{1,9})\.(?:hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)|(attn\.hook_z|mlp\.hook_in|mlp\.hook_post"
    r"|ln2\.hook_normalized))"
)
_HOOKS = {
    "attn.hook_z": "attn_z",
    "mlp.hook_in": "mlp_in",
    "mlp.hook_post": "mlp_post",
    "ln2.hook_normalized": "mlp_normed",
}
_HUGGING_FACE = re.compile(r"(?:model|transformer|gpt_neox)\.(?:layers|h)\.([0-9]{1,9})(?:\.(input|output))?")


@dataclass(frozen=True)
class Site:
    """A stream at a block; ``resid_post.12`` leaves block 12, which is ``hidden_states[13]`` in transformers.

    ``layer`` is the block's 0-based number and never negative. Raises `SiteNotFound` for an unknown stream or a
    negative layer; whether the model has that many blocks is checked when a plan is bound to it.
    """

    stream: str
    layer: int

    def __post_init__(self):
        if self.stream not in STREAMS:
            raise SiteNotFound(
                f"site {self.stream}.{self.layer}",
                f"{self.stream!r} is not a stream",
                f"The streams are {', '.join(STREAMS)}.",
            )
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise SiteNotFound(
                f"site {self.stream}.{self.layer}",
                "a layer is a block number from 0 upwards",
                "Negative layers are not accepted: a model with n blocks ends at layer n-1.",
            )

    def __str__(self) -> str:
        return f"{self.stream}.{self.layer}"

    @classmethod
    def parse(cls, text: "str | Site") -> "Site":
        """Read ``resid_post.12``, ``blocks.12.hook_resid_post`` or ``model.layers.12`` (a block's output)."""
        if isinstance(text, Site):
            return text
        if match := _TRANSFORMER_LENS.fullmatch(text):
            return cls(_HOOKS[match[3]] if match[3] else match[2], int(match[1]))
        if match := _HUGGING_FACE.fullmatch(text):
            return cls("resid_pre" if match[2] == "input" else "resid_post", int(match[1]))
        stream, dot, layer = text.rpartition(".")
        if not dot or not re.fullmatch(r"-?[0-9]{1,9}", layer):
            raise SiteNotFound(
                f"site {text!r}",
                "that is not a stream and a layer",
                "Write it as resid_post.12, blocks.12.hook_resid_post or model.layers.12.",
            )
        return cls(stream, int(layer))
