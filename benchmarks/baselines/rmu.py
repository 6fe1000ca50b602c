"""RMU: forgetting by fine-tuning a few weights (Li et al., arXiv 2403.03218), with the same texts and a small budget.

    loss = mean |h(forget text) - c u|^2 + alpha * mean |h(retain text) - h_0(retain text)|^2        per dimension

h is the stream behind one block, h_0 the same of the model as it was, u a random direction of length 1 whose entries
are not negative, and what is trained are the output weights of the MLPs of that block and of the two before it. A pass
ends at that block. The tuned weights are kept in the work folder, and no other.
"""

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saeguard.fingerprints import model_fingerprint
from saeguard.training.activations import find_blocks


@dataclass(frozen=True)
class RMUConfig:
    """``c`` is in lengths of the stream at that block, ``tokens`` the length of a row."""

    layer: int = 7
    blocks: int = 3
    steps: int = 60
    rows: int = 4
    tokens: int = 128
    lr: float = 5e-5
    alpha: float = 100.0
    c: float = 4.0
    seed: int = 0


class _DeepEnough(Exception):
    """Ends a pass at the block that is read."""


def rmu(
    model: nn.Module,
    forget: Int[Tensor, "row column"],
    retain: Int[Tensor, "row column"],
    config: RMUConfig,
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """A copy of the model that was tuned; weights in ``folder`` that were tuned in the same way are read."""
    about = repr((model_fingerprint(model), asdict(config), forget.tolist(), retain.tolist()))
    path = folder / f"rmu.{hashlib.sha256(about.encode()).hexdigest()[:16]}.safetensors"
    tuned = copy.deepcopy(model)
    trained = weights(tuned, config)
    if path.is_file():
        kept = load_file(path)
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(kept[name])
        return tuned.eval()
    _tune(model, tuned, list(trained.values()), forget, retain, config, progress)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: weight.detach().contiguous() for name, weight in trained.items()}, partial)
    os.replace(partial, path)
    return tuned.eval()


def weights(model: nn.Module, config: RMUConfig) -> dict[str, nn.Parameter]:
    """What is trained: the output weights of the MLPs of the last ``blocks`` blocks up to ``layer``."""
    found = {}
    for number in range(config.layer - config.blocks + 1, config.layer + 1):
        block: Any = find_blocks(model)[number]
        found[f"{number}.mlp.down_proj"] = block.mlp.down_proj.weight
    return found


def _tune(
    model: nn.Module,
    tuned: nn.Module,
    trained: Sequence[nn.Parameter],
    forget: Tensor,
    retain: Tensor,
    config: RMUConfig,
    progress: Callable[[int, int], None] | None,
) -> None:
    generator = torch.Generator().manual_seed(config.seed)
    rows = lambda text: text[torch.randint(len(text), (config.rows,), generator=generator), : config.tokens]
    for parameter in tuned.parameters():
        parameter.requires_grad_(False)
    for weight in trained:
        weight.requires_grad_(True)
    with torch.no_grad():
        usual = _stream(model, rows(forget), config.layer)[:, 1:].norm(dim=-1).median()
    u = torch.rand(usual.new_zeros(_width(model)).shape, generator=generator)
    target = config.c * usual * u / u.norm()
    optimiser = torch.optim.AdamW(trained, lr=config.lr)
    for step in range(config.steps):
        away, here = rows(forget), rows(retain)
        with torch.no_grad():
            before = _stream(model, here, config.layer)[:, 1:]
        gone = (_stream(tuned, away, config.layer)[:, 1:] - target).square().mean()
        kept = (_stream(tuned, here, config.layer)[:, 1:] - before).square().mean()
        optimiser.zero_grad()
        (gone + config.alpha * kept).backward()
        optimiser.step()
        if progress is not None:
            progress(step + 1, config.steps)
    for weight in trained:
        weight.requires_grad_(False)


def _width(model: Any) -> int:
    return model.config.hidden_size


def _stream(model: nn.Module, ids: Tensor, layer: int) -> Float[Tensor, "row column width"]:
    """The output of one block; BOS, whose stream is of another size, is left to the caller."""
    seen = []

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])
        raise _DeepEnough

    handle = find_blocks(model)[layer].register_forward_hook(keep)
    try:
        model(input_ids=ids, use_cache=False)
    except _DeepEnough:
        pass
    finally:
        handle.remove()
    return seen[0]
