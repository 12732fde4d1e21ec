"""Subset-Norm, one v a row, with the momentum of all coordinates or of a few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from misa_kernels.options import check_count
from misa_kernels.rules.base import Rule


class SubsetNorm(Rule):
    """AdamW with one v for all elements at an index of the longest axis, and momentum in a subspace if asked for.

    With G the gradient as a matrix of N rows along the longest axis (the first of several) and K columns, Q a matrix of
    K rows and r orthonormal columns, and t the tensor's own age:

        m ← β₁ m + (1 − β₁) G Q
        v ← β₂ v + (1 − β₂) mean of G² over each row
        u = ((m / (1 − β₁ᵗ)) Qᵀ + G − G Q Qᵀ) / (√(v / (1 − β₂ᵗ)) + eps)
        θ ← (1 − lr · weight_decay) θ − lr · u

    With rank=None, Q is the identity. Otherwise it is fixed at a tensor's first update, near the leading right singular
    vectors of that gradient, by two rounds of subspace iteration. A vector has K = 1 and so is left to AdamW.

    Source: Nguyen and Nguyen, Lean and Mean Adaptive Optimization via Subset-Norm and Subspace-Momentum with
    Convergence Guarantees, arXiv 2411.07120.

    The state takes 4 + 4 / K bytes a parameter with rank=None, and 4 r / K + 4 r / N + 4 / K otherwise: N K or N r
    elements of m, K r of Q and N of v, of float32, or of float64 for float64 weights.

    It departs from the published code in four ways. That has the sum of a row, so that lr has to grow with √K. It
    divides the part outside of the subspace, which is no mean over steps, by 1 − β₁ᵗ too: for normal noise of shape
    (64, 48) and rank 8 the update at age 1 has an RMS of 7.7 with the mean and of 1.1 with the sum; here it is 1, which
    is AdamW's. It takes Q from a singular value decomposition, which waits for the device. And it renews Q.

    What is outside of the subspace is not smoothed: a gradient far above those before it moves a row there by an RMS of
    up to lr · √t at age t, while t < 1 / (1 − β₂), of which momentum leaves about a tenth.

    Args:
        params, lr, betas, eps, weight_decay: As for `torch.optim.AdamW`, with its defaults.
        rank: r, a whole number >= 1, of which at most K are used: how many coordinates have momentum; None: all.

    Raises:
        TypeError, ValueError: For an argument of the wrong kind or out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank})

    def check(self, group: Mapping[str, Any]) -> None:
        """Check rank."""
        if group["rank"] is not None:
            check_count("rank", group["rank"], 1, "None or a whole number >= 1: how many coordinates have momentum")

    def begin(self, g: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return m and v of no gradient yet, and Q."""
        rows, rank = matrix(g), group["rank"]
        state: dict[str, Any] = {"exp_avg_sq": rows.new_zeros(len(rows), 1)}
        if rank is None:
            return state | {"exp_avg": torch.zeros_like(rows)}
        q = leading_directions(rows, min(rank, rows.shape[1]))
        return state | {"exp_avg": rows.new_zeros(len(rows), q.shape[1]), "basis": q}

    def direction(self, g: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
        """Return u; only what is a mean over steps is corrected for its age."""
        (beta1, beta2), t, rows = group["betas"], state["step"], matrix(g)
        q = state.get("basis")
        inside = rows if q is None else rows @ q
        m = state["exp_avg"].mul_(beta1).add_(inside, alpha=1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).add_(rows.square().mean(1, keepdim=True), alpha=1 - beta2)
        corrected = m / (1 - beta1**t)
        direction = corrected if q is None else rows + (corrected - inside) @ q.T
        u: Tensor = direction / ((v / (1 - beta2**t)).sqrt() + group["eps"])
        axis = longest_axis(g)
        return u.reshape(g.movedim(axis, 0).shape).movedim(0, axis)


def longest_axis(x: Tensor) -> int:
    """Return the axis along which `x` is longest, the first of several."""
    return max(range(x.ndim), key=lambda axis: x.shape[axis])


def matrix(x: Tensor) -> Tensor:
    """Return `x` with its longest axis as rows, and one column where it has no other axis."""
    return x.movedim(longest_axis(x), 0).unsqueeze(-1).flatten(1)


def leading_directions(rows: Tensor, rank: int) -> Tensor:
    """Return `rank` orthonormal columns, whatever `rows` is; the same ones for the same rows."""
    generator = torch.Generator(rows.device).manual_seed(0)
    q = torch.randn(rows.shape[1], rank, dtype=rows.dtype, device=rows.device, generator=generator)
    # Of norm 1, so that the square of a gradient neither overflows nor vanishes.
    unit = rows / rows.norm().clamp_min(torch.finfo(rows.dtype).tiny)
    for _ in range(2):
        q = torch.linalg.qr(unit.T @ (unit @ q)).Q
    return q
