"""A module imports from the rows above it: nothing below, nothing sideways, each framework in one place."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "saeguard"

LAYERS = [
    {"errors", "axes", "strict_json"},
    {"sites", "wheels", "tokens", "ops", "norms", "activations", "fingerprints"},
    {"sae", "triggers", "dense", "archives"},
    {"boosted", "gates"},
    {"plans", "loaders"},
    {"kernels", "latents", "cards", "vectors", "naming"},
    {"gating"},
    {"editor"},
    {"ledger", "exporting"},
    {"engines", "reports"},
    {"canary"},
    {"steering", "capturing"},
    {"passes"},
    {"scoring", "guarding", "training", "evaluating", "drawing", "hooks", "patching", "traces"},
    {"checking"},
    {"models", "cli", "demo", "serving"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ANYTHING = {
    "cli",
    "demo",
    "serving",
    "__init__",
    "__main__",
}  # the doors: they may open every room

# The bottom of the package has to be readable without knowing a framework.
PURE = {
    name: {"torch", "jaxtyping"}
    for name in ("axes", "sites", "tokens", "norms", "activations", "sae", "ops", "dense", "triggers", "gates")
}
PURE["errors"] = set()
# Extras: one adapter each, so that nobody needs what they do not use.
HOMES = {
    "transformer_lens": {"engines/lens.py", "engines/hooked.py"},
    "sae_lens": {"loaders/live.py"},
    "nnsight": {"engines/nnsight.py"},
    "peft": {"engines/adapters.py"},
    "vllm": {"engines/vllm.py"},
    "triton": {"kernels/triton.py"},
    "cryptography": {"guarding/signing.py"},
}


def imports(path: Path) -> set[str]:
    """Dotted names that ``path`` imports anywhere, also inside functions and ``if TYPE_CHECKING``.

    ``from saeguard.sae import SAE`` counts as ``saeguard.sae.SAE``; a relative import keeps its leading dots.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {"." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """First parts below saeguard that ``path`` imports; ``__init__`` for names of the package itself."""
    parts = [name.split(".") for name in imports(path) if name.split(".")[0] == "saeguard"]
    return {part[1] if len(part) > 1 and part[1] in RANK else "__init__" for part in parts}


def unit(path: Path, package: Path) -> str:
    """The module or folder directly below ``package`` that ``path`` belongs to."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def violations(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        here, name = unit(path, package), path.relative_to(package).as_posix()
        if any(imported.startswith(".") for imported in imports(path)):
            yield f"{name} has a relative import"
        if here in ANYTHING:
            continue
        if here not in RANK:
            yield f"{name} is in no row of LAYERS"
            continue
        for there in sorted(ours(path) - {here}):
            if there == "__init__":
                yield f"{name} (row {RANK[here]}) imports from saeguard itself"
            elif RANK[there] >= RANK[here]:
                yield f"{name} (row {RANK[here]}) imports saeguard.{there} (row {RANK[there]})"


def strangers(package: Path) -> Iterator[str]:
    """Imports from outside of saeguard that a file is not the place for."""
    for path in sorted(package.rglob("*.py")):
        here, name = unit(path, package), path.relative_to(package).as_posix()
        for top in sorted({imported.split(".")[0] for imported in imports(path)} - {"", "saeguard"}):
            known = top in sys.stdlib_module_names
            if not known and here in PURE and top not in PURE[here]:
                yield f"{name} imports {top} and may import only {sorted(PURE[here])}"
            if top in HOMES and name not in HOMES[top]:
                yield f"{name} imports {top}, which belongs in {sorted(HOMES[top])}"


@pytest.fixture
def package(tmp_path):
    """Write sources into a package and return it: ``package({"sae.py": "import os"})``."""

    def write(sources: dict[str, str]) -> Path:
        for name, source in sources.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        return tmp_path

    return write


def test_modules_import_only_from_rows_above():
    found = list(violations(PACKAGE))

    assert not found, "\n".join(found)


def test_frameworks_are_imported_where_they_belong():
    found = list(strangers(PACKAGE))

    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("sae.py", "from saeguard.editor import build", "sae.py imports saeguard.editor"),
        ("sae.py", "from saeguard import plans", "sae.py imports saeguard.plans"),
        ("sae.py", "def f():\n    import saeguard.editor", "sae.py imports saeguard.editor"),
        ("steering.py", "import saeguard.capturing", "steering.py imports saeguard.capturing"),
        (
            "guarding/audit.py",
            "from saeguard.scoring.a import b",
            "guarding/audit.py imports saeguard.scoring",
        ),
        ("models.py", "import saeguard.cli", "models.py imports saeguard.cli"),
        ("editor.py", "from saeguard import steer", "editor.py imports from saeguard itself"),
        ("editor.py", "import saeguard", "editor.py imports from saeguard itself"),
        ("sae.py", "from .axes import Acts", "sae.py has a relative import"),
        ("sae.py", "from . import axes", "sae.py has a relative import"),
        ("utils.py", "", "utils.py is in no row of LAYERS"),
    ],
)
def test_import_from_below_or_beside_is_named(package, name, source, message):
    found = [re.sub(r" \(row \d+\)", "", line) for line in violations(package({name: source}))]

    assert found == [message]


def test_imports_from_above_within_a_folder_and_at_the_doors_pass(package):
    sources = {
        "__init__.py": "from saeguard.cli import app",
        "cli.py": "import saeguard\nfrom saeguard.demo import run",
        "plans.py": "from saeguard import errors, ops",
        "engines/hf.py": "from saeguard.engines.base import Engine\nfrom saeguard.editor import Editor",
    }

    assert list(violations(package(sources))) == []


def test_framework_away_from_home_is_named(package):
    sources = {
        "engines/hf.py": "import nnsight",
        "engines/nnsight.py": "import nnsight",
        "sae.py": "import math\nimport torch.nn as nn\nfrom transformers import AutoModel",
        "errors.py": "import torch",
    }

    assert list(strangers(package(sources))) == [
        "engines/hf.py imports nnsight, which belongs in ['engines/nnsight.py']",
        "errors.py imports torch and may import only []",
        "sae.py imports transformers and may import only ['jaxtyping', 'torch']",
    ]


IMPORT_SAEGUARD = """
import logging, socket, sys

def refuse(*args, **kwargs):
    raise SystemExit("import saeguard opened a connection")

socket.socket.connect = socket.getaddrinfo = refuse
before = (list(logging.root.handlers), logging.root.level)
import saeguard
assert before == (logging.root.handlers, logging.root.level), "import saeguard configured logging"
extras = {"matplotlib", "scipy", "gguf", "transformer_lens", "nnsight", "vllm", "sentence_transformers", "cryptography"}
loaded = sorted(extras & set(sys.modules))
sys.exit(f"import saeguard imports {loaded}" if loaded else 0)
"""


def test_import_saeguard_loads_no_extra_and_downloads_nothing():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_SAEGUARD], capture_output=True, text=True, check=False, env=environment
    )

    assert done.returncode == 0, done.stderr
