"""What a kernel works on: the slice of one SAE that the rules at one site need, laid out in columns.

A column is one latent of one rule. Rules of different rows may set the same latent, so a latent may have several
columns, but it is encoded once: ``encoded`` lists the distinct latents, ``source`` says which of them a column reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saeguard.errors import MissingMaximum
from saeguard.ops import Amount
from saeguard.plans import Rule
from saeguard.sae import SAE
from saeguard.triggers import AnyActive

TINY = torch.finfo(torch.float32).tiny
"""Stands for the norm of a zero vector, so that no bound at infinity is multiplied by zero."""


@dataclass(frozen=True, eq=False)
class Part:
    """One SAE's share of the edits at one site; ``rules`` below counts this part's rules only."""

    sae: SAE
    """Narrowed to the distinct latents of this part, on the site's device."""
    reads: bool
    """False where every rule adds a constant: then nothing is encoded."""
    source: Int[Tensor, " k"]
    rule: Int[Tensor, " k"]
    scale: Float[Tensor, " k"]
    shift: Float[Tensor, " k"]
    floor: Float[Tensor, " k"]
    lo: Float[Tensor, " k"]
    hi: Float[Tensor, " k"]
    by_norm: Bool[Tensor, " k"] | None
    """Columns whose amounts are multiples of the norm of x, or None where there are none."""
    W_dec: Float[Tensor, "k d_out"]
    triggers: tuple[tuple[int, AnyActive, Int[Tensor, " _"]], ...]
    """Rule, trigger, and which encoded latents it watches."""
    yields: tuple[tuple[Int[Tensor, " _"], int], ...]
    """Columns that stay as they are wherever the other rule applies, because its priority is higher."""

    def to(self, device: torch.device) -> "Part":
        """A copy on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value.to(device) for name, value in moved.items() if isinstance(value, Tensor)}
        return replace(
            self,
            sae=self.sae.to(device=device),
            triggers=tuple((rule, trigger, watched.to(device)) for rule, trigger, watched in self.triggers),
            yields=tuple((columns.to(device), rule) for columns, rule in self.yields),
            **moved,
        )


def lay_out(sae: SAE, rules: Sequence[Rule], rows: Sequence[frozenset[int] | None]) -> Part:
    """Build the part for ``rules``, which all name ``sae`` and one site.

    ``rows`` says to which plans of the batch a rule belongs (None: to all), so that priorities are settled only
    between rules that can meet in one row. Raises `LatentOutOfRange`, `MissingMaximum`.
    """
    for rule in rules:
        sae.check_latents(rule.latents + (rule.trigger.latents if rule.trigger else ()))
    columns = [(index, latent) for index, rule in enumerate(rules) for latent in rule.latents]
    watched = [latent for rule in rules if rule.trigger for latent in rule.trigger.latents]
    distinct = list(dict.fromkeys([latent for _, latent in columns] + watched))
    place = {latent: index for index, latent in enumerate(distinct)}
    narrowed = sae.narrow(distinct).to(device="cpu")
    if not sae.ranks:  # a few latents; a ranking encoder is whole, and is made float32 a chunk at a time
        narrowed = narrowed.to(dtype=torch.float32)
    source = _index([place[latent] for _, latent in columns])
    return Part(
        sae=narrowed,
        reads=any(rule.lowered.reads or rule.trigger for rule in rules),
        source=source,
        rule=_index([index for index, _ in columns]),
        by_norm=_by_norm(rules),
        W_dec=narrowed.W_dec[source].float(),
        triggers=tuple(
            (index, rule.trigger, _index([place[latent] for latent in rule.trigger.latents]))
            for index, rule in enumerate(rules)
            if rule.trigger
        ),
        yields=_yields(rules, rows, columns),
        **_numbers(narrowed, rules, place),
    )


def _index(numbers: Sequence[int]) -> Int[Tensor, " n"]:
    return torch.tensor(list(numbers), dtype=torch.long)


def _by_norm(rules: Sequence[Rule]) -> Bool[Tensor, " k"] | None:
    flags = [rule.lowered.unit == "norm" for rule in rules for _ in rule.latents]
    return torch.tensor(flags, dtype=torch.bool) if any(flags) else None


def _numbers(sae: SAE, rules: Sequence[Rule], place: Mapping[int, int]) -> dict[str, Float[Tensor, " k"]]:
    """The five numbers of each column, those in units of the maximum already multiplied out."""
    numbers: dict[str, list[float]] = {"scale": [], "shift": [], "floor": [], "lo": [], "hi": []}
    for rule in rules:
        lowered, k = rule.lowered, len(rule.latents)
        unit = [1.0] * k if lowered.unit != "max" else _maxima(sae, rule, place)
        numbers["scale"] += _spread(lowered.scale, k)
        for name in ("shift", "floor", "lo", "hi"):
            numbers[name] += [a * b for a, b in zip(_spread(getattr(lowered, name), k), unit, strict=True)]
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in numbers.items()}


def _spread(amount: Amount, k: int) -> list[float]:
    return list(amount) if isinstance(amount, tuple | list) else [amount] * k


def _maxima(sae: SAE, rule: Rule, place: Mapping[int, int]) -> list[float]:
    mine = _index([place[latent] for latent in rule.latents])
    found = sae.maximum[mine].float().tolist() if sae.maximum is not None else [0.0]
    if min(found, default=1.0) <= 0:
        raise MissingMaximum(
            f'{rule.op} with unit="max" on {sae.name}',
            "this SAE records no maximum activation" if sae.maximum is None else "a latent's recorded maximum is 0",
            "Give amounts in activation units, or use latents that fired on the text the SAE was measured on.",
        )
    return found


def _yields(
    rules: Sequence[Rule], rows: Sequence[frozenset[int] | None], columns: list[tuple[int, int]]
) -> tuple[tuple[Int[Tensor, " _"], int], ...]:
    found = []
    for low, rule in enumerate(rules):
        for high, other in enumerate(rules):
            if rule.priority is None or other.priority is None or other.priority <= rule.priority:
                continue
            if not _meet(rows[low], rows[high]):
                continue
            shared = set(rule.latents) & set(other.latents)
            if shared:
                mine = [i for i, (index, latent) in enumerate(columns) if index == low and latent in shared]
                found.append((_index(mine), high))
    return tuple(found)


def _meet(a: frozenset[int] | None, b: frozenset[int] | None) -> bool:
    return a is None or b is None or bool(a & b)
