"""Update rules around AdamW that have no package of their own, each an ordinary `torch.optim.Optimizer`."""

from misa_kernels.rules.adalomo import AdaLomo
from misa_kernels.rules.foam import FOAM
from misa_kernels.rules.haar import HaarAdam
from misa_kernels.rules.low_rank import LowRankAdam
from misa_kernels.rules.micro_adam import MicroAdam
from misa_kernels.rules.shampoo import Shampoo4bit
from misa_kernels.rules.sparse_compression import SparseGradientCompression
from misa_kernels.rules.subset_norm import SubsetNorm

__all__ = [
    "FOAM",
    "AdaLomo",
    "HaarAdam",
    "LowRankAdam",
    "MicroAdam",
    "Shampoo4bit",
    "SparseGradientCompression",
    "SubsetNorm",
]
