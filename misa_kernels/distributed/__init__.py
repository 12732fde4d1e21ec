"""What users call where several processes train one model: `replicate` for whole copies, `load` for checkpoints."""

from misa_kernels.distributed.load import load
from misa_kernels.distributed.replicate import Replica, replicate

__all__ = ["Replica", "load", "replicate"]
