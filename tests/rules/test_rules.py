"""What holds for every rule of `misa_kernels.rules`: bounded from zero state, exact to resume, dtypes, arguments."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from misa_kernels import rules

RULES = [getattr(rules, name) for name in rules.__all__]
# What a rule is given beside lr, where its defaults are for larger tensors than these.
OPTIONS: dict[str, dict[str, object]] = {
    # lr is else in units of the weight, which is zero, or grows, in some of these.
    "AdaLomo": {"scale_parameter": False},
    "LowRankAdam": {"rank": 4, "every": 10},
    "MicroAdam": {"density": 0.1},
    "Shampoo4bit": {"every": 3, "start": 3},
    "SparseGradientCompression": {"sparsity": 6, "size": 64, "chunk": 96},
}
# What has to hold beside the defaults where options change what a step does.
VARIANTS: list[tuple[type, dict[str, object]]] = [
    (rules.FOAM, {"level": 1}),
    (rules.FOAM, {"level": 5}),
    (rules.HaarAdam, {"level": 1}),
    (rules.HaarAdam, {"level": 5}),
    (rules.SubsetNorm, {"rank": 1}),
    (rules.SubsetNorm, {"rank": 8}),
]
# Of a rule that moves one entry in sixteen at a time, more are needed.
STEPS = {"SparseGradientCompression": 1500}
SHAPES = [(48, 32), (32, 48), (7, 5), (64,), (1, 1), (3, 4, 5)]


def made(rule, params, lr=1e-2, **options):
    return rule(params, lr=lr, **OPTIONS.get(rule.__name__, {}) | options)


def weights(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def train(optimizer, params, steps, seed=1, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)
        optimizer.step()


GRADIENTS = {
    "noise": lambda x, t: x,
    "tiny": lambda x, t: 1e-12 * x,
    "huge": lambda x, t: 1e12 * x,
    "the same": lambda x, t: torch.ones_like(x),
    "one row": lambda x, t: x * (torch.arange(len(x)) == 0).view(-1, *[1] * (x.ndim - 1)),
    "one spike": lambda x, t: x * (1e4 if t == 10 else 1.0),
    "growing": lambda x, t: x * 1.2**t,
    "fading": lambda x, t: x * 0.8**t,
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize(("rule", "options"), [(rule, {}) for rule in RULES] + VARIANTS)
def test_updates_from_zero_state_are_bounded(rule, options, kind):
    """No element-wise mean of an update is far beyond AdamW's, which are about lr, at ages 1 to 50."""
    params = weights(shapes=[(48, 32), (32, 48), (64,)])
    optimizer = made(rule, params, lr=1.0, weight_decay=0.0, **options)
    generator = torch.Generator().manual_seed(1)
    for t in range(1, 51):
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = GRADIENTS[kind](torch.randn(param.shape, generator=generator), t)
        optimizer.step()
        for param, old in zip(params, before, strict=True):
            rms = (param.detach() - old).square().mean().sqrt().item()
            assert rms < 4, f"update {t} of {tuple(param.shape)} has an RMS of {rms}"


@pytest.mark.parametrize("rule", RULES)
def test_a_saved_run_goes_on_to_the_bit(rule):
    params = weights()
    optimizer = made(rule, params)
    train(optimizer, params, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = made(rule, copies)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for own, trained in ((optimizer, params), (resumed, copies)):
        train(own, trained, 5, seed=2)
    for param, copy in zip(params, copies, strict=True):
        assert torch.equal(param, copy)


@pytest.mark.parametrize("rule", RULES)
def test_state_of_16_bit_weights_is_that_of_float32(rule):
    params = weights(torch.bfloat16)
    optimizer = made(rule, params)
    train(optimizer, params, 3)
    wide = weights()
    other = made(rule, wide)
    train(other, wide, 3)
    loaded = made(rule, weights(torch.bfloat16))
    loaded.load_state_dict(optimizer.state_dict())
    again = [own for group in loaded.param_groups for own in group["params"]]
    for param, reference, copy in zip(params, wide, again, strict=True):
        for name, value in other.state[reference].items():
            if isinstance(value, torch.Tensor):
                assert optimizer.state[param][name].dtype == loaded.state[copy][name].dtype == value.dtype, name


@pytest.mark.parametrize("rule", RULES)
def test_zero_gradients_change_nothing_but_by_decay(rule):
    params = weights()
    before = [param.detach().clone() for param in params]
    optimizer = made(rule, params, lr=0.5, weight_decay=0.0)
    train(optimizer, params, 3, scale=0.0)
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param, old)


