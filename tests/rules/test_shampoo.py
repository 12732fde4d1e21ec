"""`misa_kernels.rules.Shampoo4bit` against NumPy, with a code that searches all levels, and against AdamW."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from misa_kernels.rules import Shampoo4bit
from misa_kernels.rules.linear_square import decode, encode

LR, BETAS, EPS, DECAY = 0.03, (0.9, 0.99), 1e-6, 0.1
LEVELS = [-(((15 - 2 * j) / 15) ** 2) for j in range(7)] + [0.0] + [((2 * j - 15) / 15) ** 2 for j in range(8, 16)]


def gradients(shape, steps, seed=0):
    return np.random.default_rng(seed).standard_normal((steps, *shape))


def stepped(optimizer, param, g):
    param.grad = torch.from_numpy(np.asarray(g)).to(param.dtype)
    optimizer.step()


def coded(A):
    """Return A with each entry at the nearest level times the largest of its 64."""
    flat, out = A.ravel(), np.zeros(A.size)
    for start in range(0, A.size, 64):
        scale = np.abs(flat[start : start + 64]).max()
        for i in range(start, min(start + 64, A.size)):
            out[i] = scale * min(LEVELS, key=lambda level: abs(flat[i] - scale * level))
    return out.reshape(A.shape)


class Side:
    """L or R in NumPy."""

    def __init__(self, size):
        self.A, self.root = np.zeros((size, size)), np.eye(size)

    def renew(self, M, beta, damping, vectors):
        values, U = np.linalg.eigh(beta * self.A + (1 - beta) * M)
        U = U * np.where((U * vectors).sum(axis=0) < 0, -1.0, 1.0)
        values = values.clip(min=0)
        root = U @ np.diag((values / values.max() + damping) ** -0.25) @ U.T
        diagonal = np.diag(np.diag(root))
        self.root = diagonal + coded(root - diagonal)
        # Of eigenvalue 0, any basis will do; half of the widest gap between levels is less than 1 / 8.
        sure = values > 1e-9 * values.max()
        assert np.abs(U - vectors)[:, sure].max() < 1 / 8
        if sure.all():
            np.testing.assert_allclose(coded(U), vectors, atol=1e-9)
        V = 1.5 * vectors - 0.5 * vectors @ vectors.T @ vectors
        self.A = V @ np.diag(values) @ V.T


@pytest.mark.parametrize("shape", [(6, 6), (7, 5), (9, 12), (3, 4, 5)])
def test_it_is_the_formula_in_numpy(shape):
    param = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    own = {"every": 3, "start": 4, "shampoo_beta": 0.8, "damping": 1e-3}
    optimizer = Shampoo4bit([param], LR, BETAS, EPS, DECAY, **own)
    rows = shape[0]
    L, R = Side(rows), Side(math.prod(shape[1:]))
    w, m, v = np.ones(shape), 0.0, 0.0
    for t, g in enumerate(gradients(shape, 10), start=1):
        stepped(optimizer, param, g)
        G = g.reshape(rows, -1)
        if t % 3 == 0:
            for name, side, M in (("L", L, G @ G.T), ("R", R, G.T @ G)):
                # Eigenvectors have no sign of their own: those of the rule are taken.
                state = optimizer.state[param]
                vectors = decode(state[f"{name}_vectors"], state[f"{name}_scales"], len(M)).numpy()
                side.renew(M, 0.8, 1e-3, vectors)
        if t >= 4:
            hat = L.root @ G @ R.root
            g = (hat * np.sqrt((G**2).sum() / (hat**2).sum())).reshape(shape)
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g**2
        u = m / (1 - BETAS[0] ** t) / (np.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
        w = (1 - LR * DECAY) * w - LR * u
        np.testing.assert_allclose(param.detach().numpy(), w, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((6, 8), {"start": 100, "every": 2}),
        # Roots are the identity until the first renewal.
        ((6, 8), {"start": 1, "every": 100}),
        ((6, 8), {"start": 1, "every": 1, "max_size": 7}),
        ((9,), {"start": 1, "every": 1}),
        ((), {"start": 1, "every": 1}),
        ((0, 3), {"start": 1, "every": 1}),
        ((1, 6), {"start": 1, "every": 1}),
        ((1, 1), {"start": 1, "every": 1}),
    ],
)
def test_without_preconditioners_it_is_adamw(shape, options):
    param, other = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for _ in range(2))
    optimizer = Shampoo4bit([param], LR, BETAS, EPS, DECAY, **options)
    adam = torch.optim.AdamW([other], LR, BETAS, EPS, DECAY)
    for g in gradients(shape, 6):
        stepped(optimizer, param, g)
        stepped(adam, other, g)
    torch.testing.assert_close(param, other)


def test_adamw_takes_a_gradient_of_the_same_norm():
    param = nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
    optimizer = Shampoo4bit([param], LR, (0.0, 0.99), every=2, start=1)
    for g in gradients((6, 8), 6):
        stepped(optimizer, param, g)
        torch.testing.assert_close(optimizer.state[param]["exp_avg"].norm().item(), np.linalg.norm(g))
    assert not np.allclose(optimizer.state[param]["exp_avg"].numpy(), g)


def test_zero_gradients_leave_the_identity():
    param = nn.Parameter(torch.zeros(6, 8))
    optimizer = Shampoo4bit([param], LR, every=1, start=1)
    for _ in range(3):
        stepped(optimizer, param, np.zeros((6, 8)))
    assert torch.equal(param, torch.zeros(6, 8))
    assert torch.equal(optimizer.state[param]["L_root_diagonal"], torch.ones(6))
    stepped(optimizer, param, gradients((6, 8), 1)[0])
    assert param.isfinite().all() and param.abs().amax() > 0


def test_it_gains_on_adamw_where_curvature_differs():
    """Least squares with inputs whose spectrum falls as 1 / j: .0032 against .0063 of the loss is left."""
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]
    x = torch.randn(256, 24, generator=generator) / torch.arange(1, 25) @ turn
    target = torch.randn(24, 16, generator=generator)
    losses = []
    for rule, options in ((Shampoo4bit, {"every": 10, "start": 10}), (torch.optim.AdamW, {})):
        weight = nn.Parameter(torch.zeros(24, 16))
        optimizer = rule([weight], 0.05, weight_decay=0.0, **options)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 300)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (x @ (weight - target)).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
    assert losses[0] < 0.75 * losses[1]


@pytest.mark.parametrize("size", [1, 5, 8, 9, 30])
def test_the_code_takes_the_nearest_level(size):
    A = gradients((size, size), 1)[0]
    np.testing.assert_allclose(decode(*encode(torch.from_numpy(A)), size).numpy(), coded(A), rtol=1e-12)
    assert torch.equal(decode(*encode(torch.zeros(size, size)), size), torch.zeros(size, size))


def test_levels_are_their_own_code():
    A = torch.tensor(LEVELS, dtype=torch.float64).repeat(16).view(16, 16)
    torch.testing.assert_close(decode(*encode(A), 16), A)


def test_one_step_brings_decoded_eigenvectors_nearer_to_orthogonal():
    U = np.linalg.qr(gradients((64, 64), 1)[0])[0]
    V = decode(*encode(torch.from_numpy(U)), 64).numpy()
    W = 1.5 * V - 0.5 * V @ V.T @ V
    far, near = (np.linalg.norm(X.T @ X - np.eye(64)) / 8 for X in (V, W))
    assert 0.1 < far < 0.2 and near < 0.03


def test_state_has_the_bytes_of_the_docstring():
    param = nn.Parameter(torch.zeros(64, 96))
    optimizer = Shampoo4bit([param], LR)
    stepped(optimizer, param, gradients((64, 96), 1)[0])
    held = sum(value.nbytes for value in optimizer.state[param].values() if isinstance(value, torch.Tensor))
    assert held == 8 * 64 * 96 + sum(1.125 * d**2 + 8 * d for d in (64, 96))


@pytest.mark.parametrize(
    ("argument", "kind"),
    [
        ({"every": 0}, ValueError),
        ({"start": 0}, ValueError),
        ({"max_size": 1.5}, TypeError),
        ({"shampoo_beta": 1.0}, ValueError),
        ({"damping": 0.0}, ValueError),
    ],
)
def test_wrong_arguments_are_named(argument, kind):
    name, value = next(iter(argument.items()))
    with pytest.raises(kind, match=rf"^{name}={value!r} must be "):
        Shampoo4bit([nn.Parameter(torch.zeros(6, 8))], **argument)
