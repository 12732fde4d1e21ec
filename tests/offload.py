"""What does a step hold if what forward saves for backward lies elsewhere? Tensors moved out of torch's allocator."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def away(model: nn.Module) -> Iterator[dict[tuple[int, int], int]]:
    """Keep what forward saves for backward, weights apart, in NumPy's memory, which torch's allocator does not see.

    Yields the bytes of each storage and the number of its allocation, whoever else saves it.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    sizes: dict[tuple[int, int], int] = {}
    # A storage that is gone may have had the address of another.
    known: dict[int, tuple[weakref.ref[torch.UntypedStorage], tuple[int, int]]] = {}

    def pack(tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in own:
            return tensor
        seen = known.get(storage.data_ptr())
        if seen is None or seen[0]() is None:
            key = (storage.data_ptr(), len(sizes))
            known[storage.data_ptr()] = weakref.ref(storage), key
            sizes[key] = storage.nbytes()
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
        copied = tensor.detach().view(bits).numpy().copy()
        return copied, bits, tensor.shape, tensor.stride(), tensor.dtype

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        copied, bits, shape, stride, dtype = kept
        back = torch.empty_strided(shape, stride, dtype=dtype)
        back.view(bits).numpy()[...] = copied
        return back

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield sizes
