"""What can be trained, under which numbers: made of the param groups and the user's flags, anew when these change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from misa_kernels.draw.partition import Block, Module, partition
from misa_kernels.draw.sampler import Sampler
from misa_kernels.kernels import Row
from misa_kernels.memory.storage import Storage
from misa_kernels.options import Options, check_sharded, check_trainable
from misa_kernels.ranks.agreement import group_of
from misa_kernels.ranks.shards import is_sharded, local, part_of, ranks_of

# One number a sampled block, on the host, from construction on: its module, what is known of it, whether it is active.
SHOWN = {
    "module": torch.int64,
    "importance": torch.float64,
    "importance_count": torch.int64,
    "last_round": torch.int64,
    "active": torch.bool,
}
# One number a slot that the arena holds.
COUNTERS = ("age", "updates", "score_sum")


class Layout:
    """The modules of a run, and the *slots* of all that may be trained.

    A slot is a tensor, row block or slice; its number is that of this layout, dense slots come first.

    Args:
        groups: The param groups; no parameter is changed.
        options: The arguments of the optimizer.
        sampler: Says what a module is.
        storage: How state is stored.
        chosen: Whether the user wants each parameter trained.
        counted: Whether it belongs to N.
        order: Names of layers in the order in which they run, as far as it is known.

    Attributes:
        partition: Modules, dense tensors, N and the budget.
        form: Shape and dtype of every parameter.
        ranks: Those that hold parts of the parameters; None where none is sharded.
        blocks: The block of each slot.
        dense: How many slots are dense.
        slots: Those of each module.
        module: int64[slots], the module of each slot, -1 for dense ones.
        spans: The range of slots of each parameter.

    Raises:
        TypeError: For a parameter to be trained that cannot be, by its dtype.
        ValueError: For anything else, see `partition`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        options: Options,
        sampler: Sampler,
        storage: Storage,
        chosen: Sequence[bool],
        counted: Sequence[bool],
        order: Sequence[str] = (),
    ) -> None:
        params: list[Tensor] = [param for group in groups for param in group["params"]]
        found = partition(
            groups, options.delta, sampler.granularity, sampler.oversized, chosen, counted, order, sampler.slices
        )
        check_trainable(found, storage)
        check_sharded(params, found, storage, options.release_gradients)
        self.partition = found
        self.form = form_of(params)
        self.ranks = ranks_of(params, group_of(options.process_group))

        owned = [(block, number) for number, module in enumerate(found.modules) for block in module.blocks]
        owned.sort(key=lambda pair: (pair[0].index, pair[0].number))
        self.blocks: list[Block] = [*found.dense, *(block for block, _ in owned)]
        self.dense = len(found.dense)
        self.module: npt.NDArray[np.int64] = np.array([-1] * self.dense + [n for _, n in owned], dtype=np.int64)
        self.slots: list[list[int]] = [[] for _ in found.modules]
        for slot, (_, number) in enumerate(owned, self.dense):
            self.slots[number].append(slot)
        # A parameter's blocks follow one another.
        starts = [slot for slot, block in enumerate(self.blocks) if not block.number]
        spans = list(map(slice, starts, [*starts[1:], len(self.blocks)]))
        self.spans: dict[Tensor, slice] = {self.blocks[span.start].param: span for span in spans}
        # Of the slots whose parameter has several.
        self._numbers = {
            slot: self.blocks[slot].number
            for span in spans
            if span.stop - span.start > 1
            for slot in range(span.start, span.stop)
        }
        self._group_of_param = [number for number, group in enumerate(groups) for _ in group["params"]]
        self._rows: dict[int, Row] = {}

    def is_like(self, other: Layout) -> bool:
        """Whether another layout has the same modules."""
        return list(map(_signature, self.partition.modules)) == list(map(_signature, other.partition.modules))

    def name_of(self, slot: int) -> str:
        """Return the name of a slot's parameter."""
        return self.partition.names[self.blocks[slot].index]

    def slots_of(self, numbers: Sequence[int]) -> list[int]:
        """Return the slots of some modules."""
        return [slot for number in numbers for slot in self.slots[number]]

    def indices_of(self, numbers: Sequence[int]) -> set[int]:
        """Return the positions of the parameters that are trained when these modules are active."""
        found = {block.index for number in numbers for block in self.partition.modules[number].blocks}
        return found | {block.index for block in self.partition.dense}

    def slices_of(self, numbers: Sequence[int]) -> list[Block]:
        """Return the slices among some modules."""
        if self.partition.slicing is None:
            return []
        return [block for number in numbers for block in self.partition.modules[number].blocks]

    def places_of(self, numbers: Sequence[int]) -> set[tuple[int, int]]:
        """Return position of the parameter and first element of each block of some modules: the same in any layout."""
        modules = self.partition.modules
        return {(block.index, block.start) for number in numbers for block in modules[number].blocks}

    def cuts(self) -> dict[int, list[int]]:
        """Return where the blocks of each parameter end, by its position."""
        cuts: dict[int, list[int]] = {}
        for block in self.blocks:
            # Slices may overlap.
            cuts.setdefault(block.index, []).extend([block.stop] if block.axis is None else [block.start, block.stop])
        return cuts

    def key(self, name: str, slot: int) -> str:
        """Return the state key of one slot's tensor: "exp_avg", or "exp_avg.3" for block 3 of several."""
        return f"{name}.{self._numbers[slot]}" if slot in self._numbers else name

    def sizes(self, storage: Storage) -> dict[Tensor, dict[str, int]]:
        """Return, for every parameter, the keys that its state may have, and their numel; not to be changed."""
        buffers = {dtype: storage.buffers(dtype) for dtype in {param.dtype for param in self.spans}}
        # Those of one slot and as many elements share what is found.
        found: dict[tuple[torch.dtype, int], dict[str, int]] = {}
        sizes = {}
        for param, span in self.spans.items():
            block = self.blocks[span.start]
            key = param.dtype, block.numel
            own = found.get(key) if span.start not in self._numbers else None
            if own is None:
                own = {
                    self.key(name, slot): buffer.numel(self.blocks[slot].numel)
                    for slot in range(span.start, span.stop)
                    for name, buffer in buffers[param.dtype].items()
                } | dict.fromkeys((*COUNTERS, *SHOWN), span.stop - span.start)
                if span.start not in self._numbers:
                    found[key] = own
            sizes[param] = own
        return sizes

    def row(self, slot: int) -> Row:
        """Return what the kernels need to know of a slot."""
        if slot not in self._rows:
            self._rows[slot] = self._row(slot)
        return self._rows[slot]

    def pieces(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return the views of a vector of one number a slot that belong to the parameters, in the order of `spans`."""
        sizes = [span.stop - span.start for span in self.spans.values()]
        return cast(Any, vector).split(sizes)  # type: ignore[no-any-return]

    def pieces_by_address(self, vector: Tensor, address: int) -> dict[int, Tensor]:
        """Return them by where they would lie if the vector did at an address; none of another tensor than such one."""
        if vector.shape != (len(self.blocks),) or not address:
            return {}
        starts = (address + span.start * vector.itemsize for span in self.spans.values())
        return dict(zip(starts, self.pieces(vector), strict=True))

    def _row(self, slot: int) -> Row:
        block = self.blocks[slot]
        module = int(self.module[slot]) if slot >= self.dense else None
        # Whole tensors count once, on the first rank.
        start, is_counted = 0, self.ranks is None or self.ranks.is_first
        offset, end = block.start, block.stop
        if is_sharded(block.param):
            start, end, is_counted = part_of(block.param)
            if (piece := block.piece) is not None:
                offset, end = piece.extent_in(local(block.param))
        return Row(
            slot=slot,
            param=block.param,
            index=block.index,
            start=start + offset,
            stop=start + end,
            offset=offset,
            is_counted=is_counted,
            group=self._group_of_param[block.index],
            fellows=[slot] if module is None else self.slots[module],
            module=module,
            width=block.width,
            pitch=block.pitch,
            is_slice=block.axis is not None,
        )

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the sum over the slots of each module, from one number a slot."""
        total = np.zeros(len(self.slots))
        np.add.at(total, self.module[self.dense :], values[self.dense :])
        return total

    def max(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the maximum over the slots of each module, from one number >= 0 a slot."""
        most = np.zeros(len(self.slots), dtype=np.int64)
        np.maximum.at(most, self.module[self.dense :], values[self.dense :])
        return most


def form_of(params: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of parameters."""
    return [(param.shape, param.dtype) for param in params]


def _signature(module: Module) -> tuple[Any, ...]:
    return (module.name, *((block.index, block.start, block.stop) for block in module.blocks))
