"""What is fuzzed: each target takes any bytes, and returns or raises an error of ours, and nothing else.

    parsers     one format each: three archives, the pickle machine, JSON, YAML, plans, audit logs, our own header
    families    a look-alike of each family, of which one file is replaced: its config, or its tensors

Files are written by `Target.put`, which is not what is tested; `Target.parse` reads them and writes nothing.
"""

import json
import os
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from saeguard import Plan, load_sae, strict_json
from saeguard.archives import open_archive, plain_pickle, torch_file
from saeguard.errors import SaeguardError
from saeguard.guarding.verify import read
from saeguard.loaders.places import CONFIGS
from saeguard.loaders.places import TENSORS as WEIGHTS
from saeguard.loaders.source import Source, depth
from tests.audits import KEY, chain, short_record
from tests.lookalikes import LOOKALIKES

CORPUS = Path(__file__).parent / "corpus"
HERE = Path("pickle")


@dataclass(frozen=True)
class Target:
    """One entry of the table; ``good`` gives inputs that are sound, besides those in the corpus."""

    name: str
    put: Callable[[bytes], Any]
    parse: Callable[[Any], object]
    good: Callable[[], list[bytes]]

    def __call__(self, data: bytes) -> bool:
        """Whether ``data`` was read to its end; raises what is not promised."""
        return self.survives(self.put(data))

    def survives(self, found: Any) -> bool:
        """The same, for what `put` gave."""
        try:
            self.parse(found)
        except SaeguardError as error:
            str(error)
            return False
        return True

    @property
    def corpus(self) -> dict[str, bytes]:
        """The files in the repository, by name."""
        return {path.name: path.read_bytes() for path in sorted((CORPUS / self.name).glob("*"))}

    def seeds(self) -> list[bytes]:
        """What mutations begin with: as many sound inputs as others, or most would end at the first check."""
        good, corpus = self.good(), list(self.corpus.values())
        return corpus + good * max(len(corpus) // len(good), 1)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return tempfile.TemporaryDirectory(prefix="fuzz-", dir=in_memory)


def _write(name: str) -> Callable[[bytes], Path]:
    def put(data: bytes) -> Path:
        path = Path(_scratch().name) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    return put


# Parsers


def _read_archive(path: Path) -> None:
    archive = open_archive(path, legacy=True)
    for name, spec in archive.specs.items():
        archive.read(name).sum()
        for axis in range(len(spec.shape)):
            archive.take(name, [0] if spec.shape[axis] else [], axis)


def _read_pickle(data: bytes) -> None:
    plain_pickle.load(HERE, BytesIO(data), torch_file._table(), torch_file._stored)


def _read_json(data: bytes) -> None:
    try:
        found = strict_json.parse(data)
    except ValueError as error:  # what it promises; whoever calls it gives it a name
        raise SaeguardError("text", str(error), "") from error
    depth(found)


def _read_yaml(path: Path) -> None:
    Source(path.parent).yaml(path.name)


def _read_plan(data: bytes) -> None:
    plan = Plan.from_json(data)
    if Plan.from_json(plan.to_json()) != plan:
        raise AssertionError("a plan that is not what it was written as")
    plan.fingerprint()


def _read_log(path: Path) -> None:
    for key in (None, KEY):
        for _ in read(path, key=key):
            pass


TENSORS = {"W": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.int32)}
SAFETENSORS = save(TENSORS, metadata={"a": "b"})
PLAN = b"""{"saeguard": "plan", "schema": 1, "name": "p", "rules": [
{"sae": "a", "latents": [1, 2], "op": {"kind": "clamp", "value": [3.0, 4.0], "when": "always"},
 "site": "resid_post.3", "first": 4},
{"sae": "b", "latents": [1], "op": {"kind": "scale", "factor": 0.5}, "priority": 2, "phase": "generated"},
{"sae": "b", "latents": [], "op": {"kind": "ablate"}, "trigger": {"kind": "any_active", "latents": [7]}}]}"""
JSON = b'{"a": [1, -2.5e3, null, true, "\\u00e9"], "b": {"c": {}, "d": []}}'
YAML = b"model_name: gpt2\nlayers: [1, 2.5, -3, 1e3, ~, true]\nnested:\n  when: 2024-01-02\n  text: 'a: b'\n  - \n"
YAML_GOOD = YAML.removesuffix(b"  - \n")


def npz_bytes(compressed: bool = False) -> bytes:
    stream = BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **{name: t.numpy() for name, t in TENSORS.items()})
    return stream.getvalue()


def torch_bytes(value: Any = TENSORS, legacy: bool = False, protocol: int = 2) -> bytes:
    stream = BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return stream.getvalue()


