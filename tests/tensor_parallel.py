"""One rank of a model spread over two processes: steers it, and writes down what came out and what was refused.

``python -m tests.tensor_parallel RANK FOLDER`` reads the models that `models` saved in FOLDER, and leaves ``RANK.pt``.
The ranks meet through a file; nothing is listened to but gloo's own connections.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from saeguard import (
    Ablate,
    Add,
    AnyActive,
    AtLeast,
    Clamp,
    ClampAbove,
    Plan,
    Reduce,
    Rule,
    Scale,
    Site,
    Splice,
    capture,
    steer,
)
from saeguard.engines import placement
from saeguard.errors import SaeguardError
from saeguard.gates import Hits, Rate, Watch
from tests import tiny
from tests.laws import edited

ARCHITECTURES = ("llama", "gemma3", "neox")
IDS = tiny.prompt(3, 7, seed=3)
NEW = 4
SAE = tiny.tiny_sae(d_sae=24)
SITES = ("resid_pre.1", "resid_mid.1", "resid_post.1", "attn_out.1", "mlp_out.1", "mlp_in.1", "mlp_normed.1")
SHARDED = ("attn_z.1", "mlp_post.1")


def rule(site: str, op: Any, *latents: int, **more: Any) -> Rule:
    """A rule of the one SAE at ``site``."""
    return Rule("tiny", latents, op, site=Site.parse(site), **more)


def plans() -> dict[str, Any]:
    """What both ranks steer by; a list is one plan per row."""
    one = Plan((rule("resid_post.1", AtLeast(6.0), 1, 2, 5),))
    gate = Watch(Hits((3, 4, 7)), Rate(), 0.2137)
    return {
        "rows": [one, None, Plan((rule("resid_post.0", Clamp(-4.0, when="active"), 0, 3),))],
        "two sites": Plan((rule("attn_out.1", Add(3.0), 7, special=True), rule("mlp_out.2", Scale(-2.0), 8, 9))),
        "resid_pre": Plan((rule("resid_pre.1", ClampAbove(5.0, above=0.5), 1, 6, trigger=AnyActive((2, 8))),)),
        "gate": Plan((rule("resid_post.2", Ablate(), 1, 4, 6, 9, gate=gate),)),
        "norm": Plan((rule("resid_post.1", Add(0.25, unit="norm"), 3, first=3),)),
        "splice": Plan((rule("mlp_in.1", Splice("dropped")), rule("mlp_normed.2", Reduce(1.0), 1, 2, 3))),
        "resid_mid": Plan((rule("resid_mid.1", Clamp(3.0, when="always"), 1, 2),)),
    }


def models(folder: Path) -> None:
    """Save the models that the ranks load."""
    for name in ARCHITECTURES:
        tiny.fresh_model(name).save_pretrained(folder / name)
    experts = transformers.MixtralConfig(**tiny._LLAMA, num_local_experts=2)
    AutoModelForCausalLM.from_config(experts).save_pretrained(folder / "mixtral")


def outcomes(model: Any) -> dict[str, Any]:
    """What the model does under every plan: logits, edited sets, and the sequences that it writes."""
    found = {}
    for name, plan in plans().items():
        if name == "resid_mid" and model.config.model_type == "gpt_neox":  # attention and MLP read the same stream
            continue
        with torch.no_grad(), steer(model, plan, saes=SAE) as run:
            logits = model(IDS, use_cache=False).logits
            said = model.generate(IDS, max_new_tokens=NEW, do_sample=False, pad_token_id=tiny.PAD)
        found[name] = logits, said, edited(run)
    with torch.no_grad():
        found["plain"] = model(IDS, use_cache=False).logits, None, None
    return found


def entering(model: Any, plan: Any) -> str:
    """The class and the text of what steering ``model`` is refused with."""
    try:
        with steer(model, plan, saes=SAE):
            model(IDS)
    except SaeguardError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def spread(folder: Path) -> Iterator[tuple[str, Any]]:
    """The model, spread in the ways that are refused."""
    whole = lambda: AutoModelForCausalLM.from_pretrained(folder / "llama")
    load = lambda name="llama", **how: AutoModelForCausalLM.from_pretrained(
        folder / name, distributed_config=DistributedConfig(**how)
    )
    mesh = init_device_mesh("cpu", (2,))
    yield "fully_shard", fully_shard(whole(), mesh=mesh)
    yield "fsdp of transformers", load(fsdp_size=2)
    yield "pipeline", load(pp_size=2)
    yield "experts", load("mixtral", ep_size=2, tp_size=2)
    yield "sequence", load(tp_plan={"model.layers.*.input_layernorm": "sequence_parallel"})
    yield "parallelize_module", parallelize_module(whole(), mesh, {"model.layers.0.mlp.up_proj": ColwiseParallel()})
    yield "FullyShardedDataParallel", FullyShardedDataParallel(whole(), device_id=torch.device("cpu"))
    yield "DistributedDataParallel", nn.parallel.DistributedDataParallel(whole())


def work(rank: int, folder: Path) -> dict[Any, Any]:
    """All that this rank found."""
    found: dict[Any, Any] = {"refused": {}}
    one = plans()["norm"]
    load = lambda name: AutoModelForCausalLM.from_pretrained(
        folder / name, distributed_config=DistributedConfig(tp_plan="auto")
    ).eval()
    for name in ARCHITECTURES:
        model = load(name)
        found[name] = outcomes(model)
        for site in SHARDED:
            found[name, site] = entering(model, Plan((rule(site, Add(1.0), 1),)))
    model = load("llama")
    with capture(model, SITES[2]) as tape, torch.no_grad():
        model(IDS)
    found["stream"] = tape[Site.parse(SITES[2])]

    other = Plan((rule("resid_post.1", Add(float(rank)), 1),))
    found["other plans"] = entering(model, other)
    placement._PATIENCE_S = 1
    found["one rank"] = entering(model, one) if rank == 0 else None
    dist.barrier()

    for name, model in spread(folder):
        found["refused"][name] = entering(model, one)
        if name == "DistributedDataParallel":
            with torch.no_grad(), steer(model.module, one, saes=SAE):
                found["through DistributedDataParallel"] = model(IDS, use_cache=False).logits
        dist.barrier()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    here, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=here, world_size=2)
    torch.save(work(here, folder), folder / f"{here}.pt")
    dist.barrier()
    dist.destroy_process_group()
