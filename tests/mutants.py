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


class _Rate:
    """A gate on the share of hot tokens so far, by hand: from activations to the tokens at which it is open."""

    def __init__(self, rate: float, fault: str):
        self.rate, self.fault = rate, fault
        self.column, self.mask = 0, None
        self.hot, self.counts = torch.zeros(0, 0), torch.zeros(0, 0)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Read the mask, and how much the cache holds."""
        cache = kwargs.get("past_key_values")
        self.column, self.mask = cache.get_seq_length() if cache is not None else 0, kwargs.get("attention_mask")

    def __call__(self, f: Tensor) -> Tensor:
        hot = (f > 0).any(-1).float()
        rows, width = hot.shape
        counts = torch.ones_like(hot) if self.mask is None else self.mask[:, self.column :].float()
        if self.fault == "zeroes column 0":
            hot[:, 0] = 0
        if self.fault == "pools over padding":
            counts = torch.ones_like(hot)
        if self.column == 0:
            self.hot, self.counts = torch.zeros(rows, 0), torch.zeros(rows, 0)
        kept = self.hot.shape[1] if self.fault == "never goes back" else self.column
        self.hot = torch.cat([self.hot[:, :kept], hot * counts], 1)
        self.counts = torch.cat([self.counts[:, :kept], counts], 1)
        total, n = self.hot.cumsum(1), self.counts.cumsum(1)
        if self.fault == "shares its state":
            total, n = total.sum(0, keepdim=True).expand(rows, -1), n.sum(0, keepdim=True).expand(rows, -1)
        opened = (total / n.clamp(min=1) > self.rate)[:, -width:]
        return opened & (width > 1) if self.fault == "decides by width" else opened


@contextmanager
def gates(
    model: nn.Module, block: nn.Module, sae: SAE, latents: Sequence[int], value: float, *, rate: float, fault: str
) -> Iterator[None]:
    """Opens a row's gate while the share of its tokens with any of ``latents`` is above ``rate``.

    Nothing is wrong where ``fault`` is "". "pools over padding" is DSG's mean over the padded row, "decides by width"
    its decision at passes of more than one column, "zeroes column 0" its way to spare BOS; "shares its state" pools the
    rows of a batch, and "never goes back" keeps what was seen of tokens that were thrown away.
    """
    gate = _Rate(rate, fault)
    handle = model.register_forward_pre_hook(gate.before, with_kwargs=True)
    try:
        with _clamp(block, sae, latents, value, gate):
            yield
    finally:
        handle.remove()


@contextmanager
def _rewritten(block: nn.Module, write: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Puts ``write(x)`` in place of what a block gives."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (write(output[0]), *output[1:]) if isinstance(output, tuple) else write(output)

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def swaps(block: nn.Module, sae: SAE, weights: Tensor, fault: str) -> Any:
    """IBM's swap on a TopK SAE, with nothing wrong (``fault`` is "") or one of three things.

    "keeps the error" adds what the SAE does not explain. "takes weighted values" keeps the weighted pre-activations of
    those who fire. "ranks over the batch" lets as many fire as there are tokens times k, wherever they are.
    """

    def write(x: Tensor) -> Tensor:
        pre = x @ sae.W_enc + sae.b_enc
        weighted = pre * weights
        if fault == "ranks over the batch":
            least = weighted.flatten().topk((sae.top_k or 1) * x.shape[:2].numel()).values[-1]
        else:
            least = weighted.topk(sae.top_k or 1, dim=-1).values[..., -1:]
        fires = (weighted >= least) & (weighted > 0)
        x_hat = torch.where(fires, weighted if fault == "takes weighted values" else pre, 0.0) @ sae.W_dec + sae.b_dec
        return x_hat + x - sae.decode(sae.encode(x)) if fault == "keeps the error" else x_hat

    return _rewritten(block, write)


def hot_tokens(block: nn.Module, sae: SAE, latents: Sequence[int], value: float, fault: str) -> Any:
    """DSG's clamp: where any of the latents is active all of them become ``value``.

    Nothing is wrong where ``fault`` is "". "only the active" leaves alone those of them that are silent at the token,
    which is Farrell's clamp.
    """
    index = list(latents)

    def write(x: Tensor) -> Tensor:
        f = sae.encode(x)[..., index]
        hot = (f > 0) if fault == "only the active" else (f > 0).any(-1, keepdim=True).expand_as(f)
        return x + torch.where(hot, value - f, 0.0) @ sae.W_dec[index]

    return _rewritten(block, write)


def last_column(block: nn.Module, sae: SAE, latents: Sequence[int], value: float) -> Any:
    """Edits column -1 of every pass for the last token of the prompt, whatever stands there."""
    return _clamp(
        block, sae, latents, value,
        lambda f: (torch.arange(f.shape[1]) == f.shape[1] - 1).expand(f.shape[:2]),
    )  # fmt: skip


def takes_out_in_turn(block: nn.Module, sae: SAE, latents: Sequence[int]) -> Any:
    """Takes decoder rows out of the stream one after the other: a later one puts parts of an earlier one back."""

    def write(x: Tensor) -> Tensor:
        for row in sae.W_dec[list(latents)]:
            x = x - (x @ row)[..., None] * row / (row @ row)
        return x

    return _rewritten(block, write)
