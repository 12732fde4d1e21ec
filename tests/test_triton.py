"""The Triton step against float64 NumPy, the reference and csrc/adamw.h: in the interpreter, and on a GPU."""

from __future__ import annotations

import importlib
import math
import mmap
import os
import sys
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from test_formula import build, header_adamw
from test_formula import hyper_at as header_hyper
from triton.runtime.interpreter import InterpretedFunction

from misa_kernels import reference

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
OTHER = {"lr": 3e-3, "beta1": 0.8, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.0}
SIZES = [0, 1, 15, 1023, 4097, 100_000]
# Elements of poison around every weight and every row of state; 64 keeps rows where an arena puts them.
GUARD = 64
POISON = 0x7FA1
# Bounds of float32 arithmetic against float64 after n steps, in units of n: theta and v see five roundings a
# step, 3e-7 of their size; m may cancel, so its error is relative to the largest gradient.
RTOL = 4e-7
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreters of Triton 3.6 to 3.8 round fma twice.
EXACT_FMA = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


@cache
def interpreted() -> ModuleType:
    """A copy of the launcher for the interpreter, which nobody else sees: it is chosen at import."""
    package = importlib.import_module("misa_kernels.kernels")
    names = ("triton_codec", "triton", "launch")
    with patch.dict(os.environ, TRITON_INTERPRET="1"), patch.dict(sys.modules), patch.dict(vars(package)):
        for name in names:
            sys.modules.pop(f"{package.__name__}.{name}", None)
            vars(package).pop(name, None)
        return importlib.import_module(f"{package.__name__}.launch")


@pytest.fixture
def launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if device.type == "cuda":
        return importlib.import_module("misa_kernels.kernels.launch")
    # Triton's own library is not for the interpreter where something imported it before.
    for name in ("sum", "max", "min", "zeros"):
        function = getattr(tl, name)
        if isinstance(function, triton.JITFunction):
            monkeypatch.setattr(tl, name, InterpretedFunction(function.fn))
    return interpreted()


@dataclass
class Row:
    """One tensor of a test; `shift` and `grad_shift` move it off its alignment, by elements."""

    numel: int
    dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype | None = None
    group: int = 0
    start: int = 0
    shift: int = 0
    grad_shift: int = 0


