"""What the model's own modules read behind a site, seen without saeguard's hooks.

The output of block L is what block L + 1 reads. So an edit can be watched where it has to arrive, and a site table that
names another block is found out. Sites inside of a block have no such reader; there the engine's own place is used, and
`Reader.independent` is False. Sites that are computed from what a module carries (between attention and MLP, before a
gain) are carried by nobody: `Reader.carries` is False.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from saeguard.engines.base import Place


@dataclass(frozen=True, eq=False)
class Reader:
    """A module whose input (or output) is the stream at a site."""

    module: nn.Module
    side: str
    path: str
    independent: bool
    carries: bool = True

    @contextmanager
    def through(self, change: Callable[[Tensor], Tensor | None], *, first: bool = False) -> Iterator[None]:
        """Pass what it reads through ``change``; None leaves the stream as it is.

        Hooks that are there already run before it, and with ``first`` behind it.
        """

        def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            after = change(x)
            if after is None:
                return None
            return ((after, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": after})

        def on_output(module: nn.Module, args: Any, output: Any) -> Any:
            after = change(output[0] if isinstance(output, tuple) else output)
            if after is None:
                return None
            return (after, *output[1:]) if isinstance(output, tuple) else after

        if self.side == "input":
            handle = self.module.register_forward_pre_hook(on_input, with_kwargs=True, prepend=first)
        elif "__nnsight__" in vars(self.module):  # there edits stand inside of what takes the place of its forward
            from saeguard.engines.nnsight import hook_inside

            handle = hook_inside(self.module, on_output)
        else:
            handle = self.module.register_forward_hook(on_output, prepend=first)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def seen(self, *, first: bool = False) -> Iterator[list[Tensor]]:
        """What it reads, pass by pass."""
        passes: list[Tensor] = []

        def keep(x: Tensor) -> None:
            passes.append(x.detach().clone())

        with self.through(keep, first=first):
            yield passes


def reader_of(model: nn.Module, place: Place, last: nn.Module | None = None) -> Reader:
    """The module of ``model`` that reads what is at ``place`` next; behind the last block that is ``last``."""
    found = _blocks(model, place.module)
    if found is not None and place.site.stream in ("resid_pre", "resid_post"):
        path, blocks = found
        layer = place.site.layer + (place.site.stream == "resid_post")
        if layer < len(blocks) and not _is_inside(blocks[layer], place.module):
            return Reader(blocks[layer], "input", f"{path}.{layer}", True)
        if layer == len(blocks) and last is not None:
            return Reader(last, "input", "the final norm", True)
    return Reader(place.module, place.side, place.path, False, place.base is None and place.gain is None)


def _blocks(model: nn.Module, module: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The outermost list of modules that has ``module`` in it; None where there is none."""
    for path, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList) and any(part is module for part in blocks.modules()):
            return path, blocks
    return None


def _is_inside(block: nn.Module, module: nn.Module) -> bool:
    """Whether ``module`` is a part of ``block``, whose input then comes ahead of it."""
    return module is not block and any(part is module for part in block.modules())
