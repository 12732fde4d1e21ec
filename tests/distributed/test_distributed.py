"""Several processes: gradients averaged without waste, and no difference between ranks that stays silent."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import ranks
import tiny
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from misa_kernels import MISA, UniformSampler, param_groups
from misa_kernels.distributed import replicate
from misa_kernels.distributed.replicate import BUCKET_BYTES, _buckets
from misa_kernels.ranks.shards import local

ROOT = Path(__file__).parents[2]
OPTIONS = {"lr": 1e-2, "delta": 0.2, "inner_steps": 5}


def by_rule(params):
    return torch.optim.AdamW(params, lr=1e-2)


def arguments(options):
    """Return them with the usual ones, of which a rule has some itself."""
    given = OPTIONS | options
    return {name: value for name, value in given.items() if name != "lr" or "rule" not in given}


def part(step, rank, size):
    """This rank's part of a batch of 4."""
    rows = 4 // size
    return tiny.batch(step)[rank * rows : (rank + 1) * rows]


def train(model, optimizer, steps, rank, size):
    for step in range(steps):
        tiny.loss_of(model, part(step, rank, size)).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def as_one_process(steps, mode="finetune", **options):
    model = tiny.build()
    optimizer = MISA(param_groups(model, mode), **arguments(options))
    for step in range(steps):
        tiny.loss_of(model, tiny.batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model), [r.active for r in optimizer.monitor.rounds]


def replicated(rank, size, steps, mode, options, damage):
    model = tiny.build()
    with torch.no_grad():
        if damage and rank:
            # What replicate() sends must make up for it.
            for param in model.parameters():
                param.add_(1.0)
    optimizer = MISA(param_groups(model, mode), **arguments(options))
    replica = replicate(model, optimizer)
    per_step = []
    for step in range(steps):
        before = replica.reduced_bytes
        tiny.loss_of(model, part(step, rank, size)).backward()
        trained = sum(param.numel() * 4 for param in model.parameters() if param.requires_grad)
        per_step.append((replica.reduced_bytes - before, trained))
        optimizer.step()
        optimizer.zero_grad()
    optimizer.release()
    return weights(model), [r.active for r in optimizer.monitor.rounds], per_step


@pytest.mark.parametrize(
    ("size", "mode", "options"),
    [(2, "finetune", {}), (4, "pretrain", {"max_grad_norm": 0.5}), (2, "finetune", {"rule": by_rule})],
    ids=["two ranks", "four ranks, dense tensors, clipped", "two ranks, by a rule"],
)
def test_replicas_train_as_one_process_with_the_whole_batch(tmp_path, size, mode, options):
    steps = 23
    answers = ranks.run(size, tmp_path, replicated, size, steps, mode, options, True)
    expected, rounds = as_one_process(steps, mode, **options)
    total = sum(param.numel() for param in tiny.build().parameters())
    for found, active, per_step in answers:
        assert active == rounds
        for name, weight in expected.items():
            # Averages of parts are rounded once more than the mean of the whole.
            torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-5 if mode == "finetune" else 2e-4)
            assert torch.equal(found[name], answers[0][0][name])
        # What travels is what has a gradient, and no more: the budget, and with it what is always on.
        for sent, trained in per_step:
            assert sent == trained
        if mode == "finetune":
            assert max(sent for sent, _ in per_step) <= OPTIONS["delta"] * 4 * total


def test_weights_are_bitwise_equal_after_200_steps_with_20_switches(tmp_path):
    answers = ranks.run(2, tmp_path, replicated, 2, 200, "finetune", {"inner_steps": 10}, False)
    for found, active, _ in answers:
        assert len(active) == 21
        assert all(torch.equal(found[name], weight) for name, weight in answers[0][0].items())


