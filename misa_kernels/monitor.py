"""What was sampled: one record a round, from numbers that exist already on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from misa_kernels.partition import Partition

# Two float64 arrays of 224 modules are 3.6 kB a round: a long run stays under 4 MB.
HISTORY = 1000


@dataclass
class Round:
    """One round: what was drawn, why, and what it costs.

    Attributes:
        round: Number of the round, from 0.
        first_step: Number of `step()` calls before it.
        active: Numbers of the modules (or layers) trained in it, ascending.
        importance: float64[B], corrected score at the draw; NaN where there is none yet.
        probability: float64[B], p at the draw; 0 outside the depth window.
        perplexity: exp(H(p)), the effective number of modules the draw chooses from.
        perplexity_fraction: exp(H(p)) / B.
        active_fraction: Active sampled parameters / N; at most δ.
        dense_fraction: Always-on parameters / N.
        gradient_fraction: Parameters that receive a gradient / N, the whole of a split tensor counted.
        backward_depth: Layers that backward runs through, or None where layers are unknown.
        skipped_steps: Steps of this round left out for nonfinite gradients; known when it has ended.
        unscored: Modules whose score was not finite and was not used; known when it has ended.
    """

    round: int
    first_step: int
    active: tuple[int, ...]
    importance: npt.NDArray[np.float64]
    probability: npt.NDArray[np.float64]
    perplexity: float
    perplexity_fraction: float
    active_fraction: float
    dense_fraction: float
    gradient_fraction: float
    backward_depth: int | None
    skipped_steps: int = 0
    unscored: int = 0


class Monitor:
    """The record of a run.

    Args:
        partition: What may be trained.

    Attributes:
        names: Names of the B modules (or layers), by number.
        layers: Names of the layers, from the input to the output.
        rounds: The last 1000 rounds, oldest first; the last one is running.
    """

    def __init__(self, partition: Partition) -> None:
        self._partition = partition
        self.names = [module.name for module in partition.modules]
        self.layers = partition.layers
        self.rounds: deque[Round] = deque(maxlen=HISTORY)

    @property
    def current(self) -> Round:
        """The running round."""
        return self.rounds[-1]

    def begin_round(
        self,
        number: int,
        first_step: int,
        active: Sequence[int],
        importance: npt.NDArray[np.float64],
        probability: npt.NDArray[np.float64],
        perplexity: float,
    ) -> None:
        """Append the record of a round; the arguments are fields of `Round`."""
        # A state dict that is loaded takes the run back, or repeats the round: one record each.
        while self.rounds and self.rounds[-1].round >= number:
            self.rounds.pop()
        chosen = [self._partition.modules[i] for i in active]
        dense = self._partition.dense
        trained = {block.param for module in chosen for block in module.blocks} | {block.param for block in dense}
        lowest = [module.layer for module in chosen]
        if self._partition.dense_layer is not None:
            lowest.append(self._partition.dense_layer)
        total = self._partition.total_numel
        self.rounds.append(
            Round(
                round=number,
                first_step=first_step,
                active=tuple(active),
                importance=importance,
                probability=probability,
                perplexity=perplexity,
                perplexity_fraction=perplexity / len(self.names),
                active_fraction=sum(module.numel for module in chosen) / total,
                dense_fraction=sum(block.stop - block.start for block in dense) / total,
                gradient_fraction=sum(param.numel() for param in trained) / total,
                backward_depth=None if -1 in lowest else len(self.layers) - min(lowest),
            )
        )
