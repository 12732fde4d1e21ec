"""What can be drawn, under which numbers: made of the param groups and the user's flags, anew when these change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from misa_kernels import options as arguments
from misa_kernels.draw.partition import Block, Module, Partition, partition
from misa_kernels.draw.sampler import Candidates, Ints, Sampler
from misa_kernels.kernels import Row
from misa_kernels.memory.storage import Storage
from misa_kernels.ranks.agreement import group_of
from misa_kernels.ranks.shards import Part, Ranks, is_sharded, part_of, ranks_of

# One number a sampled block, on the host, from construction on: what the sampler knows, what is active, and the number
# of the module that it belongs to.
SCORES = {
    "module": torch.int64,
    "importance": torch.float64,
    "importance_count": torch.int64,
    "last_round": torch.int64,
    "active": torch.bool,
}
# One number a slot that the arena holds, where it has them.
NUMBERS = ("age", "updates", "score_sum")


@dataclass(frozen=True)
class Layout:
    """The modules of a run and the slots of all that may be trained.

    Attributes:
        partition: Modules, dense tensors, N and the budget.
        slots: The numbering of tensors and row blocks.
        candidates: The live scores of the modules.
        ranks: Those that hold parts of the parameters; None where none is sharded.
        form: Shape and dtype of every parameter.
    """

    partition: Partition
    slots: Slots
    candidates: Candidates
    ranks: Ranks | None
    form: list[tuple[Any, Any]]

    @classmethod
    def of(
        cls,
        groups: list[dict[str, Any]],
        options: arguments.Options,
        sampler: Sampler,
        storage: Storage,
        chosen: Sequence[bool],
        counted: Sequence[bool],
    ) -> Layout:
        """Return the layout of param groups; no parameter is changed.

        Args:
            groups: The param groups.
            options: The arguments of the optimizer.
            sampler: Says what a candidate is.
            storage: How state is stored.
            chosen: Whether the user wants each parameter trained.
            counted: Whether it belongs to N.

        Raises:
            TypeError: For a parameter to be trained that cannot be, by its dtype.
            ValueError: For anything else, see `partition`.
        """
        params: list[Tensor] = [param for group in groups for param in group["params"]]
        found = partition(groups, options.delta, sampler.granularity, sampler.oversized, chosen, counted)
        arguments.check_trainable(found, storage)
        arguments.check_sharded(params, found, storage, options.release_gradients)
        ranks = ranks_of(params, group_of(options.process_group))
        candidates = Candidates.fresh(
            np.array([module.numel for module in found.modules]), np.array([module.layer for module in found.modules])
        )
        return cls(found, Slots(found, groups, ranks), candidates, ranks, form_of(params))

    def is_like(self, other: Layout) -> bool:
        """Whether another layout has the same modules."""
        return list(map(_signature, self.partition.modules)) == list(map(_signature, other.partition.modules))

    def carry(self, other: Layout) -> Ints:
        """Take over the scores that another layout has of modules of the same name.

        Returns:
            int64[B], the number that each module has in the other one; -1 where it has none.
        """
        theirs = {module.name: number for number, module in enumerate(other.partition.modules)}
        numbers = np.array([theirs.get(module.name, -1) for module in self.partition.modules], dtype=np.int64)
        known = numbers >= 0
        for name in ("importance", "count", "last_round"):
            getattr(self.candidates, name)[known] = getattr(other.candidates, name)[numbers[known]]
        return numbers

    def slots_of(self, numbers: Sequence[int]) -> list[int]:
        """Return the slots of some modules."""
        return [slot for number in numbers for slot in self.slots.of[number]]

    def indices_of(self, numbers: Sequence[int]) -> set[int]:
        """Return the positions of the parameters that are trained when these modules are active."""
        found = {block.index for number in numbers for block in self.partition.modules[number].blocks}
        return found | {block.index for block in self.partition.dense}


class Slots:
    """The slots of a partition.

    Attributes:
        blocks: The block of each slot.
        dense: How many slots are dense; they are the first ones.
        of: Slots of each candidate.
        candidate: int64[slots], the candidate of each slot, -1 for dense ones.
        group: The param group of each slot.
        spans: The range of slots of each parameter.
        parts: What of each slot lies on this rank.
        scores: One vector a name of `SCORES`, over all slots.
    """

    def __init__(self, partition: Partition, groups: list[dict[str, Any]], ranks: Ranks | None) -> None:
        owned = [(block, number) for number, module in enumerate(partition.modules) for block in module.blocks]
        owned.sort(key=lambda pair: (pair[0].index, pair[0].number))
        self.blocks: list[Block] = [*partition.dense, *(block for block, _ in owned)]
        self.dense = len(partition.dense)
        self.candidate: npt.NDArray[np.int64] = np.array([-1] * self.dense + [n for _, n in owned], dtype=np.int64)
        self.of: list[list[int]] = [[] for _ in partition.modules]
        for slot, number in enumerate(self.candidate.tolist()):
            if number >= 0:
                self.of[number].append(slot)
        group_of = [number for number, group in enumerate(groups) for _ in group["params"]]
        self.group = [group_of[block.index] for block in self.blocks]
        self.spans: dict[Tensor, slice] = {}
        for slot, block in enumerate(self.blocks):
            start = self.spans[block.param].start if block.param in self.spans else slot
            self.spans[block.param] = slice(start, slot + 1)
        alone = [self.spans[block.param].stop - self.spans[block.param].start == 1 for block in self.blocks]
        self._suffixes = ["" if a else f".{block.number}" for a, block in zip(alone, self.blocks, strict=True)]
        # Whole tensors count once, on the first rank.
        counts = ranks is None or ranks.is_first
        self.parts = [
            part_of(block.param) if is_sharded(block.param) else Part(block.start, block.stop - block.start, counts)
            for block in self.blocks
        ]
        self.scores = {name: torch.zeros(len(self.blocks), dtype=dtype, device="cpu") for name, dtype in SCORES.items()}
        self.spread("module", np.arange(len(self.of)))

    def sizes(self, storage: Storage) -> dict[Tensor, dict[str, int]]:
        """Return, for every parameter, the keys that its state may have, and their numel."""
        return {
            param: {
                self.key(name, slot): buffer.numel(self.blocks[slot].stop - self.blocks[slot].start)
                for slot in range(span.start, span.stop)
                for name, buffer in storage.buffers(param.dtype).items()
            }
            | dict.fromkeys((*NUMBERS, *SCORES), span.stop - span.start)
            for param, span in self.spans.items()
        }

    def key(self, name: str, slot: int) -> str:
        """Return the state key of one slot's tensor: "exp_avg", or "exp_avg.3" for block 3 of several."""
        return name + self._suffixes[slot]

    def row(self, slot: int) -> Row:
        """Return what the kernels need to know of a slot."""
        block, part = self.blocks[slot], self.parts[slot]
        module = int(self.candidate[slot]) if slot >= self.dense else None
        fellows = [slot] if module is None else self.of[module]
        return Row(
            slot=slot,
            param=block.param,
            index=block.index,
            start=part.start,
            stop=part.start + part.numel,
            # A sharded tensor is one slot, so that its part is all that there is here.
            offset=0 if is_sharded(block.param) else block.start,
            is_counted=part.is_first,
            group=self.group[slot],
            fellows=fellows,
            module=module,
        )

    def first(self, values: Tensor) -> npt.NDArray[Any]:
        """Return one number a candidate, that of its first slot, from one a slot."""
        return np.asarray(values.numpy()[[slots[0] for slots in self.of]])

    def spread(self, name: str, values: npt.NDArray[Any]) -> None:
        """Write one number a candidate into all its slots of a score vector."""
        sampled = self.candidate[self.dense :]
        self.scores[name].numpy()[self.dense :] = values[sampled]

    def read(self, own: dict[Tensor, dict[str, Any]]) -> dict[str, Tensor]:
        """Return saved score vectors over all slots, on the host.

        Args:
            own: Saved state by parameter, with all scores of the sampled ones.
        """
        vectors = {name: torch.zeros_like(vector) for name, vector in self.scores.items()}
        for param, span in self.spans.items():
            if span.start >= self.dense:
                for name, vector in vectors.items():
                    vector[span] = own[param][name].cpu()
        return vectors

    def sum(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the sum over the slots of each candidate, from one number a slot."""
        total = np.zeros(len(self.of))
        np.add.at(total, self.candidate[self.dense :], values[self.dense :])
        return total

    def max(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the maximum over the slots of each candidate, from one number >= 0 a slot."""
        most = np.zeros(len(self.of), dtype=np.int64)
        np.maximum.at(most, self.candidate[self.dense :], values[self.dense :])
        return most


def form_of(params: Sequence[Tensor]) -> list[tuple[Any, Any]]:
    """Return shape and dtype of parameters."""
    return [(param.shape, param.dtype) for param in params]


def _signature(module: Module) -> tuple[Any, ...]:
    return (module.name, *((block.index, block.start, block.stop) for block in module.blocks))
