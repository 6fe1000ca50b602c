"""The tables of checkpoint families that README.md shows, made by loading every look-alike of every family.

    python tests/readme_families.py            print them
    python tests/readme_families.py --write    put them between the two markers of README.md

A row is what the loader's module says of itself, and what its look-alikes turned out to be once loaded.
"""

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from saeguard.loaders import LOADERS, open_sae  # noqa: E402
from saeguard.loaders.refused import REFUSALS  # noqa: E402
from saeguard.loaders.stored import Stored  # noqa: E402
from tests.lookalikes import LOOKALIKES  # noqa: E402
from tests.readme_map import first_sentence  # noqa: E402

README = ROOT / "README.md"
BEGIN = "<!-- families: written by tests/readme_families.py -->"
END = "<!-- end of families -->"
NORMS = {"none": "", "center": "mean off", "layer_norm": "layer norm", "const_norm": "constant norm"}


def render() -> str:
    """Both tables."""
    lines = ["| family | activations | norms of each token | transcoders | layouts tested |", "|---|---|---|---|--:|"]
    for family, module in LOADERS.items():
        found = [opened(like) for like in LOOKALIKES.values() if like.family == family]
        if found:
            lines.append(row(family, whose(module), found))
    lines += ["", "| known and refused | because |", "|---|---|"]
    lines += [f"| {refusal.name} | {refusal.found} |" for refusal in REFUSALS]
    return "\n".join(lines)


def opened(like) -> Stored:
    with tempfile.TemporaryDirectory() as folder:
        return open_sae(like.write(Path(folder)), **like.options)


def whose(module: Any) -> str:
    """The first sentence of the loader's module, up to its colon."""
    return first_sentence(Path(module.__file__)).partition(":")[0].rstrip(".")


def row(family: str, whose: str, found: list[Stored]) -> str:
    norms = joined(NORMS[stored.norm] for stored in found)
    transcoders = "yes" if any(stored.site_out for stored in found) else ""
    return f"| `{family}`: {whose} | {joined(s.activation for s in found)} | {norms} | {transcoders} | {len(found)} |"


def joined(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(word for word in words if word))


def block(readme: str) -> str:
    """What stands between the markers of ``readme``."""
    _, begin, rest = readme.partition(BEGIN)
    inside, end, _ = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs a line {BEGIN!r} and, below it, a line {END!r}")
    return inside.strip()


def main(arguments: list[str]) -> None:
    new, readme = render(), README.read_text(encoding="utf-8")
    if arguments == ["--write"]:
        before, _, rest = readme.partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{new}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    else:
        sys.stdout.write(new + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
