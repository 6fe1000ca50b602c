"""Products of a sparse matrix that does not change with weights that are learned, on the CPU.

    y = F w        dF' y = F' (dL/dy)

The transposed matrix is kept too, so that the gradient is a product of the same kind.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class SparseRows:
    """A ``rows columns`` matrix in compressed rows; ``self @ w`` for a dense ``columns heads``."""

    def __init__(self, crow: Int[Tensor, " rows_and_one"], column: Int[Tensor, " n"], value: Tensor, n_columns: int):
        self.shape = (len(crow) - 1, n_columns)
        self.matrix = _csr(crow, column, value, self.shape)
        row = torch.repeat_interleave(torch.arange(self.shape[0]), crow.diff())
        order = column.long().argsort(stable=True)
        sizes = torch.bincount(column.long(), minlength=n_columns)
        upto = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        self.transposed = _csr(upto, row[order], value[order], (n_columns, self.shape[0]))

    def __matmul__(self, w: Float[Tensor, "columns heads"]) -> Float[Tensor, "rows heads"]:
        return _Product.apply(w, self)  # type: ignore[return-value]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, rows: SparseRows) -> Tensor:
        ctx.rows = rows
        return rows.matrix @ w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.rows.transposed @ grads[0].contiguous(), None


def _csr(crow: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():  # torch calls compressed rows beta
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(crow.int(), column.int(), value, shape)
