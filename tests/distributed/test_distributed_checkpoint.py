"""Distributed checkpoints: saved on four ranks, resumed on as many as there are."""

from __future__ import annotations

import pytest
import ranks
import sharded as shards
import tiny
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from misa_kernels import MISA, param_groups
from misa_kernels.distributed import load

# Saved in the middle of the second round.
BEFORE, STEPS = 8, 18
OPTIONS = {"lr": 1e-2, "delta": 0.2, "inner_steps": 5}


def make(size, seed=0):
    model = tiny.build(hidden=41)
    if size > 1:
        shards.shard(model, size, "layers")
    return model, MISA(param_groups(model, "pretrain"), seed=seed, **OPTIONS)


def train(model, optimizer, start, stop, rank, size):
    rows = 4 // size
    for step in range(start, stop):
        tiny.loss_of(model, tiny.batch(step)[rank * rows : (rank + 1) * rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(rank, size, folder):
    model, optimizer = make(size)
    train(model, optimizer, 0, BEFORE, rank, size)
    content = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(content, checkpoint_id=folder)
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    train(model, optimizer, BEFORE, STEPS, rank, size)
    return shards.weights(model), [r.active for r in optimizer.monitor.rounds], full


def resumed(rank, size, folder):
    # Weights, active set and position of a run that has gone elsewhere.
    model, optimizer = make(size)
    train(model, optimizer, 30, 41, rank, size)
    weights = get_model_state_dict(model)
    dcp.load({"model": weights}, checkpoint_id=folder)
    set_model_state_dict(model, weights)
    load(model, optimizer, folder)
    at = (optimizer.monitor.current.round, optimizer._run.clock.round_step)
    train(model, optimizer, BEFORE, STEPS, rank, size)
    return shards.weights(model), optimizer.active, at


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    answers = ranks.run(4, tmp_path_factory.mktemp("ranks"), saved, 4, folder)
    assert not isinstance(answers[0], str), answers[0]
    return folder, *answers[0]


@pytest.mark.parametrize("size", [4, 2, 1])
def test_a_run_resumed_in_mid_round_on_fewer_ranks_goes_on_as_without_interruption(tmp_path, uninterrupted, size):
    folder, expected, active, _ = uninterrupted
    for found in ranks.run(size, tmp_path, resumed, size, folder):
        assert not isinstance(found, str), found
        weights, last_active, at = found
        assert at == (1, 3)
        assert tuple(last_active) == active[-1]
        for name, weight in expected.items():
            # Other ranks, other order of sums.
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4)


def test_a_full_state_dict_of_four_ranks_loads_on_one(uninterrupted):
    folder, expected, active, full = uninterrupted
    model, optimizer = make(1)
    weights = get_model_state_dict(model)
    dcp.load({"model": weights}, checkpoint_id=folder)
    model.load_state_dict(weights)
    with pytest.raises((RuntimeError, ValueError), match=r"Missing optimizer state|set_optimizer_state_dict"):
        # torch drops what is frozen now, which is another set than was saved.
        set_optimizer_state_dict(model, optimizer, full)
    optimizer.load_state_dict(full)
    train(model, optimizer, BEFORE, STEPS, 0, 1)
    assert optimizer.active == list(active[-1])
    for name, weight in expected.items():
        torch.testing.assert_close(shards.weights(model)[name], weight, rtol=0, atol=1e-4)


def test_a_checkpoint_without_the_optimizer_is_refused(tmp_path, uninterrupted):
    model, optimizer = make(1)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="has no 'optim': name what the optimizer was saved as"):
        load(model, optimizer, uninterrupted[0], key="optim")
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert not dist.is_initialized()
