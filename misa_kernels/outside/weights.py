"""Did somebody else exchange, resize, cast or write to a weight since the last step?"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from operator import add, attrgetter

import torch
from torch import Tensor

from misa_kernels.ranks.shards import is_sharded, local

VERSION = attrgetter("_version")
DTYPE = attrgetter("dtype")
ALL = slice(None)


class Weights:
    """The weights of all that may be trained, by slot, and of what is trained now, by row.

    Twice a step all addresses and versions are read, and nothing else where they are as they were: `map` over a list
    runs without the interpreter, and `local` alone would take more than half of the time.

    Args:
        params: The parameter of each slot, in the form that it keeps from now on.
        names: Its name.
        is_sharded: Whether parameters may be DTensors.

    Attributes:
        params: The parameter of each row.
        pointers: Where it lies; another list whenever an address is another one.
        is_refined: Whether any row's state has bits that its weight lacks.
    """

    def __init__(self, params: Sequence[Tensor], names: Sequence[str], is_sharded: bool) -> None:
        self._names = names
        self._is_sharded = is_sharded
        self._all = list(params)
        self._form = [(param.device, param.dtype, param.shape) for param in params]
        self._all_numels, self._all_dtypes = list(map(Tensor.numel, params)), list(map(DTYPE, params))
        self.watch([], [])

    def watch(self, slots: Sequence[int], refined: Sequence[int]) -> None:
        """Begin with other rows.

        Args:
            slots: The slot of each row.
            refined: Numbers of the rows whose state has bits that the weight lacks, ascending.
        """
        self._slots = list(slots)
        self.params = [self._all[slot] for slot in slots]
        self._refined = list(refined)
        self.is_refined = bool(refined)
        self._refined_params = [self.params[row] for row in refined]
        held = self._held(self.params)
        self.pointers = list(map(Tensor.data_ptr, held))
        self._numels = list(map(Tensor.numel, held))
        self._versions = self._read_versions(ALL)

    def _held(self, params: list[Tensor]) -> list[Tensor]:
        return list(map(local, params)) if self._is_sharded else params

    def note_versions(self, rows: slice) -> None:
        """Note that it was MISA that wrote to the weights of some rows; needed where `is_refined`."""
        self._versions[self._refined_in(rows)] = self._read_versions(rows)

    def are_as_left(self, rows: slice) -> bool:
        """Whether nobody else has done anything to the weights of some rows."""
        held = self.params[rows]
        # `_held`, in every step a call more.
        if self._is_sharded:
            held = list(map(local, held))
        return (
            list(map(Tensor.data_ptr, held)) == self.pointers[rows]
            and (not self.is_refined or self._read_versions(rows) == self._versions[self._refined_in(rows)])
            and list(map(Tensor.numel, held)) == self._numels[rows]
            and all(map(Tensor.is_contiguous, held))
        )

    def accept(self, rows: slice) -> list[int]:
        """Go on with the weights as they are; return which of the refined rows somebody else exchanged or wrote to."""
        pointers, versions = list(map(Tensor.data_ptr, self._held(self.params[rows]))), self._read_versions(rows)
        numbers = range(len(self.params))[rows]
        moved = {n for n, pointer in zip(numbers, pointers, strict=True) if pointer != self.pointers[n]}
        place = self._refined_in(rows)
        then = zip(self._refined[place], self._versions[place], versions, strict=True)
        written = [row for row, before, now in then if now != before or row in moved]
        self.pointers = [*self.pointers]
        self.pointers[rows] = pointers
        self._versions[place] = versions
        return written

    def _refined_in(self, rows: slice) -> slice:
        """Return where the refined ones of some rows are in the list of them."""
        if rows.start is None:
            return ALL
        return slice(bisect_left(self._refined, rows.start), bisect_left(self._refined, rows.stop))

    def _read_versions(self, rows: slice) -> list[int]:
        params = self._refined_params[self._refined_in(rows)]
        versions = list(map(VERSION, params))
        # What writes through a DTensor counts in that, what writes to its part here in the part.
        return list(map(add, versions, map(VERSION, map(local, params)))) if self._is_sharded else versions

    def check_all(self) -> None:
        """Refuse weights that changed their form, of all that may be trained.

        Raises:
            RuntimeError: With the name of the first one.
        """
        # Faster than shapes: with 20,000 modules the difference is 50 ms.
        if list(map(Tensor.numel, self._all)) != self._all_numels or list(map(DTYPE, self._all)) != self._all_dtypes:
            self._check(range(len(self._all)))

    def check(self, rows: slice) -> None:
        """Do the same for some rows."""
        self._check(self._slots[rows])

    def _check(self, slots: Collection[int]) -> None:
        for slot in slots:
            if (changed := self.changed(slot)) is not None:
                raise RuntimeError(changed)

    def changed(self, slot: int) -> str | None:
        """Return a sentence on how a weight differs from what it was in the first step, None if it does not."""
        param, name, (device, dtype, shape) = self._all[slot], self._names[slot], self._form[slot]
        if param.device != device or param.dtype != dtype:
            return (
                f"{name} is {param.dtype} on {param.device} but was {dtype} on {device} in the first step: move and "
                "cast the model before training"
            )
        if param.shape != shape:
            return (
                f"{name} is {tuple(param.shape)} but was {tuple(shape)} in the first step: resize before training, or "
                "call release() and construct a new MISA"
            )
        if not local(param).is_contiguous():
            return (
                f"{name} has strides {param.stride()} for shape {tuple(shape)} and must be contiguous: set param.data "
                "= param.data.contiguous()"
            )
        return None


def place_of(params: Sequence[Tensor], names: Sequence[str]) -> torch.device:
    """Return the device that holds all weights.

    Args:
        params: The weights.
        names: Their names.

    Raises:
        RuntimeError: If they are on several devices, or on none, or one has no memory.
    """
    devices = {param.device for param in params}
    if len(devices) > 1 or "meta" in {device.type for device in devices}:
        raise RuntimeError(
            f"the parameters are on {', '.join(sorted(map(str, devices)))}: MISA needs them on one device that "
            "holds data"
        )
    for param, name in zip(params, names, strict=True):
        if param.numel() and not (is_sharded(param) or param.untyped_storage().nbytes()):
            raise RuntimeError(
                f"{name} has no memory any more, as when FSDP2 had gathered it at "
                "construction: call reshard() on the model before, or construct before its first forward"
            )
    return devices.pop()
