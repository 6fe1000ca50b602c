"""A file or a function that has outgrown a reader's patience is split, not excused."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "saeguard"
MAX_FILE = 400
MAX_FUNCTION = 60


def long_files(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE:
            yield f"{path.relative_to(package)}: {lines} lines, {MAX_FILE} allowed"


def long_functions(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION:
                where = f"{path.relative_to(package)}:{node.lineno}"
                yield f"{where}: {node.name} has {lines} lines, {MAX_FUNCTION} allowed"


def test_files_are_short():
    found = list(long_files(PACKAGE))

    assert not found, "\n".join(found)


def test_functions_are_short():
    found = list(long_functions(PACKAGE))

    assert not found, "\n".join(found)


def test_one_line_too_many_is_noticed(tmp_path):
    body = "    x = 1\n"
    (tmp_path / "long.py").write_text("def f():\n" + body * MAX_FUNCTION + "\n" * MAX_FILE, encoding="utf-8")
    (tmp_path / "fits.py").write_text("def f():\n" + body * (MAX_FUNCTION - 1), encoding="utf-8")

    assert list(long_files(tmp_path)) == ["long.py: 461 lines, 400 allowed"]
    assert list(long_functions(tmp_path)) == ["long.py:1: f has 61 lines, 60 allowed"]
