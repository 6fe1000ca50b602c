"""Published faults, rebuilt from their descriptions, so that the laws are known to bite.

Each is a context manager that hooks the output of a model's block, edits some latents of an SAE, and gets one thing
wrong. The edit itself is right: x moves by (f' - f) @ W_dec.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saeguard import SAE

Choose = Callable[[Tensor], Tensor]
"""From activations ``batch pos k`` to the tokens to edit, ``batch pos`` or broadcast against it."""


@contextmanager
def _clamp(block: nn.Module, sae: SAE, latents: Sequence[int], value: float, choose: Choose) -> Iterator[None]:
    index = list(latents)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        f = sae.encode(x)[..., index]
        df = torch.where((f > 0) & choose(f)[..., None], value - f, 0.0)
        after = x + df @ sae.W_dec[index]
        return (after, *output[1:]) if isinstance(output, tuple) else after

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def zeroes_column_0(block: nn.Module, sae: SAE, latents: Sequence[int], value: float) -> Any:
    """Spares BOS by zeroing the activations of column 0 of every pass: after the prompt that is every token."""

    def choose(f: Tensor) -> Tensor:
        chosen = torch.ones(f.shape[:2], dtype=torch.bool)
        chosen[:, 0] = False
        return chosen

    return _clamp(block, sae, latents, value, choose)


def tells_phase_by_width(block: nn.Module, sae: SAE, latents: Sequence[int], value: float) -> Any:
    """Takes every pass of one column for generation and every other pass for the prompt; edits generated tokens."""
    return _clamp(block, sae, latents, value, lambda f: torch.full(f.shape[:2], f.shape[1] == 1))


def counts_columns(block: nn.Module, sae: SAE, latents: Sequence[int], value: float, *, first: int) -> Any:
    """Edits the first so many columns, padding included, instead of the first so many tokens."""
    return _clamp(block, sae, latents, value, lambda f: (torch.arange(f.shape[1]) < first).expand(f.shape[:2]))


def pools_over_padding(block: nn.Module, sae: SAE, latents: Sequence[int], value: float, *, rate: float) -> Any:
    """Opens a row's gate when the share of hot columns exceeds ``rate``, and counts padding as columns."""
    return _clamp(
        block, sae, latents, value, lambda f: ((f > 0).any(-1).float().mean(1) > rate)[:, None].expand(f.shape[:2])
    )


def edits_row_0_only(block: nn.Module, sae: SAE, latents: Sequence[int], value: float) -> Any:
    """Writes to row 0, as code that indexes ``output[0]`` does where the output is no longer a tuple."""
    return _clamp(block, sae, latents, value, lambda f: (torch.arange(f.shape[0]) == 0)[:, None].expand(f.shape[:2]))


@contextmanager
def leaks_rows(block: nn.Module, sae: SAE, latents: Sequence[int | None], value: float) -> Iterator[None]:
    """One latent per row is asked for, and all of them are set in every row."""
    everybody = [latent for latent in latents if latent is not None]
    with _clamp(block, sae, everybody, value, lambda f: torch.ones(f.shape[:2], dtype=torch.bool)):
        yield
