"""The HookedTransformer engine: TransformerLens 3, which runs modules of its own, and SAELens's subclass of it.

    site               hook point                site               hook point
    resid_pre.n        blocks.n.hook_resid_pre   attn_z.n           blocks.n.attn.hook_z, heads side by side
    resid_mid.n        blocks.n.hook_resid_mid   mlp_in.n           what blocks.n.mlp is given
    resid_post.n       blocks.n.hook_resid_post  mlp_normed.n       blocks.n.ln2.hook_normalized
    attn_out.n         blocks.n.hook_attn_out    mlp_post.n         blocks.n.mlp.hook_post
    mlp_out.n          blocks.n.hook_mlp_out

Its methods run ``model.forward``, which skips the hooks of a model; inside a block that is a call like any other. Its
generate hands over embeddings, so the token ids of a pass are read where generate keeps them, and so is the mask.

Its weights may be processed, which changes some streams and not what the model computes. What was done can be told from
the weights, see `Hooked.processed`; whether an SAE fits them is settled in `saeguard.engines.corrections`.
"""

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from saeguard.axes import Stream
from saeguard.engines.base import Outcome, Pass, Place, Reader, Request, outside_graphs
from saeguard.engines.layouts import Layout
from saeguard.engines.spoken import Spoken
from saeguard.engines.traced import is_traced
from saeguard.engines.watched import Called
from saeguard.errors import (
    CompiledModel,
    MetaDevice,
    SiteNotFound,
    TokensUnknown,
    UnsupportedMode,
    UnsupportedModel,
    WrongModel,
)
from saeguard.loaders.transformer_lens import hub_name
from saeguard.sites import Site

_POINTS = {
    "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out", "mlp_in": "mlp", "mlp_normed": "ln2.hook_normalized",
    "mlp_post": "mlp.hook_post", "attn_z": "attn.hook_z",
}  # fmt: skip
_PROMPT, _WRITTEN = "input_tokens", "sampled_tokens_list"
"""Where generate keeps the token ids that it feeds as embeddings."""
_CENTERED = 0.05
"""Weights that write to the stream are centered when their mean over its width is this much smaller than that of
independent numbers of their size would be; rounding to bfloat16 leaves a tenth of that, no centering the whole."""
_ROWS = 1000
"""As many rows of a matrix tell what was done to it."""


@dataclass(frozen=True, eq=False)
class Heads(Place):
    """The heads' outputs, which lie on an axis of their own in the model and side by side in a stream."""

    def changed(self, output: Any, change: Callable[[Stream], Stream]) -> Any:
        return super().changed(output.flatten(2), change).view_as(output)


