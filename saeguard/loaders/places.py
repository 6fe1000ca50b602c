"""From what a user writes to files on this machine: shipped names, paths, hf:// addresses, releases with an id.

    smollm2-135m-instruct/resid_post.20       shipped with the package
    smollm2-135m-instruct/resid_post.20+biology     the same with a boost behind it, see `saeguard.boosted`
    path/to/folder or path/to/file
    path/to/file@12                           of a file of steering vectors those at resid_post.12
    hf://owner/repo/path[@revision]           the files of that folder, or that file, fetched to the hub's cache
    (release, id)                             a SAELens release, see `saeguard.loaders.releases`

A repository may hold terabytes. Of a folder only its own weights are fetched and not its subfolders'; of a file only
itself; and the configs beside and above them. Everything keeps its place below the repository, because some families
say in their paths what they are.

    which commit -> which of these are there -> what is in the folder -> files, the smallest first

The smallest first: weights in the cache mean that nothing is missing beside them, also after an interruption.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from saeguard.errors import ModelUnavailable, SaeguardError, UnsupportedFormat
from saeguard.loaders.releases import by_place, find, releases
from saeguard.loaders.vectors import at_site
from saeguard.sites import Site

logger = logging.getLogger("saeguard.loaders.places")

ASSETS = Path(__file__).parent.parent / "assets"
HUB = "hf://"
BOOSTS = "boosts"
"""The folder of a base that its boosts are in."""
_IN_CACHE = re.compile(r"/models--([^/]+)/snapshots/[^/]+/(.+)$")
"""The hub's cache: the repository, and the path in it."""
HUB_TIMEOUT_S = 10.0
CONFIGS = ("cfg.json", "config.json", "hyperparams.json", "activation_scaler.json", "config.yaml", "metadata.yaml",
           "conf.yaml", "final_config.yaml", "wandb-config.yaml", "wanb-config.yaml")  # fmt: skip
"""What families read beside weights, and ``*_cfg.json``; wanb is how some repositories spell it."""
TENSORS = (".safetensors", ".npz", ".pt", ".pth")
CHECKPOINTS = tuple(f"checkpoints/{name}.{ending}" for name in ("pruned", "final") for ending in ("safetensors", "pt"))
LEFT_BY_TRAINING = ("trainer_state.pt", "activations_store_state.*", "activation_whitening.*", "optimizer*.pt",
                    "lr_scheduler*.pt", "state.pt", "rank_*_state.pt")  # fmt: skip
MAX_TENSOR_FILES = 4
"""No family has more files for one SAE."""

