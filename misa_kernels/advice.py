"""What is said once, at construction, of arguments that are allowed and that the user may not have meant?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from misa_kernels.draw.partition import Partition
from misa_kernels.draw.slices import Slicing
from misa_kernels.memory.storage import Storage
from misa_kernels.outside.notices import warn

# Of what is sampled, the share that slices may leave alone without a word.
MUCH = 0.2


def notify(
    groups: list[dict[str, Any]], partition: Partition, storage: Storage, delta: float, are_all_active: bool
) -> None:
    """Say once what the user may not have meant: default roles, split tensors, a draw of all, AdamW's memory.

    Args:
        groups: The param groups.
        partition: What they are.
        storage: How state is stored.
        delta: As given.
        are_all_active: Whether the first draw took every module.
    """
    if delta < 1 and any("role" not in group for group in groups):
        sampled = sum(module.numel for module in partition.modules)
        warn(
            f"MISA samples {len(partition.modules)} modules of {sampled:,} parameters, keeps {len(partition.dense)} "
            f"tensors always on and {len(partition.frozen)} frozen, by their shapes alone: param_groups(model) also "
            "freezes embeddings and head and knows the layers"
        )
    if partition.split:
        warn(
            f"oversized='split' cuts {', '.join(partition.split)} into row blocks: a block is trained at a time, but "
            "backward computes the gradient of the whole tensor"
        )
    if partition.slicing is not None:
        _notify_of_slices(partition.slicing)
    elif delta < 1 and are_all_active:
        _notify_of_no_draw(partition, delta)
    if delta < 1:
        _notify_of_dense(partition, storage)


def notify_of_order(depth_window: float | int, first: Sequence[str]) -> None:
    """Say by which order a window counts layers of several stacks as long as it is not known how they run.

    Args:
        depth_window: As given.
        first: The first layer of each stack.
    """
    warn(
        f"depth_window={depth_window} counts the layers of several stacks as they are registered, {first[0]} first, "
        "until the first step shows how they run: make the groups with param_groups(model, example=...), or name them "
        "in order in param_groups(model, layers=[...])"
    )


def _notify_of_slices(slicing: Slicing) -> None:
    """Say where it is not seen what leads back to the residual stream, and where much cannot be sliced."""
    if not slicing.is_known:
        warn(
            "granularity='slice' does not see which matrices lead back to the residual stream, so it takes rows of "
            "all: say in 'slices' of the groups that param_groups makes which are 'down', and their axis"
        )
    if slicing.uncut > MUCH * (slicing.unsliced + slicing.numel):
        warn(
            f"granularity='slice' leaves {slicing.uncut:,} sampled parameters alone that are no weights of linear "
            "layers, such as stacked experts, convolutions and adapters: draw modules with granularity='module' to "
            "train them"
        )


def _notify_of_no_draw(partition: Partition, delta: float) -> None:
    """Say that everything sampled is trained all the time, and with which delta it would not be."""
    numels = [module.numel for module in partition.modules]
    sampled, total = sum(numels), partition.total_numel
    if sampled > partition.budget:
        return
    those = f"all {len(numels)} modules are" if len(numels) > 1 else "the only module is"
    remedy = "torch.optim.AdamW does the same"
    # As much of what is sampled as delta is of everything, and room for any module.
    if (enough := _delta_between(max(delta * sampled, max(numels)), sampled, total)) is not None:
        remedy = f"modules would be drawn with delta={enough:g}, {enough * total / sampled:.0%} of what is sampled"
    warn(
        f"delta={delta} of {total:,} parameters has room for all {sampled:,} that are sampled, so nothing is drawn and "
        f"{those} trained all the time: {remedy}"
    )


def _delta_between(least: float, below: int, total: int) -> float | None:
    """Return a delta of few digits with a budget from `least` to below `below` of so many parameters; None: none."""
    for digits in range(2, 17):
        step = 10.0 ** (math.floor(math.log10(least / total)) + 1 - digits)
        found = float(f"{math.ceil(least / total / step) * step:.{digits}g}")
        if least <= math.floor(found * total) < below:
            return found
    return None


def _notify_of_dense(partition: Partition, storage: Storage) -> None:
    """Say that what is always on takes more than half of the memory that AdamW's moments would."""
    total = partition.total_numel
    numel = sum(block.numel for block in partition.dense)
    if 2 * numel <= total:
        return
    largest = max(partition.dense, key=lambda block: block.numel)
    # Of float32, or of what weights of float64 have.
    adamw_bytes = 2 * max(4, largest.param.dtype.itemsize)
    share = numel / total * storage.moment_bytes(largest.param.dtype) / adamw_bytes
    if share > 0.5:
        warn(
            f"{len(partition.dense)} dense tensors hold {numel:,} of {total:,} parameters, the largest of them "
            f"{partition.names[largest.index]}, {largest.numel:,}: trained at every step, they take "
            f"{share:.0%} of the memory of AdamW's moments, whatever delta is; freeze what need not be trained, by "
            "param_groups(model, mode='finetune'), the role 'frozen', or requires_grad_(False) before"
        )
