"""What do whole rounds of MISA compute? A float64 NumPy answer, written from the specification alone.

Nothing of ``misa_kernels`` is imported here, and nothing of it was consulted: where the optimizer and this
file differ, one of the two misreads the specification. Every function stands beside the sentence that it
carries out. Speed is no concern; tensors are visited one by one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Floats = NDArray[np.float64]

DENSE = -1
FROZEN = -2

# The table of presets in the specification, row by row; the defaults are those of Options.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"eta": 1.0, "least_recent": 0, "keep_states": "none", "momentum_flush": True},
    "authors": {
        "eta": 1.0,
        "importance_norm": "norm",
        "exponent_clip": 5.0,
        "least_recent": 2,
        "least_recent_share": 1.0,
    },
    "badam": {"draw": "cyclic", "keep_states": "none"},
    "lisa": {"draw": "uniform", "keep_states": "none"},
}


@dataclass(frozen=True)
class Options:
    """Settings of a run, named as in the specification; the values given here are the documented defaults."""

    delta: float = 0.03
    inner_steps: int = 50
    seed: int = 0
    draw: str = "importance"
    eta: float | str = "auto"
    perplexity: float = 0.5
    importance_beta: float = 0.8
    importance_norm: str = "sum"
    exponent_clip: float | None = None
    least_recent: int = 2
    least_recent_share: float = 0.5
    depth_window: int | None = None
    keep_states: str = "staying"
    momentum_flush: bool = False
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False


@dataclass
class Group:
    """Hyperparameters of a parameter group, changed at will between steps."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2


@dataclass
class Round:
    """What is known of a round: its draw, and, when it has ended, the steps that it skipped."""

    number: int
    first_step: int
    active: tuple[int, ...]
    importance: Floats
    probability: Floats
    perplexity: float
    eta: float
    active_fraction: float
    backward_depth: int
    skipped_steps: int = 0


@dataclass
class State:
    """Adam's state of one tensor: m, v, t."""

    m: Floats
    v: Floats
    age: int = 0


def log_softmax(w: Floats) -> Floats:
    """Log of exp(w) / sum exp(w), finite where p itself underflows."""
    shifted = w - w.max()
    return shifted - math.log(np.exp(shifted).sum())


def perplexity_of(log_p: Floats) -> float:
    """exp(H(p)) with H(p) = -sum p log p, where 0 log 0 = 0."""
    log_p = log_p[np.isfinite(log_p)]
    return math.exp(-float(np.sum(np.exp(log_p) * log_p)))


def solve_eta(scores: Floats, target: float) -> float:
    """The eta at which exp(H(softmax(eta s))) is `target`; "all scores equal: uniform, no solve"."""
    distinct = np.unique(scores)
    if len(distinct) == 1 or target >= len(scores):
        return 0.0
    lowest = math.log(1e-9 / (distinct[-1] - distinct[0]))
    highest = math.log(1e3 / (distinct[-1] - distinct[-2]))

    def excess(log_eta: float) -> float:
        return perplexity_of(log_softmax(math.exp(log_eta) * scores)) - target

    if excess(highest) >= 0:
        return math.exp(highest)
    return math.exp(brentq(excess, lowest, highest, xtol=1e-13))


