"""Along which axis of a linear layer's weight does a slice lie, and which is the axis of the layer's input?"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


class Slice(NamedTuple):
    """A range of a weight's columns or rows.

    Attributes:
        axis: Of the weight as it is stored, 0 or 1.
        first: Where the range begins on this axis.
        last: Where it ends, exclusive.
    """

    axis: int
    first: int
    last: int

    def shape_of(self, weight: Tensor) -> tuple[int, int]:
        """Return the shape of the slice."""
        width = self.last - self.first
        return (width, weight.shape[1]) if self.axis == 0 else (weight.shape[0], width)

    def extent_in(self, weight: Tensor) -> tuple[int, int]:
        """Return its first element, and one past its last, in a matrix, flattened."""
        rows, columns = weight.shape
        if self.axis == 0:
            return self.first * columns, self.last * columns
        return self.first, self.first if not rows else (rows - 1) * columns + self.last


def input_axis(module: nn.Module) -> int | None:
    """Return which axis of a module's weight its input has; None where its weight is not known to be multiplied by it.

    That is axis 1 for torch's linear layers, 0 for `Conv1D` of transformers. Not known is what computes its output in a
    way of its own, holds its weight packed, or is not called by the module around it, as in torch's attention.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return None
    weight = module._parameters.get("weight")
    kind: Any = type(module)
    own = vars(module).get("forward")
    # accelerate leaves the bound method of the class behind where it removes its hooks.
    is_exchanged = own is not None and own != kind.forward.__get__(module)
    if weight is None or weight.ndim != 2 or is_exchanged:
        return None
    if isinstance(module, nn.Linear):
        is_plain = kind.forward is nn.Linear.forward and not isinstance(module, NonDynamicallyQuantizableLinear)
        return 1 if is_plain and weight.shape == (module.out_features, module.in_features) else None
    for base in kind.__mro__:
        if base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils":
            return 0 if kind.forward is base.forward else None
    return None
