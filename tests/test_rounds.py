"""Does the optimizer train, score and draw in whole rounds exactly as the independent simulation does?

Both worlds compute their own gradients from their own weights, so that an error anywhere shows everywhere.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from simulation import DENSE, FROZEN, PRESETS, Floats, Group, Options, Simulation
from torch import nn

import misa_kernels
from misa_kernels import MISA, CyclicSampler, ImportanceSampler, UniformSampler

torch.set_num_threads(1)

SAMPLERS = {"importance": ImportanceSampler, "uniform": UniformSampler, "cyclic": CyclicSampler}
LAYERS = [f"blocks.{n}" for n in range(4)]


@dataclass(frozen=True)
class Tensor:
    """A parameter of the little model: where it lies and how it is trained."""

    module: str
    layer: str | None
    shape: tuple[int, ...]
    group: int
    role: str = "sampled"


def model() -> list[Tensor]:
    """Fourteen modules of unequal shapes in four layers, two of them pairs; dense and frozen tensors."""
    tensors = []
    for n, layer in enumerate(LAYERS):
        tensors.append(Tensor(f"{layer}.query", layer, (6, 5 + n), 0))
        tensors.append(Tensor(f"{layer}.key", layer, (4 + n, 7), 0))
    for n, layer in enumerate(LAYERS):
        tensors.append(Tensor(f"{layer}.up", layer, (9, 8 - n), 1))
        if n % 2:
            tensors.append(Tensor(f"{layer}.expert", layer, (5, 6), 1))
            tensors.append(Tensor(f"{layer}.expert", layer, (6, 3), 1))
    tensors.append(Tensor("blocks.2.norm", "blocks.2", (7,), 2, "dense"))
    tensors.append(Tensor("head", None, (5, 4), 2, "dense"))
    tensors.append(Tensor("embedding", "blocks.0", (11, 3), 3, "frozen"))
    return tensors


GROUPS = [
    {"lr": 4e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.0},
    {"lr": 2e-3, "betas": (0.7, 0.9), "eps": 1e-6, "weight_decay": 0.03},
    {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1.0},
]


@dataclass(frozen=True)
class Case:
    """A run: a preset, arguments of MISA and of its sampler, and what happens on the way.

    Attributes:
        preset: name of the row in the specification's table.
        arguments: keyword arguments of MISA, which the simulation knows under the same names.
        draw: sampler to build, None for the preset's own; sampler holds its options.
        by_layer: candidates are layers.
        missing: (step, tensor) -> whether the tensor gets no gradient.
        nonfinite: steps whose gradients hold a NaN or an infinity.
        schedule: whether lr, betas and weight decay change in mid-round.
    """

    preset: str = "default"
    preset_arguments: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    draw: str | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    by_layer: bool = False
    missing: Any = None
    nonfinite: tuple[int, ...] = ()
    schedule: bool = False
    delta: float = 0.3
    inner_steps: int = 4
    rounds: int = 14


def whole_modules(step: int, tensor: Tensor) -> bool:
    """No token for the experts on two steps of three, and no gradient for queries in two rounds of four."""
    periods = {"expert": step % 3 > 0, "query": step % 16 >= 8}
    return periods.get(tensor.module.split(".")[-1], False)


def second_tensors(step: int, tensor: Tensor) -> bool:
    """Of an expert's two matrices, the second goes without on three steps of four: ages are per tensor."""
    return tensor.module.endswith("expert") and tensor.shape == (6, 3) and step % 4 != 1


def a_tower(step: int, tensor: Tensor) -> bool:
    """Nothing for two layers of four, until the lower one of them has gradients at last."""
    return tensor.layer in LAYERS[1:3] and (tensor.layer == LAYERS[2] or step < 100)


EVERYTHING = {"max_grad_norm": 0.5, "skip_nonfinite": True, "momentum_flush": True}

