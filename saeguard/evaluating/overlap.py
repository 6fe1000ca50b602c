"""Which latents two dictionaries have in common: one-to-one pairs of decoder rows that point the same way.

    pairs    the matching with the largest sum of cosines (Hungarian method); what points away pairs with nothing
    shared   its pairs with a cosine of at least 0.7 (Shared Feature Ratio, FaithfulSAE, arXiv 2506.17673)
    nearest  mean over one dictionary's latents of the largest cosine with any of the other's

Up to `WHOLE` pairs the matching is over all of them. Beyond, memory is little more than the two decoders': cosines are
computed in chunks and every latent of either side keeps its `CANDIDATES` nearest; over these the matching is exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saeguard.errors import BrokenFile, MissingExtra, NotSliceable, WidthMismatch, WrongModel
from saeguard.sae import SAE

LEAST = 0.7
WHOLE = 2**26
"""Pairs of which all cosines are held at once: 0.8 GB."""
CANDIDATES = 32
ROUNDING = 1e-5
"""By which float32 may put the cosine of a row with itself below 1."""
CHUNK = 2**25
"""Cosines that are computed at a time."""


@dataclass(frozen=True, eq=False)
class Matching:
    """Pairs of latents, by the first dictionary's number, with their cosines, all above 0."""

    a: Int[Tensor, " pairs"]
    b: Int[Tensor, " pairs"]
    cosine: Float[Tensor, " pairs"]


@dataclass(frozen=True)
class Overlap:
    """``shared`` pairs have a cosine of at least ``least``; ``share_a`` is that of a's latents which are in one.

    ``candidates`` is None where every pair was in the matching, else how many each latent kept.
    """

    n_a: int
    n_b: int
    shared: int
    least: float
    nearest_a: float
    nearest_b: float
    candidates: int | None

    @property
    def share_a(self) -> float:
        return self.shared / self.n_a

    @property
    def share_b(self) -> float:
        return self.shared / self.n_b


def overlap(a: SAE, b: SAE, *, least: float = LEAST, anyway: bool = False) -> Overlap:
    """What ``a`` and ``b`` have in common. ``anyway`` compares SAEs of different sites or models too.

    Raises `WidthMismatch`, `WrongModel` for other sites or models, `NotSliceable` for SAEs read in part, `BrokenFile`
    for NaN, and `MissingExtra`.
    """
    check_comparable(a, b, anyway=anyway)
    rows_a, rows_b = _unit(a), _unit(b)
    candidates = None if len(rows_a) * len(rows_b) <= WHOLE else CANDIDATES
    found = match(rows_a, rows_b, candidates=candidates)
    nearest_a, nearest_b = nearest(rows_a, rows_b)
    return Overlap(
        len(rows_a), len(rows_b), int((found.cosine >= least - ROUNDING).sum()), least, float(nearest_a.mean()),
        float(nearest_b.mean()), candidates,
    )  # fmt: skip


def check_comparable(a: SAE, b: SAE, *, anyway: bool = False) -> None:
    """Raise unless two SAEs read and write alike; ``anyway`` asks for equal widths only."""
    if (a.d_in, a.d_out) != (b.d_in, b.d_out):
        raise WidthMismatch(
            f"{a.name} beside {b.name}",
            f"one reads vectors of width {a.d_in} and writes {a.d_out}, the other {b.d_in} and {b.d_out}",
            "Only dictionaries of one stream's width have latents in common.",
        )
    for sae in (a, b):
        if sae.held is not None:
            raise NotSliceable(
                f"{a.name} beside {b.name}", f"only {len(sae.held)} of the {sae.d_sae} latents of {sae.name} were read",
                "Load both without latents=...",
            )  # fmt: skip
    for what, one, other in (
        ("site", a.site, b.site), ("output site", a.site_out, b.site_out), ("model", _short(a.model), _short(b.model)),
    ):  # fmt: skip
        if one != other and not anyway and (what == "output site" or None not in (one, other)):
            raise WrongModel(
                f"{a.name} beside {b.name}", f"their {what}s differ: {one} and {other}",
                "Say anyway=True, or --anyway on the command line, to compare different streams of one width.",
            )  # fmt: skip


