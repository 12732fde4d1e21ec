"""The formulas of the reference against float64 NumPy, exact integers and measured frequencies."""

import numpy as np
import pytest
import torch

from misa_kernels import reference
from misa_kernels.reference import Hyper, Operands

# Five roundings of relative size 2^-24 lie between a float32 result and the float64 one: 3 ulps in theta, and
# cancellation in g adds to m.
RTOL = {torch.float32: 1e-6, torch.float64: 1e-14}


def adamw64(theta, grads, lr, beta1, beta2, eps, weight_decay):
    """AdamW as in Loshchilov and Hutter, algorithm 2, in float64."""
    m = v = np.zeros_like(theta)
    for t, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        step = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        theta = theta - lr * (step + weight_decay * theta)
    return theta, m, v


def row(theta, *, dtype=torch.float32, master=None, key=None, start=0, **hyper):
    n = theta.numel()
    hyper = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1} | hyper
    return Operands(
        exp_avg=torch.zeros(n, dtype=dtype),
        exp_avg_sq=torch.zeros(n, dtype=dtype),
        master=master,
        age=torch.zeros((), dtype=torch.int32),
        sq_norm=torch.full((), float("nan"), dtype=torch.float64),
        start=start,
        theta=theta,
        grad=torch.empty(0),
        hyper=Hyper(**hyper),
        noise_key=key,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 15, 1023, 4097])
def test_ten_steps_equal_float64_numpy(dtype, size):
    rng = np.random.default_rng(size)
    start, grads = rng.normal(size=size), rng.normal(size=(10, size))
    one = row(torch.tensor(start, dtype=dtype), dtype=dtype)
    grads = torch.tensor(grads, dtype=dtype)
    start = one.theta.double().numpy().copy()
    for g in grads:
        one.grad = g
        reference.adamw_step([one])
        np.testing.assert_allclose(one.sq_norm.item(), (g.double() ** 2).sum().item(), rtol=RTOL[dtype] * 10)
        one.age += 1
    theta, m, v = adamw64(start, grads.double().numpy(), 1e-2, 0.9, 0.99, 1e-8, 0.1)
    np.testing.assert_allclose(one.theta.double(), theta, rtol=RTOL[dtype] * 10, atol=RTOL[dtype])
    np.testing.assert_allclose(one.exp_avg.double(), m, rtol=RTOL[dtype] * 10, atol=RTOL[dtype])
    np.testing.assert_allclose(one.exp_avg_sq.double(), v, rtol=RTOL[dtype] * 10)


def test_bias_correction_is_rounded_once():
    # With beta2 = .999, 1 - beta2^t in float32 is off by 1e-5 at t = 1: the first step would be, too.
    one = row(torch.zeros(1000), beta2=0.999, weight_decay=0.0, lr=1.0, eps=0.0)
    one.grad = torch.linspace(0.5, 2.0, 1000)
    reference.adamw_step([one])
    # At age 0 the step is lr exactly, whatever the gradient.
    np.testing.assert_allclose(one.theta.numpy(), -1.0, rtol=5e-7)


def test_tensor_learning_rate_equals_float():
    a, b = row(torch.ones(50), lr=0.1), row(torch.ones(50), lr=torch.tensor(0.1, dtype=torch.float64))
    for one in (a, b):
        one.grad = torch.linspace(-1, 1, 50)
        reference.adamw_step([one])
    assert torch.equal(a.theta, b.theta)


def test_momentum_flush_is_line_16():
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(4, 100))
    one = row(torch.ones(100, dtype=torch.float64), dtype=torch.float64, weight_decay=0.0)
    for g in grads:
        one.grad = torch.tensor(g)
        reference.adamw_step([one])
        one.age += 1
    theta, m, v = adamw64(np.ones(100), grads, 1e-2, 0.9, 0.99, 1e-8, 0.0)
    m_hat, v_hat = m / (1 - 0.9**4), v / (1 - 0.99**4)
    expected = theta - 1e-2 * 0.9 / (1 - 0.9) * m_hat / (np.sqrt(v_hat) + 1e-8)
    flushed = reference.momentum_flush(one.theta, one.exp_avg, one.exp_avg_sq, one.hyper, one.age)
    np.testing.assert_allclose(flushed.numpy(), expected, rtol=1e-13)
    untouched = reference.momentum_flush(one.theta, one.exp_avg, one.exp_avg_sq, one.hyper, 0 * one.age)
    assert torch.equal(untouched, one.theta)


