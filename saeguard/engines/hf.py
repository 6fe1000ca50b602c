"""The Hugging Face engine: transformers models as they come out of ``from_pretrained``."""

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache

from saeguard.engines.base import Pass, Place, Request
from saeguard.engines.layouts import LAYOUTS, Layout
from saeguard.engines.traced import is_traced
from saeguard.errors import CompiledModel, MetaDevice, SiteNotFound, TokensUnknown, UnsupportedMode, UnsupportedModel
from saeguard.sites import Site


class HuggingFace:
    """One transformers model; ``layout`` overrides the table for architectures that are not in it."""

    name = "transformers"

    def __init__(self, model: nn.Module, layout: Layout | None = None):
        self.model = _accept(model, layout)
        self._config: Any = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
        self._layout = layout or LAYOUTS[self._config.model_type]

    def resolve(self, site: Site) -> Place:
        blocks_path = self._layout.blocks
        blocks = _submodule(self.model, blocks_path)
        if blocks is None:  # the model without its head: LlamaModel rather than LlamaForCausalLM
            blocks_path = blocks_path.partition(".")[2]
            blocks = _submodule(self.model, blocks_path)
        if not isinstance(blocks, nn.ModuleList):
            raise SiteNotFound(
                f"site {site} in {type(self.model).__name__}",
                f"there is no list of blocks at {self._layout.blocks}",
                "Pass layout=Layout(blocks='path.to.blocks', streams={...}).",
            )
        if site.layer >= len(blocks):
            raise SiteNotFound(
                f"site {site} in {type(self.model).__name__}",
                f"this model has layers 0-{len(blocks) - 1}",
                f"Use layer {len(blocks) - 1} for the last one.",
            )
        where = self._layout.where(site.stream)
        module = None if where is None else _submodule(blocks[site.layer], where[0])
        if where is None or module is None:
            known = ["resid_pre", "resid_post", *self._layout.streams]
            raise SiteNotFound(
                f"site {site} in {type(self.model).__name__}",
                "this architecture's table has no such stream",
                f"It has {', '.join(dict.fromkeys(known))}; pass layout=Layout(...) to name another module.",
            )
        self._check_untraced(site, module)
        path = f"{blocks_path}.{site.layer}" + (f".{where[0]}" if where[0] else "")
        return Place(site, module, path, where[1], self._width(site, module), self._device(blocks[site.layer]))

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
        return Pass(rows, width, column, cache, ids, _mask(kwargs.get("attention_mask")), shown.device)

    def read_cache(self, output: Any) -> Any:
        return getattr(output, "past_key_values", None)

    def read_request(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request:
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        self._refuse_modes(config, kwargs)
        prompt = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        embeds = kwargs.get("inputs_embeds")
        shown = embeds if prompt is None or (embeds is not None and prompt.shape[1] == 0) else prompt
        beams = self._option("num_beams", config, kwargs) or 1
        copies = max(beams, self._option("num_return_sequences", config, kwargs) or 1)
        if shown is None:
            return Request(1, copies, beams > 1, 1)
        mask = kwargs.get("attention_mask")
        columns = max(shown.shape[1], mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else 0)
        return Request(shown.shape[0], copies, beams > 1, columns)

    def is_generating(self) -> bool:
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _GENERATE and frame.f_locals.get("self") is self.model:
                return True
            frame = frame.f_back
        return False

    def read_ends(self, output: Any, request: Request, kwargs: Mapping[str, Any]) -> Tensor | None:
        ids = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
        if ids is None:
            return None
        holds_prompt = kwargs.get("inputs_embeds") is None or kwargs.get("input_ids") is not None
        generated = ids[:, request.prompt_columns :] if holds_prompt else ids
        ended = self._is_one_of(generated, "eos_token_id", kwargs)
        padding = self._is_one_of(generated, "pad_token_id", kwargs).long()
        filled = ended | padding.flip(1).cumprod(1).flip(1).bool()  # in the middle the padding token is a word like any
        before = (filled.cumsum(1) == 0).sum(1)  # tokens before the first end or filler
        saw_end = (ended & (filled.cumsum(1) == 1)).any(1)
        # Whether the end token was fed back depends on the other rows, so it never counts; without one, the last
        # token of the row was sampled and not fed back.
        ends = (request.prompt_columns + before - (~saw_end).long()).cpu()
        if request.reorders:
            kept = ids.shape[0] // request.rows
            return ends.view(request.rows, kept).amax(1).repeat_interleave(request.copies)
        return ends

    def _is_one_of(self, ids: Tensor, name: str, kwargs: Mapping[str, Any]) -> Tensor:
        value = self._option(name, kwargs.get("generation_config"), kwargs)
        wanted = value if isinstance(value, list | tuple) else [] if value is None else [value]
        return torch.isin(ids, torch.tensor(list(wanted), dtype=ids.dtype, device=ids.device))

    def _refuse_modes(self, config: GenerationConfig | None, kwargs: Mapping[str, Any]) -> None:
        for name in _FOREIGN_PASSES:
            value = self._option(name, config, kwargs)
            if value is not None and value is not False and not (name == "guidance_scale" and value == 1):
                raise UnsupportedMode(
                    f"generate with {name}",
                    "it makes forward passes whose rows or layers are not those of the request",
                    f"Generate without {name}.",
                )

    def _option(self, name: str, config: GenerationConfig | None, kwargs: Mapping[str, Any]) -> Any:
        if kwargs.get(name) is not None:
            return kwargs[name]
        if (value := getattr(config, name, None)) is not None:
            return value
        return getattr(getattr(self.model, "generation_config", None), name, None)

    def _check_untraced(self, site: Site, module: nn.Module) -> None:
        kind, compiled = type(module).__name__, getattr(module, "_compiled_call_impl", None) is not None
        if compiled or is_traced(module):
            raise CompiledModel(
                f"steering {type(self.model).__name__} at {site}",
                f"a {kind} was compiled by itself" if compiled else f"torch.compile holds a graph that calls a {kind}",
                "Such a graph skips hooks that came later. Enter steer before the first call of anything compiled, or "
                "call torch._dynamo.reset() first.",
            )

    def _width(self, site: Site, module: nn.Module) -> int:
        if site.stream == "attn_z":
            weight = next(module.parameters())
            return weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]
        if self._config is None:
            return next(p.shape[-1] for p in module.parameters() if p.ndim)
        return self._config.hidden_size

    def _device(self, block: nn.Module) -> torch.device:
        device = next(block.parameters()).device
        if device.type == "meta":
            raise MetaDevice(
                f"steering {type(self.model).__name__}",
                "its parameters are on the meta device, so it has no weights",
                "Load it with from_pretrained, or call to_empty and load a state dict first.",
            )
        return device


