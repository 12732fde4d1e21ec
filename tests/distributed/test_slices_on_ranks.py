"""Several processes that train slices: only these travel, ranks stay equal, and what cannot be is refused."""

from __future__ import annotations

import re

import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from misa_kernels import MISA, UniformSampler, param_groups
from misa_kernels.distributed import replicate
from misa_kernels.gradients.sliced import SlicedGradient

SIZE, STEPS = 2, 11


def misa(model, hold=1, reach="all", **changes):
    sampler = UniformSampler(granularity="slice", slices=reach, hold_rounds=hold)
    return MISA(param_groups(model), **({"lr": 1e-2, "delta": 0.2, "inner_steps": 3, "sampler": sampler} | changes))


def build(layers=3):
    return tiny.build(layers, hidden=48)


def part(step, rank):
    """This rank's part of a batch of 4."""
    rows = 4 // SIZE
    return tiny.batch(step)[rank * rows : (rank + 1) * rows]


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def places(model, optimizer):
    names = {id(param): name for name, param in model.named_parameters()}
    return {names[id(param)]: tuple(place) for param, place in optimizer.trained.items() if place is not None}


def numel_of(place, shape):
    axis, first, last = place
    return (last - first) * shape[1 - axis]


def assert_close(found, expected, atol=2e-5):
    for name, weight in expected.items():
        # Averages of parts are rounded once more than the mean of the whole.
        torch.testing.assert_close(found[name], weight, rtol=0, atol=atol, msg=name)


def replicated(rank, options, is_accumulated, bound):
    model = build()
    with torch.no_grad():
        for param in model.parameters():
            # What replicate() sends must make up for it.
            param.add_(float(rank))
    optimizer = misa(model, **options)
    replica = replicate(model, optimizer)
    drawn, norms = [], []
    for step in range(STEPS):
        before = replica.reduced_bytes
        if is_accumulated:
            with replica.no_sync():
                (tiny.loss_of(model, part(step + 50, rank)) / 2).backward()
            assert replica.reduced_bytes == before
        (tiny.loss_of(model, part(step, rank)) / (1 + is_accumulated)).backward()
        drawn.append(places(model, optimizer))
        expected = sum(
            numel_of(drawn[-1][name], param.shape) if name in drawn[-1] else param.numel() * param.requires_grad
            for name, param in model.named_parameters()
        )
        # Not a byte more travels than the slices have.
        assert replica.reduced_bytes - before == 4 * expected
        for name, param in model.named_parameters():
            assert isinstance(param.grad, SlicedGradient) == (name in drawn[-1])
        if bound is not None:
            norms.append(clip_grad_norm_(model.parameters(), bound).item())
        optimizer.step()
        optimizer.zero_grad()
    optimizer.release()
    return weights(model), drawn, norms


def as_one_process(options, is_accumulated, bound):
    model = build()
    optimizer = misa(model, **options)
    norms = []
    for step in range(STEPS):
        if is_accumulated:
            (tiny.loss_of(model, tiny.batch(step + 50)) / 2).backward()
        (tiny.loss_of(model, tiny.batch(step)) / (1 + is_accumulated)).backward()
        if bound is not None:
            norms.append(clip_grad_norm_(model.parameters(), bound).item())
        optimizer.step()
        optimizer.zero_grad()
    optimizer.release()
    return weights(model), norms


@pytest.mark.parametrize(
    ("options", "is_accumulated", "bound"),
    [
        ({}, False, None),
        ({"hold": "run", "reach": "down", "delta": 0.03}, True, 0.05),
        ({"reach": "output", "max_grad_norm": 0.05}, False, None),
    ],
    ids=["redrawn", "fixed, accumulated, clipped by the loop", "clipped in the step"],
)
def test_replicas_train_slices_as_one_process_with_the_whole_batch(tmp_path, options, is_accumulated, bound):
    answers = ranks.run(SIZE, tmp_path, replicated, options, is_accumulated, bound)
    assert not any(isinstance(answer, str) for answer in answers), answers
    expected, norms = as_one_process(options, is_accumulated, bound)
    for found, drawn, seen in answers:
        assert_close(found, expected)
        assert seen == pytest.approx(norms, rel=1e-5)
        assert all(torch.equal(weight, answers[0][0][name]) for name, weight in found.items())
        assert drawn == answers[0][1]
        assert len({str(each) for each in drawn}) == (1 if options.get("hold") == "run" else 4)


def beside_dense(rank):
    model = build()
    groups = param_groups(model, dense=[model.head])
    optimizer = MISA(
        groups, lr=1e-2, delta=0.2, inner_steps=3, sampler=UniformSampler(granularity="slice", slices="all")
    )
    replica = replicate(model, optimizer)
    for step in range(4):
        before = replica.reduced_bytes
        tiny.loss_of(model, part(step, rank)).backward()
        own = places(model, optimizer)
        params = dict(model.named_parameters())
        sliced = sum(numel_of(place, params[name].shape) for name, place in own.items())
        assert replica.reduced_bytes - before == 4 * (sliced + model.head.weight.numel())
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def test_dense_parameters_travel_whole_beside_slices(tmp_path):
    found, there = ranks.run(SIZE, tmp_path, beside_dense)
    assert not isinstance(found, str), found
    assert all(torch.equal(weight, there[name]) for name, weight in found.items())