REFUSED = {
    "circuit_tracer_clt": "it is a layer of a cross-layer transcoder, which writes to all later layers",
    "temporal": "its latents depend on the tokens before, and this version keeps no state for them",
}
"""Families of the releases that no loader reads, so nothing of them is fetched."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOT_IN_A_PATH = re.compile(r"[\s\x00-\x1f\x7f\\]")


@dataclass(frozen=True)
class Local:
    """Files on this machine, and what is known of them from elsewhere."""

    path: Path
    model: str | None = None
    input_scale: float | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    """Of fetched files the ``hub`` repository, the ``path`` in it, and as ``revision`` the commit."""
    site: Site | None = None
    """The one that is named behind an @."""


@dataclass(frozen=True)
class Address:
    """A folder or a file of a repository on the hub."""

    repo: str
    path: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{HUB}{self.repo}/{self.path}" + (f"@{self.revision}" if self.revision != "main" else "")


def shipped() -> dict[str, Path]:
    """Names of the SAEs that come with the package, each with its folder; boosts are not among them."""
    return {name: path for name, path in _in_assets().items() if BOOSTS not in name.split("/")}


def shipped_boosts() -> dict[str, Path]:
    """Names of the boosts that come with the package, ``base/boosts/domain``, each with its folder."""
    return {name: path for name, path in _in_assets().items() if BOOSTS in name.split("/")}


def _in_assets() -> dict[str, Path]:
    return {path.parent.relative_to(ASSETS).as_posix(): path.parent for path in sorted(ASSETS.rglob("sae.safetensors"))}


def parts(source: object) -> tuple[str, list[str]] | None:
    """The base and the boosts that ``base+domain+domain`` names, where that itself is no file; else None.

    A boost is in the base's folder, under ``boosts``.
    """
    if not isinstance(source, str | Path) or "+" not in str(source) or str(source).startswith(HUB):
        return None
    if os.path.exists(os.path.expanduser(source)):
        return None
    folder, slash, name = str(source).rpartition("/")  # folders above may have a + in their names too
    base, *domains = name.split("+")
    if not domains:
        return None
    base = folder + slash + base
    return base, [f"{base}/{BOOSTS}/{domain}" for domain in domains]


def resolve(source: str | Path | tuple[str, str]) -> Local:
    """Where ``source`` is on this machine, fetched if it has to be. Raises `UnsupportedFormat`, `ModelUnavailable`."""
    if isinstance(source, tuple) and len(source) == 2 and all(isinstance(part, str) for part in source):
        return _published(*source)
    if not isinstance(source, str | Path):
        raise UnsupportedFormat(
            f"SAE {source!r:.80}", "that is no name, path or address, and no pair (release, id)",
            "Give a str, a Path, or a tuple of two str.",
        )  # fmt: skip
    if str(source).startswith("hf:"):
        return _known(_fetched(parse(str(source))))
    path = _in_assets().get(str(source), Path(os.path.expanduser(source)))
    if (named := at_site(str(path))) is not None:
        return replace(_known(Local(Path(named[0]))), site=named[1])
    if not os.path.exists(path):  # Path.exists raises for names that are too long
        raise UnsupportedFormat(
            f"SAE {str(source)!r}",
            "that is a release of several SAEs"
            if str(source) in releases()
            else "no shipped SAE has that name and there is no such file or folder",
            f"Shipped are: {', '.join(shipped()) or 'none'}. Of the hub write hf://owner/repo/path, or (release, id).",
        )
    return _known(Local(path))


def _known(place: Local) -> Local:
    """``place`` with what the table of releases knows of it, if its files came from a repository of one."""
    match = _IN_CACHE.search(Path(os.path.abspath(place.path)).as_posix())
    entry = by_place(match[1].replace("--", "/", 1), match[2]) if match else None
    if entry is None:
        return place
    overrides = dict(entry.overrides)
    scale = overrides.pop("norm_scaling_factor", None)
    return replace(place, model=entry.model, input_scale=scale, overrides=overrides)


def parse(text: str) -> Address:
    """Read ``hf://owner/repo/path[@revision]``. Raises `UnsupportedFormat`."""
    place, _, revision = text.removeprefix(HUB).rpartition("@") if "@" in text else (text[len(HUB) :], "", "main")
    owner, _, rest = place.partition("/")
    name, _, path = rest.partition("/")
    parts = path.removesuffix("/").split("/")
    if not text.startswith(HUB):
        found = "it begins with hf: but not with hf://; a Path merges the two slashes, a str keeps them"
    elif owner in ("datasets", "spaces"):
        found = f"only model repositories are read, not {owner}"
    elif not _REPOSITORY.fullmatch(f"{owner}/{name}"):
        found = f"{owner}/{name} is no owner/repo"
    elif not path:
        found = "it names a repository and nothing in it"
    elif any(part in ("", ".", "..") for part in parts) or _NOT_IN_A_PATH.search(path):
        found = f"{path!r} is no path in a repository: no '.' or '..', no empty part, no white space, no backslash"
    elif not _REVISION.fullmatch(revision):
        found = f"{revision!r} behind the @ is no branch, tag or commit"
    else:
        return Address(f"{owner}/{name}", "/".join(parts), revision)
    raise UnsupportedFormat(
        f"SAE {text!r}", found, "Write hf://owner/repo/path/to/folder or .../file, with @revision at the end if needed."
    )