def poisoned(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """NaNs of one bit pattern, so that reading one shows in the result, and writing one in the bits."""
    words = torch.full((numel * dtype.itemsize // 2,), POISON, dtype=torch.int16, device=device)
    return words.view(dtype)


class Step:
    """Rows with poisoned surroundings, and the same rows in float64 NumPy."""

    def __init__(self, launch, device, rows, *, groups=(HYPER,), stochastic=(), seed=0):
        self.rows, self.device = rows, device
        self.rng = np.random.default_rng(seed)
        self.groups = [dict(group) for group in groups]
        self.buffers = [poisoned(row.numel + row.shift + 2 * GUARD, row.dtype, device) for row in rows]
        self.weights = [
            buffer[GUARD + row.shift :][: row.numel] for buffer, row in zip(self.buffers, rows, strict=True)
        ]
        for weight in self.weights:
            weight.copy_(torch.from_numpy(self.rng.standard_normal(len(weight))))
        self.offset, end = [], dict.fromkeys(DTYPES, GUARD)
        for row in rows:
            self.offset.append(end[row.dtype])
            end[row.dtype] += -(-row.numel // 64) * 64 + GUARD
        self.state = {}
        for dtype in dict.fromkeys(row.dtype for row in rows):
            master = dtype != torch.float32 and dtype not in stochastic
            names = ("exp_avg", "exp_avg_sq", "master") if master else ("exp_avg", "exp_avg_sq")
            self.state[dtype] = {name: poisoned(end[dtype], torch.float32, device) for name in names}
        self.grad_dtypes = [row.grad_dtype or row.dtype for row in rows]
        self.launch = launch.Launch(
            np.array([row.numel for row in rows], dtype=np.int64),
            np.array(self.offset, dtype=np.int64),
            np.array([row.group for row in rows], dtype=np.int64),
            np.array([row.start for row in rows], dtype=np.int64),
            [row.dtype for row in rows],
            self.grad_dtypes,
            self.state,
            device,
        )
        self.theta = [weight.double().cpu().numpy() for weight in self.weights]
        self.m = [np.zeros(row.numel) for row in rows]
        self.v = [np.zeros(row.numel) for row in rows]
        self.largest = [0.0] * len(rows)
        self.age = np.zeros(len(rows), dtype=np.int64)
        self.sq_sum = np.zeros(len(rows))
        self.steps = 0

    def draw(self, missing=()):
        """Gradients of different scales, in memory of their own and of the alignment asked for."""
        grads = []
        for i, (row, dtype) in enumerate(zip(self.rows, self.grad_dtypes, strict=True)):
            values = torch.from_numpy(self.rng.standard_normal(row.numel) * 10.0 ** self.rng.uniform(-3, 1))
            buffer = torch.empty(row.numel + row.grad_shift, dtype=dtype, device=self.device)
            grad = buffer[row.grad_shift :]
            grads.append(None if i in missing else grad.copy_(values))
        return grads

    def run(self, grads, *, keys=None, **options):
        """One step of the kernel alone."""
        self.launch.step(
            [weight.data_ptr() for weight in self.weights],
            [0 if grad is None else grad.data_ptr() for grad in grads],
            np.array([list(group.values()) for group in self.groups]),
            keys,
            **options,
        )

    def expect(self, grads, *, max_grad_norm=None, scale=1.0):
        """The same step in float64: Loshchilov and Hutter 2019, algorithm 2."""
        grads = [None if grad is None else grad.double().cpu().numpy() / scale for grad in grads]
        norm = math.sqrt(sum(np.square(grad).sum() for grad in grads if grad is not None))
        coefficient = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
        for i, g in enumerate(grads):
            if g is None or not len(g):
                continue
            lr, beta1, beta2, eps, weight_decay = self.groups[self.rows[i].group].values()
            self.sq_sum[i] += np.square(g).sum()
            self.age[i] += 1
            g, t = g * coefficient, self.age[i]
            self.largest[i] = max(self.largest[i], np.abs(g).max())
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g**2
            update = self.m[i] / (1 - beta1**t) / (np.sqrt(self.v[i] / (1 - beta2**t)) + eps)
            self.theta[i] = self.theta[i] - lr * (update + weight_decay * self.theta[i])
        self.steps += 1

    def both(self, grads, *, max_grad_norm=None):
        self.run(grads, max_grad_norm=max_grad_norm)
        self.expect(grads, max_grad_norm=max_grad_norm)

    def part(self, name, i):
        """State of one row, on the host."""
        buffers, row = self.state[self.rows[i].dtype], self.rows[i]
        return buffers[name][self.offset[i] :][: row.numel].cpu() if name in buffers else None

    def check(self):
        collected = self.launch.collect().cpu().numpy()
        np.testing.assert_array_equal(collected[:, 0], self.age)
        # Fixed-order float32 sums of 8 squares a lane, then float64.
        np.testing.assert_allclose(collected[:, 1], self.sq_sum, rtol=1e-6)
        tolerance = RTOL * max(self.steps, 1)
        for i in range(len(self.rows)):
            master, weight = self.part("master", i), self.weights[i].cpu()
            if self.age[i] == 0:
                np.testing.assert_array_equal(weight.double(), self.theta[i])
                continue
            theta = weight if master is None else master
            lr = self.groups[self.rows[i].group]["lr"]
            np.testing.assert_allclose(theta, self.theta[i], rtol=tolerance, atol=10 * lr * tolerance)
            np.testing.assert_allclose(self.part("exp_avg", i), self.m[i], rtol=0, atol=tolerance * self.largest[i])
            np.testing.assert_allclose(self.part("exp_avg_sq", i), self.v[i], rtol=tolerance)
            if master is not None:
                assert torch.equal(weight, master.to(weight.dtype))
        self.check_surroundings()

    def check_surroundings(self):
        """Not a bit of poison is touched around weights and state, nor in the state of a row of age 0."""
        for row, buffer in zip(self.rows, self.buffers, strict=True):
            begin = GUARD + row.shift
            untouched(torch.cat([buffer[:begin], buffer[begin + row.numel :]]))
        for dtype, buffers in self.state.items():
            for buffer in buffers.values():
                keep = torch.ones(len(buffer), dtype=torch.bool, device=self.device)
                for i, row in enumerate(self.rows):
                    if row.dtype == dtype and self.age[i]:
                        keep[self.offset[i] : self.offset[i] + row.numel] = False
                untouched(buffer[keep])

    def bits(self):
        """Everything a step may write, as bytes."""
        launch = self.launch
        tensors = [*self.buffers, *(buffer for buffers in self.state.values() for buffer in buffers.values())]
        return [tensor.view(torch.uint8).cpu().clone() for tensor in (*tensors, launch._ages, launch._sq_sums)]


def untouched(x: torch.Tensor) -> None:
    words = x.contiguous().view(torch.int16)
    assert (words == POISON).all(), f"{int((words != POISON).sum())} of {len(words)} words were written"


def same_bits(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


VARIANTS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize("dtype, grad_dtype", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_steps_equal_float64(launch, device, dtype, grad_dtype, size):
    step = Step(launch, device, [Row(size, dtype, grad_dtype), Row(64, dtype, grad_dtype)], seed=size)
    for max_grad_norm in (None, None, 0.5):
        step.both(step.draw(), max_grad_norm=max_grad_norm)
    step.check()


@pytest.mark.slow
@pytest.mark.parametrize("dtype, grad_dtype", VARIANTS)
def test_a_million_elements(launch, device, dtype, grad_dtype):
    step = Step(launch, device, [Row(1_000_003, dtype, grad_dtype), Row(1_000_000, dtype, grad_dtype)])
    for max_grad_norm in (None, 1.0):
        step.both(step.draw(), max_grad_norm=max_grad_norm)
    step.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift, grad_shift", [(1, 0), (0, 1), (3, 2)])
def test_unaligned_views(launch, device, dtype, shift, grad_shift):
    rows = [Row(n, dtype, shift=shift, grad_shift=grad_shift) for n in (4, 1024, 9001)]
    step = Step(launch, device, [*rows, Row(256, dtype)])
    assert [bucket.aligned for bucket in step.launch._buckets] == [True, False]
    for _ in range(3):
        step.both(step.draw())
    step.check()


def test_alignment_may_change_between_steps(launch, device):
    rows = [Row(20_000), Row(512), Row(700)]
    step = Step(launch, device, rows)
    for shift in (0, 1, 0, 3):
        rows[0].grad_shift = shift
        step.both(step.draw(), max_grad_norm=1.0)
        assert len(step.launch._buckets) == 1 + (shift > 0)
    step.check()


def mixed_rows(count):
    """Rows of all dtypes, some unaligned, in two groups."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(0, 300, count)
    return [
        Row(int(size), DTYPES[i % 3], group=i // 3 % 2, shift=int(rng.integers(2)), grad_shift=int(rng.integers(2)))
        for i, size in enumerate(sizes)
    ]


def test_300_tensors_take_one_launch(launch, device):
    step = Step(launch, device, [Row(n) for n in range(0, 1200, 4)])
    launches = []
    with patch.object(launch.Launch, "_launch", autospec=True, side_effect=launch.Launch._launch) as spy:
        step.both(step.draw())
        launches.append(spy.call_count)
    assert launches == [1]
    step.check()


def test_groups_have_their_own_hyperparameters_which_may_change(launch, device):
    step = Step(launch, device, mixed_rows(18), groups=(HYPER, OTHER))
    for lr in (1e-2, 2e-3, 0.0):
        step.groups[0]["lr"] = lr
        step.both(step.draw())
    step.check()


def test_rows_without_gradient_stay_as_they_are(launch, device):
    step = Step(launch, device, mixed_rows(12), groups=(HYPER, OTHER))
    for missing in ({0, 1, 2, 3}, {3, 4, 5, 6, 11}, set(range(12)), {3}):
        step.both(step.draw(missing), max_grad_norm=1.0)
    assert step.age[3] == 0 and len(set(step.age[[row.numel > 0 for row in step.rows]])) > 2
    step.check()


def test_ages_can_be_set(launch, device):
    step = Step(launch, device, [Row(20_000), Row(100), Row(4)])
    step.launch.set_ages(torch.tensor([7, 0, 999]))
    step.age[:] = 7, 0, 999
    for i in (0, 2):
        step.v[i] += 0.25
        for name, value in (("exp_avg", 0.0), ("exp_avg_sq", 0.25)):
            step.state[torch.float32][name][step.offset[i] :][: step.rows[i].numel] = value
    step.both(step.draw())
    step.check()


def test_sums_begin_anew(launch, device):
    step = Step(launch, device, [Row(300), Row(9000)])
    step.both(step.draw())
    step.launch.clear_sums()
    step.sq_sum[:] = 0
    step.both(step.draw())
    step.check()


def test_state_of_age_0_is_not_read(launch, device):
    """All state begins as NaN here; a step at age 0 must give what zeroed state gives, bit for bit."""
    rows = [Row(5000), Row(5000, torch.bfloat16), Row(77, torch.float16)]
    fresh, zeroed = Step(launch, device, rows), Step(launch, device, rows)
    for i, row in enumerate(rows):
        for name, buffer in zeroed.state[row.dtype].items():
            buffer[zeroed.offset[i] :][: row.numel] = zeroed.weights[i].float() if name == "master" else 0.0
    grads = fresh.draw()
    for step in (fresh, zeroed):
        step.run(grads)
    assert same_bits(fresh.bits(), zeroed.bits())


def test_two_runs_give_the_same_bits(launch, device):
    runs = [Step(launch, device, mixed_rows(9), groups=(HYPER, OTHER), stochastic=[torch.bfloat16]) for _ in range(2)]
    for step in runs:
        for t in range(2):
            step.run(step.draw(), keys=range(t, t + 9), max_grad_norm=1.0)
    assert same_bits(runs[0].bits(), runs[1].bits())


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1.0, 1e6])
def test_clipping_writes_coefficient_and_norm(launch, device, max_grad_norm):
    """One norm over all buckets."""
    step = Step(launch, device, mixed_rows(6), groups=(HYPER, OTHER))
    grads = step.draw()
    step.both(grads, max_grad_norm=max_grad_norm)
    norm = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
    expected = [min(1.0, max_grad_norm / (norm + 1e-6)), norm, 0.0]
    np.testing.assert_allclose(step.launch.control.cpu(), expected, rtol=1e-6)
    step.check()


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 4])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_nonfinite_gradient_skips_everything(launch, device, value, where, max_grad_norm):
    step = Step(launch, device, mixed_rows(6), groups=(HYPER, OTHER))
    options = {"skip_nonfinite": True, "max_grad_norm": max_grad_norm}
    step.run(step.draw(), **options)
    before, grads = step.bits(), step.draw()
    grads[where][-1] = value
    step.run(grads, **options)
    assert same_bits(before, step.bits())
    assert step.launch.control[2] == 1
    step.run(step.draw(), **options)
    assert step.launch.control[2] == 0
    assert not same_bits(before, step.bits())


def test_nan_spreads_when_it_may(launch, device):
    """Without skipping, as in `clip_grad_norm_`, the coefficient is NaN and so is every weight."""
    step = Step(launch, device, [Row(8), Row(100)])
    grads = step.draw()
    grads[0][3] = math.nan
    step.run(grads, max_grad_norm=1.0)
    assert all(weight.isnan().all() for weight in step.weights)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_grad_scaler(launch, device, max_grad_norm):
    """Norms, scores and update are those of the unscaled gradient; found_inf leaves everything alone."""
    step = Step(launch, device, mixed_rows(6), groups=(HYPER, OTHER))
    scale, found_inf = torch.tensor(2.0**7, device=device), torch.zeros((), device=device)
    options = {"grad_scale": scale, "found_inf": found_inf, "max_grad_norm": max_grad_norm}
    for _ in range(2):
        grads = step.draw()
        step.run(grads, **options)
        step.expect(grads, max_grad_norm=max_grad_norm, scale=2.0**7)
    step.check()
    before = step.bits()
    found_inf.fill_(1.0)
    step.run(step.draw(), **options)
    assert same_bits(before, step.bits())


def reference_rows(step, hyper):
    return [
        reference.Row(
            exp_avg=torch.zeros(row.numel),
            exp_avg_sq=torch.zeros(row.numel),
            master=None if row.dtype == torch.float32 else weight.cpu().float(),
            age=torch.zeros((), dtype=torch.int32),
            sq_norm=torch.zeros((), dtype=torch.float64),
            v_floor=None,
            start=row.start,
            theta=weight.cpu().clone(),
            grad=torch.empty(0),
            hyper=reference.Hyper(**hyper),
            noise_key=None,
        )
        for row, weight in zip(step.rows, step.weights, strict=True)
    ]


def test_steps_equal_the_reference(launch, device):
    """To 4 ulps: the reference rounds products and sums, the kernel only fused ones."""
    step = Step(launch, device, [Row(1000), Row(333, torch.bfloat16), Row(64, torch.float16)])
    rows = reference_rows(step, HYPER)
    for max_grad_norm in (None, 1.0, None):
        grads = step.draw()
        step.run(grads, max_grad_norm=max_grad_norm)
        for row, grad in zip(rows, grads, strict=True):
            row.grad = grad.cpu()
        reference.adamw_step(rows, max_grad_norm=max_grad_norm)
        for row in rows:
            row.age += 1
    for i, row in enumerate(rows):
        theta = row.theta if row.master is None else row.master
        ours = step.weights[i].cpu() if row.master is None else step.part("master", i)
        np.testing.assert_allclose(ours, theta, rtol=4 * 2.0**-23, atol=1e-8)
        largest = row.exp_avg.abs().max().item()
        np.testing.assert_allclose(step.part("exp_avg", i), row.exp_avg, rtol=0, atol=4 * 2.0**-23 * largest)
        np.testing.assert_allclose(step.part("exp_avg_sq", i), row.exp_avg_sq, rtol=4 * 2.0**-23)


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    return build("-O2", tmp_path_factory.mktemp("build"))


def power_by_squaring(base, exponent):
    """As the kernel does, operation by operation."""
    power = 1.0
    while exponent:
        power, base, exponent = power * base if exponent % 2 else power, base * base, exponent // 2
    return power


def test_float32_bits_are_those_of_the_header(launch, device, header):
    if device.type == "cpu" and not EXACT_FMA:
        pytest.skip("this interpreter rounds fma twice")
    step = Step(launch, device, [Row(20_001), Row(4096), Row(63, shift=1)])
    state = [(weight.cpu().numpy(), np.zeros(len(weight), np.float32)) for weight in step.weights]
    state = [(theta.copy(), zero.copy(), zero.copy()) for theta, zero in state]
    lr, beta1, beta2, eps, weight_decay = HYPER.values()
    for t in range(1, 6):
        grads = step.draw()
        step.run(grads)
        hyper = header_hyper(t, lr, beta1, beta2, eps, weight_decay)._replace(
            step_size=lr / (1 - power_by_squaring(beta1, t)),
            denom_scale=1 / math.sqrt(1 - power_by_squaring(beta2, t)),
        )
        for i, (grad, (theta, m, v)) in enumerate(zip(grads, state, strict=True)):
            state[i] = header_adamw(header, theta, grad.cpu().numpy(), m, v, hyper)
    for i, (theta, m, v) in enumerate(state):
        ours = step.weights[i].cpu(), step.part("exp_avg", i), step.part("exp_avg_sq", i)
        for a, b in zip(ours, (theta, m, v), strict=True):
            np.testing.assert_array_equal(a.numpy().view(np.uint32), b.view(np.uint32))


# Gradients of zero leave decay * theta, one rounding in every implementation: what remains to be compared is
# the rounding of the weight. 0.97 fills the lower bits.
DECAY_ONLY = {"lr": 0.3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("start", [0, 7, 2**32 - 1000, 3 * 2**32 - 8192, 2**40 + 5])
def test_stochastic_rounding_is_the_references(launch, device, start):
    rows = [Row(20_000, torch.bfloat16, start=start), Row(33, torch.bfloat16, start=5), Row(12, torch.bfloat16)]
    step = Step(launch, device, rows, groups=(DECAY_ONLY,), stochastic=[torch.bfloat16])
    keys = [reference.noise_key(3, 5, i) for i in range(3)]
    decay = torch.tensor(1 - 0.3 * 0.1, dtype=torch.float32)
    expected = [weight.cpu().clone() for weight in step.weights]
    step.run([torch.zeros_like(weight) for weight in step.weights], keys=keys)
    for row, key, weight, ours in zip(rows, keys, expected, step.weights, strict=True):
        reference.store_weight(weight, decay * weight.float(), row.start, key)
        assert torch.equal(ours.cpu().view(torch.int16), weight.view(torch.int16))
    step.age[:] = 1
    step.check_surroundings()


def test_stochastic_rounding_is_unbiased(launch, device):
    n = 50_000
    step = Step(launch, device, [Row(n, torch.bfloat16)], groups=(DECAY_ONLY,), stochastic=[torch.bfloat16])
    exact = 0.97 * step.weights[0].double().cpu()
    step.run([torch.zeros_like(step.weights[0])], keys=[12345])
    error = step.weights[0].double().cpu() - exact
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(n)
    nearest = exact.to(torch.bfloat16).double() - exact
    # Rounding to nearest has the third part of this variance.
    assert error.var() > 1.8 * nearest.var()


def test_stochastic_rounding_leaves_the_state_exact(launch, device):
    """m and v of the first step do not depend on how the weight is rounded."""
    rows = [Row(1000, torch.bfloat16)]
    with_master = Step(launch, device, rows)
    without = Step(launch, device, rows, stochastic=[torch.bfloat16])
    grads = with_master.draw()
    with_master.run(grads)
    without.run(grads, keys=[1])
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(with_master.part(name, 0), without.part(name, 0))
    assert not torch.equal(with_master.weights[0], without.weights[0])


@pytest.mark.parametrize("stochastic", [False, True])
def test_nonfinite_weights_stay_so(launch, device, stochastic):
    rows = [Row(8, torch.bfloat16)]
    step = Step(launch, device, rows, stochastic=[torch.bfloat16] if stochastic else [])
    step.weights[0][:3] = torch.tensor([math.inf, -math.inf, math.nan])
    step.run([torch.zeros_like(step.weights[0])], keys=[0xFFFFFFFF])
    np.testing.assert_array_equal(step.weights[0][:3].float().cpu(), [math.inf, -math.inf, math.nan])
    assert step.weights[0][3:].isfinite().all()


def reserve(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Address space of which only the pages that are touched take memory."""
    # MAP_NORESERVE, which Python names from 3.13 on.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse memory")
def test_offsets_beyond_32_bits(launch, device):
    """Both kinds: an element far into its tensor, and a row far into the arena; only the last chunks are run."""
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of GPU memory")
    large, tail = 2**31 + 3 * launch.Launch.chunk, 100
    numel = np.array([large + tail, tail], dtype=np.int64)
    offset = np.array([0, -(-(large + tail) // 64) * 64], dtype=np.int64)
    end = int(offset[1]) + tail
    make = reserve if device.type == "cpu" else lambda n, dtype: torch.empty(n, dtype=dtype, device=device)
    state = {name: make(end, torch.float32) for name in ("exp_avg", "exp_avg_sq", "master")}
    weight, grad = make(large + tail, torch.bfloat16), make(large + tail, torch.bfloat16)
    small = torch.ones(tail, dtype=torch.bfloat16, device=device)
    weight[-tail:], grad[-tail:] = 1.0, 2.0
    zero = np.zeros(2, dtype=np.int64)
    dtypes = [torch.bfloat16] * 2
    round_ = launch.Launch(numel, offset, zero, zero, dtypes, dtypes, {torch.bfloat16: state}, device)
    (bucket,) = round_._buckets
    round_._buckets = [bucket._replace(first_program=bucket.programs - 2, programs=2)]
    small_grad = torch.full_like(small, 2.0)
    round_.step([weight.data_ptr(), small.data_ptr()], [grad.data_ptr(), small_grad.data_ptr()], [list(HYPER.values())])
    # At age 1 the step is lr, whatever the gradient.
    expected = 1 - 1e-2 * 0.1 - 1e-2
    for begin in (large, int(offset[1])):
        np.testing.assert_allclose(state["master"][begin : begin + tail].cpu(), expected, rtol=1e-6)
        np.testing.assert_allclose(state["exp_avg"][begin : begin + tail].cpu(), 0.2, rtol=1e-6)
    assert round_._ages.sum() == 2
    np.testing.assert_allclose(round_._sq_sums.sum().item(), 2 * tail * 4.0)


def test_no_rows(launch, device):
    empty = np.zeros(0, dtype=np.int64)
    nothing = launch.Launch(empty, empty, empty, empty, [], [], {}, device)
    nothing.step([], [], np.zeros((0, 5)))
    assert nothing.collect().shape == (0, 2)


def test_wrong_uses_are_named():
    launch = interpreted()
    one = np.ones(1, dtype=np.int64)
    state = {dtype: {} for dtype in (torch.float16, torch.float64)}
    cases = [
        (torch.float16, torch.device("cpu"), ValueError, "float16 weights must have a master"),
        (torch.float64, torch.device("cpu"), ValueError, "torch.float64 must be one of"),
        (torch.float32, torch.device("cuda"), RuntimeError, "TRITON_INTERPRET=1"),
    ]
    for dtype, device, error, message in cases:
        with pytest.raises(error, match=message):
            launch.Launch(one, one, one, one, [dtype], [dtype], state, device)


def test_unchanged_tables_are_not_uploaded_again(launch, device):
    step = Step(launch, device, [Row(64)])
    grads = step.draw()
    step.run(grads)
    with patch.object(step.launch._table_upload.tensor, "copy_", create=True) as copy:
        step.run(grads)
        assert not copy.called
    step.groups[0]["lr"] = 0.5
    before = step.weights[0].clone()
    step.run(grads)
    assert (step.weights[0] - before).abs().max() > 0.05


@pytest.mark.gpu
def test_steps_never_wait_and_never_compile_again():
    launch, device = importlib.import_module("misa_kernels.kernels.launch"), torch.device("cuda")
    step = Step(launch, device, mixed_rows(30), groups=(HYPER, OTHER))
    options = {"max_grad_norm": 1.0, "skip_nonfinite": True}
    step.run(step.draw(), **options)
    grads = step.draw()
    kernel = launch.kernels.step_kernel
    variants = sum(len(cache[0]) for cache in kernel.device_caches.values())
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        torch.cuda.set_sync_debug_mode("error")
        for t in range(1000):
            step.groups[0]["lr"] = 1e-3 / (t + 1)
            step.groups[1]["beta1"] = 0.5 + t / 3000
            step.run(grads, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    for seed in range(20):
        other = Step(launch, device, mixed_rows(30 + seed), groups=(HYPER, OTHER), seed=seed)
        other.run(other.draw(), **options)
    assert sum(len(cache[0]) for cache in kernel.device_caches.values()) == variants


@pytest.mark.gpu
def test_a_captured_step_replays():
    launch, device = importlib.import_module("misa_kernels.kernels.launch"), torch.device("cuda")
    rows = [Row(20_000), Row(77, torch.bfloat16)]
    captured, eager = (Step(launch, device, rows) for _ in range(2))
    grads = eager.draw()
    for step in (captured, eager):
        step.run(grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.run(grads)
    for _ in range(3):
        graph.replay()
        eager.run(grads)
    captured.run(grads)
    eager.run(grads)
    assert same_bits(captured.bits(), eager.bits())


@pytest.mark.gpu
def test_uploads_do_not_overtake_the_device():
    """Many more steps than buffers while the device is busy: each must see its own hyperparameters."""
    launch, device = importlib.import_module("misa_kernels.kernels.launch"), torch.device("cuda")
    slow, fast = (Step(launch, device, [Row(100_000)]) for _ in range(2))
    grads = fast.draw()
    for step in (slow, fast):
        if step is slow:
            torch.cuda._sleep(500_000_000)
        for t in range(20):
            step.groups[0]["lr"] = 1e-2 * (1 + t)
            step.run(grads)
            if step is fast:
                torch.cuda.synchronize()
    assert same_bits(slow.bits(), fast.bits())
