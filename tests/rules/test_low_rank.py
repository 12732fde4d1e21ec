"""`misa_kernels.rules.LowRankAdam` against loops in NumPy, a rotated Adam, and counted draws."""

from __future__ import annotations

import io
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import nn

from misa_kernels.rules import LowRankAdam
from misa_kernels.rules.projectors import projector

KINDS = list(product(("svd", "importance", "random"), ("dropped", "sgd", "normalised")))
LR, BETAS, EPS, DECAY = 0.03, (0.9, 0.99), 1e-6, 0.1


def gradients(shape, steps, seed=0):
    return np.random.default_rng(seed).standard_normal((steps, *shape))


def stepped(optimizer, param, g):
    param.grad = torch.from_numpy(np.asarray(g)).to(param.dtype)
    optimizer.step()


def residual_by_columns(kind, E, R, N, v_hat):
    out = np.zeros_like(E)
    for j in range(E.shape[1]):
        if kind == "sgd":
            out[:, j] = E[:, j] / (max(np.sqrt(v_hat.mean()), np.sqrt((E**2).mean())) + EPS)
        elif kind == "normalised":
            ratio = np.sqrt((N[:, j] ** 2).sum()) / (np.sqrt((R[:, j] ** 2).sum()) + EPS)
            most = np.sqrt(len(E)) / (np.sqrt((E[:, j] ** 2).sum()) + EPS)
            out[:, j] = min(ratio, most) * E[:, j]
    return out


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (3, 4, 5), (6, 6)])
@pytest.mark.parametrize(("kind", "residual"), KINDS)
def test_it_is_the_formula_in_numpy(kind, residual, shape):
    every, rank = 3, 2
    param = nn.Parameter(torch.from_numpy(gradients(shape, 1, seed=5)[0]))
    options = {"rank": rank, "every": every, "projector": kind, "residual": residual}
    optimizer = LowRankAdam([param], LR, BETAS, EPS, DECAY, **options)
    w = param.detach().numpy().copy()
    for t, g in enumerate(gradients(shape, 8), start=1):
        stepped(optimizer, param, g)
        G = g.reshape(shape[0], -1)
        turned = G.shape[0] > G.shape[1]
        G = G.T if turned else G
        if (t - 1) % every == 0:
            age, m, v = 0, 0.0, 0.0
            P = np.linalg.svd(G)[0][:, :rank] if kind == "svd" else optimizer.state[param]["projector"].numpy().copy()
        age += 1
        R = np.einsum("pr,pq->rq", P, G)
        m, v = BETAS[0] * m + (1 - BETAS[0]) * R, BETAS[1] * v + (1 - BETAS[1]) * R**2
        v_hat = v / (1 - BETAS[1] ** age)
        N = m / (1 - BETAS[0] ** age) / (np.sqrt(v_hat) + EPS)
        E = G - P @ np.linalg.lstsq(P, G, rcond=None)[0]
        u = P @ N + residual_by_columns(residual, E, R, N, v_hat)
        w = (1 - LR * DECAY) * w - LR * (u.T if turned else u).reshape(shape)
        np.testing.assert_allclose(param.detach().numpy(), w, rtol=1e-9, atol=1e-11)


