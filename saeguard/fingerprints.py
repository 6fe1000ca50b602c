"""What identifies a live model and its tokenizer: SHA-256 of everything that decides their numbers and their ids.

    weights    names, dtypes, shapes and bytes of all weights and buffers
    config     what the weights do not say: heads, rotary bases, epsilons, windows, activation functions
    tokenizer  vocabulary, merges, normaliser, what is put in front, special tokens, chat template

Names, paths, versions and what only training or printing uses stay out, and so does what a call may change: padding,
truncation, the device.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saeguard.errors import BadPolicy, MetaDevice

NOT_OF_THE_CONFIG = frozenset({
    "architectures", "chunk_size_feed_forward", "dtype", "id2label", "initializer_range", "label2id",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "transformers_version",
    "use_cache",
})  # fmt: skip
"""Entries that change no number of a forward pass in eval mode; dtypes are those of the weights."""
NOT_OF_THE_CONFIG_ENDINGS = ("dropout", "_pdrop", "_token_id", "name_or_path")


_OF_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling", "fan_in_fan_out", "use_dora")


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the weights and buffers: about one second per GB of them. Raises `MetaDevice`."""
    digest, seen = hashlib.sha256(type(model).__name__.encode()), set()
    for name, weight in model.state_dict(keep_vars=True).items():
        if not isinstance(weight, Tensor):
            continue
        if weight.is_meta:
            raise MetaDevice(
                f"the fingerprint of a {type(model).__name__}", f"{name} is on the meta device and has no numbers",
                "Load the weights first.",
            )  # fmt: skip
        place = (weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
        if place not in seen:  # tied weights once
            seen.add(place)
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    for line in _adapters(model):
        digest.update(line.encode())
    return digest.hexdigest()


def config_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the entries of ``model.config`` that act on a forward pass, and are known to its class."""
    config: Any = getattr(model, "config", None)
    entries = config.to_dict() if hasattr(config, "to_dict") else {}
    known = {field.name for field in fields(config)} if is_dataclass(config) else set(entries)
    acting = {name: value for name, value in entries.items() if name in known or name == "model_type"}
    return _sha256(_acting(acting))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what turns text and chats into ids. Raises `BadPolicy` for a tokenizer that is not a fast one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BadPolicy(
            f"the fingerprint of a {type(tokenizer).__name__}",
            "it is not a fast tokenizer, so what it does is in code and cannot be hashed",
            "Load the tokenizer with transformers.AutoTokenizer, and check that tokenizer.is_fast holds.",
        )
    content = json.loads(backend.to_str())
    rest = {name: value for name, value in content.items() if name not in ("version", "padding", "truncation")}
    special = {
        name: [str(token), tokenizer.convert_tokens_to_ids(str(token))]
        for name, token in tokenizer.special_tokens_map.items()
        if not isinstance(token, list | tuple)
    }
    return _sha256({
        "backend": rest,
        "special": special,
        "special_ids": sorted(set(tokenizer.all_special_ids)),
        "split_special": bool(getattr(tokenizer, "split_special_tokens", False)),
        "chat_template": getattr(tokenizer, "chat_template", None),
    })  # fmt: skip


def _adapters(model: nn.Module) -> Iterator[str]:
    """What the weights of PEFT's adapters do not say: which of them act, how strongly, and which are merged."""
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            facts = {fact: value for fact in _OF_ADAPTERS if (value := vars(module).get(fact)) is not None}
            yield f"{name} {type(module).__name__} {json.dumps(facts, sort_keys=True, default=str)}" if facts else ""


def _acting(value: Any) -> Any:
    """Without what does not act; floats as the float32 that a model computes with, 10000.0 being 10000."""
    if isinstance(value, dict):
        kept = {str(name): part for name, part in value.items() if not _is_idle(str(name))}
        return {name: _acting(part) for name, part in kept.items()}
    if isinstance(value, list | tuple):
        return [_acting(part) for part in value]
    if isinstance(value, float) and abs(value) < 3e38:
        rounded = struct.unpack("f", struct.pack("f", value))[0]
        return int(rounded) if rounded.is_integer() else rounded
    return value


def _is_idle(name: str) -> bool:
    return name in NOT_OF_THE_CONFIG or name.endswith(NOT_OF_THE_CONFIG_ENDINGS)


def _sha256(document: Any) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()