CASES = {
    "default": Case(),
    "default, T = 3, other seed": Case(inner_steps=3, arguments={"seed": 12345}),
    "default, T = 1": Case(inner_steps=1, rounds=30),
    "default, most modules": Case(delta=0.8),
    "default, schedule": Case(schedule=True),
    "default, clipped": Case(arguments={"max_grad_norm": 0.3}),
    "default, missing gradients": Case(missing=whole_modules),
    "default, a tower without": Case(missing=a_tower, rounds=60),
    "uniform, a tower without": Case(draw="uniform", missing=a_tower, delta=0.5, rounds=60),
    "layers, a tower without": Case(
        draw="importance", sampler={"granularity": "layer"}, by_layer=True, missing=a_tower, delta=0.6, rounds=60
    ),
    "default, half an expert": Case(missing=second_tensors, arguments={"momentum_flush": True}, delta=0.5),
    "default, nonfinite": Case(arguments={"skip_nonfinite": True}, nonfinite=(1, 6, 7, 16, 17, 18, 19, 30)),
    "default, flush": Case(arguments={"momentum_flush": True}, delta=0.5),
    "default, states dropped": Case(arguments={"keep_states": "none"}),
    "default, layers": Case(draw="importance", sampler={"granularity": "layer"}, by_layer=True, delta=0.6),
    "everything": Case(
        arguments={**EVERYTHING, "backend": "reference"},
        missing=whole_modules,
        nonfinite=(2, 9, 10, 11, 12),
        schedule=True,
        inner_steps=5,
        delta=0.45,
    ),
    "window": Case(draw="importance", sampler={"depth_window": 2}, delta=0.25),
    "window of one": Case(draw="importance", sampler={"depth_window": 1}, delta=0.15, rounds=16),
    "eta 20": Case(draw="importance", sampler={"eta": 20.0, "importance_beta": 0.5, "least_recent": 3}),
    "perplexity": Case(draw="importance", sampler={"perplexity": 0.9, "least_recent": 0}),
    "paper": Case("paper", inner_steps=5),
    "paper, schedule": Case("paper", schedule=True, inner_steps=3, missing=whole_modules),
    "paper, reference": Case("paper", {"backend": "reference"}),
    "authors": Case("authors"),
    "authors, schedule": Case("authors", schedule=True, delta=0.5, inner_steps=3),
    "badam": Case("badam", by_layer=True),
    "badam, two layers": Case("badam", by_layer=True, delta=0.55, schedule=True),
    "lisa": Case("lisa", by_layer=True),
    "lisa, most layers": Case("lisa", by_layer=True, delta=0.8, inner_steps=3),
    "uniform": Case(draw="uniform"),
    "uniform, window": Case(draw="uniform", sampler={"depth_window": 2}, delta=0.25),
    "cyclic": Case(draw="cyclic", delta=0.4),
}

# float64: the two differ in the order of sums only. float32: the simulation itself, its weights and gradients
# rounded to float32 after each of 70 steps, strays by 1/27 of what is allowed here at most.
TOLERANCE = {
    torch.float64: {"theta": 1e-9, "score": 1e-9, "zero": 1e-12},
    torch.float32: {"theta": 2e-5, "score": 1e-4, "zero": 2e-6},
}
# Between AdamW and MISA in float32, in units in the last place of the largest value that a weight has had.
# Each step rounds either weight by half a unit, and 120 such errors add up like a random walk, to a standard
# deviation of 0.29 * 120^0.5 = 3 units. Measured over eight seeds: 6 at most.
ADAMW_ULPS = 8
# The solver of the optimizer owes the perplexity "well below 1 %", and no more.
SOLVED = 1e-5


@functools.cache
def phase(i: int, shape: tuple[int, ...]) -> Floats:
    """Where in its swing each element of a gradient starts."""
    return np.random.default_rng([i, 7]).uniform(0, 2 * math.pi, shape)


def smooth_gradients(theta: list[Floats], step: int) -> list[Floats]:
    """A nonlinear coupling of all weights that swings with the step, with norms over four decades."""
    everyone = sum(float(np.tanh(own).mean()) for own in theta)
    gradients = []
    for i, own in enumerate(theta):
        norm = 10 ** (-3.4 + 4 * ((5 * i) % 19) / 18) * (1 + 0.5 * math.sin(0.11 * step + i))
        direction = np.tanh(own + 0.3 * np.roll(own, 1)) + np.cos(phase(i, own.shape) + 0.4 * step)
        gradients.append(norm / math.sqrt(own.size) * (direction + 0.2 * everyone))
    return gradients