def test_all_singular_vectors_are_adam_in_a_rotated_basis():
    param = nn.Parameter(torch.zeros(5, 9, dtype=torch.float64))
    optimizer = LowRankAdam([param], LR, weight_decay=0.0, rank=5)
    grads = gradients((5, 9), 20)
    U = np.linalg.svd(grads[0])[0]
    rotated = nn.Parameter(torch.zeros(5, 9, dtype=torch.float64))
    adam = torch.optim.AdamW([rotated], LR, weight_decay=0.0)
    for g in grads:
        stepped(optimizer, param, g)
        stepped(adam, rotated, U.T @ g)
    np.testing.assert_allclose(param.detach().numpy(), U @ rotated.detach().numpy(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("shape", [(64,), (), (0, 4), (3, 9), (1, 1), (9, 1, 2)])
def test_what_is_too_small_is_updated_by_adam(shape):
    param, other = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for _ in range(2))
    optimizer = LowRankAdam([param], LR, BETAS, EPS, DECAY, rank=4)
    adam = torch.optim.AdamW([other], LR, BETAS, EPS, DECAY)
    for g in gradients(shape, 4):
        stepped(optimizer, param, g)
        stepped(adam, other, g)
    torch.testing.assert_close(param, other)


@pytest.mark.parametrize("residual", ["sgd", "normalised"])
@pytest.mark.parametrize("kind", ["svd", "importance", "random"])
def test_updates_are_bounded_with_a_residual(kind, residual):
    """Also where almost all of the gradient is in the residual."""
    rng = np.random.default_rng(0)
    for scales in (np.ones(50), 1.3 ** np.arange(50), 0.7 ** np.arange(50), np.where(np.arange(50) == 9, 1e6, 1.0)):
        param = nn.Parameter(torch.zeros(24, 40))
        optimizer = LowRankAdam([param], 1.0, weight_decay=0.0, rank=2, projector=kind, residual=residual)
        for t, scale in enumerate(scales):
            before = param.detach().clone()
            # After the first gradient, only what is outside of its row.
            rows = (np.arange(24) == 0) if t == 0 else (np.arange(24) > 0)
            stepped(optimizer, param, scale * rows[:, None] * rng.standard_normal((24, 40)))
            assert (param.detach() - before).square().mean().sqrt() < 4


def test_importance_draws_in_proportion_to_the_singular_values():
    """Counted pairs against the sum over the orders in which they can be drawn."""
    sigma = np.array([4.0, 2.0, 1.0, 0.5])
    U = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    G = torch.from_numpy(U * sigma)
    draws, counts = 4000, np.zeros((4, 4))
    for draw in range(draws):
        P = projector(G, 2, "importance", str(draw)).numpy()
        first, second = np.abs(U.T @ P).argmax(axis=0)
        np.testing.assert_allclose(np.abs(U.T @ P).max(axis=0), 1.0)
        counts[first, second] += 1
    total = sigma.sum()
    for i, j in permutations(range(4), 2):
        if i < j:
            chance = sigma[i] / total * sigma[j] / (total - sigma[i]) + sigma[j] / total * sigma[i] / (total - sigma[j])
            deviation = np.sqrt(chance * (1 - chance) / draws)
            assert abs(counts[i, j] / draws - chance) < 4 * deviation, (i, j)


def test_a_random_projector_keeps_the_expected_norm():
    g = torch.randn(30, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norms = [(projector(g, 3, "random", str(draw)).T @ g).square().sum() / g.square().sum() for draw in range(3000)]
    # The mean of chi-squares over 3 has a variance of 2 / 3.
    assert abs(float(torch.stack(norms).mean()) - 1) < 4 * np.sqrt(2 / 3 / 3000)


def test_draws_are_those_of_the_seed_the_tensor_and_the_renewal():
    def drawn(seed, steps):
        params = [nn.Parameter(torch.zeros(6, 8)) for _ in range(2)]
        optimizer = LowRankAdam(params, LR, rank=2, every=2, projector="random", seed=seed)
        for _ in range(steps):
            for param in params:
                param.grad = torch.ones(6, 8)
            optimizer.step()
        return [optimizer.state[param]["projector"].clone() for param in params]

    first = drawn(0, 1)
    assert all(map(torch.equal, first, drawn(0, 2)))
    for other in (first[1], drawn(1, 1)[0], drawn(0, 3)[0]):
        assert not torch.equal(first[0], other)


def test_a_tensor_that_begins_after_a_load_draws_as_it_would_have():
    params = [nn.Parameter(torch.zeros(6, 8)) for _ in range(3)]
    optimizer = LowRankAdam(params, LR, rank=2, projector="importance")
    grads = gradients((6, 8), 3)
    for param, g in zip(params[:2], grads, strict=False):
        param.grad = torch.from_numpy(g).float()
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = LowRankAdam(copies, LR, rank=2, projector="importance")
    resumed.load_state_dict(torch.load(file, weights_only=True))
    # Looking at a state makes an empty one.
    assert not resumed.state[copies[2]]
    for own, param in ((optimizer, params[2]), (resumed, copies[2])):
        stepped(own, param, grads[2])
        assert own.state[param]["number"] == 2
    assert torch.equal(params[2], copies[2])


@pytest.mark.parametrize("kind", ["svd", "importance", "random"])
def test_a_first_gradient_of_zeros_harms_nothing(kind):
    param = nn.Parameter(torch.zeros(6, 8))
    optimizer = LowRankAdam([param], LR, rank=2, projector=kind, residual="normalised")
    stepped(optimizer, param, np.zeros((6, 8)))
    assert torch.equal(param, torch.zeros(6, 8))
    stepped(optimizer, param, gradients((6, 8), 1)[0])
    assert param.isfinite().all() and param.abs().amax() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_state_has_the_bytes_of_the_docstring(dtype):
    param = nn.Parameter(torch.zeros(40, 24, dtype=dtype))
    optimizer = LowRankAdam([param], LR, rank=4)
    stepped(optimizer, param, gradients((40, 24), 1)[0])
    tensors = [value for value in optimizer.state[param].values() if isinstance(value, torch.Tensor)]
    a_parameter = 4 * 4 * (2 / 24 + 1 / 40) * (2 if dtype == torch.float64 else 1)
    assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(a_parameter * 40 * 24)


@pytest.mark.parametrize(
    ("argument", "kind"),
    [
        ({"rank": 0}, ValueError),
        ({"rank": 2.0}, TypeError),
        ({"every": 0}, ValueError),
        ({"projector": "qr"}, ValueError),
        ({"residual": None}, ValueError),
        ({"seed": -1}, ValueError),
    ],
)
def test_wrong_arguments_are_named(argument, kind):
    name, value = next(iter(argument.items()))
    with pytest.raises(kind, match=rf"^{name}={value!r} must be "):
        LowRankAdam([nn.Parameter(torch.zeros(6, 8))], **argument)
