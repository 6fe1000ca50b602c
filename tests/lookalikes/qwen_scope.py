"""Qwen-Scope."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.lookalikes.base import D_IN, D_SAE, TOP_K, LookAlike, Tensors, largest, weights

CONFIG = {
    "model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": D_IN, "d_sae": D_SAE, "k": TOP_K,
    "num_layers": 28, "hook_point": "resid_post", "dtype": "float32",
}  # fmt: skip
REPOSITORY = f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{TOP_K}"
MANY, FEW = weights(seed=101), weights(seed=102)
FEW["b_enc"] = FEW["b_enc"] - 8.0  # fewer than k are positive, so that a ReLU would be seen


def write(
    stored: Tensors, config: dict[str, Any] | None = CONFIG, folder: str = REPOSITORY, layers: tuple[int, ...] = (3,),
    give: str = "",
) -> Callable[[Path], Path]:  # fmt: skip
    """A repository with some layers, where all but the last hold other weights."""

    def put(root: Path) -> Path:
        (root / folder).mkdir(parents=True)
        for layer in layers:
            t = stored if layer == layers[-1] else {key: tensor * 2 for key, tensor in stored.items()}
            turned = {"W_enc": t["W_enc"].T.contiguous(), "W_dec": t["W_dec"].T.contiguous()}
            torch.save(turned | {"b_enc": t["b_enc"], "b_dec": t["b_dec"]}, root / folder / f"layer{layer}.sae.pt")
        if config is not None:
            (root / folder / "config.json").write_text(json.dumps(config))
        return root / folder / give

    return put


def _case(name: str, note: str, t: Tensors, put: Callable[[Path], Path], site: str, **more: Any) -> LookAlike:
    def acts(x: torch.Tensor) -> torch.Tensor:
        p = x @ t["W_enc"] + t["b_enc"]
        return p * largest(p, TOP_K)

    return LookAlike(
        name=f"qwen_scope {name}", family="qwen_scope", note=note, write=put, acts=acts,
        decode=lambda f, x: f @ t["W_dec"] + t["b_dec"], site=site, **{"model": CONFIG["base_model"]} | more,
    )  # fmt: skip


LOOKALIKES = [
    _case("one layer", "TopK without a ReLU, transposed", MANY, write(MANY), "resid_post.3"),
    _case("few positive", "kept activations below 0", FEW, write(FEW, give="layer3.sae.pt"), "resid_post.3"),
    _case("many layers", "site says which", MANY, write(MANY, layers=(0, 3, 12)), "resid_post.12",
          options={"site": "resid_post.12"}),
    _case("no config", "k and model in the path", MANY,
          write(MANY, None, f"models--Qwen--{REPOSITORY}/snapshots/f00"), "resid_post.3"),
    _case("no config, no path", "k given", MANY, write(MANY, None, "downloads"), "resid_post.3", model=None,
          options={"top_k": TOP_K}),
]  # fmt: skip
