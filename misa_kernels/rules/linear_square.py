"""The linear square code: square matrices in 4 bits an entry, in blocks with a scale."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64


def encode(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes of two entries a byte, (blocks, BLOCK / 2), and the largest of each block, (blocks, 1)."""
    x = pad(A.flatten(), (0, -A.numel() % BLOCK)).view(-1, BLOCK)
    scales = x.abs().amax(dim=1, keepdim=True)
    levels = _levels(A.dtype, A.device)
    code = torch.bucketize(x / torch.where(scales == 0, 1.0, scales), (levels[1:] + levels[:-1]) / 2)
    return (code[:, ::2] | code[:, 1::2] << 4).to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor, size: int) -> Tensor:
    """Return the matrix of `size` rows; a scale of 0 gives zeros."""
    code = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1).long()
    return (_levels(scales.dtype, scales.device)[code] * scales).flatten()[: size * size].view(size, size)


@lru_cache(maxsize=8)
def _levels(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return y |y| for y = 2 j / 15 - 1, j of 0 to 15, but 0 for j = 7; kept, for a copy to a device would wait."""
    y = torch.linspace(-1, 1, 16, dtype=torch.float64)
    y[7] = 0
    return (y * y.abs()).to(device, dtype)
