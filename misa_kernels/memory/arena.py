"""The memory of the active set's state: allocated once a layout, lent anew at every switch.

A *slot* is one tensor, row block or slice that may be trained; its number stays as long as the layout. Moments and
masters exist for active slots only and lie side by side in one pool per weight dtype. The few numbers per slot (age,
score) exist for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from misa_kernels.memory.codec import GROUP
from misa_kernels.memory.storage import Buffer, Storage
from misa_kernels.ranks.shards import Ranks

# Offsets are multiples of this many elements, so that groups with a scale of their own begin with the slot.
ALIGNMENT = GROUP
# Overlapping moves go through a bounce buffer of this many elements: 2 MiB in float32.
MOVE_ELEMENTS = 1 << 19


def host(values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
    """Return numbers as a tensor on the host, whatever the default device is."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device, in stream order; the host does not wait for it.

    Of memory that is not pinned every copy to a GPU waits until the device has it.
    """
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def padded(numel: int) -> int:
    """Return `numel` rounded up to a multiple of `ALIGNMENT` elements."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def capacity(always: Sequence[int], candidates: Sequence[int], budget: int, whole: Sequence[int] | None = None) -> int:
    """Return the elements a pool must hold for any admissible active set, padding included.

    Args:
        always: Sizes of the always-on slots, in elements.
        candidates: Sizes of the slots of which only some are active at once.
        budget: δN, in elements.
        whole: What each candidate takes of the budget, where that is more than its size, its tensor being sharded.
    """
    sizes = np.asarray(candidates, dtype=np.int64)
    costs = sizes if whole is None else np.asarray(whole, dtype=np.int64)
    most_slots = int(np.searchsorted(np.cumsum(np.sort(costs)), budget, side="right"))
    padding = np.sort(-sizes % ALIGNMENT)[::-1][:most_slots].sum()
    # What is sharded unevenly: the part of the budget that goes into the candidates with the most of it here.
    order = np.argsort(-sizes / costs, kind="stable")
    left = np.clip(budget - (np.cumsum(costs[order]) - costs[order]), 0, costs[order])
    most = int(np.ceil((left * (sizes[order] / costs[order])).sum()))
    bound = int(min(most + padding, sum(padded(int(size)) for size in sizes)))
    return sum(padded(size) for size in always) + padded(bound)


class Pool:
    """State of the active slots of one weight dtype.

    Args:
        elements: Capacity, see `capacity`.
        kinds: What the state is made of, see `Storage.buffers`.
        device: Where the weights are.
    """

    def __init__(self, elements: int, kinds: Mapping[str, Buffer], device: torch.device) -> None:
        self.kinds = kinds
        self.buffers = {
            name: torch.empty(kind.numel(elements), dtype=kind.dtype, device=device) for name, kind in kinds.items()
        }
        self.offsets: dict[int, int] = {}
        self.used = 0

    def lend(self, keep: Iterable[int], enter: Iterable[int], numel: Sequence[int], clear: bool) -> None:
        """Close the gaps between the slots kept, keeping their contents, and append new ones."""
        self.used, moved = 0, {}
        # Ascending, so that a slot only ever moves down into space already vacated.
        for slot in sorted(keep, key=self.offsets.__getitem__):
            for name, buffer in self.buffers.items():
                numbers = (self.offsets[slot], self.used, numel[slot])
                move_down(buffer, *(self.kinds[name].numel(number) for number in numbers))
            moved[slot] = self.used
            self.used += padded(numel[slot])
        start = self.used
        for slot in enter:
            moved[slot] = self.used
            self.used += padded(numel[slot])
        self.offsets = moved
        if clear:
            # Masters are left for the caller to fill.
            for name, buffer in self.buffers.items():
                if name == "master":
                    continue
                buffer[self.kinds[name].numel(start) : self.kinds[name].numel(self.used)].zero_()

    def views(self, slot: int, start: int, numel: int) -> dict[str, Tensor]:
        """Return some of one slot's elements in each buffer, 1-D."""
        kinds, offset = self.kinds, self.offsets[slot] + start
        return {
            name: buffer.narrow(0, kinds[name].numel(offset), kinds[name].numel(numel))
            for name, buffer in self.buffers.items()
        }


