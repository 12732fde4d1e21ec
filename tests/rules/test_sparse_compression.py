"""`misa_kernels.rules.SparseGradientCompression` against NumPy, a chunk and a column at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from misa_kernels.rules import SparseGradientCompression, sparse_compression
from misa_kernels.rules.pursuit import matching_pursuit

LR, BETAS, EPS, DECAY = 0.03, (0.9, 0.99), 1e-6, 0.1


def gradients(shape, steps, seed=0):
    return np.random.default_rng(seed).standard_normal((steps, *shape))


def stepped(optimizer, param, g):
    param.grad = torch.from_numpy(np.asarray(g)).to(param.dtype)
    optimizer.step()


def matrix(size, chunk, seed=0):
    drawn = torch.randn(size, chunk, generator=torch.Generator().manual_seed(seed)).double().numpy()
    # The rule divides in float32.
    return (drawn.astype(np.float32) / np.float32(math.sqrt(size))).astype(np.float64)


def pursued(y, A, sparsity):
    """Orthogonal matching pursuit with a least squares fit after each pick."""
    picked, x = [], np.zeros(A.shape[1])
    for _ in range(sparsity):
        rest = y - A @ x
        others = [j for j in range(A.shape[1]) if j not in picked]
        picked.append(max(others, key=lambda j: abs(A[:, j] @ rest)))
        x = np.zeros(A.shape[1])
        x[picked] = np.linalg.lstsq(A[:, picked], y, rcond=None)[0]
    return x


@pytest.mark.parametrize("together", [1024, 2])
@pytest.mark.parametrize("shape", [(8, 8), (7, 15), (3, 4, 5)])
def test_it_is_the_formula_in_numpy(shape, together, monkeypatch):
    monkeypatch.setattr(sparse_compression, "_TOGETHER", together)
    s, k, chunk = 3, 8, 16
    param = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = SparseGradientCompression([param], LR, BETAS, EPS, DECAY, sparsity=s, size=k, chunk=chunk, seed=4)
    numel = math.prod(shape)
    chunks = math.ceil(numel / chunk)
    length = math.ceil(numel / chunks)
    A = matrix(k, chunk, seed=4)[:, :length]
    w, m, v = np.ones(shape), np.zeros((chunks, k)), np.zeros((chunks, k))
    for t, g in enumerate(gradients(shape, 6), start=1):
        stepped(optimizer, param, g)
        flat, u = np.zeros(chunks * length), np.zeros(chunks * length)
        flat[:numel] = g.ravel()
        for c in range(chunks):
            part = flat[c * length : (c + 1) * length]
            p = sum(part[i] * A[:, i] for i in np.argsort(-np.abs(part))[:s])
            m[c], v[c] = BETAS[0] * m[c] + (1 - BETAS[0]) * p, BETAS[1] * v[c] + (1 - BETAS[1]) * p**2
            N = m[c] / (1 - BETAS[0] ** t) / (np.sqrt(v[c] / (1 - BETAS[1] ** t)) + EPS)
            u[c * length : (c + 1) * length] = pursued(N, A, s)
        w = (1 - LR * DECAY) * w - LR * u[:numel].reshape(shape)
        np.testing.assert_allclose(param.detach().numpy(), w, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(2000,), (), (0, 4), (7, 4), (1, 1)])
def test_what_is_too_small_is_updated_by_adam(shape):
    param, other = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for _ in range(2))
    optimizer = SparseGradientCompression([param], LR, BETAS, EPS, DECAY, sparsity=4, size=16, chunk=32)
    adam = torch.optim.AdamW([other], LR, BETAS, EPS, DECAY)
    for g in gradients(shape, 4):
        stepped(optimizer, param, g)
        stepped(adam, other, g)
    torch.testing.assert_close(param, other)


def test_pursuit_finds_sparse_vectors():
    rng = np.random.default_rng(0)
    A, x = rng.standard_normal((64, 256)) / 8, np.zeros((20, 256))
    for row in x:
        row[rng.choice(256, 4, replace=False)] = rng.choice([-1, 1], 4) * rng.uniform(1, 2, 4)
    found = matching_pursuit(torch.from_numpy(x @ A.T), torch.from_numpy(A), 4).numpy()
    exact = np.abs(found - x).max(axis=1) < 1e-9
    assert exact.sum() >= 19
    for row in found:
        assert (row != 0).sum() == 4


def test_pursuit_of_nothing_is_zero_and_of_anything_as_in_loops():
    rng = np.random.default_rng(1)
    A, y = rng.standard_normal((8, 20)), rng.standard_normal((5, 8))
    y[2] = 0
    found = matching_pursuit(torch.from_numpy(y), torch.from_numpy(A), 4).numpy()
    assert (found[2] == 0).all()
    for row, sums in zip(found, y, strict=True):
        np.testing.assert_allclose(row, pursued(sums, A, 4), atol=1e-10)


def test_directions_are_recovered_as_the_docstring_says():
    """At age 1 the direction is the signs of the sums, which is not A x of a sparse x."""
    g, A = torch.from_numpy(gradients((200, 1024), 1)[0]), torch.from_numpy(matrix(128, 1024))
    for sparsity, of_sums, of_signs in ((8, 1.0, 0.83), (16, 0.97, 0.39)):
        at = g.abs().topk(sparsity, dim=1).indices
        x = torch.zeros_like(g).scatter(1, at, g.gather(1, at))
        for y, cosine in ((x @ A.T, of_sums), ((x @ A.T).sign(), of_signs)):
            found = matching_pursuit(y, A, sparsity)
            assert torch.cosine_similarity(found, x).mean().item() == pytest.approx(cosine, abs=0.04)


def test_the_first_update_has_the_size_of_the_docstring():
    param = nn.Parameter(torch.zeros(64, 64))
    optimizer = SparseGradientCompression([param], 1.0, weight_decay=0.0)
    stepped(optimizer, param, gradients((64, 64), 1)[0])
    assert (param != 0).sum() == 4 * 8
    assert param.detach().square().mean().sqrt().item() == pytest.approx(math.sqrt(128 / 1024), rel=0.3)


def test_state_has_the_bytes_of_the_docstring():
    param = nn.Parameter(torch.zeros(64, 64))
    optimizer = SparseGradientCompression([param], LR)
    stepped(optimizer, param, gradients((64, 64), 1)[0])
    held = sum(value.nbytes for value in optimizer.state[param].values() if isinstance(value, torch.Tensor))
    assert held == 8 * 128 / 1024 * 64 * 64


@pytest.mark.parametrize(
    ("argument", "kind"),
    [
        ({"sparsity": 0}, ValueError),
        ({"size": 15}, ValueError),
        ({"size": 16.0}, TypeError),
        ({"chunk": 100}, ValueError),
        ({"seed": -1}, ValueError),
        ({"seed": 2**63}, ValueError),
    ],
)
def test_wrong_arguments_are_named(argument, kind):
    name, value = next(iter(argument.items()))
    with pytest.raises(kind, match=rf"^{name}={value!r} must be "):
        SparseGradientCompression([nn.Parameter(torch.zeros(6, 8))], **argument)
