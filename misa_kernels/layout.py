"""What can be drawn, under which numbers: made of the param groups and the user's flags, anew when these change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from misa_kernels import arguments
from misa_kernels.distributed import group_of
from misa_kernels.partition import Module, Partition, partition
from misa_kernels.sampler import Candidates, Ints, Sampler
from misa_kernels.shards import Ranks, ranks_of
from misa_kernels.slots import Slots
from misa_kernels.storage import Storage


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
        arguments.check_sharded(params, found, storage, options.release_gradients, options.v_floor)
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


def form_of(params: Sequence[Tensor]) -> list[tuple[Any, Any]]:
    """Return shape and dtype of parameters."""
    return [(param.shape, param.dtype) for param in params]


def _signature(module: Module) -> tuple[Any, ...]:
    return (module.name, *((block.index, block.start, block.stop) for block in module.blocks))
