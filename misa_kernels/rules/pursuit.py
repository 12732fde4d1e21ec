"""Orthogonal matching pursuit: sparse vectors from a few sums of their entries, many at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def matching_pursuit(y: Tensor, A: Tensor, sparsity: int) -> Tensor:
    """Return x with `sparsity` entries a row other than zero, such that x Aᵀ is near `y`.

    In each row, the entry picked next is that whose column of A has the largest product with what is left of y, and
    that is then the part of y orthogonal to all columns picked. A row of zeros gives zeros.

    Args:
        y: (rows, k).
        A: (k, n), of which any `sparsity` columns are linearly independent; their lengths are taken for equal.
        sparsity: Entries that are picked, k at most.
    """
    rest, picked = y, y.new_zeros(len(y), 0, dtype=torch.long)
    columns, Q = y.new_zeros(len(y), 0, y.shape[1]), y.new_zeros(len(y), 0, y.shape[1])
    for _ in range(sparsity):
        pick = (rest @ A).abs().scatter_(1, picked, -1.0).argmax(dim=1, keepdim=True)
        column = A.mT[pick]
        # Twice, for what rounding leaves of the columns before.
        q = column - (column @ Q.mT) @ Q
        q = q - (q @ Q.mT) @ Q
        q = q / q.norm(dim=2, keepdim=True)
        rest = rest - (q @ rest.unsqueeze(2)).squeeze(2) * q.squeeze(1)
        picked, columns, Q = torch.cat((picked, pick), 1), torch.cat((columns, column), 1), torch.cat((Q, q), 1)
    fit = torch.linalg.solve_triangular(Q @ columns.mT, Q @ y.unsqueeze(2), upper=True)
    return y.new_zeros(len(y), A.shape[1]).scatter_(1, picked, fit.squeeze(2))
