"""Slices of weights that FSDP2 has sharded: each rank trains its part of each, and all together as one process does."""

from __future__ import annotations

import re
from functools import partial

import pytest
import ranks
import sharded
import tiny
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_fsdp2 import sharding
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from misa_kernels import MISA, UniformSampler, param_groups
from misa_kernels.distributed import load
from misa_kernels.gradients.sliced import SlicedGradient

STEPS = 10
# Three of four ranks have three rows of a down projection each, and the last one has none.
WIDTH = 9
ROWS = ("gate", "up", "q", "k", "v")


ALONG_COLUMNS = "those sliced by rows along their columns"


def build(how=None, dtype=torch.float32):
    # FSDP2 itself shards along columns in equal parts only.
    return tiny.build(3, width=16 if how == ALONG_COLUMNS else WIDTH, hidden=48, dtype=dtype)


def misa(model, reach="down", hold=1, dense=False, **changes):
    sampler = UniformSampler(granularity="slice", slices=reach, hold_rounds=hold)
    groups = param_groups(model, dense=[model.head] if dense else [])
    return MISA(groups, **({"lr": 1e-2, "delta": 0.05, "inner_steps": 3, "sampler": sampler} | changes))


def shard(model, size, how):
    if how == "checkpointed":
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if how == ALONG_COLUMNS:
        names = {param: name for name, param in model.named_parameters()}
        mesh = dist.init_device_mesh("cpu", (size,))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, shard_placement_fn=lambda p: Shard(int(names[p].split(".")[-2] in ROWS)))
        return
    sharded.shard(model, size, how)


def held_here(model):
    """Return this rank's part of each weight."""
    return {name: getattr(param, "_local_tensor", param).detach().clone() for name, param in model.named_parameters()}


def train(model, optimizer, steps, rank, size, accumulated=1, bound=None):
    """Train on this rank's part of each batch; return all norms."""
    rows, norms = 4 // size, []
    for step in steps:
        for part in range(accumulated):
            tokens = tiny.batch(step + 50 * part, next(model.parameters()).device)[rank * rows : (rank + 1) * rows]
            (tiny.loss_of(model, tokens) / accumulated).backward()
        if bound is not None:
            norm = clip_grad_norm_(model.parameters(), bound)
            norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        before = held_here(model)
        own = places(model, optimizer)
        optimizer.step()
        # The axis of a slice is not that of the shards.
        for name, weight in held_here(model).items():
            if name in own:
                axis, first, last = own[name]
                rest = torch.ones(weight.shape[axis], dtype=torch.bool)
                rest[first:last] = False
                assert torch.equal(*(each.transpose(0, axis)[rest] for each in (weight, before[name]))), name
        optimizer.zero_grad()
    return norms


def places(model, optimizer):
    names = {param: name for name, param in model.named_parameters()}
    return {names[param]: tuple(place) for param, place in optimizer.trained.items() if place is not None}


def run(rank, size, how, is_sharded, options, loop):
    model = build(how)
    if is_sharded:
        shard(model, size, how)
    optimizer = misa(model, **options)
    norms = train(model, optimizer, range(STEPS), rank, size, **loop)
    drawn = [each.active for each in optimizer.monitor.rounds]
    scores = [each.grad_norm.tolist() for each in list(optimizer.monitor.rounds)[:-1]]
    optimizer.release()
    assert all(param.grad is None for param in model.parameters())
    return sharded.weights(model), drawn, norms, scores


@pytest.mark.parametrize(
    ("size", "how", "options", "loop"),
    [
        (4, "blocks", {}, {}),
        (2, "checkpointed", {"reach": "output"}, {"accumulated": 2}),
        (2, "mixed", {}, {}),
        (2, "root", {"reach": "output", "max_grad_norm": 0.05, "hold": "run"}, {"accumulated": 2}),
        (2, "blocks", {"dense": True, "momentum_flush": True}, {"bound": 0.05}),
        (4, "hybrid", {"reach": "output", "state_dtype": "bf16"}, {}),
        (2, ALONG_COLUMNS, {"reach": "all", "delta": 0.2}, {"bound": 0.05}),
    ],
    ids=["uneven", "checkpointed", "bf16 in forward", "root", "dense, clipped", "hybrid", "rows"],
)
def test_shards_train_slices_as_one_process_with_the_whole_batch(tmp_path, size, how, options, loop):
    answers = ranks.run(size, tmp_path, run, size, how, True, options, loop)
    assert not any(isinstance(answer, str) for answer in answers), answers
    expected, drawn, norms, scores = run(0, 1, how, False, options, loop)
    begin = sharded.weights(build(how))
    assert sum(not torch.equal(weight, begin[name]) for name, weight in expected.items()) >= 3
    # Averages of parts are rounded once more than the mean of the whole; in bfloat16 more so.
    is_coarse = how == "mixed" or "state_dtype" in options
    for found in answers:
        for name, weight in expected.items():
            far, moved = (found[0][name] - weight).norm(), (weight - begin[name]).norm()
            assert far <= 0.1 * moved if is_coarse else far <= 1e-3 * moved, name
            assert torch.equal(found[0][name], answers[0][0][name])
        assert found[1] == drawn
        assert found[2] == pytest.approx(norms, rel=1e-4)
        for ours, theirs in zip(found[3], scores, strict=True):
            assert ours == pytest.approx(theirs, rel=0.05 if is_coarse else 1e-3, nan_ok=True)
    assert len(set(drawn)) == (1 if options.get("hold") == "run" else 4)


