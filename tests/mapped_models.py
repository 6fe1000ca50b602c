"""Modules that no table knows, for site maps, and how somebody would steer them by hand with plain hooks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from saeguard import SAE, At, Plan, Site
from tests import tiny
from tests.slow_maths import tell

D = 6
IMAGE = "batch d height width"


class Named(NamedTuple):
    sample: Tensor
    aux: Tensor


class Stage(nn.Module):
    """Adds an update to what it is given, and gives it back in a wrapping of some kind."""

    def __init__(self, kind: str):
        super().__init__()
        self.conv = nn.Conv2d(D, D, 3, padding=1)
        self.kind = kind

    def forward(self, hidden: Tensor, *, gain: float = 1.0) -> Any:
        """The stream with the update in it."""
        update = gain * self.conv(hidden.relu())
        hidden = hidden.add_(update) if self.kind == "in place" else hidden + update
        wrapped = {"tuple": (hidden, 0), "dict": {"sample": hidden, "n": 1}, "named": Named(hidden, hidden)}
        return {**wrapped, "output": BaseModelOutput(last_hidden_state=hidden)}.get(self.kind, hidden)  # type: ignore[arg-type]


class Painter(nn.Module):
    """Image to image: two stages at full size, one at half size, and a vector in the middle."""

    def __init__(self, kind: str = "tuple"):
        super().__init__()
        self.enter = nn.Conv2d(3, D, 1)
        self.stages = nn.ModuleList(Stage(kind) for _ in range(3))
        self.mixer = nn.Linear(D, D)
        self.unused = nn.Linear(D, D)

    def forward(self, sample: Tensor, step: Tensor | float = 0.0) -> dict[str, Tensor]:
        """The picture that comes out."""
        x = first(self.stages[0](self.enter(sample)))
        x = first(self.stages[1](hidden=x))
        small = first(self.stages[2](nn.functional.avg_pool2d(x, 2), gain=0.5))
        x = x + nn.functional.interpolate(small, scale_factor=2.0)
        return {"picture": x + self.mixer(x.mean((2, 3)) + step)[..., None, None]}


def first(output: Any) -> Tensor:
    """The first tensor in what a module gives."""
    if isinstance(output, Tensor):
        return output
    return next(iter(output.values())) if isinstance(output, dict) else output[0]


KINDS = ("plain", "tuple", "dict", "named", "output", "in place")
PLACES = {
    Site("resid_post", 0): At("stages.0", axes=IMAGE, width=D),
    Site("mlp_out", 0): At("stages.0", axes=IMAGE, width=D, delta=True),
    Site("resid_pre", 1): At("stages.1", "input", axes=IMAGE, width=D),
    Site("mlp_out", 1): At("stages.1", axes=IMAGE, width=D, delta=True),
    Site("resid_post", 2): At("stages.2", axes="batch d height width", width=D),
    Site("resid_mid", 2): At("mixer", axes="batch d"),
}


@cache
def painter(kind: str = "tuple") -> Painter:
    """A shared model; a test must leave it as it was."""
    torch.manual_seed(3)
    return Painter(kind).eval().requires_grad_(False)


def pictures(rows: int, *, size: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))


def edited_by_hand(x: Tensor, plans: Sequence[Plan | None], saes: dict[str, SAE], site: Site) -> Tensor:
    """What is added to ``batch pos d``, position by position."""
    dx = torch.zeros_like(x)
    for row, plan in enumerate(plans):
        rules = [rule for rule in (plan.rules if plan else ()) if saes[rule.sae].site == site]
        for position in range(x.shape[1] if rules else 0):
            token = {"real": True, "special": False, "covers": [True] * len(rules), "absolute": position, "since": None}
            before = x[row, position].tolist()
            after = tell(before, token, rules, {rule.sae: saes[rule.sae] for rule in rules}).x
            dx[row, position] = torch.tensor(after) - torch.tensor(before)
    return dx


@contextmanager
def by_hand(
    model: nn.Module, places: dict[Site, At], plans: Sequence[Plan | None], saes: Sequence[SAE]
) -> Iterator[dict[Site, Tensor]]:
    """Steer with plain hooks; yields what the SAEs read, before edits."""
    named, read, handles, given = {sae.name: sae for sae in saes}, {}, [], {}

    def edit(site: Site, whole: Tensor, minus: Tensor | float = 0.0) -> Tensor:
        axes = places[site].axes
        image = axes == IMAGE
        lay = (lambda t: t.flatten(2).transpose(1, 2)) if image else lambda t: t[:, None] if t.ndim == 2 else t
        x = lay(whole - minus)
        read[site] = x.clone()
        dx = edited_by_hand(x, plans, named, site)
        return whole + (dx.transpose(1, 2).reshape(whole.shape) if image else dx.reshape(whole.shape))

    def before(site: Site, at: At) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden"]
            if at.delta:
                given[site] = x.clone()
                return None
            return ((edit(site, x), *args[1:]), kwargs) if args else (args, kwargs | {"hidden": edit(site, x)})

        return hook

    def after(site: Site, at: At) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            x = edit(site, first(output), given[site] if at.delta else 0.0)
            if isinstance(output, Tensor):
                return x
            if isinstance(output, Named):
                return output._replace(sample=x)
            if isinstance(output, tuple):
                return (x, *output[1:])
            return type(output)({**output, next(iter(output)): x})

        return hook

    # where several share a module: the input, then what is given is kept in mind, then the update, then the whole
    order = sorted(places.items(), key=lambda item: (item[1].side == "output", not item[1].delta))
    for site, at in order:
        module = model.get_submodule(at.path)
        if at.side == "input" or at.delta:
            handles.append(module.register_forward_pre_hook(before(site, at), with_kwargs=True))
        if at.side == "output":
            handles.append(module.register_forward_hook(after(site, at)))
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def paint(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images, step=torch.zeros(len(images), 1))["picture"]


class Writer(nn.Module):
    """A small GPT as people write them: no cache, no mask, logits and a loss."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(tiny.VOCAB, 16), nn.Embedding(32, 16)
        self.h = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(16, tiny.VOCAB)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, None]:
        """Logits and loss."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        causal = nn.Transformer.generate_square_subsequent_mask(idx.shape[1])
        for block in self.h:
            x = block(x, src_mask=causal, is_causal=True)
        return self.head(x), None

    @torch.no_grad()
    def generate(self, idx: Tensor, n: int) -> Tensor:
        """Greedily, a whole pass per token."""
        for _ in range(n):
            idx = torch.cat([idx, self(idx)[0][:, -1:].argmax(-1)], 1)
        return idx


@cache
def writer() -> Writer:
    torch.manual_seed(5)
    return Writer().eval().requires_grad_(False)


class Stepwise(nn.Module):
    """Takes its tokens out of a dict, and treats each of them alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.wte, self.inner = nn.Embedding(tiny.VOCAB, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh())

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """A stream."""
        return self.inner(self.wte(batch["tokens"]) * 4)


class Summary(nn.Module):
    """One vector for a whole text."""

    def __init__(self):
        super().__init__()
        self.wte, self.inner = nn.Embedding(tiny.VOCAB, 16), nn.Linear(16, 16)

    def forward(self, idx: Tensor) -> Tensor:
        """The vector."""
        return self.inner(self.wte(idx).mean(1))


@cache
def unet() -> UNet2DConditionModel:
    """Random, with the blocks of SDXL's: transformers between convolutions, conditioned on a text."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
    ).eval().requires_grad_(False)  # fmt: skip


@cache
def vit() -> transformers.ViTModel:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=tiny.D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16,
        patch_size=4,
    )  # fmt: skip
    return transformers.ViTModel(config).eval().requires_grad_(False)
