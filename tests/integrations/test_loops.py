"""Does MISA do its work in loops of one's own: accumulation, clipping, GradScaler, closures, zeroed gradients?"""

from __future__ import annotations

import os
import sys

import pytest
import tiny
import torch
from torch import nn

from examples.loops import logging_runs, loop_plain
from misa_kernels import MISA, kernels, param_groups

BACKENDS = ["reference", *(name for name in ("cpu",) if kernels.unusable(name) is None)]
LR = 3e-3


def build(backend, **options):
    model = tiny.build(layers=2)
    options = {"delta": 0.3, "inner_steps": 3, "lr": LR, "weight_decay": 0.1} | options
    return model, MISA(param_groups(model), backend=backend, **options)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def everything(optimizer):
    """Moments, ages and scores, by parameter and name."""
    return {
        (index, name): value.clone()
        for index, own in optimizer.state_dict()["state"].items()
        for name, value in own.items()
    }


def draws(optimizer):
    return [record.active for record in optimizer.monitor.rounds]


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulated_batches_are_the_big_batch(backend):
    (split, ours), (whole, theirs) = build(backend), build(backend)
    for step in range(8):
        tokens = tiny.batch(step)
        active = ours.active
        for part in tokens.chunk(2):
            (tiny.loss_of(split, part) / 2).backward()
            # A switch inside the window would lose what has been accumulated.
            assert ours.active == active
        tiny.loss_of(whole, tokens).backward()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert draws(ours) == draws(theirs) and len(draws(ours)) == 3
    for p, q in zip(split.parameters(), whole.parameters(), strict=True):
        # Where a gradient is nearly 0, Adam turns its rounding into a part of lr.
        assert (p - q).abs().mean() < 1e-3 * LR


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limit", [0.1, 1e6])
@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_], ids=["norm", "value"])
def test_torchs_clipping_at_delta_one_is_adamws(clip, limit, backend):
    limit = limit / 100 if clip is nn.utils.clip_grad_value_ else limit
    models = [tiny.build(layers=1) for _ in range(2)]
    ours = MISA(models[0].parameters(), lr=LR, delta=1.0, inner_steps=3, backend=backend)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=LR)
    for step in range(8):
        tiny.loss_of(models[0], tiny.batch(step)).backward()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            q.grad = p.grad.clone()
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            before = [p.grad.clone() for p in model.parameters()]
            clip(model.parameters(), limit)
            assert all(map(torch.equal, before, [p.grad for p in model.parameters()])) == (limit > 1)
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def score_after(kind, backend):
    """Sum of the scores of the first round's modules, and ‖g‖² of the gradient before any clipping."""
    options = {"max_grad_norm": 0.01} if kind == "max_grad_norm" else {}
    model, optimizer = build(backend, inner_steps=1, **options)
    active = optimizer.active
    tiny.loss_of(model, tiny.batch(0)).backward()
    square = sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None)
    if kind == "clip_grad_norm_":
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    if kind == "clip_grad_value_":
        nn.utils.clip_grad_value_(model.parameters(), 1e-5)
    seen = sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None)
    optimizer.step()
    return optimizer.monitor.current.importance[active].sum(), square, seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["max_grad_norm", "clip_grad_norm_", "clip_grad_value_"])