def accumulated(rank, size):
    model = tiny.build()
    optimizer = MISA(param_groups(model), **OPTIONS)
    replica = replicate(model, optimizer)
    for step in range(0, 12, 2):
        before = replica.reduced_bytes
        with replica.no_sync():
            (tiny.loss_of(model, part(step, rank, size)) / 2).backward()
        assert replica.reduced_bytes == before
        (tiny.loss_of(model, part(step + 1, rank, size)) / 2).backward()
        assert replica.reduced_bytes > before
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def test_gradients_add_up_without_sync(tmp_path):
    model = tiny.build()
    optimizer = MISA(param_groups(model), **OPTIONS)
    for step in range(0, 12, 2):
        for batch in (step, step + 1):
            (tiny.loss_of(model, tiny.batch(batch)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in ranks.run(2, tmp_path, accumulated, 2):
        for name, weight in weights(model).items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-5)


class Experts(torch.nn.Module):
    """Four matrices, of which a forward pass uses those it is told."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x, used):
        return sum(self.experts[number](x).square().mean() for number in used)


def routed(rank, used_by_step):
    torch.manual_seed(0)
    model = Experts()
    optimizer = MISA(param_groups(model), lr=1e-2, delta=1.0, inner_steps=50, sampler=UniformSampler())
    replicate(model, optimizer)
    grads = []
    for used in used_by_step:
        x = torch.full((2, 8), 1.0 + rank)
        loss = model(x, used[rank])
        if used[rank]:
            loss.backward()
        optimizer.step()
        grads.append([None if e.weight.grad is None else e.weight.grad.clone() for e in model.experts])
        optimizer.zero_grad()
    ages = [int(optimizer.state[e.weight]["age"]) for e in model.experts]
    return weights(model), grads, ages


def test_an_expert_without_tokens_on_a_rank_counts_there_as_zero(tmp_path):
    # Expert 3 gets none anywhere; in the second step rank 1 has no gradient at all.
    used = [([0, 1], [1, 2]), ([0, 2], []), ([2], [0, 1])]
    (w0, g0, ages), (w1, g1, _) = ranks.run(2, tmp_path, routed, used)
    assert ages == [3, 2, 3, 0]
    torch.manual_seed(0)
    model = Experts()
    optimizer = MISA(param_groups(model), lr=1e-2, delta=1.0, inner_steps=50, sampler=UniformSampler())
    for step, both in enumerate(used):
        # The mean over ranks of each rank's loss.
        losses = [model(torch.full((2, 8), 1.0 + rank), both[rank]) for rank in range(2) if both[rank]]
        (sum(losses) / 2).backward()
        for number, expert in enumerate(model.experts):
            if expert.weight.grad is None:
                assert g0[step][number] is None and g1[step][number] is None
            else:
                torch.testing.assert_close(g0[step][number], expert.weight.grad)
                assert torch.equal(g0[step][number], g1[step][number])
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in weights(model).items():
        torch.testing.assert_close(w0[name], weight)
        assert torch.equal(w0[name], w1[name])


def poisoned(rank):
    model = tiny.build()
    optimizer = MISA(param_groups(model), skip_nonfinite=True, **OPTIONS)
    replicate(model, optimizer)
    before = None
    for step in range(4):
        loss = tiny.loss_of(model, part(step, rank, 2))
        if step == 2:
            before = weights(model)
            loss = loss * (float("nan") if rank else 1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    return optimizer.skipped_steps, weights(model)


def test_a_nonfinite_gradient_on_one_rank_skips_the_step_on_all(tmp_path):
    (skipped0, w0), (skipped1, w1) = ranks.run(2, tmp_path, poisoned)
    assert skipped0 == skipped1 == 1
    assert all(torch.equal(w0[name], w1[name]) for name in w0)


def unlike(rank, fault):
    """Build rank 1 in another way than rank 0, and train until somebody says so."""
    model = tiny.build()
    if fault == "order":
        groups = param_groups(model)
        if rank:
            groups[0]["params"].reverse()
            groups[0]["modules"].reverse()
            groups[0]["layers"].reverse()
    else:
        groups = param_groups(model)
    options = OPTIONS | ({"seed": rank} if fault == "seed" else {}) | {"process_group": dist.group.WORLD}
    optimizer = MISA(groups, **options)
    if fault == "scores":
        optimizer._run.scores.candidates.importance[:] = 1.0 + rank * torch.rand(len(optimizer.modules)).numpy()
        optimizer._run.scores.candidates.count[:] = 1
        replicate(model, optimizer)
    train(model, optimizer, 6, rank, 2)
    return "trained"


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (
            "seed",
            r"what MISA begins with .* there is seed 0 on rank 0 and 1 on rank 1: give every",
        ),
        ("order", r"what MISA begins with .* there is blocks.0.* on rank 0 and blocks.3.* on rank 1"),
        ("gradients", r"first step of round 0 must be .* blocks.* on rank 0 and .* on rank 1: .*replicate\(model"),
        ("scores", r"the active set of round 1 must be the same on all ranks, and there .* rank 0 and .* rank 1"),
    ],
)
def test_ranks_that_differ_are_told_so_on_all_of_them(tmp_path, fault, sentence):
    answers = ranks.run(2, tmp_path, unlike, fault)
    assert answers[0] == answers[1]
    assert re.search(sentence, answers[0]), answers[0]


def asking(rank, way):
    """Begin with another seed, or in another round, than the other rank does."""
    model = tiny.build()
    options = OPTIONS | {"seed": 0 if way == "state dict" else rank}
    if way == "DTensors":
        # Not FSDP2's, whose own backward ends in gloo where the active sets differ.
        mesh = dist.init_device_mesh("cpu", (2,))
        for module in model.modules():
            for name, param in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, torch.nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)])))
    ddp = DistributedDataParallel(model, find_unused_parameters=True) if way == "DDP" else None
    group = dist.new_group([0, 1]) if way in ("process group", "state dict") else None
    optimizer = MISA(param_groups(model), **options, process_group=group)
    if way == "state dict" and rank:
        other = tiny.build()
        ahead = MISA(param_groups(other), **options)
        tiny.train(other, ahead, 7)
        optimizer.load_state_dict(ahead.state_dict())
    if way == "replicate":
        replicate(model, optimizer)
        return "replicated"
    for param in (model if ddp is None else ddp).parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    before = {name: local(weight).clone() for name, weight in model.named_parameters()}
    try:
        optimizer.step()
    finally:
        assert all(torch.equal(local(weight), before[name]) for name, weight in model.named_parameters())


def told(rank, ways):
    sentences = []
    for way in ways:
        try:
            sentences.append(asking(rank, way))
        except RuntimeError as error:
            sentences.append(str(error))
    return sentences


def test_every_way_to_train_together_is_compared_before_anything_is_updated(tmp_path):
    ways = ["process group", "DTensors", "DDP", "replicate", "state dict"]
    answers = ranks.run(2, tmp_path, told, ways)
    assert answers[0] == answers[1] and isinstance(answers[0], list), answers
    seed = "what MISA begins with must be the same on all ranks, and there is seed 0 on rank 0 and 1 on rank 1: give "
    for way, sentence in zip(ways, answers[0], strict=True):
        expected = seed.replace("seed 0", "round 0") if way == "state dict" else seed
        assert sentence and sentence.startswith(expected), (way, sentence)


def apart(rank):
    """Train on each rank for itself, then on one alone; what would wait for another rank soon raises."""
    _get_default_store().set_timeout(timedelta(seconds=1))
    # Another model's, of which the optimizer knows nothing.
    ddp = DistributedDataParallel(torch.nn.Linear(2, 2))
    model = tiny.build()
    optimizer = MISA(param_groups(model), **OPTIONS, seed=rank)
    train(model, optimizer, 12, rank, 2)
    draws = optimizer.active
    if rank == 0:
        other = tiny.build()
        alone = MISA(param_groups(other), **OPTIONS)
        tiny.train(other, alone, 7)
        saved = alone.state_dict()
        alone.release()
        resumed = MISA(param_groups(other), **OPTIONS)
        resumed.load_state_dict(saved)
        tiny.train(other, resumed, 5, start=7)
        return draws, [record.active for record in resumed.monitor.rounds], weights(other)
    return draws, [type(ddp)], None


def test_ranks_that_nobody_asked_to_train_together_never_meet(tmp_path):
    answers = ranks.run(2, tmp_path, apart)
    assert not any(isinstance(answer, str) for answer in answers), answers
    (draws, active, found), (draws_there, *_) = answers
    assert draws != draws_there
    expected, rounds = as_one_process(12)
    assert active == rounds[1:]
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def late(rank):
    """Let rank 2 come when the others have given it up, and all of them once more."""
    store = _get_default_store()
    store.set_timeout(timedelta(seconds=2))
    model = tiny.build()
    optimizer = MISA(param_groups(model), **OPTIONS, process_group=dist.group.WORLD)
    if rank == 2:
        store.set_timeout(timedelta(seconds=30))
        store.wait(["given up by 0", "given up by 1"])
    tiny.loss_of(model, tiny.batch(0)).backward()
    start = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    seconds = time.monotonic() - start
    store.set(f"given up by {rank}", "")
    store.set_timeout(timedelta(seconds=30))
    optimizer.zero_grad()
    tiny.train(model, optimizer, 12)
    saved = optimizer.state_dict()
    optimizer.release()
    optimizer = MISA(param_groups(model), **OPTIONS, process_group=dist.group.WORLD)
    optimizer.load_state_dict(saved)
    tiny.train(model, optimizer, 11, start=12)
    return str(caught.value), seconds, weights(model)


def test_a_rank_that_stays_away_is_named_to_those_that_wait_and_to_itself(tmp_path):
    answers = ranks.run(3, tmp_path, late)
    assert not any(isinstance(answer, str) for answer in answers), answers
    expected, _ = as_one_process(23)
    for rank, (sentence, seconds, found) in enumerate(answers):
        assert re.fullmatch(
            r"what MISA begins with must be the same on all 3 ranks that train together, and rank 2 did not come to "
            r"compare it within \d+ s: construct MISA on all of them and call step\(\) equally often, or give it the "
            r"process_group of those that train together",
            sentence,
        ), sentence
        assert rank == 2 or ("within 2 s" in sentence and seconds < 10)
        # They have lost nothing by it.
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def wrapped(rank, when):
    model = tiny.build()
    if when == "before":
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = MISA(param_groups(model), **OPTIONS)
    else:
        optimizer = MISA(param_groups(model), **OPTIONS)
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
    train(ddp, optimizer, 23, rank, 2)
    return weights(model)


def test_ddp_around_the_whole_model_trains_as_one_process(tmp_path):
    expected, _ = as_one_process(23)
    for found in ranks.run(2, tmp_path, wrapped, "before"):
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-5)


def test_ddp_that_lacks_the_next_active_set_is_refused_in_its_first_step(tmp_path):
    answers = ranks.run(2, tmp_path, wrapped, "after")
    assert answers[0] == answers[1]
    assert "first step of round 1 must be the same" in answers[0] and "before MISA freezes any of it" in answers[0]


def killed(rank):
    model = tiny.build()
    optimizer = MISA(param_groups(model), **OPTIONS)
    replicate(model, optimizer)
    train(model, optimizer, 7, rank, 2)
    if rank:
        os._exit(9)
    train(model, optimizer, 7, rank, 2)
    return "went on alone"


def test_a_rank_that_dies_in_mid_round_stops_the_others(tmp_path):
    survivor, dead = ranks.run(2, tmp_path, killed)
    assert dead == "no answer"
    assert survivor.startswith("RuntimeError") or survivor.startswith("DistBackendError"), survivor


def test_one_process_needs_no_group_and_compares_nothing():
    assert not dist.is_initialized()
    optimizer = MISA(param_groups(tiny.build()), **OPTIONS)
    assert optimizer._run.meeting is None
    with pytest.raises(RuntimeError, match="start with torchrun"):
        replicate(tiny.build(), optimizer)


def test_small_gradients_travel_together_and_large_ones_alone():
    small = [torch.zeros(100) for _ in range(5)]
    large = torch.zeros(BUCKET_BYTES // 4 + 1)
    half = torch.zeros(10, dtype=torch.bfloat16)
    cut = [[p.numel() for p in bucket.params] for bucket in _buckets([*small, large, *small, half])]
    assert cut == [[100] * 5, [large.numel()], [100] * 5, [10]]


def flattened(rank, views):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(tiny.build(), use_orig_params=views, device_id=torch.device("cpu"))
    MISA(param_groups(model), **OPTIONS)
    return "accepted"


@pytest.mark.parametrize("views", [False, True])
def test_fsdp1_is_refused(tmp_path, views):
    for answer in ranks.run(2, tmp_path, flattened, views):
        assert re.search("TypeError: .*FSDP1.* has flattened it.*fully_shard", answer), answer


def test_what_deepspeed_partitions_is_refused():
    model = tiny.build()
    # The mark of its ZeRO stage 3, which does not initialise without a GPU.
    model.blocks[1].q.weight.ds_id = 7
    with pytest.raises(TypeError, match=r"DeepSpeed ZeRO has partitioned it.*fsdp_version: 2.*replicate\(model"):
        MISA(param_groups(model), **OPTIONS)


def elastic(folder, kill_at):
    # Standalone takes a port of its own, so that several tests may run at once.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(ROOT / "tests" / "elastic.py")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    # Without it gloo of torch 2.13 connects to the addresses of the processes before the restart.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    done = subprocess.run(
        [*command, str(folder), str(kill_at)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((folder / "losses.json").read_text())
    assert result["restarts"] == (kill_at >= 0), done.stderr[-3000:]
    return result


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint_after_a_rank_was_killed(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = elastic(tmp_path / "whole", -1)
    # In the middle of the third round, two steps after the second checkpoint.
    killed = elastic(tmp_path / "killed", 10 + 1)
    assert (whole["restarts"], whole["start"], killed["restarts"], killed["start"]) == (0, 0, 1, 8)
    assert killed["losses"] == whole["losses"] and len(whole["losses"]) == 17