class Routed(nn.Module):
    """Blocks of which a pass uses those it is told."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(tiny.Decoder(16, 48) for _ in range(3))

    def forward(self, x, used):
        return sum(self.blocks[number](x).square().mean() for number in used)


def inputs(rank):
    return torch.linspace(-1, 1, 2 * 6 * 16).view(2, 6, 16) + rank


def routed(rank, used_by_step):
    model = Routed()
    optimizer = misa(model, inner_steps=50)
    replica = replicate(model, optimizer)
    grads, sent = [], []
    for used in used_by_step:
        before = replica.reduced_bytes
        loss = model(inputs(rank), used[rank])
        if used[rank]:
            loss.backward()
        optimizer.step()
        sent.append(replica.reduced_bytes - before)
        grads.append({name: None if p.grad is None else p.grad.part.clone() for name, p in model.named_parameters()})
        optimizer.zero_grad()
    return weights(model), grads, sent


def test_a_layer_without_gradient_on_a_rank_counts_there_as_zero(tmp_path):
    # Block 2 is used nowhere in the first step; in the second one rank 1 has no gradient at all.
    used = [([0, 1], [1]), ([0, 2], []), ([2], [0, 1])]
    answers = ranks.run(SIZE, tmp_path, routed, used)
    assert not any(isinstance(answer, str) for answer in answers), answers
    (w0, g0, sent), (w1, g1, sent_there) = answers
    model = Routed()
    optimizer = misa(model, inner_steps=50)
    total = 4 * sum(
        numel_of(place, model.get_parameter(name).shape) for name, place in places(model, optimizer).items()
    )
    assert sent == sent_there == [total] * len(used)
    for step, both in enumerate(used):
        losses = [model(inputs(rank), both[rank]) for rank in range(SIZE) if both[rank]]
        (sum(losses) / SIZE).backward()
        for name, param in model.named_parameters():
            if param.grad is None:
                assert g0[step][name] is None and g1[step][name] is None
            else:
                torch.testing.assert_close(g0[step][name], param.grad.part)
                assert torch.equal(g0[step][name], g1[step][name])
        optimizer.step()
        optimizer.zero_grad()
    assert_close(w0, weights(model))
    assert all(torch.equal(w0[name], w1[name]) for name in w0)


def wrapped(rank, when, is_head_dense):
    model = build()
    groups = lambda: param_groups(model, dense=[model.head] if is_head_dense else [])  # noqa: E731
    make = lambda: MISA(groups(), delta=0.2, sampler=UniformSampler(granularity="slice"))  # noqa: E731
    ddp = DistributedDataParallel(model) if when == "before" else None
    optimizer = make()
    ddp = DistributedDataParallel(model) if ddp is None else ddp
    before = weights(model)
    tiny.loss_of(ddp, part(0, rank)).backward()
    try:
        optimizer.step()
    finally:
        assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


OURS = (
    r"DistributedDataParallel averages gradients of whole parameters, and with granularity='slice' there are none: "
    r"train the model itself and average with misa_kernels.distributed.replicate\(model, optimizer\)$"
)
TORCHS = "DistributedDataParallel is not needed when a module doesn't have any parameter that requires a gradient"


@pytest.mark.parametrize(
    ("when", "is_head_dense", "sentence"),
    [("before", False, OURS), ("after", False, TORCHS), ("before", True, OURS), ("after", True, OURS)],
)
def test_ddp_is_refused_on_all_ranks(tmp_path, when, is_head_dense, sentence):
    answers = ranks.run(SIZE, tmp_path, wrapped, when, is_head_dense)
    assert answers[0] == answers[1]
    assert re.match(f"RuntimeError: {sentence}", answers[0]), answers[0]


class Own(UniformSampler):
    """Draws another set on each rank from round 1 on."""

    def draw(self, candidates, budget, round, seed):
        return super().draw(candidates, budget, round, seed + (dist.get_rank() if round else 0))


def unlike(rank, fault):
    model = build()
    sampler = (Own if fault == "draw" else UniformSampler)(granularity="slice", slices="all", hold_rounds=1)
    seed = rank if fault == "seed" else 0
    optimizer = MISA(
        param_groups(model), delta=0.2, inner_steps=3, sampler=sampler, seed=seed, process_group=dist.group.WORLD
    )
    for step in range(7):
        tiny.loss_of(model, part(step, rank)).backward()
        for param in model.parameters():
            if fault != "gradients" and param.grad is not None:
                # As a loop of one's own averages.
                dist.all_reduce(param.grad)
                param.grad /= SIZE
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("seed", r"what MISA begins with .* there is seed 0 on rank 0 and 1 on rank 1: give every"),
        ("gradients", r"first step of round 0 must be .* on rank 0 and .* on rank 1: .*replicate\(model"),
        ("draw", r"the active set of round 1 must be the same on all ranks, and there .* rank 0 and .* rank 1"),
    ],
)
def test_ranks_that_differ_are_told_so_on_all_of_them(tmp_path, fault, sentence):
    answers = ranks.run(SIZE, tmp_path, unlike, fault)
    assert answers[0] == answers[1]
    assert re.search(sentence, answers[0]), answers[0]


def test_gradients_that_the_loop_averages_train_as_one_process(tmp_path):
    answers = ranks.run(SIZE, tmp_path, unlike, "")
    assert not any(isinstance(answer, str) for answer in answers), answers
    model = build()
    optimizer = misa(model, lr=1e-3)
    for step in range(7):
        tiny.loss_of(model, tiny.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in answers:
        assert_close(found, weights(model))
        assert all(torch.equal(weight, answers[0][name]) for name, weight in found.items())
