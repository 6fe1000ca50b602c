"""Faults of a steering library, a model or an SAE, built in on purpose: each has to be caught by a claim of a check.

Each is a context manager around the check. Those of the editor change what it gives, or what it is told, and leave the
rest of saeguard as it is, its own report included.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from saeguard import SAE, Site, steering
from saeguard.editor import Edit, Editor, PartEdit
from saeguard.engines import watched
from saeguard.engines.base import Place
from saeguard.engines.hf import HuggingFace
from saeguard.engines.session import Session
from saeguard.kernels import pick, sliced
from saeguard.tokens import TokenBatch

Write = Callable[[Tensor, Edit, TokenBatch], Tensor]
"""From x, the right edit and the tokens to the wrong dx."""


@contextmanager
def _writes(write: Write, *, everywhere: bool = False) -> Iterator[None]:
    """The editor gives ``write``'s dx; ``everywhere`` takes all tokens for changed."""
    own = Editor.__call__

    def wrong(self: Editor, y: Any, tokens: Any, *rest: Any) -> Edit:
        edit = own(self, y, tokens, *rest)
        changed = torch.ones_like(edit.changed) if everywhere else edit.changed
        return replace(edit, dx=write(y, edit, tokens), changed=changed)

    with patch.object(Editor, "__call__", wrong):
        yield


@contextmanager
def _is_told(change: Callable[[TokenBatch], TokenBatch]) -> Iterator[None]:
    """The editor is told something else of the tokens."""
    own = Editor.__call__

    def misled(self: Editor, y: Any, tokens: Any, *rest: Any) -> Edit:
        return own(self, y, change(tokens), *rest)

    with patch.object(Editor, "__call__", misled):
        yield


@contextmanager
def _steers_with(change: Callable[[SAE], SAE]) -> Iterator[None]:
    """Steering uses other weights than the SAE has."""
    own = steering._corrected

    def corrected(name: str, sae: SAE, *rest: Any) -> SAE:
        return change(own(name, sae, *rest))

    with patch.object(steering, "_corrected", corrected):
        yield


def wrong_sign(model: nn.Module) -> Any:
    return _writes(lambda x, edit, tokens: -edit.dx)


def edits_twice(model: nn.Module) -> Any:
    return _writes(lambda x, edit, tokens: 2 * edit.dx)


def row_0_only(model: nn.Module) -> Any:
    """What indexing ``output[0]`` does where the output is no tuple."""
    return _writes(lambda x, edit, tokens: edit.dx * (torch.arange(len(x)) == 0)[:, None, None])


def prefill_only(model: nn.Module) -> Any:
    return _writes(lambda x, edit, tokens: edit.dx * (tokens.column == 0))


def decoding_only(model: nn.Module) -> Any:
    return _writes(lambda x, edit, tokens: edit.dx * (tokens.column > 0))


def spares_column_0(model: nn.Module) -> Any:
    """Spares BOS by its column, which in decoding is every new token."""
    return _writes(lambda x, edit, tokens: edit.dx * (torch.arange(x.shape[1]) > 0)[None, :, None])


def means_over_rows(model: nn.Module) -> Any:
    return _writes(lambda x, edit, tokens: edit.dx.mean(0, keepdim=True).expand_as(edit.dx))


def rounds_in_bfloat16(model: nn.Module) -> Any:
    return _writes(lambda x, edit, tokens: edit.dx.bfloat16().float())


def keeps_the_norm(model: nn.Module) -> Any:
    """Brings x' back to the length of x."""

    def write(x: Tensor, edit: Edit, tokens: TokenBatch) -> Tensor:
        after = x + edit.dx
        return after * (x.norm(dim=-1, keepdim=True) / after.norm(dim=-1, keepdim=True)) - x

    return _writes(write)


def rebuilds_the_stream(model: nn.Module) -> Any:
    """Adds the error to the reconstruction in place of a delta: rounding at every token."""
    return _writes(lambda x, edit, tokens: edit.dx + ((x * 0.1 + 0.7) - 0.7) / 0.1 - x, everywhere=True)


def counts_padding(model: nn.Module) -> Any:
    """Takes padding for tokens, and columns for positions."""

    def change(tokens: TokenBatch) -> TokenBatch:
        columns = torch.arange(tokens.column, tokens.column + tokens.real.shape[1]).expand_as(tokens.absolute)
        return replace(tokens, real=torch.ones_like(tokens.real), absolute=columns, _selected={})

    return _is_told(change)


def positions_are_columns(model: nn.Module) -> Any:
    def change(tokens: TokenBatch) -> TokenBatch:
        columns = torch.arange(tokens.column, tokens.column + tokens.real.shape[1]).expand_as(tokens.absolute)
        return replace(tokens, absolute=columns, _selected={})

    return _is_told(change)


def edits_bos(model: nn.Module) -> Any:
    return _is_told(lambda tokens: replace(tokens, special=torch.zeros_like(tokens.real), _selected={}))


def decoder_transposed(model: nn.Module) -> Any:
    return _steers_with(lambda sae: replace(sae, W_dec=sae.W_dec.T.contiguous()))


