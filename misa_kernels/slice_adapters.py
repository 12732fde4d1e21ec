"""How are slices trained beside weights that nobody can write to, as those of 4 bits? As an adapter of each layer.

What a slice of columns adds to a weight, W + D, is D times those elements of the input: y = W x + D x[first:last]. So
the base may be in any format, as for QLoRA (arXiv 2305.14314), and D, which begins at zero, is all that is trained.
Over a base that is not quantised it trains as `MISA(**slices())` does, with a weight of its own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from misa_kernels.draw.groups import param_groups

# Rows of the identity whose product with a layer is taken at once, to see its weight.
ROWS = 1024


class SlicedLinear(nn.Module):
    """A frozen linear layer of any format, and what is trained of some columns of its weight.

    Args:
        base: Maps (..., in_features) to (..., out_features), which are attributes of it.
        first: The first of the columns.
        last: One past the last.
        dtype: Of what is trained.

    Attributes:
        delta: Shape (out_features, last - first): what is added to these columns; zero at first.

    Raises:
        ValueError: For columns that the layer does not have.
    """

    def __init__(self, base: nn.Module, first: int, last: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_features, self.out_features = _sizes(base)
        self.base = base.requires_grad_(False)
        device = next((tensor.device for tensor in (*base.parameters(), *base.buffers())), None)
        _check(first, last, self.in_features)
        self.first, self.last = first, last
        self.delta = nn.Parameter(torch.zeros(self.out_features, last - first, dtype=dtype, device=device))

    @property
    def weight(self) -> Any:
        """The base's, of which some models ask the dtype; without what is trained."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The base's."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the base's output and what the slice adds to it.

        For backward it keeps the slice of x. A base may keep all of it, as bitsandbytes' of 8 bits does.
        """
        # A copy: a view would keep all of the input for the gradient of the slice.
        part = x[..., self.first : self.last].to(self.delta.dtype, copy=True)
        y: Tensor = self.base(x)
        return y + F.linear(part, self.delta).to(y.dtype)

    @torch.no_grad()
    def merged(self, dtype: torch.dtype) -> nn.Linear:
        """Return a plain layer with the base's weight as it multiplies, and what was trained of it."""
        base, size, device = self.base, self.in_features, self.delta.device
        own = getattr(base, "weight", self.delta).dtype
        own = own if own.is_floating_point else torch.float32
        bias = getattr(base, "bias", None)
        dropouts = [part for part in base.modules() if isinstance(part, _DropoutNd) and part.training]
        plain = nn.Linear(size, self.out_features, bias=bias is not None, dtype=torch.float32, device=device)
        # Beside a bias, a weight would be rounded as their sum is.
        is_apart = "bias" in base._parameters
        for part in dropouts:
            part.training = False
        if is_apart:
            base._parameters["bias"] = None
        try:
            zero = self.base(torch.zeros(1, size, dtype=own, device=device))
            for start in range(0, size, ROWS):
                units = torch.zeros(min(ROWS, size - start), size, dtype=own, device=device)
                units.diagonal(start).fill_(1)
                plain.weight[:, start : start + ROWS] = (self.base(units) - zero).T
        finally:
            for part in dropouts:
                part.training = True
            if is_apart:
                base._parameters["bias"] = bias
        plain.weight[:, self.first : self.last] += self.delta
        if bias is not None:
            plain.bias.copy_(bias)
        return plain.to(dtype)

    def get_extra_state(self) -> Tensor:
        """Return for a state dict where the slice lies, which is at random: a tensor, as files hold these alone."""
        return torch.tensor(self.first)

    def set_extra_state(self, state: Tensor) -> None:
        """Lie where a saved slice lay."""
        self.move(int(state))

    def move(self, first: int) -> None:
        """Lie at other columns, as many.

        Raises:
            ValueError: If the layer has not so many.
        """
        last = first + self.delta.shape[1]
        _check(first, last, self.in_features)
        self.first, self.last = first, last

    def extra_repr(self) -> str:
        """Return which columns are trained."""
        return f"columns {self.first} to {self.last} of {self.in_features}"


