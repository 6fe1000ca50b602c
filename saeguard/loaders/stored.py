"""An SAE in files: what it is, known from their headers, and its weights, read whole or for some latents only.

A family says which stored tensor is which (`Piece`), along which axis its latents lie, and how the pieces fold into
an `SAE`'s tensors. A fold works latent by latent, so folding some latents' pieces gives these latents of the whole.
"""

import hashlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from saeguard.activations import KINDS, Activation, Pursuit
from saeguard.archives import Archive
from saeguard.errors import BrokenFile, LatentOutOfRange
from saeguard.loaders.source import broken
from saeguard.norms import Norm
from saeguard.sae import SAE
from saeguard.sites import Site

Fold = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""From pieces, in our orientation and float32 or as stored, to the tensors of an `SAE`."""

_STRETCH = 1 << 20
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Piece:
    """One stored tensor. ``axis`` is that of the latents in the file, None where it has none; ``turned``: the file
    holds the transpose of what the fold expects (encoders d_in x d_sae, decoders d_sae x d_out)."""

    archive: Archive
    name: str
    axis: int | None = None
    turned: bool = False

    def read(self, latents: Sequence[int] | None) -> Tensor:
        """The tensor, or its part for some latents."""
        partly = latents is not None and self.axis is not None
        tensor = self.archive.take(self.name, latents or (), self.axis or 0) if partly else self.archive.read(self.name)
        if not all_finite(tensor):
            raise broken(self.archive.path, f"{self.name} holds NaN or infinity")
        return tensor.T if self.turned else tensor

    def bytes_for(self, count: int | None) -> int:
        """Bytes to look at for so many latents, or for all."""
        return self.archive.bytes_for(self.name, count if self.axis is not None else None, self.axis)


@dataclass(frozen=True, eq=False)
class Stored:
    """See the module's text; the fields that an `SAE` has too mean the same there.

    ``manifest`` should say ``format`` (the family), ``architecture``, ``bos``, ``folds``, and whatever else the files
    record of the SAE's origin, in plain JSON values.
    """

    family: str
    name: str
    pieces: Mapping[str, Piece]
    d_in: int
    d_sae: int
    d_out: int
    activation: Activation
    fold: Fold = dict
    top_k: int | None = None
    pursuit: Pursuit | None = None
    norm: Norm = "none"
    eps: float = 1e-5
    site: Site | None = None
    site_out: Site | None = None
    model: str | None = None
    n_base: int | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not (self.d_in and self.d_sae and self.d_out):
            widths = f"it reads {self.d_in} numbers, has {self.d_sae} latents and writes {self.d_out}"
            raise BrokenFile(f"SAE {self.name}", widths, "Fetch or export its files again.")

    @property
    def ranks(self) -> bool:
        return KINDS[self.activation].ranks

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that hold its tensors."""
        return tuple(dict.fromkeys(piece.archive.path for piece in self.pieces.values()))

    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.files)

    def bytes_for(self, count: int | None) -> int:
        """Bytes to look at for so many latents, or for all; kinds that rank need all."""
        return sum(piece.bytes_for(None if self.ranks else count) for piece in self.pieces.values())

    def sae(self, latents: Iterable[int] | None = None) -> SAE:
        """Read it, or only some latents, which keep their numbers.

        Raises `BrokenFile`, also for numbers that are not finite, and `LatentOutOfRange`.
        """
        if latents is None:
            return self._sae(None)
        wanted = tuple(dict.fromkeys(_numbers(self.name, latents)))
        SAE.check_range(self.name, self.d_sae, wanted)
        return self._sae(None).narrow(wanted) if self.ranks else self._sae(wanted)

    def _sae(self, held: tuple[int, ...] | None) -> SAE:
        raw = {key: piece.read(held) for key, piece in self.pieces.items()}
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in raw.values()})
        tensors = self.fold(raw)
        for key, tensor in tensors.items():
            if not all_finite(tensor):
                raise BrokenFile(f"SAE {self.name}", f"{key} is not finite once folded", "Fetch the files again.")
        manifest = dict(self.manifest) | {"dtype": "+".join(dtypes)}
        if held is None:
            manifest["sha256"] = {path.name: _sha256(path) for path in self.files}
        for piece in self.pieces.values():
            piece.archive.check_unchanged()  # else the header is of one file, and the numbers or the hash of another
        return SAE(
            name=self.name, activation=self.activation, top_k=self.top_k, pursuit=self.pursuit, norm=self.norm,
            eps=self.eps, site=self.site, site_out=self.site_out, model=self.model, manifest=manifest, held=held,
            total=None if held is None else self.d_sae, n_base=self.n_base, **tensors,
        )  # fmt: skip


def _numbers(name: str, latents: Any) -> list[int]:
    """Latents as plain ints, whatever integers they were; a tensor of them is one, too."""
    try:
        listed = latents.tolist() if isinstance(latents, Tensor) else list(latents)
        if any(isinstance(latent, bool) for latent in listed):
            raise TypeError("a bool")
        return [operator.index(latent) for latent in listed]
    except TypeError as error:
        raise LatentOutOfRange(
            f"latents {short(latents)} of {name}", f"they are not a list of integers ({error})", "Give latents=[3, 17]."
        ) from error


def all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN and no infinity, also not once it is float32; looked at in stretches: a matrix can be
    half of the memory."""
    if not tensor.numel():
        return True
    rows = max(1, _STRETCH // max(1, tensor[0].numel() if tensor.ndim and len(tensor) else 1))
    parts = tensor.split(rows) if tensor.ndim else (tensor,)
    return all(bool(torch.isfinite(part.float() if part.dtype == torch.float64 else part).all()) for part in parts)


def check_specs(archive: Archive, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `BrokenFile` unless every expected tensor is there, in its shape and floating point."""
    for name, shape in expected.items():
        spec = archive.specs.get(name)
        if spec is None or spec.shape != shape or spec.dtype not in FLOATS:
            found = "not there" if spec is None else f"{spec.shape} {spec.dtype}"
            raise broken(archive.path, f"{name} is {found}, not floating point {shape}")


def matrix(archive: Archive, name: str) -> tuple[int, int]:
    """The shape of a tensor that has to have two axes."""
    spec = archive.specs.get(name)
    if spec is None or len(spec.shape) != 2:
        raise broken(archive.path, f"{name} is {'not there' if spec is None else spec.shape}, not a matrix")
    return spec.shape[0], spec.shape[1]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
