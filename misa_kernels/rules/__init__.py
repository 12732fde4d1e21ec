"""Update rules around AdamW that have no package of their own, each an ordinary `torch.optim.Optimizer`."""

from misa_kernels.rules.low_rank import LowRankAdam
from misa_kernels.rules.micro_adam import MicroAdam
from misa_kernels.rules.shampoo import Shampoo4bit
from misa_kernels.rules.sparse_compression import SparseGradientCompression

__all__ = ["LowRankAdam", "MicroAdam", "Shampoo4bit", "SparseGradientCompression"]