def decoder_rescaled(model: nn.Module) -> Any:
    return _steers_with(lambda sae: replace(sae, W_dec=sae.W_dec / sae.W_dec.norm(dim=-1, keepdim=True)))


def latents_off_by_one(model: nn.Module) -> Any:
    return _steers_with(lambda sae: replace(sae, W_dec=sae.W_dec.roll(1, 0)))


def threshold_forgotten(model: nn.Module) -> Any:
    return _steers_with(lambda sae: replace(sae, activation="relu", threshold=None))


def encoder_in_other_units(model: nn.Module) -> Any:
    return _steers_with(lambda sae: replace(sae, W_enc=sae.W_enc * 2))


@contextmanager
def swapped_layer(model: nn.Module) -> Iterator[None]:
    """The site table names the next block."""
    own = HuggingFace.resolve

    def resolve(self: HuggingFace, site: Site) -> Place:
        last = model.config.num_hidden_layers - 1  # type: ignore[union-attr]
        return replace(own(self, Site(site.stream, min(site.layer + 1, last))), site=site)

    with patch.object(HuggingFace, "resolve", resolve):
        yield


@contextmanager
def dead_hook(model: nn.Module) -> Iterator[None]:
    """A hook is registered, and on a module that nobody calls."""
    own = Place.attach

    def attach(self: Place, change: Any) -> Any:
        return own(replace(self, module=nn.Identity()), change)

    with patch.object(Place, "attach", attach):
        yield


@contextmanager
def dies_after_the_prompt(model: nn.Module) -> Iterator[None]:
    """The module is replaced while the model decodes: its hook runs in the first pass only."""
    own = Place.attach

    def attach(self: Place, change: Any) -> Any:
        return own(self, lambda x: x if x.shape[1] == 1 else change(x))

    with patch.object(Place, "attach", attach):
        yield


@contextmanager
def hook_for_tuples(model: nn.Module) -> Iterator[None]:
    """A hook that returns something only where the block's output is a tuple: what it computes elsewhere is lost."""

    def attach(self: Place, change: Any) -> Any:
        def on_output(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            change(output)
            return None

        return self.module.register_forward_hook(on_output)

    with patch.object(Place, "attach", attach):
        yield


@contextmanager
def every_row_is_covered(model: nn.Module) -> Iterator[None]:
    """Rows without a plan get everybody's."""
    own = steering.Run.cover
    with patch.object(steering.Run, "cover", lambda self, *args: torch.ones_like(own(self, *args))):
        yield


@contextmanager
def report_lies(model: nn.Module) -> Iterator[None]:
    """Edits are made and not written down."""
    own = PartEdit.sizes
    with patch.object(PartEdit, "sizes", lambda self: tuple(torch.zeros_like(part) for part in own(self))):
        yield


@contextmanager
def fast_kernel_is_off(model: nn.Module) -> Iterator[None]:
    """The fast kernel takes away what it should add; the reference does not."""

    def edit(*args: Any) -> Any:
        dx, df, scale = sliced.edit(*args)
        return -dx, df, scale

    with patch.dict(pick.KERNELS, sliced=replace(pick.KERNELS["sliced"], sliced=edit)):
        yield


@contextmanager
def hooks_stay(model: nn.Module) -> Iterator[None]:
    with patch.object(Session, "_detach", lambda self, site: self._handles.pop(site)):
        yield


@contextmanager
def hooks_stay_after_an_exception(model: nn.Module) -> Iterator[None]:
    """No ``finally``: a block that an exception ends leaves one hook behind."""
    own = steering.leave

    def leave(session: Session, participant: Any) -> None:
        own(session, participant)
        if sys.exc_info()[0] is not None:
            model.register_forward_hook(lambda module, args, output: None)

    with patch.object(steering, "leave", leave):
        yield


@contextmanager
def generate_is_not_restored(model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for name in ("saeguard.engines.session", watched.__name__):
            stack.enter_context(patch(f"{name}.restore", lambda *args: None))
        yield
    model.__dict__.pop("generate", None)


@contextmanager
def weights_are_changed(model: nn.Module) -> Iterator[None]:
    """A block leaves its edit in the weights."""
    own = steering.leave

    def leave(session: Session, participant: Any) -> None:
        own(session, participant)
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)

    with patch.object(steering, "leave", leave):
        yield


@contextmanager
def dropout_is_on(model: nn.Module) -> Iterator[None]:
    """The model was left in training mode."""
    handle = model.get_submodule("model.norm").register_forward_hook(
        lambda module, args, output: nn.functional.dropout(output, 0.1, module.training)
    )
    model.train()
    try:
        yield
    finally:
        handle.remove()
        model.eval()


@contextmanager
def compiled_too_early(model: nn.Module) -> Iterator[None]:
    """The model was compiled and called before anything was hooked."""
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend="eager")
    try:
        with torch.no_grad():
            compiled(torch.ones(1, 4, dtype=torch.long))
        yield
    finally:
        torch._dynamo.reset()
