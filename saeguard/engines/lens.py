"""The TransformerLens engine: a `TransformerBridge`, which is a transformers model with hook points put into it.

A pass of a bridge ends in a pass of the model that it wraps, whose token ids, mask and cache say what its tokens are:
that model is read as the Hugging Face engine reads it. What is different is where the streams are and who generates.

    site               hook point             site               hook point
    resid_pre.n        blocks.n.hook_in       attn_z.n           blocks.n.attn.hook_z
    resid_mid.n        where attention adds   mlp_in.n           blocks.n.mlp.hook_in
    resid_post.n       blocks.n.hook_out      mlp_normed.n       the same, without gain and bias
    attn_out.n         .hook_attn_out         mlp_post.n         blocks.n.mlp.hook_post
    mlp_out.n          .hook_mlp_out

``ln2.hook_in``, the bridge's hook_resid_mid, moves what the MLP reads and leaves the stream as it is, so that an edit
there would be half of one; ``ln2.hook_normalized`` is not what the MLP reads either in models that keep their norms.
"""

import inspect
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from saeguard.engines.around import Around
from saeguard.engines.base import Outcome, Pass, Place, Reader, Request
from saeguard.engines.layouts import Layout
from saeguard.engines.spoken import Spoken
from saeguard.engines.traced import is_traced
from saeguard.errors import (
    CompiledModel,
    SiteNotFound,
    TokensUnknown,
    UnsupportedMode,
    UnsupportedModel,
)
from saeguard.sites import Site

_POINTS = {
    "resid_pre": "hook_in", "resid_mid": "hook_attn_out", "resid_post": "hook_out", "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out", "mlp_in": "mlp.hook_in", "mlp_normed": "mlp.hook_in", "mlp_post": "mlp.hook_post",
    "attn_z": "attn.hook_z",
}  # fmt: skip
_GENERATE: Any = TransformerBridge.generate
_SIGNATURE = inspect.signature(_GENERATE)
_IS_OLD = version("transformer-lens").startswith("3.")
_LOOP = inspect.unwrap(TransformerBridge._generate_tokens).__code__  # the only way to all of its generate methods


