"""Which tensors of a module are weight matrices, and between which widths?

What torch's own modules hold is known; of any other tensor its shape tells, and the vectors beside it.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# A scale of several axes is no matrix.
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
_LOST = ("InterpreterModule", "Module", "GraphModule")


class Widths(NamedTuple):
    """How many features a matrix may read, and how many it may write; both where its axes do not say which is which."""

    reads: frozenset[int]
    writes: frozenset[int]


def class_of(module: nn.Module) -> str:
    """Return the name of a module's class; TorchScript keeps it apart."""
    return str(module.original_name) if isinstance(module, torch.jit.ScriptModule) else type(module).__name__


def is_lost(module: nn.Module) -> bool:
    """Whether a module is what torch.fx or torch.export make of any class."""
    return type(module).__name__ in _LOST and type(module).__module__.startswith("torch.")


def is_list(module: nn.Module) -> bool:
    """Whether a module is one of torch's lists of modules, or was one before it was traced."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return True
    if is_lost(module):
        return bool(module._modules) and all(name.isdigit() for name, _ in module.named_children())
    return class_of(module) in ("ModuleList", "ModuleDict", "Sequential")


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks rows of its weight up."""
    return isinstance(module, _EMBEDDINGS) or class_of(module) in ("Embedding", "EmbeddingBag")


def is_vector(param: Tensor) -> bool:
    """Whether fewer than two axes are longer than 1, as of scales and biases in whatever shape."""
    shape = param.shape
    return len(shape) < 2 or not (min(shape) > 1 or sum(size > 1 for size in shape) > 1)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is one of torch's norms, or holds vectors alone, as others' do."""
    axes = [param.ndim for param in module._parameters.values() if param is not None]
    return max(axes) == 1 if axes else isinstance(module, _NORMS)


def is_known(module: nn.Module) -> bool:
    """Whether a module's class tells what its tensors are."""
    return isinstance(module, (nn.Linear, _ConvNd, nn.RNNBase, nn.Bilinear, *_EMBEDDINGS, *_NORMS, ParametrizationList))


def is_told(module: nn.Module, name: str) -> bool:
    """Whether a module's class tells what one of its tensors is; subclasses may hold more."""
    return is_known(module) and (name in ("weight", "bias") or not isinstance(module, (nn.Linear, _ConvNd)))


def matrices_of(module: nn.Module) -> dict[str, Widths]:
    """Return the weight matrices among a module's own tensors, by the names of these."""
    if isinstance(module, nn.Linear):
        # Not the shape of the weight, which quantisation packs.
        sizes = module.in_features, module.out_features
        found = {"weight": _widths(*sizes)} if min(sizes) > 1 else {}
        # A subclass may hold more.
        return found if len(module._parameters) < 3 else found | _unknown(module, {"weight", "bias"})
    own = {name: param for name, param in module._parameters.items() if param is not None}
    if is_embedding(module) or isinstance(module, _NORMS):
        return {}
    if isinstance(module, nn.RNNBase):
        size = (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
        return {name: _widths(module.input_size, size) for name, param in own.items() if not is_vector(param)}
    if isinstance(module, _ConvNd) and "weight" in own:
        found = {} if is_vector(own["weight"]) else {"weight": _widths(module.in_channels, module.out_channels)}
        return found if len(module._parameters) < 3 else found | _unknown(module, {"weight", "bias"})
    if not own:
        # Quantised ones hold buffers.
        reads, writes = getattr(module, "in_features", None), getattr(module, "out_features", None)
        is_linear = not module._modules and isinstance(reads, int) and isinstance(writes, int)
        return {"": _widths(reads, writes)} if is_linear else {}
    return _unknown(module)


def _unknown(module: nn.Module, known: Collection[str] = ()) -> dict[str, Widths]:
    """Return the weight matrices among the tensors of a module of which its class tells nothing."""
    own = {name: param for name, param in module._parameters.items() if param is not None and name not in known}
    vectors = {param.numel() for param in own.values() if param.ndim == 1}
    return {
        name: _guessed(param, vectors) for name, param in own.items() if not is_vector(param) and not _is_row(param)
    }


def _is_row(param: Tensor) -> bool:
    """Whether a tensor has an axis for the batch, as what is added to the input or put before it has."""
    return param.ndim > 2 and len(param) == 1


@lru_cache(maxsize=4096)
def _widths(reads: int, writes: int) -> Widths:
    return Widths(frozenset((reads,)), frozenset((writes,)))


def _guessed(param: Tensor, vectors: set[int]) -> Widths:
    """Return the widths of a matrix beside which vectors of these sizes lie: a bias is as long as what it writes."""
    axes = frozenset(param.shape)
    writes = axes & vectors
    if param.ndim == 2 and len(axes) == 2 and len(writes) == 1:
        return Widths(axes - writes, writes)
    return Widths(axes, axes)
