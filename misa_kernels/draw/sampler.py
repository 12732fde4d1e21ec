"""Which candidates train in the next round? From importance to probabilities to a set within the budget.

Numbers only. A draw is a pure function of (candidates, budget, round, seed): no generator state to save, and the same
set on every rank. Letters are the paper's, as in `scores`: probability p, concentration eta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from inspect import get_annotations
from typing import Any, Literal, Protocol

import numpy as np

from misa_kernels.draw.candidates import Candidates, Floats, Ints, scores
from misa_kernels.draw.limits import check, check_own
from misa_kernels.draw.packing import admissible, check_layers, pack, windows
from misa_kernels.draw.probability import at_perplexity, log_softmax, perplexity_of


@dataclass(frozen=True, eq=False)
class Draw:
    """An active set and the distribution that it was drawn from.

    Args:
        active: int64[k], candidate numbers, ascending.
        probability: float64[B], p; 0 outside the depth window.
        perplexity: exp(H(p)), the number of candidates that p in effect spreads over.
        eta: the eta that made p; 0 where p is uniform.
    """

    active: Ints
    probability: Floats
    perplexity: float
    eta: float


class Sampler(Protocol):
    """What draws the active sets; a draw of your own is a subclass that says how, with these options as it needs them.

    One object may serve several optimizers, and a draw must be the same on every rank and after a resume: let it depend
    on its arguments only, all randomness on `round` and `seed`.

    The optimizer reads these options of any sampler; they mean what they do in `ImportanceSampler`. Importance is
    measured whatever the draw makes of it. `depth_window` and `max_per_layer` say what the draw keeps to, for
    `rehearse()` and `coverage()`.

    Example, the candidates with the largest importance, after those without one::

        class Greedy(Sampler):
            def draw(self, candidates, budget, round, seed):
                score = np.where(candidates.count > 0, candidates.importance, np.inf)
                order = np.argsort(-score, kind="stable")
                active = order[np.cumsum(candidates.numel[order]) <= budget]
                chance = np.full(score.size, 1 / score.size)
                return Draw(np.sort(active), probability=chance, perplexity=float(score.size), eta=0.0)


        optimizer = MISA(param_groups(model), sampler=Greedy())
    """

    importance_beta: float = 0.8
    importance_norm: Literal["sum", "norm"] = "sum"
    depth_window: int | None = None
    max_per_layer: int | None = None
    granularity: Literal["module", "layer", "slice"] = "module"
    oversized: Literal["error", "split"] = "error"
    slices: Literal["auto", "down", "output", "all"] = "auto"
    hold_rounds: int | Literal["auto", "run"] = "auto"

    def draw(self, candidates: Candidates, budget: int, round: int, seed: int) -> Draw:
        """Return the active set of a round; `candidates` is not changed.

        Args:
            candidates: All candidates, none larger than the budget.
            budget: Upper bound on the parameters of the active set, which holds one candidate at least.
            round: Number of the round, from 0.
            seed: In [0, 2**64).
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ImportanceSampler(Sampler):
    """MISA's draw: without replacement, p_b = exp(eta s_b) / sum_j exp(eta s_j), until nothing more fits.

    This p maximises sum_b p_b s_b - KL(p || uniform) / eta, s being the `scores`. Some candidates may come
    first whatever their score (`least_recent`); the weighted draw fills what they leave of the budget. Those that have
    had no gradient for three rounds of activity are left out, but for one in eight rounds, see `Candidates.heard`.

    Args:
        eta: concentration of p on large scores, 0 being uniform. "auto" solves for it at each draw, such that
            exp(H(p)) = `perplexity` * K, K being the number of candidates that a round has room for on average.
        perplexity: what "auto" aims at, as a fraction of K; without effect if eta is a number.
        importance_beta: decay of G per round of activity, G <- beta G + (1 - beta) score.
        importance_norm: the score of a round, a mean over its updates: "sum" of ||g||^2, or "norm" of ||g||
            (the authors' code; s is then the square of the corrected G).
        exponent_clip: upper bound of eta s_b (5 in the authors' code); needs a number as eta.
        least_recent: how many of those that have waited longest enter before the weighted draw.
        least_recent_share: fraction of the budget that they may take; the first of them enters in any case.
        depth_window: number of neighbouring layers that a round draws from, so that backward stops at the
            lowest of them; every layer comes up once a cycle. None: all layers.
        max_per_layer: at most so many active candidates of one layer. With 1, layers that are compiled one by one
            need a handful of graphs in all, however many rounds there are. None: no limit.
        granularity: what the optimizer makes a candidate of: "module", "layer" or "slice", a range of columns or rows
            of a matrix, of which a round trains one of each matrix, all equally wide.
        oversized: what the optimizer does with a module above the budget, "error" or "split" into row blocks.
        slices: of which matrices slices are made: "down", the last ones of feed-forward networks; "output", the last
            ones of attentions, too; "all"; or "auto", the first of these of which the budget is at most half.
        hold_rounds: for how many rounds a set stays once it is drawn: a number, "run" for all of them, or "auto", 1,
            and with slices "run".

    Raises:
        ValueError: An option out of range, `exponent_clip` with eta="auto", or `max_per_layer` with
            granularity="layer".
    """

    eta: float | Literal["auto"] = "auto"
    perplexity: float = 0.5
    importance_beta: float = 0.8
    importance_norm: Literal["sum", "norm"] = "sum"
    exponent_clip: float | None = None
    least_recent: int = 2
    least_recent_share: float = 0.5
    depth_window: int | None = None
    max_per_layer: int | None = None
    granularity: Literal["module", "layer", "slice"] = "module"
    oversized: Literal["error", "split"] = "error"
    slices: Literal["auto", "down", "output", "all"] = "auto"
    hold_rounds: int | Literal["auto", "run"] = "auto"

    def __post_init__(self) -> None:
        check_own(self)
        if self.eta == "auto" and self.exponent_clip is not None:
            raise ValueError(
                f"exponent_clip={self.exponent_clip!r} must be None with eta='auto', which bounds p by "
                "itself: give eta a number, or leave exponent_clip out"
            )

    def draw(self, candidates: Candidates, budget: int, round: int, seed: int) -> Draw:
        """Draw the active set of a round; arguments as for `Sampler.draw`.

        Raises:
            ValueError: `depth_window` or `max_per_layer` is set and a candidate has no layer.
        """
        check_layers(candidates.layer, self.depth_window, self.max_per_layer)
        rng = _rng(seed, round)
        # Always both, and for all B: no option shifts the random numbers.
        gumbel, ties = rng.gumbel(size=candidates.numel.size), rng.random(candidates.numel.size)
        heard = candidates.heard(round)
        eligible = heard[_eligible(candidates.layer[heard], self.depth_window, round, seed)]
        log_p, eta = self._log_probability(candidates, eligible, budget)
        # Before the weighted draw enters what is held, and what has waited longest.
        waiting = eligible[np.lexsort((-ties[eligible], candidates.last_round[eligible]))][: self.least_recent]
        share = max(math.floor(self.least_recent_share * budget), int(candidates.numel[waiting[:1]].sum()))
        longest = pack(waiting, candidates, share, self.max_per_layer)
        first = np.append(held(self, candidates, round), longest)
        # In descending order of keys: draws from p, one by one, each restricted to what is left and fits.
        order = eligible[np.argsort(-(log_p + gumbel[eligible]), kind="stable")]
        active = np.sort(pack(np.append(first, order), candidates, budget, self.max_per_layer))
        probability = np.zeros(candidates.numel.size)
        probability[eligible] = np.exp(log_p)
        return Draw(active, probability, perplexity_of(log_p), eta)

    def _log_probability(self, candidates: Candidates, eligible: Ints, budget: int) -> tuple[Floats, float]:
        """Return log p of the eligible candidates, and eta; the unscored count as the mean of the scored."""
        score = scores(candidates, self.importance_beta, self.importance_norm)
        unscored = np.isnan(score)
        score[unscored] = 0.0 if unscored.all() else score[~unscored].mean()
        score = score[eligible]
        if self.eta == "auto":
            fitting = budget / float(candidates.numel[eligible].mean())
            most = admissible(candidates.layer[eligible], self.max_per_layer)
            return at_perplexity(self.perplexity * min(max(fitting, 1.0), most), score)
        clip = math.inf if self.exponent_clip is None else self.exponent_clip
        return log_softmax(np.minimum(self.eta * score, clip)), float(self.eta)


