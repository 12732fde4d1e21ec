"""How is a loss over a large vocabulary taken without holding its logits? For a part of the tokens at a time.

128,256 logits for each of 4,096 tokens are 2 GB in float32 alone, and their gradients as much again. On GPUs Liger's
LigerFusedLinearCrossEntropyLoss does the same, in kernels that read the logits once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Return the mean cross-entropy of a linear head, holding at most `chunk` tokens' logits, backward included.

    The same as `F.cross_entropy(F.linear(hidden, weight).float(), targets)` up to rounding, gradients too; backward
    computes the logits again.

    Args:
        hidden: What the head sees, of shape (tokens, width).
        weight: The head, of shape (vocabulary, width).
        targets: int64 of shape (tokens,); -100 where a token does not count.
        chunk: Tokens whose logits are held at once.
    """

    def summed(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(summed, part, target, use_reentrant=False, preserve_rng_state=False)
    return total / (targets != -100).sum()
