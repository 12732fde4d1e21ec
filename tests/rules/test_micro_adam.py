"""`misa_kernels.rules.MicroAdam` against loops over single entries, and against AdamW where nothing is left out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from misa_kernels.rules import MicroAdam, micro_adam

LR, BETAS, EPS, DECAY = 0.03, (0.9, 0.99), 1e-6, 0.1


def gradients(shape, steps, seed=0):
    return np.random.default_rng(seed).standard_normal((steps, *shape))


def stepped(optimizer, param, g):
    param.grad = torch.from_numpy(np.asarray(g)).to(param.dtype)
    optimizer.step()


def rounded_to_bfloat16(x):
    """Round a float64 to float32 and that to bfloat16, to nearest even."""
    bits = int(np.float32(x).view(np.uint32))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(np.uint32(bits).view(np.float32))


class Loops:
    """The rule entry by entry, with a dict for each sparse gradient."""

    def __init__(self, numel, density, window, most):
        blocks = math.ceil(numel / most)
        self.length = 2 * math.ceil(numel / (2 * blocks))
        self.kept = math.ceil(self.length * density)
        self.window, self.ring, self.error = window, [], [0.0] * (blocks * self.length)

    def direction(self, g):
        a = [self.error[i] + (g[i] if i < len(g) else -self.error[i]) for i in range(len(self.error))]
        sparse = {}
        for start in range(0, len(a), self.length):
            block = range(start, start + self.length)
            for i in sorted(block, key=lambda i: -abs(a[i]))[: self.kept]:
                sparse[i] = rounded_to_bfloat16(a[i])
                a[i] = 0.0
            low, high = min(a[i] for i in block), max(a[i] for i in block)
            unit = (high - low) / 15
            for i in block:
                self.error[i] = low + (round((a[i] - low) / unit) * unit if unit else 0.0)
        self.ring = [sparse, *self.ring][: self.window]
        out = []
        for i in range(len(g)):
            weights = [[beta**r for r in range(len(self.ring))] for beta in BETAS]
            m = sum(w * kept.get(i, 0.0) for w, kept in zip(weights[0], self.ring, strict=True)) / sum(weights[0])
            v = sum(w * kept.get(i, 0.0) ** 2 for w, kept in zip(weights[1], self.ring, strict=True)) / sum(weights[1])
            out.append(m / (math.sqrt(v) + EPS))
        return np.array(out)


@pytest.mark.parametrize("most", [2**15, 16])
@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (1, 1), (2, 24)])
def test_it_is_the_formula_in_loops(shape, most, monkeypatch):
    monkeypatch.setattr(micro_adam, "_BLOCK", most)
    param = nn.Parameter(torch.ones(shape, dtype=torch.float64))
    optimizer = MicroAdam([param], LR, BETAS, EPS, DECAY, density=0.15, window=4)
    loops, w = Loops(param.numel(), 0.15, 4, most), np.ones(shape)
    for g in gradients(shape, 12):
        stepped(optimizer, param, g)
        w = (1 - LR * DECAY) * w - LR * loops.direction(g.ravel()).reshape(shape)
        np.testing.assert_allclose(param.detach().numpy(), w, rtol=1e-9, atol=1e-12)


def test_with_all_entries_and_a_long_window_it_is_adamw():
    """Of gradients that bfloat16 holds."""
    param, other = (nn.Parameter(torch.ones(6, 7, dtype=torch.float64)) for _ in range(2))
    optimizer = MicroAdam([param], LR, BETAS, EPS, DECAY, density=1.0, window=30)
    adam = torch.optim.AdamW([other], LR, BETAS, EPS, DECAY)
    for g in gradients((6, 7), 30):
        g = torch.from_numpy(g).bfloat16().double().numpy()
        stepped(optimizer, param, g)
        stepped(adam, other, g)
        torch.testing.assert_close(param, other)


@pytest.mark.parametrize("shape", [(64,), (), (0, 4)])
def test_tensors_of_one_dimension_are_updated_by_adam(shape):
    param, other = (nn.Parameter(torch.ones(shape, dtype=torch.float64)) for _ in range(2))
    optimizer, adam = MicroAdam([param], LR, BETAS, EPS, DECAY), torch.optim.AdamW([other], LR, BETAS, EPS, DECAY)
    for g in gradients(shape, 4):
        stepped(optimizer, param, g)
        stepped(adam, other, g)
    torch.testing.assert_close(param, other)


def test_a_gradient_that_stays_gives_one_at_every_age():
    """As published, with 1 - beta**age in the place of the sum of weights, it gives 1.45 at age 50, 6.5 in the end."""
    param = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    optimizer = MicroAdam([param], 1.0, eps=0.0, weight_decay=0.0, density=1.0)
    for age in range(1, 51):
        before = param.detach().clone()
        stepped(optimizer, param, np.ones((4, 4)))
        torch.testing.assert_close(before - param.detach(), torch.ones(4, 4, dtype=torch.float64))
        m, v = ((1 - beta) * sum(beta**r for r in range(min(age, 10))) for beta in (0.9, 0.999))
        published = m / (1 - 0.9**age) / math.sqrt(v / (1 - 0.999**age))
        assert age > 10 or published == pytest.approx(1.0)
    assert published == pytest.approx(1.45, abs=0.01)
    assert m / math.sqrt(v) == pytest.approx(6.53, abs=0.01)


def test_no_entry_moves_by_more_than_1_05():
    rng = np.random.default_rng(0)
    # The largest ratio of the two means, by Cauchy and Schwarz.
    a, b = (np.array([beta**r for r in range(10)]) for beta in (0.9, 0.999))
    most = math.sqrt(((a / a.sum()) ** 2 / (b / b.sum())).sum())
    assert most < 1.05
    param = nn.Parameter(torch.zeros(16, 16, dtype=torch.float64))
    optimizer = MicroAdam([param], 1.0, weight_decay=0.0, density=0.3)
    for _ in range(60):
        before = param.detach().clone()
        stepped(optimizer, param, rng.standard_normal((16, 16)) * 10 ** rng.uniform(-3, 3))
        assert (param.detach() - before).abs().amax() <= most


def test_small_entries_come_in_by_the_error():
    """Of three equal entries and one of half their size, of which one is kept at a time."""
    param = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = MicroAdam([param], LR, weight_decay=0.0, density=0.25)
    moved = torch.zeros(2, 2, dtype=torch.bool)
    for _ in range(12):
        before = param.detach().clone()
        stepped(optimizer, param, np.array([[1.0, 1.0], [1.0, 0.5]]))
        moved |= param.detach() != before
    assert moved.all()


def test_state_has_the_bytes_of_the_docstring():
    param = nn.Parameter(torch.zeros(512, 512))
    optimizer = MicroAdam([param], LR)
    stepped(optimizer, param, gradients((512, 512), 1)[0])
    held = sum(value.nbytes for value in optimizer.state[param].values() if isinstance(value, torch.Tensor))
    blocks = 512 * 512 // 2**15
    # The share of each block is rounded up to a whole number.
    assert held == 512 * 512 / 2 + 4 * 10 * blocks * math.ceil(0.01 * 2**15) + 8 * blocks
    assert held / 512**2 == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize(
    ("argument", "kind"),
    [
        ({"density": 0.0}, ValueError),
        ({"density": 1.5}, ValueError),
        ({"density": "all"}, TypeError),
        ({"window": 0}, ValueError),
        ({"window": 1.5}, TypeError),
    ],
)
def test_wrong_arguments_are_named(argument, kind):
    name, value = next(iter(argument.items()))
    with pytest.raises(kind, match=rf"^{name}={value!r} must be "):
        MicroAdam([nn.Parameter(torch.zeros(6, 8))], **argument)
