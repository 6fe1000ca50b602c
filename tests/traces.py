"""The oracles of the lifecycle tests: what a model and the process are made of, and which tokens a rule is about."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saeguard import Add, Plan, Rule, Run, Site
from saeguard.engines import inside, session
from tests.tiny import EOS, SPECIAL

SITE = Site("resid_post", 1)
_TABLES = tuple(name for name, table in vars(nn.Module()).items() if "hook" in name and isinstance(table, dict))


def make_up(model: nn.Module) -> list[Any]:
    """Every module's hooks in their order, flags and instance attributes; equal before and after a block."""
    found: list[Any] = [dict(session._OPEN), inside._INSIDE.get()]
    for path, module in model.named_modules(remove_duplicate=False):
        tables = {name: list(getattr(module, name).items()) for name in _TABLES}
        found.append((path, module, tables, list(vars(module)), module.training, module.forward))
    return found


def ambient() -> list[Any]:
    """Random state and modes of this thread."""
    modes = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")]
    return [torch.get_rng_state().numpy().tobytes(), torch.get_default_dtype(), *modes]


@contextmanager
def nothing_left(model: nn.Module) -> Iterator[None]:
    """Assert that what happens inside leaves the model and the process as they were."""
    before = make_up(model), ambient()

    yield

    assert make_up(model) == before[0]
    assert ambient() == before[1]


def add_plan(*latents: int, amount: float = 4.0, site: Site | str = SITE, **where: Any) -> Plan:
    """Edits every token that ``where`` selects, whatever its activations are."""
    return Plan((Rule("tiny", latents or (1, 2), Add(amount), site=Site.parse(site), **where),))


def fed(sequence: Tensor, columns: int) -> list[int]:
    """The tokens of one row that the model was given and whose output counted: up to, not with, the last one or EOS."""
    ids = sequence.tolist()
    return ids[: ids.index(EOS, columns)] if EOS in ids[columns:] else ids[:-1]


def should_edit(rule: Rule, ids: list[int], *, columns: int, real: list[bool] | None = None) -> tuple[int, ...]:
    """Absolute positions of ``ids`` that ``rule`` is about, one by one; ``columns`` is the width of the prompt."""
    found, position, generated = [], 0, 0
    for column, token in enumerate(ids):
        if real is not None and column < len(real) and not real[column]:
            continue
        phase = "prompt" if column < columns else "generated"
        counted = generated if rule.phase == "generated" else position
        wanted = rule.phase in ("all", phase) and (rule.special or token not in SPECIAL.values())
        inside = rule.start <= position and (rule.stop is None or position < rule.stop)
        if wanted and inside and (rule.first is None or counted < rule.first):
            found.append(position)
        position, generated = position + 1, generated + (phase == "generated")
    return tuple(found)


def edited(run: Run) -> list[tuple[tuple[tuple[int, ...], ...], ...]]:
    """``[rule][call][row]`` of absolute positions."""
    return [entry.edited_positions for entry in run.report.rules]


def union(rows: list[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sorted(set().union(*rows)))


def raiser(kind: type[BaseException], *, at: int = 1) -> Callable[..., None]:
    """A hook that raises at its ``at``-th call."""
    calls = iter(range(1, 10**9))

    def hook(*_: Any, **__: Any) -> None:
        if next(calls) == at:
            raise kind("boom")

    return hook
