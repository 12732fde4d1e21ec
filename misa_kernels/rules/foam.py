"""FOAM: Adam's moments of blocks of neighbours, and what each element differs from its block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from misa_kernels.options import check_count, check_range
from misa_kernels.rules.base import Rule
from misa_kernels.rules.moments import zero_moments


class FOAM(Rule):
    """AdamW whose moments are those of blocks of 2^level neighbours along the last axis, with a residual.

    With E(x) the mean of each block, U(y) the value of its block for each element, and t the tensor's own age:

        m ← β₁ m + (1 − β₁) E(g)
        v ← β₂ v + (1 − β₂) E(g²)
        R = g − U(E(g))
        u = alpha · (U(m / (1 − β₁ᵗ)) + R) / (√(U(v / (1 − β₂ᵗ)) + R²) + eps)
        θ ← (1 − lr · weight_decay) θ − lr · u

    Source: Wen et al., FOAM: Blocked State Folding for Memory-Efficient LLM Training, arXiv 2512.07112.

    The state takes 8 / 2^level bytes a parameter where 2^level divides the last axis: m and v each have
    ⌈n / 2^level⌉ elements for n along it, of float32, or of float64 for float64 weights.

    It departs from the published code in two ways. That divides R by 1 − β₁ᵗ too, and compares R² with a v that is not
    corrected: the update that normal noise has at age 1 has an RMS of 0.33 for betas=(0.9, 0.999) and of 1.98 for
    (0.9, 0.95); here it is 0.72 for both, where AdamW's is 1. And it pads the last axis with zeros, so that the mean of
    a shorter last block is too small; here that is the mean of what is there.

    Args:
        params, lr, betas, eps, weight_decay: As for `torch.optim.AdamW`, with its defaults. The last axis is folded.
        level: Binary logarithm of the block's length, a whole number >= 0; 0 is AdamW, and a block longer than the axis
            is the axis. Default 2.
        alpha: Factor of the update, > 0. The authors use 0.25 with lr=1e-2. Default 1.

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
        level: int = 2,
        alpha: float = 1.0,
    ) -> None:
        own = {"level": level, "alpha": alpha}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay} | own)

    def check(self, group: Mapping[str, Any]) -> None:
        """Check level and alpha."""
        check_count("level", group["level"], 0, "a whole number >= 0: 2^level neighbours share a moment, 0 is AdamW")
        check_range("alpha", group["alpha"], 5e-324, float("inf"), "a number > 0: the factor of the update")

    def begin(self, g: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return m and v of no gradient yet, one element a block."""
        return zero_moments(fold(g, group["level"]))

    def direction(self, g: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
        """Return u; the means are corrected for their age before R is added to them."""
        (beta1, beta2), level, t = group["betas"], group["level"], state["step"]
        mean = fold(g, level)
        m = state["exp_avg"].mul_(beta1).add_(mean, alpha=1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).add_(fold(g.square(), level), alpha=1 - beta2)
        residual = g - unfold(mean, level, g)
        denominator = (unfold(v / (1 - beta2**t), level, g) + residual.square()).sqrt() + group["eps"]
        u: Tensor = group["alpha"] * (unfold(m / (1 - beta1**t), level, g) + residual) / denominator
        return u


def fold(x: Tensor, level: int) -> Tensor:
    """Return the means of blocks of 2^level elements along the last axis, the last one of what is left."""
    n = x.shape[-1]
    width = block_width(n, level)
    whole = n // width * width
    means = x[..., :whole].reshape(*x.shape[:-1], n // width, width).mean(-1)
    return means if whole == n else torch.cat([means, x[..., whole:].mean(-1, keepdim=True)], -1)


def unfold(means: Tensor, level: int, g: Tensor) -> Tensor:
    """Return for each element of `g` the value of its block."""
    return means.repeat_interleave(block_width(g.shape[-1], level), -1)[..., : g.shape[-1]]


def block_width(n: int, level: int) -> int:
    """Return how many elements a block has along an axis of length `n`."""
    return int(min(2**level, max(n, 1)))
