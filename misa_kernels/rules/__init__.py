"""Update rules around AdamW that have no package of their own, each an ordinary `torch.optim.Optimizer`."""

from misa_kernels.rules.foam import FOAM
from misa_kernels.rules.haar import HaarAdam

__all__ = ["FOAM", "HaarAdam"]
