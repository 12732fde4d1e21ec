"""FOAM against one block at a time in float64 NumPy, AdamW, and what its authors' formula gives."""

import numpy as np
import pytest
import torch
from followed import ATOL, HYPER, adamw, drawn, elements, follow, rms

from misa_kernels.rules import FOAM

SHAPES = [(6, 8), (5, 7), (13,), (1, 1), (2, 3, 9), (3, 2)]


def account(theta, grads, lr, betas, eps, weight_decay, level, alpha=1.0):
    """Go through the blocks one by one, each with two numbers of state."""
    theta = theta.copy()
    rows = theta.reshape(-1, theta.shape[-1])
    for i in range(len(rows)):
        for start in range(0, rows.shape[1], 2**level):
            block = slice(start, start + 2**level)
            m = v = 0.0
            for t in range(len(grads)):
                g = grads[t].reshape(rows.shape)[i, block]
                m = betas[0] * m + (1 - betas[0]) * sum(g) / len(g)
                v = betas[1] * v + (1 - betas[1]) * sum(g**2) / len(g)
                away = g - sum(g) / len(g)
                root = np.sqrt(v / (1 - betas[1] ** (t + 1)) + away**2) + eps
                u = alpha * (m / (1 - betas[0] ** (t + 1)) + away) / root
                rows[i, block] -= lr * (u + weight_decay * rows[i, block])
    return theta


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("level", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_account(shape, level, dtype):
    theta, grads = drawn(shape, dtype)
    own, _ = follow(FOAM, theta, grads, dtype, level=level, **HYPER)
    np.testing.assert_allclose(own, account(theta, grads, level=level, **HYPER), rtol=0, atol=ATOL[dtype])


def test_alpha_is_a_factor_of_the_update():
    theta, grads = drawn((5, 7), torch.float64)
    own, _ = follow(FOAM, theta, grads, alpha=0.25, **HYPER)
    np.testing.assert_allclose(own, account(theta, grads, level=2, alpha=0.25, **HYPER), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_level_0_is_adamw(shape):
    theta, grads = drawn(shape, torch.float64)
    own, _ = follow(FOAM, theta, grads, level=0, **HYPER)
    np.testing.assert_allclose(own, adamw(theta, grads, **HYPER), rtol=0, atol=1e-12)


def test_neighbours_that_agree_move_as_with_adamw():
    theta, grads = drawn((6, 3), torch.float64)
    theta, grads = np.repeat(theta, 4, -1), np.repeat(grads, 4, -1)
    own, _ = follow(FOAM, theta, grads, level=2, **HYPER)
    np.testing.assert_allclose(own, adamw(theta, grads, **HYPER), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "level", "blocks"),
    [((6, 8), 2, 6 * 2), ((5, 7), 2, 5 * 2), ((13,), 3, 2), ((2, 3, 9), 1, 30), ((4, 8), 9, 4)],
)
def test_state_has_two_elements_a_block(shape, level, blocks):
    _, state = follow(FOAM, *drawn(shape, torch.float64, 1), level=level)
    assert elements(state) == 2 * blocks


@pytest.mark.parametrize(("beta2", "published"), [(0.999, 0.33), (0.95, 1.98)])
def test_the_first_update_does_not_hang_on_betas_as_it_does_as_published(beta2, published):
    g = np.random.default_rng(0).normal(size=(512, 512))
    mean, square = (np.repeat(x.reshape(512, 128, 4).mean(-1), 4, -1) for x in (g, g**2))
    away = g - mean
    as_published = np.sqrt(1 - beta2) / 0.1 * (0.1 * mean + away) / np.sqrt((1 - beta2) * square + away**2)
    assert rms(as_published) == pytest.approx(published, abs=0.01)
    own, _ = follow(FOAM, np.zeros_like(g), g[None], lr=1.0, betas=(0.9, beta2))
    assert rms(own) == pytest.approx(0.72, abs=0.01)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"level": -1}, ValueError, r"level=-1 must be a whole number >= 0: "),
        ({"level": 1.5}, TypeError, r"level=1.5 must be a whole number >= 0: "),
        ({"alpha": 0.0}, ValueError, r"alpha=0.0 must be a number > 0: "),
    ],
)
def test_wrong_options_are_named(options, error, sentence):
    with pytest.raises(error, match=sentence):
        FOAM([torch.nn.Parameter(torch.ones(3))], **options)
