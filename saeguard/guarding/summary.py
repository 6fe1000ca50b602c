"""How many requests of a log were decided how, and whether the guard ran, per hour or day and in all."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from saeguard.guarding.chain import Entry
from saeguard.guarding.segments import SEAMS

Period = Literal["minute", "hour", "day", "month"]
_SHOWN = {"minute": len("2026-11-23T10:15"), "hour": len("2026-11-23T10"), "day": len("2026-11-23"), "month": 7}


@dataclass
class Counts:
    """Requests by decision, by guard status, and of those how many went by the guard; what dead writers lost."""

    allow: int = 0
    steer: int = 0
    refuse: int = 0
    error: int = 0
    ran: int = 0
    partial: int = 0
    not_run: int = 0
    bypassed: int = 0
    lost_bytes: int = 0

    @property
    def requests(self) -> int:
        """All records, those of lost lines among them."""
        return self.ran + self.partial + self.not_run

    def add(self, entry: Entry) -> None:
        """Count one more entry."""
        record = entry.record
        for name in (record.decision, record.guard_status):
            setattr(self, name, getattr(self, name) + 1)
        self.bypassed += record.bypassed
        self.lost_bytes += record.lost_bytes

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)))


def summarise(entries: Iterable[Entry], *, by: Period = "day") -> dict[str, Counts]:
    """The counts of each period that has requests, in the order of the log; periods are named as times in UTC begin."""
    found: dict[str, Counts] = {}
    for entry in entries:
        if entry.record in SEAMS:  # no request
            continue
        found.setdefault(entry.ts[: _SHOWN[by]], Counts()).add(entry)
    return found