def _published(release: str, sae_id: str) -> Local:
    entry = find(release, sae_id)
    if entry.family in REFUSED:
        raise UnsupportedFormat(
            f"SAE {sae_id!r} of release {release!r}",
            REFUSED[entry.family],
            "Nothing was fetched; choose another release.",
        )
    overrides = dict(entry.overrides)
    scale = overrides.pop("norm_scaling_factor", None)
    place = _fetched(Address(entry.repo, entry.path))
    return replace(place, model=entry.model, input_scale=scale, overrides=overrides)


def _fetched(address: Address) -> Local:
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    cache = Path(constants.HF_HUB_CACHE) / f"models--{address.repo.replace('/', '--')}"
    with _hub_errors(address):
        commit = _find_cached(cache, address) if offline else _download(cache, address)
    origin = {"hub": address.repo, "path": address.path, "revision": commit}
    return Local(cache / "snapshots" / commit / address.path, origin=origin)


def _download(cache: Path, address: Address) -> str:
    """Fetch what is needed and not there yet; the commit it is of."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    api = HfApi()
    # The one request with a limit of time: the client waits for the others as long as the hub does.
    info = api.model_info(address.repo, revision=address.revision, timeout=HUB_TIMEOUT_S, expand=["sha"])
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise ValueError(f"{commit!r} is no commit")
    sizes = _needed(api, address, commit)
    logger.info("fetching %d files, %d bytes, of %s at %s", len(sizes), sum(sizes.values()), address, commit)
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):
        hf_hub_download(address.repo, name, revision=commit, cache_dir=constants.HF_HUB_CACHE)
    _remember(cache, address.revision, commit)
    return commit


def _needed(api: Any, address: Address, commit: str) -> dict[str, int]:
    """Names in the repository of the files to fetch, with their bytes."""
    path = PurePosixPath(address.path)
    asked = [address.path, *_beside(path), *(f"{path}/{name}" for name in CHECKPOINTS)]
    there = api.get_paths_info(address.repo, asked, revision=commit)
    if address.path not in [entry.path for entry in there]:
        raise ModelUnavailable(
            f"SAE {str(address)!r}",
            f"{address.repo} has no file or folder {path} at commit {commit}",
            f"What it has is listed at {_page(address)}/tree/{commit}.",
        )
    files = {name: size for name, size in _sizes(there).items() if name in asked}
    if address.path in files:
        return files
    entries = list(api.list_repo_tree(address.repo, address.path, recursive=False, revision=commit))
    inside = {name: size for name, size in _sizes(entries).items() if _is_directly_in(path, name)}
    checkpoints = [f"{path}/{name}" for name in CHECKPOINTS if f"{path}/{name}" in files]
    weights = [name for name in inside if _is_weights(name)] or checkpoints[:1]
    _check_one_sae(address, weights, [entry.path for entry in entries])
    return {name: size for name, size in (files | inside).items() if name in weights or _is_config(name)}


def _beside(path: PurePosixPath) -> list[str]:
    """Where configs may be: next to a file, or above a folder, and further up."""
    names = [folder / name for folder in path.parents for name in CONFIGS]
    return [str(name) for name in (*names, path.parent / f"{path.stem}_cfg.json")]


def _sizes(entries: Iterable[Any]) -> dict[str, int]:
    from huggingface_hub.hf_api import RepoFile

    return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}


def _is_directly_in(folder: PurePosixPath, name: str) -> bool:
    return PurePosixPath(name).parent == folder and "\\" not in name


def _is_config(name: str) -> bool:
    return PurePosixPath(name).name in CONFIGS or name.endswith("_cfg.json")


def _is_weights(name: str) -> bool:
    last = PurePosixPath(name).name
    return last.endswith(TENSORS) and not any(fnmatch(last, left) for left in LEFT_BY_TRAINING)


def _check_one_sae(address: Address, weights: Iterable[str], entries: Iterable[str]) -> None:
    """Raise `UnsupportedFormat` for a folder without weights, or with several SAEs': names that differ in numbers."""
    names = sorted(PurePosixPath(name).name for name in weights)
    if not names:
        inside = sorted(PurePosixPath(entry).name for entry in entries)
        raise UnsupportedFormat(
            f"SAE {str(address)!r}",
            f"that folder has no weights ({', '.join(TENSORS)}); in it are {_some(inside) or 'no files'}",
            "Name the folder that has the files of one SAE.",
        )
    if len(names) > MAX_TENSOR_FILES or len({re.sub(r"\d+", "#", name) for name in names}) < len(names):
        raise UnsupportedFormat(
            f"SAE {str(address)!r}",
            f"that folder has {len(names)} files of weights, of more than one SAE: {_some(names)}",
            f"Nothing was fetched. Name the file, as in {HUB}{address.repo}/{address.path}/{names[0]}.",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _remember(cache: Path, revision: str, commit: str) -> None:
    """Say in the hub's cache, as its client does, which commit a branch was, so that it is found again offline."""
    ref = cache / "refs" / revision
    with suppress(OSError):  # a cache that is only read
        if not _COMMIT.fullmatch(revision) and not (ref.is_file() and ref.read_text() == commit):
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)


