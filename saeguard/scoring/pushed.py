"""One sweep over latents, each raised by the same amount at the last token of some prefixes, for all scores that only
look at the next token's probabilities then.

    f_j += factor M        M is what `next_token.MaxOf` names

A score is a `Reading` of those probabilities. Several of them share one pass per latent and prefix.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saeguard.sae import SAE
from saeguard.scoring.next_token import PREFIX, MaxOf, Prefix, amounts, provenance, read_prefixes, rows_at_once
from saeguard.scoring.sweep import Progress, chosen, spread, sweep, weights_of
from saeguard.scoring.table import Meaning, ScoreTable

FACTOR = 10.0
"""As published by both papers whose scores read this."""


@dataclass(frozen=True, eq=False)
class Reading:
    """``read`` turns log-probabilities, a row per latent, into one number per row and column of ``meanings``.

    ``asked`` is the score's name and settings, for the provenance; ``made_of`` is what else the numbers depend on.
    """

    read: Callable[[Prefix, Float[Tensor, "rows vocab"], list[int]], Mapping[str, Float[Tensor, " rows"]]]
    meanings: Mapping[str, Meaning]
    asked: Mapping[str, Any]
    made_of: Mapping[str, Any] = field(default_factory=dict)


def pushed(
    model: nn.Module,
    tokenizer: Any,
    sae: SAE,
    readings: Sequence[Reading],
    *,
    prefixes: Sequence[str] = (PREFIX,),
    latents: Sequence[int] | None = None,
    factor: float = FACTOR,
    of: MaxOf = "batch",
    batch: int | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> ScoreTable:
    """The columns of all readings, averaged over the prefixes. Raises `BindError`, `ScoreMismatch`."""
    wanted = chosen(sae, latents)
    read = read_prefixes(model, tokenizer, sae, prefixes)
    moved = amounts(read, factor, of)

    def step(rows: list[int]) -> dict[str, Tensor]:
        each: dict[str, list[Tensor]] = defaultdict(list)
        for prefix, amount in zip(read, moved, strict=True):
            log_p = prefix.log_p(amount[rows, None] * prefix.directions(rows))
            for reading in readings:
                for name, values in reading.read(prefix, log_p, rows).items():
                    each[name].append(values)
        return {name: torch.stack(values).mean(0) for name, values in each.items()}

    asked = [provenance(model, read, **reading.asked, factor=factor, of=of) for reading in readings]
    keys = [{**one, **reading.made_of} for one, reading in zip(asked, readings, strict=True)]
    key = keys[0] if len(keys) == 1 else {"readings": keys}
    found = sweep(
        wanted, step, batch=rows_at_once(read[0], batch), asked={**key, **weights_of(model, sae, checkpoint)},
        checkpoint=checkpoint, progress=progress,
    )  # fmt: skip
    tables = []
    for reading, one in zip(readings, asked, strict=True):
        columns = {name: (spread(sae, wanted, found[name]), meaning) for name, meaning in reading.meanings.items()}
        tables.append(ScoreTable.of(sae, columns, **one))
    return tables[0].join(*tables[1:])
