"""AdaLomo: no momentum, and a second moment of which the means of rows and columns are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from misa_kernels.options import check_range
from misa_kernels.rules.base import Rule

# The least RMS of a weight that the step size is measured by.
_LEAST_RMS = 1e-3


class AdaLomo(Rule):
    """The gradient over the root of a factored second moment, clipped at an RMS of 1, in units of the weight's RMS.

    For a matrix, with t its own age, and means rather than sums:

        w = t^(−decay_rate), so that β₂ = 1 − w
        r ← (1 − w) r + w · mean of (g² + eps) over each row
        c ← (1 − w) c + w · mean of (g² + eps) over each column
        v = r c / mean of r
        u = (g / √v) / max(1, RMS(g / √v))
        θ ← (1 − lr · weight_decay) θ − lr · max(0.001, RMS(θ)) · u

    A tensor of more axes is a stack of matrices along its last two, clipped as one. A vector keeps all of v.

    Source: Lv et al., AdaLomo: Low-memory Optimization with Adaptive Learning Rate, arXiv 2310.10195.

    The state takes 4 / columns + 4 / rows bytes a parameter of a matrix, 4 of a vector, in float32; twice that for
    float64 weights. As w = 1 at age 1, r and c are exact means from the first update, and nothing is to be corrected.

    It departs from the published code in three ways. Weight decay is lr · weight_decay, as in the other rules, and not
    in units of the weight's RMS. √v is made from the roots of its factors, since r / mean of r vanishes in float32 for
    a row without gradient beside others of 10⁹, and such a row then becomes NaN. And t is each tensor's own. The
    update within backward is no part of it.

    Args:
        params: Parameters, or dicts of param groups, of any shape.
        lr: Step size, >= 0: with scale_parameter=True, the RMS of an update relative to that of the weight. Default
            1e-3.
        eps: Added to g², in units of the squared gradient, > 0. Default 1e-30.
        weight_decay: Decoupled decay, >= 0: a weight loses lr · weight_decay of itself per update. Default 0.01.
        decay_rate: How fast β₂ = 1 − t^(−decay_rate) comes near 1, > 0. Default 0.8.
        scale_parameter: Whether the step is in units of max(0.001, RMS(θ)), as published. False: lr is the RMS of the
            change at age 1, as in AdamW. Default True.

    Raises:
        TypeError, ValueError: For an argument of the wrong kind or out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        eps: float = 1e-30,
        weight_decay: float = 1e-2,
        *,
        decay_rate: float = 0.8,
        scale_parameter: bool = True,
    ) -> None:
        own = {"decay_rate": decay_rate, "scale_parameter": scale_parameter}
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay} | own)

    def check(self, group: Mapping[str, Any]) -> None:
        """Check eps, which may not be zero here, decay_rate and scale_parameter."""
        check_range("eps", group["eps"], 5e-324, float("inf"), "a number > 0: it is all that v is without a gradient")
        rate = group["decay_rate"]
        check_range("decay_rate", rate, 5e-324, float("inf"), "a number > 0: 1 - t**-decay_rate is beta2")
        if not isinstance(group["scale_parameter"], bool):
            raise TypeError(f"scale_parameter={group['scale_parameter']!r} must be True or False")

    def begin(self, g: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return r and c, or v of a vector, of no gradient yet."""
        if g.ndim == 1:
            return {"exp_avg_sq": torch.zeros_like(g)}
        column, row = g[..., :1], g[..., :1, :]
        return {"exp_avg_sq_row": torch.zeros_like(column), "exp_avg_sq_col": torch.zeros_like(row)}

    def direction(self, g: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
        """Return u before it is scaled by the weight."""
        weight, square = state["step"] ** -group["decay_rate"], g.square() + group["eps"]
        if g.ndim == 1:
            root = state["exp_avg_sq"].lerp_(square, weight).sqrt()
        else:
            r = state["exp_avg_sq_row"].lerp_(square.mean(-1, keepdim=True), weight)
            c = state["exp_avg_sq_col"].lerp_(square.mean(-2, keepdim=True), weight)
            root = r.sqrt() * (c.sqrt() / r.mean(-2, keepdim=True).sqrt())
        u = g / root
        clipped: Tensor = u / u.square().mean().sqrt().clamp_min(1.0)
        return clipped

    def step_size(self, theta: Tensor, group: Mapping[str, Any]) -> Any:
        """Return lr, in units of the weight's RMS if asked for."""
        if not group["scale_parameter"]:
            return group["lr"]
        return group["lr"] * theta.square().mean().sqrt().clamp_min(_LEAST_RMS)