def _find_cached(cache: Path, address: Address) -> str:
    """The commit in the cache that the address means, if its weights are there."""
    ref = cache / "refs" / address.revision
    commit = ref.read_text().strip() if ref.is_file() else address.revision
    held = [folder.name for folder in sorted(cache.glob("snapshots/*")) if _has_weights(folder / address.path)]
    if commit in held:
        return commit
    raise ModelUnavailable(
        f"SAE {str(address)!r}",
        f"HF_HUB_OFFLINE is set and {cache} does not have it"
        + (f" at {address.revision}, but at {', '.join(held)}" if held else ""),
        (f"Add @{held[0]} to its address, or unset" if held else "Unset")
        + " HF_HUB_OFFLINE once to fetch it, or give the path of a local folder with its files.",
    )


def _has_weights(path: Path) -> bool:
    inside = [file.name for file in path.iterdir()] if path.is_dir() else []
    checkpoints = [(path / name).is_file() for name in CHECKPOINTS]
    return path.is_file() or any(map(_is_weights, inside)) or any(checkpoints)


@contextmanager
def _hub_errors(address: Address) -> Iterator[None]:
    """Whatever the hub's client raises, which shares no base class with its transport's, as `ModelUnavailable`."""
    try:
        yield
    except SaeguardError:
        raise
    except Exception as error:
        found, proceed = _explain(address, error)
        raise ModelUnavailable(
            f"SAE {str(address)!r}", found, f"{proceed} Or give the path of a local folder with its files."
        ) from error


def _explain(address: Address, error: Exception) -> tuple[str, str]:
    """What was found and how to proceed."""
    from huggingface_hub import errors

    page = _page(address)
    if isinstance(error, errors.GatedRepoError):
        found = f"the hub gives {address.repo} only to accounts that accepted its terms"
        return found, f"Accept them at {page}, then set HF_TOKEN to a token of that account, or run hf auth login."
    if isinstance(error, errors.RepositoryNotFoundError):
        found = f"the hub knows no repository {address.repo}, or it is private"
        return found, "Check the name; for a private one set HF_TOKEN to a token that may read it."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{address.repo} has no revision {address.revision}", f"Its commits are listed at {page}/commits."
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
    found = f"the hub did not give it: {type(cause).__name__}: {_one_line(cause)}"
    return found, "Check the connection and try again; HF_HUB_OFFLINE=1 takes what was fetched before."


def _page(address: Address) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{address.repo}"


def _one_line(error: BaseException) -> str:
    """Its text without the query part of addresses, which may be signed."""
    return re.sub(r"\?\S+", "", " ".join(str(error).split()))[:300] or "no more was said"
