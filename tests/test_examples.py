"""Every example and the README's own program run on the real model and the shipped SAEs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))


def run(*arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=280,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def readme_programs() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_says_what_it_shows(path):
    text = path.read_text(encoding="utf-8")

    assert len(text.splitlines()) < 80
    assert text.startswith('"""')
    compile(text, str(path), "exec")


def test_readme_has_a_program_of_twelve_lines_at_most():
    first = readme_programs()[0]

    assert len([line for line in first.splitlines() if line.strip()]) <= 12
    compile(first, "README.md", "exec")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path):
    assert run(str(path)).strip()


def test_readme_program_runs():
    assert run("-c", readme_programs()[0]).strip()
