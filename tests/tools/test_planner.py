"""The planner's formulas against what real shapes have, and what small runs hold and send."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks.train import llama
from docs import scaling
from misa_kernels import MISA, ImportanceSampler, param_groups
from misa_kernels.distributed import replicate
from misa_kernels.ranks.shards import local
from misa_kernels.tools.planner.fsdp import adamw_fsdp2, misa_fsdp2, misa_replicate
from misa_kernels.tools.planner.shapes import PRESETS, LlamaShape

# Sizes that four ranks divide.
SHAPE = LlamaShape(256, 64, 160, layers=4, heads=4, kv_heads=2)
DELTA = 0.2


def test_shapes_have_the_parameters_of_the_models_they_are_named_after():
    with torch.device("meta"):
        for shape in (PRESETS["llama3-8b"], SHAPE):
            assert sum(param.numel() for param in llama.Llama(shape).parameters()) == shape.numel
    # As published, in billions.
    published = {
        "llama3-8b": 8.03,
        "llama3-70b": 70.55,
        "llama3-405b": 405.85,
        "llama3.2-1b": 1.24,
        "llama3.2-3b": 3.21,
        "mistral-7b": 7.25,
        "qwen2.5-7b": 7.62,
        "qwen3-8b": 8.19,
        "qwen3-14b": 14.77,
        "qwen3-32b": 32.76,
    }
    assert {name: round(shape.numel / 1e9, 2) for name, shape in PRESETS.items()} == published


def test_the_page_is_what_the_formulas_give():
    assert scaling.PAGE.read_text(encoding="utf-8") == scaling.page()


class Sent:
    """Counts what FSDP2 hands to the collectives of a step, and what a ring would send of it."""

    # The names of torch before and from 2.13 on.
    COLLECTIVES = ("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single")

    def __init__(self, size):
        self.bytes = 0
        for name in self.COLLECTIVES:
            if not hasattr(dist, name):
                continue

            original = getattr(dist, name)

            def counted(*args, _original=original, **kwargs):
                # Input and output; the larger one is the whole.
                tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
                self.bytes += max(each.nbytes for each in tensors) * (size - 1) / size
                return _original(*args, **kwargs)

            setattr(dist, name, counted)


def held(model, optimizer):
    """Return the bytes of shards of weights, gradients and states on this rank."""
    weights = sum(local(param).nbytes for param in model.parameters())
    gradients = sum(local(param.grad).nbytes for param in model.parameters() if param.grad is not None)
    state = sum(
        local(value).nbytes
        for own in optimizer.state.values()
        for key, value in own.items()
        if key in ("exp_avg", "exp_avg_sq", "master")
    )
    return weights, gradients, state


def sharded(rank, size, method):
    torch.manual_seed(0)
    model = llama.Llama(SHAPE).to(torch.bfloat16 if method == "misa" else torch.float32)
    mesh = dist.init_device_mesh("cpu", (size,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mesh": mesh} | ({} if method == "misa" else {"mp_policy": policy})
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    if method == "misa":
        optimizer = MISA(param_groups(model), delta=DELTA, inner_steps=5, sampler=ImportanceSampler(least_recent=0))
        active = sum(optimizer.modules[number].numel for number in optimizer.active)
        depth = optimizer.monitor.current.backward_depth
    else:
        optimizer, active, depth = torch.optim.AdamW(model.parameters()), 0, SHAPE.layers
    tokens = torch.randint(256, (1, 16))
    model(tokens).backward()
    optimizer.step()
    optimizer.zero_grad()
    counted = Sent(size)
    model(tokens).backward()
    gradients = held(model, optimizer)[1]
    optimizer.step()
    weights, _, state = held(model, optimizer)
    return weights, gradients, state, counted.bytes, active, depth


@pytest.mark.parametrize("method", ["misa", "adamw"])
def test_what_fsdp2_holds_and_sends_is_what_the_planner_says(tmp_path, method):
    for found in ranks.run(4, tmp_path, sharded, 4, method):
        assert not isinstance(found, str), found
        weights, gradients, state, sent, active, depth = found
        delta = active / SHAPE.numel
        planned = misa_fsdp2(SHAPE, 4, delta, depth) if method == "misa" else adamw_fsdp2(SHAPE, 4)
        assert weights == planned.weights
        assert gradients == planned.gradients
        assert state == planned.states
        # FSDP2 rounds each unit's share up.
        assert sent == pytest.approx(planned.sent, rel=0.02)


def replicated(rank):
    torch.manual_seed(0)
    model = llama.Llama(SHAPE).to(torch.bfloat16)
    optimizer = MISA(param_groups(model), delta=DELTA, inner_steps=5)
    replica = replicate(model, optimizer)
    model(torch.randint(256, (1, 16))).backward()
    gradients = held(model, optimizer)[1]
    optimizer.step()
    weights, _, state = held(model, optimizer)
    active = sum(optimizer.modules[number].numel for number in optimizer.active)
    return weights, gradients, state, replica.reduced_bytes, active


def test_what_replicas_hold_and_send_is_what_the_planner_says(tmp_path):
    for weights, gradients, state, reduced, active in ranks.run(2, tmp_path, replicated):
        planned = misa_replicate(SHAPE, 2, active / SHAPE.numel)
        assert (weights, gradients, state) == (planned.weights, planned.gradients, planned.states)
        # A ring all-reduce of n bytes on two ranks sends n.
        assert reduced == pytest.approx(planned.sent)