@dataclass(frozen=True, kw_only=True)
class UniformSampler(Sampler):
    """A draw with uniform p: LISA's, with granularity="layer". Options as for `ImportanceSampler`."""

    depth_window: int | None = None
    max_per_layer: int | None = None
    granularity: Literal["module", "layer", "slice"] = "module"
    oversized: Literal["error", "split"] = "error"
    slices: Literal["auto", "down", "output", "all"] = "auto"
    hold_rounds: int | Literal["auto", "run"] = "auto"

    def __post_init__(self) -> None:
        check_own(self)

    def draw(self, candidates: Candidates, budget: int, round: int, seed: int) -> Draw:
        """Draw the active set of a round; arguments and errors as for `ImportanceSampler.draw`."""
        options: dict[str, Any] = {option.name: getattr(self, option.name) for option in fields(UniformSampler)}
        uniform = ImportanceSampler(eta=0.0, least_recent=0, **options)
        return uniform.draw(candidates, budget, round, seed)


@dataclass(frozen=True, kw_only=True)
class CyclicSampler(Sampler):
    """Candidates in turn: BAdam's draw, with granularity="layer". Options as for `ImportanceSampler`."""

    granularity: Literal["module", "layer", "slice"] = "module"
    oversized: Literal["error", "split"] = "error"
    slices: Literal["auto", "down", "output", "all"] = "auto"
    hold_rounds: int | Literal["auto", "run"] = "auto"

    def __post_init__(self) -> None:
        check_own(self)

    def draw(self, candidates: Candidates, budget: int, round: int, seed: int) -> Draw:
        """Go on where the last round ended, up to the first candidate that does not fit; the last is followed by 0.

        Arguments as for `ImportanceSampler.draw`; `seed` has no effect, `round` where candidates are silent.
        """
        heard = candidates.heard(round)
        last_round = candidates.last_round[heard]
        kept = held(self, candidates, round)
        if self.granularity == "slice" or kept.size:
            # Of each matrix the slice behind the last one, which has waited longest.
            order = np.append(kept, heard[np.argsort(last_round, kind="stable")])
            active = pack(order, candidates, budget, None)
        else:
            latest = last_round == last_round.max()
            ends = np.flatnonzero(latest & ~np.roll(latest, -1))
            order = np.roll(heard, -(ends[0] + 1) if ends.size else 0)
            active = order[np.cumsum(candidates.numel[order]) <= budget]
        probability = np.zeros(candidates.numel.size)
        probability[heard] = 1 / heard.size
        return Draw(np.sort(active), probability, perplexity=float(heard.size), eta=0.0)


