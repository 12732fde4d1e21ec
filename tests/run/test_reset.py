"""After `reset_state()` nothing tells any more which data there was: what is left is equal to the bit without it."""

from __future__ import annotations

import copy
import io
from dataclasses import fields

import numpy as np
import pytest
import ranks
import tiny
import torch
from pairs import pairwise

from misa_kernels import MISA, CyclicSampler, UniformSampler, authors, paper, param_groups, slices
from misa_kernels.distributed import replicate

VARIANTS = {
    "default": {},
    "clip and skip": {"max_grad_norm": 0.1, "skip_nonfinite": True},
    "paper": paper(),
    "authors": authors(),
    "cyclic layers": {"sampler": CyclicSampler(granularity="layer"), "keep_states": "none"},
    "int8": {"state_dtype": "int8"},
    "split": {"param_precision": "split"},
    "stochastic, plain": {"param_precision": "stochastic", "backend": "reference"},
    "slices": slices(),
    "released": {"release_gradients": True},
    "rule": {"rule": lambda params: torch.optim.Muon(params, lr=1e-2)},
    "counting rule": {"rule": lambda params: torch.optim.NAdam(params, lr=1e-3)},
}
# Of the tokens in these steps nothing shall be left.
FORGOTTEN = (1, 4)
STEPS = 7


def build(variant, dtype=torch.float32):
    model = tiny.build(dtype=dtype)
    return model, MISA(param_groups(model, mode="finetune"), delta=0.3, inner_steps=3, **VARIANTS[variant])


def train(model, optimizer, replaced=(), steps=STEPS):
    for step in range(steps):
        # Another batch in the place of what is left out, so that as many steps are taken.
        tiny.loss_of(model, tiny.batch(500 + step if step in replaced else step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def same(a, b):
    if isinstance(a, torch.Tensor):
        words = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*words)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b, equal_nan=True)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def record(optimizer):
    return [{field.name: getattr(own, field.name) for field in fields(own)} for own in optimizer.monitor.rounds]


@pytest.mark.parametrize(("variant", "dtype"), pairwise(VARIANTS, [torch.float32, torch.bfloat16]))
def test_what_is_left_is_the_same_without_the_data(variant, dtype):
    if VARIANTS[variant].get("param_precision") and dtype == torch.float32:
        dtype = torch.bfloat16
    (model, optimizer), (other, without) = (build(variant, dtype) for _ in range(2))
    train(model, optimizer)
    train(other, without, FORGOTTEN)
    assert not same(optimizer.state_dict(), without.state_dict())
    optimizer.reset_state()
    without.reset_state()
    assert same(optimizer.state_dict(), without.state_dict())
    assert optimizer.active == without.active and same(record(optimizer), record(without))
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in other.parameters()]
    # With the same weights both go on alike, too.
    other.load_state_dict(model.state_dict())
    for own, its in ((model, optimizer), (other, without)):
        train(own, its)
    assert same(model.state_dict(), other.state_dict()) and same(optimizer.state_dict(), without.state_dict())


@pytest.mark.parametrize("variant", ["default", "slices", "rule"])
def test_it_is_what_a_new_optimizer_is_at_this_step(variant):
    model, optimizer = build(variant)
    train(model, optimizer)
    optimizer.reset_state()
    kept = copy.deepcopy(model.state_dict())
    saved, (other, new) = optimizer.state_dict(), build(variant)
    ours, theirs = saved["param_groups"][0], new.state_dict()["param_groups"][0]
    position = {name for name in ours if not same(ours[name], theirs[name])}
    assert position == {"round", "steps"} and (ours["round"], ours["steps"], ours["round_step"]) == (2, STEPS, 0)
    for own in saved["state"].values():
        assert own.keys() <= {"module", "importance", "importance_count", "last_round", "active"}
        assert not own["importance"].any() and not own["importance_count"].any()
        assert torch.equal(own["last_round"] >= 0, own["active"])
    other.load_state_dict(kept)
    new.load_state_dict(saved)
    for own, its in ((model, optimizer), (other, new)):
        train(own, its)
    assert same(model.state_dict(), other.state_dict()) and same(optimizer.state_dict(), new.state_dict())


def test_gradients_and_what_was_skipped_are_forgotten():
    model, optimizer = build("clip and skip")
    train(model, optimizer)
    tiny.loss_of(model, tiny.batch(0)).backward()
    next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    optimizer.reset_state()
    assert optimizer.skipped_steps == 0 and all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("variant", ["default", "int8", "split"])
