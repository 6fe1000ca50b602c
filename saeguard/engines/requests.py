"""What a transformers generate call says before it starts, and which of its columns were used once it has ended."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import Cache

from saeguard.engines.base import Outcome, Request
from saeguard.errors import TokensUnknown, UnsupportedMode

_FOREIGN_PASSES = (
    "custom_generate", "negative_prompt_ids", "guidance_scale", "dola_layers", "penalty_alpha", "assistant_early_exit"
)  # fmt: skip
_NEUTRAL = {"guidance_scale": 1.0, "penalty_alpha": 0.0}
_DRAFTS = ("assistant_model", "prompt_lookup_num_tokens")


def read_request(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request:
    """Read the arguments of a generate call. Raises `UnsupportedMode`, `TokensUnknown`."""
    options = _Options(model, args, kwargs)
    _check_own_inputs(model)
    for name in _FOREIGN_PASSES:
        value = options.get(name)
        if value is not None and value is not False and value != _NEUTRAL.get(name):
            raise UnsupportedMode(
                f"generate with {name}",
                "it makes forward passes whose rows or layers are not those of the request",
                f"Generate without {name}.",
            )
    given = (args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"))
    ids = next((value for value in given if value is not None), None)
    embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    for value in (ids, embeds):
        if value is not None and (not isinstance(value, Tensor) or value.ndim < 2):
            raise TokensUnknown("a generate call", f"its prompt is a {type(value).__name__}", "Pass batch x tokens.")
    beams = options.get("num_beams") or 1
    copies = max(beams, options.get("num_return_sequences") or 1)
    shown = [value for value in (ids, embeds) if value is not None]
    columns = max([value.shape[1] for value in shown], default=1)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        columns = max(columns, mask.shape[1])
    _check_beyond(kwargs.get("past_key_values"), columns)
    return Request(
        rows=shown[0].shape[0] if shown else 1,
        copies=copies,
        reorders=beams > 1,
        prompt_columns=columns,
        output_columns=ids.shape[1] if ids is not None else 0 if embeds is not None else 1,
        eos=_ids(options.get("eos_token_id")),
        pad=_ids(options.get("pad_token_id")),
        drafts=any(bool(options.get(name)) for name in _DRAFTS),
    )


def read_outcome(output: Any, request: Request) -> Outcome | None:
    """Which columns were used, from what generate returned; None when it returned no sequences."""
    ids = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
    if ids is None:
        return None
    generated = ids[:, request.output_columns :]
    ended = _is_one_of(generated, request.eos)
    padding = _is_one_of(generated, request.pad).long()
    filled = ended | padding.flip(1).cumprod(1).flip(1).bool()  # in the middle the padding token is a word like any
    before = (filled.cumsum(1) == 0).sum(1)  # tokens before the first end or filler
    saw_end = (ended & (filled.cumsum(1) == 1)).any(1)
    # Whether the end token was fed back depends on the other rows, so it never counts; without one, the last
    # token of the row was sampled and not fed back.
    ends = (request.prompt_columns + before - (~saw_end).long()).cpu()
    if request.reorders:
        kept = ids.shape[0] // request.rows
        ends = ends.view(request.rows, kept).amax(1).repeat_interleave(request.copies)
    return Outcome(request.prompt_columns + generated.shape[1] - 1, ends)


def _check_own_inputs(model: nn.Module) -> None:
    """What PEFT's virtual tokens, or anybody, put in the place of the method that makes passes of a request."""
    own: Any = type(model)
    placed = model.__dict__.get("prepare_inputs_for_generation")
    if placed is not None and getattr(placed, "__func__", None) is not own.prepare_inputs_for_generation:
        raise UnsupportedMode(
            "generate with a prepare_inputs_for_generation that is not the model's own",
            "it may put virtual tokens in front of the prompt, as PEFT's prompt and prefix tuning do",
            "Generate with the model's own, or with an adapter that leaves the tokens alone.",
        )


def _check_beyond(cache: Any, columns: int) -> None:
    """A prompt that is new tokens only says so by its mask; without one, transformers would leave some of them out."""
    cached = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
    if cached and columns <= cached:
        raise TokensUnknown(
            "a generate call",
            f"its prompt has {columns} columns, and {cached} are in its cache already",
            "Pass all token ids, or an attention mask of all columns, those in the cache included.",
        )


class _Options:
    """An option of the call: by name, where None switches it off, else of its config, else of the model's."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]):
        config = args[1] if len(args) > 1 else kwargs.get("generation_config")
        self._configs = (config, getattr(model, "generation_config", None))
        self._kwargs = kwargs

    def get(self, name: str) -> Any:
        if name in self._kwargs:
            return self._kwargs[name]
        found = (getattr(config, name, None) for config in self._configs)
        return next((value for value in found if value is not None), None)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(torch.as_tensor(value).flatten().tolist())


def _is_one_of(ids: Int[Tensor, "row column"], wanted: tuple[int, ...]) -> Bool[Tensor, "row column"]:
    return torch.isin(ids, torch.tensor(wanted, dtype=ids.dtype, device=ids.device))