@pytest.mark.parametrize("rule", RULES)
def test_decay_is_decoupled(rule):
    """With zero gradients a weight shrinks by 1 - lr * weight_decay a step."""
    params = weights(torch.float64)
    before = [param.detach().clone() for param in params]
    train(made(rule, params, lr=0.5, weight_decay=0.1), params, 2, scale=0.0)
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close(param.detach(), 0.95**2 * old)


@pytest.mark.parametrize("rule", RULES)
def test_a_tensor_without_gradient_stays_as_it_is(rule):
    params = weights()
    optimizer = made(rule, params)
    params[0].grad = torch.ones_like(params[0])
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before) and not optimizer.state[params[1]]


@pytest.mark.parametrize("rule", RULES)
def test_it_learns(rule):
    """Least squares: a rule reaches a hundredth of the loss that it begins with."""
    generator = torch.Generator().manual_seed(3)
    x, target = torch.randn(256, 24, generator=generator), torch.randn(24, 16, generator=generator)
    weight = nn.Parameter(torch.zeros(24, 16))
    optimizer = made(rule, [weight], lr=0.05, weight_decay=0.0)
    steps = STEPS.get(rule.__name__, 300)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (x @ (weight - target)).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0], losses[-1] / losses[0]


@pytest.mark.parametrize("rule", RULES)
def test_wrong_arguments_are_named(rule):
    for name, value in (("lr", -1.0), ("weight_decay", -0.1)):
        with pytest.raises(ValueError, match=name):
            rule(weights(), **{"lr": 1e-2} | {name: value})
    sparse = nn.Embedding(4, 3, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        rule([sparse.weight], lr=1e-2).step()


@pytest.mark.parametrize("rule", RULES)
def test_bias_is_corrected_for_the_age_of_each_tensor(rule):
    """A tensor whose first gradient comes late moves as in an optimizer of its own."""
    late, alone = weights(shapes=[(7, 5)]), weights(shapes=[(7, 5)])
    early = weights(shapes=[(7, 5)], seed=1)
    optimizer = made(rule, early + late)
    train(optimizer, early, 7)
    train(optimizer, late, 3, seed=2)
    train(made(rule, alone), alone, 3, seed=2)
    assert torch.equal(late[0], alone[0])


@pytest.mark.parametrize("rule", RULES)
def test_a_group_that_is_refused_is_not_added(rule):
    optimizer = made(rule, weights(shapes=[(7, 5)]))
    with pytest.raises(ValueError, match="eps=-1"):
        optimizer.add_param_group({"params": weights(shapes=[(3,)]), "eps": -1.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": weights(shapes=[(3,)]), "lr": 0.1})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.1]


class NoReads(TorchDispatchMode):
    """Refuses what would wait for a device: the value of a tensor, or a shape that hangs on values."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(read in func.name() for read in self.READS), func.name()
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if "::index" in func.name() else []
        assert not masks, func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rule", "options"), [(rule, {}) for rule in RULES] + VARIANTS)
def test_no_step_reads_a_tensor_on_the_host(rule, options):
    params = weights()
    optimizer = made(rule, params, **options)
    with NoReads():
        train(optimizer, params, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("rule", "options"), [(rule, {}) for rule in RULES] + VARIANTS)
def test_weights_have_any_shape(rule, options, dtype):
    shapes = [(), (1,), (3,), (0,), (0, 3), (3, 0), (2, 0, 3), (1, 7), (7, 1), (2, 3, 4, 5)]
    params = weights(dtype, shapes)
    before = [param.detach().clone() for param in params]
    train(made(rule, params, lr=0.1, **options), params, 3)
    for param, old in zip(params, before, strict=True):
        assert param.isfinite().all() and (old.numel() == 0 or not torch.equal(param, old)), tuple(param.shape)
