"""`release_gradients=True`: the same numbers with less memory, and refused where it would give others."""

import gc
import os
import weakref

import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import PeakMemory
from benchmarks.train.llama import Llama, Shape
from misa_kernels import MISA, CyclicSampler, ImportanceSampler, kernels, paper, param_groups
from misa_kernels.memory.codec import FORMATS

BACKENDS = ["reference", *(name for name in ("cpu",) if kernels.unusable(name) is None)]
# A step of `tiny` takes the interpreter seconds.
TINIEST = [*BACKENDS, "triton"] if os.environ.get("TRITON_INTERPRET") == "1" else BACKENDS
OPTIONS = {
    "default": {},
    # Modules of several tensors, whose score is that of all of them; scores of norms, not of squares.
    "layers": {"sampler": CyclicSampler(granularity="layer"), "keep_states": "none"},
    "paper": paper(),
    "norms of layers": {"sampler": ImportanceSampler(granularity="layer", importance_norm="norm")},
    "stochastic": {"param_precision": "stochastic"},
}


def build(dtype=torch.float32, seed=0, **options):
    model = tiny.build(dtype=dtype)
    options = {"delta": 0.3, "inner_steps": 3, "lr": 3e-3, "weight_decay": 0.1} | options
    return model, MISA(param_groups(model, "pretrain"), seed=seed, **options)


def assert_same(a, b):
    for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.equal(p, q)
    ours, theirs = (optimizer.state_dict()["state"] for _, optimizer in (a, b))
    for index, own in ours.items():
        assert own.keys() == theirs[index].keys()
        for name, value in own.items():
            assert torch.equal(value.flatten().view(torch.uint8), theirs[index][name].flatten().view(torch.uint8)), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_losses_weights_and_state_are_those_of_a_run_without_it(backend, dtype, options):
    plain, releasing = (
        build(dtype, backend=backend, release_gradients=release, **OPTIONS[options]) for release in (False, True)
    )
    assert tiny.train(*plain, 11) == tiny.train(*releasing, 11)
    assert [r.active for r in plain[1].monitor.rounds] == [r.active for r in releasing[1].monitor.rounds]
    assert_same(plain, releasing)


@pytest.mark.parametrize("state_dtype", FORMATS)
def test_every_format_in_split_weights_gives_the_same(state_dtype):
    options = {"backend": "reference", "state_dtype": state_dtype, "param_precision": "split"}
    plain, releasing = (build(torch.bfloat16, release_gradients=r, **options) for r in (False, True))
    assert tiny.train(*plain, 8) == tiny.train(*releasing, 8)
    assert_same(plain, releasing)


@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_in_mid_round_with_or_without_it_is_bitwise(backend):
    straight = build(torch.bfloat16, backend=backend)
    losses = tiny.train(*straight, 10)
    model, optimizer = build(torch.bfloat16, backend=backend, release_gradients=True)
    first = tiny.train(model, optimizer, 4)
    again, resumed = build(torch.bfloat16, backend=backend, seed=9, release_gradients=True)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert first + tiny.train(again, resumed, 6, start=4) == losses
    assert_same(straight, (again, resumed))


def test_no_gradient_outlives_backward_and_step_only_counts():
    model, optimizer = build(release_gradients=True)
    for step in range(7):
        before = [p.detach().clone() for p in model.parameters()]
        trained = [p.requires_grad for p in model.parameters()]
        tiny.loss_of(model, tiny.batch(step)).backward()
        assert all(p.grad is None for p in model.parameters())
        moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert moved == trained
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert all(map(torch.equal, model.parameters(), before))
    assert len(optimizer.monitor.rounds) == 3


