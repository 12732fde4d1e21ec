"""How far did the last step move each tensor? Computed anew from the moments, once a round."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from misa_kernels.arena import ALIGNMENT, MOVE_ELEMENTS, Arena, host, sent
from misa_kernels.kernels import Row
from misa_kernels.reference import Hyper
from misa_kernels.storage import Storage


def squares(rows: Sequence[Row], arena: Arena, storage: Storage, groups: Sequence[dict[str, Any]]) -> Tensor:
    """Return Σ of the squares of the last update, weight decay apart, and Σ of those of the weight.

    The update is lr · m̂ / (√v̂ + ε). Some tensors, or pieces of one, go through a few operations together: one by one
    they take five times as long where there are many. What that takes for the moment is at most a byte a parameter.

    Args:
        rows: The tensors.
        arena: Holds their moments.
        storage: How it holds them.
        groups: The optimizer's param groups, as they were in the last step.

    Returns:
        float64[2, slots]; 0 for other slots, and the first also for those without an update since activation.
    """
    total = sum(row.stop - row.start for row in rows)
    # A batch has less than two pieces' elements, with up to 16 bytes for each: decoded moments, update, weight.
    size = min(total // 32 // ALIGNMENT * ALIGNMENT + ALIGNMENT, MOVE_ELEMENTS)
    pieces = [
        (row, start, min(size, row.stop - row.start - start))
        for row in rows
        for start in range(0, row.stop - row.start, size)
    ]
    sums = torch.zeros(2, len(arena.age), dtype=torch.float64, device=arena.device)
    if not pieces:
        return sums
    at = sent(host([(row.slot, row.group) for row, _, _ in pieces]), arena.device)
    hypers = [Hyper.of(group) for group in groups]
    numbers = sent(host([h[:3] for h in hypers], torch.float64), arena.device)
    lr, beta1, beta2 = numbers[at[:, 1]].T
    t = arena.age[at[:, 0]].clamp(min=1)
    denom_scales = (1 - beta2**t).rsqrt().unbind()

    norms: list[tuple[Tensor, ...]] = []
    ends = accumulate(numel for _, _, numel in pieces)
    for _, batch in groupby(zip(pieces, denom_scales, ends, strict=True), lambda piece: piece[2] // size):
        ms, vs, weights, scales, eps = [], [], [], [], []
        for (row, start, numel), scale, _ in batch:
            views = arena.views(row.slot, start, numel)
            ms.append(storage.decode("exp_avg", views, numel))
            vs.append(storage.decode("exp_avg_sq", views, numel))
            weights.append(row.weight(start, numel).to(ms[-1].dtype))
            scales.append(scale)
            eps.append(hypers[row.group].eps)
        updates = torch._foreach_sqrt(vs)
        torch._foreach_mul_(updates, scales)
        torch._foreach_add_(updates, eps)
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, ms)
        norms += zip(torch._foreach_norm(updates), torch._foreach_norm(weights), strict=True)
    update, weight = (torch.stack(side).double() for side in zip(*norms, strict=True))
    moved = (update * lr / (1 - beta1**t)).where(arena.age[at[:, 0]] > 0, 0.0)
    return sums.index_add_(1, at[:, 0], torch.stack([moved, weight]).square())
