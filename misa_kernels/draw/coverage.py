"""How often does a run of so many steps visit each module, and what would make it often enough?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from misa_kernels.draw.candidates import Candidates
from misa_kernels.draw.packing import admissible, windows
from misa_kernels.draw.partition import Partition
from misa_kernels.draw.sampler import Sampler, rounds_held
from misa_kernels.draw.slices import Slicing

# Measured in the specification's runs: what matters is that modules are visited; below three visits most of a model
# has hardly been trained.
ENOUGH_VISITS = 3
# The shortest and the longest round that "auto" takes.
SHORTEST_ROUND, LONGEST_ROUND = 5, 50


@dataclass(frozen=True)
class Coverage:
    """What a run of a given length reaches.

    Attributes:
        total_steps: Optimizer steps of the run.
        inner_steps: Steps T in a round.
        modules: Number B of the modules (or layers) that are sampled.
        modules_a_round: How many of them a round trains on average.
        most_a_round: How many it could train, however large the budget: the sampler may allow few a layer.
        delta: Budget δ, as a fraction of the parameters.
        held_rounds: For how many rounds a set stays, None for all of them.
        slicing: Where the modules are slices, of what and how wide.
    """

    total_steps: int
    inner_steps: int
    modules: int
    modules_a_round: float
    most_a_round: float
    delta: float
    held_rounds: int | None = 1
    slicing: Slicing | None = None

    @property
    def rounds(self) -> int:
        """Rounds that begin in the run."""
        return math.ceil(self.total_steps / self.inner_steps)

    @property
    def sets(self) -> int:
        """Sets that are drawn in the run."""
        return 1 if self.held_rounds is None else math.ceil(self.rounds / self.held_rounds)

    @property
    def visits(self) -> float:
        """Rounds in which a module is trained, on average over the modules."""
        return self.rounds * self.modules_a_round / self.modules

    @property
    def advice(self) -> str | None:
        """A sentence with what would make it three visits, or None where they are three or more, or of slices."""
        # A thin part of every layer is enough, and so is a set that shall stay.
        if self.visits >= ENOUGH_VISITS or self.slicing is not None or self.held_rounds is None:
            return None
        # Just three visits are enough, whatever a division makes of them.
        rounds = math.ceil(ENOUGH_VISITS * self.modules / self.modules_a_round - 1e-9)
        remedies = []
        # Whole rounds short enough for that many to begin.
        shorter = math.ceil(self.total_steps / (rounds - 1)) - 1 if rounds > 1 else self.total_steps
        if shorter >= SHORTEST_ROUND:
            remedies.append(f"set inner_steps={shorter}")
        # A round trains modules in proportion to its budget, up to what the sampler allows.
        growth = ENOUGH_VISITS / self.visits
        larger = math.ceil(self.delta * growth * 1000) / 1000
        if larger <= 1 and growth * self.modules_a_round <= self.most_a_round:
            remedies.append(f"raise delta to {larger:g}")
        remedies.append(f"train for {rounds * self.inner_steps:,} steps")
        return (
            f"a run of {self.total_steps:,} steps in rounds of {self.inner_steps} visits each of the {self.modules} "
            f"modules {self.visits:.1f} times on average, and should {ENOUGH_VISITS} times or more, or they are hardly "
            f"trained: {', or '.join(remedies)}"
        )


def coverage(
    partition: Partition, candidates: Candidates, sampler: Sampler, total_steps: int, inner_steps: int
) -> Coverage:
    """Return how often a run of so many steps visits each module.

    Args:
        partition: What is sampled.
        candidates: The same, as a draw sees it.
        sampler: What draws.
        total_steps: Optimizer steps of the run.
        inner_steps: Steps in a round.
    """
    return Coverage(
        total_steps=total_steps,
        inner_steps=inner_steps,
        modules=len(partition.modules),
        modules_a_round=modules_a_round(candidates, partition.budget, sampler),
        most_a_round=most_modules_a_round(candidates, sampler),
        delta=partition.budget / partition.total_numel,
        held_rounds=rounds_held(sampler),
        slicing=partition.slicing,
    )


def round_length(total_steps: int, modules: int, modules_a_round: float) -> int:
    """Return the steps of a round with which a run visits each module three times on average, from 5 to 50."""
    # rounds * modules_a_round / modules = 3.
    length = total_steps * modules_a_round / (ENOUGH_VISITS * modules)
    return int(min(max(length, SHORTEST_ROUND), LONGEST_ROUND))


def modules_a_round(candidates: Candidates, budget: int, sampler: Sampler) -> float:
    """Return how many modules a round trains on average."""
    numel = candidates.numel
    fitting = budget / float(numel.mean())
    # Where all are of one size, as layers mostly are, a part of one does not fit.
    fitting = fitting if numel.min() < numel.max() else math.floor(fitting)
    return min(max(fitting, 1.0), most_modules_a_round(candidates, sampler))


def most_modules_a_round(candidates: Candidates, sampler: Sampler) -> float:
    """Return how many modules a round could train on average, however large the budget."""
    layer = candidates.layer
    if candidates.rival.size:
        return float(np.unique(candidates.rival).size)
    return admissible(layer, sampler.max_per_layer) / len(windows(layer, sampler.depth_window))
