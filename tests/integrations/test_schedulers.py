"""Does every learning rate scheduler of torch drive MISA as it drives AdamW, with a float or a tensor as lr?"""

from __future__ import annotations

import inspect
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from misa_kernels import MISA, kernels

BACKENDS = ["reference", *(name for name in ("cpu",) if kernels.unusable(name) is None)]
STEPS = 24


def halving(step):
    return 0.5 ** (step // 3)


def shrinking(step):
    return 0.9


def chained(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 7), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


def sequential(optimizer):
    warmup, decay = lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5), lr_scheduler.CosineAnnealingLR(optimizer, 15)
    return lr_scheduler.SequentialLR(optimizer, [warmup, decay], [5])


# How each is built on an optimizer of two groups, such that it moves lr several times in `STEPS` steps.
SCHEDULERS = {
    "ChainedScheduler": chained,
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.3, 9),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20, 1e-4),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5, 2),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, [1e-3, 2e-3], [1e-2, 2e-2], 4, mode="triangular2"),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, [halving, shrinking]),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 12),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [5, 11, 12], 0.5),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, shrinking),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, [1e-2, 2e-2], total_steps=STEPS + 1),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 20, 2.0),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1),
    "SWALR": lambda optimizer: SWALR(optimizer, 1e-4, anneal_epochs=10),
    "SequentialLR": sequential,
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 4, 0.5),
}
CYCLES_MOMENTUM = {"CyclicLR", "OneCycleLR"}
# All by the best step there is; by every step, and with tensors as lr, one of each way in which torch sets lr.
KINDS = ("ChainedScheduler", "CyclicLR", "ExponentialLR", "LambdaLR", "OneCycleLR", "ReduceLROnPlateau", "SequentialLR")
CASES = [(name, False, BACKENDS[-1]) for name in SCHEDULERS]
CASES += [(name, True, backend) for name in KINDS for backend in BACKENDS]
LR, BETAS, WEIGHT_DECAY = (1e-2, 3e-3), (0.9, 0.99), 0.1


