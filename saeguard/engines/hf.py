"""The Hugging Face engine: transformers models as they come out of ``from_pretrained``."""

import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache

from saeguard.engines.base import Outcome, Pass, Place, Reader, Request
from saeguard.engines.layouts import LAYOUTS, Layout, Side
from saeguard.engines.placement import check_parallel, check_whole, device_of, weight_of
from saeguard.engines.requests import read_outcome, read_request
from saeguard.engines.sitemaps import example_for
from saeguard.engines.traced import is_traced
from saeguard.errors import CompiledModel, SiteNotFound, TokensUnknown, UnsupportedMode, UnsupportedModel
from saeguard.sites import STREAMS, Site


class HuggingFace:
    """One transformers model; ``layout`` overrides the table for architectures that are not in it."""

    name = "transformers"

    def __init__(self, model: nn.Module, layout: Layout | None = None):
        self.model = _accept(model, layout)
        self._config: Any = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
        self._layout = layout or LAYOUTS[self._config.model_type]

    def resolve(self, site: Site) -> Place:
        blocks_path, blocks = self._blocks(site)
        if site.layer >= len(blocks):
            raise SiteNotFound(
                f"site {site} in {type(self.model).__name__}",
                f"this model has layers 0-{len(blocks) - 1}",
                f"Use layer {len(blocks) - 1} for the last one.",
            )
        block, where = blocks[site.layer], self._layout.where(site.stream)
        module = None if where is None else _submodule(block, where[0])
        if where is None or module is None:
            known = [stream for stream in STREAMS if self._layout.where(stream) is not None]
            raise SiteNotFound(
                f"site {site} in {type(self.model).__name__}",
                "this architecture's table has no such stream",
                f"It has {', '.join(known)}; pass layout=Layout(...) to name another module.",
            )
        self._check_untraced(site, module)
        path = f"{blocks_path}.{site.layer}" + (f".{where[0]}" if where[0] else "")
        check_whole(self.model, site, path, where[1])
        width = self._width(site, block, module, where[1])
        place = Place(site, module, path, where[1], width, device_of(self.model, f"{blocks_path}.{site.layer}"))
        if site.stream == "resid_mid":
            return self._between(place)
        return self._before_gain(place, f"{blocks_path}.{site.layer}") if site.stream == "mlp_normed" else place

    def value_bias(self, layer: int, *, with_norm: bool) -> Tensor | None:
        site = Site("attn_z", layer)
        width, its = self.resolve(site).width, self._layout
        blocks_path, blocks = self._blocks(site)
        here, block = f"{blocks_path}.{layer}", blocks[layer]
        values = _submodule(block, its.value_bias) if its.value_bias else None
        norm = _submodule(block, its.attn_norm) if its.attn_norm and with_norm else None
        if with_norm and values is not None and norm is None and self.centers():
            raise SiteNotFound(
                f"what {site} in {type(self.model).__name__} holds whatever the tokens are",
                "the norm in front of attention has a bias, and its layout does not name that norm",
                "Pass layout=Layout(..., attn_norm='path in the block').",
            )
        _check_unadapted(f"what {site} in {type(self.model).__name__} holds whatever the tokens are", values, norm)
        shift = None if norm is None else weight_of(self.model, f"{here}.{its.attn_norm}.bias")
        bias = None if values is None else _given_nothing(self.model, f"{here}.{its.value_bias}", shift)
        if bias is None:
            return None
        if its.fused == "thirds":
            return bias[-width:]
        if its.fused is None and len(bias) == width:
            return bias
        heads = getattr(self._config, "num_attention_heads", None)
        if heads is None:
            raise UnsupportedModel(
                f"taking the bias of the values off {site} in {type(self.model).__name__}",
                "it has no config that says how many heads share the bias",
                "Put it into the SAE with sae.shifted(bias).",
            )
        if its.fused == "heads":
            return bias.view(heads, 3, -1)[:, 2].reshape(-1)
        per_head = bias.view(getattr(self._config, "num_key_value_heads", None) or heads, -1)
        return per_head.repeat_interleave(heads // per_head.shape[0], dim=0).reshape(-1)

    def centers(self) -> bool:
        """Whether the blocks' norms are LayerNorms; those of a vision tower beside them do not count."""
        return any(isinstance(module, nn.LayerNorm) for module in self._blocks(Site("resid_pre", 0))[1].modules())

    def model_names(self) -> tuple[str, ...]:
        name = getattr(self.model, "name_or_path", "") or getattr(self._config, "_name_or_path", "")
        if not name or not Path(name).is_dir():
            return (name,) if name else ()
        try:  # a folder's own name says nothing, unless `saeguard.models` wrote down what is in it
            return (str(json.loads((Path(name) / "saeguard-model.json").read_text())["name"]),)
        except (OSError, ValueError, KeyError):
            return ()

    def model_shape(self) -> dict[str, Any]:
        names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
        return {name: getattr(self._config, name) for name in names if hasattr(self._config, name)}

    def special_ids(self) -> frozenset[int]:
        found: set[int] = set()
        for config in (self._config, getattr(self.model, "generation_config", None)):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                value = getattr(config, name, None)
                found |= set(value) if isinstance(value, list | tuple) else {value} if value is not None else set()
        return frozenset(found)

    def read_pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        if len(args) > 1:
            raise UnsupportedMode(
                "a forward pass with more than one positional argument",
                "masks and caches cannot be told apart by position",
                "Pass attention_mask, past_key_values and the rest by name.",
            )
        for packed in ("cu_seq_lens_q", "block_table", "packed_sequence_mask"):
            if kwargs.get(packed) is not None:
                raise UnsupportedMode(
                    f"a forward pass with {packed}", "it packs several sequences into one row", "Use one row each."
                )
        ids = args[0] if args else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        shown = ids if ids is not None else embeds
        if shown is None:
            raise TokensUnknown("a forward pass", "it has neither input_ids nor inputs_embeds", "Pass one of them.")
        cache = kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, Cache):
            raise UnsupportedMode(
                "a forward pass with a cache",
                f"the cache is a {type(cache).__name__}, whose length cannot be read",
                "Use a transformers Cache, such as DynamicCache.",
            )
        column = int(cache.get_seq_length()) if cache is not None else 0
        rows, width = shown.shape[:2]
        mask = _mask(kwargs.get("attention_mask"))
        if mask is None:
            _check_unpacked(kwargs.get("position_ids"), column)
        return Pass(rows, width, column, cache, ids, mask, shown.device)

    def read_cache(self, output: Any) -> Any:
        return getattr(output, "past_key_values", None)

    def read_request(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request:
        return read_request(self.model, args, kwargs)

    def read_outcome(self, output: Any, request: Request) -> Outcome | None:
        return read_outcome(output, request)

    def entrances(self) -> Sequence[tuple[nn.Module, Reader]]:
        return ((self.model, self),)

    def is_generating(self) -> bool:
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _GENERATE and frame.f_locals.get("self") is self.model:
                return True
            frame = frame.f_back
        return False

    def _blocks(self, site: Site) -> tuple[str, nn.ModuleList]:
        path = self._layout.blocks
        blocks = _submodule(self.model, path)
        if blocks is None:  # the model without its head: LlamaModel rather than LlamaForCausalLM
            path = path.partition(".")[2]
            blocks = _submodule(self.model, path)
        if not isinstance(blocks, nn.ModuleList):
            raise SiteNotFound(
                f"site {site} in {type(self.model).__name__}",
                f"there is no list of blocks at {self._layout.blocks}",
                "Pass layout=Layout(blocks='path.to.blocks', streams={...}).",
            )
        return path, blocks

    def _between(self, place: Place) -> Place:
        """The stream between attention and the MLP: what attention adds, and what enters the block."""
        flag = self._layout.parallel
        if flag is True or isinstance(flag, str) and getattr(self._config, flag, False):
            raise SiteNotFound(
                f"site {place.site} in {type(self.model).__name__}",
                "its attention and MLP read the same stream, so there is nothing between them",
                f"Use resid_pre.{place.site.layer} or resid_post.{place.site.layer}.",
            )
        return replace(place, base=Site("resid_pre", place.site.layer))

    def _before_gain(self, place: Place, block: str) -> Place:
        norm = f"{block}.{self._layout.mlp_norm}"
        known = self._layout.mlp_norm is not None and _submodule(self.model, norm) is not None
        _check_unadapted(f"site {place.site} in {type(self.model).__name__}", _submodule(self.model, norm))
        weight = weight_of(self.model, f"{norm}.weight") if known else None
        if weight is None:
            raise SiteNotFound(
                f"site {place.site} in {type(self.model).__name__}",
                "its MLP has no norm with a gain in front of it",
                f"Use mlp_in.{place.site.layer}, or pass layout=Layout(..., mlp_norm='path in the block').",
            )
        gain = weight.float() + (1.0 if self._layout.gain == "one_plus_weight" else 0.0)
        if bool((gain.abs() < _NO_GAIN).any()):
            raise SiteNotFound(
                f"site {place.site} in {type(self.model).__name__}",
                f"{int((gain.abs() < _NO_GAIN).sum())} gains of its norm are 0, so what was there before is lost",
                f"Use mlp_in.{place.site.layer}.",
            )
        bias = weight_of(self.model, f"{norm}.bias")
        return replace(place, gain=gain, bias=None if bias is None else bias.float())

    def _check_untraced(self, site: Site, module: nn.Module) -> None:
        kind, compiled = type(module).__name__, getattr(module, "_compiled_call_impl", None) is not None
        if compiled or is_traced(module):
            raise CompiledModel(
                f"steering {type(self.model).__name__} at {site}",
                f"a {kind} was compiled by itself" if compiled else f"torch.compile holds a graph that calls a {kind}",
                "Such a graph skips hooks that came later. Enter steer before the first call of anything compiled, or "
                "call torch._dynamo.reset() first.",
            )

    def _width(self, site: Site, block: nn.Module, module: nn.Module, side: Side) -> int:
        if site.stream in ("attn_z", "mlp_post"):
            found = _width_at(module, side)
        else:
            found = getattr(self._config, "hidden_size", None) or _width_into(block)
        if found is None:
            raise SiteNotFound(
                f"site {site} in {type(self.model).__name__}",
                f"its table names the {side} of a {type(module).__name__}, which does not say how wide it is",
                "Name the input of the projection that reads this stream.",
            )
        return found


_NO_GAIN = 1e-6
_MIXIN: Any = GenerationMixin
_GENERATE = inspect.unwrap(_MIXIN.generate).__code__


def _accept(model: nn.Module, layout: Layout | None) -> nn.Module:
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise CompiledModel(
            f"steering {kind}",
            "it is the result of torch.compile, which may have traced the model without hooks",
            "Steer the original model first, and call the compiled one inside the block.",
        )
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise CompiledModel(
            f"steering {kind}", "model.compile() was called before", "Enter steer first, then compile inside the block."
        )
    check_parallel(model)
    for inner in ("module", "base_model"):
        if isinstance(getattr(model, inner, None), nn.Module) and not isinstance(model, PreTrainedModel):
            copies = isinstance(model, nn.DataParallel)
            raise UnsupportedModel(
                f"steering {kind}",
                f"it wraps a {type(getattr(model, inner)).__name__}" + (", and runs copies of it" if copies else ""),
                f"Steer the wrapped model (wrapper.{inner})"
                + (" and call that: copies refuse." if copies else "; calls through the wrapper are then steered too."),
            )
    if isinstance(model, PreTrainedModel) and getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"steering {kind}", "it has an encoder and a decoder", "Use a decoder-only model.")
    if layout is None and not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"steering {kind}",
            "it is not a transformers model, so there is no site table for it",
            f"Pass layout=SiteMap(...) for a module of any kind; for this one {example_for(model)}. Pass "
            "layout=Layout(blocks='path.to.blocks', streams={'mlp_out': ('mlp', 'output')}) if it is called as those "
            "of transformers are.",
        )
    if layout is None and isinstance(model, PreTrainedModel):
        model_type = model.config.get_text_config().model_type
        if model_type not in LAYOUTS:
            raise UnsupportedModel(
                f"steering {kind} (model type {model_type!r})",
                f"there is no site table for it; there is one for {', '.join(sorted(LAYOUTS))}",
                "Pass layout=Layout(blocks='path.to.blocks', streams={'mlp_out': ('mlp', 'output')})"
                + ("." if model.can_generate() else f", or a site map: {example_for(model)}."),
            )
    return model


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _width_at(module: nn.Module, side: Side) -> int | None:
    """Width of what a linear module reads or gives; its weights may be packed, so they are asked last."""
    for name in ("in_features", "nx") if side == "input" else ("out_features", "nf"):
        if isinstance(found := getattr(module, name, None), int):
            return found
    weight = getattr(module, "weight", None)
    return weight.shape[-1 if side == "input" else 0] if isinstance(weight, Tensor) and weight.ndim else None


