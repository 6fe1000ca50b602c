"""Calls that others make of a guarded model: a pipeline, an evaluation harness, a server that knows only the model.

    with guard(model, rows=["pupils", "teachers"]):
        model.generate(**two)                 # model.generate is guard.generate: stopped, refused, on record
    with guard.calls("pupils"):
        pipe("How do cells divide?")          # the same for batches of any size, under one policy
        lm.loglikelihood(requests)            # passes, of however many rows, are edited, or refused where rows may end

What stands for ``model.generate`` while a guardrail is attached looks whether its caller is inside of such a block.
"""

import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from saeguard.engines.watched import Watched, restore
from saeguard.errors import UnsupportedMode
from saeguard.guarding.attached import Attached
from saeguard.guarding.outcome import Guarded


@runtime_checkable
class Lender(Protocol):
    """A guardrail, as far as what stands for ``model.generate`` knows it."""

    model: nn.Module

    def generate(
        self, *args: Any, rows: str | Sequence[str] | None = None, tenant: str | None = None, **kwargs: Any
    ) -> Guarded:
        """``model.generate`` under policies."""
        ...


@dataclass(eq=False)
class Loan:
    """A block in which the model's own ``generate`` is the guardrail's."""

    lender: Lender
    attached: Attached
    rows: str | Sequence[str] | None
    tenant: str | None
    is_over: bool = False
    """For whoever has a copy of the context: a thread or task that was started inside and lives on."""


_LOANS: contextvars.ContextVar[tuple[Loan, ...]] = contextvars.ContextVar("saeguard_loans", default=())


@contextmanager
def lent(lender: Lender, attached: Attached, rows: str | Sequence[str] | None, tenant: str | None) -> Iterator[None]:
    """Inside the block ``generate`` of the lender's model, called in this thread or task, is the lender's."""
    mine = Loan(lender, attached, rows, tenant)
    _LOANS.set((*_LOANS.get(), mine))
    try:
        yield
    finally:
        mine.is_over = True
        _LOANS.set(tuple(loan for loan in _LOANS.get() if loan is not mine))


def stand_in(lender: Lender) -> Callable[[], None]:
    """Let ``lender.model.generate`` look for loans; what is returned takes it off again."""
    model: Any = lender.model
    before, generate = model.__dict__.get("generate"), getattr(model, "generate", None)
    if not callable(generate):
        return lambda: None

    def looking(*args: Any, **kwargs: Any) -> Any:
        loan = _loan_of(lender)
        if loan is None or _is_answering(loan):
            return generate(*args, **kwargs)
        _check_tensor(model, args, kwargs)
        return lender.generate(*args, rows=loan.rows, tenant=loan.tenant, **kwargs).sequences

    standing = Watched(model, looking)
    model.__dict__["generate"] = standing
    return lambda: restore(model, standing, before)


def _loan_of(lender: Lender) -> Loan | None:
    mine = (loan for loan in reversed(_LOANS.get()) if loan.lender is lender and not loan.is_over)
    return next(mine, None)


def _is_answering(loan: Loan) -> bool:
    """Whether the innermost block is none that lends: the lender's ``generate`` itself, or one of its `rows`."""
    table = loan.attached.table
    return table is not None and table.lent is None


def _check_tensor(model: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    config = args[1] if len(args) > 1 and not isinstance(args[1], Tensor) else kwargs.get("generation_config")
    asked = kwargs.get("return_dict_in_generate")
    for source in (config, getattr(model, "generation_config", None)):
        asked = getattr(source, "return_dict_in_generate", None) if asked is None else asked
    if asked:
        raise UnsupportedMode(
            "generate of a guarded model with return_dict_in_generate",
            "the scores of a row that was refused would not be those of its answer",
            "Leave it out, or call guard.generate(...), which returns the decisions.",
        )
