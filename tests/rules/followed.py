"""Weights and gradients that a rule and an account of it in NumPy both follow, and the rule's side of that."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

HYPER = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
# Float64 sums in another order; in float32 u has an error of some 2^-20, where it is a small difference or its
# denominator is, and 6 updates are 0.3 of it; a bfloat16 weight up to 4 is rounded 6 times by up to 2^-7.
ATOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6 * 2**-7}


def drawn(shape, dtype, steps=6, seed=0):
    """Return a weight and gradients of sizes that vary from step to step, in float64 but exact in `dtype`."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=shape)
    grads = rng.normal(size=(steps, *shape)) * 2.0 ** rng.integers(-3, 4, size=(steps, *[1] * len(shape)))
    theta, grads = (torch.tensor(x).to(dtype).double().numpy() for x in (theta, grads))
    return theta, grads


def follow(rule, theta, grads, dtype=torch.float64, **options):
    """Return the weight after the last gradient, in float64, and its state."""
    param = nn.Parameter(torch.tensor(theta, dtype=dtype))
    optimizer = rule([param], **options)
    for g in grads:
        param.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
    return param.detach().double().numpy(), optimizer.state[param]


def adamw(theta, grads, lr, betas, eps, weight_decay):
    """Return the weight after AdamW as in Loshchilov and Hutter, algorithm 2, in float64."""
    m = v = np.zeros_like(theta)
    for t, g in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        u = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        theta = theta - lr * (u + weight_decay * theta)
    return theta


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def elements(state):
    """Return how many elements the tensors of a state have."""
    return sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor))
