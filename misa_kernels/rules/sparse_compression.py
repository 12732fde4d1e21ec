"""Sparse Gradient Compression: Adam on a few random sums of the largest entries, taken apart by matching pursuit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim.optimizer import ParamsT

from misa_kernels.options import check_count
from misa_kernels.rules.base import Rule
from misa_kernels.rules.moments import adam, zero_moments
from misa_kernels.rules.pursuit import matching_pursuit

# Chunks that are recovered at a time, which bounds the memory.
_TOGETHER = 1024


class SparseGradientCompression(Rule):
    r"""Adam on `size` random sums of the `sparsity` largest entries of each chunk of a gradient.

    A tensor is cut into equal chunks c of at most `chunk` entries. With A of `size` × `chunk`, the same for all of them
    and at every update, normal numbers of variance 1 / `size`: :math:`p = A\,\mathrm{top}_s(g_c)`, N is Adam's
    direction for p, and :math:`u_c = \mathrm{OMP}_s(N)`: orthogonal matching pursuit picks s times the column of A
    that is most like what is left of N, and fits N by the columns picked. s is `sparsity`. Source: arXiv 2502.00311;
    in chunks it is the paper's MESGC. Tensors of one dimension and those of fewer than `chunk` entries are updated by
    plain Adam.

    State: 8 `size` / `chunk` bytes a parameter, 1 with the defaults; 8 with plain Adam. A, of 4 `size` `chunk` bytes,
    is kept once for all tensors, and made from the seed, so it is not in the state.

    Departures: none known but that the paper's factor α is 1: columns of A have length 1 and N has √`size`, so the RMS
    of u is about √(`size` / `chunk`) of AdamW's, and the entries that move do so by √(`size` / s) times its step.
    Mind that p is recovered, N less well, for it is no A x of a sparse x. With `size` 128 of 1024 and normal
    gradients, the first N gives back a direction of cosine .83 with the largest s = 8 entries, .39 with 16; p gives
    1.00 and .97. Pursuit costs 2 s `size` floating point operations a parameter, in s steps that wait for each other.

    Args:
        params, lr, betas, eps, weight_decay: As for `torch.optim.AdamW`, with its defaults.
        sparsity: Entries s of a chunk that are kept of a gradient and moved by an update, a whole number >= 1;
            8 by default.
        size: Sums that the moments of a chunk are kept for, a whole number >= 2 `sparsity`, 128 by default.
        chunk: Entries of a chunk, a whole number >= `size`, 1024 by default.
        seed: Seed of A, a whole number >= 0 below 2**63, 0 by default.

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
        sparsity: int = 8,
        size: int = 128,
        chunk: int = 1024,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"sparsity": sparsity, "size": size, "chunk": chunk, "seed": seed})

    def check(self, group: Mapping[str, Any]) -> None:
        """Check sparsity, size, chunk and seed."""
        sparsity, size = group["sparsity"], group["size"]
        check_count("sparsity", sparsity, 1, "a whole number >= 1: entries of a chunk that are kept")
        enough = f"a whole number >= 2 * sparsity = {2 * sparsity}: fewer do not determine so many entries"
        check_count("size", size, 2 * sparsity, enough)
        check_count("chunk", group["chunk"], size, f"a whole number >= size={size}: entries of a chunk")
        check_count("seed", group["seed"], 0, "a whole number >= 0 below 2**63")
        if group["seed"] >= 2**63:
            raise ValueError(f"seed={group['seed']!r} must be a whole number >= 0 below 2**63")

    def begin(self, g: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return zero moments of the sums of every chunk."""
        if g.ndim < 2 or g.numel() < group["chunk"]:
            return zero_moments(g)
        return zero_moments(g.new_empty(math.ceil(g.numel() / group["chunk"]), group["size"]))

    def direction(self, g: Tensor, state: dict[str, Any], group: Mapping[str, Any]) -> Tensor:
        """Return what matching pursuit recovers of Adam's direction for the sums."""
        if g.ndim < 2 or g.numel() < group["chunk"]:
            return adam(g, state, group, state["step"])
        chunks = len(state["exp_avg"])
        x = pad(g.flatten(), (0, -g.numel() % chunks)).view(chunks, -1)
        A = _matrix(group["size"], group["chunk"], group["seed"], g.dtype, g.device)[:, : x.shape[1]]
        at = x.abs().topk(group["sparsity"], dim=1).indices
        N = adam(torch.zeros_like(x).scatter_(1, at, x.gather(1, at)) @ A.mT, state, group, state["step"])
        parts = [N[first : first + _TOGETHER] for first in range(0, chunks, _TOGETHER)]
        u = torch.cat([matching_pursuit(part, A, group["sparsity"]) for part in parts])
        return u.flatten()[: g.numel()].view(g.shape)


@lru_cache(maxsize=8)
def _matrix(size: int, chunk: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return A; drawn on the CPU, so that it is the same on every device."""
    return (torch.randn(size, chunk, generator=torch.Generator().manual_seed(seed)) / math.sqrt(size)).to(device, dtype)
