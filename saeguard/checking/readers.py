"""What the model's own modules read behind a site, seen without saeguard's hooks.

The output of block L is what block L + 1 reads, or the final norm behind the last block. So an edit can be watched
where it has to arrive, and a site table that names another block is found out. Sites inside of a block have no such
reader; there the engine's own place is used, and `Reader.independent` is False. Sites that are computed from what a
module carries (between attention and MLP, before a gain) are carried by nobody: `Reader.carries` is False.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from saeguard.engines.base import Engine
from saeguard.errors import UnsupportedModel
from saeguard.scoring.logit_lens import unembedding
from saeguard.sites import Site


@dataclass(frozen=True, eq=False)
class Reader:
    """A module whose input (or output) is the stream at a site."""

    module: nn.Module
    side: str
    path: str
    independent: bool
    carries: bool = True

    @contextmanager
    def through(self, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Pass what it reads through ``change``, behind everybody else's hooks; None leaves the stream as it is."""

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
            handle = self.module.register_forward_pre_hook(on_input, with_kwargs=True)
        else:
            handle = self.module.register_forward_hook(on_output)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def seen(self) -> Iterator[list[Tensor]]:
        """What it reads, pass by pass."""
        passes: list[Tensor] = []

        def keep(x: Tensor) -> None:
            passes.append(x.detach().clone())

        with self.through(keep):
            yield passes


def reader_of(model: nn.Module, engine: Engine, site: Site) -> Reader:
    """The module that reads ``site`` next. Raises what `Engine.resolve` raises."""
    found = _blocks(model)
    if found is not None and site.stream in ("resid_pre", "resid_post"):
        path, blocks = found
        layer = site.layer + (site.stream == "resid_post")
        if layer < len(blocks):
            return Reader(blocks[layer], "input", f"{path}.{layer}", True)
        try:
            return Reader(unembedding(model).norm, "input", "the final norm", True)
        except UnsupportedModel:  # no norm behind the last block, or under a name that is not known
            pass
    place = engine.resolve(site)
    return Reader(place.module, place.side, place.path, False, place.base is None and place.gain is None)


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The longest list of modules of one class; None where there is none, or two that are as long."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [(path, blocks) for path, blocks in lists if len({type(block) for block in blocks}) == 1]
    longest = max((len(blocks) for _, blocks in lists), default=0)
    found = [(path, blocks) for path, blocks in lists if len(blocks) == longest]
    return found[0] if len(found) == 1 else None