def advance(scheduler, step):
    """Step it; the metric improves for a third of the run and then not."""
    scheduler.step(
        *([1.0 / min(step + 1, STEPS // 3)] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])
    )


def seen(optimizer):
    """What a step would be taken with: lr and betas of each group, as plain numbers."""
    return [(float(group["lr"]), *map(float, group["betas"])) for group in optimizer.param_groups]


def matrices(count=8):
    torch.manual_seed(0)
    return nn.ParameterList(nn.Parameter(torch.randn(5, 7)) for _ in range(count))


def groups_of(params, tensor=False):
    """Two groups, each with its own lr."""
    halves = params[: len(params) // 2], params[len(params) // 2 :]
    lrs = [torch.tensor(lr, dtype=torch.float64) if tensor else lr for lr in LR]
    return [{"params": list(half), "lr": lr} for half, lr in zip(halves, lrs, strict=True)]


def adamw_of(params):
    return torch.optim.AdamW(groups_of(params), betas=BETAS, weight_decay=WEIGHT_DECAY)


def misa_of(params, tensor, **options):
    """Two of eight matrices a round of five steps, each begun with fresh state."""
    options = {"delta": 0.25, "inner_steps": 5, "keep_states": "none"} | options
    groups = [{**group, "role": "sampled"} for group in groups_of(params, tensor)]
    return MISA(groups, betas=BETAS, weight_decay=WEIGHT_DECAY, **options)


def backward(params, step):
    """Give each parameter that wants one its gradient of this step."""
    generator = torch.Generator().manual_seed(step)
    grads = [torch.randn(p.shape, generator=generator) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g if p.requires_grad else None


def test_the_table_holds_every_scheduler_of_torch():
    found = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler"} | {"SWALR"} == set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_the_table_moves_what_it_is_here_for(name):
    optimizer = adamw_of(matrices())
    scheduler, course = SCHEDULERS[name](optimizer), []
    for step in range(STEPS):
        course.append(seen(optimizer))
        optimizer.step()
        advance(scheduler, step)
    lr, beta1, beta2 = np.array(course)[:, 0].T
    assert len({*lr}) >= 2 and len({*beta2}) == 1
    assert (len({*beta1}) >= 3) == (name in CYCLES_MOMENTUM)


@pytest.mark.parametrize("name, tensor, backend", CASES)
def test_delta_one_is_adamw_under_the_same_scheduler(name, tensor, backend):
    theirs, ours = matrices(4), matrices(4)
    misa = misa_of(ours, tensor, delta=1.0, keep_states="staying", backend=backend)
    pairs = [(optimizer, SCHEDULERS[name](optimizer)) for optimizer in (adamw_of(theirs), misa)]
    tensors = [group["lr"] for group in misa.param_groups]
    largest = [p.detach().abs() for p in theirs]
    for step in range(STEPS):
        for params, (optimizer, scheduler) in zip((theirs, ours), pairs, strict=True):
            backward(params, step)
            optimizer.step()
            advance(scheduler, step)
        largest = [torch.maximum(scale, p.detach().abs()) for scale, p in zip(largest, theirs, strict=True)]
    assert misa.backend == backend
    # Filled in place, as torch's schedulers do, and never replaced by us.
    assert not tensor or all(a is group["lr"] for a, group in zip(tensors, misa.param_groups, strict=True))
    for p, q, scale in zip(theirs, ours, largest, strict=True):
        # Decay and update round to half an ulp of the weight each, on either side.
        assert ((p - q).abs() / (scale * 2.0**-23)).max() <= 2 * STEPS


@pytest.mark.parametrize("name, tensor, backend", CASES)
def test_each_step_of_a_round_uses_what_the_scheduler_says(name, tensor, backend):
    """Active weights follow AdamWs made anew in each round, whose lr and betas come from a scheduler elsewhere."""
    params = matrices()
    optimizer = misa_of(params, tensor, backend=backend)
    twin = adamw_of(matrices())
    schedulers = [SCHEDULERS[name](each) for each in (optimizer, twin)]
    for step in range(STEPS):
        if step % 5 == 0:
            active = [[p for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
            peers = [[p.detach().clone() for p in group] for group in active]
            adamw = torch.optim.AdamW([{"params": group} for group in peers], weight_decay=WEIGHT_DECAY)
        pairs = [pair for group in zip(active, peers, strict=True) for pair in zip(*group, strict=True)]
        assert len(pairs) == 2
        for ours, theirs in zip(adamw.param_groups, twin.param_groups, strict=True):
            ours.update(lr=theirs["lr"], betas=theirs["betas"])
        np.testing.assert_allclose(seen(optimizer), seen(twin), rtol=1e-12)
        backward(params, step)
        for p, peer in pairs:
            peer.grad = p.grad.clone()
        for each in (optimizer, adamw, twin):
            each.step()
        for p, peer in pairs:
            torch.testing.assert_close(p.detach(), peer, rtol=1e-6, atol=1e-6)
        for scheduler in schedulers:
            advance(scheduler, step)
    assert len(optimizer.monitor.rounds) == 5 and len({record.active for record in optimizer.monitor.rounds}) > 2


@pytest.mark.parametrize("name, tensor, backend", CASES)
def test_scheduler_and_optimizer_resume_together_in_mid_round(name, tensor, backend):
    def build():
        params = matrices()
        optimizer = misa_of(params, tensor, keep_states="staying", backend=backend)
        return params, optimizer, SCHEDULERS[name](optimizer)

    def go_on(parts, steps):
        params, optimizer, scheduler = parts
        for step in steps:
            backward(params, step)
            optimizer.step()
            advance(scheduler, step)
        return seen(optimizer)

    trained = build()
    before = go_on(trained, range(7))
    file = io.BytesIO()
    states = [part.state_dict() for part in trained]
    torch.save(states, file)
    after = go_on(trained, range(7, STEPS))
    assert before != after
    # What was saved is not what the scheduler goes on filling.
    assert [float(group["lr"]) for group in states[1]["param_groups"]] == [lr for lr, *_ in before]
    file.seek(0)
    resumed = build()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert all(isinstance(group["lr"], torch.Tensor) == tensor for group in resumed[1].param_groups)
    assert go_on(resumed, range(7, STEPS)) == after
    assert all(map(torch.equal, resumed[0], trained[0]))


def test_a_rate_that_is_set_after_a_refused_step_counts():
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = MISA([p], delta=1.0, lr=0.5, weight_decay=0.0)
    p.grad = torch.ones(4, 4).to_sparse()
    with pytest.raises(TypeError, match="MISA updates dense gradients"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.25
    p.grad = torch.ones(4, 4)
    optimizer.step()
    # At age 1 the step is lr, whatever the gradient.
    torch.testing.assert_close(p.detach(), torch.full((4, 4), 0.75))
