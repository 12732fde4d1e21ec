"""AdaLomo against plain loops in float64, torch's Adafactor, and the factors as published."""

import numpy as np
import pytest
import torch
from followed import ATOL, drawn, elements, follow, rms

from misa_kernels.rules import AdaLomo

SHAPES = [(6, 8), (5, 7), (13,), (1, 1), (2, 3, 9), (3, 1)]
HYPER = {"lr": 0.05, "eps": 1e-30, "weight_decay": 0.1}


def account(theta, grads, lr, eps, weight_decay, decay_rate=0.8, scale_parameter=True):
    """Go through the matrices one by one, and through their rows and columns, with sums as in the paper."""
    stack = theta.reshape(-1, *theta.shape[-2:]) if theta.ndim > 1 else theta.reshape(1, -1, 1)
    _, rows, columns = stack.shape
    r, c = np.zeros((len(stack), rows)), np.zeros((len(stack), columns))
    for t, grad in enumerate(grads, start=1):
        beta2, u = 1 - t**-decay_rate, np.zeros_like(stack)
        for k, g in enumerate(grad.reshape(stack.shape)):
            for i in range(rows):
                r[k, i] = beta2 * r[k, i] + (1 - beta2) * sum(g[i, j] ** 2 + eps for j in range(columns))
            for j in range(columns):
                c[k, j] = beta2 * c[k, j] + (1 - beta2) * sum(g[i, j] ** 2 + eps for i in range(rows))
            # Of a vector, r is all of v.
            v = np.outer(r[k], c[k]) / sum(r[k]) if theta.ndim > 1 else r[k][:, None]
            u[k] = g / np.sqrt(v)
        u /= max(1.0, rms(u))
        step = lr * (max(1e-3, rms(stack)) if scale_parameter else 1.0)
        stack = stack * (1 - lr * weight_decay) - step * u
    return stack.reshape(theta.shape)


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("scale_parameter", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_account(shape, scale_parameter, dtype):
    theta, grads = drawn(shape, dtype)
    hyper = HYPER | {"scale_parameter": scale_parameter}
    own, _ = follow(AdaLomo, theta, grads, dtype, **hyper)
    np.testing.assert_allclose(own, account(theta, grads, **hyper), rtol=0, atol=ATOL[dtype])


def test_decay_rate_is_how_fast_the_past_counts():
    theta, grads = drawn((5, 7), torch.float64)
    own, _ = follow(AdaLomo, theta, grads, decay_rate=0.5, **HYPER)
    np.testing.assert_allclose(own, account(theta, grads, decay_rate=0.5, **HYPER), rtol=0, atol=1e-12)


def test_without_decay_it_is_torchs_adafactor_below_its_own_bound_of_lr():
    """That takes lr until it is above 1/√t, and clamps a product of r and c where eps is added to g² here."""
    theta, grads = drawn((5, 7), torch.float64)
    own, _ = follow(AdaLomo, theta, grads, lr=0.05, weight_decay=0.0)
    torchs, _ = follow(torch.optim.Adafactor, theta, grads, lr=0.05, weight_decay=0.0)
    np.testing.assert_allclose(own, torchs, rtol=0, atol=1e-12)


def test_a_first_gradient_whose_squares_have_rank_1_moves_by_its_signs():
    rng = np.random.default_rng(0)
    signs = np.sign(rng.normal(size=(6, 4)))
    g = signs * np.outer(rng.uniform(0.1, 10, 6), rng.uniform(0.1, 10, 4))
    own, _ = follow(AdaLomo, np.zeros((6, 4)), g[None], lr=1.0, scale_parameter=False)
    np.testing.assert_allclose(own, -signs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "count"), [((6, 8), 14), ((13,), 13), ((2, 3, 9), 2 * 12), ((1, 1), 2)])
def test_state_has_an_element_a_row_and_a_column(shape, count):
    _, state = follow(AdaLomo, *drawn(shape, torch.float64, 1))
    assert elements(state) == count


@pytest.mark.parametrize("size", [0.0, 1e-5, 1.0, 100.0])
def test_an_update_is_at_most_lr_in_units_of_the_weight(size):
    theta, grads = drawn((16, 12), torch.float64, steps=50)
    theta *= size
    for t in range(50):
        after, _ = follow(AdaLomo, theta, grads[: t + 1], weight_decay=0.0)
        before, _ = follow(AdaLomo, theta, grads[:t], weight_decay=0.0)
        assert rms(after - before) <= 1.000001e-3 * max(1e-3, rms(before))


def test_a_row_without_gradient_stays_where_others_are_huge():
    """As published, r over its mean is zero in float32, and its inverse root times zero is NaN."""
    g = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)) * 1e9
    g[1:] = 0
    square = g.square() + 1e-30
    r, c = square.mean(1), square.mean(0)
    assert ((r / r.mean()).rsqrt()[:, None] * c.rsqrt() * g).isnan().any()
    own, _ = follow(AdaLomo, np.ones((48, 32)), g[None].numpy(), torch.float32, lr=0.1, weight_decay=0.0)
    assert (own[1:] == 1).all() and np.isfinite(own).all() and (own[0] != 1).all()


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"eps": 0.0}, ValueError, r"eps=0.0 must be a number > 0: "),
        ({"decay_rate": 0}, ValueError, r"decay_rate=0 must be a number > 0: "),
        ({"scale_parameter": 1}, TypeError, r"scale_parameter=1 must be True or False"),
        ({"betas": (0.9, 0.999)}, TypeError, "betas"),
    ],
)
def test_wrong_options_are_named(options, error, sentence):
    with pytest.raises(error, match=sentence):
        AdaLomo([torch.nn.Parameter(torch.ones(3))], **options)
