"""Running sums in float64 from which variances and least squares follow, however the tokens came in batches.

    variance        sum |x|^2 - |sum x|^2 / n
    least squares   (Z^T Z + ridge) B = Z^T Y        each column of Z divided by its root mean square first

Memory is that of Z^T Z, whatever the number of tokens. The ridge is there for columns that depend on each other; it is
so small that a linear law without noise is found to six digits.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

RIDGE = 1e-10
"""Added to the diagonal of Z^T Z, whose entries are 1 after scaling."""


class Spread:
    """Of vectors of one width: how many, their sum and the sum of their squares."""

    def __init__(self, width: int):
        self.n = 0
        self.total: Float64[Tensor, " width"] = torch.zeros(width, dtype=torch.float64)
        self.squares = 0.0

    def add(self, x: Float[Tensor, "tokens width"]) -> None:
        self.n += len(x)
        self.total += x.double().sum(0)
        self.squares += float(x.double().square().sum())

    def __add__(self, other: "Spread") -> "Spread":
        both = Spread(len(self.total))
        both.n, both.total = self.n + other.n, self.total + other.total
        both.squares = self.squares + other.squares
        return both

    @property
    def variance(self) -> float:
        """Summed over tokens and coordinates, about the mean of these tokens."""
        return max(self.squares - float(self.total.square().sum()) / max(self.n, 1), 0.0)


class Normal:
    """The normal equations of several targets on the same features."""

    def __init__(self, n_features: int, n_targets: int):
        self.n = 0
        self.gram: Float64[Tensor, "features features"] = torch.zeros(n_features, n_features, dtype=torch.float64)
        self.cross: Float64[Tensor, "features targets"] = torch.zeros(n_features, n_targets, dtype=torch.float64)

    def add(self, z: Float[Tensor, "tokens features"], y: Float[Tensor, "tokens targets"]) -> None:
        z = z.double()
        self.n += len(z)
        self.gram += z.T @ z
        self.cross += z.T @ y.double()

    def solve(self, features: slice = slice(None), targets: slice = slice(None)) -> Float64[Tensor, "some targets"]:
        """The coefficients of least squares on some of the features."""
        gram, cross = self.gram[features, features], self.cross[features, targets]
        size = gram.diagonal().sqrt()
        size = torch.where(size > 0, size, 1.0)
        scaled = gram / size / size[:, None] + RIDGE * torch.eye(len(gram), dtype=torch.float64)
        return torch.linalg.solve(scaled, cross / size[:, None]) / size[:, None]


def share_of(part: int | float, whole: int | float) -> float:
    """``part / whole``, NaN where there is nothing to divide by."""
    return part / whole if whole > 0 else float("nan")
