"""How likely is each candidate, given its score? A softmax, whose eta may be solved for."""

from __future__ import annotations

import math

import numpy as np

from misa_kernels.draw.candidates import Floats

# Scores this near to the largest, relatively, tie with it: rounding in G and its correction ranks nothing.
TIE = 1e-12


def log_softmax(w: Floats) -> Floats:
    """Return w - log sum exp w, finite even where exp w underflows."""
    shifted: Floats = w - w.max()
    return shifted - math.log(float(np.exp(shifted).sum()))


def perplexity_of(log_p: Floats) -> float:
    """Return exp(H(p)), H(p) = -sum p log p."""
    # Not a dot product: BLAS would wake its threads for each of the 25 calls of a solve.
    return math.exp(-float((np.exp(log_p) * log_p).sum()))


def at_perplexity(perplexity: float, score: Floats) -> tuple[Floats, float]:
    """Return log p = eta s - log sum exp(eta s), and the eta with exp(H(p)) = clip(perplexity, k, E).

    E is the number of scores and k how many tie at the maximum: exp(H(p)) falls from E to k as eta grows.
    With gaps a = (max s - s) / (max s - min s) and t = eta (max s - min s), the solution lies between
    t = log(E / perplexity), for KL(p || uniform) <= t, and t = 1000 / min(a > 0), where all but the k have
    probability 0 in float64; that is the t of perplexity k. Bisection on log t, since |dH / d log t| =
    Var(log p) is below 1 + (log E)^2 / 4 whatever the scores.
    """
    gap = score.max() - score
    gap[gap <= TIE * score.max()] = 0.0
    tied = int(np.count_nonzero(gap == 0.0))
    if max(perplexity, tied) >= score.size:
        return np.full(score.size, -math.log(score.size)), 0.0
    spread = float(gap.max())
    gap /= spread
    high = 1000 / float(gap[gap > 0].min())
    low = math.log1p((score.size - perplexity) / perplexity) if perplexity > tied else high
    while high > 1.000001 * low:
        middle = math.sqrt(low * high)
        if perplexity_of(log_softmax(-middle * gap)) > perplexity:
            low = middle
        else:
            high = middle
    return log_softmax(-high * gap), high / spread
