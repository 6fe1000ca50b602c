"""Where a model's weights are, and which of its streams this process holds whole.

Offloading (accelerate) leaves weights on the meta device between the calls of a module; the hook that brings them back
says where they run, and holds them. A parameter on the meta device that no such hook holds has no values.

Tensor parallelism (transformers' ``tp_plan``) gives every rank some of the heads and some of the MLP's neurons. What a
block adds to the residual stream is summed over the ranks, so each of them carries the whole stream and makes the same
edits to it; what lies between a projection that splits its output and one that takes a split input is a slice of the
site. Every rank has to be under the same plan, as a stream that only one of them edits is no stream of the model.

Modes that cut the batch, the sequence or the depth are refused: a rank cannot tell which tokens it has, or has to make
passes for the others that nobody asked it to edit. So are quantised layers with one scale for the activations of all
tokens: an edit of one row would move every other.
"""

import itertools
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from saeguard.engines.layouts import Side
from saeguard.errors import GuardNotApplied, MetaDevice, SiteNotFound, UnsupportedMode
from saeguard.sites import Site

_WHOLE = frozenset({"colwise", "colwise_rep", "colwise_gather_output", "rowwise", "rowwise_rep", "rowwise_split_input",
                    "packed_colwise", "packed_rowwise", "embedding_rowwise", "embedding_colwise", "all_reduce",
                    "local_params", "mla_kv_a_proj", "moe_tp_experts", "moe_identity_expert", "replicate",
                    "replicated_with_grad_allreduce"})  # fmt: skip
"""Styles of a ``tp_plan`` that leave the residual stream whole."""
_SPLIT = {"input": ("rowwise", "packed_rowwise"), "output": ("colwise", "packed_colwise")}
_PATIENCE_S = 300
"""Seconds that a rank waits for the others to say what they are steered by."""
_COUNT = itertools.count()


def device_of(model: nn.Module, path: str) -> torch.device:
    """Where the module at ``path`` computes. Raises `MetaDevice` when weights of it are nowhere."""
    found = [
        torch.device(_keeper(model, f"{path}.{name}")[0].execution_device) if parameter.is_meta else parameter.device
        for name, parameter in model.get_submodule(path).named_parameters()
    ]
    return next(iter(found), None) or next((p.device for p in model.parameters()), torch.device("cpu"))


def weight_of(model: nn.Module, path: str) -> Tensor | None:
    """The parameter at ``path``, from where it is kept; None where there is none. Raises `MetaDevice`."""
    owner, _, name = path.rpartition(".")
    found = getattr(model.get_submodule(owner), name, None)
    if not isinstance(found, Tensor):  # dynamically quantised modules have methods of these names
        return None
    if found.is_meta:
        hook, inner = _keeper(model, path)
        found = hook.weights_map[inner]
    return found.detach()


def check_parallel(model: nn.Module) -> None:
    """Raise `UnsupportedMode` when the model is spread over processes, or quantised, so that edits cannot be exact."""
    ways = next(_unfollowed(model), None)
    if ways is not None:
        found, proceed = ways
        raise UnsupportedMode(f"steering {type(model).__name__}", found, proceed)


def check_whole(model: nn.Module, site: Site, path: str, side: Side) -> None:
    """Raise `SiteNotFound` when each rank has only a slice of what the module at ``path`` reads or gives."""
    plan = _plan(model)
    style = plan.get(path) or plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
    if style in _SPLIT[side]:
        raise SiteNotFound(
            f"site {site} in {type(model).__name__}",
            f"it is sharded by tensor parallelism: each of {_tp_size(model)} ranks has a slice of it ({path}: {style})",
            "Use a site of the residual stream, or attn_out and mlp_out, which every rank has whole; or load without "
            "tp_plan.",
        )


def check_ranks(model: nn.Module, steering: str) -> None:
    """Wait until every rank of a tensor-parallel model says the same of its plans; nothing where there are no others.

    It goes through the process group's store, as a collective would mix with those of a rank that goes on unsteered.
    Raises `GuardNotApplied` when ranks differ, or are silent for `_PATIENCE_S` seconds.
    """
    if _tp_size(model) == 1:
        return
    from torch.distributed import distributed_c10d, get_process_group_ranks, get_rank

    ranks = get_process_group_ranks(_mesh(model).get_group())
    store: Any = distributed_c10d._get_default_store()
    key = f"saeguard/{min(ranks)}/{next(_COUNT)}"
    store.set(f"{key}/{get_rank()}", steering)
    silent = [rank for rank in ranks if not _has_said(store, f"{key}/{rank}")]
    others = [rank for rank in ranks if rank not in silent and store.get(f"{key}/{rank}").decode() != steering]
    if silent or others:
        raise GuardNotApplied(
            f"steering rank {get_rank()} of {type(model).__name__}",
            f"rank {(silent or others)[0]} " + ("enters no block" if silent else "enters one with other plans or SAEs"),
            "Every rank carries the whole residual stream: enter the same blocks, in the same order, on all of them.",
        )