def agree(got: Any, expected: Any, rtol: float, atol: float = 0.0, err_msg: str = "") -> None:
    """What numpy's assert_allclose asserts, which takes ten times as long where there is nothing to say."""
    a, b = np.asarray(got), np.asarray(expected)
    bound = atol + rtol * np.abs(b)
    # NaNs and infinities are left to it.
    if a.shape != b.shape or not ((np.abs(a - b) <= bound).all() and np.isfinite(bound).all()):
        assert_allclose(got, expected, rtol, atol, err_msg=err_msg)


class Pair:
    """One run in both worlds, side by side."""

    def __init__(self, case: Case, dtype: torch.dtype, rule: Any = None) -> None:
        self.case, self.dtype, self.rule = case, dtype, rule
        self.tensors = model()
        rng = np.random.default_rng(3)
        # Representable in float32, so that both worlds start from the same numbers.
        initial = [rng.normal(size=t.shape).astype(np.float32).astype(np.float64) for t in self.tensors]
        self.params = [nn.Parameter(torch.tensor(value, dtype=dtype)) for value in initial]
        self.never = nn.Parameter(torch.ones(3, 5, dtype=dtype), requires_grad=False)
        self.optimizer = self._optimizer()
        self.simulation = self._simulation(initial)
        self.step_number = 0

    def _optimizer(self) -> MISA:
        groups: list[dict[str, Any]] = []
        for g, hyperparameters in enumerate(GROUPS):
            members = [i for i, t in enumerate(self.tensors) if t.group == g]
            groups.append(
                {
                    "params": [self.params[i] for i in members],
                    "modules": [self.tensors[i].module for i in members],
                    "layers": [self.tensors[i].layer for i in members],
                    "role": self.tensors[members[0]].role,
                    **hyperparameters,
                }
            )
        # A weight that the user froze counts for nothing, in whatever group it stands.
        groups[1]["params"].append(self.never)
        groups[1]["modules"].append("blocks.3.up_proj")
        groups[1]["layers"].append("blocks.3")
        arguments: dict[str, Any] = {}
        if self.case.preset != "default":
            arguments = getattr(misa_kernels, self.case.preset)(**self.case.preset_arguments)
        if self.case.draw is not None:
            arguments["sampler"] = SAMPLERS[self.case.draw](**self.case.sampler)
        arguments.update(self.case.arguments, delta=self.case.delta, inner_steps=self.case.inner_steps)
        return MISA(groups, rule=self.rule, **arguments)

    def _simulation(self, initial: list[Floats]) -> Simulation:
        names: list[str | None] = []
        candidate = []
        for t in self.tensors:
            name = t.layer if self.case.by_layer else t.module
            if t.role == "sampled" and name not in names:
                names.append(name)
            special = {"dense": DENSE, "frozen": FROZEN}
            candidate.append(names.index(name) if t.role == "sampled" else special[t.role])
        layer = [LAYERS.index(t.layer) if t.layer else -1 for t in self.tensors]
        shared = {**self.case.arguments, **self.case.sampler, **self.case.preset_arguments}
        options = {k: v for k, v in shared.items() if k not in ("backend", "granularity")}
        row = {**PRESETS[self.case.preset], **({"draw": self.case.draw} if self.case.draw else {})}
        return Simulation(
            initial,
            candidate,
            layer,
            [t.group for t in self.tensors],
            [Group(**hyperparameters) for hyperparameters in GROUPS],
            Options(delta=self.case.delta, inner_steps=self.case.inner_steps, **{**row, **options}),
        )

    def gradients(self, theta: list[Floats]) -> dict[int, Floats | None]:
        """Gradients of one world, with those left out or spoilt that the case says."""
        gradients: dict[int, Floats | None] = dict(enumerate(smooth_gradients(theta, self.step_number)))
        for i, t in enumerate(self.tensors):
            if self.case.missing is not None and self.case.missing(self.step_number, t):
                gradients[i] = None
        if self.step_number in self.case.nonfinite:
            # In a dense tensor at even steps, in all tensors at odd ones.
            for i, g in gradients.items():
                if g is not None and (self.step_number % 2 or self.tensors[i].role == "dense"):
                    g.flat[-1] = math.nan if self.step_number % 3 else math.inf
        return gradients

    def step(self) -> None:
        if self.case.schedule:
            self._reschedule()
        own = self.gradients([p.detach().double().numpy() for p in self.params])
        self.optimizer.zero_grad()
        for i, g in own.items():
            if g is not None and self.params[i].requires_grad:
                self.params[i].grad = torch.tensor(g, dtype=self.dtype)
        self.optimizer.step()
        self.simulation.step(self.gradients(self.simulation.theta))
        self.step_number += 1

    def _reschedule(self) -> None:
        """Hyperparameters of each group, changed before every step as a scheduler would."""
        for g, hyperparameters in enumerate(GROUPS):
            beta1, beta2 = hyperparameters["betas"]
            now = {
                "lr": hyperparameters["lr"] * (1 + 0.5 * math.sin(0.9 * self.step_number + g)),
                "betas": (beta1 - 0.1 * math.cos(0.3 * self.step_number) ** 2, beta2),
                "weight_decay": hyperparameters["weight_decay"] * (self.step_number % 3),
            }
            self.optimizer.param_groups[g].update(now)
            for name, value in now.items():
                setattr(self.simulation.groups[g], name, value)

    def compare(self) -> None:
        """Everything that both worlds know, after any step."""
        where = f"after step {self.step_number}, round {len(self.simulation.rounds) - 1}"
        assert list(self.optimizer.active) == self.simulation.active, where
        for i, p in enumerate(self.params):
            self._compare_weight(i, p, f"{self.tensors[i].module} (tensor {i}) {where}")
            state = self.optimizer.state.get(p, {})
            self._compare_moments(i, state, f"{self.tensors[i].module} (tensor {i}) {where}")
            self._compare_importance(i, state, f"{self.tensors[i].module} (tensor {i}) {where}")

    def _compare_weight(self, i: int, p: nn.Parameter, where: str) -> None:
        tolerance = TOLERANCE[self.dtype]
        got, expected = p.detach().numpy(), self.simulation.theta[i]
        agree(got, expected, tolerance["theta"], tolerance["zero"], err_msg=f"theta, {where}")
        assert p.requires_grad == (i in self.simulation.states), where
        assert p.requires_grad or p.grad is None, where

    def _compare_moments(self, i: int, state: dict[str, torch.Tensor], where: str) -> None:
        tolerance, age = TOLERANCE[self.dtype], self.simulation.ages[i]
        if i in self.simulation.states:
            assert ("age" in state or age == 0) and int(state.get("age", 0)) == age, f"age, {where}"
        prefix = "" if self.rule is None else "rule."
        moments = {n: state[prefix + n] for n in ("exp_avg", "exp_avg_sq") if prefix + n in state}
        if age == 0:
            assert not any(torch.count_nonzero(moment) for moment in moments.values()), where
            return
        expected = {"exp_avg": self.simulation.states[i].m, "exp_avg_sq": self.simulation.states[i].v}
        for name, value in expected.items():
            assert moments[name].dtype == self.dtype
            got = moments[name].reshape(value.shape)
            # An average of swinging gradients cancels: its error is one of the largest term.
            zero = tolerance["zero"] * np.abs(value).max()
            agree(got, value, 10 * tolerance["theta"], zero, err_msg=f"{name}, {where}")

    def _compare_importance(self, i: int, state: dict[str, torch.Tensor], where: str) -> None:
        simulation, b = self.simulation, self.simulation.candidate[i]
        if b < 0:
            return
        assert state["importance"].dtype == torch.float64
        score = TOLERANCE[self.dtype]["score"]
        agree(float(state["importance"]), simulation.G[b], score, err_msg=f"G, {where}")
        assert int(state["importance_count"]) == simulation.count[b], f"count, {where}"
        assert int(state["last_round"]) == simulation.last_round[b], f"last round, {where}"

    def compare_rounds(self) -> None:
        """The monitor's records of all rounds so far."""
        simulation, tolerance = self.simulation, TOLERANCE[self.dtype]
        rounds = list(self.optimizer.monitor.rounds)
        assert len(rounds) == len(simulation.rounds)
        for got, expected in zip(rounds, simulation.rounds, strict=True):
            where = f"round {expected.number}"
            assert got.round == expected.number
            assert got.first_step == expected.first_step, where
            assert tuple(got.active) == expected.active, where
            close = functools.partial(agree, err_msg=where)
            close(got.importance, expected.importance, rtol=2 * tolerance["score"])
            # A relative error of eta moves log p by so much times the span of the exponents.
            span = 1 - np.log(expected.probability[expected.probability > 0]).min()
            loose = max(tolerance["score"], SOLVED if self._solves_eta() else 0.0)
            close(got.probability, expected.probability, rtol=loose * span, atol=1e-290)
            close(got.perplexity, expected.perplexity, rtol=loose)
            close(got.perplexity_fraction, expected.perplexity / len(expected.probability), rtol=loose)
            close(got.active_fraction, expected.active_fraction, rtol=1e-12)
            assert got.active_fraction <= self.case.delta
            dense = sum(simulation.theta[i].size for i, b in enumerate(simulation.candidate) if b == DENSE)
            fraction = expected.active_fraction + dense / simulation.total_numel
            close(got.gradient_fraction, fraction, rtol=1e-12)
            assert got.backward_depth == expected.backward_depth, where
            assert got.skipped_steps == expected.skipped_steps, where

    def _solves_eta(self) -> bool:
        options = self.simulation.options
        return options.draw == "importance" and options.eta == "auto"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_rounds_agree_with_the_simulation(name, dtype):
    case = CASES[name]
    pair = Pair(case, dtype)
    pair.compare()
    for _ in range(case.rounds * case.inner_steps + 1):
        pair.step()
        pair.compare()
    pair.compare_rounds()
    np.testing.assert_array_equal(pair.never.detach().numpy(), np.ones((3, 5)))
    assert pair.never.grad is None