def held(rank, size):
    """Return, of each slice, the elements of gradient and moments here, and of all the bytes of the optimizer."""
    model = build()
    shard(model, size, "blocks")
    optimizer = misa(model)
    tiny.loss_of(model, tiny.batch(0)[rank : rank + 1]).backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    assert grads.keys() == places(model, optimizer).keys() and len(grads) == 3
    assert all(isinstance(grad, SlicedGradient) and grad.part.placements == (Shard(0),) for grad in grads.values())
    optimizer.step()
    shapes, numel = {}, {}
    for name, grad in grads.items():
        own = optimizer.state[model.get_parameter(name)]
        moments = [value for key, value in own.items() if key.startswith("exp_avg")]
        shapes[name] = [tuple(value.shape) for value in moments]
        numel[name] = grad.part.to_local().numel()
        assert [value.to_local().numel() for value in moments] == [numel[name]] * 2
    return shapes, numel, optimizer._run.live.arena.nbytes


def test_each_rank_holds_its_part_of_gradients_and_moments(tmp_path):
    answers = ranks.run(4, tmp_path, held, 4)
    assert not any(isinstance(answer, str) for answer in answers), answers
    model = build()
    widths = {name: last - first for name, (_, first, last) in places(model, misa(model)).items()}
    for rank, (shapes, numel, nbytes) in enumerate(answers):
        assert shapes == {name: [(WIDTH, width)] * 2 for name, width in widths.items()}
        assert numel == {name: (0 if rank == 3 else 3) * width for name, width in widths.items()}
        # Two moments of four bytes each, in lines of 128 elements.
        assert nbytes == 8 * (sum(-(-each // 128) * 128 for each in numel.values()) if rank < 3 else 0)


def rounded(rank, size):
    """Take a step with the same gradients on any number of ranks."""
    model = build(dtype=torch.bfloat16)
    if size > 1:
        shard(model, size, "blocks")
    optimizer = misa(model, param_precision="stochastic")
    generator = torch.Generator().manual_seed(1)
    for param, (axis, first, last) in optimizer.trained.items():
        part = torch.randn(len(param), last - first, generator=generator).bfloat16()
        if size > 1:
            part = distribute_tensor(part, param.device_mesh, param.placements)
        param.grad = SlicedGradient(part, param.shape, axis, first)
    optimizer.step()
    return sharded.weights(model)


def test_the_noise_of_rounding_is_the_same_on_any_number_of_ranks(tmp_path):
    expected = rounded(0, 1)
    begin = sharded.weights(build(dtype=torch.bfloat16))
    assert sum(not torch.equal(weight, begin[name]) for name, weight in expected.items()) == 3
    for found in ranks.run(4, tmp_path, rounded, 4):
        assert not isinstance(found, str), found
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


# Saved in the middle of the second round.
BEFORE = 5


def saved(rank, size, folder):
    model = build()
    shard(model, size, "blocks")
    optimizer = misa(model)
    train(model, optimizer, range(BEFORE), rank, size)
    content = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(content, checkpoint_id=folder)
    train(model, optimizer, range(BEFORE, STEPS), rank, size)
    return sharded.weights(model), optimizer.active


def resumed(rank, size, folder):
    model = build()
    if size > 1:
        shard(model, size, "blocks")
    optimizer = misa(model)
    # A run that has gone elsewhere.
    train(model, optimizer, range(30, 34), rank, size)
    weights = get_model_state_dict(model)
    dcp.load({"model": weights}, checkpoint_id=folder)
    set_model_state_dict(model, weights)
    load(model, optimizer, folder)
    assert (optimizer.monitor.current.round, optimizer._run.clock.round_step) == (1, 2)
    train(model, optimizer, range(BEFORE, STEPS), rank, size)
    return sharded.weights(model), optimizer.active


def test_a_run_saved_in_mid_round_goes_on_upon_any_number_of_ranks(tmp_path):
    folder = tmp_path / "saved"
    for name in ("four", "two", "again"):
        (tmp_path / name).mkdir()
    expected = ranks.run(4, tmp_path / "four", saved, 4, folder)
    assert not isinstance(expected[0], str), expected[0]
    again = ranks.run(4, tmp_path / "again", resumed, 4, folder)
    assert not isinstance(again[0], str), again[0]
    # The same ranks go on to the bit.
    assert all(torch.equal(weight, expected[0][0][name]) for name, weight in again[0][0].items())
    for found in (*ranks.run(2, tmp_path / "two", resumed, 2, folder), resumed(0, 1, folder)):
        assert not isinstance(found, str), found
        assert found[1] == expected[0][1]
        for name, weight in expected[0][0].items():
            torch.testing.assert_close(found[0][name], weight, rtol=0, atol=2e-5)


def through_accelerate(rank, size):
    accelerator = sharding(rank, size)
    model = build()
    optimizer = misa(model)
    model, wrapped = accelerator.prepare(model, optimizer)
    for step in range(STEPS):
        rows = 4 // size
        accelerator.backward(tiny.loss_of(model, tiny.batch(step)[rank * rows : (rank + 1) * rows]))
        accelerator.clip_grad_norm_(model.parameters(), 0.05)
        wrapped.step()
        wrapped.zero_grad()
    optimizer.release()
    return sharded.weights(model)


def test_accelerate_shards_after_misa_was_constructed(tmp_path):
    answers = ranks.run(2, tmp_path, through_accelerate, 2)
    assert not any(isinstance(answer, str) for answer in answers), answers
    expected, *_ = run(0, 1, None, False, {}, {"bound": 0.05})
    for found in answers:
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-5, msg=name)


def refused(rank, how):
    model = build()
    optimizer = misa(model) if how == "after" else None
    if "parallel" in how:
        mesh = dist.init_device_mesh("cpu", (2,))
        style = RowwiseParallel() if how == "parallel" else ColwiseParallel(output_layouts=Replicate())
        for block in model.blocks:
            parallelize_module(block, mesh, {"down": style})
    else:
        shard(model, 2, "blocks")
    if optimizer is None:
        optimizer = misa(model, **({"reach": "all", "delta": 0.2} if how == "rows" else {}))
    before = sharded.weights(model)
    try:
        tiny.loss_of(model, tiny.batch(0)[rank : rank + 1]).backward()
        optimizer.step()
    finally:
        assert all(torch.equal(weight, before[name]) for name, weight in sharded.weights(model).items())


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (
            "rows",
            r"ValueError: granularity='slice' takes rows of blocks.0.q, whose rows are divided among ranks, .*: shard "
            r"it along its columns, by shard_placement_fn of fully_shard\(\), leave it out by slices= ",
        ),
        (
            "parallel",
            r"ValueError: granularity='slice' takes columns of blocks.0.down, whose columns are divided .* its rows,",
        ),
        (
            "parallel along its rows",
            r"RuntimeError: the layer of blocks.0.down.weight multiplies by a DTensor, as in tensor parallelism",
        ),
        # Torch's own, as nothing requires a gradient, after ours that layers have other weights.
        ("after", "RuntimeError: element 0 of tensors does not require grad"),
    ],
)
def test_what_cannot_be_is_refused_on_all_ranks(tmp_path, how, sentence):
    answers = ranks.run(2, tmp_path, refused, how)
    assert answers[0] == answers[1]
    assert re.match(sentence, answers[0]), answers[0]


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), pytest.param("cuda", "nccl", marks=pytest.mark.gpu)])
def test_one_shard_trains_as_the_plain_model_does(device, backend):
    models = [build(dtype=torch.bfloat16).to(device) for _ in range(2)]
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh(device, (1,))
        for part in (*models[1].blocks, models[1]):
            fully_shard(part, mesh=mesh)
        for model in models:
            train(model, misa(model, reach="output", state_dtype="bf16"), range(STEPS), 0, 1, bound=0.05)
        plain, one = map(sharded.weights, models)
    finally:
        dist.destroy_process_group()
    begin = build(dtype=torch.bfloat16).state_dict()
    assert sum(not torch.equal(weight.cpu(), begin[name]) for name, weight in plain.items()) >= 6
    assert all(torch.equal(weight, one[name]) for name, weight in plain.items())


