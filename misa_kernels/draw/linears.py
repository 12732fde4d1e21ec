"""Which linear layers multiply by a weight? An optimizer has parameters only, and slices need their layers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from misa_kernels.gradients.slices import input_axis

# By the weight, for as long as it lives.
_linears = WeakIdKeyDictionary()


def find(modules: Iterable[nn.Module]) -> dict[int, int]:
    """Note the linear layers among some modules; return, by the identity of a weight, the axis of its input."""
    found: dict[int, int] = {}
    of: dict[int, list[weakref.ref[nn.Module]]] = {}
    for module in modules:
        axis, weight = input_axis(module), module._parameters.get("weight")
        if axis is None or weight is None:
            continue
        found[id(weight)] = axis
        of.setdefault(id(weight), []).append(weakref.ref(module))
        _linears[weight] = of[id(weight)]
    return found


def linears_of(param: Tensor) -> list[nn.Module]:
    """Return the living linear layers that have a parameter as their weight."""
    known = _linears.get(param, [])  # type: ignore[no-untyped-call]
    modules = (reference() for reference in known)
    return [module for module in modules if module is not None and module._parameters.get("weight") is param]


def exchange(before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
    """Note which layers have other weights in the place of those that they had."""
    for old, new in zip(before, now, strict=True):
        if old is not new and (known := _linears.get(old)) is not None:  # type: ignore[no-untyped-call]
            _linears[new] = known