def random_numbers(seed: int, number: int, candidates: int) -> tuple[Floats, Floats]:
    """Gumbel noise and tie breakers of a round: (seed, round) is the whole state of the generator."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, number], dtype=np.uint64)))
    return rng.gumbel(size=candidates), rng.random(candidates)


def window(layers: int, width: int, number: int, seed: int) -> set[int]:
    """Layers that a round may draw from: windows of equal size, each once a cycle, in a shuffled order."""
    windows = np.array_split(np.arange(layers), math.ceil(layers / width))
    cycle, position = divmod(number, len(windows))
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, 2**63 + cycle], dtype=np.uint64)))
    return {int(layer) for layer in windows[rng.permutation(len(windows))[position]]}


class Simulation:
    """A run of MISA in float64.

    Args:
        theta: initial value of each tensor, copied.
        candidate: number of the candidate (module, or layer) that each tensor belongs to, or DENSE or FROZEN.
            Tensors that the user had frozen are left out altogether: they do not count in N.
        layer: layer of each tensor, 0 = nearest the input; -1 for a dense or frozen tensor outside of them.
        group: number of the parameter group of each tensor.
        groups: hyperparameters, which the caller may change between steps.
        options: everything else.

    Attributes:
        active: sorted numbers of the candidates that the current round trains.
        states: State of each tensor that has one: those of the active candidates and the dense ones.
        G: importance of each candidate, raw. count: folds into it. last_round: -1 = never active.
        unheard: rounds that trained each candidate since its last gradient that was not zero.
        rounds: one Round a draw, the current one last.
    """

    def __init__(
        self,
        theta: Sequence[Floats],
        candidate: Sequence[int],
        layer: Sequence[int],
        group: Sequence[int],
        groups: Sequence[Group],
        options: Options,
    ) -> None:
        self.theta = [np.array(value, dtype=np.float64) for value in theta]
        self.candidate, self.layer, self.group = list(candidate), list(layer), list(group)
        self.groups, self.options = list(groups), options
        size = 1 + max(self.candidate)
        self.members = [[i for i, c in enumerate(self.candidate) if c == b] for b in range(size)]
        self.numel = np.array([sum(self.theta[i].size for i in tensors) for tensors in self.members])
        self.candidate_layer = np.array([self.layer[tensors[0]] for tensors in self.members])
        self.total_numel = sum(value.size for value in self.theta)
        self.budget = math.floor(options.delta * self.total_numel)
        self.G = np.zeros(size)
        self.count = np.zeros(size, dtype=np.int64)
        self.last_round = np.full(size, -1)
        self.unheard = [0] * size
        self.turn = 0
        self.states = {i: self._fresh(i) for i, c in enumerate(self.candidate) if c == DENSE}
        self.active: list[int] = []
        self.rounds: list[Round] = []
        self.steps = 0
        self._begin_round()

    @property
    def p(self) -> Floats:
        """Probabilities that the current active set was drawn with."""
        return self.rounds[-1].probability

    @property
    def ages(self) -> list[int]:
        """Updates that each tensor has received since it got its state; 0 without one."""
        return [self.states[i].age if i in self.states else 0 for i in range(len(self.theta))]

    def step(self, gradients: Mapping[int, Floats | None]) -> None:
        """One inner step: "an inner step is a call of step(), skipped or not; every round has exactly T".

        Args:
            gradients: gradient of each tensor that has one; those of inactive and frozen tensors are ignored.
        """
        present = {i: g for i, g in gradients.items() if g is not None and i in self.states}
        if self.options.skip_nonfinite and not all(np.isfinite(g).all() for g in present.values()):
            self.rounds[-1].skipped_steps += 1
        else:
            self._score(present)
            self._update(self._clipped(present))
        self.steps += 1
        if self.steps % self.options.inner_steps == 0:
            self._end_round()
            self._begin_round()

    def _score(self, gradients: Mapping[int, Floats]) -> None:
        """S_b = sum of ||g_b||^2 over the applied updates, of the gradient before our own clipping."""
        for b in self.active:
            squares = [float(np.sum(gradients[i] ** 2)) for i in self.members[b] if i in gradients]
            if squares:
                sq_norm = sum(squares)
                each = {"sum": sq_norm, "norm": math.sqrt(sq_norm)}
                self.S[b] += each[self.options.importance_norm]
                self.updates[b] += 1

    def _clipped(self, gradients: Mapping[int, Floats]) -> dict[int, Floats]:
        """Gradients times min(1, max_norm / (norm + 1e-6)), the norm over active and dense tensors."""
        if self.options.max_grad_norm is None:
            return dict(gradients)
        norm = math.sqrt(sum(float(np.sum(g**2)) for g in gradients.values()))
        return {i: g * min(1.0, self.options.max_grad_norm / (norm + 1e-6)) for i, g in gradients.items()}

    def _update(self, gradients: Mapping[int, Floats]) -> None:
        """AdamW with ages; a tensor without a gradient is not touched."""
        for i, g in gradients.items():
            state, group = self.states[i], self.groups[self.group[i]]
            beta1, beta2 = group.betas
            state.age += 1
            state.m = beta1 * state.m + (1 - beta1) * g
            state.v = beta2 * state.v + (1 - beta2) * g**2
            decayed = self.theta[i] * (1 - group.lr * group.weight_decay)
            self.theta[i] = decayed - group.lr * self._direction(i)

    def _direction(self, i: int) -> Floats:
        """Bias-corrected m over root of bias-corrected second moment plus eps."""
        state, group = self.states[i], self.groups[self.group[i]]
        beta1, beta2 = group.betas
        m_hat = state.m / (1 - beta1**state.age)
        v_hat = state.v / (1 - beta2**state.age)
        return m_hat / (np.sqrt(v_hat) + group.eps)

    def _end_round(self) -> None:
        """G_b <- beta G_b + (1 - beta) mean(S_b), for active candidates that were updated in the round."""
        beta = self.options.importance_beta
        for b in self.active:
            if self.updates[b]:
                self.G[b] = beta * self.G[b] + (1 - beta) * self.S[b] / self.updates[b]
                self.count[b] += 1
            if self.S[b]:
                self.unheard[b] = 0
            elif not self.rounds[-1].skipped_steps:
                self.unheard[b] += 1

    def _begin_round(self) -> None:
        """Draw the next active set, flush and drop what leaves, give newcomers fresh state."""
        number = len(self.rounds)
        log_p, eta = self._log_probabilities(number)
        active = self._draw(number, log_p)
        staying = set(active) & set(self.active) if self.options.keep_states == "staying" else set()
        for b in self.active:
            if b not in staying:
                self._discard(b)
        self.states.update({i: self._fresh(i) for b in active if b not in staying for i in self.members[b]})
        self.active = active
        self.last_round[active] = number
        self.S, self.updates = np.zeros(len(self.G)), np.zeros(len(self.G), dtype=np.int64)
        self.rounds.append(
            Round(
                number=number,
                first_step=self.steps,
                active=tuple(active),
                importance=self.corrected_scores(),
                probability=np.exp(log_p),
                perplexity=perplexity_of(log_p),
                eta=eta,
                active_fraction=float(self.numel[active].sum() / self.total_numel),
                backward_depth=self._backward_depth(active),
            )
        )

    def _discard(self, b: int) -> None:
        """Line 16: theta <- theta - lr beta1/(1-beta1) m^/(sqrt(v^)+eps), no decay, if the age is above 0."""
        for i in self.members[b]:
            state, group = self.states[i], self.groups[self.group[i]]
            if self.options.momentum_flush and state.age > 0:
                factor = group.lr * group.betas[0] / (1 - group.betas[0])
                self.theta[i] = self.theta[i] - factor * self._direction(i)
            del self.states[i]

    def _fresh(self, i: int) -> State:
        """m = v = 0, t = 0."""
        return State(np.zeros_like(self.theta[i]), np.zeros_like(self.theta[i]))

    def corrected_scores(self) -> Floats:
        """s_b = G_b / (1 - beta^count), squared for the authors' norm; nan without a fold."""
        scored = self.count > 0
        scores = np.full(len(self.G), np.nan)
        scores[scored] = self.G[scored] / (1 - self.options.importance_beta ** self.count[scored])
        return scores**2 if self.options.importance_norm == "norm" else scores

    def _eligible(self, number: int) -> NDArray[np.bool_]:
        """Candidates inside the depth window of the round; without one all but those that are silent, see `_heard`."""
        width, layers = self.options.depth_window, 1 + max(self.layer)
        if width is None:
            return self._heard(number)
        assert max(self.unheard) < 3, "which layers a window has without the silent ones is not simulated"
        return np.isin(self.candidate_layer, sorted(window(layers, width, number, self.options.seed)))

    def _heard(self, number: int) -> NDArray[np.bool_]:
        """Three rounds without a gradient silence a candidate; eight rounds after one of these, the longest waiting."""
        silent = [b for b, rounds in enumerate(self.unheard) if rounds >= 3]
        heard = np.ones(len(self.G), dtype=bool)
        if 0 < len(silent) < len(self.G):
            heard[silent] = False
            # The first by number of those that have waited equally long.
            latest, longest = max(self.last_round[silent]), min(silent, key=lambda b: (self.last_round[b], b))
            heard[longest] = number >= latest + 8
        return heard

    def _log_probabilities(self, number: int) -> tuple[Floats, float]:
        """log p_b = eta s_b - log sum exp(eta s_j) over the eligible (-inf elsewhere), and eta."""
        eligible = self._eligible(number)
        scores = self.corrected_scores()
        # "Modules without a score count as the mean corrected score of those that have one (0 if none has)."
        scores[np.isnan(scores)] = np.nanmean(scores) if (self.count > 0).any() else 0.0
        s = scores[eligible]
        eta = self._eta(s, self.numel[eligible]) if self.options.draw == "importance" else 0.0
        w = eta * s
        if self.options.exponent_clip is not None:
            w = np.minimum(w, self.options.exponent_clip)
        log_p = np.full(len(self.G), -np.inf)
        log_p[eligible] = log_softmax(w)
        return log_p, eta

    def _eta(self, scores: Floats, numel: NDArray[np.int64]) -> float:
        """exp(H(p)) = clip(perplexity K, k, E), K modules in an average round, k tied at the maximum."""
        if self.options.eta != "auto":
            return float(self.options.eta)
        eligible = len(scores)
        drawn = min(max(self.budget / numel.mean(), 1.0), float(eligible))
        # Scores of 1 may differ by a rounding of 0.8^count, which depends on the processor.
        tied = int((scores >= scores.max() * (1 - 1e-12)).sum())
        return solve_eta(scores, min(max(self.options.perplexity * drawn, float(tied)), float(eligible)))

    def _draw(self, number: int, log_p: Floats) -> list[int]:
        """The active set: least recent first, then by p without replacement, whatever still fits."""
        gumbel, ties = random_numbers(self.options.seed, number, len(self.G))
        eligible = [b for b in range(len(self.G)) if np.isfinite(log_p[b])]
        if self.options.draw == "cyclic":
            return self._cyclic()
        taken: list[int] = []
        if self.options.draw == "importance":
            taken = self._longest_waiting(eligible, ties)
        for b in sorted(eligible, key=lambda b: -(log_p[b] + gumbel[b])):
            if b not in taken and self.numel[taken].sum() + self.numel[b] <= self.budget:
                taken.append(b)
        return sorted(taken)

    def _longest_waiting(self, eligible: list[int], ties: Floats) -> list[int]:
        """Those that have waited longest, "taking at most half of the budget (one at least)"."""
        taken: list[int] = []
        order = sorted(eligible, key=lambda b: (self.last_round[b], -ties[b]))
        for b in order[: self.options.least_recent]:
            allowed = self.options.least_recent_share * self.budget
            if not taken or self.numel[taken].sum() + self.numel[b] <= allowed:
                taken.append(b)
        return taken

    def _cyclic(self) -> list[int]:
        """Consecutive candidates from where the last round ended, until the first that does not fit."""
        taken: list[int] = []
        b = self.turn
        while len(taken) < len(self.G) and self.numel[taken].sum() + self.numel[b] <= self.budget:
            taken.append(b)
            b = (b + 1) % len(self.G)
        self.turn = b
        return sorted(taken)

    def _backward_depth(self, active: list[int]) -> int:
        """Layers from the output down to the lowest one that holds something to train."""
        dense = [self.layer[i] for i, c in enumerate(self.candidate) if c == DENSE and self.layer[i] >= 0]
        return int(1 + max(self.layer) - min([*self.candidate_layer[active], *dense]))
