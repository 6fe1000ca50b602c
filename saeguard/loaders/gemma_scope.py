"""Gemma Scope 1: a numpy archive without a config, whose path is all that says which model and site it is for.

    gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82/params.npz
        W_enc.npy (d_in, d_sae)  b_enc.npy  W_dec.npy (d_sae, d_in)  b_dec.npy  threshold.npy      float32, jumprelu
    a member: b"\\x93NUMPY" 1 0 | length (2 bytes) | {'descr': '<f4', 'fortran_order': False, 'shape': (2304,), } | data

    res -> resid_post    mlp -> mlp_out, after the post-norm    att -> attn_z    transcoders, embedding: refused

The archive's directory and each member's header are checked before data is read, and nothing is ever unpickled.
"""

import math
import os
import re
import struct
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
import torch
from torch import Tensor

from saeguard.errors import UnsupportedFormat
from saeguard.loaders import headers
from saeguard.sae import SAE
from saeguard.sites import Site

ARCHIVE = "params.npz"
_NAMES = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
_ALIASES = {"w_enc": "W_enc", "w_dec": "W_dec"}
_STREAMS = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}
# Whole folder names only; the hub's cache puts models--google-- in front of a repository's.
_REPOSITORY = re.compile(
    r"(?<![^/])(?:models--google--)?(gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)(?:-canonical)?)(?![^/])"
)
_PLACE = re.compile(r"(?<![^/])((layer_(\d{1,3})|embedding)/width_\w+/(?:average_l0_[\w.]+|canonical))$")
_NPY = re.compile(
    r"\{'descr': '([^']{1,20})', 'fortran_order': (?:True|False), 'shape': \((\d{1,12}), ?(\d{1,12})?\), \} *\n"
)
_ITEM_BYTES = {"<f2": 2, "<f4": 4, "<f8": 8}
# What zipfile and numpy raise for damaged archives, besides their own errors.
_DAMAGE = (BadZipFile, OSError, EOFError, ValueError, RuntimeError, OverflowError, struct.error)


def recognises(source: Path) -> bool:
    """Whether it is ``params.npz``, or a folder with one, and its directory lists an encoder."""
    path = _file(source)
    if not path.is_file() or path.suffix != ".npz":
        return False
    try:
        with ZipFile(path) as archive:
            return any(name in ("W_enc.npy", "w_enc.npy") for name in archive.namelist())
    except _DAMAGE as error:
        raise headers.broken(path, f"it is not a numpy archive ({error})") from error


def load(source: Path) -> SAE:
    """Read an archive; the site is None, and the manifest says why, where the path does not say it.

    Raises `BrokenFile`, `UnsupportedFormat`.
    """
    path = _file(source)
    name, site, model, manifest = _origin(path)
    tensors: dict[str, Any] = _read(path)
    headers.check_finite(path, tensors)
    tensors["threshold"] = tensors["threshold"].clamp_min(0.0)  # relu(pre) where pre > threshold
    return SAE(name=name, activation="jumprelu", site=site, model=model, manifest=manifest, **tensors)


def _file(source: Path) -> Path:
    return source / ARCHIVE if source.is_dir() else source


def _origin(path: Path) -> tuple[str, Site | None, str | None, dict[str, Any]]:
    where = Path(os.path.abspath(path.parent)).as_posix()  # not resolve(): the hub's cache keeps files behind links
    place, repository = _PLACE.search(where), next(reversed(list(_REPOSITORY.finditer(where))), None)
    name = "/".join(match[1] for match in (repository, place) if match) or path.parent.name or path.stem
    if repository and repository[4] == "transcoders":
        raise _unsupported(name, "it is a transcoder, which reads one stream and writes another")
    if place and place[2] == "embedding":
        raise _unsupported(name, "it reads embeddings before Gemma scales them, which is not a stream")
    manifest: dict[str, Any] = {"format": "gemma_scope", "architecture": "jumprelu", "bos": True}
    model = f"google/gemma-2-{repository[2]}{'-it' if repository[3] == 'it' else ''}" if repository else None
    if repository and place:
        return name, Site(_STREAMS[repository[4]], int(place[3])), model, manifest
    missing = "folder layer_.../width_.../average_l0_..." if repository else "folder gemma-scope-...-res, -mlp or -att"
    return name, None, model, manifest | {"site_unknown": f"the path has no {missing} in it"}


def _unsupported(name: str, found: str) -> UnsupportedFormat:
    return UnsupportedFormat(f"Gemma Scope archive {name}", found, "Use an SAE of res, mlp or att.")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with ZipFile(path) as archive:
            members = _members(path, archive)
            shapes = {name: _shape(path, archive, member) for name, member in members.items()}
            d_in, d_sae = shapes["W_enc"] if len(shapes["W_enc"]) == 2 else (0, 0)
            expected: dict[str, headers.Shape] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
            headers.check_shapes(path, shapes, {name: expected.get(name, (d_sae,)) for name in shapes})
            return {name: _tensor(archive, member) for name, member in members.items()}
    except _DAMAGE as error:
        raise headers.broken(path, f"it is not a numpy archive ({error})") from error


def _members(path: Path, archive: ZipFile) -> dict[str, ZipInfo]:
    found = archive.infolist()
    members = {_ALIASES.get(stem, stem): info for info in found if (stem := info.filename.removesuffix(".npy"))}
    if set(members) != _NAMES or len(found) != len(_NAMES):
        raise headers.broken(path, f"members {headers.short(sorted(i.filename for i in found))}, not {sorted(_NAMES)}")
    size = path.stat().st_size
    for name, info in members.items():
        if info.compress_type != ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise headers.broken(path, f"member {name} is compressed or encrypted, which Gemma Scope's are not")
    if (total := sum(info.file_size for info in found)) > size:
        raise headers.broken(path, f"members of {total} bytes in a file of {size}")
    return members


def _shape(path: Path, archive: ZipFile, member: ZipInfo) -> headers.Shape:
    with archive.open(member) as file:
        prefix = file.read(10)
        text = file.read(int.from_bytes(prefix[8:], "little"))
    match = _NPY.fullmatch(text.decode("latin-1"))  # a pattern: numpy's own reader evaluates the text
    if prefix[:8] != b"\x93NUMPY\x01\x00" or match is None:
        raise headers.broken(path, f"{member.filename} does not begin as a numpy array of one or two axes")
    dtype, shape = match[1], tuple(int(length) for length in match.groups()[1:] if length)
    data_bytes = member.file_size - len(prefix) - len(text)
    if dtype not in _ITEM_BYTES:
        pickled = "pickled objects, which are never unpickled" if "O" in dtype else "not floating point"
        raise headers.broken(path, f"{member.filename} is of dtype {dtype}: {pickled}")
    if data_bytes != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise headers.broken(path, f"{member.filename} is {dtype} {shape} in {data_bytes} bytes")
    return shape


def _tensor(archive: ZipFile, member: ZipInfo) -> Tensor:
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
