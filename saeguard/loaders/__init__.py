"""One file per checkpoint family, each turning files into an `SAE`."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from saeguard.errors import UnsupportedFormat
from saeguard.loaders import gemma_scope, native, saelens
from saeguard.sae import SAE


@runtime_checkable
class Loader(Protocol):
    """What a family's module offers."""

    def recognises(self, source: Path) -> bool:
        """Whether the files look like this family, judged by headers only."""
        ...

    def load(self, source: Path) -> SAE:
        """Read them. Raises `LoadError`."""
        ...


LOADERS: dict[str, Loader] = {
    "saeguard": native,
    "saelens": saelens,
    "gemma_scope": gemma_scope,
}
ASSETS = Path(__file__).parent.parent / "assets"


def shipped() -> dict[str, Path]:
    """Names of the SAEs that come with the package, each with its folder."""
    return {path.parent.relative_to(ASSETS).as_posix(): path.parent for path in sorted(ASSETS.rglob("sae.safetensors"))}


def load_sae(source: str | Path) -> SAE:
    """Load an SAE from a shipped name, a folder or a file.

    ``load_sae("smollm2-135m-instruct/resid_post.20")`` or a path. Raises `UnsupportedFormat` when nothing is there
    or no family, or more than one, recognises it, and `BrokenFile` when the content cannot be trusted.
    """
    path = shipped().get(str(source), Path(source))
    if not path.exists():
        raise UnsupportedFormat(
            f"SAE {str(source)!r}",
            "no shipped SAE has that name and there is no such file or folder",
            f"Shipped are: {', '.join(shipped()) or 'none'}.",
        )
    families = [name for name, loader in LOADERS.items() if loader.recognises(path)]
    if len(families) != 1:
        raise UnsupportedFormat(
            f"SAE {str(source)!r}",
            "no loader recognises it" if not families else f"{' and '.join(families)} both recognise it",
            f"Loaders of this version: {', '.join(LOADERS)}.",
        )
    return LOADERS[families[0]].load(path)
