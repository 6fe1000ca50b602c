"""Scores of latents: named columns over one SAE's latents, with their units and where they came from.

A score is a function that returns a `ScoreTable`. Tables of one SAE join, filter and rank, whatever made them; a column
is NaN where a score has nothing to say of a latent (it never fired, it was not asked for).
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from saeguard import strict_json
from saeguard.archives import open_archive
from saeguard.errors import BrokenFile, ScoreMismatch
from saeguard.sae import SAE

SCHEMA = 1


@dataclass(frozen=True)
class Meaning:
    """What a column's numbers are: ``unit`` for people, ``source`` the paper's equation, ``higher`` what is better."""

    unit: str
    source: str
    higher: bool = True


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """``columns[name]`` holds one float per latent of the SAE, NaN where there is none.

    ``sae`` is the SAE's name and ``sae_fingerprint`` its weights'. ``provenance[name]`` says, in plain JSON values,
    from what a column was made: model, data fingerprint, settings, seed.
    """

    sae: str
    sae_fingerprint: str
    d_sae: int
    columns: Mapping[str, Float[Tensor, " d_sae"]]
    meanings: Mapping[str, Meaning]
    provenance: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        for name, column in self.columns.items():
            if tuple(column.shape) != (self.d_sae,) or name not in self.meanings:
                raise ScoreMismatch(
                    f"score {name!r} of {self.sae}",
                    f"it is {tuple(column.shape)} for {self.d_sae} latents, meaning {self.meanings.get(name)}",
                    "A column has one number per latent, and a meaning.",
                )

    @classmethod
    def of(
        cls, sae: SAE, columns: Mapping[str, tuple[Float[Tensor, " d_sae"], Meaning]], **provenance: Any
    ) -> "ScoreTable":
        """A table of ``sae`` whose columns share one provenance."""
        return cls(
            sae.name, sae.fingerprint(), sae.d_sae,
            {name: column.detach().float().cpu() for name, (column, _) in columns.items()},
            {name: meaning for name, (_, meaning) in columns.items()},
            {name: dict(provenance) for name in columns},
        )  # fmt: skip

    def join(self, *others: "ScoreTable") -> "ScoreTable":
        """All columns side by side; a later table's column takes the place of one of the same name.

        Raises `ScoreMismatch` for tables of another SAE.
        """
        joined = self
        for other in others:
            if other.sae_fingerprint != self.sae_fingerprint or other.d_sae != self.d_sae:
                raise ScoreMismatch(
                    f"joining scores of {self.sae} and {other.sae}",
                    "their weights differ, so latent numbers do not mean the same",
                    "Score both on one SAE.",
                )
            joined = replace(
                joined,
                columns={**joined.columns, **other.columns},
                meanings={**joined.meanings, **other.meanings},
                provenance={**joined.provenance, **other.provenance},
            )
        return joined

    def column(self, name: str) -> Float[Tensor, " d_sae"]:
        """One column. Raises `ScoreMismatch`."""
        if name not in self.columns:
            raise ScoreMismatch(
                f"score {name!r} of {self.sae}", f"this table has {', '.join(self.columns) or 'no columns'}",
                "Compute it first.",
            )  # fmt: skip
        return self.columns[name]

    def ranked(self, name: str, *, among: Iterable[int] | None = None) -> list[int]:
        """Latents with a number in ``name``, best first, ties by number."""
        values, sign = self.column(name).tolist(), -1.0 if self.meanings[name].higher else 1.0
        latents = range(self.d_sae) if among is None else among
        known = [latent for latent in latents if not math.isnan(values[latent])]
        return sorted(known, key=lambda latent: (sign * values[latent], latent))

    def row(self, latent: int) -> dict[str, float]:
        """Every score of one latent."""
        return {name: float(column[latent]) for name, column in self.columns.items()}

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        meta = {
            "schema": SCHEMA, "sae": self.sae, "sae_fingerprint": self.sae_fingerprint, "d_sae": self.d_sae,
            "meanings": {name: asdict(meaning) for name, meaning in self.meanings.items()},
            "provenance": {name: dict(given) for name, given in self.provenance.items()},
        }  # fmt: skip
        temporary = target.with_name(target.name + ".partial")
        save_file({name: column.contiguous() for name, column in self.columns.items()}, temporary,
                  metadata={"saeguard_scores": json.dumps(meta, sort_keys=True)})  # fmt: skip
        os.replace(temporary, target)
        return target

    @classmethod
    def load(cls, path: str | Path) -> "ScoreTable":
        """Read what `save` wrote. Raises `BrokenFile`."""
        archive = open_archive(Path(path))
        try:
            meta = strict_json.parse(archive.values["saeguard_scores"])
            if meta["schema"] != SCHEMA:
                raise ValueError(f"schema {meta['schema']!r}")
            meanings = {name: Meaning(**given) for name, given in meta["meanings"].items()}
            columns = {name: archive.read(name).clone() for name in archive.specs}
            provenance = {name: dict(given) for name, given in meta["provenance"].items()}
            return cls(meta["sae"], meta["sae_fingerprint"], meta["d_sae"], columns, meanings, provenance)
        except (AttributeError, KeyError, TypeError, ValueError, ScoreMismatch) as error:
            raise BrokenFile(f"scores {Path(path).name}", f"{type(error).__name__}: {error}", "Score again.") from error


def as_json(value: float) -> float | str | None:
    """A score as JSON has it: NaN is None, and what is infinite, as a ratio to nothing is, the text "inf" or "-inf"."""
    return None if math.isnan(value) else str(value) if math.isinf(value) else value


def pick(table: ScoreTable, names: Sequence[str]) -> ScoreTable:
    """The table with these columns only, in this order. Raises `ScoreMismatch`."""
    columns = {name: table.column(name) for name in names}
    return replace(
        table, columns=columns, meanings={name: table.meanings[name] for name in names},
        provenance={name: table.provenance.get(name, {}) for name in names},
    )  # fmt: skip