_MIXIN: Any = GenerationMixin
_GENERATE = inspect.unwrap(_MIXIN.generate).__code__
_FOREIGN_PASSES = (
    "custom_generate", "negative_prompt_ids", "guidance_scale", "dola_layers", "penalty_alpha", "assistant_early_exit"
)  # fmt: skip


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
    for inner in ("module", "base_model"):
        if isinstance(getattr(model, inner, None), nn.Module) and not isinstance(model, PreTrainedModel):
            raise UnsupportedModel(
                f"steering {kind}",
                f"it wraps a {type(getattr(model, inner)).__name__}",
                f"Steer the wrapped model (wrapper.{inner}); calls through the wrapper are then steered too.",
            )
    if isinstance(model, PreTrainedModel) and getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"steering {kind}", "it has an encoder and a decoder", "Use a decoder-only model.")
    if layout is None and not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"steering {kind}",
            "it is not a transformers model, so there is no site table for it",
            "Pass layout=Layout(blocks='path.to.blocks', streams={'mlp_out': ('mlp', 'output')}).",
        )
    if layout is None and isinstance(model, PreTrainedModel):
        model_type = model.config.get_text_config().model_type
        if model_type not in LAYOUTS:
            raise UnsupportedModel(
                f"steering {kind} (model type {model_type!r})",
                f"there is no site table for it; there is one for {', '.join(sorted(LAYOUTS))}",
                "Pass layout=Layout(blocks='path.to.blocks', streams={'mlp_out': ('mlp', 'output')}).",
            )
    return model


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


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