def move_down(buffer: Tensor, source: int, target: int, numel: int) -> None:
    """Move `numel` elements of a 1-D buffer to a lower offset; the ranges may overlap."""
    if source == target:
        return
    for i in range(0, numel, MOVE_ELEMENTS):
        n = min(MOVE_ELEMENTS, numel - i)
        piece = buffer[source + i : source + i + n]
        # copy_ between overlapping ranges is undefined.
        overlaps = target + n > source
        buffer[target + i : target + i + n].copy_(piece.clone() if overlaps else piece)


class Arena:
    """The state of all slots; the tables of a round beside it are in `kernels/table.py`.

    Args:
        numel: Elements of each slot on this rank.
        dtypes: Weight dtype of each slot.
        always: Numbers of the slots that are never given back.
        budget: δN, in elements.
        device: Where the weights are.
        storage: What the state of a slot is made of.
        whole: What each slot takes of the budget, where parameters are sharded; None: its elements.
        counted: Whether the norm of each slot counts in sums over ranks; None where there are none.

    Attributes:
        age: int32, updates since activation, per slot.
        updates: int32, updates that the slot's module had in this round, per slot.
        score_sum: float64, sum of ‖g‖² (or ‖g‖) over this round's updates, per slot.
        sq_norm: float64, ‖g‖² of the current step, per slot; 0 where there is none.
        skipped: int32, 0-dim, steps skipped in this round.
    """

    def __init__(
        self,
        numel: Sequence[int],
        dtypes: Sequence[torch.dtype],
        always: Iterable[int],
        budget: int,
        device: torch.device,
        *,
        storage: Storage,
        whole: Sequence[int] | None = None,
        counted: Sequence[bool] | None = None,
    ) -> None:
        self.device = device
        self.numel = list(numel)
        self.dtypes = list(dtypes)
        dense = set(always)
        self.pools: dict[torch.dtype, Pool] = {}
        for dtype in dict.fromkeys(self.dtypes):
            slots = [slot for slot, other in enumerate(self.dtypes) if other == dtype]
            elements = capacity(
                [self.numel[slot] for slot in slots if slot in dense],
                [self.numel[slot] for slot in slots if slot not in dense],
                budget,
                None if whole is None else [whole[slot] for slot in slots if slot not in dense],
            )
            self.pools[dtype] = Pool(elements, storage.buffers(dtype), device)
        count = len(self.numel)
        self.age = torch.zeros(count, dtype=torch.int32, device=device)
        self.updates = torch.zeros(count, dtype=torch.int32, device=device)
        self.score_sum = torch.zeros(count, dtype=torch.float64, device=device)
        self.sq_norm = torch.zeros(count, dtype=torch.float64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int32, device=device)
        self._counted = sent(host([] if counted is None else counted, torch.float64), device)
        self._active_index = torch.zeros(0, dtype=torch.int64, device=device)

    def rehearse(self) -> None:
        """Take the memory that `lend` takes, and change nothing."""
        most = max(
            (pool.used * kind.dtype.itemsize for pool in self.pools.values() for kind in pool.kinds.values()), default=0
        )
        torch.empty(min(most, 4 * MOVE_ELEMENTS), dtype=torch.uint8, device=self.device)

    def erase(self) -> None:
        """Overwrite all state with zeros, also where nothing is lent."""
        for pool in self.pools.values():
            for buffer in pool.buffers.values():
                buffer.zero_()
        for numbers in (self.age, self.updates, self.score_sum, self.sq_norm, self.skipped):
            numbers.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of moments, masters and residuals, lent or not."""
        buffers = [buffer for pool in self.pools.values() for buffer in pool.buffers.values()]
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)

    def lend(self, keep: Iterable[int], enter: Sequence[int], *, clear: bool = True) -> None:
        """Make `keep` and `enter` the active slots; entering ones start at age 0.

        Starts a round: the sums of the one before are cleared.

        Args:
            keep: Active slots that stay, with their contents.
            enter: Slots that enter, without their masters, which are left for the caller to fill.
            clear: Whether the state of entering slots is set to 0.
        """
        keep = list(keep)
        left = {slot for pool in self.pools.values() for slot in pool.offsets}.difference(keep)
        for dtype, pool in self.pools.items():
            pool.lend(
                [slot for slot in keep if self.dtypes[slot] == dtype],
                [slot for slot in enter if self.dtypes[slot] == dtype],
                self.numel,
                clear,
            )
        fresh = sent(host([*left, *enter]), self.device)
        self.age.index_fill_(0, fresh, 0)
        self._active_index = sent(host([*keep, *enter]), self.device)
        for sums in (self.updates, self.score_sum, self.sq_norm, self.skipped):
            sums.zero_()

    def views(self, slot: int, start: int = 0, numel: int | None = None) -> dict[str, Tensor]:
        """Return one active slot's part of each buffer, 1-D: all of it, or what a piece of its elements has there.

        Args:
            slot: Its number.
            start: First element, a multiple of `ALIGNMENT`.
            numel: Elements; None: all of them.
        """
        return self.pools[self.dtypes[slot]].views(slot, start, self.numel[slot] if numel is None else numel)

    def refines(self, slot: int) -> bool:
        """Whether a slot's state has bits that its weight lacks."""
        kinds = self.pools[self.dtypes[slot]].kinds
        return "master" in kinds or "residual" in kinds

    def offset(self, slot: int) -> int:
        """Return where an active slot's part of its pool begins, in elements."""
        return self.pools[self.dtypes[slot]].offsets[slot]

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The numbers per slot that outlive a step, by name."""
        return {"age": self.age, "updates": self.updates, "score_sum": self.score_sum}

    def advance(self, updated: Sequence[int], counted: Sequence[int], finite: Tensor | None) -> None:
        """Count a step of some slots: ages, updates and scores.

        Args:
            updated: Slots that had a gradient, whose age grows.
            counted: Those whose module had one, whose updates grow.
            finite: 0-dim bool, False if the step was skipped; None if it cannot be.
        """
        one = torch.ones((), dtype=torch.int32, device=self.device) if finite is None else finite.int()
        for counter, slots in ((self.age, updated), (self.updates, counted)):
            index = sent(host(slots), self.device)
            counter.index_add_(0, index, one.expand(len(slots)))
        if finite is not None:
            skipped = finite.logical_not()
            self.sq_norm.masked_fill_(skipped, 0.0)
            self.skipped.add_(skipped)
        self.score_sum.add_(self.sq_norm)
        self.sq_norm.zero_()

    def root_of_squares(self, modules: Iterable[Sequence[int]]) -> None:
        """Turn ‖g‖² of the step into ‖g‖; that of a module of several slots goes into the first of them."""
        for first, *others in modules:
            for slot in others:
                self.sq_norm[first].add_(self.sq_norm[slot])
                self.sq_norm[slot].zero_()
        self.sq_norm.sqrt_()

    def sum_sq_norm(self, ranks: Ranks) -> None:
        """Sum ‖g‖² of the step over the ranks."""
        self.sq_norm.copy_(self.sum_over(ranks, self.sq_norm))

    def sum_over(self, ranks: Ranks, values: Tensor) -> Tensor:
        """Return numbers per slot, the last axis of `values`, summed over the ranks."""
        return ranks.sum(values * self._counted)

    def read_round(self, *values: Tensor) -> tuple[np.ndarray, int]:
        """Return numbers per slot and `skipped`, in one transfer to the host.

        Args:
            values: One vector or more over all slots.

        Returns:
            float64 of shape (vectors, slots), 0 at inactive slots, and the steps skipped in this round.
        """
        index = self._active_index
        columns = [index.double(), *(vector[index].double() for vector in values)]
        host = torch.cat([*columns, self.skipped.double().view(1)]).cpu().numpy()
        slots, *read = host[:-1].reshape(len(columns), -1)
        found = np.zeros((len(values), len(self.numel)))
        found[:, slots.astype(np.int64)] = read
        return found, int(host[-1])