def test_scores_are_of_the_gradient_that_step_finds(kind, backend):
    """Before our own clipping, after that of others."""
    score, square, seen = score_after(kind, backend)
    assert score == pytest.approx(seen, rel=1e-5)
    assert (seen == square) == (kind == "max_grad_norm")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled and clipped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_that_grad_scaler_skips_changes_nothing_but_the_count(dtype, unscale, backend):
    model, optimizer = build(backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    first = optimizer.active
    for step in range(3):
        with torch.autocast("cpu", dtype=dtype):
            loss = tiny.loss_of(model, tiny.batch(step))
        scaler.scale(loss).backward()
        if step == 1:
            next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        before = weights(model), everything(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        # The skipped call is one of the round's three.
        assert (optimizer.active == first and len(draws(optimizer)) == 1) == (step < 2)
        same = all(map(torch.equal, before[0], weights(model)))
        assert same == (step == 1)
        if step == 1:
            after = everything(optimizer)
            assert after.keys() == before[1].keys()
            assert all(torch.equal(value, after[key]) for key, value in before[1].items())
            assert scaler.get_scale() == 512
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler_by_a_power_of_two_changes_no_bit(backend):
    (scaled, ours), (plain, theirs) = build(backend), build(backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for step in range(7):
        scaler.scale(tiny.loss_of(scaled, tiny.batch(step))).backward()
        scaler.step(ours)
        scaler.update()
        ours.zero_grad()
    tiny.train(plain, theirs, 7)
    assert draws(ours) == draws(theirs)
    assert all(map(torch.equal, scaled.parameters(), plain.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_closures_are_called_once_with_gradients_on(backend):
    (closed, ours), (plain, theirs) = build(backend), build(backend)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        ours.zero_grad()
        loss = tiny.loss_of(closed, tiny.batch(len(calls) - 1))
        loss.backward()
        return loss

    losses = [ours.step(closure).item() for _ in range(7)]
    assert len(calls) == 7 and losses == tiny.train(plain, theirs, 7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_kept_as_zeros_are_those_of_active_parameters_only(backend):
    (kept, ours), (plain, theirs) = build(backend), build(backend)
    for step in range(9):
        tiny.loss_of(kept, tiny.batch(step)).backward()
        ours.step()
        ours.zero_grad(set_to_none=False)
        assert all(p.grad is None or not p.grad.any() for p in kept.parameters())
        assert all(p.requires_grad or p.grad is None for p in kept.parameters())
    tiny.train(plain, theirs, 9)
    assert draws(ours) == draws(theirs) and len({*draws(ours)}) > 1
    assert all(map(torch.equal, kept.parameters(), plain.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_zeros_is_an_update_as_in_adamw(backend):
    """Unlike None: weights decay, ages advance, and the score counts a zero."""
    p, q = (nn.Parameter(torch.linspace(1, 2, 12).view(3, 4)) for _ in range(2))
    ours = MISA([{"params": [p], "role": "sampled"}], lr=0.1, delta=1.0, inner_steps=2, backend=backend)
    theirs = torch.optim.AdamW([q], lr=0.1)
    for gradient in (torch.ones(3, 4), torch.zeros(3, 4)):
        for param, optimizer in ((p, ours), (q, theirs)):
            param.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(p, q)
    # A twelve and a zero.
    assert ours.monitor.current.importance == pytest.approx([12 / 2])


def test_a_grad_scaler_that_saw_no_gradient_changes_nothing():
    model = tiny.build()
    optimizer = MISA(param_groups(model), delta=0.2)
    before = [param.detach().clone() for param in model.parameters()]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros((), requires_grad=True)).backward()
    scaler.step(optimizer)
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a run of")
def test_the_example_of_a_plain_loop_trains():
    losses = loop_plain.main(steps=6)
    assert len(losses) == 6 and losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a run of")
def test_every_round_that_ended_is_logged(monkeypatch):
    """The loss of each of 12 steps, and figures of the two rounds of five that have ended."""
    written = {}
    monkeypatch.setitem(logging_runs.LOGGERS, "wandb", lambda folder: written.__setitem__)
    losses = logging_runs.main("wandb", steps=12)
    assert [values["loss"] for values in written.values()] == losses and losses[-1] < losses[0]
    assert [step for step, values in written.items() if "misa/active_fraction" in values] == [5, 10]
    assert all(0.15 < written[step]["misa/active_fraction"] <= 0.25 for step in (5, 10))


def test_figures_are_found_in_tensorboards_files(tmp_path):
    if "CI" not in os.environ:
        pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = logging_runs.to_tensorboard(str(tmp_path))
    log(3, {"loss": 2.5, "misa/backward_depth": 4})
    log(4, {"loss": 1.5})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5), (4, 1.5)]
    assert [(event.step, event.value) for event in events.Scalars("misa/backward_depth")] == [(3, 4)]


def test_a_missing_logger_is_named_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="pip install wandb"):
        logging_runs.main("wandb", str(tmp_path))
