"""EleutherAI's sparsify."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.lookalikes.base import D_IN, D_SAE, TOP_K, LookAlike, Tensors, largest, weights

# As found on the hub: pythia-70m of 2024, llama-3-8b-32x, a skip transcoder of January 2025, and what is written today.
OLD = {
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": D_SAE,
    "k": TOP_K,
    "signed": False,
    "d_in": D_IN,
}
EXPANDED = {"expansion_factor": 3, "normalize_decoder": True, "k": TOP_K, "d_in": D_IN}
SKIP = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": TOP_K, "multi_topk": False,
        "skip_connection": True, "d_in": D_IN}  # fmt: skip
NOW = {"activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": TOP_K,
       "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_IN}  # fmt: skip
RUN = {"sae": NOW, "batch_size": 32, "model": "EleutherAI/pythia-70m", "dataset": "EleutherAI/the_pile_deduplicated",
       "ctx_len": 2048, "hookpoints": [], "transcode": False}  # fmt: skip


def write(
    t: Tensors, config: dict[str, Any], folder: str, run: dict[str, Any] | None = RUN,
    dtype: torch.dtype = torch.float32, give: str = "",
) -> Callable[[Path], Path]:  # fmt: skip
    def put(root: Path) -> Path:
        place = root / "run" / folder
        place.mkdir(parents=True)
        stored = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
        stored |= {"W_skip": t["skip"].T} if "skip" in t else {}
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in stored.items()}, place / "sae.safetensors")
        (place / "cfg.json").write_text(json.dumps(config))
        if run is not None:
            (root / "run" / "config.json").write_text(json.dumps(run))
        return place / give

    return put


def case(
    name: str, note: str, seed: int, config: dict[str, Any], folder: str, site: str | None, *, subtracts: bool = True,
    skip: bool = False, run: dict[str, Any] | None = RUN, dtype: torch.dtype = torch.float32, give: str = "",
    site_out: str | None = None,
) -> LookAlike:  # fmt: skip
    t = {key: tensor.to(dtype).float() for key, tensor in weights(*(["skip"] * skip), seed=seed).items()}

    def acts(x: Tensor) -> Tensor:
        p = (x - t["b_dec"] if subtracts else x) @ t["W_enc"] + t["b_enc"]
        if config.get("signed"):
            return p * largest(p.abs(), TOP_K)
        if config.get("activation") == "groupmax":
            groups = p.relu().unflatten(-1, (TOP_K, -1))
            return (groups * largest(groups, 1)).flatten(-2)
        return p.relu() * largest(p.relu(), TOP_K)

    def decode(f: Tensor, x: Tensor) -> Tensor:
        return f @ t["W_dec"] + t["b_dec"] + (x @ t["skip"] if skip else 0)

    return LookAlike(
        name=f"sparsify {name}", family="sparsify", note=note, write=write(t, config, folder, run, dtype, give),
        acts=acts, decode=decode, site=site, site_out=site_out, model=run["model"] if run else None,
    )  # fmt: skip


LOOKALIKES = [
    case("pythia", "TopK of x - b_dec", 111, OLD, "layers.3", "resid_post.3", dtype=torch.bfloat16),
    case("llama", "no num_latents", 112, EXPANDED, "layers.10", "resid_post.10", run=None, give="sae.safetensors"),
    case("gpt2 attention", "num_latents 0", 113, NOW, "h.3.attn", "attn_out.3"),
    case("mlp of one seed", "seed folder", 114, NOW, "layers.0.mlp/seed1", "mlp_out.0", run=None),
    case("embedding", "no stream of ours", 115, OLD, "embed_tokens", None),
    case("signed", "the largest |p|, signs kept", 116, OLD | {"signed": True}, "layers.4.attention", "attn_out.4"),
    case("groupmax", "the largest of each group", 117, NOW | {"activation": "groupmax"}, "layers.5", "resid_post.5"),
    case("skip transcoder", "x @ W_skip.T, b_dec subtracted", 118, SKIP, "layers.6.mlp", "mlp_in.6", skip=True,
         site_out="mlp_out.6", dtype=torch.bfloat16),
    case("transcoder", "x as it is", 119, NOW | {"transcode": True}, "layers.7.mlp", "mlp_in.7", subtracts=False,
         site_out="mlp_out.7"),
    case("transcoder with a skip", "x as it is", 120, NOW | {"transcode": True, "skip_connection": True}, "layers.2",
         "resid_pre.2", subtracts=False, skip=True, site_out="resid_post.2"),
    case("transcoder of 2024", "only its run says so, b_dec subtracted", 121, OLD, "layers.7.mlp", "mlp_in.7",
         run=RUN | {"transcode": True}, site_out="mlp_out.7"),
    case("gpt2 transcoder", "hookpoint h.N", 122, NOW | {"transcode": True}, "h.1.mlp", "mlp_in.1", subtracts=False,
         site_out="mlp_out.1"),
]  # fmt: skip
