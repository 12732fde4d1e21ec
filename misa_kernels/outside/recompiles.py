"""Does torch.compile compile anew with every active set, and will it soon give up?"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from misa_kernels.outside.notices import warn

# Training sees a layer with an input that requires gradients and with one that does not; evaluation is a third case.
CASES = 3


class Recompiles:
    """Counts, at switches, the recompilations that changes of `requires_grad` caused, and warns once of too many.

    A compiled layer needs a graph for each set of its modules that may be active, in each of three cases; layers
    of one class share them. What recompiles beyond that, or has no room for it below `recompile_limit`, ends up
    in eager mode, of which torch only writes a line to its log.

    Args:
        layer: int64[B], the layer that each candidate lies in, -1 unknown.
        max_per_layer: The sampler's.
    """

    def __init__(self, layer: npt.NDArray[np.int64], max_per_layer: int | None) -> None:
        known = bool(layer.size) and layer.min() >= 0
        self._modules = int(np.bincount(layer).max()) if known else 0
        self._quota = min(max_per_layer or self._modules, self._modules)
        sets = sum(math.comb(self._modules, k) for k in range(self._quota + 1))
        self._graphs = CASES * sets if known else math.inf
        self._since_us = time.time_ns() // 1000
        self._warned = False

    def check(self, rounds: int) -> None:
        """Look at what was compiled since the last call; `rounds` have ended so far. Costs nothing without dynamo."""
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None or self._warned:
            return
        metrics = dynamo.utils.get_compilation_metrics()
        new = [m for m in metrics if (m.start_time_us or 0) > self._since_us]
        self._since_us = time.time_ns() // 1000
        recompiled: dict[str, list[int]] = {}
        for m in new:
            if "requires_grad" in (m.recompile_reason or ""):
                frame, number = m.compile_id.rsplit("/", 1)
                recompiled.setdefault(frame, []).append(int(number) + 1)
        limit = dynamo.config.recompile_limit
        for frame, counts in recompiled.items():
            # With room for every graph of a layer, only a frame that needs more is in danger.
            too_many = counts[-1] > self._graphs if self._graphs < limit else counts[-1] + len(counts) >= limit
            if too_many:
                self._warned = True
                warn(self._advice(_name(frame, metrics), counts[-1], rounds, limit))
                return

    def _advice(self, name: str, count: int, rounds: int, limit: int) -> str:
        modules = self._modules or 7
        # A multiple of 8 with room to spare.
        enough = 8 * (CASES * (modules + 1) // 8 + 1)
        quota = " with sampler=ImportanceSampler(max_per_layer=1)" if self._quota != 1 else ""
        return (
            f"torch.compile has compiled {name} {count} times in {rounds} rounds, because requires_grad changes with "
            f"the active set, and runs it eagerly beyond recompile_limit={limit}: compile the model layer by layer"
            f"{quota} and torch._dynamo.config.recompile_limit = {enough}, or take rounds so long that a compilation "
            "in each pays (inner_steps) and a limit above their number, or leave torch.compile out"
        )


def _name(frame: str, metrics: list[Any]) -> str:
    # The last: numbers of frames are given anew after a reset of dynamo.
    for m in reversed(metrics):
        if m.co_name and m.compile_id.rsplit("/", 1)[0] == frame:
            return f"{m.co_name} ({m.co_filename}:{m.co_firstlineno})"
    return "a frame"
