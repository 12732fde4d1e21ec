"""Adam's two moments and the direction that they give, in whatever coordinates a rule keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def zero_moments(like: Tensor) -> dict[str, Any]:
    """Return the two moments before the first update, of the shape and dtype of `like`."""
    return {"exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}


def adam(g: Tensor, state: Mapping[str, Any], group: Mapping[str, Any], age: int) -> Tensor:
    """Take `g` into the moments of `state`, which is changed in place, and return m̂ / (√v̂ + ε).

    Args:
        g: The gradient in the coordinates of the moments, of their shape.
        state: Holds "exp_avg" and "exp_avg_sq".
        group: Holds "betas" and "eps".
        age: Updates since the moments were zero, this one included.
    """
    (beta1, beta2), eps = group["betas"], group["eps"]
    m: Tensor = state["exp_avg"]
    v: Tensor = state["exp_avg_sq"]
    m.mul_(beta1).add_((1 - beta1) * g)
    v.mul_(beta2).add_((1 - beta2) * g.square())
    u: Tensor = (m / (1 - beta1**age)) / ((v / (1 - beta2**age)).sqrt() + eps)
    return u