def inner_pickle(protocol: int = 2) -> bytes:
    """The data.pkl of a torch file."""
    whole = torch_bytes({"cfg": {"k": 3, "lr": 0.5, "dtype": torch.float32}, "W": torch.ones(2, 2)}, protocol=protocol)
    with zipfile.ZipFile(BytesIO(whole)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


NATIVE = {
    "schema": 1, "name": "n", "activation": "jumprelu", "norm": "layer_norm", "eps": 1e-5, "site": "mlp_in.1",
    "site_out": "mlp_out.1", "model": "m", "manifest": {"bos": True, "folds": []},
}  # fmt: skip
NATIVE_PURSUIT = {
    "schema": 1, "name": "n", "activation": "pursuit", "site": "resid_post.2",
    "pursuit": {"rounds": 3, "signed": False, "residual": 0.5, "stops_on_repeat": True},
}  # fmt: skip


def native_bytes(meta: Any, *extra: str) -> bytes:
    shapes = {"W_enc": (2, 3), "b_enc": (3,), "W_dec": (3, 2), "b_dec": (2,), "threshold": (3,)}
    tensors = {name: torch.ones(shapes[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec", *extra)}
    return save(tensors, metadata={"saeguard": meta if isinstance(meta, str) else json.dumps(meta)})


def _header_of(text: bytes) -> bytes:
    """A file of ours whose header, as JSON in JSON, says ``text``."""
    whole = native_bytes("HERE", "threshold")
    length = struct.unpack("<Q", whole[:8])[0]
    said = json.dumps(text.decode("utf-8", "surrogateescape").encode("utf-8", "replace").decode()).encode()
    header = whole[8 : 8 + length].replace(b'"HERE"', said).rstrip()
    return struct.pack("<Q", len(header)) + header + whole[8 + length :]


def _put_header(data: bytes) -> Path:
    return _write("meta/sae.safetensors")(_header_of(data))


def _parsers() -> Iterator[Target]:
    archive = "archive.bin"
    yield Target("safetensors", _write(archive), _read_archive, lambda: [SAFETENSORS])
    yield Target("npz", _write(archive), _read_archive, lambda: [npz_bytes(), npz_bytes(True)])
    yield Target("torch_zip", _write(archive), _read_archive, lambda: [torch_bytes(), torch_bytes(protocol=4)])
    yield Target("torch_legacy", _write(archive), _read_archive, lambda: [torch_bytes(legacy=True)])
    yield Target("pickle", bytes, _read_pickle, lambda: [inner_pickle(), inner_pickle(4)])
    yield Target("json", bytes, _read_json, lambda: [JSON])
    yield Target("yaml", _write("text.yaml"), _read_yaml, lambda: [YAML_GOOD])
    yield Target("plan", bytes, _read_plan, lambda: [PLAN])
    yield Target("audit", _write("audit.jsonl"), _read_log, lambda: [b"".join(chain(2, make=short_record))])
    yield Target("native_header", _put_header, load_sae, lambda: [json.dumps(NATIVE).encode()])
    yield Target(
        "native_file", _write("native/sae.safetensors"), load_sae,
        lambda: [native_bytes(NATIVE, "threshold"), native_bytes(NATIVE_PURSUIT)],
    )  # fmt: skip


# Families

PREFERRED = (
    "saelens topk rescaled average", "saelens matryoshka rescaled average", "gemma_scope finetuned",
    "circuit_tracer topk", "dl_topk", "sdxl_unbox", "llama_scope residual", "lm_saes topk", "qwen_scope one layer",
)  # fmt: skip
"""Look-alikes that are taken where a family has several with a file of one kind: those whose files say most."""


NOT_READ = ("atom_indices.pt", "mean.pt", "std.pt")


@dataclass(frozen=True)
class Placed:
    """Files of a look-alike, of which ``file`` is replaced, and what `load_sae` is given."""

    source: Path
    file: Path
    options: dict[str, Any]
    whole: bytes


@cache
def _placed(like: str, file: str) -> Placed:
    folder = Path(_scratch().name) / re.sub(r"\W", "_", f"{like} {file}")
    folder.mkdir()
    source = LOOKALIKES[like].write(folder)
    return Placed(source, folder / file, dict(LOOKALIKES[like].options), (folder / file).read_bytes())


def _kind(file: str) -> str | None:
    """What a file is to its family: a config of that name, weights of that format, or nothing that is read."""
    name = Path(file).name
    if name in NOT_READ:
        return None
    if name in CONFIGS:
        return name
    if name.endswith("_cfg.json"):
        return "cfg.json"
    return Path(name).suffix.strip(".") if name.endswith(WEIGHTS) else None


def _files_of(like: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        LOOKALIKES[like].write(Path(folder))
        return [str(p.relative_to(folder)) for p in sorted(Path(folder).rglob("*")) if p.is_file()]


def _family(name: str, like: str, file: str) -> Target:
    def put(data: bytes) -> Placed:
        placed = _placed(like, file)
        placed.file.write_bytes(data)
        return placed

    return Target(name, put, _load, lambda: [_placed(like, file).whole])


def _load(placed: Placed) -> None:
    load_sae(placed.source, **placed.options)
    load_sae(placed.source, latents=(0,), **placed.options)


def _families() -> Iterator[Target]:
    found: dict[str, tuple[str, str]] = {}
    for like in [*PREFERRED, *LOOKALIKES]:
        for file in _files_of(like):
            if kind := _kind(file):
                found.setdefault(f"{LOOKALIKES[like].family}.{kind}", (like, file))
    for name, (like, file) in sorted(found.items()):
        yield _family(name, like, file)
    yield Target(
        "refused.config.yaml", _write("refused/config.yaml"), lambda path: load_sae(path.parent), lambda: [YAML_GOOD]
    )
    for file, tensors in {"ae.pt": torch_bytes({"step": 1, "ae": TENSORS, "optimizer": {}}),
                          "params_layer_3.safetensors": SAFETENSORS}.items():  # fmt: skip
        yield Target(f"refused.{file}", _write(f"refused_{file}/{file}"), load_sae, lambda tensors=tensors: [tensors])


PARSERS: dict[str, Target] = {target.name: target for target in _parsers()}
FAMILIES: dict[str, Target] = {target.name: target for target in _families()}
TARGETS = PARSERS | FAMILIES
