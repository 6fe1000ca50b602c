"""The map of the package that README.md shows, made from each module's own first sentence.

    python tests/readme_map.py            print it
    python tests/readme_map.py --write    put it between the two markers of README.md

Sources are parsed, not imported, so this runs without torch.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN = "<!-- map: written by tests/readme_map.py -->"
END = "<!-- end of map -->"


def render(package: Path) -> str:
    """The map of ``package`` as a fenced block: one line per module, path first, then its first sentence."""
    rows = [(path.relative_to(package.parent).as_posix(), first_sentence(path)) for path in modules(package)]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:{width}}{sentence}".rstrip() for name, sentence in rows]
    return "\n".join(["```text", *lines, "```"])


def modules(package: Path) -> list[Path]:
    """Every module of ``package``, a folder's ``__init__.py`` before its siblings, files before folders."""
    paths = package.rglob("*.py")
    return sorted(paths, key=lambda path: (path.parent.parts, path.name != "__init__.py", path.name))


def first_sentence(module: Path) -> str:
    """The first sentence of the module's docstring on one line, or an empty string."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()


def block(readme: str) -> str:
    """What stands between the markers of ``readme``."""
    _, begin, rest = readme.partition(BEGIN)
    inside, end, _ = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs a line {BEGIN!r} and, below it, a line {END!r}")
    return inside.strip()


def with_block(readme: str, new: str) -> str:
    """``readme`` with ``new`` between its markers."""
    block(readme)  # raises when a marker is missing
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def main(arguments: list[str]) -> None:
    new = render(ROOT / "saeguard")
    if arguments == ["--write"]:
        README.write_text(with_block(README.read_text(encoding="utf-8"), new), encoding="utf-8")
    else:
        sys.stdout.write(new + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