def _given_nothing(model: nn.Module, path: str, shift: Tensor | None) -> Tensor | None:
    """What a linear module gives where the norm in front of it gives only its bias ``shift``, in float32."""
    linear: Any = model.get_submodule(path)
    weight, bias = weight_of(model, f"{path}.weight"), weight_of(model, f"{path}.bias")
    if bias is None and callable(getattr(linear, "bias", None)):  # torch's dynamically quantised Linear
        bias = linear.bias()
    found = None if bias is None else bias.detach().float()
    if shift is None:
        return found
    if weight is None or type(weight) is not Tensor or not weight.is_floating_point():  # packed: only it can read them
        return linear.forward(shift[None]).detach()[0].float()
    across = weight.float() if hasattr(linear, "nx") else weight.float().T
    moved = shift.float().to(across.device) @ across
    return moved if found is None else moved + found


def _check_unadapted(asked: str, *modules: nn.Module | None) -> None:
    """A tensor that is read once would go stale with the adapters that are switched behind it."""
    for module in modules:
        if type(module).__module__.partition(".")[0] == "peft":
            raise UnsupportedModel(
                asked,
                f"it depends on the weights of a module that has adapters ({type(module).__name__})",
                "Steer what merge_and_unload() returns, or leave that module out of the adapter.",
            )


