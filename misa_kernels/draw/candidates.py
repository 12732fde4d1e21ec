"""What does a draw see of each candidate, and how is a round folded into it?

A candidate is whatever is drawn as one: a module, or all modules of a layer. Formulas are the paper's
(arXiv 2511.00056), in its letters: B candidates b, importance G with decay beta.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# A candidate that was active in so many rounds in a row without a gradient is silent,
SILENT = 3
# and no silent one is drawn before so many rounds have passed since the last one that was.
HEARING = 8


@dataclass(eq=False)
class Candidates:
    """What a draw knows of the B candidates, one array entry each.

    Args:
        numel: int64[B], parameters of the candidate, at least 1.
        layer: int64[B], the layer it lies in: 0 is nearest the input, -1 unknown.
        importance: float64[B], the running mean G as stored, not corrected; 0 at the start.
        count: int64[B], number of rounds folded into G.
        last_round: int64[B], the last round in which it was active; -1 if never.
        unheard: int64[B], rounds in which it was active since its last gradient, or all; 0 where it is not given.
        rival: int64[B], those with equal numbers are never active together: slices of one matrix, of which a round
            trains one; empty where each is its own.
    """

    numel: Ints
    layer: Ints
    importance: Floats
    count: Ints
    last_round: Ints
    unheard: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    rival: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        if not self.unheard.size:
            self.unheard = np.zeros(self.numel.size, dtype=np.int64)

    @classmethod
    def fresh(cls, numel: Ints, layer: Ints, rival: Ints | None = None) -> Candidates:
        """Return candidates of which nothing is known yet."""
        size = numel.size
        found = cls(numel, layer, np.zeros(size), np.zeros(size, dtype=np.int64), np.full(size, -1))
        return found if rival is None else replace(found, rival=rival)

    def heard(self, round: int) -> Ints:
        """Return which candidates a draw should choose from, int64[E], ascending: those that training reaches.

        Of the silent ones, such as an image tower's on text, one is let in at a time, the longest waiting; once it
        was active, the next `HEARING` rounds later, or at once if it had a gradient, for then others may have one,
        too. All candidates where none is silent, or all are.
        """
        is_in = self.unheard < SILENT
        silent: Ints = np.flatnonzero(~is_in)
        if silent.size == is_in.size:
            return silent
        waiting = self.last_round[silent]
        if silent.size and round - waiting.max() >= HEARING:
            is_in[silent[waiting.argmin()]] = True
        return np.flatnonzero(is_in)


def fold(candidates: Candidates, which: Ints, mean_score: Floats, applied: Bools, beta: float) -> int:
    """Fold the scores of a round into G, in place: G <- beta G + (1 - beta) score, count <- count + 1.

    Args:
        candidates: `importance` and `count` are updated.
        which: int64[k], the candidates that were active, without repetition.
        mean_score: float64[k], mean over the round's updates of what `importance_norm` says.
        applied: bool[k], whether there was any update; a candidate without one keeps G and count.
        beta: `importance_beta` of the sampler.

    Returns:
        How many scores were left out because they are not finite.
    """
    finite = np.isfinite(mean_score)
    folded = applied & finite
    b = which[folded]
    candidates.importance[b] = beta * candidates.importance[b] + (1 - beta) * mean_score[folded]
    candidates.count[b] += 1
    return int(np.count_nonzero(applied & ~finite))


def hear(candidates: Candidates, which: Ints, came: Bools) -> Ints:
    """Count, in place, the rounds in which candidates were active without a gradient.

    Args:
        candidates: `unheard` is updated.
        which: int64[k], those that were active, without repetition.
        came: bool[k], whether there was a gradient with an element that is not zero.

    Returns:
        Those that have become silent.
    """
    candidates.unheard[which] = np.where(came, 0, candidates.unheard[which] + 1)
    silent: Ints = which[candidates.unheard[which] == SILENT]
    return silent


def scores(candidates: Candidates, beta: float, norm: str) -> Floats:
    """Return s, float64[B]: G / (1 - beta^count), its square if `norm` is "norm"; nan where count is 0."""
    s = np.full(candidates.numel.size, np.nan)
    np.divide(candidates.importance, 1 - beta**candidates.count, out=s, where=candidates.count > 0)
    return s * s if norm == "norm" else s