def _has_said(store: Any, key: str) -> bool:
    try:
        store.wait([key], timedelta(seconds=_PATIENCE_S))
    except RuntimeError:  # of several kinds, by backend
        return False
    return True


def _keeper(model: nn.Module, path: str) -> tuple[Any, str]:
    """The offloading hook that holds the parameter at ``path``, and its name there."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        for hook in _offloaders(model.get_submodule(".".join(parts[:depth]))):
            if depth == len(parts) - 1 or hook.place_submodules:
                return hook, ".".join(parts[depth:])
    raise MetaDevice(
        f"steering {type(model).__name__}",
        f"{path} is on the meta device and no offloading hook holds it, so it has no values",
        "Load it with from_pretrained, or call to_empty and load a state dict first.",
    )


def _offloaders(module: nn.Module) -> list[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = [hook for hook in getattr(hook, "hooks", (hook,)) if getattr(hook, "offload", False)]
    return [hook for hook in hooks if getattr(hook, "weights_map", None) is not None]


def _unfollowed(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Why the model is refused: what was found, and what to do."""
    config: Any = getattr(getattr(model, "config", None), "distributed_config", None)
    if getattr(model, "_pp_stage", None) is not None:
        yield "pipeline parallelism gives each rank some of its blocks", "Load it with tp_plan, or with a device_map."
    if any(_is_fully_sharded(module) for module in model.modules()):
        yield "its weights are fully sharded (FSDP), and ranks make passes for each other", _UNSHARDED
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield "its weights are sharded by DeepSpeed (ZeRO-3), and ranks make passes for each other", _UNSHARDED
    if _mesh(model) is not None and getattr(config, "ep_size", 1) > 1:
        yield "expert parallelism sends tokens to other ranks", "Load it with a tp_plan instead of an ep_size."
    if _tp_size(model) == 1 and any(hasattr(parameter, "placements") for parameter in model.parameters()):
        yield (
            "its parameters are DTensors that transformers did not place, so which streams are whole is unknown",
            "Load it with from_pretrained(..., tp_plan='auto'), or call full_tensor() on them.",
        )
    mixing = next((path for path, module in model.named_modules() if _mixes_tokens(module)), None)
    if mixing is not None:
        yield (
            f"{mixing} is quantised with one scale for the activations of all tokens, so that an edit of one moves all",
            "Quantise with a scale per token, as torchao's Int8DynamicActivationInt8WeightConfig() does, or only the "
            "weights.",
        )
    strange = sorted(set(_plan(model).values()) - _WHOLE)
    if strange:
        yield (
            f"its tp_plan has {', '.join(strange)}, under which a rank may have a part of the sequence",
            f"Use only {', '.join(sorted(_WHOLE))}.",
        )


_UNSHARDED = "Load it whole on each rank, or with a tp_plan or a device_map."


def _is_fully_sharded(module: nn.Module) -> bool:
    if any(kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(module).__mro__):
        return True
    return any(type(parameter).__name__ == "FlatParameter" for parameter in module.parameters(recurse=False))


def _mixes_tokens(module: nn.Module) -> bool:
    if ".quantized.dynamic." in f"{type(module).__module__}." and hasattr(module, "in_features"):
        return True
    weight: Any = module._parameters.get("weight")
    chosen_anew = (
        getattr(weight, "act_quant_kwargs", None) is not None and getattr(weight, "act_quant_scale", None) is None
    )
    return chosen_anew and type(weight.act_quant_kwargs.granularity).__name__ == "PerTensor"


def _mesh(model: nn.Module) -> Any:
    mesh: Any = getattr(model, "_device_mesh", None)
    return mesh["tp"] if mesh is not None and mesh.ndim > 1 else mesh


def _tp_size(model: nn.Module) -> int:
    return getattr(model, "_tp_size", None) or 1


def _plan(model: nn.Module) -> dict[str, str]:
    plan: Any = getattr(model, "_tp_plan", None)
    return plan or {} if _tp_size(model) > 1 else {}