def test_master_holds_what_the_weight_cannot():
    weight = torch.ones(64, dtype=torch.bfloat16)
    one = row(weight, master=torch.ones(64), lr=1e-4, weight_decay=0.0)
    for _ in range(5):
        one.grad = torch.ones(64, dtype=torch.bfloat16)
        reference.adamw_step([one])
        one.age += 1
    np.testing.assert_allclose(one.master.numpy(), 1 - 5e-4, rtol=1e-6)
    assert torch.equal(weight, one.master.to(torch.bfloat16))


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-42, 3.3e38, float("inf"), float("-inf"), float("nan"), 6e-8, 65519.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_picks_a_neighbour(dtype):
    x = torch.cat([torch.randn(20_000) * 10.0 ** torch.randint(-6, 5, (20_000,)), torch.tensor(SPECIAL)])
    noise = torch.randint(65536, x.shape)
    out = reference.round_stochastic(x, dtype, noise)
    nearest = x.to(dtype)
    finite = x.isfinite() & (x.abs() < torch.finfo(dtype).max)
    assert torch.equal(out[~x.isfinite()].isnan(), x[~x.isfinite()].isnan())
    assert torch.equal(out[x.isinf()], nearest[x.isinf()])
    up = torch.nextafter(nearest.double(), torch.tensor(torch.inf, dtype=torch.float64))
    assert not up.equal(nearest.double())
    # The neighbours of x: nothing of the dtype lies strictly between x and the result.
    step = (out[finite].double() - x[finite].double()).abs()
    ulp = (out[finite].view(torch.int16) + 1).view(dtype).double() - out[finite].double()
    below = (out[finite].view(torch.int16) - 1).view(dtype).double() - out[finite].double()
    assert (step <= torch.maximum(ulp.abs(), below.abs().nan_to_num(torch.inf))).all()
    exact = nearest.to(torch.float32) == x
    assert torch.equal(out[exact], nearest[exact])


def test_stochastic_rounding_of_bfloat16_is_add_and_truncate():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=100_000) * 10.0 ** rng.integers(-30, 30, 100_000)).astype(np.float32)
    noise = rng.integers(0, 65536, 100_000)
    bits = ((x.view(np.uint32).astype(np.uint64) + noise.astype(np.uint64)) >> 16).astype(np.uint16)
    out = reference.round_stochastic(torch.tensor(x), torch.bfloat16, torch.tensor(noise))
    assert np.array_equal(out.view(torch.int16).numpy().view(np.uint16), bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0 + 2.0**-12, -0.3, 5e-7])
def test_stochastic_rounding_is_unbiased(dtype, value):
    n = 200_000
    out = torch.empty(n, dtype=dtype)
    reference.store_weight(out, torch.full((n,), value), start=7, noise_key=reference.noise_key(3, 5, 2))
    values = out.double()
    error = values.mean().item() - torch.tensor(value).item()
    assert abs(error) <= 4 * values.std().item() / n**0.5 + 1e-12
    assert len(values.unique()) == 2


def lowbias32(x):
    x &= 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_noise_depends_on_index_and_key_alone():
    index = [0, 1, 63, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 5 * 2**32 + 7]
    for key in (0, 1, 0xDEADBEEF):
        expected = []
        for i in index:
            high = i >> 32
            own = lowbias32(key ^ high) if high else key
            expected.append(lowbias32((i & 0xFFFFFFFF) ^ own) & 0xFFFF)
        assert reference.noise16(torch.tensor(index), key).tolist() == expected


def test_noise_keys_differ_between_steps_and_parameters():
    keys = {reference.noise_key(s, t, p) for s in (0, 1, 2**40) for t in range(50) for p in range(50)}
    assert len(keys) == 3 * 50 * 50
    assert all(0 <= key < 2**32 for key in keys)
    noise = reference.noise16(torch.arange(65536 * 8), reference.noise_key(0, 1, 2))
    counts = torch.bincount(noise, minlength=65536)
    # Eight expected a cell; chi-square over 65536 cells has a standard deviation of 362.
    chi_square = ((counts - 8.0) ** 2 / 8).sum().item()
    assert abs(chi_square - 65535) < 6 * 362