class Lens(Around):
    """One bridge; ``layout`` overrides the table of the model that it wraps."""

    name = "TransformerLens"

    def __init__(self, bridge: nn.Module, layout: Layout | None = None):
        self.bridge: Any = _accept(bridge)
        super().__init__(self.bridge.original_model, layout)
        self._thread = threading.local()

    def resolve(self, site: Site) -> Place:
        place = self._wrapped.resolve(site)
        path = f"blocks.{site.layer}.{_POINTS[site.stream]}"
        point = self.bridge.get_hook_point(path)
        if not isinstance(point, HookPoint):
            raise SiteNotFound(
                f"site {site} in a bridge to {type(self.model).__name__}",
                f"it has no hook point {path}",
                f"Steer the model itself: steer(bridge.original_model, ...) finds {site} at {place.path}.",
            )
        if is_traced(point):
            raise CompiledModel(
                f"steering a bridge to {type(self.model).__name__} at {site}",
                "torch.compile holds a graph that calls its hook points",
                "Such a graph skips hooks that came later. Enter steer before the first call of anything compiled, or "
                "call torch._dynamo.reset() first.",
            )
        return replace(place, module=point, path=path, side="output")

    def entrances(self) -> Sequence[tuple[nn.Module, Reader]]:
        return (self.bridge, self), (self.model, self._wrapped)  # hf_generate calls that of the model

    def special_ids(self) -> frozenset[int]:
        return super().special_ids() | frozenset(getattr(self.bridge.tokenizer, "all_special_ids", ()))

    def read_pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        if any(getattr(block, "_start_at_layer_idx", None) is not None for block in self.bridge.blocks):
            raise UnsupportedMode(
                "a pass with start_at_layer",
                "a stream is put in front of a block, and what was edited before it is thrown away",
                "Run the whole model inside the block.",
            )
        if self.bridge._weights_processed:
            raise UnsupportedMode(
                f"a pass of a bridge to {type(self.model).__name__}",
                "its weights were processed while a block was open on it, so its streams are no longer the model's",
                "Leave out enable_compatibility_mode, or pass no_processing=True.",
            )
        seen = self._wrapped.read_pass(args, kwargs)
        request = getattr(self._thread, "request", lambda: None)()
        if request is not None:
            request.add(seen)
        return seen

    def stop_errors(self) -> tuple[type[Exception], ...]:
        """What ends a pass ahead of its end, and is caught by the bridge."""
        return (StopAtLayerException,)

    def read_request(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request:
        given = _SIGNATURE.bind(self.bridge, *args, **kwargs)
        given.apply_defaults()
        asked = given.arguments
        others = [*asked["multimodal_kwargs"], *(["pixel_values"] if asked["pixel_values"] is not None else [])]
        if others:
            raise UnsupportedMode(
                f"generate of a bridge with {', '.join(others)}",
                "what its passes hold then is unknown",
                "Generate from text or token ids, or call bridge.hf_generate, which transformers reads.",
            )
        if _IS_OLD and asked["return_cache"]:
            raise UnsupportedMode(
                "generate of a bridge of TransformerLens 3 with return_cache",
                "its replay for the activations leaves out the mask of the prompt's padding",
                "Generate without, and call run_with_cache on what was generated.",
            )
        ids = self._ids(asked["input"], asked["prepend_bos"])
        if len(ids) > 1 and (asked["stop_strings"] is not None or asked["stopping_criteria"] is not None):
            raise UnsupportedMode(
                f"generate of a bridge for {len(ids)} rows with stop strings or stopping criteria",
                "which tokens of a row that has ended were written by the model cannot be told afterwards",
                "Generate one row at a time, or call bridge.original_model.generate.",
            )
        eos = self._eos(asked["eos_token_id"]) if asked["stop_at_eos"] else ()
        request = Spoken.of(ids, eos)
        self._thread.request = weakref.ref(request)
        return request

    def read_outcome(self, output: Any, request: Request) -> Outcome | None:
        self._thread.request = lambda: None
        return request.outcome(output) if isinstance(request, Spoken) else None

    def is_generating(self) -> bool:
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _LOOP and frame.f_locals.get("self") is self.bridge:
                return True
            frame = frame.f_back
        return self._wrapped.is_generating()

    def _ids(self, prompt: Any, prepend_bos: bool | None) -> Int[Tensor, "row pos"]:
        """The token ids that generate makes of its prompt: a list of several texts is padded on the left."""
        if isinstance(prompt, str | list):
            side = "left" if isinstance(prompt, list) and len(prompt) > 1 else None
            return self.bridge.to_tokens(prompt, prepend_bos=prepend_bos, padding_side=side, truncate=False)
        if not isinstance(prompt, Tensor) or prompt.ndim != 2 or prompt.is_floating_point():
            what = f"{tuple(prompt.shape)} of {prompt.dtype}" if isinstance(prompt, Tensor) else type(prompt).__name__
            raise TokensUnknown("a generate call of a bridge", f"its prompt is {what}", "Pass text, or rows x tokens.")
        return prompt

    def _eos(self, given: Any) -> tuple[int, ...]:
        """The tokens at which a bridge ends a row: those asked for, else its config's, else the tokenizer's."""
        for eos in (given, getattr(self.bridge.cfg, "eos_token_id", None), self.bridge.tokenizer.eos_token_id):
            if eos is not None:
                return (eos,) if isinstance(eos, int) else tuple(eos)
        return ()


def _accept(bridge: nn.Module) -> nn.Module:
    kind = type(bridge).__name__
    if not isinstance(bridge, TransformerBridge) or not hasattr(bridge, "_weights_processed"):
        raise UnsupportedModel(
            f"steering {kind}",
            "of what TransformerLens has, only the TransformerBridge of versions 3.9 and 4.3 or later and the "
            "HookedTransformer of version 3.9 are known",
            "Use TransformerBridge.boot_transformers(name), or steer the transformers model.",
        )
    if bridge._weights_processed:
        raise UnsupportedModel(
            f"steering {kind} to {type(bridge.original_model).__name__}",
            "its weights were processed (folded norms, centered or folded biases), so its streams are not the model's",
            "Leave out enable_compatibility_mode, or pass no_processing=True; SAEs that were trained on processed "
            "weights are corrected for the plain ones.",
        )
    return bridge
