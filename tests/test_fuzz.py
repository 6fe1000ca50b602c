"""Whatever bytes a parser is given, it ends: read, or refused by an error of ours, soon and in little memory.

Run for longer, and add what is found to the corpus: python -m tests.fuzz.campaign TARGET --runs 1000000 --seconds 600
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.counts import FULL, cases
from tests.fuzz.campaign import Found, attempt, campaign, keep
from tests.fuzz.mutate import mutate
from tests.fuzz.targets import CORPUS, FAMILIES, PARSERS, TARGETS, Target

ROOT = Path(__file__).resolve().parent.parent
PER_PARSER = cases(200_000) if FULL else cases(8_000)
PER_FAMILY_FILE = cases(8_000) if FULL else cases(400)
PER_EXAMPLE = 10
MAX_SECONDS = 1.0
MAX_BYTES = 256 << 20
MAX_CORPUS_BYTES = 320_000

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")

WATCH = """
import json, time
from tests.fuzz.targets import TARGETS
from tests.fuzz.watch import Watch, peak_bytes

for target in TARGETS.values():
    for data in target.good():
        target(data)
watch, begun, wrong, slowest, runs = Watch(), peak_bytes(), [], 0.0, 0
for target in TARGETS.values():
    for name, data in target.corpus.items():
        given, before, raised = target.put(data), time.process_time(), None
        with watch.on() as seen:
            try:
                target.survives(given)
            except BaseException as error:
                raised = repr(error)[:300]
        took, runs = time.process_time() - before, runs + 1
        slowest = max(slowest, took)
        if took > 1 or seen or raised:
            wrong.append([target.name, name, raised, f"{took:.2f} s", *seen])
print(json.dumps({"wrong": wrong, "slowest": slowest, "runs": runs, "grown": peak_bytes() - begun}))
"""


def watched(script: str, folder: Path) -> dict:
    """What a process of its own says at its end."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_corpus_is_survived_with_nothing_executed_or_written_soon_and_in_little_memory(tmp_path):
    said = watched(WATCH, tmp_path)

    assert said["wrong"] == []
    assert said["runs"] == sum(1 for path in CORPUS.rglob("*") if path.is_file())
    assert said["slowest"] < MAX_SECONDS
    assert said["grown"] < MAX_BYTES
    assert os.listdir(tmp_path) == []


def test_watch_sees_what_it_is_for(tmp_path):
    """The audit would say so, if a parser ran code, imported a name, wrote a file, or raised anything else."""
    bad = """
from dataclasses import replace
from tests.fuzz import targets

def wicked(data):
    import os, tabnanny
    eval("1")
    os.system("true")
    open("written", "w").close()
    raise MemoryError

targets.TARGETS = {"json": replace(targets.PARSERS["json"], parse=wicked, good=list)}
"""

    said = watched(bad + WATCH, tmp_path)

    text = json.dumps(said["wrong"])
    assert all(word in text for word in ("os.system", "exec", "tabnanny", "written", "MemoryError"))


@pytest.mark.parametrize("name", TARGETS)
def test_sound_inputs_of_a_target_are_read(name):
    """Else its mutations would all end at the first check."""
    target = TARGETS[name]

    assert [target(data) for data in target.good()] == [not name.startswith("refused")] * len(target.good())


def test_every_target_has_a_corpus_and_all_of_it_is_small():
    files = [path for path in CORPUS.rglob("*") if path.is_file()]

    assert {path.parent.name for path in files} == set(TARGETS) - {name for name in TARGETS if not TARGETS[name].corpus}
    assert all(len(TARGETS[name].corpus) >= 3 for name in TARGETS if not name.startswith("refused"))
    assert sum(path.stat().st_size for path in files) < MAX_CORPUS_BYTES


def tried(target: Target, seeds: list[bytes], seed: int) -> Found:
    """Some mutations of one seed of randomness."""
    random, found = Random(seed), Found()
    for _ in range(PER_EXAMPLE):
        attempt(target, mutate(random, random.choice(seeds), seeds), found)
    return found


@pytest.mark.parametrize("name", PARSERS)
def test_parser_reads_or_refuses_whatever_it_is_given(name):
    survives_mutations(PARSERS[name], PER_PARSER)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_reads_or_refuses_whatever_one_of_its_files_holds(name):
    survives_mutations(FAMILIES[name], PER_FAMILY_FILE)


def survives_mutations(target: Target, inputs: int) -> None:
    seeds = target.seeds()

    @settings(max_examples=max(inputs // PER_EXAMPLE, 1))
    @given(seed=st.integers(0, 1 << 64))
    def law(seed: int) -> None:
        found = tried(target, seeds, seed)
        assert found.crashes == {}

    law()


def test_campaign_keeps_what_it_finds(tmp_path, monkeypatch):
    def parse(data: bytes) -> None:
        if b"9" in data:
            raise RecursionError

    monkeypatch.setattr("tests.fuzz.campaign.CORPUS", tmp_path)
    target = Target("json", bytes, parse, lambda: [b"[9]"])

    found = campaign(target, runs=200, seconds=10)
    keep(target, found)

    assert found.runs == 200
    assert list(found.crashes) == ["RecursionError at : "]
    assert [b"9" in path.read_bytes() for path in (tmp_path / "json").iterdir()] == [True]