def match(
    a: Float[Tensor, "n_a d_in"], b: Float[Tensor, "n_b d_in"], *, candidates: int | None = None
) -> Matching:  # fmt: skip
    """The one-to-one matching of unit rows with the largest sum of cosines above 0. Raises `MissingExtra`.

    With ``candidates``, only pairs in which one is among so many nearest of the other.
    """
    optimize, sparse, csgraph = _scipy()
    if candidates is None:
        cosines = (a @ b.T).clamp(min=0.0).cpu().numpy()
        rows, columns = optimize.linear_sum_assignment(cosines, maximize=True)
        values = cosines[rows, columns]
    else:
        i, j, value = _candidates(a, b, candidates)
        # A latent may stay alone: every row has a column of its own that is worth next to nothing.
        alone, nothing = np.arange(len(a)), np.full(len(a), 1e-9)
        graph = sparse.csr_array(
            (np.concatenate([value, nothing]), (np.concatenate([i, alone]), np.concatenate([j, len(b) + alone]))),
            shape=(len(a), len(b) + len(a)),
        )
        rows, columns = csgraph.min_weight_full_bipartite_matching(graph, maximize=True)
        values = np.asarray(graph[rows, columns]).ravel()
    kept = (columns < len(b)) & (values > 0)
    a_side, b_side = (torch.from_numpy(side[kept].astype(np.int64)) for side in (rows, columns))
    return Matching(a_side, b_side, torch.from_numpy(values[kept]).float())


def nearest(
    a: Float[Tensor, "n_a d_in"], b: Float[Tensor, "n_b d_in"]
) -> tuple[Float[Tensor, " n_a"], Float[Tensor, " n_b"]]:
    """The largest cosine of each row with any row of the other side."""
    of_a, of_b = a.new_empty(len(a)), a.new_full((len(b),), -1.0)
    for rows, cosines in _chunks(a, b):
        of_a[rows] = cosines.amax(1)
        of_b = torch.maximum(of_b, cosines.amax(0))
    return of_a, of_b


def _candidates(a: Tensor, b: Tensor, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs in which one is among the ``most`` nearest of the other: numbers on both sides, and cosines above 0."""
    pairs: list[tuple[Tensor, Tensor]] = []
    best = b.new_full((0, len(b)), -1.0)
    best_rows = torch.zeros(0, len(b), dtype=torch.int64, device=b.device)
    for rows, cosines in _chunks(a, b):
        numbers = torch.arange(rows.start, rows.stop, device=b.device)
        columns = cosines.topk(min(most, len(b)), dim=1).indices
        pairs.append((numbers[:, None].expand_as(columns).flatten(), columns.flatten()))
        best = torch.cat([best, cosines])
        best_rows = torch.cat([best_rows, numbers[:, None].expand_as(cosines)])
        best, order = best.topk(min(most, len(best)), dim=0)
        best_rows = best_rows.gather(0, order)
    pairs.append((best_rows.flatten(), torch.arange(len(b), device=b.device).expand_as(best_rows).flatten()))
    i, j = torch.unique(torch.stack([torch.cat(side) for side in zip(*pairs, strict=True)]), dim=1)
    value = torch.cat([(a[x] * b[y]).sum(-1) for x, y in zip(i.split(2**18), j.split(2**18), strict=True)])
    above = value > 0
    return tuple(part[above].cpu().numpy() for part in (i, j, value.double()))  # type: ignore[return-value]


def _chunks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cosines of some rows of ``a`` with all of ``b``."""
    step = max(CHUNK // max(len(b), 1), 1)
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        yield rows, a[rows] @ b.T


def _unit(sae: SAE) -> Float[Tensor, "d_sae d_out"]:
    """Decoder rows at length 1; rows of zeros stay, and are near to none."""
    rows = sae.W_dec.detach().float().cpu()
    if not bool(torch.isfinite(rows).all()):
        raise BrokenFile(f"the latents of {sae.name}", "W_dec holds NaN or infinity", "Fetch or train the SAE again.")
    return torch.nn.functional.normalize(rows, dim=-1)


def _short(name: str | None) -> str | None:
    return None if name is None else name.rstrip("/").rpartition("/")[2].lower()


def _scipy() -> tuple[Any, Any, Any]:
    try:
        from scipy import optimize, sparse
        from scipy.sparse import csgraph
    except ImportError as error:
        raise MissingExtra(
            "latents that two dictionaries have in common",
            f"matching them needs scipy, which cannot be imported here ({error})", "Run pip install 'saeguard[eval]'.",
        ) from error  # fmt: skip
    return optimize, sparse, csgraph
