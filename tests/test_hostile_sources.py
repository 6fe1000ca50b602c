"""Folders and files as somebody might send them, given to `load_sae`: refused by name, soon, in little memory."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from saeguard import load_sae
from saeguard.errors import BrokenFile, LoadError, MissingSite, SaeguardError, UnsafePickle, UnsupportedFormat
from tests.fuzz.targets import NATIVE, NATIVE_PURSUIT, native_bytes
from tests.lookalikes import LOOKALIKES

ROOT = Path(__file__).resolve().parent.parent
MAX_SECONDS = 1.0
MAX_BYTES = 256 << 20
Build = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """``build`` puts files into a folder and returns what `load_sae` is given, if it is another place than that."""

    build: Build
    error: type[SaeguardError]
    says: str
    options: dict[str, Any] = field(default_factory=dict)


def like(name: str, change: Callable[[Path, Path], Any]) -> Build:
    """A sound look-alike, and then something done to its files: ``change`` gets its root and what is loaded."""

    def build(root: Path) -> Path:
        source = LOOKALIKES[name].write(root)
        return change(root, source) or source

    return build


def config(name: str, file: str, **values: Any) -> Build:
    """A look-alike with other values in its JSON."""

    def change(root: Path, source: Path) -> None:
        path = source / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return like(name, change)


def text(name: str, file: str, content: bytes) -> Build:
    """A look-alike with another text as its config."""
    return like(name, lambda root, source: (source / file).write_bytes(content) and None)


def saelens(**values: Any) -> Build:
    return config("saelens topk", "cfg.json", **values)


def cfg(content: bytes) -> Build:
    return text("saelens topk", "cfg.json", content)


def yml(content: bytes) -> Build:
    return text("itda", "metadata.yaml", content)


def file(name: str, content: bytes) -> Build:
    """One file, and nothing beside it."""

    def build(root: Path) -> Path:
        (root / name).write_bytes(content)
        return root / name

    return build


def tensors(name: str, content: Any, then: Callable[[bytes], bytes] = bytes) -> Build:
    """One torch file."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return file(name, then(stream.getvalue()))


def native(meta: dict[str, Any]) -> Build:
    return file("sae.safetensors", native_bytes(meta, *(["threshold"] if meta.get("activation") == "jumprelu" else [])))


def shaped(**shapes: tuple[int, ...]) -> Build:
    """Our own format, with tensors of other shapes."""
    sound = {"W_enc": (4, 6), "b_enc": (6,), "W_dec": (6, 4), "b_dec": (4,)}
    meta = {"saeguard": json.dumps({"schema": 1, "name": "n", "activation": "relu"})}
    found = {name: torch.ones(shape) for name, shape in (sound | shapes).items()}
    return file("sae.safetensors", save(found, metadata=meta))


def headed(entries: dict[str, Any], data: bytes = b"") -> Build:
    """A safetensors file whose header says what it likes."""
    header = json.dumps(entries).encode()
    return file("sae.safetensors", struct.pack("<Q", len(header)) + header + data)


def filled(value: float, dtype: torch.dtype) -> Build:
    """Our own format, one number of whose decoder is ``value``."""
    found = {"W_enc": torch.ones(4, 6), "b_enc": torch.ones(6), "W_dec": torch.ones(6, 4), "b_dec": torch.ones(4)}
    found = {name: tensor.to(dtype) for name, tensor in found.items()}
    found["W_dec"][5, 3] = value
    meta = {"saeguard": json.dumps({"schema": 1, "name": "n", "activation": "relu"})}
    return file("sae.safetensors", save(found, metadata=meta))


def zipped(name: str, *members: tuple[str, bytes], how: int = zipfile.ZIP_STORED) -> Build:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as archive:
        for member, data in members:
            archive.writestr(member, data)
    return file(name, stream.getvalue())


def torch_zip(data: bytes) -> Build:
    return zipped("model.pt", ("m/data.pkl", data), ("m/byteorder", b"little"), ("m/data/0", bytes(64)))


