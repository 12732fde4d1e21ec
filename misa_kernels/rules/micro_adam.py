"""MicroAdam: moments made anew at each update from the largest few entries of the last few gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim.optimizer import ParamsT

from misa_kernels.options import check_count, check_range
from misa_kernels.rules.base import Rule
from misa_kernels.rules.moments import adam, zero_moments

# Positions in a block fit 15 bits.
_BLOCK = 2**15


class MicroAdam(Rule):
    r"""Adam on the `window` last gradients, of which only the largest entries are kept, with error feedback.

    A tensor is cut into equal blocks of at most 32768. In each, :math:`a = g + e`, the share `density` of the largest
    of them by size goes into a ring, and what is left becomes the next e, in 4 bits. With :math:`a_r` the sparse
    gradient of r updates ago and n = min(age, `window`),
    :math:`m = \sum_{r<n} \beta_1^r a_r\,(1-\beta_1)/(1-\beta_1^n)`, v the same of :math:`a_r^2` with β₂, and
    :math:`u = m / (\sqrt v + \epsilon)`. Source: arXiv 2405.15593. Tensors of one dimension are updated by
    plain Adam.

    State: 0.5 + 4 `window` `density` bytes a parameter, 0.9 with the defaults, and 8 bytes a block; 8 with plain Adam.

    Departures: the weights of a mean are divided by their sum, 1 − βⁿ, where the paper has 1 − βᵗ for any age: with
    that, a gradient that stays the same gives u = 1 up to age 10, 1.45 at 50 and 6.5 in the end; here it gives 1 at
    every age, and no entry of u exceeds 1.05 by size with the defaults. One block serves the ring and the error; the
    authors' code has blocks of its own for the error, and keeps their range in 16 bits. Rounding of e is to nearest.

    Args:
        params, lr, betas, eps, weight_decay: As for `torch.optim.AdamW`, with its defaults.
        density: Share of a block that goes into the ring, in (0, 1], 0.01 by default; at least one entry does.
        window: Gradients in the ring, a whole number >= 1, 10 by default.

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
        density: float = 0.01,
        window: int = 10,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"density": density, "window": window})

    def check(self, group: Mapping[str, Any]) -> None:
        """Check density and window."""
        rule = "in (0, 1]: the share of a gradient's entries that is kept"
        check_range("density", group["density"], 5e-324, math.nextafter(1.0, 2.0), rule)
        check_count("window", group["window"], 1, "a whole number >= 1: gradients that are kept")

    def begin(self, g: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return an empty ring and no error."""
        if g.ndim < 2 or g.numel() == 0:
            return zero_moments(g)
        blocks = math.ceil(g.numel() / _BLOCK)
        # A byte holds the errors of two entries.
        pairs = math.ceil(g.numel() / (2 * blocks))
        ring = group["window"], blocks, min(math.ceil(2 * pairs * group["density"]), g.numel())
        return {
            "positions": g.new_zeros(ring, dtype=torch.int16),
            "values": g.new_zeros(ring, dtype=torch.bfloat16),
            "error": g.new_zeros(blocks, pairs, dtype=torch.uint8),
            "error_low": g.new_zeros(blocks, 1),
            "error_unit": g.new_zeros(blocks, 1),
        }

    def direction(self, g: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
        """Return m / (√v + ε) of the ring with this gradient."""
        if "error" not in state:
            return adam(g, state, group, state["step"])
        (beta1, beta2), window, latest = group["betas"], len(state["values"]), state["step"] - 1
        codes = state["error"]
        a = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1) * state["error_unit"] + state["error_low"]
        # The padding has an error of its own, which must not come into the ring.
        a = pad(a.flatten()[: g.numel()] + g.flatten(), (0, a.numel() - g.numel())).view_as(a)
        positions = a.abs().topk(state["values"].shape[2], dim=1, sorted=False).indices
        state["positions"][latest % window] = positions
        state["values"][latest % window] = a.gather(1, positions)
        _keep_error(a.scatter(1, positions, 0.0), state)
        n = min(state["step"], window)
        m, v = torch.zeros_like(a), torch.zeros_like(a)
        # One gradient after the other: within one, no position occurs twice, so the sum does not depend on the order.
        for r in range(n):
            where = state["positions"][(latest - r) % window].long()
            value = state["values"][(latest - r) % window].to(a.dtype)
            m.scatter_add_(1, where, value * ((1 - beta1) * beta1**r / (1 - beta1**n)))
            v.scatter_add_(1, where, value.square() * ((1 - beta2) * beta2**r / (1 - beta2**n)))
        u: Tensor = m / (v.sqrt() + group["eps"])
        return u.flatten()[: g.numel()].view(g.shape)


def _keep_error(e: Tensor, state: dict[str, Any]) -> None:
    """Store `e` in 16 equal steps from the smallest entry of a block to the largest."""
    low, high = e.aminmax(dim=1, keepdim=True)
    unit = (high - low) / 15
    code = ((e - low) / torch.where(unit == 0, 1.0, unit)).round().clamp(0, 15).to(torch.uint8)
    state["error"], state["error_low"], state["error_unit"] = code[:, ::2] | code[:, 1::2] << 4, low, unit
