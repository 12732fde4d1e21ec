"""Rebuild models whose packages are not installed from the trees that `record_trees.py` has written down.

A tree comes back as real modules without storage: of classes of the recorded names, one for each name, that derive from
the class of torch.nn from which the original's does, with parameters of the recorded shapes on the meta device. Its
forward only calls the modules, in the order in which the original's first called them.
"""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


@functools.lru_cache
def _trees() -> dict[str, Any]:
    return json.loads(gzip.decompress(Path(__file__).with_name("trees.json.gz").read_bytes()))


@functools.lru_cache
def _class_of(name: str, base: str | None) -> type[nn.Module]:
    derived = nn.Module if base is None else getattr(nn, base)
    if name == f"{derived.__module__}.{derived.__qualname__}":
        return derived
    module, _, own = name.rpartition(".")
    return type(own, (derived,), {"__module__": module})


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return x


def rebuild(name: str) -> nn.Module:
    recorded = _trees()[name]
    modules: list[nn.Module] = []
    places: dict[str, nn.Module] = {}
    for path, cls, base, constants, own in recorded["modules"]:
        module = _class_of(cls, base).__new__(_class_of(cls, base))
        nn.Module.__init__(module)
        for key, value in constants.items():
            setattr(module, key, tuple(value) if isinstance(value, list) else value)
        for key, shape in own.items():
            module.register_parameter(key, nn.Parameter(torch.empty(shape, device="meta")))
        module.forward = _same
        above, _, key = path.rpartition(".")
        if path:
            places[above].add_module(key, module)
        places[path] = module
        modules.append(module)
    if recorded["order"]:
        called = [modules[place] for place in recorded["order"]]
        modules[0].forward = lambda x: [module(x) for module in called]
    return modules[0]


def recorded(name: str) -> Callable[[], nn.Module]:
    return lambda: rebuild(name)
