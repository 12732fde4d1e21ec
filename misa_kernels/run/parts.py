"""Which part of a tensor, made for a whole parameter, belongs to what is trained of it, and lies here?"""

from __future__ import annotations

from torch import Tensor

from misa_kernels.draw.partition import Block
from misa_kernels.gradients.sliced import SlicedGradient
from misa_kernels.ranks.shards import local_like


def here(tensor: Tensor, block: Block) -> Tensor:
    """Return the part of a tensor of a block's shape that belongs to what lies here of its parameter, 1-D."""
    return local_like(tensor, block.param, block.shape_in(block.param))


def gradient_here(grad: Tensor, block: Block) -> Tensor:
    """Return the part of a block's gradient that belongs to what lies here of its parameter."""
    part = here(grad, block)
    # A part without elements has no address, by which the kernels know that there is a gradient.
    return part if part.numel() else part.new_zeros(4)


def gradient_of(grad: Tensor, block: Block) -> Tensor:
    """Return the part of a gradient that belongs to a slice; all of it where it is no slice, and dense."""
    if (piece := block.piece) is None:
        return grad
    axis, first, last = piece
    if isinstance(grad, SlicedGradient):
        if (grad.axis, grad.first, grad.part.shape[axis]) == (axis, first, last - first):
            return grad.part
        # Somebody has put one of an earlier round back.
        grad = grad.dense()
    return grad.narrow(axis, first, last - first).contiguous()