def add_slices(
    model: nn.Module,
    delta: float = 0.03,
    *,
    names: Iterable[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> dict[str, SlicedLinear]:
    """Let a slice of each of many layers be trained, equally wide and at random places.

    All else is frozen, but for slices that were added before. A layer that stands at several places has one slice. What
    `save_pretrained` writes of the model has other names than `from_pretrained` knows: save the slices, or merge them.

    Args:
        model: Changed in place: each of these layers is replaced.
        delta: Fraction of the model's parameters that is trained, at most; a quantised weight counts as what it stands
            for.
        names: Of the layers, whole or their last parts, such as "down_proj" or "mlp.down_proj"; None for the last
            matrices of all feed-forward networks, as `slices()` takes at small δ.
        seed: Of the places.
        dtype: Of what is trained; None for that of the model's first parameter of 16 bits or more.

    Returns:
        The layers by name, in the order of the model. What an optimizer trains is `layer.delta` of each.

    Raises:
        TypeError: For names that are no strings.
        ValueError: If there is no such layer, one is no linear layer or has a slice, or there is no room for a column
            of each; nothing is changed then.

    Example, a model that transformers loads in 4 bits::

        model = AutoModelForCausalLM.from_pretrained(name, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
        layers = add_slices(model, delta=0.03)
        optimizer = MISA([layer.delta for layer in layers.values()], lr=1e-3, delta=1.0, state_dtype="int8")
        ...
        torch.save(slices_of(layers), "slices.pt")
    """
    if not 0 < delta <= 1:
        raise ValueError(f"delta={delta!r} must be in (0, 1]: the fraction of the parameters that is trained")
    found = _named(model, names) if names is not None else _last_of_feed_forward(model)
    bases = {name: model.get_submodule(name) for name in found}
    sizes = {name: _sizes(base, name) for name, base in bases.items()}
    for name in found:
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise ValueError(
                f"{name} lies in an nn.TransformerEncoderLayer, which in eval() multiplies by the weight itself and "
                "would leave the slice out: train its weights, with MISA(groups, **slices())"
            )
    lines, total = sum(rows for _, rows in sizes.values()), numel_of(model)
    width = math.floor(delta * total) // lines
    if not width:
        least = math.ceil(lines / total * 1e4)
        least += math.floor(least / 1e4 * total) < lines
        raise ValueError(
            f"delta={delta:g} must leave room for a column of each of {len(found)} layers, {lines:,} of {total:,} "
            f"parameters: give {least / 1e4:g} or more"
        )
    if dtype is None:
        wide = (p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1)
        dtype = next(wide, torch.float32)
    model.requires_grad_(False)
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
        if isinstance(module, SlicedLinear):
            module.delta.requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, (columns, _) in sizes.items():
        own = min(width, columns)
        first = int(torch.randint(columns - own + 1, (1,), generator=generator))
        layers[name] = SlicedLinear(bases[name], first, first + own, dtype)
        for place in places[id(bases[name])]:
            model.set_submodule(place, layers[name])
    return layers


def numel_of(model: nn.Module) -> int:
    """Return how many parameters a model has, linear layers that are packed counted as what they stand for."""
    numels: dict[int, int] = {}
    for module in model.modules():
        own = {name: param for name, param in module._parameters.items() if param is not None}
        if _is_linear(module) and not module._modules:
            weight, numel = own.get("weight"), math.prod(_sizes(module))
            if weight is None or weight.numel() != numel:
                # Scales and zeros stand for nothing.
                own = {name: param for name, param in own.items() if name == "bias"}
                numels[id(module)] = numel
        numels |= {id(param): param.numel() for param in own.values()}
    return sum(numels.values())


def slices_of(layers: Mapping[str, SlicedLinear]) -> dict[str, dict[str, Any]]:
    """Return what has to be saved: where each slice begins, and what was trained of it."""
    return {name: {"first": layer.first, "delta": layer.delta.detach()} for name, layer in layers.items()}


@torch.no_grad()
def load_slices(layers: Mapping[str, SlicedLinear], saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Take over what `slices_of` returned of a model of the same layers and slices as wide.

    Raises:
        ValueError: For others; nothing is changed then.
    """
    if layers.keys() != saved.keys():
        raise ValueError(f"slices of {', '.join(saved)} were saved, and here are some of {', '.join(layers)}")
    for name, layer in layers.items():
        own = saved[name]
        if not isinstance(own, Mapping) or {"first", "delta"} - own.keys():
            raise ValueError(f"{name} must be saved as {{'first': ..., 'delta': ...}}, which slices_of returns")
        if own["delta"].shape != layer.delta.shape:
            raise ValueError(f"{name} has {tuple(layer.delta.shape)}, and {tuple(own['delta'].shape)} was saved")
        _check(own["first"], own["first"] + layer.delta.shape[1], layer.in_features)
    for name, layer in layers.items():
        layer.delta.copy_(saved[name]["delta"])
        layer.move(saved[name]["first"])


def _check(first: int, last: int, size: int) -> None:
    """Refuse columns that a layer does not have."""
    if not 0 <= first < last <= size:
        raise ValueError(f"columns {first} to {last} must be some of the {size} that the layer has")


def _sizes(layer: nn.Module, name: str = "base") -> tuple[int, int]:
    """Return how many features a linear layer reads, and how many it writes."""
    if isinstance(layer, SlicedLinear) or not _is_linear(layer):
        raise ValueError(
            f"{name} is a {type(layer).__name__} and must be a linear layer without a slice, with in_features and "
            "out_features: GPT-2's Conv1D has them once it is loaded in 4 or 8 bits, stacked experts have not"
        )
    return layer.in_features, layer.out_features  # type: ignore[return-value]


def _named(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of the modules that are meant, each by its first one."""
    names = [names] if isinstance(names, str) else list(names)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names={names!r} must be names of layers, such as ['down_proj'], or None to have them found")
    found: dict[int, str] = {}
    missing = set(names)
    for name, module in model.named_modules(remove_duplicate=False):
        own = {wanted for wanted in names if name == wanted or name.endswith(f".{wanted}")}
        missing -= own
        if own:
            found.setdefault(id(module), name)
    if missing:
        raise ValueError(f"none of the model's layers is called {', '.join(sorted(missing))}: say how they are called")
    return list(found.values())


def _last_of_feed_forward(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that are the last ones of feed-forward networks."""
    with warnings.catch_warnings():
        # What it freezes is of no matter here.
        warnings.simplefilter("ignore")
        tensors = {each.name for each in param_groups(model).found if each.part == "down"}
    found = [name for name, module in model.named_modules() if f"{name}.weight" in tensors and _is_linear(module)]
    if not found:
        raise ValueError(
            "add_slices does not see linear layers that are the last ones of feed-forward networks: name them, as in "
            "names=['down_proj']; stacked experts are none, nor is GPT-2's Conv1D until it is loaded in 4 or 8 bits"
        )
    return found


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")