def npy(shape: str, data: bytes, descr: str = "<f4") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


def words(count: int) -> bytes:
    return b"X" + struct.pack("<I", count) + b"a" * count


def expanded(root: Path, source: Path) -> None:
    """A tensor that is one number, seen a thousand billion times over."""
    state = OrderedDict(W_enc=torch.ones(1, 1).expand(1 << 20, 1 << 20), b_enc=torch.ones(1), W_dec=torch.ones(1, 1))
    torch.save(state, source / next(path.name for path in source.glob("*.pt")))


def link_loop(root: Path, source: Path) -> None:
    (source / "cfg.json").unlink()
    (source / "cfg.json").symlink_to(source / "again")
    (source / "again").symlink_to(source / "cfg.json")


def folder_for(name: str) -> Callable[[Path, Path], None]:
    def change(root: Path, source: Path) -> None:
        (source / name).unlink()
        (source / name).mkdir()

    return change


def pipe_for(name: str) -> Callable[[Path, Path], None]:
    def change(root: Path, source: Path) -> None:
        (source / name).unlink()
        os.mkfifo(source / name)

    return change


def pipe(root: Path) -> Path:
    os.mkfifo(root / "sae.safetensors")
    return root / "sae.safetensors"


def linked(path: Path, target: str) -> Path:
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return path


def looped(root: Path) -> Path:
    (root / "loop").symlink_to(root / "loop")
    return root / "loop"


def two_families(root: Path, source: Path) -> None:
    path = LOOKALIKES["gemma_scope alone"].write(root)
    (source / "params.npz").write_bytes((path if path.is_file() else path / "params.npz").read_bytes())


def newline_in_its_name(root: Path) -> Path:
    (root / "sae\n.safetensors").write_bytes(native_bytes(NATIVE, "threshold"))
    return root


def cut(root: Path, source: Path) -> None:
    path = source / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def grown(root: Path, source: Path) -> None:
    (source / "cfg.json").write_bytes(b" " * 3_000_000)


def hole(root: Path) -> Path:
    """A terabyte that takes no room on the disk."""
    with (root / "sae.safetensors").open("wb") as stream:
        stream.truncate(1 << 40)
    return root


def transposed(root: Path, source: Path) -> None:
    save_file({"W_enc": torch.ones(48, 16), "b_enc": torch.ones(48), "W_dec": torch.ones(48, 16),
               "b_dec": torch.ones(16)}, source / "sae_weights.safetensors")  # fmt: skip


class Wicked:
    """Unpickling it would make a file."""

    def __reduce__(self):
        return os.system, ("touch executed",)


DEEP = {"dict_class": "AutoEncoderTopK", "k": 6, "layer": 10**12, "submodule_name": "resid_post_layer_8"}
HUGE = {"dtype": "F32", "shape": [1 << 31, 1 << 31], "data_offsets": [0, 1 << 62]}
DOUBLING = b"}" + words(1) + b"ctorch\ndevice\nq\1" + words(9) + b"q\2" + b"h\1h\2h\2\x86Rq\2" * 40 + b"s."
COPIES = b"](" + b"N" * 60_000 + b"eq\0(ctorch\nSize\nq\1" + b"h\1h\0\x85R" * 40_000 + b"t."
CALLS = b"((" + b"N" * 60_000 + b"tq\0ctorch._utils\n_rebuild_parameter\nq\1" + b"h\1h\0R" * 40_000 + b"t."
NAMES = b"}" + words(60_000) + b"](" + b"](" + b"N" * 200 + b"eq\2" + b"h\2" * 300 + b"es."
DEVICES = b"(" + words(1_000_000) + b"q\0ctorch\ndevice\nq\1" + b"h\1h\0h\0\x86R" * 40_000 + b"t."
BOMB = npy(f"({1 << 26},)", bytes(1 << 28))
LAUGHS = b"a: &a [1,1,1,1,1,1,1,1,1]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
)

