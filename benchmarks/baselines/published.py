"""DSG's hook as its published code behaves (arXiv 2504.08192), to show what that does in a deployment.

    f = encode(x);  f[:, 0, :] = 0                   meant for BOS, but said of a position
    err = x - decode(f)
    hot = any of S active                            per token, padding included
    rate = hot tokens / columns of the pass          columns count BOS and padding
    f[S] = -c at hot tokens of rows with rate > tau
    x' = decode(f) + err

With a cache a pass of decoding has one column, which is position 0: nothing is ever hot there. On the left padding
stands at position 0, and BOS counts; on the right padding dilutes the rate. The rate is of this pass alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saeguard import SAE
from saeguard.evaluating.subject import Verdict
from saeguard.training.activations import find_blocks


@dataclass(eq=False)
class PublishedHook:
    """A forward hook for the block that carries the SAE's site. ``c`` is in activation units."""

    sae: SAE
    latents: tuple[int, ...]
    c: float
    threshold: float
    opened: list[bool] = field(default_factory=list)
    """Per row, whether it was active in some pass since `forget`."""

    def __call__(self, block: nn.Module, args: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        changed = self.edit(x).to(x.dtype)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    def forget(self) -> None:
        """Before rows of which nothing has been seen."""
        self.opened = []

    def edit(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        """The equations above."""
        f = self.sae.encode(x)
        f[:, 0, :] = 0
        error = x.float() - self.sae.decode(f)
        hot, active = self.rate(f)
        own = list(self.latents)
        f[..., own] = torch.where((hot & active[:, None])[..., None], -self.c, f[..., own])
        told = active.tolist()
        self.opened = [a or b for a, b in zip(self.opened, told, strict=True)] if self.opened else told
        return self.sae.decode(f) + error

    def rate(self, f: Float[Tensor, "batch pos d_sae"]) -> tuple[Bool[Tensor, "batch pos"], Bool[Tensor, " batch"]]:
        """Hot tokens, and rows in which there are enough of them."""
        hot = (f[..., list(self.latents)] > 0).any(-1)
        return hot, hot.float().mean(1) > self.threshold


@dataclass(frozen=True, eq=False)
class Hooked:
    """A `Subject` with the published hook on it."""

    model: Any
    tokenizer: Any
    hook: PublishedHook

    @contextmanager
    def passes(self, prompt_tokens: Sequence[int]) -> Iterator[Callable[[], Sequence[Verdict]]]:
        """See `Subject`; what an earlier block has seen is forgotten, as the hook forgets it."""
        self.hook.forget()
        yield lambda: [Verdict(opened) for opened in self.hook.opened]

    def write(
        self, ids: Int[Tensor, "row column"], mask: Int[Tensor, "row column"], **options: Any
    ) -> tuple[Int[Tensor, "row columns"], Sequence[Verdict]]:
        """See `Subject`."""
        self.hook.forget()
        written = self.model.generate(input_ids=ids, attention_mask=mask, **options)
        return written, [Verdict(opened) for opened in self.hook.opened]


@contextmanager
def hooked(model: Any, tokenizer: Any, hook: PublishedHook) -> Iterator[Hooked]:
    """The model under the hook, for the block."""
    site = hook.sae.site
    assert site is not None
    assert site.stream == "resid_post", "the hook is for the output of a block"
    handle = find_blocks(model)[site.layer].register_forward_hook(hook)
    try:
        yield Hooked(model, tokenizer, hook)
    finally:
        handle.remove()


def published_threshold(hook: PublishedHook, streams: Sequence[Float[Tensor, "pos d_in"]]) -> float:
    """DSG's tau: numpy's 95th percentile of the rates of retain rows, each with its BOS zeroed."""
    rates = []
    for x in streams:
        f = hook.sae.encode(x[None])
        f[:, 0, :] = 0
        rates.append(float(hook.rate(f)[0].float().mean()))
    return float(torch.tensor(rates, dtype=torch.float64).quantile(0.95))
