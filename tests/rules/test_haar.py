"""HaarAdam against the Haar basis written out as a matrix in float64 NumPy, AdamW, and its authors' formula."""

import numpy as np
import pytest
import torch
from followed import ATOL, HYPER, adamw, drawn, elements, follow, rms

from misa_kernels.rules import HaarAdam

SHAPES = [(6, 8), (5, 7), (13,), (1, 1), (2, 3, 9), (3, 2)]


def basis(width):
    """Return the Haar functions on `width` points as rows of norm 1, the constant one first."""
    rows = [np.ones(width)]
    support = width
    while support > 1:
        for start in range(0, width, support):
            row = np.zeros(width)
            row[start : start + support // 2] = 1
            row[start + support // 2 : start + support] = -1
            rows.append(row)
        support //= 2
    return np.array([row / np.linalg.norm(row) for row in rows])


def account(theta, grads, lr, betas, eps, weight_decay, level, clip=1.0):
    """Go through the blocks one by one, each with one coarse coefficient; what is left is elements of AdamW."""
    theta, width = theta.copy(), 2**level
    rows = theta.reshape(-1, theta.shape[-1])
    whole = rows.shape[1] // width * width
    blocks = [slice(start, start + width) for start in range(0, whole, width)]
    for i in range(len(rows)):
        for block in blocks + [slice(j, j + 1) for j in range(whole, rows.shape[1])]:
            haar = basis(len(rows[i, block]))
            m = v = 0.0
            for t in range(len(grads)):
                coefficients = haar @ grads[t].reshape(rows.shape)[i, block]
                m = betas[0] * m + (1 - betas[0]) * coefficients[0]
                v = betas[1] * v + (1 - betas[1]) * coefficients[0] ** 2
                scaled = coefficients / (np.sqrt(v / (1 - betas[1] ** (t + 1))) + eps)
                scaled = np.minimum(np.maximum(scaled, -clip), clip)
                scaled[0] = m / (1 - betas[0] ** (t + 1)) / (np.sqrt(v / (1 - betas[1] ** (t + 1))) + eps)
                rows[i, block] -= lr * (haar.T @ scaled + weight_decay * rows[i, block])
    return theta


@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_account(shape, level, dtype):
    theta, grads = drawn(shape, dtype)
    own, _ = follow(HaarAdam, theta, grads, dtype, level=level, **HYPER)
    np.testing.assert_allclose(own, account(theta, grads, level=level, **HYPER), rtol=0, atol=ATOL[dtype])


@pytest.mark.parametrize("clip", [0.3, 2.0, 1e6])
def test_clip_bounds_each_scaled_detail(clip):
    theta, grads = drawn((5, 11), torch.float64)
    own, _ = follow(HaarAdam, theta, grads, clip=clip, **HYPER)
    np.testing.assert_allclose(own, account(theta, grads, level=2, clip=clip, **HYPER), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("shape", "level"), [((6, 8), 0), ((5, 7), 0), ((13,), 4), ((1, 1), 1), ((2, 3, 5), 3)])
def test_level_0_and_axes_shorter_than_a_block_are_adamw(shape, level):
    theta, grads = drawn(shape, torch.float64)
    own, _ = follow(HaarAdam, theta, grads, level=level, **HYPER)
    np.testing.assert_allclose(own, adamw(theta, grads, **HYPER), rtol=0, atol=1e-12)


def test_neighbours_that_agree_move_as_with_adamw_over_the_root_of_their_number():
    theta, grads = np.zeros((6, 12)), np.repeat(drawn((6, 3), torch.float64)[1], 4, -1)
    hyper = HYPER | {"eps": 0.0, "weight_decay": 0.0}
    own, _ = follow(HaarAdam, theta, grads, level=2, **hyper)
    np.testing.assert_allclose(own, adamw(theta, grads, **hyper) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "level", "coefficients"),
    [((6, 8), 2, 6 * 2), ((5, 7), 2, 5 * (1 + 3)), ((13,), 3, 1 + 5), ((4, 8), 9, 32)],
)
def test_state_has_two_elements_a_coefficient_of_the_coarse_part_and_the_rest(shape, level, coefficients):
    _, state = follow(HaarAdam, *drawn(shape, torch.float64, 1), level=level)
    assert elements(state) == 2 * coefficients


@pytest.mark.parametrize("seed", range(5))
def test_the_first_update_is_bounded_where_it_is_not_as_published(seed):
    """Details of the first step as published: over the root of an uncorrected v, then times √(1 − β₂) / (1 − β₁)."""
    g = np.random.default_rng(seed).normal(size=(64, 64))
    coefficients = g.reshape(64, 16, 4) @ basis(4).T
    as_published = coefficients / (np.sqrt(0.001) * abs(coefficients[..., :1]) + 1e-6)
    as_published[..., 0] *= 0.1
    assert rms(as_published) * np.sqrt(0.001) / 0.1 > 50
    own, _ = follow(HaarAdam, np.zeros_like(g), g[None], lr=1.0)
    assert rms(own) == pytest.approx(0.85, abs=0.02)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"level": -1}, ValueError, r"level=-1 must be a whole number >= 0: "),
        ({"level": True}, TypeError, r"level=True must be a whole number >= 0: "),
        ({"clip": 0.0}, ValueError, r"clip=0.0 must be a number > 0: "),
    ],
)
def test_wrong_options_are_named(options, error, sentence):
    with pytest.raises(error, match=sentence):
        HaarAdam([torch.nn.Parameter(torch.ones(3))], **options)