def _width_into(block: nn.Module) -> int | None:
    """Width of what the first module with weights in a block reads."""
    for module in block.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim:
                return _width_at(module, "input") or parameter.shape[-1]
    return None


def _check_unpacked(positions: Any, column: int) -> None:
    """Without a mask, transformers takes a row whose positions start over for several sequences in one.

    And with context parallelism a rank has the later columns of a sequence, without the earlier ones in a cache.
    """
    if not isinstance(positions, Tensor) or not positions.numel():
        return
    if positions.shape[-1] > 1 and bool((positions.diff(dim=-1) != 1).any()):
        raise UnsupportedMode(
            "a forward pass without an attention mask",
            "its position_ids do not go up by one, so it packs several sequences into one row",
            "Use one row each, or pass an attention_mask if the gaps are padding.",
        )
    if bool((positions[..., 0] > column).any()):
        raise UnsupportedMode(
            "a forward pass without an attention mask",
            f"its position_ids do not begin at {column}, so it is a part of a sequence (context parallelism)",
            "Give a process whole sequences, or pass an attention_mask if padding stands in front.",
        )


def _mask(mask: Any) -> Tensor | None:
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None or isinstance(mask, Tensor):
        return mask
    raise TokensUnknown(
        "a forward pass",
        f"its attention mask is a {type(mask).__name__}",
        "Use attn_implementation 'sdpa' or 'eager', whose masks are tensors.",
    )
