"""Which linear layers multiply by a weight? An optimizer has parameters only, and slices need their layers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from misa_kernels.gradients.axes import input_axis
from misa_kernels.ranks.shards import is_held

# By the weight, for as long as it lives, a list of `_Linear`.
_linears = WeakIdKeyDictionary()


class _Linear(NamedTuple):
    """A linear layer.

    Args:
        module: The layer.
        places: Which attributes of which modules it is.
    """

    module: weakref.ref[nn.Module]
    places: list[tuple[weakref.ref[nn.Module], str]]


def find(modules: Iterable[nn.Module]) -> dict[int, int]:
    """Note the linear layers among some modules; return, by the identity of a weight, the axis of its input.

    A weight that another kind of module has, too, such as an embedding, is left out: its gradient comes from both.
    """
    modules = list(modules)
    places: dict[int, list[tuple[weakref.ref[nn.Module], str]]] = {}
    for outer in modules:
        for name, module in outer._modules.items():
            places.setdefault(id(module), []).append((weakref.ref(outer), name))
    axes = list(map(input_axis, modules))
    others = {
        id(param)
        for module, axis in zip(modules, axes, strict=True)
        for name, param in module._parameters.items()
        if axis is None or name != "weight"
    }
    found: dict[int, int] = {}
    of: dict[int, list[_Linear]] = {}
    for module, axis in zip(modules, axes, strict=True):
        weight = None if axis is None else module._parameters["weight"]
        if axis is None or weight is None or id(weight) in others:
            continue
        found[id(weight)] = axis
        of.setdefault(id(weight), []).append(_Linear(weakref.ref(module), places.get(id(module), [])))
        _linears[weight] = of[id(weight)]
    return found


def linears_of(param: Tensor) -> list[nn.Module]:
    """Return the living linear layers that have a parameter as their weight; [] if one of them is no such layer now."""
    modules = (known.module() for known in _known(param))
    own = [module for module in modules if module is not None and is_held(module._parameters.get("weight"), param)]
    return [] if None in map(input_axis, own) else own


def successors_of(param: Tensor) -> list[nn.Module]:
    """Return what stands where a linear layer with this weight stood when it was found, and may be around it."""
    found: list[nn.Module] = []
    for known in _known(param):
        for outer, name in known.places:
            holder, module = outer(), known.module()
            now = None if holder is None else holder._modules.get(name)
            if now is not None and now is not module and now not in found:
                found.append(now)
    return found


def exchange(before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
    """Note which layers have other weights in the place of those that they had."""
    for old, new in zip(before, now, strict=True):
        if old is not new and (known := _linears.get(old)) is not None:  # type: ignore[no-untyped-call]
            _linears[new] = known


def _known(param: Tensor) -> list[_Linear]:
    known: list[_Linear] = _linears.get(param, [])  # type: ignore[no-untyped-call]
    return known