CASES: dict[str, Case] = {
    # texts
    "JSON nested 40,000 deep": Case(cfg(b'{"a":' * 40_000), BrokenFile, "nests too deep"),
    "JSON nested 100 deep": Case(cfg(b'{"a":' * 100 + b"1" + b"}" * 100), BrokenFile, "deeper than 40 levels"),
    "JSON of 300,000 lists": Case(cfg(b'{"a":[' + b"[]," * 300_000 + b"[]]}"), BrokenFile, "are allowed"),
    "JSON of 80,000 mappings": Case(cfg(b'{"a":[' + b"{}," * 80_000 + b"{}]}"), BrokenFile, "d_in is not there"),
    "JSON of blanks": Case(like("saelens topk", grown), BrokenFile, "3000000 bytes"),
    "JSON with NaN": Case(cfg(b'{"d_in": NaN}'), BrokenFile, "NaN is not a number"),
    "JSON with -Infinity": Case(cfg(b'{"d_in": -Infinity}'), BrokenFile, "-Infinity is not a number"),
    "JSON with 1e999": Case(cfg(b'{"d_in": 16, "d_sae": 1e999}'), BrokenFile, "d_sae is inf"),
    "JSON with 5000 digits": Case(cfg(b'{"d_in": ' + b"9" * 5000 + b"}"), BrokenFile, "not JSON"),
    "JSON with a key twice": Case(cfg(b'{"d_in": 16, "d_in": 16}'), BrokenFile, "stands twice"),
    "JSON that is a list": Case(cfg(b"[]"), BrokenFile, "maps names to values"),
    "JSON that is empty": Case(cfg(b""), BrokenFile, "not JSON"),
    "JSON that is cut": Case(cfg(b'{"d_in": 1'), BrokenFile, "not JSON"),
    "JSON that is not UTF-8": Case(cfg(b'{"d_in": "\xff"}'), BrokenFile, "not JSON"),
    "YAML aliases that would be a billion": Case(yml(LAUGHS), BrokenFile, "has an alias"),
    "YAML that is in itself": Case(yml(b"a: &a [*a]"), BrokenFile, "has an alias"),
    "YAML with a Python object": Case(
        yml(b"a: !!python/object/apply:os.system ['touch executed']"), BrokenFile, "has a tag"
    ),
    "YAML with a Python name": Case(yml(b"k: !!python/name:os.system"), BrokenFile, "has a tag"),
    "YAML with an empty integer": Case(yml(b"k: !!int ''"), BrokenFile, "has a tag"),
    "YAML with a set of a number": Case(yml(b"k: !!set [1]"), BrokenFile, "has a tag"),
    "YAML with a date that is none": Case(yml(b"k: 2024-13-45"), BrokenFile, "month must be"),
    "YAML of open brackets": Case(yml(b"k: " + b"[" * 30_000), BrokenFile, "not YAML"),
    "YAML of 100 kB": Case(yml(b"k: [" + b"1," * 50_000 + b"]"), BrokenFile, "are allowed"),
    "YAML with a key twice": Case(yml(b"k: 1\nk: 2"), BrokenFile, "stands twice"),
    "YAML with infinity for k": Case(yml(b"k: .inf"), BrokenFile, "k is inf"),
    # values
    "k of 10**9": Case(saelens(k=10**9), BrokenFile, "k is 1000000000"),
    "k of 10**400": Case(saelens(k=10**400), BrokenFile, "k is 1000"),
    "k of 0": Case(saelens(k=0), BrokenFile, "k is 0"),
    "k that is true": Case(saelens(k=True), BrokenFile, "k is True"),
    "k that is text": Case(saelens(k="32"), BrokenFile, "k is '32'"),
    "d_sae of 2**62": Case(saelens(d_sae=1 << 62), BrokenFile, "4611686018427387904"),
    "d_in that is negative": Case(saelens(d_in=-16), BrokenFile, "d_in is -16"),
    "d_in that is a fraction": Case(saelens(d_in=16.0), BrokenFile, "d_in is 16.0"),
    "d_in that is a list": Case(saelens(d_in=[16]), BrokenFile, r"d_in is \[16\]"),
    "d_in that the weights have not": Case(saelens(d_in=17), BrokenFile, "not floating point"),
    "architecture that is a mapping": Case(saelens(architecture={"a": 1}), BrokenFile, "architecture is"),
    "architecture of nobody": Case(saelens(architecture="__import__('os')"), UnsupportedFormat, "known are"),
    "metadata that is text": Case(saelens(metadata="a"), BrokenFile, "metadata is"),
    "activation arguments that are a list": Case(saelens(activation_fn_kwargs=[1]), BrokenFile, "activation_fn_kwargs"),
    "normalisation by infinity": Case(saelens(normalize_activations=[0]), BrokenFile, "normalize_activations is"),
    "layer beyond 10**9": Case(
        config("dl_topk", "config.json", trainer=DEEP),
        BrokenFile, "layer is 1000000000000",
    ),
    "layer of 400 digits in a name": Case(
        like("saelens transcoder", lambda root, source: rewrite(source / "cfg.json", "blocks.", "blocks." + "9" * 400)),
        MissingSite, "not a stream and a layer",
    ),
    "layer that is negative": Case(yml(b"k: 3\nlayer: -1"), BrokenFile, "layer is -1"),
    "norms that are a list": Case(
        config("lm_saes topk", "config.json", dataset_average_activation_norm=[1]), BrokenFile, "not a mapping"
    ),
    "sparsify with k of 2**40": Case(config("sparsify pythia", "cfg.json", k=1 << 40), BrokenFile, "k is"),
    "hook point with '..'": Case(
        config("lm_saes topk", "config.json", hook_point_in="../../x", hook_point_out="../../y"),
        MissingSite, "'../../x'",
    ),
    # our own header
    "pursuit of 10**9 rounds": Case(native(NATIVE_PURSUIT | {"pursuit": {"rounds": 10**9}}), BrokenFile, "1000000000"),
    "pursuit of text": Case(native(NATIVE_PURSUIT | {"pursuit": {"rounds": "3"}}), BrokenFile, "(?i)pursuit"),
    "infinite eps": Case(
        file("sae.safetensors", native_bytes(json.dumps(NATIVE).replace("1e-05", "1e999"), "threshold")),
        BrokenFile, "eps inf",
    ),
    "deep manifest": Case(
        native(NATIVE | {"manifest": {"a": json.loads("[" * 90 + "]" * 90)}}), BrokenFile, "nests deeper"
    ),
    "site in our header that is none": Case(native(NATIVE | {"site": "../x"}), BrokenFile, "not a stream and a layer"),
    # shapes
    "no latents": Case(shaped(W_enc=(4, 0), b_enc=(0,), W_dec=(0, 4)), BrokenFile, "has 0 latents"),
    "no width": Case(shaped(W_enc=(0, 6), W_dec=(6, 0), b_dec=(0,)), BrokenFile, "reads 0 numbers"),
    "tensors without numbers": Case(shaped(W_enc=(0,), b_enc=(0,), W_dec=(0,), b_dec=(0,)), BrokenFile, "not a matrix"),
    "nine axes": Case(shaped(W_enc=(1,) * 9), BrokenFile, "has shape"),
    "encoder transposed": Case(like("saelens standard", transposed), BrokenFile, r"W_enc is \(48, 16\)"),
    "encoder transposed, square decoder": Case(shaped(W_enc=(4, 4), b_enc=(6,)), BrokenFile, "not floating point"),
    "2**62 bytes that are not there": Case(headed({"W_enc": HUGE}), BrokenFile, "has shape"),
    "empty tensor with endless axes": Case(
        headed({"W_enc": {"dtype": "F32", "shape": [1 << 40, 1 << 40, 0], "data_offsets": [0, 0]}}), BrokenFile, "shape"
    ),
    "a tensor of whole numbers": Case(
        file("sae.safetensors", save({"W_enc": torch.ones(2, 2, dtype=torch.int8)})), UnsupportedFormat, "no loader"
    ),
    "NaN in bfloat16": Case(filled(float("nan"), torch.bfloat16), BrokenFile, "W_dec holds NaN"),
    "infinity in float16": Case(filled(float("inf"), torch.float16), BrokenFile, "W_dec holds NaN or infinity"),
    "1e308 that overflows": Case(filled(1e308, torch.float64), BrokenFile, "infinity|not finite"),
    "hole of a terabyte": Case(hole, UnsupportedFormat, "begins with|no loader"),
    "weights without their last byte": Case(like("saelens topk", cut), BrokenFile, "the file has"),
    "header that lies of its length": Case(
        file("sae.safetensors", struct.pack("<Q", 1 << 62) + b"{}"), BrokenFile, "a header of"
    ),
    # pickles and zips
    "os.system in a pickle": Case(tensors("model.pt", {"W_enc": Wicked()}), UnsafePickle, "posix.system"),
    "os.system in a bare pickle": Case(file("model.pkl", pickle.dumps(Wicked(), 2)), UnsupportedFormat, "never run"),
    "os.system as a name for eval": Case(torch_zip(b"cbuiltins\neval\n" + words(3) + b"\x85R."), UnsafePickle, "eval"),
    "stride 0": Case(like("linear_relu", expanded), BrokenFile, "repeats its numbers"),
    "device that doubles 40 times": Case(torch_zip(DOUBLING), BrokenFile, "a device is"),
    "40,000 devices of a long name": Case(torch_zip(DEVICES), BrokenFile, "a device is"),
    "40,000 copies of a long list": Case(torch_zip(COPIES), BrokenFile, "a shape is"),
    "40,000 calls with a long tuple": Case(torch_zip(CALLS), BrokenFile, "it calls with"),
    "60,000 values under a long name": Case(torch_zip(NAMES), BrokenFile, "more than 256 letters"),
    "a million steps": Case(torch_zip(b"N" * 1_000_000 + b"."), BrokenFile, "more than 250000 steps"),
    "bomb of a numpy archive": Case(
        zipped("params.npz", ("W_enc.npy", BOMB), how=zipfile.ZIP_DEFLATED), BrokenFile, "would inflate"
    ),
    "numpy archive that climbs": Case(
        zipped("params.npz", ("../W_enc.npy", npy("(2,)", bytes(8)))), BrokenFile, "leaves the archive"
    ),
    "numpy archive of objects": Case(
        zipped("params.npz", ("W_enc.npy", npy("(2,)", bytes(8), "|O"))), UnsupportedFormat, "never read"
    ),
    "numpy archive with shape of 2**60": Case(
        zipped("params.npz", ("W_enc.npy", npy(f"({1 << 59}, {1 << 59})", b""))), BrokenFile, "has shape"
    ),
    "zip of 9,000 members": Case(
        zipped("params.npz", *((f"{i}.npy", b"") for i in range(9000))), BrokenFile, "9000 members"
    ),
    "crosscoder of three axes": Case(
        file("params_layer_1.safetensors", save({"w_enc": torch.ones(2, 2, 2)})), UnsupportedFormat, "several layers"
    ),
    # places
    "empty folder": Case(lambda root: root, UnsupportedFormat, "no loader recognises it"),
    "empty file": Case(file("sae.safetensors", b""), BrokenFile, "it is empty"),
    "nothing there": Case(lambda root: root / "none", UnsupportedFormat, "no such file or folder"),
    "name that is too long": Case(lambda root: root / ("a" * 5000), UnsupportedFormat, "no such file or folder"),
    "name with a zero": Case(lambda root: str(root / "a\0b"), UnsupportedFormat, "no such file or folder"),
    "loop of links": Case(looped, UnsupportedFormat, "no such file or folder"),
    "config that is a loop of links": Case(like("saelens topk", link_loop), UnsupportedFormat, "no loader"),
    "config that is a folder": Case(like("saelens topk", folder_for("cfg.json")), UnsupportedFormat, "no loader"),
    "weights that are a folder": Case(
        like("lm_saes topk", folder_for("sae_weights.safetensors")), UnsupportedFormat, "folder|no loader"
    ),
    "config that is a pipe": Case(like("saelens topk", pipe_for("cfg.json")), UnsupportedFormat, "no loader"),
    "weights that are a pipe": Case(
        like("lm_saes topk", pipe_for("sae_weights.safetensors")), UnsupportedFormat, "device|no loader"
    ),
    "pipe": Case(pipe, UnsupportedFormat, "no loader|folder or a device"),
    "file that gives an error when it is read": Case(
        lambda root: linked(root / "sae.safetensors", "/proc/self/mem"), BrokenFile, "Input/output error"
    ),
    "config that gives an error when it is read": Case(
        like("saelens topk", lambda root, source: linked(source / "cfg.json", "/proc/self/mem") and None),
        BrokenFile, "Input/output error",
    ),
    "device without an end": Case(lambda root: "/dev/zero", UnsupportedFormat, "no loader|folder or a device"),
    "file name with a newline": Case(newline_in_its_name, UnsupportedFormat, "no loader"),
    "two families at once": Case(like("saelens topk", two_families), UnsupportedFormat, "both recognise it"),
    "address that climbs": Case(lambda root: "hf://a/b/../../etc", UnsupportedFormat, r"no '\.' or '\.\.'"),
    "site of 400 digits": Case(
        like("saelens topk", lambda root, source: None), SaeguardError, "not a stream and a layer",
        {"site": "resid_post." + "9" * 400},
    ),
}  # fmt: skip


