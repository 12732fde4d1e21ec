"""Sharded parameters: FSDP2 on several processes trains as one process does."""

from __future__ import annotations

import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from sharded import shard, weights, whole
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from misa_kernels import MISA, authors, param_groups
from misa_kernels.distributed import replicate

OPTIONS = {"lr": 1e-2, "delta": 0.2, "inner_steps": 5}


def build(hidden, dtype):
    return tiny.build(hidden=hidden, dtype=dtype)


def groups_of(model, mode, weight_decay):
    groups = param_groups(model, mode)
    # Two groups with hyperparameters of their own.
    groups[-1]["weight_decay"] = weight_decay
    return groups


def run(model, optimizer, steps, rank, size, poison):
    rows = 4 // size
    for step in range(steps):
        loss = tiny.loss_of(model, tiny.batch(step)[rank * rows : (rank + 1) * rows])
        if step == poison:
            # On one rank alone; with all of the batch on the only one.
            loss = loss * (float("nan") if rank == size - 1 else 1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def fsdp(rank, size, how, hidden, dtype, mode, options, steps, poison):
    model = build(hidden, dtype)
    shard(model, size, how)
    optimizer = MISA(groups_of(model, mode, 0.1), **(OPTIONS | options))
    run(model, optimizer, steps, rank, size, poison)
    state = {
        name: {key: whole(value) for key, value in optimizer.state[param].items()}
        for name, param in model.named_parameters()
        if param.requires_grad
    }
    for name, param in model.named_parameters():
        if param.requires_grad:
            # Shards as the parameter's own.
            for key in ("exp_avg", "exp_avg_sq"):
                kept = optimizer.state[param][key]
                assert isinstance(kept, DTensor) and kept.placements == param.placements, name
    skipped = optimizer.skipped_steps
    rounds = [(r.active, r.importance) for r in optimizer.monitor.rounds]
    optimizer.release()
    return weights(model), state, rounds, skipped, optimizer.backend or "cpu"


def one_process(hidden, dtype, mode, options, steps, poison):
    model = build(hidden, dtype)
    optimizer = MISA(groups_of(model, mode, 0.1), **(OPTIONS | options))
    run(model, optimizer, steps, 0, 1, poison)
    state = {
        name: {key: whole(value) for key, value in optimizer.state[param].items()}
        for name, param in model.named_parameters()
        if param.requires_grad
    }
    rounds = [(r.active, r.importance) for r in optimizer.monitor.rounds]
    skipped = optimizer.skipped_steps
    optimizer.release()
    return weights(model), state, rounds, skipped


F32, BF16 = torch.float32, torch.bfloat16
CASES = {
    # 41 rows on two ranks are 21 and 20.
    "a layer at a time": (2, "layers", 41, F32, "finetune", {}, None),
    # 3 rows on four ranks leave the last one without any.
    "root only, empty shards, clipped": (4, "root", 3, F32, "pretrain", {"max_grad_norm": 0.3, "delta": 0.4}, None),
    "a single rank": (1, "layers", 41, F32, "finetune", {"max_grad_norm": 0.3}, None),
    "a NaN on one rank": (2, "layers", 41, F32, "finetune", {"skip_nonfinite": True, "max_grad_norm": 1.0}, 3),
    "the authors' scores, plain PyTorch": (2, "root", 41, F32, "finetune", authors() | {"backend": "reference"}, None),
    "the authors' scores": (2, "layers", 3, F32, "pretrain", authors() | {"max_grad_norm": 0.3, "delta": 0.4}, None),
    "replicas of shards": (4, "hybrid", 41, F32, "finetune", {"max_grad_norm": 0.3}, None),
    "bfloat16 with masters": (2, "layers", 41, BF16, "finetune", {}, None),
    "bfloat16 in forward and backward": (2, "mixed", 41, F32, "finetune", {}, None),
}
# Shards change the order of sums, and with AdamW's first steps a gradient near 0 its sign; bfloat16 rounds all of it.
TOLERANCE = {F32: 1e-4, BF16: 3e-2}


@pytest.mark.parametrize("case", CASES)
def test_fsdp2_trains_as_one_process_with_the_whole_batch(tmp_path, case):
    size, how, hidden, dtype, mode, options, poison = CASES[case]
    steps = 17
    answers = ranks.run(size, tmp_path, fsdp, size, how, hidden, dtype, mode, options, steps, poison)
    for answer in answers:
        assert not isinstance(answer, str), answer
    expected, state, rounds, skipped = one_process(hidden, dtype, mode, options, steps, poison)
    low = dtype == BF16 or how == "mixed"
    atol = TOLERANCE[BF16 if low else F32]
    for found, kept, drawn, found_skipped, _ in answers:
        assert found_skipped == skipped == (0 if poison is None else 1)
        for (active, importance), (expected_active, expected_importance) in zip(drawn, rounds, strict=True):
            assert active == expected_active
            torch.testing.assert_close(
                torch.from_numpy(importance),
                torch.from_numpy(expected_importance),
                rtol=0.1 if low else 1e-3,
                atol=0,
                equal_nan=True,
            )
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=atol)
            assert torch.equal(found[name], answers[0][0][name])
        assert kept.keys() == state.keys()
        for name, own in state.items():
            assert kept[name].keys() == own.keys()
            assert kept[name]["age"] == own["age"] and kept[name]["exp_avg"].shape == own["exp_avg"].shape
            if not low:
                torch.testing.assert_close(kept[name]["exp_avg"], own["exp_avg"], rtol=1e-2, atol=1e-4)


