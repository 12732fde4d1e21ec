"""How is a quantised model fine-tuned without leaving its format? Its integers stay, only their scales are trained.

PEQA (arXiv 2305.14152): with integers q of b bits, zero points z and scales s a group, W = s (q - z), and s alone is
trained. What comes out is a model of as many bits as before, at the speed of its format, with nothing beside it to
merge. A module of MISA is the scales of a matrix, or with `granularity="layer"` those of a layer. Backward needs the
whole input of each layer, as for training the weights themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def packed(values: Tensor, bits: int) -> Tensor:
    """Return integers below 2^bits as bit planes, uint8 of shape (bits, numel / 8); numel is a multiple of 8."""
    places = torch.arange(8, device=values.device)
    planes = [(values.reshape(-1, 8) >> bit & 1) << places for bit in range(bits)]
    return torch.stack([plane.sum(1) for plane in planes]).to(torch.uint8)


def unpacked(planes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the integers of bit planes, 1-D."""
    places = torch.arange(8, dtype=torch.uint8, device=planes.device)
    values = sum((plane.unsqueeze(1) >> places & 1) << bit for bit, plane in enumerate(planes))
    return values.reshape(-1).to(dtype)


class _Scaled(torch.autograd.Function):
    """x W^T, of which neither W nor its gradient outlives the call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, layer: ScaledLinear) -> Tensor:
        kind = x.device.type
        ctx.layer, ctx.dtype = layer, x.dtype
        x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else scale.dtype)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale)
        return F.linear(x, layer.weight(scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, scale), of_x, of_scale = ctx.saved_tensors, None, None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ ctx.layer.weight(scale).to(grad.dtype)).to(ctx.dtype)
        if x is not None:
            of_weight = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            levels = ctx.layer.levels(scale.dtype)
            of_scale = (of_weight.to(scale.dtype).view_as(levels) * levels).sum(-1)
        return of_x, of_scale, None


class ScaledLinear(nn.Module):
    """A linear layer whose weight is integers times trained scales.

    Args:
        layer: Its weight is quantised, to the nearest integers between the extremes of each group; its bias is frozen.
        bits: 1 to 8.
        group: Neighbours of a row that share a scale; it divides the row.

    Attributes:
        scale: Shape (out_features, in_features / group).
        planes: The integers, see `packed`.
        zero: uint8 of the shape of `scale`: which integer is 0.
    """

    def __init__(self, layer: nn.Linear, bits: int = 4, group: int = 64) -> None:
        super().__init__()
        out, size = layer.weight.shape
        if not 1 <= bits <= 8 or size % group or group % 8:
            raise ValueError(f"bits={bits}, group={group} must be 1 to 8, and a multiple of 8 that divides {size}")
        self.in_features, self.out_features, self.group = size, out, group
        grouped = layer.weight.detach().float().view(out, size // group, group)
        most = 2**bits - 1
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / most).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-low / scale).round().clamp(0, most)
        levels = ((grouped / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(0, most)
        self.scale = nn.Parameter(scale.to(layer.weight.dtype))
        self.register_buffer("planes", packed(levels.to(torch.int64), bits))
        self.register_buffer("zero", zero.to(torch.uint8))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    def levels(self, dtype: torch.dtype) -> Tensor:
        """Return q - z, of shape (out_features, groups, group)."""
        grouped = unpacked(self.planes, dtype).view(*self.zero.shape, self.group)
        return grouped - self.zero.unsqueeze(-1).to(dtype)

    def weight(self, scale: Tensor) -> Tensor:
        """Return the weight that scales of this shape make."""
        return (self.levels(scale.dtype) * scale.unsqueeze(-1)).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        y: Tensor = _Scaled.apply(x, self.scale, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantise(layers: Iterable[nn.Module], bits: int = 4, group: int = 64) -> list[dict[str, Any]]:
    """Quantise all linear layers within some layers of a model in place, and return a param group of their scales.

    Args:
        layers: Of the model, from the input to the output, such as `model.model.layers`.
        bits: Of the integers.
        group: Neighbours that share a scale.

    Returns:
        The groups for `MISA`, or any optimizer: scales with the names of their modules and layers.

    Raises:
        ValueError: If there are no linear layers.
    """
    params: list[nn.Parameter] = []
    modules: list[str] = []
    names: list[str] = []
    for number, layer in enumerate(layers):
        for name, module in list(layer.named_modules()):
            if type(module) is nn.Linear:
                scaled = ScaledLinear(module, bits, group)
                layer.set_submodule(name, scaled)
                params.append(scaled.scale)
                modules.append(f"{number}.{name}.scale")
                names.append(str(number))
    if not params:
        raise ValueError("no layer has an nn.Linear within: give the layers of a model that is built of these")
    return [{"params": params, "role": "sampled", "modules": modules, "layers": names}]
