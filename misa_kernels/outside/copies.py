"""Is a model a copy of one that MISA trained at that moment? Then its flags are those of a round, not the user's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from misa_kernels.ranks.shards import is_sharded

# Rounds of this process that are remembered, the latest.
REMEMBERED = 1000
# Parameters that are off, of which one element tells a copy from another model with the same flags.
PROBED = 3

# By what tells a model and its active set: the keys of what its user had frozen and of what is trained in slices, and
# what `_probe` read.
_rounds: OrderedDict[tuple[int, int], tuple[frozenset[int], frozenset[int], Tensor | None]] = OrderedDict()


class Marks:
    """What tells a model, in whatever order its parameters come.

    Args:
        names: Of the parameters.
        params: The parameters, as long as they keep their shapes.
    """

    def __init__(self, names: Sequence[str], params: Sequence[Tensor]) -> None:
        self.names, self.params = names, params
        self._keys = [hash((name, param.shape)) for name, param in zip(names, params, strict=True)]
        self._whole = _joined(self._keys)
        self._chosen, self._frozen = b"", frozenset[int]()

    def remember(self, on: Collection[int], chosen: Sequence[bool], sliced: Collection[int] = ()) -> None:
        """Note a round.

        Args:
            on: Positions of what requires a gradient.
            chosen: What the user wants trained.
            sliced: Positions of what is trained all the same.
        """
        if (now := bytes(chosen)) != self._chosen:
            self._chosen = now
            self._frozen = frozenset(key for key, flag in zip(self._keys, chosen, strict=True) if not flag)
        written = frozenset(self._keys[index] for index in sliced)
        _rounds[self._round(on)] = self._frozen, written, self._probe(on, chosen, written)
        if len(_rounds) > REMEMBERED:
            _rounds.popitem(last=False)

    def recall(self, on: Collection[int]) -> tuple[list[bool], bool] | None:
        """Return what the user wanted trained of the model that this one is a copy of; None if it is none.

        Also whether that is certain: it is not where weights differ that MISA leaves alone in a round.
        """
        frozen, written, probe = _rounds.get(self._round(on), (None, frozenset[int](), None))
        if frozen is None:
            return None
        chosen = [key not in frozen for key in self._keys]
        return chosen, _is_equal(probe, self._probe(on, chosen, written))

    @cached_property
    def _order(self) -> list[int]:
        """Return the positions in an order that the keys alone give."""
        return sorted(range(len(self.params)), key=self._keys.__getitem__)

    def _round(self, on: Collection[int]) -> tuple[int, int]:
        return self._whole, _joined([self._keys[index] for index in on])

    def _probe(self, on: Collection[int], chosen: Sequence[bool], written: Collection[int]) -> Tensor | None:
        """Return an element of each of some that are off and not frozen: nothing writes to them in a round."""
        still = (i for i in self._order if chosen[i] and i not in on and self._keys[i] not in written)
        off = islice((self.params[i] for i in still), PROBED)
        plain = [param for param in off if param.numel() and not (param.is_meta or is_sharded(param))]
        if len({(param.device, param.dtype) for param in plain}) != 1:
            return None
        values = torch.stack([param.detach()[(-1,) * param.ndim] for param in plain])
        if not values.is_cuda:
            return values
        # Kept on the host, without waiting for it.
        kept = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
        return kept.copy_(values, non_blocking=True)


def is_irregular(params: Sequence[Tensor], names: Sequence[str], layers: Sequence[Any], chosen: Sequence[bool]) -> bool:
    """Whether at least two layers have some of their matrices on, and not the same ones, as nobody chooses them."""
    if all(chosen):
        return False
    on: dict[str, set[str]] = {}
    off: dict[str, set[str]] = {}
    for param, name, layer, flag in zip(params, names, layers, chosen, strict=True):
        if layer is not None and param.ndim >= 2:
            (on if flag else off).setdefault(layer, set()).add(name.removeprefix(layer))
    partly = {frozenset(matrices) for layer, matrices in on.items() if layer in off}
    return len(partly) > 1


def _joined(keys: Sequence[int]) -> int:
    joined = len(keys)
    for key in keys:
        joined ^= key
    return joined


def _is_equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if b.is_pinned():
        torch.cuda.synchronize()
    return a.dtype == b.dtype and torch.equal(a, b)
