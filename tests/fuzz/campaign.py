"""Fuzz one target for a while, outside the suite: python -m tests.fuzz.campaign TARGET --runs 100000 --seconds 60

With atheris installed (a Linux wheel of few Python versions) and ``--atheris`` its coverage leads the way; otherwise
mutations of the corpus do. An input that raises what is not promised, or takes more than a second, is written into the
corpus, named by its hash, where the tests find it until it is fixed.
"""

import argparse
import hashlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from tests.fuzz.mutate import mutate
from tests.fuzz.targets import CORPUS, TARGETS, Target

SLOW_S = 1.0


@dataclass
class Found:
    """How many inputs ran, how many were read in full, and what went wrong, each kind once."""

    runs: int = 0
    read: int = 0
    slowest_s: float = 0.0
    crashes: dict[str, bytes] = field(default_factory=dict)


def inputs(target: Target, seed: int) -> Iterator[bytes]:
    """Endless, and the same for one seed."""
    random, seeds = Random(seed), target.seeds()
    while True:
        yield mutate(random, random.choice(seeds), seeds)


def attempt(target: Target, data: bytes, found: Found) -> None:
    """Run one input and note what it did."""
    given, before = target.put(data), time.process_time()
    try:
        found.read += target.survives(given)
    except Exception as error:
        found.crashes.setdefault(where(error), data)
    took = time.process_time() - before
    if took > SLOW_S:
        found.crashes.setdefault(f"{took:.1f} s", data)
    found.slowest_s = max(found.slowest_s, took)
    found.runs += 1


def where(error: BaseException) -> str:
    """The error's kind, and the line of ours that it came through last."""
    at, here = error.__traceback__, ""
    while at is not None:
        name = at.tb_frame.f_code.co_filename
        here = f"{name.rpartition('/')[2]}:{at.tb_lineno}" if "saeguard" in name else here
        at = at.tb_next
    return f"{type(error).__name__} at {here}: {str(error)[:200]}"


def campaign(target: Target, runs: int, seconds: float, seed: int = 0) -> Found:
    """Mutations of the corpus, until either limit."""
    found, end = Found(), time.monotonic() + seconds
    for data in inputs(target, seed):
        if found.runs >= runs or time.monotonic() > end:
            break
        attempt(target, data, found)
    return found


def keep(target: Target, found: Found) -> None:
    """Write what went wrong into the corpus."""
    for data in found.crashes.values():
        folder = CORPUS / target.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def with_atheris(target: Target, runs: int, seconds: float) -> None:
    """Coverage leads; atheris ends the process itself, and stops at the first crash."""
    import atheris  # pyright: ignore[reportMissingImports]

    atheris.instrument_all()
    limits = [f"-atheris_runs={runs}", f"-max_total_time={int(seconds)}", "-max_len=65536"]
    prefix = f"-artifact_prefix={CORPUS / target.name}/"
    atheris.Setup([sys.argv[0], *limits, prefix, str(CORPUS / target.name)], lambda data: target(data) and None)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("target", choices=[*TARGETS, "all"], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true")
    said = parser.parse_args()
    chosen = list(TARGETS.values()) if said.target == "all" else [TARGETS[said.target]]
    if said.atheris:
        with_atheris(chosen[0], said.runs, said.seconds)
        return
    totals: Counter[str] = Counter()
    for target in chosen:
        found = campaign(target, said.runs, said.seconds, said.seed)
        keep(target, found)
        totals += Counter(runs=found.runs, crashes=len(found.crashes))
        sys.stdout.write(f"{target.name}: {found.runs} inputs, {found.read} read, slowest {found.slowest_s:.2f} s\n")
        sys.stdout.writelines(f"    {what}\n" for what in found.crashes)
    sys.stdout.write(f"{totals['runs']} inputs, {totals['crashes']} crashes\n")
    sys.exit(totals["crashes"] > 0)


if __name__ == "__main__":
    main()