class Hooked:
    """One HookedTransformer."""

    name = "HookedTransformer"

    def __init__(self, model: nn.Module, layout: Layout | None = None):
        kind: Any = hooked_kind(model)
        self._generate = inspect.unwrap(kind.generate).__code__ if hasattr(kind, "generate") else None
        self.model: nn.Module = _accept(model, layout, self._generate)
        self._hooked: Any = model
        self._cfg: Any = model.cfg
        self._kind = kind
        self._utils: Any = sys.modules[kind.__module__].utils  # type: ignore[attr-defined]
        self._signature = inspect.signature(kind.forward)
        self._thread = threading.local()

    def resolve(self, site: Site) -> Place:
        n, path = self._cfg.n_layers, f"blocks.{site.layer}.{_POINTS[site.stream]}"
        if site.layer >= n:
            raise self._no(site, f"this model has layers 0-{n - 1}", f"Use layer {n - 1} for the last one.")
        block = self._hooked.blocks[site.layer]
        if site.stream == "resid_mid" and self._cfg.parallel_attn_mlp:
            raise self._no(
                site,
                "its attention and MLP read the same stream, so there is nothing between them",
                f"Use resid_pre.{site.layer} or resid_post.{site.layer}.",
            )
        if site.stream == "mlp_in" and self._is_folded():
            raise self._no(
                site,
                "the gain of its MLP's norm was folded into the MLP (fold_ln), so what the MLP reads is mlp_normed",
                "Load it with from_pretrained_no_processing.",
            )
        if site.stream == "mlp_normed" and self._is_post_norm(block):
            raise self._no(site, "its MLP has no norm in front of it", f"Use mlp_in.{site.layer}.")
        module = _at(block, _POINTS[site.stream])
        if site.stream == "mlp_in" and module is not None:
            return Place(site, module, path, "input", self._cfg.d_model, self._device(block))
        if not isinstance(module, HookPoint):
            found = "it has none" if module is None else f"a {type(module).__name__} stands there"
            raise self._no(
                site, f"its hook point would be {path}, and {found}",
                "Take attached SAEs off with model.reset_saes(), which edits do not need, or use another stream.",
            )  # fmt: skip
        if is_traced(module):
            raise CompiledModel(
                f"steering a {type(self.model).__name__} at {site}",
                "torch.compile holds a graph that calls its hook points",
                "Such a graph skips hooks that came later. Enter steer before the first call of anything compiled, or "
                "call torch._dynamo.reset() first.",
            )
        heads = self._cfg.n_heads * self._cfg.d_head
        width = {"attn_z": heads, "mlp_post": self._cfg.d_mlp}.get(site.stream, self._cfg.d_model)
        place = Heads if site.stream == "attn_z" else Place
        return place(site, module, path, "output", width, self._device(block))

    def processed(self) -> frozenset[str]:
        """How TransformerLens processed the weights, of what changes streams, in the words of its arguments."""
        attentions = [block.attn for block in self._hooked.blocks]
        moved_biases = not any(a.b_V.any() for a in attentions) and any(a.b_O.any() for a in attentions)
        done = {
            "fold_ln": self._is_folded(),
            "center_writing_weights": self.centers() and self._is_centered(),
            # without biases of values those of the output are 0 too, or else it cannot be told
            "fold_value_biases": moved_biases,
            "refactor_factored_attn_matrices": all(_is_orthonormal(a.W_O) for a in attentions),
        }
        return frozenset(name for name, is_done in done.items() if is_done)

    def value_bias(self, layer: int, *, with_norm: bool) -> Tensor | None:
        block: Any = self._hooked.blocks[layer]
        if self._is_folded() and self.centers() and not with_norm:
            raise WrongModel(
                f"taking the bias of the values alone off attn_z.{layer} in {type(self.model).__name__}",
                "fold_ln has put what they make of the bias of ln1 into it, and the two cannot be told apart",
                "Load the model with from_pretrained_no_processing.",
            )
        bias: Float[Tensor, "head d_head"] = block.attn.b_V.detach().float()
        shift = getattr(block.ln1, "b", None)
        if with_norm and shift is not None:
            bias = bias + torch.einsum("d,hde->he", shift.detach().float(), block.attn.W_V.detach().float())
        return bias.reshape(-1) if bias.any() else None

    def centers(self) -> bool:
        return self._cfg.normalization_type in ("LN", "LNPre")

    def model_names(self) -> tuple[str, ...]:
        name = hub_name(getattr(self._cfg, "model_name", None))
        return (name,) if name and name != "custom" else ()

    def model_shape(self) -> dict[str, Any]:
        cfg = self._cfg
        return {"hidden_size": cfg.d_model, "num_hidden_layers": cfg.n_layers, "vocab_size": cfg.d_vocab}

    def special_ids(self) -> frozenset[int]:
        if self._hooked.tokenizer is None:
            raise TokensUnknown(
                f"steering a {type(self.model).__name__} without a tokenizer",
                "which of its tokens are special is not known",
                "Pass special_ids=..., which may be empty, or tokenizer=... to steer.",
            )
        return frozenset(self._hooked.tokenizer.all_special_ids)

    def read_pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        given = self._signature.bind(self.model, *args, **kwargs)
        given.apply_defaults()
        asked = given.arguments
        cache = asked["past_kv_cache"]
        ids, mask = self._tokens(asked) if asked["start_at_layer"] is None else self._fed(asked)
        column = 0 if cache is None else int(cache[0].past_keys.shape[1])
        kept = self._thread.cache = None if cache is None else _stand_in(cache)
        rows, width = ids.shape
        seen = Pass(rows, width, column, kept, ids, mask, ids.device)
        request = getattr(self._thread, "request", lambda: None)()
        if request is not None:
            request.add(seen)
        return seen

    def read_cache(self, output: Any) -> Any:
        return getattr(self._thread, "cache", None)  # the one that the pass was given and has filled

    def read_request(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request:
        given = inspect.signature(self._kind.generate).bind(self.model, *args, **kwargs)
        given.apply_defaults()
        asked = given.arguments
        side = "left" if isinstance(asked["input"], list) and len(asked["input"]) > 1 else asked["padding_side"]
        ids = self._ids(asked["input"], prepend_bos=asked["prepend_bos"], padding_side=side)
        if isinstance(asked["input"], Tensor) and asked["input"].ndim != 2:
            raise TokensUnknown(
                "a generate call of a HookedTransformer",
                f"its prompt is {tuple(asked['input'].shape)} of {asked['input'].dtype}",
                "Pass text, or rows x tokens.",
            )
        eos = self._eos(asked["eos_token_id"]) if asked["stop_at_eos"] else ()
        request = Spoken.of(ids, eos)
        self._thread.request = weakref.ref(request)
        return request

    def read_outcome(self, output: Any, request: Request) -> Outcome | None:
        self._thread.request = lambda: None
        return request.outcome(output) if isinstance(request, Spoken) else None

    def entrances(self) -> Sequence[tuple[nn.Module, Reader]]:
        return ((self.model, self),)

    @contextmanager
    def through_calls(self) -> Iterator[None]:
        """For the block, whoever runs ``model.forward`` has the model called, with its hooks."""
        called = Called(self.model)
        handle = self.model.register_forward_pre_hook(outside_graphs(called.announced()))
        called.place()
        try:
            yield
        finally:
            called.remove()
            handle.remove()

    def is_generating(self) -> bool:
        stream = getattr(self._kind, "generate_stream", None)
        codes = (self._generate, inspect.unwrap(stream).__code__ if stream is not None else None)
        return self._frame_of(*codes) is not None

    def _tokens(self, asked: Mapping[str, Any]) -> tuple[Int[Tensor, "row pos"], Tensor | None]:
        """The token ids of a pass and its mask, which a HookedTransformer makes for text and for left padding."""
        said = {"prepend_bos": asked["prepend_bos"], "padding_side": asked["padding_side"]}
        ids, mask, cache = self._ids(asked["input"], **said), asked["attention_mask"], asked["past_kv_cache"]
        tokenizer = self._hooked.tokenizer
        if mask is None and tokenizer is not None:
            with self._utils.LocallyOverridenDefaults(self._hooked, **said):
                is_padded = tokenizer.padding_side == "left" or isinstance(asked["input"], list)
                if is_padded or cache is not None:
                    mask = self._utils.get_attention_mask(tokenizer, ids, self._cfg.default_prepend_bos)
        if mask is not None and cache is not None:
            mask = torch.cat([cache.previous_attention_mask, mask.to(cache.previous_attention_mask.device)], dim=-1)
        return ids, mask

    def _ids(self, given: Any, **said: Any) -> Int[Tensor, "row pos"]:
        """Token ids of an input, on the device of the model."""
        if isinstance(given, str | list):
            given = self._hooked.to_tokens(given, **said)
        if not isinstance(given, Tensor) or given.is_floating_point() or given.ndim not in (1, 2):
            what = f"{tuple(given.shape)} of {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
            raise TokensUnknown("a call of a HookedTransformer", f"its input is {what}", "Pass text, or rows x tokens.")
        ids = given[None] if given.ndim == 1 else given
        return ids.to(next(self.model.parameters()).device)

    def _fed(self, asked: Mapping[str, Any]) -> tuple[Int[Tensor, "row pos"], Tensor | None]:
        """The token ids whose embeddings generate hands over, and their mask."""
        frame = self._frame_of(self._generate)
        if frame is None or asked["start_at_layer"] != 0:
            raise UnsupportedMode(
                "a pass with start_at_layer",
                "a stream is put in front of a block, of whose tokens nothing is known",
                "Run the whole model on tokens inside the block.",
            )
        ids = torch.cat([frame.f_locals[_PROMPT], *frame.f_locals[_WRITTEN]], dim=1)
        return ids[:, -asked["input"].shape[1] :], asked["attention_mask"]

    def _frame_of(self, *codes: Any) -> FrameType | None:
        """The frame of one of the functions, where it runs for this model and has led to here."""
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code in codes and frame.f_locals.get("self") is self.model:
                return frame
            frame = frame.f_back
        return None

    def _eos(self, given: Any) -> tuple[int, ...]:
        tokenizer = self._hooked.tokenizer
        eos = given if given is not None or tokenizer is None else tokenizer.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    def _is_folded(self) -> bool:
        return str(self._cfg.normalization_type).endswith("Pre")

    def _is_centered(self) -> bool:
        """Whether what is written to the stream has no mean over its width."""
        blocks = list(self._hooked.blocks)
        writing = [self._hooked.embed.W_E, *(block.attn.W_O for block in blocks)]
        return all(_mean_share(weight) < _CENTERED for weight in writing)

    def _is_post_norm(self, block: nn.Module) -> bool:
        kinds = getattr(sys.modules[type(block).__module__], "POST_NORM_ARCHITECTURES", ())
        return self._cfg.original_architecture in kinds

    def _device(self, block: nn.Module) -> torch.device:
        device = next(block.parameters()).device
        if device.type == "meta":
            raise MetaDevice(
                f"steering {type(self.model).__name__}",
                "its parameters are on the meta device, so it has no weights",
                "Load its weights first.",
            )
        return device

    def _no(self, site: Site, found: str, proceed: str) -> SiteNotFound:
        return SiteNotFound(f"site {site} in {type(self.model).__name__}", found, proceed)


def hooked_kind(model: nn.Module) -> type | None:
    """The class HookedTransformer of TransformerLens, where ``model`` is one."""
    kinds = [kind for kind in type(model).__mro__ if kind.__name__ == "HookedTransformer"]
    return next((kind for kind in kinds if kind.__module__.partition(".")[0] == "transformer_lens"), None)


def _accept(model: nn.Module, layout: Layout | None, generate: Any) -> nn.Module:
    kind = type(model).__name__
    names = () if generate is None else generate.co_varnames
    if _PROMPT not in names or _WRITTEN not in names or not isinstance(getattr(model, "blocks", None), nn.ModuleList):
        raise UnsupportedModel(
            f"steering {kind}",
            "it is not the HookedTransformer of TransformerLens 3.9, the one that is known",
            "Use that version, or TransformerBridge.boot_transformers(name).",
        )
    if layout is not None:
        raise UnsupportedModel(
            f"steering {kind} with a layout", "its streams are at its hook points", "Leave out layout=...."
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise CompiledModel(
            f"steering {kind}", "model.compile() was called before", "Enter steer first, then compile inside the block."
        )
    return model


def _at(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


def _mean_share(weight: Tensor) -> float:
    """Size of the mean over the last axis, in that of a mean of as many independent numbers of the weights' size."""
    rows = weight.detach().flatten(0, -2)[:_ROWS].float()
    alone = rows.square().mean().sqrt() / rows.shape[-1] ** 0.5
    return float(rows.mean(-1).square().mean().sqrt() / alone.clamp(min=1e-30))


def _is_orthonormal(out: Float[Tensor, "head d_head d_model"]) -> bool:
    """Whether the first head writes along orthonormal directions, as it does once its matrices are refactored."""
    first = out[0].detach().float()
    return torch.allclose(first @ first.T, torch.eye(len(first), device=first.device), atol=_CENTERED)


class _StandIn:
    """Stands for a cache of TransformerLens, which cannot be a key of a dict."""


_STAND_INS: dict[int, tuple[weakref.ref[Any], _StandIn]] = {}


def _stand_in(cache: Any) -> _StandIn:
    """The same object for the same cache, as long as that lives."""
    number = id(cache)
    if number not in _STAND_INS:
        _STAND_INS[number] = (weakref.ref(cache, lambda _: _STAND_INS.pop(number, None)), _StandIn())
    return _STAND_INS[number][1]