def test_zeros_are_written_where_state_was(variant):
    model, optimizer = build(variant, torch.bfloat16)
    train(model, optimizer)
    arena = optimizer._run.live.arena
    buffers = [buffer for pool in arena.pools.values() for buffer in pool.buffers.values()]
    buffers += [arena.age, arena.updates, arena.score_sum, arena.sq_norm]
    assert sum(bool(buffer.view(torch.uint8).any()) for buffer in buffers) > 2
    optimizer.reset_state()
    assert optimizer.state_bytes == 0
    assert not any(buffer.view(torch.uint8).any() for buffer in buffers)


@pytest.mark.parametrize(
    "options",
    [{}, {"sampler": UniformSampler(granularity="slice", hold_rounds=1)}, VARIANTS["rule"]],
    ids=["modules", "slices", "rule"],
)
def test_a_file_holds_no_bytes_of_what_has_left(options):
    """Neither after a switch nor after a reset; a tensor that is saved as a view would bring its whole memory along."""
    model = tiny.build()
    optimizer = MISA(param_groups(model, mode="finetune"), delta=0.3, inner_steps=3, **options)

    def file():
        stored = io.BytesIO()
        torch.save(optimizer.state_dict(), stored)
        return stored.getvalue()

    def held():
        names = ("exp_avg", "exp_avg_sq", "rule.momentum_buffer")
        return {
            (param, name): value.numpy().tobytes()
            for param, own in optimizer.state.items()
            for name, value in own.items()
            if name.startswith(names)
        }

    train(model, optimizer, steps=2)
    before, stored = held(), file()
    assert before and all(value in stored for value in before.values())
    train(model, optimizer, steps=1)
    after, stored = held(), file()
    left = [value for key, value in before.items() if after.get(key) != value]
    assert left and not any(value in stored for value in left)
    train(model, optimizer, steps=2)
    before = held()
    optimizer.reset_state()
    stored = file()
    assert before and not any(value in stored for value in before.values())


def test_it_comes_before_the_first_step_too():
    model, optimizer = build("default")
    saved = optimizer.state_dict()
    optimizer.reset_state()
    assert same(saved, optimizer.state_dict())
    train(model, optimizer)


def test_it_is_refused_after_release_and_within_a_step():
    model, optimizer = build("released")
    train(model, optimizer, steps=1)
    tiny.loss_of(model, tiny.batch(0)).backward()
    with pytest.raises(RuntimeError, match=r"reset_state\(\) came between backward\(\) and step\(\).*after step\(\)"):
        optimizer.reset_state()
    optimizer.step()
    optimizer.reset_state()
    optimizer.release()
    with pytest.raises(RuntimeError, match=r"reset_state\(\) came after release\(\): construct a new MISA"):
        optimizer.reset_state()


def on_a_rank(rank):
    model, optimizer = build("default")
    replicate(model, optimizer)
    for steps in (STEPS, STEPS):
        for step in range(steps):
            tiny.loss_of(model, tiny.batch(step)[2 * rank : 2 * rank + 2]).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.reset_state()
    return optimizer.state_dict(), model.state_dict()


def test_ranks_go_on_together(tmp_path):
    answers = ranks.run(2, tmp_path, on_a_rank)
    assert not isinstance(answers[0], str), answers
    assert same(*answers)


@pytest.mark.parametrize("variant", ["default", "slices", "int8"])
def test_what_was_frozen_in_mid_round_stays_frozen(variant):
    model, optimizer = build(variant)
    train(model, optimizer, steps=4)
    names = {optimizer.modules[number].name for number in optimizer.active}
    block = next(b for b in model.blocks if any(p.requires_grad or p in optimizer.trained for p in b.parameters()))
    for param in block.parameters():
        param.requires_grad_(False)
    if variant == "slices":
        # Slices train what requires no gradient, so that only thawed() tells.
        with optimizer.thawed():
            for param in block.parameters():
                param.requires_grad_(False)
        optimizer.reset_state()
    else:
        with pytest.warns(UserWarning, match="will not be trained any more"):
            optimizer.reset_state()
    assert names and optimizer.trained and not any(param in optimizer.trained for param in block.parameters())
    before = copy.deepcopy(block.state_dict())
    train(model, optimizer)
    assert same(block.state_dict(), before)


@pytest.mark.parametrize("variant", ["default", "slices"])
def test_the_draw_is_among_what_was_left_within_thawed(variant):
    model, optimizer = build(variant)
    train(model, optimizer, steps=4)
    with optimizer.thawed():
        for block in model.blocks[:3]:
            block.requires_grad_(False)
    optimizer.reset_state()
    left = {param for param in model.blocks[3].parameters()}
    assert optimizer.trained and optimizer.trained.keys() <= left
    assert all(optimizer.modules[number].name.startswith("blocks.3.") for number in optimizer.active)
    train(model, optimizer)
