"""Converting happens in a process with limits: the same SAE or the same error comes out of it, and nothing half."""

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from saeguard import load_sae
from saeguard.cli import app
from saeguard.errors import ConversionStopped, UnsafePickle, UnsupportedFormat
from saeguard.loaders.convert import convert
from tests.lookalikes import LOOKALIKES
from tests.lookalikes.base import inputs

LIKE = LOOKALIKES["goodfire"]


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


def rewritten_before_torch_1_6(path: Path) -> Path:
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    return path


def test_converted_sae_computes_what_its_source_does(tmp_path):
    source, x = LIKE.write(tmp_path), inputs()

    ours = load_sae(convert(source, tmp_path / "ours"))

    assert torch.allclose(ours.encode(x), LIKE.acts(x), atol=1e-4)
    assert str(ours.site) == LIKE.site
    assert ours.manifest["format"] == "goodfire"
    assert set(ours.manifest["sha256"]) == {"sae.safetensors"}
    assert set(ours.manifest["source_sha256"]) == {source.name}


def test_a_pickle_of_before_torch_1_6_is_read_by_converting_it_only(tmp_path):
    source = rewritten_before_torch_1_6(LIKE.write(tmp_path))

    with pytest.raises(UnsupportedFormat, match="torch wrote it before version 1.6"):
        load_sae(source)
    ours = load_sae(convert(source, tmp_path / "ours"))

    assert torch.allclose(ours.encode(inputs()), LIKE.acts(inputs()), atol=1e-4)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["SAEGUARD_TEST_TOUCH"],)


@pytest.mark.parametrize("legacy", [False, True])
def test_an_error_of_the_worker_is_the_same_error_here(legacy, tmp_path, monkeypatch):
    monkeypatch.setenv("SAEGUARD_TEST_TOUCH", str(tmp_path / "touched"))
    torch.save({"encoder_linear.weight": Evil()}, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)

    with pytest.raises(UnsafePickle, match="mkdir"):
        convert(tmp_path / "x.pth", tmp_path / "ours")

    assert not (tmp_path / "touched").exists()
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("limit", "text"), [({"memory_bytes": 1000}, "more than 0.0 GB"), ({"seconds": 0.05}, "0.05 s")]
)
def test_a_worker_beyond_its_limits_is_stopped_and_leaves_nothing(limit, text, tmp_path):
    source = LIKE.write(tmp_path)

    with pytest.raises(ConversionStopped, match=text):
        convert(source, tmp_path / "ours", **limit)

    assert not list(tmp_path.glob("ours/*"))


def test_convert_and_inspect_commands_say_what_they_found(tmp_path):
    source = LIKE.write(tmp_path)

    assert run("convert", source, tmp_path / "ours", "--site", "resid_post.7") == (
        0,
        f"wrote {tmp_path}/ours/sae.safetensors\n",
    )
    status, text = run("inspect", tmp_path / "ours", "--json", "--latents", "3,17,40-42")

    found = json.loads(text)
    assert status == 0
    assert (found["family"], found["site"], found["d_in"], found["d_sae"]) == ("saeguard", "resid_post.7", 16, 48)
    assert (found["latents"], found["manifest"]["format"]) == (5, "goodfire")
    assert found["bytes_for_latents"] < found["bytes_to_load"] <= found["bytes_on_disk"]


@pytest.mark.parametrize(("latents", "text"), [("3,x", "'x' is not a latent"), ("48", "this SAE has latents 0..47")])
def test_inspect_refuses_latents_that_are_none(latents, text, tmp_path):
    status, output = run("inspect", LIKE.write(tmp_path), "--latents", latents)

    assert status == 2
    assert text in " ".join(output.replace("│", " ").split())
