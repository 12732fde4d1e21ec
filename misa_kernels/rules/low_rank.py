"""Adam in a few directions of the shorter side of a matrix: GaLore, I3S and RSO, with three ways to treat the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from misa_kernels.options import check_count
from misa_kernels.rules.base import Rule
from misa_kernels.rules.moments import adam, zero_moments
from misa_kernels.rules.projectors import PROJECTORS, projector

_CHOICES = {"projector": PROJECTORS, "residual": ("dropped", "sgd", "normalised")}


class LowRankAdam(Rule):
    r"""Adam in `rank` coordinates of the shorter side of a matrix, with a choice of what becomes of the rest.

    p is the shorter and q the longer side, P of p × `rank` the projector, and G the gradient, turned so that it has
    p rows: :math:`R = P^\top G`, N is Adam's direction for R, :math:`u = P N + E'` and the residual
    :math:`E = G - P (P^\top P)^{-1} R`. Tensors of more dimensions are matrices of shape[0] rows. Those of one, and
    those with p < `rank`, are updated by plain Adam.

    GaLore (arXiv 2403.03507) takes singular vectors and drops E, I3S (2502.05790) draws them, RSO (2502.07222) takes
    a random P. SGD on E is that of Subspace-Momentum (2411.07120), its scaling by columns that of Fira (2410.01623).

    State: 4 `rank` (2 / p + 1 / q) bytes a parameter, 8 with plain Adam; twice that for float64 weights.

    Departures: GaLore's factor α is 1, so without a residual the RMS of u is about √(`rank` / p) of AdamW's. With each
    new P the moments begin anew, at age 1, as in RSO; GaLore reads the old ones in the new coordinates (noisy least
    squares, P anew every 10 updates: .005 of the loss is left after 300, against .27). No residual is divided by
    1 − βᵗ, and instead of Fira's limit on growth, which says nothing of the first update, the RMS of E' is at most 1.
    A gradient that is zero when P is made gives coordinates for singular vectors.

    Args:
        params, lr, betas, eps, weight_decay: As for `torch.optim.AdamW`, with its defaults.
        rank: Columns of P, a whole number >= 1, 128 by default.
        every: Updates of a tensor from one P to the next, a whole number >= 1; None, the default: the first stays.
        projector: How P is made from G: "svd" (default), the left singular vectors of the largest singular values σ;
            "importance", drawn without replacement, in proportion to σ; or "random", normal numbers of variance
            1 / `rank`, which keep the expected squared norm of a column.
        residual: "dropped" (default); "sgd", E' = E / (max(√mean v̂, RMS E) + ε), one factor for the matrix; or
            "normalised", column j of E times ‖N_j‖ / (‖R_j‖ + ε), or less, so that its RMS is at most 1.
        seed: Seed of what is drawn, a whole number >= 0, 0 by default; tensors and projectors have their own draws.

    Raises:
        TypeError, ValueError: For an argument of the wrong kind or out of range.
        torch.linalg.LinAlgError: In `step`, where a gradient that is not finite has no singular vectors.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int = 128,
        every: int | None = None,
        projector: str = "svd",
        residual: str = "dropped",
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own = {"rank": rank, "every": every, "projector": projector, "residual": residual, "seed": seed}
        super().__init__(params, defaults | own)

    def check(self, group: Mapping[str, Any]) -> None:
        """Check rank, every, projector, residual and seed."""
        check_count("rank", group["rank"], 1, "a whole number >= 1: coordinates of the shorter side")
        check_count("seed", group["seed"], 0, "a whole number >= 0: the seed of drawn projectors")
        if group["every"] is not None:
            check_count("every", group["every"], 1, "None or a whole number >= 1: updates with a projector")
        for name, choices in _CHOICES.items():
            if group[name] not in choices:
                raise ValueError(f"{name}={group[name]!r} must be one of {', '.join(map(repr, choices))}")

    def begin(self, g: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return zero moments, and room for a projector where there is one."""
        rank, sides = group["rank"], sorted(g.flatten(1).shape) if g.ndim > 1 else [0]
        if sides[0] < rank:
            return zero_moments(g)
        # The same in a loaded run, also for tensors that get their first gradient after that.
        number = sum(1 for state in self.state.values() if state)
        return {"number": number, "projector": g.new_zeros(sides[0], rank)} | zero_moments(g.new_empty(rank, sides[1]))

    def direction(self, g: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
        """Return P N + E'."""
        step, every = state["step"], group["every"]
        if "projector" not in state:
            return adam(g, state, group, step)
        G = g.flatten(1)
        is_tall = G.shape[0] > G.shape[1]
        G = G.mT if is_tall else G
        age = step if every is None else (step - 1) % every + 1
        if age == 1:
            seed = f"{group['seed']} {state['number']} {step}"
            state["projector"].copy_(projector(G, group["rank"], group["projector"], seed))
            state.update(zero_moments(state["exp_avg"]))
        P: Tensor = state["projector"]
        R = P.mT @ G
        N = adam(R, state, group, age)
        u = P @ N
        if group["residual"] != "dropped":
            # The columns of a random P are not orthonormal; solve_ex does not wait for the device.
            C = torch.linalg.solve_ex(P.mT @ P, R).result if group["projector"] == "random" else R
            u += _scaled(G - P @ C, R, N, state["exp_avg_sq"] / (1 - group["betas"][1] ** age), group)
        return (u.mT if is_tall else u).reshape(g.shape)


def _scaled(E: Tensor, R: Tensor, N: Tensor, v: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return E', the residual in the units of N."""
    eps: float = group["eps"]
    if group["residual"] == "sgd":
        return E / (torch.maximum(v.mean(), E.square().mean()).sqrt() + eps)
    return E * torch.minimum(N.norm(dim=0) / (R.norm(dim=0) + eps), math.sqrt(len(E)) / (E.norm(dim=0) + eps))
