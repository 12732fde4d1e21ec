"""SubsetNorm against one row at a time in float64 NumPy, AdamW, and NumPy's singular value decomposition."""

import numpy as np
import pytest
import torch
from followed import ATOL, HYPER, adamw, drawn, elements, follow, rms

from misa_kernels.rules import SubsetNorm

SHAPES = [(6, 8), (8, 6), (5, 5), (13,), (1, 1), (2, 3, 9), (4, 3, 2)]


def account(theta, grads, q, lr, betas, eps, weight_decay):
    """Go through the rows of the longest axis, each with its number v; `q` is the basis, of all columns for None."""
    axis = int(np.argmax(theta.shape))
    theta = np.moveaxis(theta, axis, 0).copy()
    for i in range(len(theta)):
        m, v = 0.0, 0.0
        for t in range(len(grads)):
            g = np.take(grads[t], i, axis).ravel()
            inside = g if q is None else q @ (q.T @ g)
            m = betas[0] * m + (1 - betas[0]) * inside
            v = betas[1] * v + (1 - betas[1]) * sum(g**2) / len(g)
            direction = m / (1 - betas[0] ** (t + 1)) + (g - inside)
            u = direction / (np.sqrt(v / (1 - betas[1] ** (t + 1))) + eps)
            theta[i] -= lr * (u.reshape(theta[i].shape) + weight_decay * theta[i])
    return np.moveaxis(theta, 0, axis)


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("rank", [None, 1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_account(shape, rank, dtype):
    theta, grads = drawn(shape, dtype)
    own, state = follow(SubsetNorm, theta, grads, dtype, rank=rank, **HYPER)
    q = None
    if rank is not None:
        q = state["basis"].double().numpy()
        assert q.shape[1] == min(rank, theta.size // max(shape))
    np.testing.assert_allclose(own, account(theta, grads, q, **HYPER), rtol=0, atol=ATOL[dtype])


def test_a_vector_is_left_to_adamw():
    theta, grads = drawn((13,), torch.float64)
    own, _ = follow(SubsetNorm, theta, grads, **HYPER)
    np.testing.assert_allclose(own, adamw(theta, grads, **HYPER), rtol=0, atol=1e-12)


def test_rows_of_one_size_move_as_with_adamw():
    """Where the squares of a row are equal, their mean is each of them."""
    theta, grads = drawn((9, 4), torch.float64)
    grads = np.sign(grads) * abs(grads[:, :, :1])
    own, _ = follow(SubsetNorm, theta, grads, **HYPER)
    np.testing.assert_allclose(own, adamw(theta, grads, **HYPER), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [6, 100])
def test_a_subspace_of_all_coordinates_is_full_momentum(rank):
    theta, grads = drawn((8, 6), torch.float64)
    full, _ = follow(SubsetNorm, theta, grads, **HYPER)
    own, _ = follow(SubsetNorm, theta, grads, rank=rank, **HYPER)
    np.testing.assert_allclose(own, full, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e16])
def test_the_basis_is_orthonormal_and_spans_what_the_first_gradient_does(scale):
    rng = np.random.default_rng(0)
    g = scale * rng.normal(size=(40, 3)) @ rng.normal(size=(3, 24))
    _, state = follow(SubsetNorm, np.zeros((40, 24)), g[None], torch.float32, rank=3)
    q = state["basis"].double().numpy()
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(g @ q @ q.T / scale, g / scale, atol=1e-4)


def test_the_basis_comes_near_to_the_leading_singular_vectors():
    g = np.random.default_rng(0).normal(size=(64, 48))
    _, state = follow(SubsetNorm, np.zeros_like(g), g[None], rank=8)
    best = np.sum(np.linalg.svd(g)[1][:8] ** 2)
    assert np.sum((g @ state["basis"].numpy()) ** 2) > 0.8 * best


def test_the_basis_stays_as_it_was_and_is_the_same_in_every_run():
    theta, grads = drawn((8, 6), torch.float64)
    first, last, again = (follow(SubsetNorm, theta, grads[:n], rank=2)[1]["basis"] for n in (1, 6, 6))
    assert torch.equal(first, last) and torch.equal(last, again)


def test_a_first_gradient_of_zero_has_an_orthonormal_basis():
    own, state = follow(SubsetNorm, np.ones((5, 4)), np.zeros((1, 5, 4)), rank=2, weight_decay=0.0)
    np.testing.assert_array_equal(own, np.ones((5, 4)))
    np.testing.assert_allclose(state["basis"].T @ state["basis"], np.eye(2), atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "rank", "count"),
    [
        ((6, 8), None, 48 + 8),
        ((8, 6), 2, 8 * 2 + 6 * 2 + 8),
        ((13,), None, 13 + 13),
        ((2, 3, 9), 4, 9 * 4 + 6 * 4 + 9),
        ((5, 3), 100, 5 * 3 + 3 * 3 + 5),
    ],
)
def test_state_is_as_large_as_said(shape, rank, count):
    _, state = follow(SubsetNorm, *drawn(shape, torch.float64, 1), rank=rank)
    assert elements(state) == count


def test_the_first_update_has_the_size_of_adamws_where_it_has_not_as_published():
    g = np.random.default_rng(0).normal(size=(64, 48))
    q = np.linalg.svd(g)[2][:8].T
    numerator = 0.1 * g @ q @ q.T + (g - g @ q @ q.T)
    for reduce, published in ((np.mean, 7.75), (np.sum, 1.12)):
        as_published = numerator / np.sqrt(0.001 * reduce(g**2, 1, keepdims=True)) * np.sqrt(0.001) / 0.1
        assert rms(as_published) == pytest.approx(published, abs=0.1)
    for rank in (None, 8):
        own, _ = follow(SubsetNorm, np.zeros_like(g), g[None], lr=1.0, rank=rank)
        assert rms(own) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("rank", "error"), [(0, ValueError), (2.0, TypeError), (True, TypeError)])
def test_a_wrong_rank_is_named(rank, error):
    with pytest.raises(error, match=f"rank={rank} must be None or a whole number >= 1: "):
        SubsetNorm([torch.nn.Parameter(torch.ones(3))], rank=rank)
