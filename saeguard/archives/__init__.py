"""One reader per file format that holds named tensors, behind one protocol."""

from pathlib import Path
from stat import S_ISREG

from saeguard.archives.base import Archive, FileArchive, Spec, broken, unsupported
from saeguard.archives.gguf_file import MAGIC as GGUF
from saeguard.archives.gguf_file import open_gguf
from saeguard.archives.npz_file import open_npz
from saeguard.archives.safetensors_file import open_safetensors
from saeguard.archives.torch_file import MAGIC, open_legacy, open_torch
from saeguard.archives.zip_directory import members
from saeguard.errors import LoadError

__all__ = ["Archive", "FileArchive", "Spec", "is_archive", "open_archive"]

_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
_FORMATS = "Read are safetensors, numpy's .npz, what torch.save writes, and vectors in GGUF."


def open_archive(path: Path, *, legacy: bool = False) -> Archive:
    """Open a file of named tensors; its first bytes say which reader it is for, not its name.

    ``legacy`` admits what torch wrote before version 1.6. Raises `BrokenFile`, `UnsafePickle`, `UnsupportedFormat`.
    """
    begin = _begin(path)
    if not begin:
        raise broken(path, "it is empty")
    if begin.startswith(GGUF):
        return open_gguf(path)
    if begin[8:9] == b"{":
        return open_safetensors(path)
    if begin[:2] == b"PK":
        return _open_zip(path)
    if begin.startswith(MAGIC):
        if legacy:
            return open_legacy(path)
        raise unsupported(path, "torch wrote it before version 1.6", "Load it and save it again with a current torch.")
    if begin[257:262] == b"ustar":
        raise unsupported(path, "it is a tar archive", "Unpack it, and name a file in it.")
    for signature, name in _PACKED.items():
        if begin.startswith(signature):
            raise unsupported(path, f"it is compressed with {name}", "Decompress it, where its maker can be trusted.")
    if begin[:1] == b"\x80":
        raise unsupported(path, "it is a pickle that torch did not write, which only code can read", _FORMATS)
    raise unsupported(path, f"it begins with {begin[:12]!r}", _FORMATS)


def is_archive(path: Path) -> bool:
    """Whether the first bytes look like a format that is read; whether the rest holds, `open_archive` says."""
    try:
        begin = _begin(path)
    except LoadError:
        return False
    return begin[8:9] == b"{" or begin.startswith((b"PK\3\4", MAGIC[:9], GGUF))


def _begin(path: Path) -> bytes:
    """The first block of a file; a folder or a pipe has none."""
    try:
        if not S_ISREG(path.stat().st_mode):
            raise unsupported(path, "it is a folder or a device", "Name a file.")
        with path.open("rb") as file:
            return file.read(512)
    except (OSError, ValueError) as error:
        raise broken(path, str(error)) from error


def _open_zip(path: Path) -> Archive:
    found = members(path)
    names = [member.name for member in found]
    arrays, pickles = any(n.endswith(".npy") for n in names), any(n.endswith("/data.pkl") for n in names)
    if arrays == pickles:
        holds = "both numpy arrays and a pickle" if arrays else "neither numpy arrays nor a pickle of torch's"
        raise unsupported(path, f"it is a zip archive with {holds}", _FORMATS)
    return open_npz(path, found) if arrays else open_torch(path, found)