def rewrite(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


WATCH = """
import json, os, sys, time
from pathlib import Path
from saeguard import load_sae
from saeguard.errors import SaeguardError
from tests.fuzz.watch import Watch, peak_bytes
from tests.lookalikes import LOOKALIKES
from tests.test_hostile_sources import CASES

for name in ("saelens topk", "itda", "gemma_scope alone", "circuit_tracer relu"):
    Path(name).mkdir()
    load_sae(LOOKALIKES[name].write(Path(name)), **LOOKALIKES[name].options)
watch, wrong, most = Watch(), [], 0.0
sources = []
for number, case in enumerate(CASES.values()):
    Path(f"{number}/sae").mkdir(parents=True)
    sources.append(case.build(Path(f"{number}/sae").absolute()))
before_all = peak_bytes()
for (name, case), source in zip(CASES.items(), sources):
    before, raised = time.process_time(), ""
    with watch.on() as seen:
        try:
            load_sae(source, **case.options)
            raised = "nothing"
        except SaeguardError:
            pass
        except BaseException as error:
            raised = repr(error)[:300]
    took = time.process_time() - before
    most = max(most, took)
    if raised or seen or took > 1:
        wrong.append([name, raised, f"{took:.2f} s", *seen])
print(json.dumps({"wrong": wrong, "slowest": most, "grown": peak_bytes() - before_all, "runs": len(CASES)}))
"""


def test_there_are_many_cases():
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
def test_hostile_source_is_refused_by_name(tmp_path, monkeypatch, name):
    case = CASES[name]
    for folder in ("here", "sae"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    source = case.build(tmp_path / "sae")

    with pytest.raises(case.error, match=case.says) as caught:
        load_sae(source, **case.options)

    assert len(str(caught.value)) < 8000
    assert os.listdir(tmp_path / "here") == []


def test_hostile_sources_execute_and_write_nothing_and_take_little_time_and_memory(tmp_path):
    """In a process of its own, where the types of arguments are not checked at every call."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH], capture_output=True, text=True, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["wrong"] == []
    assert said["runs"] == len(CASES)
    assert said["slowest"] < MAX_SECONDS
    assert said["grown"] < MAX_BYTES
    assert not list(tmp_path.rglob("executed"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_folder_and_file_that_may_not_be_read_are_refused(tmp_path):
    source = LOOKALIKES["saelens topk"].write(tmp_path)
    (source / "cfg.json").chmod(0)

    with pytest.raises(BrokenFile, match="Permission denied"):
        load_sae(source)

    source.chmod(0)
    with pytest.raises(LoadError):
        load_sae(source)
    source.chmod(0o700)
