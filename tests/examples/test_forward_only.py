"""Are gradients from forward passes those of backward in the mean, is nothing else moved, and no activation kept?"""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from benchmarks.memory import PeakMemory
from examples.neighbours.forward_only import ForwardGradients
from misa_kernels import MISA, param_groups, slices


def build(sliced=False, lr=0.05, dtype=torch.float32, delta=0.3, **options):
    model = tiny.build(3, width=16, hidden=40).to(dtype)
    preset = slices() if sliced else {"inner_steps": 4}
    if "rule" not in options:
        options["lr"] = lr
    return model, MISA(param_groups(model), delta=delta, **preset, **options)


def dense(param):
    return param.grad.dense() if hasattr(param.grad, "dense") else param.grad


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("rank", [None, 4])
def test_the_estimate_is_the_slope_along_its_direction(sliced, rank):
    model, optimizer = build(sliced, dtype=torch.float64, backend="reference")
    tokens = tiny.batch(0)

    def loss():
        logits = model(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    before = copy.deepcopy(model.state_dict())
    loss().backward()
    true = {param: dense(param).clone() for param in optimizer.trained}
    optimizer.zero_grad()
    mean = ForwardGradients(optimizer, eps=1e-5, rank=rank)(loss)
    assert mean == pytest.approx(loss().item(), rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = {param: dense(param) for param in optimizer.trained}
    # g = (true . z) z, so that true . g = (true . z)^2 and |g|^2 = (true . z)^2 |z|^2.
    along = sum((true[param] * found[param]).sum() for param in true)
    slope = along.sqrt()
    square = sum(grad.square().sum() for grad in found.values())
    numel = sum((grad != 0).sum() for grad in found.values())
    assert along > 0
    if rank is None:
        assert (square / slope**2).item() == pytest.approx(numel.item(), rel=0.2)
        assert all(param.grad is None for param in model.parameters() if param not in true)
    else:
        for param in true:
            assert torch.linalg.matrix_rank(found[param], rtol=1e-5) <= rank
            assert optimizer.trained[param] is None or hasattr(param.grad, "part")


def test_in_the_mean_it_is_the_gradient():
    model, optimizer = build(delta=0.12)
    tokens = tiny.batch(0)
    tiny.loss_of(model, tokens).backward()
    true = {param: param.grad.clone() for param in optimizer.trained}
    gradients = ForwardGradients(optimizer, eps=1e-2)
    total = {param: torch.zeros_like(param) for param in true}
    for _ in range(600):
        gradients(lambda: tiny.loss_of(model, tokens))
        for param, sums in total.items():
            sums += param.grad
    assert gradients.forwards == 1200
    a, b = (torch.cat([own[param].flatten() for param in true]) for own in (true, total))
    numel = a.numel()
    # Of N calls in n dimensions the cosine is about sqrt(N / (N + n)).
    assert torch.cosine_similarity(a, b, dim=0) > 0.8 * (600 / (600 + numel)) ** 0.5


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("rule", [None, lambda params: torch.optim.SGD(params, lr=0.02)], ids=["adamw", "sgd"])
def test_training_learns_and_moves_nothing_else(sliced, rank, rule):
    options = {} if rule is None else {"rule": rule}
    model, optimizer = build(sliced, lr=5e-3, **options)
    gradients, tokens = ForwardGradients(optimizer, eps=1e-2, rank=rank, every=20), tiny.batch(0)
    before, moved, losses = copy.deepcopy(model.state_dict()), set(), []
    for _ in range(80):
        moved |= {name for name, param in model.named_parameters() if param in optimizer.trained}
        losses.append(gradients(lambda: tiny.loss_of(model, tokens)))
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-10:]) < sum(losses[:10])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and changed <= moved
    if sliced:
        # One set for the run.
        for name, param in model.named_parameters():
            if (piece := optimizer.trained.get(param)) is not None:
                rest = (param != before[name]).any(1 - piece.axis)
                assert not rest[: piece.first].any() and not rest[piece.last :].any()


def test_no_activation_is_kept():
    model, optimizer = build(delta=0.12)
    tokens, gradients = tiny.batch(0, length=512), ForwardGradients(optimizer)
    numel = sum(param.numel() for param in optimizer.trained)

    def forward():
        return tiny.loss_of(model, tokens)

    with PeakMemory() as inference, torch.no_grad():
        forward()
    with PeakMemory() as training:
        gradients(forward)
    with PeakMemory() as backward:
        forward().backward()
    # What is active three times for a moment: as it was, the direction, and their sum.
    assert training.peak_bytes <= inference.peak_bytes + 3.1 * 4 * numel
    assert training.peak_bytes < 0.6 * backward.peak_bytes


def test_a_failing_loss_leaves_the_weights_as_they_were():
    model, optimizer = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        ForwardGradients(optimizer)(lambda: 1 / 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_seed_gives_the_same_directions_and_subspaces_stay():
    (model, optimizer), (other, its) = build(), build()
    tokens = tiny.batch(0)
    mine, theirs = (ForwardGradients(own, rank=2, every=2, seed=3) for own in (optimizer, its))
    spans = []
    for _ in range(4):
        torch.randn(3)
        mine(lambda: tiny.loss_of(model, tokens))
        theirs(lambda: tiny.loss_of(other, tokens))
        pairs = list(zip(optimizer.trained, its.trained, strict=True))
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
        spans.append(pairs[0][0].grad.clone())
    ranks = [torch.linalg.matrix_rank(torch.cat(pair, 1), rtol=1e-4).item() for pair in (spans[:2], spans[1:3])]
    assert ranks == [2, 4]


def test_arguments_out_of_range_are_refused():
    _, optimizer = build()
    for options in ({"eps": 0.0}, {"rank": 0}, {"every": 0}):
        with pytest.raises(ValueError, match="must be above 0, None or 1 or more, and 1 or more"):
            ForwardGradients(optimizer, **options)


def test_both_passes_draw_the_same_dropout_and_the_next_step_another():
    model, optimizer = build()
    dropout, tokens, seen = torch.nn.Dropout(0.5), tiny.batch(0), []

    def loss():
        seen.append(dropout(torch.ones(64)))
        return tiny.loss_of(model, tokens) * seen[-1].mean()

    gradients = ForwardGradients(optimizer)
    for _ in range(2):
        gradients(loss)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[0], seen[2])
