"""Update rules around AdamW that have no package of their own, each an ordinary `torch.optim.Optimizer`."""

from misa_kernels.rules.low_rank import LowRankAdam

__all__ = ["LowRankAdam"]
