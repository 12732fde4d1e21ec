"""How the projector of a low-rank rule is made from a gradient: by singular vectors, drawn ones, or at random."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

PROJECTORS = ("svd", "importance", "random")


def projector(G: Tensor, rank: int, kind: str, seed: str) -> Tensor:
    """Return P of p × `rank` for G of p × q, p <= q.

    Args:
        G: A gradient.
        rank: Columns of P, p at most.
        kind: "svd": left singular vectors of the largest singular values σ, in that order; "importance": as many drawn
            without replacement, in proportion to σ; "random": independent normal numbers of variance 1 / `rank`.
        seed: Says what is drawn. It is drawn on the CPU, so it is the same on every device.
    """
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    if kind == "random":
        return (torch.randn(len(G), rank, generator=generator) / math.sqrt(rank)).to(G)
    U: Tensor
    U, sigma, _ = torch.linalg.svd(G, full_matrices=False)
    if kind == "svd":
        return U[:, :rank]
    # Of clocks that ring at rates σ, the first few to ring are such a draw.
    times = torch.empty(len(G)).exponential_(generator=generator).to(G) / sigma
    return U[:, times.topk(rank, largest=False).indices.sort().values]