BY_RULE = [name for name, case in CASES.items() if not {"momentum_flush", "backend"} & set(case.arguments)]


@pytest.mark.parametrize("name", [name for name in BY_RULE if CASES[name].preset in ("default", "authors", "lisa")])
def test_rounds_of_a_rule_agree_with_the_simulation(name):
    case = CASES[name]
    pair = Pair(case, torch.float64, lambda params: torch.optim.AdamW(params))
    for _ in range(min(case.rounds, 20) * case.inner_steps + 1):
        pair.step()
        pair.compare()
    pair.compare_rounds()


def test_split_tensor_is_sampled_by_row_blocks():
    shapes, layers = [(21, 6), (4, 5), (5, 5), (3, 7)], ["low", "low", "high", "high"]
    rng = np.random.default_rng(0)
    start = [rng.normal(size=shape) for shape in shapes]
    params = [nn.Parameter(torch.tensor(value)) for value in start]
    group = {"params": params, "modules": ["big", "a", "b", "c"], "layers": layers, "role": "sampled"}
    # A fixed eta: half of the 1.5 blocks of a round would ask auto for a perplexity of 1, that is eta = inf.
    sampler = ImportanceSampler(oversized="split", eta=2.0)
    keywords = {"delta": 0.25, "inner_steps": 3, "max_grad_norm": 0.2}
    with pytest.warns(UserWarning, match="big"):
        optimizer = MISA([group], lr=1e-2, sampler=sampler, momentum_flush=True, **keywords)
    # Budget 48 of 192, so eight rows of six at most: three blocks of seven.
    blocks = [start[0][:7], start[0][7:14], start[0][14:], *start[1:]]
    simulation = Simulation(
        blocks,
        list(range(6)),
        [0, 0, 0, 0, 1, 1],
        [0] * 6,
        [Group(lr=1e-2)],
        Options(momentum_flush=True, eta=2.0, **keywords),
    )
    names = ["big[rows 0:7]", "big[rows 7:14]", "big[rows 14:21]", "a", "b", "c"]
    assert [module.name for module in optimizer.modules] == names
    for step in range(45):
        own = [p.detach().numpy() for p in params]
        own = [own[0][:7], own[0][7:14], own[0][14:], *own[1:]]
        pieces = smooth_gradients(own, step)
        optimizer.zero_grad()
        for p, g in zip(params, [np.concatenate(pieces[:3]), *pieces[3:]], strict=True):
            p.grad = torch.tensor(g) if p.requires_grad else None
        optimizer.step()
        simulation.step(dict(enumerate(smooth_gradients(simulation.theta, step))))
        assert list(optimizer.active) == simulation.active
        assert params[0].requires_grad == (simulation.active[0] < 3)
        theta = [np.concatenate(simulation.theta[:3]), *simulation.theta[3:]]
        for p, expected in zip(params, theta, strict=True):
            agree(p.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
        got = torch.cat([optimizer.state[p]["importance"].flatten() for p in params])
        assert_allclose(got, simulation.G, rtol=1e-9)


def network(dtype: torch.dtype) -> nn.Sequential:
    """Matrices and vectors, so that delta = 1 has modules as well as dense tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 4))
    for p in model.parameters():
        # A weight that started at zero would be no larger than its updates, and its ulp no measure for them.
        nn.init.normal_(p)
    return model.to(dtype)


def adamw_and_misa(models: list[nn.Sequential], steps: int) -> list[tuple[torch.optim.Optimizer, Any]]:
    """AdamW and MISA with delta = 1 on two groups each, under a scheduler that also cycles beta1."""
    pairs = []
    kinds = (torch.optim.AdamW, functools.partial(MISA, delta=1, inner_steps=7))
    for model, optimizer in zip(models, kinds, strict=True):
        groups = [
            {"params": list(model[0].parameters())},
            {"params": [*model[2].parameters(), *model[3].parameters()], "eps": 1e-5, "weight_decay": 0.3},
        ]
        built = optimizer(groups, lr=1e-2, weight_decay=0.05)
        pairs.append((built, torch.optim.lr_scheduler.OneCycleLR(built, [3e-2, 1e-2], total_steps=steps)))
    return pairs


def test_delta_one_is_adamw_in_float64():
    models = [network(torch.float64), network(torch.float64)]
    inputs = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pairs = adamw_and_misa(models, 61)
    for step in range(60):
        for model, (optimizer, scheduler) in zip(models, pairs, strict=True):
            optimizer.zero_grad()
            (model(inputs) - math.sin(step)).square().mean().backward()
            optimizer.step()
            scheduler.step()
        for theirs, ours in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert_allclose(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-15)


def test_delta_one_is_adamw_in_float32_within_a_few_ulps():
    # Both get the same gradients, so that nothing but the arithmetic of the step can differ.
    models = [network(torch.float32), network(torch.float32)]
    generator = torch.Generator().manual_seed(2)
    pairs = adamw_and_misa(models, 61)
    largest = [p.detach().abs() for p in models[0].parameters()]
    for _ in range(60):
        gradients = [torch.randn(p.shape, generator=generator) for p in models[0].parameters()]
        for model, (optimizer, scheduler) in zip(models, pairs, strict=True):
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.grad = g.clone()
            optimizer.step()
            scheduler.step()
        now = [p.detach().abs() for p in models[0].parameters()]
        largest = [torch.maximum(a, b) for a, b in zip(largest, now, strict=True)]
        for theirs, ours, scale in zip(models[0].parameters(), models[1].parameters(), largest, strict=True):
            ulps = (ours.detach() - theirs.detach()).abs().numpy() / np.spacing(scale.numpy())
            assert ulps.max() <= ADAMW_ULPS
