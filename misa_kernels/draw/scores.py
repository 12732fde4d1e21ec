"""What is known of the candidates: how large is each, where does it lie, and how important has it been?

A candidate is whatever is drawn as one: a module, or all modules of a layer. Formulas are the paper's
(arXiv 2511.00056), in its letters: B candidates b, importance G with decay beta.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(eq=False)
class Candidates:
    """What a draw knows of the B candidates, one array entry each.

    Args:
        numel: int64[B], parameters of the candidate, at least 1.
        layer: int64[B], the layer it lies in: 0 is nearest the input, -1 unknown.
        importance: float64[B], the running mean G as stored, not corrected; 0 at the start.
        count: int64[B], number of rounds folded into G.
        last_round: int64[B], the last round in which it was active; -1 if never.
    """

    numel: Ints
    layer: Ints
    importance: Floats
    count: Ints
    last_round: Ints

    @classmethod
    def fresh(cls, numel: Ints, layer: Ints) -> Candidates:
        """Return candidates of which nothing is known yet."""
        size = numel.size
        return cls(numel, layer, np.zeros(size), np.zeros(size, dtype=np.int64), np.full(size, -1))


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


def scores(candidates: Candidates, beta: float, norm: str) -> Floats:
    """Return s, float64[B]: G / (1 - beta^count), its square if `norm` is "norm"; nan where count is 0."""
    s = np.full(candidates.numel.size, np.nan)
    np.divide(candidates.importance, 1 - beta**candidates.count, out=s, where=candidates.count > 0)
    return s * s if norm == "norm" else s
