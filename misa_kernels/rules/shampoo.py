"""Shampoo whose preconditioners are held in 4 bits, in front of AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from misa_kernels.options import check_count, check_range
from misa_kernels.rules.base import Rule
from misa_kernels.rules.linear_square import decode, encode
from misa_kernels.rules.moments import adam, zero_moments


class Shampoo4bit(Rule):
    r"""AdamW on a gradient that Kronecker factors have preconditioned, with the factors held in 4 bits.

    Every `every` updates, of the gradient G as a matrix, :math:`L \leftarrow \beta L + (1-\beta) G G^\top` and
    :math:`\hat L = (\Lambda / \lambda_{\max} + \epsilon I)^{-1/4}` in the basis of the eigenvectors U of L; R likewise
    of :math:`G^\top G`. From update `start` on, AdamW takes :math:`\hat G \,\|G\| / \|\hat G\|` with
    :math:`\hat G = \hat L G \hat R`, before that G: directions are bounded as AdamW's are. Source: arXiv
    2405.18144. What is kept of L is Λ and U in 4 bits, made orthogonal by one step
    :math:`1.5\,U - 0.5\,U U^\top U` when L is needed; of :math:`\hat L` the diagonal, and the rest in 4 bits. The code
    is the paper's linear square one, in blocks of 64 with a scale. Tensors of more dimensions are matrices of shape[0]
    rows. Those of one, and those with a side of 1 or above `max_size`, are updated by AdamW.

    State: 8 bytes a parameter for AdamW, and for a side of d about 1.125 d² + 8 d bytes in all (1.125 is two times
    4.5 bits): 2.3 bytes a parameter of a large square matrix.

    Departures: eigenvectors are exact at each renewal, where the paper takes one step of orthogonal iteration, and
    roots are made from them before they are rounded, at each renewal, where the paper makes roots every 500 updates.
    Larger tensors are not cut into blocks. Small factors are held in 4 bits too. L begins at 0, not at ε I, and is not
    corrected for age: its scale cancels in the norm. The 4 bits leave a cosine of .98 between the preconditioned
    gradient and that of exact roots for white gradients of 96 × 128, of .86 with factors whose spectra fall as 1 / j.

    Args:
        params, lr, betas, eps, weight_decay: As for `torch.optim.AdamW`, with its defaults.
        every: Updates between renewals of the preconditioners, a whole number >= 1, 100 by default.
        start: The first update that is preconditioned, a whole number >= 1, 500 by default; below `every` there is
            nothing to precondition with.
        max_size: Longest side of a matrix with preconditioners, a whole number >= 1, 1200 by default.
        shampoo_beta: Decay β of L and R from renewal to renewal, in [0, 1), 0.95 by default.
        damping: ε, what is added to the eigenvalues as a share of the largest, > 0, 1e-6 by default.

    Raises:
        TypeError, ValueError: For an argument of the wrong kind or out of range.
        torch.linalg.LinAlgError: In `step`, where a gradient that is not finite meets a renewal.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        every: int = 100,
        start: int = 500,
        max_size: int = 1200,
        shampoo_beta: float = 0.95,
        damping: float = 1e-6,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own = {"every": every, "start": start, "max_size": max_size, "shampoo_beta": shampoo_beta, "damping": damping}
        super().__init__(params, defaults | own)

    def check(self, group: Mapping[str, Any]) -> None:
        """Check every, start, max_size, shampoo_beta and damping."""
        for name, what in (
            ("every", "updates between renewals"),
            ("start", "the first update that is preconditioned"),
            ("max_size", "the longest side of a matrix with preconditioners"),
        ):
            check_count(name, group[name], 1, f"a whole number >= 1: {what}")
        check_range("shampoo_beta", group["shampoo_beta"], 0.0, 1.0, "in [0, 1): the decay of the preconditioners")
        check_range("damping", group["damping"], 5e-324, float("inf"), "> 0: a share of the largest eigenvalue")

    def begin(self, g: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return AdamW's moments, and factors that are the identity."""
        state = zero_moments(g)
        sides = g.flatten(1).shape if g.ndim > 1 else (0,)
        if 1 < min(sides) and max(sides) <= group["max_size"]:
            for side, size in zip("LR", sides, strict=True):
                codes, scales = encode(g.new_zeros(size, size))
                state |= {f"{side}_values": g.new_zeros(size), f"{side}_vectors": codes, f"{side}_scales": scales}
                state |= {f"{side}_root_diagonal": g.new_ones(size), f"{side}_root": codes.clone()}
                state[f"{side}_root_scales"] = scales.clone()
        return state

    def direction(self, g: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
        """Return AdamW's direction for the preconditioned gradient."""
        if "L_values" in state:
            G = g.flatten(1)
            if state["step"] % group["every"] == 0:
                _renew("L", G @ G.mT, state, group)
                _renew("R", G.mT @ G, state, group)
            if state["step"] >= group["start"]:
                G_hat = _root("L", state) @ G @ _root("R", state)
                norm = G_hat.norm()
                g = (G_hat * (G.norm() / torch.where(norm == 0, 1.0, norm))).view(g.shape)
        return adam(g, state, group, state["step"])


def _renew(side: str, M: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> None:
    """Take G Gᵀ or Gᵀ G into a factor, and make its root."""
    beta, eye = group["shampoo_beta"], torch.eye(len(M), dtype=M.dtype, device=M.device)
    U = decode(state[f"{side}_vectors"], state[f"{side}_scales"], len(M))
    U = 1.5 * U - 0.5 * U @ (U.mT @ U)
    values, U = torch.linalg.eigh(beta * (U * state[f"{side}_values"]) @ U.mT + (1 - beta) * M)
    values = values.clamp(min=0)
    largest = values.amax()
    root = (U * (values / torch.where(largest == 0, 1.0, largest) + group["damping"]) ** -0.25) @ U.mT
    root = torch.where(largest == 0, eye, root)
    state[f"{side}_values"], state[f"{side}_root_diagonal"] = values, root.diagonal().clone()
    state[f"{side}_vectors"], state[f"{side}_scales"] = encode(U)
    state[f"{side}_root"], state[f"{side}_root_scales"] = encode(root - root.diagonal().diag())


def _root(side: str, state: dict[str, Any]) -> Tensor:
    diagonal: Tensor = state[f"{side}_root_diagonal"]
    return decode(state[f"{side}_root"], state[f"{side}_root_scales"], len(diagonal)) + diagonal.diag()
