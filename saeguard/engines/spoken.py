"""A generate call of TransformerLens, told by the token ids of its passes: it may return text, which has none."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saeguard.engines.base import Outcome, Pass, Request
from saeguard.errors import GuardNotApplied


@dataclass(frozen=True, eq=False)
class Spoken(Request):
    """A request, and the token ids of its passes, by the column at which they begin."""

    passes: list[tuple[int, Int[Tensor, "row pos"]]] = field(default_factory=list)

    @classmethod
    def of(cls, ids: Int[Tensor, "row pos"], eos: tuple[int, ...]) -> "Spoken":
        """The request to go on with ``ids``, one row each, until the tokens ``eos``."""
        rows, n = ids.shape
        return cls(
            rows=rows, copies=1, reorders=False, prompt_columns=n, output_columns=n, eos=eos, pad=(), drafts=False
        )

    def add(self, seen: Pass) -> None:
        """Note a pass, in place of what was passed from its column on."""
        while self.passes and self.passes[-1][0] >= seen.column:
            self.passes.pop()
        if seen.ids is not None:
            self.passes.append((seen.column, seen.ids))

    def outcome(self, output: Any) -> Outcome | None:
        """What the call did, if it made a pass. Raises `GuardNotApplied` where it returned other tokens than it fed."""
        if not self.passes:
            return None
        ids = torch.cat([ids for _, ids in self.passes], dim=1)
        given = output[0] if isinstance(output, tuple) else output
        written = given if isinstance(given, Tensor) else getattr(given, "sequences", ids)
        n = written.shape[1]
        if not written.is_floating_point() and not torch.equal(ids[:, :n], written[:, : ids.shape[1]].to(ids.device)):
            raise GuardNotApplied(
                "edits in a generate call of TransformerLens",
                "the tokens that it returned are not those of its passes",
                "Something else generated them: its output must not be used.",
            )
        answer = ids[:, self.prompt_columns :]
        ended = torch.isin(answer, torch.tensor(self.eos, dtype=ids.dtype, device=ids.device))
        before = (ended.cumsum(1) == 0).sum(1)  # an end token may be fed back while other rows go on; it never counts
        return Outcome(max(n - 1, ids.shape[1]), (self.prompt_columns + before).cpu())
