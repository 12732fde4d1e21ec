"""Integers stay what they are while their scales are trained, and gradients are those of the dequantised weight."""

from __future__ import annotations

import copy
import io

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from examples.neighbours.trained_scales import ScaledLinear, packed, quantise, unpacked
from misa_kernels import MISA, ImportanceSampler


def build(bits=4, group=16):
    model = tiny.build(3, width=32, hidden=64)
    model.requires_grad_(False)
    return model, quantise(model.blocks, bits, group)


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_are_packed_into_as_many_bits(bits):
    values = torch.randint(2**bits, (8, 5, 8), generator=torch.Generator().manual_seed(0))
    planes = packed(values, bits)
    assert planes.dtype == torch.uint8 and planes.numel() == values.numel() * bits // 8
    assert torch.equal(unpacked(planes, torch.int64), values.flatten())


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_the_weight_is_within_half_a_step_and_zero_is_exact(bits, bias):
    torch.manual_seed(0)
    layer = nn.Linear(64, 24, bias=bias)
    with torch.no_grad():
        layer.weight[3] = layer.weight[3].abs() + 1
        layer.weight[4, 16:32] = 0
        layer.weight[5, ::2] = 0
    scaled = ScaledLinear(layer, bits, 16)
    weight = scaled.weight(scaled.scale)
    step = scaled.scale.repeat_interleave(16, 1)
    assert ((weight - layer.weight).abs() <= 0.51 * step).all()
    assert torch.equal(weight[4, 16:32], torch.zeros(16)) and not weight[5, ::2].any()
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(scaled(x), F.linear(x, weight, layer.bias))


def test_gradients_are_those_of_the_dequantised_weight():
    torch.manual_seed(0)
    scaled = ScaledLinear(nn.Linear(48, 24), 4, 8).double()
    x = torch.randn(2, 5, 48, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 5, 24, dtype=torch.float64)
    found = torch.autograd.grad(scaled(x), (x, scaled.scale), g)
    weight = (scaled.levels(torch.float64) * scaled.scale.unsqueeze(-1)).view(24, 48)
    expected = torch.autograd.grad(F.linear(x, weight, scaled.bias), (x, scaled.scale), g)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    scaled.scale.requires_grad_(False)
    (only,) = torch.autograd.grad(scaled(x), (x,), g)
    torch.testing.assert_close(only, expected[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("granularity", ["module", "layer"])
def test_misa_trains_scales_and_the_format_survives(bits, granularity):
    model, groups = build(bits)
    integers = {name: buffer.clone() for name, buffer in model.named_buffers() if "planes" in name or "zero" in name}
    numel = sum(param.numel() for param in groups[0]["params"])
    # Seven matrices a layer.
    assert len(integers) == 2 * 3 * 7 and numel == sum(m.zero.numel() for m in model.modules() if hasattr(m, "zero"))
    sampler = ImportanceSampler(granularity=granularity)
    optimizer = MISA(groups, lr=3e-3, delta=0.4, inner_steps=5, sampler=sampler)
    assert len(optimizer.modules) == {"module": 21, "layer": 3}[granularity]
    # The tokens are random: only ones seen before can be learned.
    losses = [loss for _ in range(30) for loss in tiny.train(model, optimizer, 2)]
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4]) and len({tuple(r.active) for r in optimizer.monitor.rounds}) > 2
    optimizer.release()
    now = dict(model.named_buffers())
    assert all(torch.equal(now[name], before) for name, before in integers.items())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other, _ = build(bits)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(tiny.batch(0)), model(tiny.batch(0)))


def test_nothing_else_is_trained_and_adamw_takes_the_groups_too():
    model, groups = build()
    before = copy.deepcopy(model.state_dict())
    params = {id(param) for param in groups[0]["params"]}
    assert params == {id(param) for param in model.parameters() if param.requires_grad}
    tiny.train(model, torch.optim.AdamW(groups[0]["params"], lr=1e-3), 2)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith(".scale")}


def test_what_does_not_divide_is_refused():
    for bits, group in ((9, 16), (0, 16), (4, 24), (4, 4)):
        with pytest.raises(ValueError, match=f"bits={bits}, group={group} must be 1 to 8, and a multiple of 8"):
            ScaledLinear(nn.Linear(64, 8), bits, group)


def test_it_runs_under_autocast_and_takes_any_shape():
    torch.manual_seed(0)
    scaled = ScaledLinear(nn.Linear(64, 32), 4, 16)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = scaled(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    of_x, of_scale = x.grad.clone(), scaled.scale.grad.clone()
    assert of_x.dtype == of_scale.dtype == torch.float32
    x.grad = scaled.scale.grad = None
    scaled(x).sum().backward()
    torch.testing.assert_close(of_x, x.grad, rtol=0.05, atol=0.02)
    torch.testing.assert_close(of_scale, scaled.scale.grad, rtol=0.05, atol=0.3)
    one = torch.randn(64, requires_grad=True)
    scaled(one).sum().backward()
    assert one.grad.shape == (64,)


def test_layers_without_linear_ones_are_refused():
    with pytest.raises(ValueError, match=r"no layer has an nn\.Linear within"):
        quantise([nn.Sequential(nn.LayerNorm(8))])