def memory(rank, size):
    model = tiny.build(layers=4, width=64, hidden=128)
    shard(model, size, "layers")
    optimizer = MISA(param_groups(model), **OPTIONS)
    run(model, optimizer, 1, rank, size, None)
    return optimizer.state_bytes


def test_the_state_is_sharded_too(tmp_path):
    sharded = ranks.run(4, tmp_path, memory, 4)
    model = tiny.build(layers=4, width=64, hidden=128)
    optimizer = MISA(param_groups(model), **OPTIONS)
    run(model, optimizer, 1, 0, 1, None)
    # A quarter, and the padding of slots.
    for found in sharded:
        assert optimizer.state_bytes / 4 <= found <= optimizer.state_bytes / 4 + 8 * 128 * 28


def tensor_parallel(rank, placements):
    """Shard every matrix of the model in one way; the forward pass gathers what it needs."""
    mesh = dist.init_device_mesh("cpu", (2,))
    model = tiny.build(hidden=41)
    reference = tiny.build(hidden=41)
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            kind = placements if param.ndim == 2 else [Replicate()]
            module.register_parameter(name, torch.nn.Parameter(distribute_tensor(param.detach(), mesh, kind)))
    optimizer = MISA(param_groups(model, "pretrain"), max_grad_norm=0.3, **OPTIONS)
    plain = MISA(param_groups(reference, "pretrain"), max_grad_norm=0.3, **OPTIONS)
    for step in range(12):
        tiny.loss_of(reference, tiny.batch(step)).backward()
        for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert ours.requires_grad == theirs.requires_grad, name
            if theirs.grad is not None:
                ours.grad = distribute_tensor(theirs.grad, mesh, ours.placements)
        optimizer.step()
        plain.step()
        optimizer.zero_grad()
        plain.zero_grad()
        assert optimizer.active == plain.active
    return weights(model), weights(reference)


@pytest.mark.parametrize("dim", [0, 1])
def test_norms_of_tensor_parallel_matrices_are_those_of_the_whole(tmp_path, dim):
    for found, expected in ranks.run(2, tmp_path, tensor_parallel, [Shard(dim)]):
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)


def refused(rank, options):
    model = tiny.build()
    shard(model, 2, "layers")
    optimizer = MISA(param_groups(model), **(OPTIONS | options))
    replicate(model, optimizer)
    return "accepted"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"state_dtype": "int8"}, "ValueError: state_dtype='int8' has scales for groups that shards would cut"),
        ({"release_gradients": True}, "ValueError: release_gradients=True needs gradients within backward"),
        ({}, "ValueError: embedding.weight is sharded and must be whole to be replicated"),
    ],
)
def test_what_shards_do_not_have_is_refused(tmp_path, options, sentence):
    for answer in ranks.run(2, tmp_path, refused, options):
        assert answer.startswith(sentence), answer
