"""A zip file's members, believed only after the whole directory is sound: where each lies, and that none overlap.

    30 bytes b"PK\\3\\4"... | name | extra | data | next member ... | directory | b"PK\\5\\6"...

Python's own reader trusts a directory of any size, members that share their bytes, and names that leave the folder.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from saeguard.archives.base import broken

MAX_MEMBERS = 8192
MAX_DIRECTORY_BYTES = 2_000_000  # 8192 members with names of 200 letters
_LOCAL = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
_ENCRYPTED = 0x1 | 0x40 | 0x2000
# What zipfile and zlib raise for damaged archives, besides their own errors.
_DAMAGE = (BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError, OverflowError,
           LookupError)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """One member, whose bytes are inside the file and nobody else's."""

    name: str
    offset: int
    n_bytes: int
    packed_bytes: int
    info: ZipInfo

    @property
    def packed(self) -> bool:
        """Whether its bytes have to be inflated."""
        return self.info.compress_type != ZIP_STORED


class _Directory(io.FileIO):
    """A file that does not hand out more at once than a sound directory has."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise BadZipFile(f"a directory of {size} bytes, and {MAX_DIRECTORY_BYTES} are allowed")
        return super().read(-1 if size is None else size) or b""


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """What goes wrong inside with a zip file raises `BrokenFile`."""
    try:
        yield
    except _DAMAGE as error:
        raise broken(path, f"it is not a sound zip archive ({error})") from error


def members(path: Path) -> list[Member]:
    """All members in the order in which they lie in the file, folders left out."""
    with damage_named(path), _Directory(path) as file:
        size = os.fstat(file.fileno()).st_size
        with ZipFile(file) as archive:
            infos = archive.infolist()
            _check_names(path, infos)
            total = sum(info.compress_size for info in infos)
            if total > size:
                raise broken(path, f"members of {total} bytes in a file of {size}")
            found = [_member(path, file, info) for info in infos if not info.is_dir()]
            end = archive.start_dir
    found.sort(key=lambda member: member.info.header_offset)
    begins = [member.info.header_offset for member in found]
    for member, after in zip(found, [*begins, end][1:], strict=True):
        if member.offset + member.packed_bytes > after:
            raise broken(path, f"member {short(member.name)} reaches into what follows it")
    return found


def _check_names(path: Path, infos: Sequence[ZipInfo]) -> None:
    if len(infos) > MAX_MEMBERS:
        raise broken(path, f"{len(infos)} members, and {MAX_MEMBERS} are allowed")
    names = {info.filename for info in infos}
    if len(names) != len(infos):
        raise broken(path, "two members have one name")
    for name in names:
        if name.startswith("/") or ".." in name.split("/") or "\\" in name:
            raise broken(path, f"member {short(name)} has a name that leaves the archive")


def _member(path: Path, file: io.FileIO, info: ZipInfo) -> Member:
    if info.flag_bits & _ENCRYPTED or info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise broken(path, f"member {short(info.filename)} is encrypted, or compressed in a way that is not read")
    if info.compress_type == ZIP_STORED and info.file_size != info.compress_size:
        raise broken(path, f"member {short(info.filename)} has {info.compress_size} bytes and claims {info.file_size}")
    file.seek(info.header_offset)
    signature, name_bytes, extra_bytes = _LOCAL.unpack(file.read(_LOCAL.size))
    if signature != b"PK\3\4" or file.read(name_bytes) != _raw_name(info):
        raise broken(path, f"member {short(info.filename)} is not where the directory says")
    offset = info.header_offset + _LOCAL.size + name_bytes + extra_bytes
    return Member(info.filename, offset, info.file_size, info.compress_size, info)


def _raw_name(info: ZipInfo) -> bytes:
    return info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