@pytest.mark.parametrize("backend", TINIEST)
def test_blocks_of_one_tensor_and_missing_gradients(backend):
    """Module a waits for both tensors, b and c for one; now and then the other's gradient never comes."""

    def run(release):
        torch.manual_seed(1)
        params = [nn.Parameter(torch.randn(rows, 6)) for rows in (8, 8, 40)]
        groups = [{"params": params[:2], "role": "sampled", "modules": [["a", "b"], ["a", "c"]]}]
        groups += [{"params": params[2:], "role": "sampled", "modules": ["wide"]}]
        with pytest.warns(UserWarning, match="row blocks"):
            sampler = ImportanceSampler(oversized="split")
            optimizer = MISA(
                groups, delta=0.5, inner_steps=3, sampler=sampler, backend=backend, release_gradients=release
            )
        for step in range(12):
            used = [p for n, p in enumerate(params) if (step + n) % 4]
            loss = sum((p * p).sum() for p in used if p.requires_grad)
            if isinstance(loss, torch.Tensor):
                loss.backward()
            optimizer.step()
            if release:
                assert all(p.grad is None for p in params)
            optimizer.zero_grad()
        return params, optimizer

    (a, plain), (b, releasing) = run(False), run(True)
    assert all(map(torch.equal, a, b))
    assert [r.active for r in plain.monitor.rounds] == [r.active for r in releasing.monitor.rounds]
    for p, q in zip(a, b, strict=True):
        for name in ("age", "updates", "score_sum", "importance"):
            assert torch.equal(plain.state[p][name], releasing.state[q][name]), name


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_small_gradients_wait_for_one_another_and_none_outlives_backward(reentrant):
    """80 modules, some of them within a backward pass of their own."""

    def run(release):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(6, 6)) for _ in range(80)]
        optimizer = MISA(params, delta=1.0, inner_steps=3, release_gradients=release)
        for step in range(4):
            x = torch.linspace(-1, 1, 6, requires_grad=True)
            for first in range(0, 80, 16):

                def layers(x, first=first):
                    for param in params[first : first + 16]:
                        x = torch.tanh(x @ param)
                    return x

                inside = reentrant is not None and first % 32 == 0
                x = checkpoint(layers, x, use_reentrant=reentrant) if inside else layers(x)
            (x.sum() * (step + 1)).backward()
            assert not release or all(param.grad is None for param in params)
            optimizer.step()
            optimizer.zero_grad()
        return params

    assert all(map(torch.equal, run(False), run(True)))


def test_gradients_set_by_hand_are_used_by_step():
    results = []
    for release in (False, True):
        p = nn.Parameter(torch.ones(4, 4))
        optimizer = MISA([p], delta=1.0, release_gradients=release)
        p.grad = torch.full((4, 4), 0.5)
        optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results) and (results[0] < 1).all()


def test_learning_rate_is_read_in_backward():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = MISA([p], delta=1.0, lr=0.0, release_gradients=True, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.25
    p.sum().backward()
    torch.testing.assert_close(p.detach(), torch.full((4, 4), 0.75))


def test_model_may_be_cast_before_the_first_step():
    model, optimizer = build(release_gradients=True)
    model.to(torch.bfloat16)
    tiny.train(model, optimizer, 4)
    assert any("master" in own for own in optimizer.state.values())


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}])
def test_what_needs_all_gradients_at_once_is_refused(options):
    model = tiny.build()
    with pytest.raises(ValueError, match="they need all gradients at once.*leave it out, or them"):
        MISA(param_groups(model), delta=0.3, release_gradients=True, **options)
    assert all(p.requires_grad for p in model.parameters())


def test_accumulation_is_refused_at_the_second_backward():
    model, optimizer = build(release_gradients=True)
    tiny.loss_of(model, tiny.batch(0)).backward()
    with pytest.raises(RuntimeError, match=r"call step\(\) after every backward\(\)"):
        tiny.loss_of(model, tiny.batch(1)).backward()


def test_grad_scaler_is_refused():
    model, optimizer = build(release_gradients=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(tiny.loss_of(model, tiny.batch(0))).backward()
    with pytest.raises(RuntimeError, match="train in bfloat16 without one"):
        scaler.step(optimizer)


def test_release_and_deletion_end_it():
    model, optimizer = build(release_gradients=True)
    tiny.train(model, optimizer, 2)
    optimizer.release()
    before = [p.detach().clone() for p in model.parameters()]
    tiny.loss_of(model, tiny.batch(0)).backward()
    assert all(map(torch.equal, model.parameters(), before))
    assert all(p.grad is not None for p in model.parameters())

    model, optimizer = build(release_gradients=True)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    tiny.loss_of(model, tiny.batch(0)).backward()
    assert any(p.grad is not None for p in model.parameters())


def peak_of_a_step(backend, release):
    """Most bytes beyond model and state that a step takes, and bytes of the gradients."""
    torch.manual_seed(0)
    shape = Shape(vocab=256, hidden=128, intermediate=344, layers=32, heads=4, kv_heads=2)
    model = Llama(shape, checkpointing=True)
    optimizer = MISA(param_groups(model), delta=0.25, backend=backend, release_gradients=release)
    tokens = torch.randint(256, (1, shape.hidden // 4))
    for _ in range(2):
        with PeakMemory() as memory:
            model(tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    return memory.peak_bytes, sum(p.nbytes for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_peak_falls_by_the_gradients(backend):
    """As for 8 billion parameters, 32 layers of 4096, on 1024 tokens with activation checkpointing."""
    (peak, gradients), (lower, _) = (peak_of_a_step(backend, release) for release in (False, True))
    assert peak - lower >= 0.8 * gradients, (peak, lower, gradients)
