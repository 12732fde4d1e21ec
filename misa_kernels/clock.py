"""Where is a run? What its draws, its noise and the ends of its rounds follow, counted on the host alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Clock:
    """The position of a run, the same on every rank; a saved state holds its fields, under their names.

    Attributes:
        seed: Of the draws and of stochastic rounding, whose noise `steps` keys as well.
        round: Number of the round, from 0.
        round_step: Steps taken in it.
        steps: Steps taken in all, applied or not.
        skipped_steps: Those left out for nonfinite gradients, in the rounds that have ended.
    """

    seed: int
    round: int = 0
    round_step: int = 0
    steps: int = 0
    skipped_steps: int = 0