def described(sampler: Sampler) -> str:
    """Return what tells one sampler from another, the same in every process."""
    name = repr(sampler) if is_dataclass(sampler) else type(sampler).__qualname__
    # Options of 0.3 that are as all were before it: a state of 0.2 is one of the same sampler.
    return name.replace(", slices='auto', hold_rounds='auto'", "")


def rounds_held(sampler: Sampler) -> int | None:
    """Return for how many rounds a set stays; None for all of them."""
    hold = sampler.hold_rounds
    if hold == "auto":
        return None if sampler.granularity == "slice" else 1
    return None if hold == "run" else int(hold)


def held(sampler: Sampler, candidates: Candidates, round: int) -> Ints:
    """Return what was active in the round before, hears gradients and stays in this one: candidates, ascending."""
    rounds = rounds_held(sampler)
    if rounds == 1:
        return np.zeros(0, dtype=np.int64)
    is_due = round == 0 if rounds is None else round % rounds == 0
    heard = candidates.heard(round)
    return heard[candidates.last_round[heard] >= (round if is_due else max(round - 1, 0))]


def check_sampler(sampler: Any) -> None:
    """Refuse what does not draw, or lacks an option.

    Raises:
        TypeError: For an object that is no sampler.
        ValueError: For an option out of range.
    """
    options = get_annotations(Sampler)
    missing = [name for name in (*options, "draw") if not hasattr(sampler, name)]
    if missing or isinstance(sampler, type):
        lacks = f"has no {missing[0]!r}" if missing else "is a class"
        raise TypeError(
            f"sampler={sampler!r} {lacks} and must be None or a sampler object: ImportanceSampler(), or one of a "
            "subclass of misa_kernels.Sampler"
        )
    check(sampler, options)


def checked(draw: Draw, candidates: Candidates, budget: int, sampler: Sampler) -> Draw:
    """Return a draw that a sampler made.

    Raises:
        ValueError: If it is not an active set of these candidates within the budget.
    """
    active, size = draw.active, candidates.numel.size
    valid = len(active) and 0 <= active[0] and active[-1] < size and bool((np.diff(active) > 0).all())
    if not valid or draw.probability.shape != (size,):
        raise ValueError(
            f"{type(sampler).__name__}.draw returned active={active!r} and must return ascending numbers of the "
            f"{size} candidates, one at least, and a probability for each of these"
        )
    if candidates.rival.size and np.unique(candidates.rival[active]).size < len(active):
        raise ValueError(
            f"{type(sampler).__name__}.draw returned active={active!r} and must return at most one of those that have "
            "the same number in candidates.rival: two slices of one matrix"
        )
    if (numel := int(candidates.numel[active].sum())) > budget:
        raise ValueError(
            f"{type(sampler).__name__}.draw returned {numel:,} parameters and must not exceed the budget of {budget:,}"
        )
    return draw


def _rng(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)))


def _eligible(layer: Ints, depth_window: int | None, round: int, seed: int) -> Ints:
    """Return the candidates in the round's window; each cycle visits the windows in a new random order."""
    all_windows = windows(layer, depth_window)
    cycle, turn = divmod(round, len(all_windows))
    # Rounds use the streams below 2**63.
    window = all_windows[_rng(seed, 2**63 + cycle).permutation(len(all_windows))[turn]]
    return np.flatnonzero(np.isin(layer, window))
