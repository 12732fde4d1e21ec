"""How are slices trained over a base of 4 bits? As an adapter: a matrix that multiplies a slice of a layer's input.

What slices of columns add to a weight, W + D, is D times those elements of the input: y = W x + D x[first:last]. So the
base may be in any format, as for QLoRA (arXiv 2305.14314), and D, which begins at zero, is all that is trained. Without
quantisation it is `MISA(**slices())` with a weight of its own. Forward keeps the slice of the input, not the input.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of the identity whose product with a layer is taken at once, to see its weight.
ROWS = 1024


class SlicedLinear(nn.Module):
    """A frozen linear layer of any format, and what is trained of some columns of its weight.

    Args:
        base: Maps (..., in_features) to (..., out_features).
        first: The first of the columns.
        last: One past the last.
        dtype: Of what is trained.

    Attributes:
        delta: Shape (out_features, last - first): what is added to these columns; zero at first.
    """

    def __init__(self, base: nn.Module, first: int, last: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if not 0 <= first < last <= base.in_features:
            raise ValueError(f"columns {first} to {last} must be within the {base.in_features} of the layer")
        self.base = base.requires_grad_(False)
        self.first, self.last = first, last
        device = next(base.parameters()).device
        self.delta = nn.Parameter(torch.zeros(base.out_features, last - first, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output and what the slice adds to it."""
        # A copy: a view would keep all of the input for the gradient of the slice.
        part = x[..., self.first : self.last].to(self.delta.dtype, copy=True)
        y = self.base(x)
        return y + F.linear(part, self.delta).to(y.dtype)

    @torch.no_grad()
    def merged(self, dtype: torch.dtype) -> nn.Linear:
        """Return a plain layer with the base's weight as it multiplies, and what was trained of it."""
        size, bias, device = self.base.in_features, getattr(self.base, "bias", None), self.delta.device
        own = getattr(self.base, "weight", self.delta).dtype
        own = own if own.is_floating_point else torch.float32
        plain = nn.Linear(size, self.base.out_features, bias=bias is not None, dtype=torch.float32, device=device)
        zero = self.base(torch.zeros(1, size, dtype=own, device=device))
        for start in range(0, size, ROWS):
            units = torch.zeros(min(ROWS, size - start), size, dtype=own, device=device)
            units.diagonal(start).fill_(1)
            plain.weight[:, start : start + ROWS] = (self.base(units) - zero).T
        plain.weight[:, self.first : self.last] += self.delta
        if bias is not None:
            plain.bias.copy_(bias)
        return plain.to(dtype)

    def get_extra_state(self) -> dict[str, int]:
        """Return for a state dict where the slice lies, which is at random."""
        return {"first": self.first}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Lie where a saved slice lay."""
        self.first, self.last = state["first"], state["first"] + self.delta.shape[1]


def add_slices(
    model: nn.Module,
    numel: int,
    names: Iterable[str] = ("down_proj",),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, SlicedLinear]:
    """Let a slice of each of many layers be trained, equally wide and at random places, and nothing else.

    Args:
        model: Changed in place.
        numel: How many parameters all slices have, at most.
        names: Of the layers, as their modules call them.
        seed: Of the places.
        dtype: Of what is trained.

    Returns:
        The layers by name.

    Raises:
        ValueError: If there is no such layer, one is no linear layer or has a slice, or there is no room for a column
            of each.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    found = [name for name, module in model.named_modules() if name.rpartition(".")[2] in names]
    if not found:
        raise ValueError(f"none of the model's layers is called {', '.join(names)}: say how its last ones are called")
    for name in found:
        if not hasattr(module := model.get_submodule(name), "out_features"):
            raise ValueError(f"{name} is a {type(module).__name__} and must be a linear layer without a slice")
    lines = sum(model.get_submodule(name).out_features for name in found)
    if not (width := numel // lines):
        raise ValueError(f"numel={numel:,} must be at least {lines:,}, a column of each of {len(found)} layers")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in found:
        base = model.get_submodule(name)
        own = min(width, base.in_features)
        first = int(torch.randint(base.in_features - own + 1, (1,), generator=generator))
        layers[name] = SlicedLinear(base, first, first + own, dtype)
        model.set_submodule(name, layers[name])
    return layers


def slices_of(layers: dict[str, SlicedLinear]) -> dict[str, dict[str, Any]]:
    """Return what has to be saved: where each slice begins, and what was trained of it."""
    return {name: {"first": layer.first, "delta": layer.delta.detach()} for name, layer in layers.items()}


@torch.no_grad()
def load_slices(layers: dict[str, SlicedLinear], saved: dict[str, dict[str, Any]]) -> None:
    """Take over what `slices_of` returned of a model of the same layers and slices as wide."""
    if layers.keys() != saved.keys():
        raise ValueError(f"slices of {', '.join(saved)} were saved, and here are some of {', '.join(layers)}")
    for name, layer in layers.items():
        own = saved[name]
        if own["delta"].shape != layer.delta.shape:
            raise ValueError(f"{name} has {tuple(layer.delta.shape)}, and {tuple(own['delta'].shape)} was saved")
        layer.delta.copy_(own["delta"])
        layer.first, layer.last = own["first"], own["first"] + layer.delta.shape[1]


def quantise(model: nn.Module) -> None:
    """Replace the linear layers within a model's lists of layers by bitsandbytes' of 4 bits (NF4), in place.

    What lies outside of the lists stays, such as the output head.

    Args:
        model: On any device that bitsandbytes has kernels for; on CPUs it has.
    """
    from bitsandbytes.nn import Linear4bit

    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    within = {id(layer) for layers in lists for layer in layers.modules()}
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or id(layer) not in within:
            continue
        kind = {"bias": layer.bias is not None, "compute_dtype": layer.weight.dtype, "quant_type": "nf4"}
        packed = Linear4bit(layer.in_features, layer.out_features, **kind)
        packed.load_state_dict(layer.state_dict())
        # It is quantised as it moves to a device, the one where it is, too.
        model.set_submodule(name, packed.to(layer.weight.device).requires_grad_(False))