def with_gradients(rank, size, dtype=torch.float32, dense=False):
    """Return a model with gradients, that of a dense tensor in front of those of slices if asked for."""
    model = build(dtype=dtype)
    if size > 1:
        shard(model, size, "blocks")
    groups = param_groups(model, dense=[model.embedding] if dense else [])
    optimizer = MISA(groups, lr=1e-2, delta=0.05, sampler=UniformSampler(granularity="slice"))
    rows = 4 // size
    tiny.loss_of(model, tiny.batch(0)[rank * rows : (rank + 1) * rows]).backward()
    return model, optimizer


def whole(value):
    """Return all elements."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().double().clone()


def looked_at(rank, size):
    """Return what a loop that reads gradients and weights together makes of them."""
    model, optimizer = with_gradients(rank, size)
    param = model.blocks[1].down.weight
    grad = param.grad
    with torch.no_grad():
        made = [
            param.detach() * grad,
            grad * param,
            param.detach() - 0.5 * grad,
            param.detach().clone().sub_(grad, alpha=0.5),
            torch.lerp(param.detach(), grad, 0.3),
            torch.zeros_like(param).add_(grad),
            torch.isfinite(grad).all(),
            (grad == 0).all(),
            (grad == 0).any(),
            grad.abs().max(),
            grad.min(),
            grad.norm(),
            grad,
        ]
    try:
        grad.copy_(param.detach())
    except RuntimeError as error:
        said = str(error)
    return [whole(value) for value in made], said


def test_gradients_of_shards_are_read_as_those_of_one_process(tmp_path):
    expected, sentence = looked_at(0, 1)
    assert sentence.startswith("copy_ on a gradient of shape (9, 48) would change elements beside")
    for found in ranks.run(2, tmp_path, looked_at, 2):
        assert not isinstance(found, str), found
        assert found[1] == sentence
        for ours, theirs in zip(found[0], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def clipped(rank, size, foreach, norm_type):
    model, optimizer = with_gradients(rank, size, dense=True)
    norm = clip_grad_norm_(model.parameters(), 0.05, foreach=foreach, norm_type=norm_type)
    del optimizer
    return whole(norm), {name: whole(param.grad) for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize(("foreach", "norm_type"), [(True, 2.0), (True, float("inf")), (False, 3.0)])
def test_a_whole_gradient_in_front_is_clipped_with_slices(tmp_path, foreach, norm_type):
    norm, grads = clipped(0, 1, foreach, norm_type)
    for found in ranks.run(2, tmp_path, clipped, 2, foreach, norm_type):
        assert not isinstance(found, str), found
        torch.testing.assert_close(found[0], norm, rtol=1e-4, atol=0)
        for name, grad in grads.items():
            torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-7)


def plainly(rank, size):
    model, optimizer = with_gradients(rank, size, torch.float64)
    optimizer.step()
    return optimizer.backend, sharded.weights(model)


def test_plain_pytorch_steps_where_a_rank_has_no_row(tmp_path):
    backend, expected = plainly(0, 1)
    assert backend == "reference"
    for found in ranks.run(4, tmp_path, plainly, 4):
        assert not isinstance(found, str), found
        for name, weight in expected.items():
            torch.testing.assert_close(found[1][name], weight, rtol=0, atol=1e-9)


def written(rank, granularity):
    model = build(dtype=torch.bfloat16)
    shard(model, 4, "blocks")
    optimizer = MISA(param_groups(model), lr=1e-2, delta=0.1, sampler=UniformSampler(granularity=granularity))
    train(model, optimizer, range(2), rank, 4)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(2, 3), rank, 4)
    return sum(weight.abs().sum().item() for weight in sharded.weights(model).values())


@pytest.mark.parametrize("granularity", ["slice", "module"])
def test_masters_follow_what_is_written_to_shards(tmp_path, granularity):
    assert ranks.run(4, tmp_path, written, granularity) == [0.0] * 4


def gathered(rank):
    model = build()
    shard(model, 2, "root")
    with torch.no_grad():
        model(tiny.batch(0)[:, :-1])
    optimizer = misa(model)
    tiny.loss_of(model, tiny.batch(0)).backward()
    optimizer.step()


def test_what_is_gathered_at_construction_is_named(tmp_path):
    for found in ranks.run(2, tmp_path, gathered):
        assert re.match(
            r"RuntimeError: blocks.0.down.weight has no memory any more, .* call reshard\(\) on the model", found
        )


def called(rank):
    """Call a layer with a weight of somebody else's."""
    model = build()
    shard(model, 2, "blocks")
    misa_ = misa(model)
    layer = model.blocks[1].down
    x = torch.randn(2, 48, requires_grad=True)
    model.blocks[1].unshard()
    functional_call(layer, {"weight": torch.randn(WIDTH, 48)}, (x,)).sum().backward()
    del misa_
    return layer.weight.grad is None and x.grad is not None


@pytest.mark.filterwarnings("ignore:.*is trained in slices, and its layer")
def test_another_weight_for_a_call_makes_no_gradient_of_the_slice(tmp_path):
    assert ranks.run(2, tmp_path, called) == [True] * 2
